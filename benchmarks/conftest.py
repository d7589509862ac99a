"""What pytest-benchmark stores: the statistics, and not each of some hundred thousand rounds."""

from __future__ import annotations

from typing import Any


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)
    output_json["machine_info"].pop("node", None)
