"""`jobworker info`: what the server is, and what it can enforce."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import click

from jobworker.cli import display
from jobworker.cli.connection import Connect, speaks_to_server
from jobworker.cli.display import coloured, json_option, printable, size
from jobworker.job import Limits

if TYPE_CHECKING:
    from jobworker.client import Controller, ServerInfo

# By the controllers that enforce them: the default limits.
LIMITS = {
    "cpu": "cpu_percent",
    "memory": "memory_mib",
    "io": "io_bytes_per_second",
    "pids": "pids",
}


@click.command("info")
@json_option
@speaks_to_server
def info_command(connect: Connect, as_json: bool) -> None:
    """Shows the server, its limits, and your role.

    With -o json, "default_limits" are as the server is set; of these, "limits_in_force" are
    those that its machine can enforce, and 0 the others.
    """
    with connect() as client:
        info = client.info()
    if as_json:
        display.write_json(_as_json(info))
        return
    display.write_fields(_fields(info))
    for profile in info.profile_details:
        measures = profile.problem and f"not possible: {profile.problem}"
        measures = measures or "; ".join(profile.measures)
        display.write_paragraph(f"Profile {printable(profile.name)}: {printable(measures)}")
    for problem in dict.fromkeys(each.problem for each in info.controllers if each.problem):
        names = ", ".join(each.name for each in info.controllers if each.problem == problem)
        display.write_paragraph(f"Missing:   {printable(names)}: {printable(problem)}")


def _fields(info: ServerInfo) -> list[tuple[str, str]]:
    return [
        ("Version", printable(info.version)),
        ("Started", f"{display.rfc3339(info.started_ns)} ({display.ago(info.started_ns)})"),
        ("You are", f"{printable(info.identity)}, {_role(info)}"),
        ("Jobs", _jobs(info)),
        ("At once", _at_once(info)),
        ("Quotas", _quotas(info)),
        ("Ended", "" if _is_users(info) else _ended(info)),
        ("State", printable(info.state_directory)),
        ("Disk", _disk(info)),
        ("Output", _output(info)),
        ("Cgroup", printable(info.cgroup) or coloured("none: jobs have no limits", "yellow")),
        ("Limits", ", ".join(map(_controller, info.controllers))),
        ("Defaults", _defaults(info)),
        ("Isolation", _isolation(info)),
        ("Roots", ", ".join(map(printable, info.roots_allowed))),
        ("Binds", ", ".join(map(printable, info.binds_allowed))),
    ]


def _role(info: ServerInfo) -> str:
    return f"with the role {printable(info.role)}" if info.role else "without a role"


def _is_users(info: ServerInfo) -> bool:
    """Whether the server left out what concerns others."""
    return info.role == "user"


def _jobs(info: ServerInfo) -> str:
    yours = " of yours" if _is_users(info) else ""
    return f"{info.running_jobs}{yours} running, {info.maximum_jobs} at the most"


def _at_once(info: ServerInfo) -> str:
    """What one client may have under way; of an older server nothing."""
    limits = info.client_limits
    if not limits.calls:
        return ""
    return f"{limits.calls} calls, {limits.streams} streams, {limits.connections} connections"


def _quotas(info: ServerInfo) -> str:
    """Those that the caller has, and what is used of them."""
    most, used = info.quota, info.quota_used
    texts = [
        most.running_jobs and f"{used.running_jobs} of {most.running_jobs} running jobs",
        most.total_cpu and f"CPU {used.total_cpu} of {most.total_cpu} %",
        most.total_memory and f"memory {used.total_memory} of {most.total_memory} MiB",
        most.creates_per_second and f"{most.creates_per_second:g} creates a second",
    ]
    return ", ".join(str(text) for text in texts if text)


def _isolation(info: ServerInfo) -> str:
    if info.isolation_problem:
        return coloured(f"none: {printable(info.isolation_problem)}", "yellow")
    if not info.default_profile:
        return coloured("none", "yellow")
    others = [printable(name) for name in info.profiles if name != info.default_profile]
    users = ", ".join(printable(name) for name in (info.default_user, *info.users))
    text = f"profile {printable(info.default_profile)}"
    return text + (f" (or {', '.join(others)})" if others else "") + f", as {users}"


def _ended(info: ServerInfo) -> str:
    return f"{info.ended_jobs} kept, with {size(info.ended_log_bytes)} of output"


def _disk(info: ServerInfo) -> str:
    room = f"{size(info.disk_room_bytes)} left"
    reserve = info.disk_reserve_bytes
    if info.disk_room_bytes < reserve:
        return coloured(f"{room}: too little for new jobs, which need {size(reserve)}", "red")
    return f"{room}; no new jobs with less than {size(reserve)}" if reserve else room


def _output(info: ServerInfo) -> str:
    """What is kept of a job's output."""
    if not info.log_max_bytes:
        return "all is kept"
    most = size(info.log_max_bytes)
    return {
        "ring": f"of each job the newest {most} are kept",
        "head": f"of each job the first {most} are kept",
        "stop": f"a job that writes more than {most} is ended",
    }.get(info.log_policy, f"at most {most} a job")


def _controller(controller: Controller) -> str:
    name = printable(controller.name)
    if controller.available:
        return f"{name} {coloured('yes', 'green')}"
    return f"{name} {coloured('no', 'yellow')}"


def _defaults(info: ServerInfo) -> str:
    """Of a job that asks for no limit."""
    limits = _limits_in_force(info)
    texts = [
        limits.cpu_percent and f"CPU {limits.cpu_percent} %",
        limits.memory_mib and f"memory {size(limits.memory_mib << 20)}",
        limits.io_bytes_per_second and f"disk {size(limits.io_bytes_per_second)}/s",
        limits.pids and f"{limits.pids} processes",
    ]
    return ", ".join(str(text) for text in texts if text) or "none"


def _limits_in_force(info: ServerInfo) -> Limits:
    """The default limits. What cannot be enforced is not promised."""
    available = {controller.name for controller in info.controllers if controller.available}
    lacking = {limit: 0 for name, limit in LIMITS.items() if name not in available}
    return replace(info.default_limits, **lacking)


def _as_json(info: ServerInfo) -> dict[str, Any]:
    return {
        "version": info.version,
        "started": display.json_time(info.started_ns),
        "identity": info.identity,
        "role": info.role or None,
        "client_limits": asdict(info.client_limits),
        "quota": asdict(info.quota),
        "quota_used": asdict(info.quota_used),
        "running_jobs": info.running_jobs,
        "maximum_jobs": info.maximum_jobs,
        "state_directory": info.state_directory or None,
        "cgroup": info.cgroup or None,
        "controllers": [asdict(controller) for controller in info.controllers],
        "default_limits": asdict(info.default_limits),
        "limits_in_force": asdict(_limits_in_force(info)),
        "isolation": {
            "default_profile": info.default_profile or None,
            "profiles": list(info.profiles),
            "default_user": info.default_user or None,
            "users": list(info.users),
            "problem": info.isolation_problem or None,
            "roots_allowed": list(info.roots_allowed),
            "binds_allowed": list(info.binds_allowed),
            "in_force": [asdict(profile) for profile in info.profile_details],
        },
        "ended_jobs": info.ended_jobs,
        "ended_log_bytes": info.ended_log_bytes,
        "disk_room_bytes": info.disk_room_bytes,
        "disk_reserve_bytes": info.disk_reserve_bytes,
        "log_max_bytes": info.log_max_bytes or None,
        "log_policy": info.log_policy,
    }
