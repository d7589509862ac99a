"""What a job runs, in a file that stage.py makes: a burden by its name, or the attacks."""

from __future__ import annotations

import sys

from escapes import attack, burdens, cgroups, files, kernel, privileges, processes, sockets, view

AREAS = [cgroups, files, kernel, privileges, processes, sockets, view]

if __name__ == "__main__":
    if sys.argv[1:]:
        burdens.main(sys.argv[1])
    else:
        attack.main()
