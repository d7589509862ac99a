"""The server's own files: its jobs do not see them, or can at least not change them.

Keys, records and sockets are hidden; the program and what it imports is read-only, and so is what
the way to all of these leads through, where users of jobs could change it. Where the server is not
root its jobs have its own user, so that its homes are hidden, too.
"""

from __future__ import annotations

import contextlib
import fnmatch
import logging
import os
import re
import site
import stat
import struct
import sys
from collections.abc import Iterable
from pathlib import Path

from jobworker.certs import CA_CERT, CA_KEY, SERVER_CERT, SERVER_KEY
from jobworker.config import Settings
from jobworker.engine.files import MOST_LINKS, is_in_any
from jobworker.engine.isolation import Files
from jobworker.engine.mounts import read_mounts
from jobworker.engine.user import User, find_user, own_user
from jobworker.errors import StartupError, is_shortage

log = logging.getLogger(__name__)

ROOT = Path("/")
# What the loader of programs, the C library (for other locales) and OpenSSL take from elsewhere.
LIBRARY_VARIABLES = (
    *("LD_LIBRARY_PATH", "GCONV_PATH", "LOCPATH"),
    *("OPENSSL_CONF", "OPENSSL_ENGINES", "OPENSSL_MODULES"),
)
# Folders that jobs cannot do without.
SHARED_FOLDERS = {"/", "/etc", "/home", "/opt", "/srv", "/usr", "/var"}
# Of entries in ACLs, those that name somebody: acl(5).
ACL_USER, ACL_GROUP = 0x2, 0x8


def files_of_jobs(settings: Settings) -> Files:
    """What confined jobs see of this machine's files."""
    users = _job_users(settings)
    links = [*_certificate_files(settings.cert_path), *_matching(settings.state_dir, "*")]
    code = _code()
    private = _private(settings, links, code)
    loaded = _loaded_from(code)
    changeable = [path for path in loaded if any(_may_change(path, user) for user in users)]
    started = [Path(sys.executable), Path(sys.argv[0])]
    used = [*private, *links, *code, *loaded, *started]
    around = {folder for user in users for folder in _own_above(used, user)}
    if os.geteuid() == 0:
        for folder in sorted(path for path in around if around.isdisjoint(path.parents)):
            log.warning("%s is read-only for jobs: they could change what the server uses", folder)
    hidden = (*private, *settings.hidden)
    read_only = (*code, *_mounted_in(_modules()), *changeable, *around)
    return Files(settings.tmp_size_bytes, settings.tmp_files, hidden, read_only)


def _job_users(settings: Settings) -> list[User]:
    """Who has confined jobs, but those of profile strict, which own nothing."""
    if os.geteuid() != 0:
        return [own_user()]
    if {settings.profile, *settings.profiles_allowed} == {"none"}:
        return []
    users = []
    for name in (settings.job_user, *settings.users_allowed):
        with contextlib.suppress(LookupError):  # that is told elsewhere
            users.append(find_user(name))
    return [user for user in users if user.uid != 0]


# What jobs do not see


def _private(settings: Settings, links: Iterable[Path], code: Iterable[Path]) -> list[Path]:
    """Keys, records, settings. links: that the server follows; code: what jobs must see."""
    private = [settings.state_dir, *_certificates(settings.cert_path)]
    private += _mounted_in(private)
    private += [file for file in (settings.file, settings.clients, settings.revoked) if file]
    private += _with_rotated(settings.audit_log) if settings.audit_log else []
    private += _standard_files()
    private += [link.resolve() for link in links if link.is_symlink() and os.path.exists(link)]
    if os.geteuid() != 0:  # its jobs have its own user
        private += [settings.cgroup_base, *settings.hidden, *_homes(code)]
    return private


def _certificates(folder: Path) -> list[Path]:
    """All of the certificates' folder, unless jobs cannot do without."""
    return _certificate_files(folder) if str(folder.resolve()) in SHARED_FOLDERS else [folder]


def _certificate_files(folder: Path) -> list[Path]:
    """Also the server's own where nobody can list the folder."""
    own = (folder / name for name in (CA_CERT, CA_KEY, SERVER_CERT, SERVER_KEY))
    return sorted({*_matching(folder, "*.pem"), *own})


def _with_rotated(log_file: Path) -> list[Path]:
    """And what rotations have left of it beside; all of its folder where nothing else is in there,
    for those to come."""
    folder = log_file.parent
    logs = [log_file, *_rotated(log_file)]
    if set(_matching(folder, "*")) - set(logs) or str(folder.resolve()) in SHARED_FOLDERS:
        return logs
    return [folder, log_file]  # which may be a link to elsewhere


def _rotated(log_file: Path) -> list[Path]:
    beginnings = (f"{log_file.name}.", f"{log_file.name}-")
    return [path for path in _matching(log_file.parent, "*") if path.name.startswith(beginnings)]


def _standard_files() -> list[Path]:
    """The log, where whoever starts this process has it in a file, with what rotations have left
    of it beside; and what is printed."""
    found = []
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):  # it is closed
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                found.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
    # What is a folder, or a link, is no log.
    files = (each for path in set(found) for each in _rotated(path) if not os.path.islink(each))
    # Of which nobody can say what is in it.
    unlisted = [path.parent for path in found if not os.access(path.parent, os.R_OK)]
    return [*found, *filter(os.path.isfile, files), *unlisted]


def _mounted_in(folders: Iterable[Path]) -> list[Path]:
    """As a disk for output, or a key, that is bound there: where it is from it is in sight, too."""
    real_paths = [os.path.realpath(folder) for folder in folders]
    points = [mount.point for mount in read_mounts().values()]
    return [Path(point) for point in points if is_in_any(point, real_paths)]


def _homes(code: Iterable[Path]) -> list[Path]:
    """Of this process' user: keys are there, and what others of its programs run when they start.
    What is only called so, as /usr/sbin is daemon's, is in sight but for what programs look for
    there; and so is the code. But not where nobody can list what is there."""
    user = own_user()
    homes = {Path(home) for home in (user.home, os.environ.get("HOME", "")) if home}
    hidden: list[Path] = []
    for home in filter(os.path.isdir, homes):
        if home != ROOT and (_may_change(home, user) or not os.access(home, os.R_OK)):
            hidden.append(home)
        else:
            parts = {each for path in code for each in _from_root(path)}
            hidden += [each for each in _matching(home, ".*") if each not in parts]
    return hidden


# What jobs cannot change


def _code() -> list[Path]:
    """This program, and where else it looks for modules when it starts: PYTHONPATH, .pth files,
    the user's own, and with `python -m` the working directory. Some may not be there yet."""
    code = [Path(sys.prefix), Path(sys.exec_prefix), Path(__file__).parent]
    if os.geteuid() != 0:
        code.append(Path(sys.base_prefix))
    users = site.getusersitepackages() if site.ENABLE_USER_SITE else None
    # Others are no folders, but names for the finders of editable installs.
    found = filter(os.path.isabs, sys.path)
    places = {Path(place).absolute() for place in (*found, users, sys.pycache_prefix) if place}
    installed = [*code, Path(sys.base_prefix)]
    code += [
        place
        for place in sorted(places - {ROOT})
        if not any(place.is_relative_to(folder) for folder in installed)
    ]
    return code


def _modules() -> list[Path]:
    """The folders of modules, and this program's, which an editable install has elsewhere."""
    folders = {Path(place) for place in sys.path if os.path.isabs(place)}
    return [Path(__file__).parent, *sorted(folders - {ROOT})]


def _loaded_from(code: Iterable[Path]) -> list[Path]:
    """What of this program is elsewhere: Python, libraries, and modules to which links lead. With
    what is loaded later, as far as one look at the folders of modules shows it."""
    base = Path(sys.base_prefix)
    modules = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
    mapped = re.findall(r" (/.*)$", os.fsdecode(Path("/proc/self/maps").read_bytes()), re.MULTILINE)
    values = filter(None, map(os.environ.get, LIBRARY_VARIABLES))
    # An empty one is the working directory.
    named = [path for value in values for path in re.split("[:;]", value)]
    for variable in ("LD_PRELOAD", "LD_AUDIT"):
        named += re.findall("[^ :]*/[^ :]*", os.environ.get(variable, ""))
    links = [entry.path for place in sys.path for entry in _entries(place) if entry.is_symlink()]
    paths = set(map(os.path.abspath, (*filter(None, modules), *mapped, *named, *links)))
    known = [os.path.realpath(folder) for folder in (*code, base)]
    others = [path for path in sorted(paths) if not is_in_any(os.path.realpath(path), known)]
    return [base, *map(Path, others)]


def _matching(folder: Path, pattern: str) -> list[Path]:
    """The paths of what has such a name in the folder."""
    names = (entry.name for entry in _entries(folder))
    return [folder / name for name in names if fnmatch.fnmatchcase(name, pattern)]


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """Not as pathlib and glob, which take a folder for empty where nobody can look for now, as
    where jobs have taken all descriptors. Raises StartupError then."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:  # not there, not within reach, or an archive
        if is_shortage(error):
            raise StartupError(f"{folder} cannot be looked at: {error.strerror}") from error
        return []


def _own_above(paths: Iterable[Path], user: User) -> set[Path]:
    """The folders on the way to each that this user may change: who renames what is in there puts
    other files where the next server looks for its own. Also those in others of them, which may
    be mounted elsewhere by themselves."""
    folders = {folder for path in paths for way in _ways_to(path) for folder in way.parents}
    return {folder for folder in folders if _may_change(folder, user)}


def _ways_to(path: Path) -> list[Path]:
    """The absolute path, and that with its first symbolic link followed, and so on to the end."""
    ways = [path.absolute()]
    while link := next(filter(os.path.islink, _from_root(ways[-1])), None):
        target = Path(os.path.normpath(link.parent / link.readlink()))
        ways.append(target / ways[-1].relative_to(link))
        if len(ways) > MOST_LINKS:
            break
    return [*ways, Path(os.path.realpath(path))]


def _from_root(path: Path) -> list[Path]:
    return [*reversed(path.parents), path]


def _may_change(path: Path, user: User) -> bool:
    """Also one without its write bit: who owns it may set that."""
    try:
        status = path.stat()
        if status.st_uid == user.uid:
            return True
        if user.uid == os.geteuid():
            return os.access(path, os.W_OK)
    except OSError:  # not there, or not within reach
        return False
    # In /tmp and the like others have only what is theirs.
    if status.st_mode & stat.S_ISVTX:
        return False
    # Where there is an ACL, the group's bits are the most that it lets anybody do.
    is_groups = status.st_gid in user.groups or _acl_lets_write(path, user)
    writable = stat.S_IWGRP if is_groups else stat.S_IWOTH
    return bool(status.st_mode & writable)


def _acl_lets_write(path: Path, user: User) -> bool:
    named = {(ACL_USER, user.uid), *((ACL_GROUP, group) for group in user.groups)}
    try:
        acl = os.getxattr(path, "system.posix_acl_access")
    except OSError:  # has none
        return False
    entries = struct.iter_unpack("<HHI", acl[4:])  # behind the version
    return any(rights & os.W_OK and (tag, number) in named for tag, rights, number in entries)
