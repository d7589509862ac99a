"""What is not Python, built once more with the compiler's checks, beside what is shipped.

A checked package is a copy of jobworker in which extension and jobinit are those builds: with
its folder in PYTHONPATH, any test runs with them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import jobworker
from kernel import uml

ROOT = Path(__file__).parents[2]
# Also of what failed, so that it can be looked at.
FOLDER = ROOT / "build" / "fuzz"
TARGET = Path(__file__).with_name("jobinit_messages.c")

# How long each fuzzer runs.
FUZZ_SECONDS = float(os.environ.get("FUZZ_SECONDS") or 15)

CHECKED = ["-g", "-O1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
# Nothing that a log or a message asks for takes as much memory as that.
ASAN_OPTIONS = "detect_leaks=0:abort_on_error=1:handle_abort=1:max_allocation_size_mb=256"
LONGEST_REPORT = 20_000

# What was run, for the end of the run; and what was not.
FIGURES: list[str] = []
NOT_TESTED: list[str] = []
# jobinit is started with an empty environment. It is not dumpable, so that no search for leaks
# can look at it; valgrind does that.
OPTIONS_OF_JOBINIT = f'const char *__asan_default_options(void) {{ return "{ASAN_OPTIONS}"; }}\n'


@dataclass(frozen=True)
class CheckedPackage:
    """environment: what a Python needs to run with it."""

    folder: Path
    environment: dict[str, str]

    def start(self, log: Path, *arguments: str, **more: str) -> Background:
        """python ARGUMENT..., with more in its environment."""
        command = [sys.executable, *arguments]
        return Background(command, log, self.environment | more)

    def start_tests(self, log: Path, *arguments: str) -> Background:
        """The tests themselves, in a pytest of their own."""
        options = ("-p", "no:cacheprovider", "--quiet", "--color=no")
        return self.start(log, "-m", "pytest", *options, *arguments)


class Background:
    """A program that runs while others do. It ends with `wait` or `end`."""

    def __init__(self, command: list[str], log: Path, environment: dict[str, str]) -> None:
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def wait(self, seconds: float) -> str:
        """What it has said. Its exit code has to be 0."""
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = -1
        finally:
            self.end()
        text = self._log.read_text(errors="replace")
        assert code == 0, f"exit code {code}\n{text[-LONGEST_REPORT:]}"
        return text

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()


def copy_package(folder: Path) -> CheckedPackage:
    """As it was built, and yet to be changed."""
    shutil.copytree(
        Path(jobworker.__path__[0]),
        folder / "jobworker",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    return CheckedPackage(folder, environment_for(folder))


def environment_for(folder: Path) -> dict[str, str]:
    # Safe: without the folder that it runs in, where the sources are.
    return {"PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"}


def build_package(folder: Path, sanitizers: str) -> CheckedPackage:
    """sanitizers: as of gcc's -fsanitize, such as `address,undefined`."""
    package = copy_package(folder).folder / "jobworker"
    for built in (*package.glob("*.so"), *package.glob("_bin/*")):
        built.unlink()
    flags = [*CHECKED, f"-fsanitize={sanitizers}"]
    _build_extension(package, flags)
    if "address" in sanitizers:
        build_jobinit(package / "_bin" / "jobinit", flags)
    first = sanitizers.partition(",")[0]
    runtime = {"address": "libasan.so", "thread": "libtsan.so"}[first]
    return CheckedPackage(
        folder,
        {
            **environment_for(folder),
            # Python is not linked with it, and it has to come first.
            "LD_PRELOAD": _output("gcc", f"-print-file-name={runtime}"),
            "ASAN_OPTIONS": ASAN_OPTIONS,
            "UBSAN_OPTIONS": "print_stacktrace=1",
            # Python's own allocator would hide where a bytes object ends.
            "PYTHONMALLOC": "malloc",
        },
    )


def _build_extension(package: Path, flags: list[str]) -> None:
    source = package.parent / "_fastio.c"
    _run(sys.executable, "-m", "cython", str(ROOT / "jobworker/_fastio.pyx"), "-o", str(source))
    include = sysconfig.get_path("include")
    target = package / f"_fastio{sysconfig.get_config_var('EXT_SUFFIX')}"
    _run("gcc", *flags, "-shared", "-fPIC", f"-I{include}", str(source), "-o", str(target))


def build_jobinit(path: Path, flags: list[str]) -> None:
    """Not static, as a sanitizer's runtime cannot be."""
    options = path.with_suffix(".c")
    options.write_text(OPTIONS_OF_JOBINIT)
    _run("gcc", *flags, str(ROOT / "jobinit.c"), str(options), "-o", str(path))


def build_target() -> tuple[Path, bool]:
    """jobinit_messages.c; whether it is libFuzzer's."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    path, flags = FOLDER / "jobinit_messages", [*CHECKED, "-fsanitize=address,undefined"]
    problem = why_not("clang", "clang", "libclang-rt-dev")
    if not problem:
        _run("clang", *flags, "-fsanitize=fuzzer", str(TARGET), "-o", str(path))
        return path, True
    NOT_TESTED.append(f"jobinit under libFuzzer, only with random changes: {problem}")
    return build_blind_target(), False


def build_blind_target() -> Path:
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / "jobinit_messages_blind"
    flags = [*CHECKED, "-fsanitize=address,undefined", "-DBLIND"]
    _run("gcc", *flags, str(TARGET), "-o", str(path))
    return path


def why_not(program: str, *packages: str) -> str:
    """Why there is no such program; empty where there is. Installs it where it may."""
    if program == "clang" and shutil.which(program) and not _has_libfuzzer():
        program = "libFuzzer"  # a clang without its runtime
    if shutil.which(program):
        return ""
    if os.getuid() != 0 or not shutil.which("apt-get"):
        return f"no {program} here (Debian: apt-get install {' '.join(packages)})"
    return uml._install(list(packages))


def _has_libfuzzer() -> bool:
    runtime = Path(_output("clang", "-print-runtime-dir"))
    return any(runtime.glob("libclang_rt.fuzzer*"))


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
