"""What a benchmark has found: printed as it comes, stored as JSON for the report.

A figure is the median of its runs. Its ratio is the median of the ratios of each run to the
run of the floor that stood beside it: so what else the machine does hits both alike.
"""

from __future__ import annotations

import json
import os
import platform
import sqlite3
import ssl
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
# A quick look goes elsewhere, and never into the report.
QUICK = os.environ.get("QUICK", "") not in {"", "0"}
RAW = HERE / "results" / ("quick" if QUICK else "raw")

PACKAGES = ("jobworker", "grpcio", "protobuf", "uvloop", "cryptography")


@dataclass(frozen=True, slots=True)
class Target:
    """`ratio` at least 0.6, `value` at most 3: what a figure is to reach."""

    of: str  # ratio or value
    at: str  # least or most
    limit: float

    def is_met(self, figure: Figure) -> bool:
        found = figure.ratio if self.of == "ratio" else figure.value
        if found is None:
            return False
        return found >= self.limit if self.at == "least" else found <= self.limit

    def shown(self, unit: str) -> str:
        """`ratio ≥ 0.6`, `≤ 12 KiB`."""
        limit = f"{'≥' if self.at == 'least' else '≤'} {self.limit:g}"
        return f"ratio {limit}" if self.of == "ratio" else f"{limit} {unit}"


@dataclass(frozen=True, slots=True)
class Figure:
    """One thing that was measured. runs: in `unit`, one for each repetition."""

    name: str
    unit: str
    runs: list[float]
    floor_runs: list[float] = field(default_factory=list)
    floor_name: str = ""
    targets: tuple[Target, ...] = ()

    @property
    def value(self) -> float:
        return statistics.median(self.runs)

    @property
    def floor(self) -> float | None:
        return statistics.median(self.floor_runs) if self.floor_runs else None

    @property
    def ratio(self) -> float | None:
        if not self.floor_runs:
            return None
        # One floor may stand beside several runs.
        floors = self.floor_runs * (len(self.runs) if len(self.floor_runs) == 1 else 1)
        return statistics.median(run / at for run, at in zip(self.runs, floors, strict=True) if at)


def load(path: Path) -> tuple[dict[str, Any], list[Figure]]:
    """A stored result, and the figures in it."""
    stored = json.loads(path.read_text())
    figures = []
    for each in stored["figures"]:
        targets = tuple(Target(**target) for target in each.pop("targets"))
        for derived in ("value", "floor", "ratio"):
            each.pop(derived)
        figures.append(Figure(**each, targets=targets))
    return stored, figures


class Findings:
    """Of one script. `note` whatever a reader of the figures must know."""

    def __init__(self, question: str) -> None:
        self.question = question
        self._figures: list[Figure] = []
        self._notes: list[str] = []
        self._started = time.monotonic()
        print(f"\n{question}{' (quick)' if QUICK else ''}")
        print("  " + ", ".join(f"{name} {version}" for name, version in versions().items()))
        load_1m = os.getloadavg()[0]
        if load_1m > 0.5:
            self.note(f"the machine was not idle before: load {load_1m:.1f}")

    def add(
        self,
        name: str,
        unit: str,
        runs: Sequence[float],
        *targets: Target,
        floor: Sequence[float] = (),
        floor_name: str = "",
    ) -> None:
        figure = Figure(name, unit, list(runs), list(floor), floor_name, targets)
        self._figures.append(figure)
        print("  " + _line(figure), flush=True)

    def note(self, text: str) -> None:
        self._notes.append(text)
        print(f"  {text}", flush=True)

    def store(self) -> None:
        """As RAW/<script>.json."""
        RAW.mkdir(parents=True, exist_ok=True)
        path = RAW / f"{Path(sys.argv[0]).stem}.json"
        content = {
            "question": self.question,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "took_seconds": round(time.monotonic() - self._started, 1),
            "is_quick": QUICK,
            "machine": machine(),
            "versions": versions(),
            "notes": self._notes,
            "figures": [
                asdict(each) | {"value": each.value, "floor": each.floor, "ratio": each.ratio}
                for each in self._figures
            ],
        }
        path.write_text(json.dumps(content, indent=1) + "\n")
        print(f"  stored in {path.relative_to(HERE.parent)}")


def _line(figure: Figure) -> str:
    line = f"{figure.name:<48} {shown(figure.value):>9} {figure.unit}"
    if figure.floor is not None and figure.ratio is not None:
        line += f"   {figure.floor_name} {shown(figure.floor)}   ratio {figure.ratio:.2f}"
    for target in figure.targets:
        verdict = "ok" if target.is_met(figure) else "MISSED"
        line += f"   [{verdict}: {target.shown(figure.unit)}]"
    return line


def shown(value: float) -> str:
    """With three digits that mean something."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.{2 if abs(value) >= 1 else 3}f}"


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest rank: a value that was measured."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def versions() -> dict[str, str]:
    found = {name: metadata.version(name) for name in PACKAGES}
    found |= {"Python": platform.python_version(), "SQLite": sqlite3.sqlite_version}
    experiments = os.environ.get("GRPC_EXPERIMENTS")
    return found | ({"GRPC_EXPERIMENTS": experiments} if experiments else {})


def machine() -> dict[str, str]:
    cpu = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": f"{os.cpu_count()} × {cpu[0] if cpu else platform.machine()}",
        "memory": f"{memory_bytes / (1 << 30):.0f} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
        "virtual": "yes" if "hypervisor" in Path("/proc/cpuinfo").read_text() else "no",
        "libc": " ".join(platform.libc_ver()),
        "openssl": ssl.OPENSSL_VERSION,
        "load_before": " ".join(f"{load:.1f}" for load in os.getloadavg()),
    }
