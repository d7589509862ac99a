"""A job whose output can be checked to the byte: `work.py KIND SEED PLEDGE`.

Writes numbered records to both streams, and in the end the digests of what it has written to
each into the file PLEDGE. Its exit code follows from the seed. Kinds:

loud      as fast as it can
trickle   a few bytes at a time, with pauses
reopen    turns stderr into stdout half-way
children  a child writes on after the main process has ended
silent    nothing at all
"""

from __future__ import annotations

import hashlib
import os
import random
import sys
import time

STDOUT, STDERR = 1, 2


class Streams:
    """The two pipes, and the digests of what went into each."""

    def __init__(self) -> None:
        self.digests = {STDOUT: hashlib.sha256(), STDERR: hashlib.sha256()}
        self.behind = {STDOUT: STDOUT, STDERR: STDERR}  # descriptor -> pipe

    def write(self, descriptor: int, data: bytes) -> None:
        self.digests[self.behind[descriptor]].update(data)
        while data:
            data = data[os.write(descriptor, data) :]

    def pledge(self, path: str) -> None:
        with open(path + ".new", "w") as file:
            file.write(" ".join(digest.hexdigest() for digest in self.digests.values()))
        os.rename(path + ".new", path)


def main(kind: str, seed: int, pledge: str) -> int:
    chance = random.Random(seed)
    streams = Streams()
    count = {"loud": 3000, "trickle": 60, "reopen": 400, "children": 200, "silent": 0}[kind]
    for number in range(count):
        if kind == "reopen" and number == count // 2:
            os.dup2(STDOUT, STDERR)
            streams.behind[STDERR] = STDOUT
        size = chance.choice((0, 3, 40, 1000, 9000 if kind == "loud" else 100))
        descriptor = chance.choice((STDOUT, STDERR))
        streams.write(descriptor, b"%d %d %s\n" % (descriptor, number, b"x" * size))
        if kind == "trickle":
            time.sleep(chance.random() / 20)
    if kind == "children" and os.fork() == 0:
        time.sleep(chance.random() / 2)
        streams.write(STDOUT, b"the child's\n")
        streams.pledge(pledge)
        os._exit(0)
    if kind != "children":
        streams.pledge(pledge)
    return seed % 200


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
