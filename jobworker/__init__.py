"""Runs commands as jobs, each in its own cgroup, and streams their output live over gRPC."""

__all__ = ["__version__"]

__version__ = "0.1.0"
