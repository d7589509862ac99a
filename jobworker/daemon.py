"""The server process: puts the parts together, starts them in order, ends them in order."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import logging
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path

import uvloop

from jobworker import __version__
from jobworker.certs import check_server_files
from jobworker.config import PROFILES, Settings, options
from jobworker.engine.cgroup import CgroupTree
from jobworker.engine.files import Allowed
from jobworker.engine.isolation import Isolation, Profile
from jobworker.engine.jobinit import Held
from jobworker.engine.jobinits import Jobinits
from jobworker.engine.manager import Manager, Policy
from jobworker.engine.output import Output
from jobworker.engine.retention import Keep, Retention
from jobworker.engine.store import Store
from jobworker.errors import JobinitError, SettingError, StartupError, StateFolderError, is_shortage
from jobworker.job import Limits, LogPolicy
from jobworker.own_files import files_of_jobs
from jobworker.roles import Clients

log = logging.getLogger(__name__)

JOBINIT = Path(__file__).parent / "_bin" / "jobinit"

# The budget that ARCHITECTURE.md explains: a pidfd and two pipes for each job, and a reserve
# for connections, the store, and files that are open for a moment.
DESCRIPTORS_PER_JOB = 3
RESERVED_SHARE = 0.1
SMALLEST_RESERVE = 200
LEAST_DISK_RESERVE_BYTES = 1 << 30
DISK_RESERVE_SHARE = 0.02

# So many new objects before it is looked for those that only refer to each other. There are hardly
# any: at 700, as by default, to look takes a twentieth of the server's time where jobs come fast.
COLLECTED_OBJECTS = 20_000

# Settings of what takes other users' rights.
FOR_ROOT = {"job_user", "users_allowed", "strict_uids", "roots_allowed", "binds_allowed"}

# Calls that wait for a job to end are answered before the server goes.
ANSWER_SECONDS = 2.0


def main(settings: Settings, when_ready: Callable[[], None] = lambda: None) -> int:
    """Runs the server until SIGTERM or SIGINT. when_ready: is called once clients can connect.
    Returns the exit code: 0 after a clean end, 1 where it could not start."""
    _set_up_logging(settings.log_level)
    os.umask(0o077)
    try:
        _check_encoding()
        clients = Clients(settings.clients, PROFILES)
        lock = _lock_state_folder(settings.state_dir)
        # Once there is that folder, which is to be hidden.
        isolation = _isolation(settings)
        _report_without_effect(settings)
        check_server_files(settings.cert_path)
        jobinits = Jobinits(
            settings.state_dir,
            JOBINIT,
            isolation.views,
            confines_all=isolation.confines_all,
        )
        # Before grpc is imported: from then on this process has threads, and must not fork.
        jobinits.prepare()
        _raise_open_files_limit()
        _leave_no_core_dump()
        _prepare_grpc()
        uvloop.run(_serve(settings, jobinits, isolation, clients, when_ready))
    except (StartupError, JobinitError) as error:
        log.error("cannot start: %s", error)
        return 1
    except OSError as error:
        if not is_shortage(error):
            raise
        log.error("cannot start: %s; start again", error)
        return 1
    os.close(lock)
    log.info("ended")
    return 0


async def _serve(
    settings: Settings,
    jobinits: Jobinits,
    isolation: Isolation,
    clients: Clients,
    when_ready: Callable[[], None],
) -> None:
    """Whatever is opened here is closed in the opposite order, also where the start fails."""
    from jobworker.rpc.audit import AuditLog
    from jobworker.rpc.server import RpcServer, client_limits
    from jobworker.rpc.service import JobService, ServerFacts

    end_requested = _watch_signals()
    # Without it the signal would end a server that only starts, and will read its files yet.
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, lambda: None)
    started_ns = time.time_ns()
    async with contextlib.AsyncExitStack() as closing:
        cgroups = CgroupTree.open(settings.cgroup_base, _instance(settings.state_dir))
        closing.callback(cgroups.close)
        _report_cgroups(cgroups, settings)
        store = Store.open(settings.state_dir / "jobs.db")
        closing.push_async_callback(store.close)
        output = Output(
            settings.state_dir / "output",
            settings.ring_memory_bytes,
            drops_when_full=settings.disk_full == "drop",
        )
        closing.push_async_callback(output.close)
        audit = AuditLog(settings.audit_log)
        closing.callback(audit.close)
        keep = Keep(settings.keep_jobs, settings.keep_seconds, settings.keep_bytes)
        manager = Manager(
            _policy(settings, output),
            cgroups,
            output,
            store,
            jobinits,
            isolation,
            Retention(store, output, keep),
        )
        closing.push_async_callback(jobinits.close)
        closing.push_async_callback(manager.let_go)
        most_connections = _maximum_connections(settings.connections)
        limits = client_limits(settings, most_connections)
        facts = ServerFacts(__version__, started_ns, str(settings.state_dir), limits)
        service = JobService(manager, facts)
        server = RpcServer(settings, service, clients, limits, most_connections, audit)
        closing.push_async_callback(server.close)
        closing.push_async_callback(server.stop, ANSWER_SECONDS)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, server.reload)
        held = await jobinits.connect(manager.on_exit)
        await _try_isolation(isolation, jobinits, held, store, cgroups)
        await manager.recover(held)
        await server.start()
        when_ready()
        _leave_be_what_stays()
        host = settings.address.rpartition(":")[0]
        log.info("ready: listening on %s:%d", host, server.port)

        signal_number = await end_requested
        log.info("%s: ending", signal.Signals(signal_number).name)
        output.interrupt_readers()
        stopping = asyncio.create_task(server.stop(settings.stop_grace_seconds + ANSWER_SECONDS))
        await manager.close(stop_jobs=settings.stop_jobs)
        await server.stop(ANSWER_SECONDS)
        await stopping


def _leave_be_what_stays() -> None:
    """The collector does not look again and again at modules, classes and the like."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECTED_OBJECTS)


def _watch_signals() -> asyncio.Future[int]:
    loop = asyncio.get_running_loop()
    requested: asyncio.Future[int] = loop.create_future()

    def request(number: int) -> None:
        if not requested.done():
            requested.set_result(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, request, number)
    return requested


class _OneLine(logging.Formatter):
    """What clients and jobs are called is in messages: it is to begin no line of its own."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 as logging calls it
        text = super().formatMessage(record)
        return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def _check_encoding() -> None:
    """What clients give is UTF-8: under another locale jobs would get other arguments, or none."""
    encoding = sys.getfilesystemencoding()
    if encoding != "utf-8":
        problem = "is not what names of files and arguments of jobs are in"
        raise SettingError("the encoding of the locale", encoding, problem, "set LC_ALL to C.UTF-8")


def _set_up_logging(level: str) -> None:
    to_stderr = logging.StreamHandler(sys.stderr)
    to_stderr.setFormatter(_OneLine("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(handlers=[to_stderr], level=level.upper())


def _lock_state_folder(folder: Path) -> int:
    """One server for each state folder. Returns the descriptor that holds the lock."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.chmod(folder, 0o700)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise SettingError(
            "--state-dir (JOB_WORKER_STATE_DIR)",
            folder,
            error.strerror or str(error),
            "give a folder that this user can write",
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise StateFolderError(
            f"{folder} is in use by another server; stop that one first, or give this one a "
            "folder of its own with --state-dir (JOB_WORKER_STATE_DIR)"
        ) from error
    return lock


def _raise_open_files_limit() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _leave_no_core_dump() -> None:
    """Keys and environments would be in it, and where this process is not root its jobs could
    read it. Less than any dump; one of 0 a program that core_pattern names would be given."""
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0 if hard == 0 else 1, hard))


def _prepare_grpc() -> None:
    """What grpc reads from the environment when it is imported; no job inherits it."""
    # Its fork handlers would stop all its threads at any fork; this process never forks.
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
    # TLS 1.3 only, for which there is no call (grpc #37305): the list is for TLS 1.2 and
    # older, and its one suite needs a pre-shared key that nobody has.
    os.environ["GRPC_SSL_CIPHER_SUITES"] = "ECDHE-PSK-CHACHA20-POLY1305"
    # Its lines are not in our log's form; what matters of them comes as an error.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def _policy(settings: Settings, output: Output) -> Policy:
    return Policy(
        default_limits=Limits(
            settings.default_cpu,
            settings.default_memory,
            settings.default_io,
            settings.default_pids,
        ),
        linger_seconds=settings.linger_seconds,
        stop_grace_seconds=settings.stop_grace_seconds,
        maximum_jobs=_maximum_jobs(_maximum_connections(settings.connections)),
        log_max_bytes=settings.log_max_bytes,
        log_policy=LogPolicy(settings.log_policy),
        disk_reserve_bytes=_disk_reserve_bytes(settings.disk_reserve, output.size_bytes()),
    )


def _disk_reserve_bytes(setting: str, disk_bytes: int) -> int:
    if setting != "auto":
        return int(setting)
    return max(LEAST_DISK_RESERVE_BYTES, int(disk_bytes * DISK_RESERVE_SHARE))


def _isolation(settings: Settings) -> Isolation:
    return Isolation(
        settings.profile,
        settings.profiles_allowed,
        settings.job_user,
        settings.users_allowed,
        settings.strict_uids,
        files_of_jobs(settings),
        Allowed(settings.roots_allowed, settings.binds_allowed),
    )


async def _has_confined(held: Iterable[Held], store: Store, cgroups: CgroupTree) -> bool:
    """Whether jobs live that an earlier server has confined, or what these have left behind."""
    living = {each.job_id for each in held if each.ending is None}
    for job in await store.unended():
        cgroup = cgroups.find(job.id)
        lives = job.id in living or (cgroup is not None and cgroup.is_populated())
        if lives and job.spec.profile != Profile.NONE:
            return True
    return False


async def _try_isolation(
    isolation: Isolation,
    jobinits: Jobinits,
    held: Iterable[Held],
    store: Store,
    cgroups: CgroupTree,
) -> None:
    """That jobs can be confined is seen, and not supposed. held: of an earlier server. Raises
    StartupError where it is not known of the server's own profile; another one cannot be had
    then."""
    problems = {}
    for profile, trial in isolation.trials().items():
        try:
            problems[profile] = await jobinits.try_out(trial)
        except StartupError as error:
            if profile is isolation.profile:
                raise
            problems[profile] = str(error)
    has_confined = any(problems.values()) and await _has_confined(held, store, cgroups)
    isolation.take_results(problems, has_confined=has_confined)
    if not isolation.views:
        jobinits.drop_views()
    if isolation.problem:
        log.warning("jobs are not separated from the machine: %s", isolation.problem)
    for profile, problem in isolation.problems.items():
        log.warning("jobs cannot have profile %s: %s", profile, problem)


def _maximum_connections(setting: str) -> int:
    return _reserve() // 2 if setting == "auto" else int(setting)


def _maximum_jobs(most_connections: int) -> int:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    # The other half of the reserve is for the store, and for files that are open for a moment.
    room = limit - _reserve() // 2 - max(most_connections, _reserve() // 2)
    return max(1, room // DESCRIPTORS_PER_JOB)


def _reserve() -> int:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(SMALLEST_RESERVE, int(limit * RESERVED_SHARE))


def _instance(state_folder: Path) -> str:
    """Names this server's cgroups, so that its next start finds what this one left behind."""
    return sha256(os.fsencode(state_folder.resolve())).hexdigest()[:8]


def _report_without_effect(settings: Settings) -> None:
    """Nothing is silently ignored."""
    for each, option in options():
        value = getattr(settings, each.name)
        if each.name in FOR_ROOT and value != each.default and os.geteuid() != 0:
            log.warning("%s has no effect: the server is not root", option.variable)
    binds = (bind.removesuffix(":ro") for bind in settings.binds_allowed)
    for path in (*settings.roots_allowed, *map(Path, binds)):
        if not path.exists():
            log.warning("jobs are allowed %s as root or bind, but it is not there", path)


def _report_cgroups(cgroups: CgroupTree, settings: Settings) -> None:
    """Nothing is silently unlimited: says which defaults cannot be enforced."""
    if cgroups.path is None:
        log.warning("jobs run without cgroups and without limits: %s", cgroups.problem)
        return
    defaults = {
        "cpu": settings.default_cpu,
        "memory": settings.default_memory,
        "io": settings.default_io,
        "pids": settings.default_pids,
    }
    by_problem: dict[str, list[str]] = {}
    for controller, problem in cgroups.controllers.items():
        if problem and defaults[controller]:
            by_problem.setdefault(problem, []).append(f"{controller} ({defaults[controller]})")
    for problem, limits in by_problem.items():
        log.warning("jobs run without the default limits on %s: %s", ", ".join(limits), problem)
