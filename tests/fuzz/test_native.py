"""What jobinit and the extension are given by others: messages, and files of logs."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from fuzz import builds, seeds
from fuzz.builds import FIGURES, FOLDER, FUZZ_SECONDS
from fuzz.conftest import NativeFuzzers

pytestmark = pytest.mark.timeout(FUZZ_SECONDS + 180)

LONGEST_END_SECONDS = FUZZ_SECONDS + 60


def test_each_kind_of_start_comes_to_its_exec(tmp_path: Path) -> None:
    """Else the fuzz target does not play along any more, and most of jobinit is not tested."""
    expected = seeds.write(tmp_path)
    inputs = sorted(tmp_path.iterdir())
    done = subprocess.run(
        [builds.build_blind_target(), "0", tmp_path / "current", *inputs],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (
        0,
        f"runs {len(inputs)} execs {expected}\n",
    ), done.stderr


def test_no_message_harms_jobinit(native_fuzzers: NativeFuzzers) -> None:
    """What does is in build/fuzz: `build/fuzz/jobinit_messages FILE` runs it again."""
    said = native_fuzzers.jobinit.wait(LONGEST_END_SECONDS)
    runs = re.findall(r"Done (\d+) runs|runs (\d+) execs", said)[-1]
    FIGURES.append(f"messages to jobinit: {''.join(runs)} conversations")


def test_no_damaged_log_is_taken_for_a_whole_one(native_fuzzers: NativeFuzzers) -> None:
    """What is is in build/fuzz: `tests/fuzz/damaged_logs.py 0 FOLDER` reads it again."""
    try:
        said = native_fuzzers.logs.wait(LONGEST_END_SECONDS)
    except AssertionError as error:
        kept = FOLDER / f"logs-{time.time_ns()}"
        shutil.copytree(native_fuzzers.logs_folder, kept)
        raise AssertionError(f"the files are in {kept}") from error
    logs, errors = re.findall(r"logs (\d+) errors (\d+)", said)[-1]
    FIGURES.append(f"damaged logs: {logs}, of which {errors} reads were refused")
