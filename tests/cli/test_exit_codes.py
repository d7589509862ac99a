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


def test_errors_speak_of_flags() -> None:
    error = errors.RejectedError("CreateJob", "INVALID_ARGUMENT", "maxCPU: -1 is negative")
    assert message_of(error) == "--max-cpu: -1 is negative"
