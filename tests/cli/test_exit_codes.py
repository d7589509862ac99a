"""The codes that scripts rely on."""

from __future__ import annotations

import pytest

from jobworker import errors
from jobworker.cli.exit_codes import MEANINGS, ExitCode, code_of, message_of


def test_each_code_is_explained() -> None:
    assert set(MEANINGS) == set(ExitCode)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.RejectedError, 2),
        (errors.UnknownJobError, 3),
        (errors.ForbiddenError, 4),
        (errors.UnreachableError, 5),
        (errors.DeadlineError, 5),
        (errors.WrongStateError, 1),
        (errors.ExhaustedError, 1),
        (errors.UnsupportedError, 1),
        (errors.CallError, 1),
    ],
)
def test_each_error_of_a_call_has_its_code(error: type[errors.CallError], code: int) -> None:
    assert code_of(error("GetJob", "", "no")) == code


@pytest.mark.parametrize("space", ["", " " * 1_000_000])
def test_a_shell_line_is_told_however_long_it_is(space: str) -> None:
    for end, is_told in (("' was not found", True), ("", False)):
        text = f"command: 'echo | wc{space}{end}"
        shown = message_of(errors.RejectedError("CreateJob", "INVALID_ARGUMENT", text))
        assert shown == text + ("; for a shell line: sh -c '…'" if is_told else "")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("maxCPU: -1 is negative", "--max-cpu: -1 is negative"),
        ("binds[0].source: '/x' is not there", "--bind: '/x' is not there"),
        ("root: 'x' is not an absolute path", "--root: 'x' is not an absolute path"),
        ("environment: '' is not a variable's name", "--env: '' is not a variable's name"),
        ("command: 'user: x' is not there", "command: 'user: x' is not there"),
    ],
)
def test_errors_speak_of_flags(text: str, shown: str) -> None:
    assert message_of(errors.RejectedError("CreateJob", "INVALID_ARGUMENT", text)) == shown
