"""The server's settings: one class, which also is where their documentation comes from.

A setting has one name. `linger`, say, is JOB_WORKER_LINGER in the environment, `linger = 2` in
the TOML file, and --linger on the command line. A flag is stronger than the environment, that
is stronger than the file, and that than the default.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jobworker.errors import SettingError

PREFIX = "JOB_WORKER_"
FILE_VARIABLE = "JOB_WORKER_CONFIG"
INT32_MAX = (1 << 31) - 1
MOST_PIDS = 4 << 20  # the kernel's PID_MAX_LIMIT; it refuses a larger pids.max


@dataclass(frozen=True, slots=True)
class Option:
    """What is said of one setting beside its value."""

    name: str  # as in the file; in capitals and with PREFIX, as in the environment
    parse: Callable[[str], Any]  # from text; raises ValueError, which says what would be right
    help: str
    shown_default: str

    @property
    def variable(self) -> str:
        return PREFIX + self.name.upper()

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


def _setting(
    name: str, default: Any, parse: Callable[[str], Any], text: str, shown_default: str = ""
) -> Any:
    option = Option(name, parse, text, shown_default or str(default))
    if callable(default):
        return field(default_factory=default, metadata={"option": option})
    return field(default=default, metadata={"option": option})


# How values are written


def parse_address(text: str) -> str:
    """`host:port`, `[::1]:port`, or `:port` for all addresses."""
    host, separator, port = text.rpartition(":")
    if not separator or not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535:
        raise ValueError("use HOST:PORT, such as 0.0.0.0:50051; port 0 takes any free one")
    if ":" in host and not re.fullmatch(r"\[[0-9a-fA-F:.%\w]+\]", host):
        raise ValueError("put an IPv6 address in brackets, such as [::1]:50051")
    return f"{host or '0.0.0.0'}:{port}"  # noqa: S104 as documented


def _parse_number(least: int, most: int = INT32_MAX) -> Callable[[str], int]:
    def parse(text: str) -> int:
        is_number = re.fullmatch(r"[+-]?[0-9]{1,18}", text.strip())
        number = int(text) if is_number else None
        if number is None or not least <= number <= most:
            raise ValueError(f"use a whole number from {least} to {most}")
        return number

    return parse


# Beyond it clocks overflow somewhere.
LONGEST_SECONDS = 100 * 365 * 86400
SECONDS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_seconds(text: str) -> float:
    """`2`, `0.5`, `500ms`, `2s`, `5m`, `1h`, `7d`."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?)\s*(ms|s|m|h|d|)", text.strip())
    if not match:
        raise ValueError("use seconds, or a number with ms, s, m, h or d, such as 500ms")
    seconds = float(match[1]) * SECONDS[match[2]]
    if seconds > LONGEST_SECONDS:
        raise ValueError("use less than 100 years")
    return seconds


MOST_BYTES = (1 << 63) - 1
BYTES = {"": 1, "b": 1} | {
    unit: 1 << shift
    for letter, shift in (("k", 10), ("m", 20), ("g", 30), ("t", 40))
    for unit in (letter, f"{letter}b", f"{letter}ib")
}


def parse_bytes(text: str) -> int:
    """`1048576`, `64KiB`, `10M`, `1.5 GiB`; all in powers of 1,024."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?)\s*([a-z]*)", text.strip().lower())
    if not match or match[2] not in BYTES:
        raise ValueError("use bytes, or a number with KiB, MiB, GiB or TiB, such as 64MiB")
    count = Fraction(match[1].rstrip(".")) * BYTES[match[2]]
    if count > MOST_BYTES:
        raise ValueError("use less than 8 million TiB")
    return int(count)


def _parse_reserve(text: str) -> str:
    """`auto`, or bytes, as text."""
    return "auto" if text.lower() == "auto" else str(parse_bytes(text))


def _parse_choice(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text.lower() not in choices:
            raise ValueError(f"use one of {', '.join(choices)}")
        return text.lower()

    return parse


def _parse_names(text: str) -> tuple[str, ...]:
    """`alice, bob`."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _parse_choices(*choices: str) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        names = _parse_names(text.lower())
        if not set(names) <= set(choices):
            raise ValueError(f"use some of {', '.join(choices)}, with commas between")
        return names

    return parse


def _parse_paths(text: str) -> tuple[Path, ...]:
    """`/root, /srv/secrets`."""
    names = _parse_names(text)
    if not all(name.startswith("/") and "\0" not in name for name in names):
        raise ValueError("use absolute paths, with commas between")
    return tuple(Path(os.path.normpath(name)) for name in names)


def _parse_binds(text: str) -> tuple[str, ...]:
    """`/srv/data, /usr/share:ro`."""
    names = _parse_names(text)
    _parse_paths(",".join(name.removesuffix(":ro") for name in names))
    return names


LAST_UID = (1 << 32) - 2


def _parse_uids(text: str) -> range | None:
    """`3000000-3065535`."""
    if not text:
        return None
    match = re.fullmatch(r"([0-9]{1,10})-([0-9]{1,10})", text.strip())
    if not match or not 0 < int(match[1]) <= int(match[2]) <= LAST_UID:
        raise ValueError("use FIRST-LAST, such as 3000000-3065535")
    return range(int(match[1]), int(match[2]) + 1)


def _parse_bool(text: str) -> bool:
    answers = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}
    if text.lower() not in answers:
        raise ValueError("use yes or no")
    return answers[text.lower()]


def _parse_path(text: str) -> Path:
    if not text or "\0" in text:
        raise ValueError("give a path")
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:
        raise ValueError("give a path without ~, as that user has no home folder") from error


def _parse_optional_path(text: str) -> Path | None:
    return _parse_path(text) if text else None


def _parse_count_or_auto(text: str) -> str:
    """`auto`, or a number from 1, as text."""
    return "auto" if text.lower() == "auto" else str(_parse_number(1, 1 << 20)(text))


def default_state_dir() -> Path:
    """/var/lib/jobworker for root, else the XDG state folder. Raises SettingError."""
    if os.getuid() == 0:
        return Path("/var/lib/jobworker")
    base = os.environ.get("XDG_STATE_HOME", "")
    if base.startswith("/"):
        return Path(base) / "jobworker"
    try:
        return Path.home() / ".local/state/jobworker"
    except RuntimeError as error:
        problem = "not set, and this user has no home folder"
        raise SettingError(f"{PREFIX}STATE_DIR", "", problem, "give a folder") from error


PROFILES = ("default", "strict", "none")

# Where daemons keep their sockets, and people what is theirs, beside /run.
HIDDEN = (
    "/root, /boot, /var/log, /var/mail, /var/spool, /var/lib/docker, /var/lib/mysql, "
    "/var/lib/lxd, /var/lib/incus, /var/snap"
)


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings of a server, checked as far as they can be by themselves."""

    address: str = _setting(
        "addr",
        "0.0.0.0:50051",
        parse_address,
        "Where clients connect, HOST:PORT.",
    )
    cert_path: Path = _setting(
        "cert_path",
        lambda: Path("certs").absolute(),
        _parse_path,
        "Folder with ca-cert.pem, server-cert.pem and server-key.pem.",
        shown_default="./certs",
    )
    clients: Path | None = _setting(
        "clients",
        None,
        _parse_path,
        "A file that gives clients roles and quotas, by the CN or the OU of their certificates. "
        "Read again when it changes.",
        shown_default="none",
    )
    state_dir: Path = _setting(
        "state_dir",
        default_state_dir,
        _parse_path,
        "Folder of job records and output. One server at a time uses it.",
        shown_default="/var/lib/jobworker for root, else ~/.local/state/jobworker",
    )
    cgroup_base: Path = _setting(
        "cgroup_base",
        Path("/sys/fs/cgroup"),
        _parse_path,
        "Directory of a cgroup v2, below which each job gets its own; or one that has it as "
        "`unified`.",
    )
    default_cpu: int = _setting(
        "default_cpu",
        100,
        _parse_number(0),
        "CPU limit of a job that asks for none, in percent of one core. 0: none.",
    )
    default_memory: int = _setting(
        "default_memory",
        512,
        _parse_number(0),
        "Memory limit of a job that asks for none, in MiB. 0: none.",
    )
    default_io: int = _setting(
        "default_io",
        0,
        _parse_number(0),
        "Limit on disk reads, and on writes, of a job that asks for none, in bytes a second. "
        "0: none.",
    )
    default_pids: int = _setting(
        "default_pids",
        # More than large builds and virtual machines of Java use; and eight jobs that fork
        # without end still fit into the smallest usual kernel.pid_max, 32,768.
        4096,
        _parse_number(0, MOST_PIDS),
        "Limit on the processes and threads of a job, so that one that forks without end harms "
        "nobody else. 0: none.",
    )
    linger_seconds: float = _setting(
        "linger",
        2.0,
        parse_seconds,
        "How long what a job has left running may go on once its main process has ended.",
        shown_default="2s",
    )
    stop_grace_seconds: float = _setting(
        "stop_grace",
        5.0,
        parse_seconds,
        "How long a job that is stopped may take to end before it is killed.",
        shown_default="5s",
    )
    stop_jobs: bool = _setting(
        "stop_jobs",
        False,
        _parse_bool,
        "Whether the jobs are stopped when the server is. Else they go on, and the next server "
        "takes them over.",
        shown_default="no",
    )
    profile: str = _setting(
        "profile",
        "",
        _parse_choice(*PROFILES),
        "How a job that asks for nothing else is separated from the machine. default: as an "
        "unprivileged user that can gain no other rights, with processes, /tmp and /dev of its "
        "own. strict: the same as a user of its own, without a network, all other files "
        "read-only. none: a cgroup only, as the server's user.",
        shown_default="default; none where a server that is not root can have no user namespace",
    )
    profiles_allowed: tuple[str, ...] = _setting(
        "profiles_allowed",
        ("default",),
        _parse_choices(*PROFILES),
        "The profiles that a job may ask for, beside the server's own, which need not be here.",
        shown_default="default",
    )
    job_user: str = _setting(
        "job_user",
        "nobody",
        str,
        "The user, by name or number, as whom jobs run where the server is root, but for those "
        "with profile none.",
    )
    users_allowed: tuple[str, ...] = _setting(
        "users_allowed",
        (),
        _parse_names,
        "The other users that a job may ask for.",
        shown_default="none",
    )
    strict_uids: range | None = _setting(
        "strict_uids",
        None,
        _parse_uids,
        "The numbers of users, FIRST-LAST, of which each job with profile strict gets one for "
        "itself; nothing else on this machine may use them.",
        shown_default="none, so that there is no profile strict",
    )
    hidden: tuple[Path, ...] = _setting(
        "hidden",
        _parse_paths(HIDDEN),
        _parse_paths,
        "What confined jobs do not see of this machine's files, beside what is the server's own.",
        shown_default=HIDDEN,
    )
    tmp_size_bytes: int = _setting(
        "tmp_size",
        256 << 20,
        parse_bytes,
        "How much a confined job can write into its own /tmp, /var/tmp and /dev/shm together, "
        "which are memory, and count as the job's. 0: no other limit.",
        shown_default="256MiB",
    )
    tmp_files: int = _setting(
        "tmp_files",
        65536,
        _parse_number(0),
        "How many files these may hold. 0: no limit.",
    )
    roots_allowed: tuple[Path, ...] = _setting(
        "roots_allowed",
        (),
        _parse_paths,
        "Folders which, or below which, a job's own root may be (`--root`).",
        shown_default="none",
    )
    binds_allowed: tuple[str, ...] = _setting(
        "binds_allowed",
        (),
        _parse_binds,
        "Files and folders that jobs may have at other places too, or what is below them "
        "(`--bind`); those with `:ro` read-only.",
        shown_default="none",
    )
    log_max_bytes: int = _setting(
        "log_max_bytes",
        0,
        parse_bytes,
        "How much of a job's output is kept, with its index. 0: all.",
    )
    log_policy: str = _setting(
        "log_policy",
        "ring",
        _parse_choice("ring", "head", "stop"),
        "What happens beyond log_max_bytes: `ring` drops the oldest output, `head` the newest, and "
        "`stop` ends the job. Readers are told what was dropped.",
    )
    keep_jobs: int = _setting(
        "keep_jobs",
        0,
        _parse_number(0),
        "How many ended jobs are kept; the longest ended are deleted first. 0: all.",
    )
    keep_seconds: float = _setting(
        "keep_time",
        0.0,
        parse_seconds,
        "How long ended jobs are kept, such as 30d. 0: for ever.",
        shown_default="0",
    )
    keep_bytes: int = _setting(
        "keep_bytes",
        0,
        parse_bytes,
        "How much output of ended jobs is kept, of all together. 0: all.",
    )
    disk_reserve: str = _setting(
        "disk_reserve",
        "auto",
        _parse_reserve,
        "With less room than this on the state folder's disk no job is created. auto: the larger "
        "of 1 GiB and 2 %.",
    )
    disk_full: str = _setting(
        "disk_full",
        "block",
        _parse_choice("block", "drop"),
        "What happens to output while that disk is full: `block` lets the jobs wait, `drop` drops "
        "it, and tells readers how much.",
    )
    ring_memory_bytes: int = _setting(
        "ring_memory",
        64 << 20,
        parse_bytes,
        "Memory for the newest output of jobs that are being read, of all together. What does "
        "not fit is read from disk.",
        shown_default="64MiB",
    )
    revoked: Path | None = _setting(
        "revoked",
        None,
        _parse_optional_path,
        "File of the clients' certificates that hold no longer: serial numbers in hexadecimal, "
        "one a line, or CRLs of the CA. Read again when it changes.",
        shown_default="none",
    )
    audit_log: Path | None = _setting(
        "audit_log",
        None,
        _parse_optional_path,
        "File to which one line of JSON is appended for each call that changes something or is "
        "refused.",
        shown_default="none",
    )
    client_calls: int = _setting(
        "client_calls",
        # Each may hold a request of 4 MiB.
        512,
        _parse_number(1),
        "How many calls one client, by the name in its certificate, may have under way, but for "
        "streams.",
    )
    client_streams: int = _setting(
        "client_streams",
        1000,
        _parse_number(1),
        "How many outputs one client may follow at once.",
    )
    connections: str = _setting(
        "connections",
        "auto",
        _parse_count_or_auto,
        "How many connections the server has at once. Beyond three quarters of it, who has most "
        "loses those without a call; one client may use half. auto: half of the descriptors that "
        "are not for jobs.",
    )
    log_level: str = _setting(
        "log_level",
        "info",
        _parse_choice("debug", "info", "warning", "error"),
        "The least important lines of the server's log, on standard error.",
    )
    file: Path | None = field(default=None, compare=False)  # that some of these come from


def options() -> Iterator[tuple[Field[Any], Option]]:
    for each in fields(Settings):
        if "option" in each.metadata:
            yield each, each.metadata["option"]


def load(
    flags: Mapping[str, str],
    environ: Mapping[str, str],
    file: Path | None,
    defaults: Mapping[str, str] = MappingProxyType({}),
) -> Settings:
    """From all places together.

    flags: by the settings' names, those that were given.
    file: a TOML file; None: the one that FILE_VARIABLE names, or none.
    defaults: by the settings' names, instead of the usual ones.

    Raises SettingError, which names the setting as the place where it is set does, its value,
    and what would be right.
    """
    if file is None and environ.get(FILE_VARIABLE):
        file = Path(environ[FILE_VARIABLE])
    in_file = _read_file(file) if file else {}
    values: dict[str, Any] = {}
    for each, option in options():
        if option.name in flags:
            shown, text = option.flag, flags[option.name]
        elif option.variable in environ:
            shown, text = option.variable, environ[option.variable]
        elif option.name in in_file:
            shown, text = f"{option.name} in {file}", in_file[option.name]
        elif option.name in defaults:
            shown, text = option.name, defaults[option.name]
        else:
            continue
        try:
            values[each.name] = option.parse(text)
        except ValueError as error:
            raise SettingError(shown, text, "cannot be used", str(error)) from error
    return Settings(**values, file=file.absolute() if file else None)


def _read_file(path: Path) -> dict[str, str]:
    """Values as text: one parser for each setting, wherever it is set."""
    try:
        # What a shell hands on, as <(...), ends; a pipe with a name may never.
        if path.is_fifo() and not os.path.realpath(path).startswith("/proc/"):
            raise SettingError(
                "the configuration file", path, "is no ordinary file", "put one there"
            )
        with path.open("rb") as file:
            values = tomllib.load(file)
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
        raise SettingError("the configuration file", path, problem, "check its name") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SettingError(
            "the configuration file",
            path,
            f"is not TOML: {error}",
            'write lines such as linger = "2s"',
        ) from error
    known = [option.name for _, option in options()]
    lists = {option.name for each, option in options() if _is_list(each)}
    for name, value in values.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            remedy = f"did you mean {close[0]}?" if close else f"use {', '.join(known)}"
            raise SettingError(f"{name} in {path}", value, "no such setting", remedy)
        if isinstance(value, list):
            if name not in lists:
                raise SettingError(f"{name} in {path}", value, "is a list", "give one value")
            if not all(isinstance(item, str) and "," not in item for item in value):
                remedy = 'write one such as ["one", "two"]'
                raise SettingError(f"{name} in {path}", value, "is no list of names", remedy)
        elif not isinstance(value, str | int | float):
            raise SettingError(f"{name} in {path}", value, "has no text or number", "give one")
    return {
        name: ",".join(value) if isinstance(value, list) else str(value)
        for name, value in values.items()
    }


def _is_list(each: Field[Any]) -> bool:
    return isinstance(each.default, tuple)


def table() -> str:
    """All settings as a table in Markdown, for the documentation."""
    lines = [
        "| variable | flag of `serve` | default | what it is |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| `{option.variable}` | `{option.flag}` | {option.shown_default} | {option.help} |"
        for _, option in options()
    ]
    return "\n".join(lines) + "\n"
