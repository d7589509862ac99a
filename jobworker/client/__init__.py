"""The client of a job server: what programs use, and the command line too."""

from jobworker.client.calls import Controller, ServerInfo
from jobworker.client.output import Chunk, Result, Run, Stream
from jobworker.client.sync import Client

__all__ = ["Chunk", "Client", "Controller", "Result", "Run", "ServerInfo", "Stream"]
