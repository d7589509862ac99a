"""What holds for all tests."""

from __future__ import annotations

import os
import shutil
import tempfile

ROOM_BYTES = 8 << 30


def pytest_configure() -> None:
    """Jobs write gigabytes here. Where the usual folder for temporary files is in memory, as on
    many machines, there is the one that outlives a restart."""
    if shutil.disk_usage(tempfile.gettempdir()).free < ROOM_BYTES:
        os.environ["TMPDIR"] = tempfile.tempdir = "/var/tmp"
