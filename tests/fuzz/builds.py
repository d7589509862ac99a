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

ROOT = Path(__file__).parents[2]
# Also of what failed, so that it can be looked at.
FOLDER = ROOT / "build" / "fuzz"

# How long each fuzzer runs.
FUZZ_SECONDS = float(os.environ.get("FUZZ_SECONDS") or 15)

CHECKED = ["-g", "-O1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
ASAN_OPTIONS = "detect_leaks=0:abort_on_error=1:handle_abort=1"
# jobinit is started with an empty environment. It is not dumpable, so that no search for leaks
# can look at it; valgrind does that.
OPTIONS_OF_JOBINIT = f'const char *__asan_default_options(void) {{ return "{ASAN_OPTIONS}"; }}\n'


@dataclass(frozen=True)
class CheckedPackage:
    """environment: what a Python needs to run with it."""

    folder: Path
    environment: dict[str, str]

    def run(self, *arguments: str, seconds: float) -> subprocess.CompletedProcess[str]:
        """python ARGUMENT..."""
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=os.environ | self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds,
        )


def build_package(folder: Path, sanitizers: str) -> CheckedPackage:
    """sanitizers: as of gcc's -fsanitize, such as `address,undefined`."""
    package = folder / "jobworker"
    unwanted = shutil.ignore_patterns("*.so", "_bin", "__pycache__")
    shutil.copytree(Path(jobworker.__path__[0]), package, ignore=unwanted)
    flags = [*CHECKED, f"-fsanitize={sanitizers}"]
    _build_extension(package, flags)
    if "address" in sanitizers:
        (package / "_bin").mkdir()
        build_jobinit(package / "_bin" / "jobinit", flags)
    first = sanitizers.partition(",")[0]
    runtime = {"address": "libasan.so", "thread": "libtsan.so"}[first]
    return CheckedPackage(
        folder,
        {
            "PYTHONPATH": str(folder),
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


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
