"""The fuzzers that are programs of their own run beside the tests that are fuzzers themselves."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fuzz import builds, seeds
from fuzz.builds import FIGURES, FOLDER, FUZZ_SECONDS, NOT_TESTED, Background, CheckedPackage

LONGEST_INPUT_BYTES = 4096
HANG_SECONDS = 20


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if FIGURES:
        terminalreporter.write_sep("-", "fuzzed")
        terminalreporter.write("".join(f"{figure}\n" for figure in FIGURES))
    if NOT_TESTED:
        terminalreporter.write_sep("!", "NOT TESTED", red=True, bold=True)
        terminalreporter.write("".join(f"{line}\n" for line in NOT_TESTED), red=True, bold=True)


@pytest.fixture(scope="session")
def checked_package(tmp_path_factory: pytest.TempPathFactory) -> CheckedPackage:
    """jobworker under ASan and UBSan."""
    return builds.build_package(tmp_path_factory.mktemp("checked"), "address,undefined")


@dataclass(frozen=True)
class NativeFuzzers:
    jobinit: Background
    logs: Background
    logs_folder: Path


@pytest.fixture(scope="session")
def native_fuzzers(
    tmp_path_factory: pytest.TempPathFactory, checked_package: CheckedPackage
) -> Iterator[NativeFuzzers]:
    folder = tmp_path_factory.mktemp("fuzz")
    program, is_libfuzzer = builds.build_target()
    command = [str(program), *_arguments(folder, is_libfuzzer)]
    script = str(Path(__file__).with_name("damaged_logs.py"))
    fuzzers = NativeFuzzers(
        Background(command, folder / "jobinit", {}),
        checked_package.start(folder / "logs", script, str(FUZZ_SECONDS), str(folder / "damaged")),
        folder / "damaged",
    )
    yield fuzzers
    fuzzers.jobinit.end()
    fuzzers.logs.end()


def _arguments(folder: Path, is_libfuzzer: bool) -> list[str]:
    (folder / "seeds").mkdir()
    seeds.write(folder / "seeds")
    if not is_libfuzzer:
        current = FOLDER / f"jobinit-{time.time_ns()}"
        inputs = sorted((folder / "seeds").iterdir())
        return [str(int(FUZZ_SECONDS)), str(current), *map(str, inputs)]
    (FOLDER / "corpus").mkdir(exist_ok=True)
    return [
        f"-max_total_time={int(FUZZ_SECONDS)}",
        f"-max_len={LONGEST_INPUT_BYTES}",
        f"-timeout={HANG_SECONDS}",
        f"-artifact_prefix={FOLDER}/jobinit-",
        "-print_final_stats=1",
        str(FOLDER / "corpus"),
        str(folder / "seeds"),
    ]
