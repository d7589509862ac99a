"""Disks as mountinfo and sysfs tell of them; limits on real ones are in tests/kernel."""

from __future__ import annotations

from pathlib import Path

import pytest

from descriptors import no_descriptors
from jobworker.engine import disks
from jobworker.engine.disks import disks_behind, sum_io
from jobworker.engine.mounts import parse_mountinfo
from jobworker.errors import CgroupError

MOUNTINFO = r"""
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard,resuid=65534
31 23 0:28 / /tmp rw,nosuid shared:5 - tmpfs tmpfs rw,size=4k,mode=755
36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 shared:2 - ext3 /dev/root rw,errors=continue
40 27 259:2 / /srv/with\040space rw - xfs /dev/mapper/vg\134x rw,attr2
50 27 0:45 /@home /home rw,relatime shared:29 - btrfs /dev/no-such-disk rw,subvol=/@home
60 27 0:50 / /nfs rw - nfs4 10.0.0.1:/export rw,vers=4.2,addr=10.0.0.1
61 27 0:51 / /sshfs rw - fuse.sshfs me@there: rw,user_id=0
62 27 8:17 / /ntfs rw - fuseblk /dev/sdb1 rw,user_id=0
63 27 0:52 / /zfs rw - zfs pool/data rw,xattr
70 27 0:60 / /box rw - overlay overlay rw,lowerdir=/l1:/l2,upperdir=/gone/a\054b,workdir=/w
71 27 0:61 / /seen ro - overlay overlay ro,lowerdir=/l1:/l2
""".lstrip("\n")


@pytest.mark.parametrize(
    ("mount_id", "devices"),
    [(22, []), (27, ["254:0"]), (31, []), (36, ["98:0"]), (40, ["259:2"])],
)
def test_filesystems_on_a_disk_or_in_memory(mount_id: int, devices: list[str]) -> None:
    mounts = parse_mountinfo(MOUNTINFO)
    assert disks._devices_of(mounts[mount_id], mounts) == devices


@pytest.mark.parametrize(
    ("mount_id", "problem"),
    [
        (50, r"the disks under /home \(btrfs\) cannot be told: /dev/no-such-disk: No such file"),
        (60, r"/nfs is on nfs4 \(10\.0\.0\.1:/export\), which is no disk"),
        (61, r"/sshfs is on fuse\.sshfs"),
        (62, r"/ntfs is on fuseblk \(/dev/sdb1\)"),
        (63, r"/zfs is on zfs"),
        (70, r"/box is an overlay .* cannot be seen from here \(/gone/a,b\)"),
        (71, r"/seen is an overlay .* \(it has none\)"),
    ],
)
def test_filesystems_that_no_limit_reaches(mount_id: int, problem: str) -> None:
    mounts = parse_mountinfo(MOUNTINFO)
    with pytest.raises(CgroupError, match=problem):
        disks._devices_of(mounts[mount_id], mounts)


def test_the_disks_of_this_machine(tmp_path: Path) -> None:
    """Each once, and none for what is not there."""
    once = disks_behind(("/", str(tmp_path)))
    assert disks_behind(("/", str(tmp_path), "/", "/proc", str(tmp_path))) == once
    assert disks_behind(("/proc", "/no/such/directory", "/etc/passwd")) == ([], [])
    for disk in once[0]:
        assert not Path(f"/sys/dev/block/{disk}/partition").exists()


def test_without_a_descriptor_no_disk_is_passed_over() -> None:
    """Its limit would be left out."""
    mounts = parse_mountinfo(MOUNTINFO)
    with no_descriptors():
        with pytest.raises(OSError, match="Too many open files"):
            disks._writable_layer(mounts[70], mounts)
        with pytest.raises(OSError, match="Too many open files"):
            disks._is_stacked("254:0")


@pytest.mark.parametrize(
    ("text", "sums"),
    [
        ("", (0, 0)),
        ("254:0 rbytes=4096 wbytes=1 rios=2 wios=3 dbytes=0 dios=0\n", (4096, 1)),
        ("254:0 rbytes=1 wbytes=2 rios=1\n9000:0 rbytes=10 wbytes=20 rios=1\n", (11, 22)),
        ("7:0 7:1 8:0 rbytes=5 wbytes=6 rios=1 wios=1 dbytes=0 dios=0\n", (5, 6)),
    ],
)
def test_io_is_summed_over_disks(text: str, sums: tuple[int, int]) -> None:
    """The last form is of kernels that write a device without figures (before Linux 5.19)."""
    assert sum_io(text) == sums
