"""Which ended jobs give way; that they do is in functional/test_retention.py."""

from __future__ import annotations

import pytest

from jobworker.engine.retention import Keep, surplus_of
from jobworker.engine.store import EndedJob

SECOND = 1_000_000_000
NOW = 1_000 * SECOND
# Of ten jobs with 100 bytes each, the oldest four: they ended 40, 30, 20 and 10 s ago.
OLDEST = [EndedJob(number, NOW - (50 - 10 * number) * SECOND, 100) for number in range(1, 5)]


@pytest.mark.parametrize(
    ("keep", "ids"),
    [
        (Keep(), []),
        (Keep(jobs=10), []),
        (Keep(jobs=8), [1, 2]),
        (Keep(jobs=1), [1, 2, 3, 4]),
        (Keep(log_bytes=1000), []),
        (Keep(log_bytes=850), [1, 2]),
        (Keep(seconds=25), [1, 2]),
        (Keep(seconds=25, jobs=9), [1, 2]),
        (Keep(seconds=35, jobs=7), [1, 2, 3]),
    ],
)
def test_the_longest_ended_give_way_first(keep: Keep, ids: list[int]) -> None:
    surplus = surplus_of(keep, 10, 1000, OLDEST, NOW)
    assert [each.id for each in surplus] == ids
