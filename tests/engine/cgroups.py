"""Jobs' cgroups without jobinit, which else makes them."""

from __future__ import annotations

from jobworker.engine.cgroup import Cgroup, CgroupTree
from jobworker.job import Limits


def make_cgroup(
    tree: CgroupTree, job_id: int, limits: Limits | None = None, working_directory: str = "/"
) -> Cgroup:
    """As jobinit would for a job with these limits."""
    cgroup = tree.of(job_id)
    assert cgroup
    cgroup.path.mkdir(mode=0o700)
    for name, value in tree.limit_files(limits or Limits(), working_directory):
        (cgroup.path / name).write_text(value)
    return cgroup
