"""jobinit and the extension pass their own tests while the compiler, or valgrind, looks on.

With THOROUGH=1 (`make sanitize`) all of them, and the threads under TSan; else what is quick.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from fuzz import builds
from fuzz.builds import NOT_TESTED, Background, CheckedPackage

THOROUGH = bool(os.environ.get("THOROUGH"))
LONGEST_SECONDS = 600 if THOROUGH else 150

pytestmark = pytest.mark.timeout(LONGEST_SECONDS + 60)

EXTENSION_TESTS = "tests/test_fastio.py"
JOBINIT_TESTS = "tests/engine/test_jobinit.py"

# By the parts of their names. Those of kills take long where the extension is slow.
SLOW = "killed"
# A job's own limits and descriptors are not those that valgrind gives jobinit; and valgrind
# knows no pidfds, so jobinit does without, nor forks into namespaces, or attributes of mounts: so
# no confined jobs, and no views.
NOT_UNDER_VALGRIND = (
    "descriptor or limit or hold or announced or senseless_memfd or ask_again or 500 or 200"
    " or left_of_the_group or leaves_nothing or no_packet or by_hand or kept_locked"
    " or view or arranged or gain_no_rights or hand_down or own_is_none or groups_of_the_jobs_user"
    " or waits_outside"
)
QUICK_UNDER_VALGRIND = (
    "failed or merged or argv or memfd or adopt or makes_no_sense or reads_its_input"
)
# TSan's runtime does not live through unshare and fork.
NOT_UNDER_TSAN = "killed or never_had_room"

DAMAGED_LOGS = str(Path(__file__).with_name("damaged_logs.py"))
DAMAGED_LOGS_SECONDS = 10
# What Python itself does to objects that live for ever.
OF_PYTHON = "".join(
    f"{{\n{kind}\nMemcheck:{kind}\nobj:{place}\n}}\n"
    for kind in ("Cond", "Value8")
    for place in ("*/libpython3*", "*/bin/python3*")
)

VALGRIND = """#!/bin/sh
exec valgrind --quiet --error-exitcode=99 --leak-check=full --log-file={log}.%p {binary} "$@"
"""


def test_extension_and_jobinit_under_asan_and_ubsan(
    checked_package: CheckedPackage, tmp_path: Path
) -> None:
    where = "import jobworker._fastio as f, sys; sys.stdout.write(f.__file__)"
    used = checked_package.start(tmp_path / "where", "-c", where).wait(LONGEST_SECONDS)
    assert used.startswith(str(checked_package.folder))

    selected = [] if THOROUGH else ["-k", f"not {SLOW}"]
    running = [
        checked_package.start_tests(tmp_path / "extension", EXTENSION_TESTS, *selected),
        checked_package.start_tests(tmp_path / "jobinit", JOBINIT_TESTS),
    ]
    wait_all(running)


def test_jobinit_under_valgrind(tmp_path: Path) -> None:
    """Looks for what was never written, and for leaks."""
    if problem := builds.why_not("valgrind", "valgrind", "libc6-dbg"):
        NOT_TESTED.append(f"jobinit under valgrind: {problem}")
        pytest.skip(problem)
    package = builds.copy_package(tmp_path / "package")
    binary = tmp_path / "jobinit"
    builds.build_jobinit(binary, ["-g", "-O1"])
    script = package.folder / "jobworker" / "_bin" / "jobinit"
    script.write_text(VALGRIND.format(log=tmp_path / "valgrind", binary=binary))
    script.chmod(0o755)

    selected = f"not ({NOT_UNDER_VALGRIND})"
    if not THOROUGH:
        selected += f" and ({QUICK_UNDER_VALGRIND})"
    try:
        package.start_tests(tmp_path / "tests", JOBINIT_TESTS, "-k", selected).wait(LONGEST_SECONDS)
    finally:
        said = "".join(path.read_text() for path in tmp_path.glob("valgrind.*"))
    assert "== " not in said, said


@pytest.mark.skipif(not THOROUGH, reason="`make sanitize` has it")
def test_extension_under_valgrind(tmp_path: Path) -> None:
    """While it writes and reads logs, damaged ones among them."""
    if problem := builds.why_not("valgrind", "valgrind", "libc6-dbg"):
        NOT_TESTED.append(f"the extension under valgrind: {problem}")
        pytest.skip(problem)
    (tmp_path / "of-python").write_text(OF_PYTHON)
    command = ["valgrind", "--quiet", f"--suppressions={tmp_path}/of-python", sys.executable]
    work = [DAMAGED_LOGS, str(DAMAGED_LOGS_SECONDS), str(tmp_path / "logs")]
    background = Background([*command, *work], tmp_path / "said", {"PYTHONMALLOC": "malloc"})
    found = re.split(r"==\d+== \n", background.wait(LONGEST_SECONDS))
    problems = [problem for problem in found if "_fastio" in problem]
    assert not problems, "\n".join(problems)


@pytest.mark.skipif(not THOROUGH, reason="`make sanitize` has it")
def test_threads_under_tsan(tmp_path: Path) -> None:
    package = builds.build_package(tmp_path / "package", "thread")
    said = package.start_tests(
        tmp_path / "tests", EXTENSION_TESTS, "-s", "-k", f"not ({NOT_UNDER_TSAN})"
    ).wait(LONGEST_SECONDS)
    assert "ThreadSanitizer" not in said, said


def wait_all(running: list[Background]) -> None:
    try:
        for each in running:
            each.wait(LONGEST_SECONDS)
    finally:
        for each in running:
            each.end()
