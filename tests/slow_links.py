"""Ways to a folder that take the kernel long."""

from __future__ import annotations

from pathlib import Path


def slow_way(folder: Path) -> str:
    """To a new folder, by way of others in `folder`: through as many links as the kernel follows,
    some 5 ms."""
    (folder / "39").mkdir(parents=True)
    for number in range(39):
        (folder / str(number)).symlink_to("./" * 2000 + str(number + 1))
    return f"{folder}/0"
