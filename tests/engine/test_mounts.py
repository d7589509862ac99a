"""Whether a look at a file may wait for somebody else, and where else files are in sight."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.own_mounts import answer_of
from jobworker.engine.mounts import Mounts, _is_local, parse_mountinfo, read_mounts

MOUNTINFO = r"""
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard,resuid=65534
31 23 0:28 / /tmp rw,nosuid shared:5 - tmpfs tmpfs rw,size=4k,mode=755
36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 shared:2 - ext3 /dev/root rw,errors=continue
40 27 259:2 / /srv/with\040space rw - xfs /dev/mapper/vg\134x rw,attr2
70 27 0:60 / /box rw - overlay overlay rw,lowerdir=/l1:/l2,upperdir=/gone/a\054b,workdir=/w
""".lstrip("\n")


def test_mountinfo() -> None:
    mounts = parse_mountinfo(MOUNTINFO)

    assert list(mounts) == [27, 31, 36, 40, 70]
    assert (mounts[27].device, mounts[27].point, mounts[27].filesystem) == ("254:0", "/", "ext4")
    assert (mounts[36].root, mounts[36].source) == ("/mnt1", "/dev/root")
    assert (mounts[40].point, mounts[40].source) == ("/srv/with space", r"/dev/mapper/vg\x")
    assert mounts[31].options == {"rw": "", "size": "4k", "mode": "755"}
    assert mounts[70].options["upperdir"] == "/gone/a,b"


# In a mount namespace of its own, where it changes the mounts. Its argument: a folder.
SCRIPT = """
import json, subprocess, sys
from jobworker.engine.mounts import Mounts
mounts = Mounts()
seen = [mounts.are_local()]
for command in (
    ["mount", "-t", "tmpfs", "none", sys.argv[1]],
    ["mount", "-t", "mqueue", "none", sys.argv[1]],
    ["umount", sys.argv[1]],
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
    (mount,) = parse_mountinfo(line + "\n").values()
    assert _is_local(mount) is is_local


def test_this_machines_are_read_to_the_end() -> None:
    mounts = Mounts()
    assert mounts._read() == read_mounts()
    assert len(read_mounts()) == Path("/proc/self/mountinfo").read_bytes().count(b"\n")
    mounts.close()


def test_a_change_is_seen_at_once(tmp_path: Path) -> None:
    """mqueue stands for a filesystem whose name is not known to be local."""
    before, *changed = answer_of(SCRIPT, tmp_path)
    assert changed == [before, False, before]


# A part of what is hidden, something over it, and another filesystem are not meant.
OTHER_PLACES = """
import json, os, subprocess, sys
from jobworker.engine.mounts import other_places
here = sys.argv[1]
def mount(*arguments):
    os.makedirs(arguments[-1], exist_ok=True)
    subprocess.run(["mount", *arguments], check=True)
mount("-t", "tmpfs", "none", here)
os.makedirs(f"{here}/disk/home/one/part")
before = other_places([f"{here}/disk/home/one"])
mount("--bind", f"{here}/disk", f"{here}/all of it")
mount("--bind", f"{here}/disk/home", f"{here}/homes")
mount("--bind", f"{here}/disk/home/one", f"{here}/one")
mount("--bind", f"{here}/disk/home/one", f"{here}/a\\r\\f\\u2028b")
mount("--bind", f"{here}/disk/home/one/part", f"{here}/part")
mount("--bind", f"{here}/disk", f"{here}/covered")
mount("-t", "tmpfs", "none", f"{here}/covered/home")
os.mkdir(f"{here}/covered/home/one")
mount("-t", "proc", "proc", f"{here}/proc")
mount("-t", "tmpfs", "none", f"{here}/twice/folder")
mount("-t", "tmpfs", "none", f"{here}/twice")
os.makedirs(f"{here}/twice/folder/state")
mount("--bind", f"{here}/twice", f"{here}/twice again")
places = [f"{here}/disk/home/one", f"{here}/homes/one", "/", f"{here}/twice/folder/state"]
found = [other_places([path]) - before for path in places]
print(json.dumps([sorted(os.path.relpath(path, here) for path in each) for each in found]))
"""


def test_where_else_it_is_mounted(tmp_path: Path) -> None:
    original, other, root, over_another = answer_of(OTHER_PLACES, tmp_path)
    assert original == ["a\r\f\u2028b", "all of it/home/one", "homes/one", "one", "proc"]
    assert other == ["a\r\f\u2028b", "all of it/home/one", "disk/home/one", "one", "proc"]
    assert root == ["proc"]
    assert over_another == ["proc", "twice again/folder/state"]
