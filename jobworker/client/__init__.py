"""The client of a job server: what programs use, and the command line too."""

from jobworker.client.aio import AsyncClient
from jobworker.client.bulk import Created, Spec
from jobworker.client.calls import ClientLimits, Controller, CreateOptions, ProfileInfo, ServerInfo
from jobworker.client.output import Chunk, Result, Run, Stream
from jobworker.client.sync import Client
from jobworker.job import Bind, Principal, Quota

__all__ = [
    "AsyncClient",
    "Bind",
    "Chunk",
    "Client",
    "ClientLimits",
    "Controller",
    "CreateOptions",
    "Created",
    "Principal",
    "ProfileInfo",
    "Quota",
    "Result",
    "Run",
    "ServerInfo",
    "Spec",
    "Stream",
]
