"""A job that writes the time: `ticker.py COUNT PERIOD_MS`, 8 bytes each, of the monotonic clock,
which is the same for all processes of a machine."""

import os
import sys
import time

count, period_seconds = int(sys.argv[1]), float(sys.argv[2]) / 1000
due = time.monotonic()
for _ in range(count):
    os.write(1, time.monotonic_ns().to_bytes(8, "little"))
    due += period_seconds
    time.sleep(max(0.0, due - time.monotonic()))
