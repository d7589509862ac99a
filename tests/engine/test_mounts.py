"""Whether a look at a file may wait for somebody else, and where else files are in sight."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from jobworker.engine.mounts import Mounts, _is_local

# Sees no mount of the machine change: in a mount namespace of its own, where it changes them.
SCRIPT = """
import json, os, subprocess
from jobworker.engine.mounts import Mounts
mounts = Mounts()
seen = [mounts.are_local()]
os.mkdir("/tmp/inside")
for command in (
    ["mount", "-t", "tmpfs", "none", "/tmp/inside"],
    ["mount", "-t", "mqueue", "none", "/tmp/inside"],
    ["umount", "/tmp/inside"],
):
    subprocess.run(command, check=True)
    seen.append(mounts.are_local())
mounts.close()
print(json.dumps(seen))
"""


@pytest.mark.parametrize(
    ("line", "is_local"),
    [
        ("27 1 254:0 / / rw,relatime - ext4 /dev/vda rw", True),
        ("31 23 0:28 / /tmp rw,nosuid shared:5 - tmpfs tmpfs rw,size=4k", True),
        ("60 27 0:50 / /nfs rw - nfs4 10.0.0.1:/export rw,vers=4.2", False),
        ("61 27 0:51 / /home/x rw - fuse.sshfs x@y:/ rw", False),
        ("62 27 0:52 / /net rw - autofs systemd-1 rw,fd=29", False),
        ("63 27 0:53 / /proc/sys/fs/binfmt_misc rw - autofs systemd-1 rw", True),
        ("64 27 0:54 / /process rw - 9p host rw", False),
        ("22 27 0:21 / /proc rw,relatime - proc proc rw", True),
        ("23 27 0:22 / /unknown rw - a-filesystem-of-later-days none rw", False),
    ],
)
def test_what_is_local(line: str, is_local: bool) -> None:
    assert _is_local(line) is is_local


def test_this_machines_are_read_to_the_end() -> None:
    mounts = Mounts()
    with open("/proc/self/mountinfo") as file:
        assert mounts._lines() == file.read().splitlines()
    mounts.close()


def answer_of(script: str) -> Any:
    """Of a script that may mount, in /tmp of its own."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount")
    alone = "mount --make-rprivate / && mount -t tmpfs none /tmp && exec "
    answer = subprocess.run(
        ["unshare", "-m", "sh", "-c", alone + '"$@"', "sh", sys.executable, "-c", script],
        check=True,
        capture_output=True,
        text=True,
        cwd="/",
    )
    return json.loads(answer.stdout)


def test_a_change_is_seen_at_once() -> None:
    """mqueue stands for a filesystem whose name is not known to be local."""
    before, *changed = answer_of(SCRIPT)
    assert changed == [before, False, before]


# A part of what is hidden, something over it, and another filesystem are not meant.
OTHER_PLACES = """
import json, os, subprocess
from jobworker.engine.mounts import other_places
def mount(*arguments):
    os.makedirs(arguments[-1], exist_ok=True)
    subprocess.run(["mount", *arguments], check=True)
os.makedirs("/tmp/disk/home/one/part")
before = other_places(["/tmp/disk/home/one"])
mount("--bind", "/tmp/disk", "/tmp/all of it")
mount("--bind", "/tmp/disk/home", "/tmp/homes")
mount("--bind", "/tmp/disk/home/one", "/tmp/one")
mount("--bind", "/tmp/disk/home/one/part", "/tmp/part")
mount("--bind", "/tmp/disk", "/tmp/covered")
mount("-t", "tmpfs", "none", "/tmp/covered/home")
os.mkdir("/tmp/covered/home/one")
mount("-t", "proc", "proc", "/tmp/proc")
found = [other_places([path]) - before for path in ("/tmp/disk/home/one", "/tmp/homes/one", "/")]
print(json.dumps([sorted(each) for each in found]))
"""


def test_where_else_it_is_mounted() -> None:
    original, other, root = answer_of(OTHER_PLACES)
    assert original == ["/tmp/all of it/home/one", "/tmp/homes/one", "/tmp/one", "/tmp/proc"]
    assert other == ["/tmp/all of it/home/one", "/tmp/disk/home/one", "/tmp/one", "/tmp/proc"]
    assert root == ["/tmp/proc"]
