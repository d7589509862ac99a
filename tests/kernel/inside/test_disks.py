"""Which disk a directory is on, and that the limit written for it holds there."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobworker.engine.cgroup import CgroupTree
from jobworker.engine.disks import disks_behind
from jobworker.errors import LimitUnavailableError
from jobworker.job import Limits
from kernel.inside.conftest import DISK, Create, device_of, mounted, run, run_in

MIB = 1 << 20
FOLDER = Path("/mnt")
PARTITION = "/dev/ubdb1"
DISK_OF_PARTITION = "/dev/ubdb"


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[str]:
    """A file in memory as a disk."""
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(64 * MIB)
    device = run("losetup", "--find", "--show", image)
    yield device
    run("losetup", "--detach", device)


@pytest.fixture
def linear_device() -> Iterator[str]:
    """All of the partition, through device mapper."""
    if not shutil.which("dmsetup"):
        pytest.skip("NOT TESTED: device mapper, as there is no program dmsetup")
    sectors = run("blockdev", "--getsz", PARTITION)
    run("dmsetup", "create", "linear", "--table", f"0 {sectors} linear {PARTITION} 0")
    run("dmsetup", "mknodes")
    yield "/dev/mapper/linear"
    run("dmsetup", "remove", "--retry", "linear")


def limited_seconds(create: Create, folder: Path) -> float:
    """Of writing 2 MiB in this folder, at 1 MiB a second."""
    cgroup = create(folder, io_bytes_per_second=MIB)
    begun = time.monotonic()
    write = ["bs=64k", "count=32", "oflag=direct", "if=/dev/zero", f"of={folder}/data"]
    assert run_in(cgroup, "dd", *write).returncode == 0
    seconds = time.monotonic() - begun
    (folder / "data").unlink()
    accounting = cgroup.accounts()[0]
    assert accounting.io_written_bytes
    assert 2 * MIB <= accounting.io_written_bytes < 3 * MIB  # once, however deep the stack
    return seconds


def test_a_whole_disk() -> None:
    assert disks_behind([str(DISK)]) == ([device_of("/dev/ubda")], [])


def test_a_partition_is_limited_by_its_disk(create: Create) -> None:
    run("mkfs.ext4", "-q", "-F", PARTITION)
    with mounted(PARTITION, FOLDER):
        assert disks_behind([str(FOLDER)]) == ([device_of(DISK_OF_PARTITION)], [])
        assert 1.7 < limited_seconds(create, FOLDER) < 8


def test_device_mapper_is_limited_itself(create: Create, linear_device: str) -> None:
    run("mkfs.ext4", "-q", "-F", linear_device)
    with mounted(linear_device, FOLDER):
        assert disks_behind([str(FOLDER)]) == ([device_of(linear_device)], [])
        assert 1.7 < limited_seconds(create, FOLDER) < 8


def test_a_loop_device_is_limited_itself(create: Create, loop_device: str) -> None:
    run("mkfs.ext4", "-q", loop_device)
    with mounted(loop_device, FOLDER):
        assert disks_behind([str(FOLDER)]) == ([device_of(loop_device)], [])
        assert 1.7 < limited_seconds(create, FOLDER) < 8


def test_an_overlay_is_limited_by_the_disk_of_its_upper_layer(create: Create) -> None:
    for name in ("lower", "upper layer", "work"):
        (DISK / name).mkdir()
    layers = f"lowerdir={DISK}/lower,upperdir={DISK}/upper layer,workdir={DISK}/work"
    with mounted("overlay", FOLDER, "-t", "overlay", "-o", layers):
        assert disks_behind([str(FOLDER)]) == ([device_of("/dev/ubda")], [])
        assert 1.7 < limited_seconds(create, FOLDER) < 8


def test_an_overlay_in_memory_has_no_disk() -> None:
    """As the root of this machine is one."""
    assert disks_behind(["/", "/tmp", "/dev/shm", "/proc"]) == ([], [])


def test_btrfs_has_all_its_devices(create: Create, loop_device: str) -> None:
    if not shutil.which("mkfs.btrfs"):
        pytest.skip("NOT TESTED: btrfs, as there is no program mkfs.btrfs")
    run("mkfs.btrfs", "-q", "-f", "-d", "single", "-m", "single", loop_device, PARTITION)
    with mounted(loop_device, FOLDER):
        disks, problems = disks_behind([str(FOLDER)])
        assert set(disks) == {device_of(loop_device), device_of(DISK_OF_PARTITION)}
        assert problems == []
        assert 1.7 < limited_seconds(create, FOLDER) < 8


def test_a_bind_mount_is_on_the_disk_of_what_it_shows() -> None:
    with mounted(str(DISK), FOLDER, "--bind"):
        assert disks_behind([str(FOLDER), str(DISK)]) == ([device_of("/dev/ubda")], [])


def test_what_a_later_mount_covers_does_not_count() -> None:
    with mounted(str(DISK), FOLDER, "--bind"), mounted("tmpfs", FOLDER, "-t", "tmpfs"):
        assert disks_behind([str(FOLDER)]) == ([], [])


def test_a_filesystem_without_a_disk_is_refused(
    tree: CgroupTree, create: Create, caplog: pytest.LogCaptureFixture
) -> None:
    """hostfs stands for all that is served from elsewhere, as NFS is."""
    with mounted("none", FOLDER, "-t", "hostfs", "-o", "ro"):
        limits = Limits(io_bytes_per_second=MIB)
        with pytest.raises(LimitUnavailableError, match=r"/mnt is on hostfs .*which is no disk"):
            tree.check(limits, str(FOLDER))
        # As a default limit it is left out, and said once.
        for _ in range(2):
            cgroup = create(FOLDER, io_bytes_per_second=MIB)
            assert (cgroup.path / "io.max").read_text() == ""
        assert caplog.text.count("without the default io limit: /mnt is on hostfs") == 1
    tree.check(limits, str(FOLDER))
