"""What each client's running jobs take, and whether it may have one more."""

from __future__ import annotations

from collections.abc import Mapping

from jobworker.errors import QuotaError
from jobworker.job import Job, Limits, Quota

CLOCK_TICK_SECONDS = 1e-6  # less is an error of rounding


class Ledger:
    """Of one client. What its jobs take is their limits, however little they use."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.job_ids: dict[int, None] = {}  # of its jobs that have not ended, in order
        self.cpu_percent = 0
        self.memory_mib = 0
        self._full_at = 0.0  # when it will have all its creates back

    def open(self, job: Job) -> None:
        self.job_ids[job.id] = None
        self._add(job.spec.limits, 1)

    def close(self, job: Job) -> None:
        del self.job_ids[job.id]
        self._add(job.spec.limits, -1)

    def _add(self, limits: Limits, sign: int) -> None:
        self.cpu_percent += sign * limits.cpu_percent
        self.memory_mib += sign * limits.memory_mib

    def check(self, quota: Quota, limits: Limits, lacks: Mapping[str, str]) -> None:
        """Whether it may have one more job, with these limits. lacks: by its name, why a cgroup
        controller is not there; empty: it is. Raises QuotaError."""
        running = len(self.job_ids)
        if quota.running_jobs and running >= quota.running_jobs:
            problem = f"{running} of its jobs are running"
            self._refuse("running_jobs", quota.running_jobs, problem, "wait for one to end")
        cpu, memory = limits.cpu_percent, limits.memory_mib
        used, most = self.cpu_percent, quota.total_cpu
        self._check_total("total_cpu", "%", most, used, cpu, lacks.get("cpu", ""))
        used, most = self.memory_mib, quota.total_memory
        self._check_total("total_memory", "MiB", most, used, memory, lacks.get("memory", ""))

    def _check_total(
        self, name: str, unit: str, most: int, used: int, more: int, lacking: str
    ) -> None:
        if not most:
            return
        if lacking:
            problem = f"this machine can hold no job to a limit that could count: {lacking}"
            self._refuse(name, f"{most} {unit}", problem, "use another one until it can")
        if not more:
            problem = "this job would have no limit that could count"
            self._refuse(name, f"{most} {unit}", problem, "give it one")
        if used + more > most:
            problem = f"its running jobs take {used} {unit}, and this one would take {more} more"
            remedy = "wait for one to end, or give it a lower limit"
            self._refuse(name, f"{most} {unit}", problem, remedy)

    def take_create(self, per_second: float, now: float) -> None:
        """Of a bucket that holds one second's creates, or one. now: in seconds. Raises
        QuotaError where it is empty."""
        if not per_second:
            return
        burst = max(1.0, per_second)
        # With a bucket that is full later than this, less than one create is in it.
        latest = now + (burst - 1) / per_second
        # What was used under a lower rate counts no more than an empty bucket does now.
        self._full_at = min(max(self._full_at, now), now + burst / per_second)
        if self._full_at > latest + CLOCK_TICK_SECONDS:
            problem = "all of them are used"
            remedy = f"try again in {self._full_at - latest:.3f} s"
            self._refuse("creates_per_second", f"{per_second:g}", problem, remedy)
        self._full_at += 1 / per_second

    def is_idle(self, now: float) -> bool:
        """Whether nothing would be lost with it."""
        return not self.job_ids and self._full_at <= now

    def _refuse(self, quota: str, most: object, problem: str, remedy: str) -> None:
        raise QuotaError(self._name, quota, str(most), problem, remedy)
