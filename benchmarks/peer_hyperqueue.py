"""HyperQueue, for comparison: `peer_hyperqueue.py COUNT COMMAND` prints jobs a second.

Runs in an environment of its own, where the package hyperqueue is installed. Server and one
worker for each core are HyperQueue's own; the jobs are tasks of one submission, without a
cgroup and with their output thrown away, which is the least that it can do for them. One more
task depends on all others: its file says when they have ended, as the client itself looks
only once a second.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import threading
import time
from pathlib import Path

from hyperqueue import Client, Job, LocalCluster
from hyperqueue.cluster import WorkerConfig


def run_jobs(client: Client, count: int, command: str, folder: Path) -> float:
    """Jobs a second."""
    done = folder / f"done-{count}"
    job = Job()
    tasks = [job.program([command], stdout=None, stderr=None) for _ in range(count)]
    job.program(["/bin/touch", str(done)], deps=tasks, stdout=None, stderr=None)
    ended: list[float] = []

    def watch() -> None:
        while not done.exists():
            time.sleep(0.001)
        ended.append(time.perf_counter())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    started = time.perf_counter()
    submitted = client.submit(job)
    client.wait_for_jobs([submitted])
    watcher.join()
    return count / (ended[0] - started)


def main() -> None:
    count, command = int(sys.argv[1]), sys.argv[2]
    worker = WorkerConfig(cores=multiprocessing.cpu_count())
    with tempfile.TemporaryDirectory() as folder, LocalCluster(worker_config=worker) as cluster:
        client = cluster.client()
        run_jobs(client, 50, command, Path(folder))  # the worker has connected
        print(f"rate {run_jobs(client, count, command, Path(folder)):.3f}")


main()
