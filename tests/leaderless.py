"""Processes whose first thread has ended, while another goes on and ignores SIGTERM."""

from __future__ import annotations

import platform
import sys

# Of exit, which ends one thread alone.
SYS_EXIT = 60 if platform.machine() == "x86_64" else 93

BEGIN = f"""
import ctypes, os, signal, threading, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)

def leave_to(target):
    threading.Thread(target=target).start()
    ctypes.CDLL(None).syscall({SYS_EXIT}, 0)

def wait_for_the_first():
    while ") Z" not in open("/proc/self/stat").read():
        time.sleep(0.01)
"""

WAIT = """
def go_on():
    wait_for_the_first()
    print("up", flush=True)
    threading.Event().wait()
"""

# As fast as they can, children of the same kind.
FORK = """
def go_on():
    print("up", flush=True)
    while True:
        try:
            if os.fork() == 0:
                leave_to(go_on)
        except OSError:
            time.sleep(0.01)
"""

ONE = [sys.executable, "-S", "-W", "ignore", "-c", f"{BEGIN}{WAIT}leave_to(go_on)"]
MORE_AND_MORE = [sys.executable, "-S", "-W", "ignore", "-c", f"{BEGIN}{FORK}leave_to(go_on)"]
