from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Cause(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CAUSE_UNSPECIFIED: _ClassVar[Cause]
    EXITED: _ClassVar[Cause]
    SIGNALLED: _ClassVar[Cause]
    OUT_OF_MEMORY: _ClassVar[Cause]
    TIMED_OUT: _ClassVar[Cause]
    LOG_LIMIT: _ClassVar[Cause]
    START_FAILED: _ClassVar[Cause]
    LOST: _ClassVar[Cause]
    STOPPED: _ClassVar[Cause]

class Stream(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ALL: _ClassVar[Stream]
    STDOUT: _ClassVar[Stream]
    STDERR: _ClassVar[Stream]
CAUSE_UNSPECIFIED: Cause
EXITED: Cause
SIGNALLED: Cause
OUT_OF_MEMORY: Cause
TIMED_OUT: Cause
LOG_LIMIT: Cause
START_FAILED: Cause
LOST: Cause
STOPPED: Cause
ALL: Stream
STDOUT: Stream
STDERR: Stream

class EmptyRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CreateJobReq(_message.Message):
    __slots__ = ("command", "args", "maxCPU", "maxMemory", "maxIOBPS", "environment", "working_directory", "name", "merge_output", "stdin", "timeout_milliseconds", "user", "profile", "network", "root", "read_only", "binds")
    class EnvironmentEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    COMMAND_FIELD_NUMBER: _ClassVar[int]
    ARGS_FIELD_NUMBER: _ClassVar[int]
    MAXCPU_FIELD_NUMBER: _ClassVar[int]
    MAXMEMORY_FIELD_NUMBER: _ClassVar[int]
    MAXIOBPS_FIELD_NUMBER: _ClassVar[int]
    ENVIRONMENT_FIELD_NUMBER: _ClassVar[int]
    WORKING_DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    MERGE_OUTPUT_FIELD_NUMBER: _ClassVar[int]
    STDIN_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MILLISECONDS_FIELD_NUMBER: _ClassVar[int]
    USER_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    ROOT_FIELD_NUMBER: _ClassVar[int]
    READ_ONLY_FIELD_NUMBER: _ClassVar[int]
    BINDS_FIELD_NUMBER: _ClassVar[int]
    command: str
    args: _containers.RepeatedScalarFieldContainer[str]
    maxCPU: int
    maxMemory: int
    maxIOBPS: int
    environment: _containers.ScalarMap[str, str]
    working_directory: str
    name: str
    merge_output: bool
    stdin: bytes
    timeout_milliseconds: int
    user: str
    profile: str
    network: str
    root: str
    read_only: bool
    binds: _containers.RepeatedCompositeFieldContainer[Bind]
    def __init__(self, command: _Optional[str] = ..., args: _Optional[_Iterable[str]] = ..., maxCPU: _Optional[int] = ..., maxMemory: _Optional[int] = ..., maxIOBPS: _Optional[int] = ..., environment: _Optional[_Mapping[str, str]] = ..., working_directory: _Optional[str] = ..., name: _Optional[str] = ..., merge_output: _Optional[bool] = ..., stdin: _Optional[bytes] = ..., timeout_milliseconds: _Optional[int] = ..., user: _Optional[str] = ..., profile: _Optional[str] = ..., network: _Optional[str] = ..., root: _Optional[str] = ..., read_only: _Optional[bool] = ..., binds: _Optional[_Iterable[_Union[Bind, _Mapping]]] = ...) -> None: ...

class Bind(_message.Message):
    __slots__ = ("source", "destination", "read_only")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    DESTINATION_FIELD_NUMBER: _ClassVar[int]
    READ_ONLY_FIELD_NUMBER: _ClassVar[int]
    source: str
    destination: str
    read_only: bool
    def __init__(self, source: _Optional[str] = ..., destination: _Optional[str] = ..., read_only: _Optional[bool] = ...) -> None: ...

class CreateJobsReq(_message.Message):
    __slots__ = ("jobs",)
    JOBS_FIELD_NUMBER: _ClassVar[int]
    jobs: _containers.RepeatedCompositeFieldContainer[CreateJobReq]
    def __init__(self, jobs: _Optional[_Iterable[_Union[CreateJobReq, _Mapping]]] = ...) -> None: ...

class CreateJobsRes(_message.Message):
    __slots__ = ("results",)
    class Result(_message.Message):
        __slots__ = ("id", "status", "code", "error")
        ID_FIELD_NUMBER: _ClassVar[int]
        STATUS_FIELD_NUMBER: _ClassVar[int]
        CODE_FIELD_NUMBER: _ClassVar[int]
        ERROR_FIELD_NUMBER: _ClassVar[int]
        id: str
        status: str
        code: int
        error: str
        def __init__(self, id: _Optional[str] = ..., status: _Optional[str] = ..., code: _Optional[int] = ..., error: _Optional[str] = ...) -> None: ...
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[CreateJobsRes.Result]
    def __init__(self, results: _Optional[_Iterable[_Union[CreateJobsRes.Result, _Mapping]]] = ...) -> None: ...

class DeleteJobReq(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class DeleteJobRes(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetJobReq(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class StopJobReq(_message.Message):
    __slots__ = ("id", "grace_milliseconds", "signal")
    ID_FIELD_NUMBER: _ClassVar[int]
    GRACE_MILLISECONDS_FIELD_NUMBER: _ClassVar[int]
    SIGNAL_FIELD_NUMBER: _ClassVar[int]
    id: str
    grace_milliseconds: int
    signal: int
    def __init__(self, id: _Optional[str] = ..., grace_milliseconds: _Optional[int] = ..., signal: _Optional[int] = ...) -> None: ...

class StopJobRes(_message.Message):
    __slots__ = ("id", "status", "endTime", "exitCode")
    ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    ENDTIME_FIELD_NUMBER: _ClassVar[int]
    EXITCODE_FIELD_NUMBER: _ClassVar[int]
    id: str
    status: str
    endTime: str
    exitCode: int
    def __init__(self, id: _Optional[str] = ..., status: _Optional[str] = ..., endTime: _Optional[str] = ..., exitCode: _Optional[int] = ...) -> None: ...

class Job(_message.Message):
    __slots__ = ("id", "command", "args", "maxCPU", "maxMemory", "maxIOBPS", "status", "startTime", "endTime", "exitCode", "name", "cause", "signal", "failed_step", "failed_errno", "detail", "created_time_ns", "start_time_ns", "end_time_ns", "accounting", "stdout_bytes", "stderr_bytes", "working_directory", "environment", "merge_output", "cleanup_uncertain", "max_pids", "timeout_milliseconds", "user", "profile", "network", "root", "read_only", "binds", "lost_bytes", "output_problem", "created_by", "stopped_by", "environment_withheld")
    class EnvironmentEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    COMMAND_FIELD_NUMBER: _ClassVar[int]
    ARGS_FIELD_NUMBER: _ClassVar[int]
    MAXCPU_FIELD_NUMBER: _ClassVar[int]
    MAXMEMORY_FIELD_NUMBER: _ClassVar[int]
    MAXIOBPS_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    STARTTIME_FIELD_NUMBER: _ClassVar[int]
    ENDTIME_FIELD_NUMBER: _ClassVar[int]
    EXITCODE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    SIGNAL_FIELD_NUMBER: _ClassVar[int]
    FAILED_STEP_FIELD_NUMBER: _ClassVar[int]
    FAILED_ERRNO_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    CREATED_TIME_NS_FIELD_NUMBER: _ClassVar[int]
    START_TIME_NS_FIELD_NUMBER: _ClassVar[int]
    END_TIME_NS_FIELD_NUMBER: _ClassVar[int]
    ACCOUNTING_FIELD_NUMBER: _ClassVar[int]
    STDOUT_BYTES_FIELD_NUMBER: _ClassVar[int]
    STDERR_BYTES_FIELD_NUMBER: _ClassVar[int]
    WORKING_DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    ENVIRONMENT_FIELD_NUMBER: _ClassVar[int]
    MERGE_OUTPUT_FIELD_NUMBER: _ClassVar[int]
    CLEANUP_UNCERTAIN_FIELD_NUMBER: _ClassVar[int]
    MAX_PIDS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MILLISECONDS_FIELD_NUMBER: _ClassVar[int]
    USER_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    ROOT_FIELD_NUMBER: _ClassVar[int]
    READ_ONLY_FIELD_NUMBER: _ClassVar[int]
    BINDS_FIELD_NUMBER: _ClassVar[int]
    LOST_BYTES_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_PROBLEM_FIELD_NUMBER: _ClassVar[int]
    CREATED_BY_FIELD_NUMBER: _ClassVar[int]
    STOPPED_BY_FIELD_NUMBER: _ClassVar[int]
    ENVIRONMENT_WITHHELD_FIELD_NUMBER: _ClassVar[int]
    id: str
    command: str
    args: _containers.RepeatedScalarFieldContainer[str]
    maxCPU: int
    maxMemory: int
    maxIOBPS: int
    status: str
    startTime: str
    endTime: str
    exitCode: int
    name: str
    cause: Cause
    signal: int
    failed_step: str
    failed_errno: int
    detail: str
    created_time_ns: int
    start_time_ns: int
    end_time_ns: int
    accounting: Accounting
    stdout_bytes: int
    stderr_bytes: int
    working_directory: str
    environment: _containers.ScalarMap[str, str]
    merge_output: bool
    cleanup_uncertain: bool
    max_pids: int
    timeout_milliseconds: int
    user: str
    profile: str
    network: str
    root: str
    read_only: bool
    binds: _containers.RepeatedCompositeFieldContainer[Bind]
    lost_bytes: int
    output_problem: str
    created_by: Principal
    stopped_by: Principal
    environment_withheld: bool
    def __init__(self, id: _Optional[str] = ..., command: _Optional[str] = ..., args: _Optional[_Iterable[str]] = ..., maxCPU: _Optional[int] = ..., maxMemory: _Optional[int] = ..., maxIOBPS: _Optional[int] = ..., status: _Optional[str] = ..., startTime: _Optional[str] = ..., endTime: _Optional[str] = ..., exitCode: _Optional[int] = ..., name: _Optional[str] = ..., cause: _Optional[_Union[Cause, str]] = ..., signal: _Optional[int] = ..., failed_step: _Optional[str] = ..., failed_errno: _Optional[int] = ..., detail: _Optional[str] = ..., created_time_ns: _Optional[int] = ..., start_time_ns: _Optional[int] = ..., end_time_ns: _Optional[int] = ..., accounting: _Optional[_Union[Accounting, _Mapping]] = ..., stdout_bytes: _Optional[int] = ..., stderr_bytes: _Optional[int] = ..., working_directory: _Optional[str] = ..., environment: _Optional[_Mapping[str, str]] = ..., merge_output: _Optional[bool] = ..., cleanup_uncertain: _Optional[bool] = ..., max_pids: _Optional[int] = ..., timeout_milliseconds: _Optional[int] = ..., user: _Optional[str] = ..., profile: _Optional[str] = ..., network: _Optional[str] = ..., root: _Optional[str] = ..., read_only: _Optional[bool] = ..., binds: _Optional[_Iterable[_Union[Bind, _Mapping]]] = ..., lost_bytes: _Optional[int] = ..., output_problem: _Optional[str] = ..., created_by: _Optional[_Union[Principal, _Mapping]] = ..., stopped_by: _Optional[_Union[Principal, _Mapping]] = ..., environment_withheld: _Optional[bool] = ...) -> None: ...

class Principal(_message.Message):
    __slots__ = ("name", "role", "serial")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    SERIAL_FIELD_NUMBER: _ClassVar[int]
    name: str
    role: str
    serial: str
    def __init__(self, name: _Optional[str] = ..., role: _Optional[str] = ..., serial: _Optional[str] = ...) -> None: ...

class Accounting(_message.Message):
    __slots__ = ("cpu_user_us", "cpu_system_us", "memory_peak_bytes", "io_read_bytes", "io_written_bytes", "oom_kills")
    CPU_USER_US_FIELD_NUMBER: _ClassVar[int]
    CPU_SYSTEM_US_FIELD_NUMBER: _ClassVar[int]
    MEMORY_PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    IO_READ_BYTES_FIELD_NUMBER: _ClassVar[int]
    IO_WRITTEN_BYTES_FIELD_NUMBER: _ClassVar[int]
    OOM_KILLS_FIELD_NUMBER: _ClassVar[int]
    cpu_user_us: int
    cpu_system_us: int
    memory_peak_bytes: int
    io_read_bytes: int
    io_written_bytes: int
    oom_kills: int
    def __init__(self, cpu_user_us: _Optional[int] = ..., cpu_system_us: _Optional[int] = ..., memory_peak_bytes: _Optional[int] = ..., io_read_bytes: _Optional[int] = ..., io_written_bytes: _Optional[int] = ..., oom_kills: _Optional[int] = ...) -> None: ...

class Jobs(_message.Message):
    __slots__ = ("jobs",)
    JOBS_FIELD_NUMBER: _ClassVar[int]
    jobs: _containers.RepeatedCompositeFieldContainer[Job]
    def __init__(self, jobs: _Optional[_Iterable[_Union[Job, _Mapping]]] = ...) -> None: ...

class GetJobsStreamReq(_message.Message):
    __slots__ = ("id", "from_offset", "no_follow", "stream")
    ID_FIELD_NUMBER: _ClassVar[int]
    FROM_OFFSET_FIELD_NUMBER: _ClassVar[int]
    NO_FOLLOW_FIELD_NUMBER: _ClassVar[int]
    STREAM_FIELD_NUMBER: _ClassVar[int]
    id: str
    from_offset: int
    no_follow: bool
    stream: Stream
    def __init__(self, id: _Optional[str] = ..., from_offset: _Optional[int] = ..., no_follow: _Optional[bool] = ..., stream: _Optional[_Union[Stream, str]] = ...) -> None: ...

class DataChunk(_message.Message):
    __slots__ = ("payload", "offset", "next_offset", "runs", "lost_bytes", "ending")
    class Run(_message.Message):
        __slots__ = ("stream", "length", "time_ns")
        STREAM_FIELD_NUMBER: _ClassVar[int]
        LENGTH_FIELD_NUMBER: _ClassVar[int]
        TIME_NS_FIELD_NUMBER: _ClassVar[int]
        stream: Stream
        length: int
        time_ns: int
        def __init__(self, stream: _Optional[_Union[Stream, str]] = ..., length: _Optional[int] = ..., time_ns: _Optional[int] = ...) -> None: ...
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    NEXT_OFFSET_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    LOST_BYTES_FIELD_NUMBER: _ClassVar[int]
    ENDING_FIELD_NUMBER: _ClassVar[int]
    payload: bytes
    offset: int
    next_offset: int
    runs: _containers.RepeatedCompositeFieldContainer[DataChunk.Run]
    lost_bytes: int
    ending: Job
    def __init__(self, payload: _Optional[bytes] = ..., offset: _Optional[int] = ..., next_offset: _Optional[int] = ..., runs: _Optional[_Iterable[_Union[DataChunk.Run, _Mapping]]] = ..., lost_bytes: _Optional[int] = ..., ending: _Optional[_Union[Job, _Mapping]] = ...) -> None: ...

class ListJobsReq(_message.Message):
    __slots__ = ("page_size", "page_token", "statuses", "name", "owner")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    STATUSES_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    statuses: _containers.RepeatedScalarFieldContainer[str]
    name: str
    owner: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ..., statuses: _Optional[_Iterable[str]] = ..., name: _Optional[str] = ..., owner: _Optional[str] = ...) -> None: ...

class ListJobsRes(_message.Message):
    __slots__ = ("jobs", "next_page_token")
    JOBS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    jobs: _containers.RepeatedCompositeFieldContainer[Job]
    next_page_token: str
    def __init__(self, jobs: _Optional[_Iterable[_Union[Job, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class ServerInfo(_message.Message):
    __slots__ = ("version", "start_time_ns", "identity", "role", "state_directory", "cgroup", "controllers", "default_cpu", "default_memory", "default_iobps", "running_jobs", "maximum_jobs", "default_pids", "default_profile", "profiles", "default_user", "users", "ended_jobs", "ended_log_bytes", "disk_room_bytes", "disk_reserve_bytes", "log_max_bytes", "log_policy", "blocked_jobs", "profile_details", "roots_allowed", "binds_allowed", "isolation_problem", "client_limits", "quota", "quota_used")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    START_TIME_NS_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    STATE_DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    CGROUP_FIELD_NUMBER: _ClassVar[int]
    CONTROLLERS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_CPU_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_MEMORY_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_IOBPS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_JOBS_FIELD_NUMBER: _ClassVar[int]
    MAXIMUM_JOBS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_PIDS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_PROFILE_FIELD_NUMBER: _ClassVar[int]
    PROFILES_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_USER_FIELD_NUMBER: _ClassVar[int]
    USERS_FIELD_NUMBER: _ClassVar[int]
    ENDED_JOBS_FIELD_NUMBER: _ClassVar[int]
    ENDED_LOG_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_ROOM_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_RESERVE_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOG_MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOG_POLICY_FIELD_NUMBER: _ClassVar[int]
    BLOCKED_JOBS_FIELD_NUMBER: _ClassVar[int]
    PROFILE_DETAILS_FIELD_NUMBER: _ClassVar[int]
    ROOTS_ALLOWED_FIELD_NUMBER: _ClassVar[int]
    BINDS_ALLOWED_FIELD_NUMBER: _ClassVar[int]
    ISOLATION_PROBLEM_FIELD_NUMBER: _ClassVar[int]
    CLIENT_LIMITS_FIELD_NUMBER: _ClassVar[int]
    QUOTA_FIELD_NUMBER: _ClassVar[int]
    QUOTA_USED_FIELD_NUMBER: _ClassVar[int]
    version: str
    start_time_ns: int
    identity: str
    role: str
    state_directory: str
    cgroup: str
    controllers: _containers.RepeatedCompositeFieldContainer[Controller]
    default_cpu: int
    default_memory: int
    default_iobps: int
    running_jobs: int
    maximum_jobs: int
    default_pids: int
    default_profile: str
    profiles: _containers.RepeatedScalarFieldContainer[str]
    default_user: str
    users: _containers.RepeatedScalarFieldContainer[str]
    ended_jobs: int
    ended_log_bytes: int
    disk_room_bytes: int
    disk_reserve_bytes: int
    log_max_bytes: int
    log_policy: str
    blocked_jobs: int
    profile_details: _containers.RepeatedCompositeFieldContainer[ProfileInfo]
    roots_allowed: _containers.RepeatedScalarFieldContainer[str]
    binds_allowed: _containers.RepeatedScalarFieldContainer[str]
    isolation_problem: str
    client_limits: ClientLimits
    quota: Quota
    quota_used: Quota
    def __init__(self, version: _Optional[str] = ..., start_time_ns: _Optional[int] = ..., identity: _Optional[str] = ..., role: _Optional[str] = ..., state_directory: _Optional[str] = ..., cgroup: _Optional[str] = ..., controllers: _Optional[_Iterable[_Union[Controller, _Mapping]]] = ..., default_cpu: _Optional[int] = ..., default_memory: _Optional[int] = ..., default_iobps: _Optional[int] = ..., running_jobs: _Optional[int] = ..., maximum_jobs: _Optional[int] = ..., default_pids: _Optional[int] = ..., default_profile: _Optional[str] = ..., profiles: _Optional[_Iterable[str]] = ..., default_user: _Optional[str] = ..., users: _Optional[_Iterable[str]] = ..., ended_jobs: _Optional[int] = ..., ended_log_bytes: _Optional[int] = ..., disk_room_bytes: _Optional[int] = ..., disk_reserve_bytes: _Optional[int] = ..., log_max_bytes: _Optional[int] = ..., log_policy: _Optional[str] = ..., blocked_jobs: _Optional[int] = ..., profile_details: _Optional[_Iterable[_Union[ProfileInfo, _Mapping]]] = ..., roots_allowed: _Optional[_Iterable[str]] = ..., binds_allowed: _Optional[_Iterable[str]] = ..., isolation_problem: _Optional[str] = ..., client_limits: _Optional[_Union[ClientLimits, _Mapping]] = ..., quota: _Optional[_Union[Quota, _Mapping]] = ..., quota_used: _Optional[_Union[Quota, _Mapping]] = ...) -> None: ...

class Quota(_message.Message):
    __slots__ = ("running_jobs", "total_cpu", "total_memory", "creates_per_second")
    RUNNING_JOBS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_CPU_FIELD_NUMBER: _ClassVar[int]
    TOTAL_MEMORY_FIELD_NUMBER: _ClassVar[int]
    CREATES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    running_jobs: int
    total_cpu: int
    total_memory: int
    creates_per_second: float
    def __init__(self, running_jobs: _Optional[int] = ..., total_cpu: _Optional[int] = ..., total_memory: _Optional[int] = ..., creates_per_second: _Optional[float] = ...) -> None: ...

class ClientLimits(_message.Message):
    __slots__ = ("calls", "streams", "connections")
    CALLS_FIELD_NUMBER: _ClassVar[int]
    STREAMS_FIELD_NUMBER: _ClassVar[int]
    CONNECTIONS_FIELD_NUMBER: _ClassVar[int]
    calls: int
    streams: int
    connections: int
    def __init__(self, calls: _Optional[int] = ..., streams: _Optional[int] = ..., connections: _Optional[int] = ...) -> None: ...

class ProfileInfo(_message.Message):
    __slots__ = ("name", "problem", "measures")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    MEASURES_FIELD_NUMBER: _ClassVar[int]
    name: str
    problem: str
    measures: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., problem: _Optional[str] = ..., measures: _Optional[_Iterable[str]] = ...) -> None: ...

class Controller(_message.Message):
    __slots__ = ("name", "available", "problem")
    NAME_FIELD_NUMBER: _ClassVar[int]
    AVAILABLE_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    name: str
    available: bool
    problem: str
    def __init__(self, name: _Optional[str] = ..., available: _Optional[bool] = ..., problem: _Optional[str] = ...) -> None: ...
