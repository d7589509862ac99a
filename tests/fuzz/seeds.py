"""Real conversations of engine/jobinit.py, as inputs for jobinit_messages.c."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import os
import socket
import struct
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

from jobworker.engine.jobinit import LONGEST_INLINE_START_BYTES, Identity, Jobinit, StartRequest
from jobworker.job import Bind

RECORD = struct.Struct("=BI")  # how, the length of what follows; see jobinit_messages.c
EVENT = 128
PROCESS_ENDS, ANOTHER_SERVER, A_STEP_FAILS, FORK_FAILS, NOT_IN_PROC, LONG_PACKET, LIST = range(7)
LONGEST_PACKET_BYTES = 200 << 10

BASE = StartRequest(
    job_id=1,
    executable="/bin/true",
    argv=("true",),
    environment={},
    working_directory="/",
    cgroup=None,
    merge_output=False,
)


def _requests() -> Iterator[dict[str, Any]]:
    """What differs from BASE. All kinds of a start that there are should be here."""
    yield {}
    yield {"argv": ("sh", "-c", 'echo "$@"', "", "\udcff"), "environment": {"A": "b", "HOME": ""}}
    yield {"cgroup": "/sys/fs/cgroup/job-1", "merge_output": True}
    limits = (("pids.max", "10"), ("cpu.max", "50000 100000"))
    yield {"cgroup": "/sys/fs/cgroup/job-1", "makes_cgroup": True, "limits": limits}
    yield {"stdin": b"input"}
    yield {"identity": Identity(1000, 1000, ()), "is_confined": True}
    arranged = {"root": "/srv", "binds": (Bind("/a", "/tmp/b"), Bind("/c", "/d", read_only=True))}
    yield {"identity": Identity(1, 1, ()), "is_confined": True, "view": 1} | arranged
    yield {"identity": Identity(65534, 65534, (1, 2, 3)), "stdin": b"x", "environment": {"A": "b"}}
    yield {"argv": ("x" * (LONGEST_INLINE_START_BYTES + 1),)}
    yield {"argv": ("x" * (LONGEST_INLINE_START_BYTES + 1),), "stdin": b"input"}


def write(folder: Path) -> int:
    """One file for each of them. Returns how many of their starts come to an exec."""
    starts = [_said(functools.partial(_start, fields)) for fields in _requests()]
    ends = _event(PROCESS_ENDS, 0) + _said(_acknowledge)
    conversations = [start + ends for start in starts]
    start = starts[0]
    conversations += [
        start + _said(_signal) + _event(ANOTHER_SERVER) + _said(_adopt) + ends,
        start + start + _event(PROCESS_ENDS, 19) + _event(ANOTHER_SERVER) + _said(_adopt),
        _event(FORK_FAILS) + start + _said(_acknowledge),
        _event(A_STEP_FAILS, 3) + start + ends,
        _event(NOT_IN_PROC) + start + ends,
        _event(LONG_PACKET) + _event(LIST),
    ]
    for number, conversation in enumerate(conversations):
        (folder / f"seed-{number:02}").write_bytes(conversation)
    # What becomes of a confined job is not played.
    return sum(not fields.get("is_confined") for fields in _requests()) + 3


def _start(fields: dict[str, Any], jobinit: Jobinit) -> None:
    _begin(jobinit.start(dataclasses.replace(BASE, **fields)))


def _acknowledge(jobinit: Jobinit) -> None:
    jobinit.acknowledge(1)


def _signal(jobinit: Jobinit) -> None:
    jobinit.signal(1, 15)


def _adopt(jobinit: Jobinit) -> None:
    _begin(jobinit.adopt())


def _begin(asking: Coroutine[Any, Any, Any]) -> None:
    """Up to where it waits for an answer, which never comes."""
    asking.send(None)
    asking.close()


def _event(what: int, detail: int = 0) -> bytes:
    return _record(EVENT, bytes([what, detail]))


def _record(how: int, data: bytes) -> bytes:
    return RECORD.pack(how, len(data)) + data


def _said(speak: Callable[[Jobinit], None]) -> bytes:
    """The records of what it sends."""

    async def main() -> bytes:
        # Nobody waits for the answers that it does not get.
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        theirs.setblocking(False)
        jobinit = Jobinit(ours, lambda _: None, lambda: None)
        try:
            speak(jobinit)
            await asyncio.sleep(0)  # acknowledgements are sent in company
            packet, descriptors, _, _ = socket.recv_fds(theirs, LONGEST_PACKET_BYTES, 8)
        finally:
            theirs.close()
            await jobinit.close()
        records = [_record(len(descriptors), packet)]
        for descriptor in descriptors:
            records.append(_record(0, os.pread(descriptor, 4 << 20, 0)))
            os.close(descriptor)
        return b"".join(records)

    return asyncio.run(main())
