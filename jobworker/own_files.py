"""The server's own files: its jobs do not see them, or can at least not change them.

Keys, records and sockets are hidden; the program and what it imports is read-only. Where the
server is not root its jobs have its own user, so that this takes more: its homes are hidden, and
whatever the way to all of these leads through cannot be changed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path

from jobworker.config import Settings
from jobworker.engine.files import MOST_LINKS
from jobworker.engine.isolation import Files
from jobworker.engine.user import own_user

ROOT = Path("/")
# Folders that jobs cannot do without.
SHARED_FOLDERS = {"/", "/etc", "/home", "/opt", "/srv", "/usr", "/var"}


def files_of_jobs(settings: Settings) -> Files:
    """What confined jobs see of this machine's files."""
    hidden = [settings.state_dir, *settings.hidden, *_private_files(settings.cert_path)]
    own = (settings.file, settings.clients, settings.revoked, settings.audit_log)
    hidden += [file for file in own if file]
    links = [*settings.cert_path.glob("*.pem"), *settings.state_dir.glob("*")]
    hidden += _linked_from(links)
    code = [Path(sys.prefix), Path(sys.exec_prefix), Path(__file__).parent]
    code += _imported_from(code)
    if os.geteuid() != 0:  # its jobs have its own user
        hidden += [settings.cgroup_base, *_homes()]
        code.append(Path(sys.base_prefix))
        started = [Path(sys.executable), Path(sys.argv[0]).absolute()]
        code += _own_above([*hidden, *links, *code, *started])
    return Files(settings.tmp_size_bytes, settings.tmp_files, tuple(hidden), tuple(code))


def _imported_from(code: Iterable[Path]) -> list[Path]:
    """Where else this program looks for modules when it starts: PYTHONPATH, .pth files, and with
    `python -m` the working directory. Some may not be there yet."""
    installed = [*code, Path(sys.base_prefix)]
    places = {Path(place).absolute() for place in (*sys.path, sys.pycache_prefix) if place}
    return [
        place
        for place in sorted(places - {ROOT})
        if not any(place.is_relative_to(folder) for folder in installed)
    ]


def _linked_from(paths: Iterable[Path]) -> list[Path]:
    """Files elsewhere, to which those of these lead that are links."""
    return [path.resolve() for path in paths if path.is_symlink() and path.exists()]


def _own_above(paths: Iterable[Path]) -> set[Path]:
    """For each the outermost folder that this user may change: who renames what is in there puts
    other files where the next server looks for its own."""
    found: set[Path] = set()
    for path in paths:
        for way in _ways_to(path):
            own = [folder for folder in way.parents if _may_change(folder)]
            # `/` covers only what is mounted there.
            found.update(own[-2:] if own[-1:] == [ROOT] else own[-1:])
    return found


def _ways_to(path: Path) -> list[Path]:
    """The absolute path, and that with its first symbolic link followed, and so on to the end."""
    ways = [path.absolute()]
    while link := next((each for each in _from_root(ways[-1]) if each.is_symlink()), None):
        target = Path(os.path.normpath(link.parent / link.readlink()))
        ways.append(target / ways[-1].relative_to(link))
        if len(ways) > MOST_LINKS:
            break
    return [*ways, path.resolve()]


def _from_root(path: Path) -> list[Path]:
    return [*reversed(path.parents), path]


def _may_change(folder: Path) -> bool:
    """Also one without its write bit: who owns it may set that."""
    try:
        return os.access(folder, os.W_OK) or folder.stat().st_uid == os.geteuid()
    except OSError:  # not there, or not within reach
        return False


def _homes() -> list[Path]:
    """Of this process' user: keys are there, and what others of its programs run when they start.
    Not what is only called so, as /usr/sbin is daemon's."""
    homes = {Path(home) for home in (own_user().home, os.environ.get("HOME", "")) if home}
    return [home for home in homes - {ROOT} if home.is_dir() and _may_change(home)]


def _private_files(folder: Path) -> list[Path]:
    """All of the certificates' folder, unless jobs cannot do without."""
    return list(folder.glob("*.pem")) if str(folder.resolve()) in SHARED_FOLDERS else [folder]
