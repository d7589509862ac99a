"""Runs commands as jobs, each in its own cgroup, and streams their output live over gRPC."""

import typing

if typing.TYPE_CHECKING:
    from jobworker.client import AsyncClient, Client

__all__ = ["AsyncClient", "Client", "__version__"]

__version__ = "0.1.0"


def __getattr__(name: str) -> typing.Any:
    """Imports the client when it is first asked for: the command line answers sooner."""
    if name in __all__:
        from jobworker import client

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
