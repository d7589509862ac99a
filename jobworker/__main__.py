"""The programs, and `python -m jobworker`, which is `jobworker`."""

from __future__ import annotations

import os
import signal


def main(name: str | None = None) -> None:
    """The program `jobworker`. name: as which it is shown; None: as it was called."""
    try:
        from jobworker.cli.main import main as program

        program(prog_name=name)
    except KeyboardInterrupt:
        _leave_at_once()


def serve() -> None:
    """The program `job-worker`: `jobworker serve`."""
    try:
        from jobworker.cli.main import serve_main

        serve_main()
    except KeyboardInterrupt:
        _leave_at_once()


def _leave_at_once() -> None:
    """Ctrl-C before there is a command, which handles its own."""
    os._exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main("jobworker")
