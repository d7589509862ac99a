"""Makes one page of all stored results: README.md beside them, with its plots as SVG."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from figures import QUICK, RAW, Figure, load, shown

PAGE_FOLDER = RAW if QUICK else RAW.parent
SCRIPTS = ("stream_throughput", "job_rate", "isolation", "latency", "scale", "growth", "hostile")

OURS, FLOOR, PEER, MISSED = "#2a6f97", "#b8c4cc", "#e09f3e", "#bc4749"
STYLE: dict[Any, Any] = {
    "axes.grid": True,
    "axes.grid.axis": "x",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "font.size": 9,
    "grid.color": "#e5e5e5",
    "svg.hashsalt": "jobworker",  # the same figures make the same file
}


def main() -> None:
    stored = {name: load(RAW / f"{name}.json") for name in SCRIPTS if _is_there(name)}
    if not stored:
        raise SystemExit(f"nothing is stored in {RAW}: run `make bench` first")
    mpl.rcParams.update(STYLE)
    path = PAGE_FOLDER / "README.md"
    path.write_text("\n".join(_page(stored)) + "\n")
    print(f"made {path}")


def _is_there(name: str) -> bool:
    if (RAW / f"{name}.json").exists():
        return True
    print(f"{name} is left out: it has not been run")
    return False


# The page


def _page(stored: dict[str, tuple[dict[str, Any], list[Figure]]]) -> Iterator[str]:
    yield "# What was measured"
    yield ""
    yield (
        "Made by `make bench` and `make bench-report`. Client and server share the cores of one "
        "machine, mutual TLS is on, logs are on disk. A figure is the median of its runs; a "
        "ratio is the median of the runs' ratios to the floor that was measured beside each."
    )
    if QUICK:
        yield ""
        yield "**A quick look, with small numbers and few runs: not for comparisons.**"
    yield ""
    yield from _about([result for result, _ in stored.values()])
    yield from _targets([figure for _, figures in stored.values() for figure in figures])
    for name, (result, figures) in stored.items():
        yield f"## {result['question']}"
        yield ""
        plot = PLOTS[name](figures)
        yield f"![{result['question']}]({plot})"
        yield ""
        yield from _table(figures)
        yield from (f"- {note}" for note in result["notes"])
        raw = (RAW / f"{name}.json").relative_to(PAGE_FOLDER)
        yield f"- [raw]({raw}), {result['time']}, took {result['took_seconds']:.0f} s"
        yield ""
    yield from _micro()


def _about(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    facts = results[-1]["machine"] | results[-1]["versions"]
    yield "| | |"
    yield "|---|---|"
    yield from (f"| {name.replace('_', ' ')} | {value} |" for name, value in facts.items())
    yield ""


def _targets(figures: Sequence[Figure]) -> Iterator[str]:
    rows = [(figure, target) for figure in figures for target in figure.targets]
    yield "## What it must reach"
    yield ""
    yield "| what | target | found | |"
    yield "|---|---|---|---|"
    for figure, target in rows:
        found = f"{shown(figure.value)} {figure.unit}"
        if target.of == "ratio" and figure.ratio is not None:
            found = f"{figure.ratio:.2f} of {figure.floor_name}"
        wanted, verdict = target.shown(figure.unit), _verdict(target.is_met(figure))
        yield f"| {figure.name} | {wanted} | {found} | {verdict} |"
    yield ""


def _verdict(is_met: bool) -> str:
    return "reached" if is_met else "**missed**"


def _table(figures: Sequence[Figure]) -> Iterator[str]:
    yield "| | figure | runs | floor | ratio |"
    yield "|---|--:|--:|--:|--:|"
    for figure in figures:
        runs = f"{shown(min(figure.runs))} to {shown(max(figure.runs))}"
        floor = f"{shown(figure.floor)} ({figure.floor_name})" if figure.floor is not None else ""
        ratio = f"{figure.ratio:.2f}" if figure.ratio is not None else ""
        yield (
            f"| {figure.name} | {shown(figure.value)} {figure.unit} "
            f"| {runs if len(figure.runs) > 1 else ''} | {floor} | {ratio} |"
        )
    yield ""


def _micro() -> Iterator[str]:
    path = RAW / "micro.json"
    if not path.exists():
        return
    groups: dict[str, dict[str, float]] = {}
    for each in json.loads(path.read_text())["benchmarks"]:
        name = each["name"].partition("[")[0].removeprefix("test_").replace("_", " ")
        groups.setdefault(each["group"], {})[name] = each["stats"]["median"] * 1e6
    yield "## What do the small parts cost?"
    yield ""
    yield "| | ours | beside |"
    yield "|---|--:|---|"
    for group, medians in groups.items():
        beside = ", ".join(
            f"{name.removeprefix('floor ')} {shown(value)} µs"
            for name, value in medians.items()
            if name != "ours"
        )
        yield f"| {group} | {shown(medians['ours'])} µs | {beside} |"
    yield ""


# Plots


def _bars(axes: Axes, figures: Sequence[Figure], colours: Sequence[str]) -> None:
    """One bar a figure, the runs as dots on it, the first one on top."""
    places = range(len(figures))
    axes.barh(places, [figure.value for figure in figures], color=colours, height=0.6)
    for place, figure in zip(places, figures, strict=True):
        axes.plot(figure.runs, [place] * len(figure.runs), ".", color="black", markersize=3)
        axes.annotate(f" {shown(figure.value)}", (max(figure.runs), place), va="center", fontsize=8)
    axes.set_yticks(places, [figure.name for figure in figures])
    axes.invert_yaxis()
    axes.set_xlabel(figures[0].unit)
    axes.margins(x=0.12)


def _save(name: str) -> str:
    plt.tight_layout()
    path = PAGE_FOLDER / f"{name}.svg"
    plt.savefig(path, metadata={"Date": None})
    plt.close()
    return path.name


def _floor_of(figure: Figure, name: str) -> Figure:
    return Figure(name, figure.unit, figure.floor_runs)


def plot_throughput(figures: list[Figure]) -> str:
    """The floor of each number of readers, and below it what was found."""
    shown_figures: list[Figure] = []
    for figure in figures:
        readers = figure.name.partition(",")[0]
        if all(readers != each.name.partition(":")[0] for each in shown_figures):
            shown_figures.append(_floor_of(figure, f"{readers}: {figure.floor_name}"))
        shown_figures.append(figure)
    colours = [FLOOR if ":" in figure.name else OURS for figure in shown_figures]
    _, axes = plt.subplots(figsize=(7, 0.34 * len(shown_figures) + 0.8))
    _bars(axes, shown_figures, colours)
    return _save("stream_throughput")


def plot_job_rate(figures: list[Figure]) -> str:
    plain = [figure for figure in figures if "beside" not in figure.name]
    colours = [PEER if figure.name == "HyperQueue" else OURS for figure in plain]
    if plain[0].floor_runs:
        plain.insert(0, _floor_of(plain[0], plain[0].floor_name))
        colours.insert(0, FLOOR)
    _, axes = plt.subplots(figsize=(7, 0.34 * len(plain) + 0.8))
    _bars(axes, plain, colours)
    return _save("job_rate")


def plot_isolation(figures: list[Figure]) -> str:
    """The job rate of each profile, beside that of none."""
    found = [figure for figure in figures if figure.unit == "jobs/s"]
    _, axes = plt.subplots(figsize=(7, 2.2))
    names = [figure.name.removeprefix("profile ") for figure in found]
    axes.barh(names, [figure.value for figure in found], color=OURS, height=0.6)
    axes.invert_yaxis()
    axes.set_xlabel("jobs/s")
    return _save("isolation")


def plot_latency(figures: list[Figure]) -> str:
    """Each situation is a line over its percentiles."""
    lines: dict[str, list[Figure]] = {}
    for figure in figures:
        lines.setdefault(figure.name.rpartition(", ")[0], []).append(figure)
    _, axes = plt.subplots(figsize=(7, 3))
    labels = [figure.name.rpartition(", ")[2] for figure in next(iter(lines.values()))]
    first = next(iter(lines.values()))
    floors = [figure.floor or 0.0 for figure in first]
    axes.plot(labels, floors, "o--", color=FLOOR, label=first[0].floor_name)
    for name, found in lines.items():
        axes.plot(labels, [figure.value for figure in found], "o-", label=name)
    axes.set_yscale("log")
    axes.set_ylabel("ms")
    axes.grid(axis="y")
    axes.legend(frameon=False)
    return _save("latency")


def plot_scale(figures: list[Figure]) -> str:
    """Each figure that has a target, as a share of it."""
    rows = [(figure, target) for figure in figures for target in figure.targets]
    shares = [
        ((figure.ratio if target.of == "ratio" else figure.value) or 0.0) / target.limit
        for figure, target in rows
    ]
    colours = [OURS if target.is_met(figure) else MISSED for figure, target in rows]
    _, axes = plt.subplots(figsize=(7, 0.34 * len(rows) + 0.8))
    axes.barh(range(len(rows)), shares, color=colours, height=0.6)
    axes.axvline(1, color="black", linewidth=0.8)
    labels = [f"{figure.name} ({target.shown(figure.unit)})" for figure, target in rows]
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    axes.set_xlabel("found, as a share of the target")
    return _save("scale")


def plot_growth(figures: list[Figure]) -> str:
    """Rate and memory over the number of ended jobs."""
    rates = [figure for figure in figures if figure.name.startswith("job rate at")]
    memory = [
        figure for figure in figures if figure.name.startswith("RSS at") and not figure.targets
    ]
    _, (left, right) = plt.subplots(1, 2, figsize=(7, 2.6))
    for axes, found in ((left, rates), (right, memory)):
        counts = [figure.name.split(" at ")[1].split()[0] for figure in found]
        axes.plot(counts, [figure.value for figure in found], "o-", color=OURS)
        for count, figure in zip(counts, found, strict=True):
            axes.plot([count] * len(figure.runs), figure.runs, ".", color="black", markersize=3)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("ended jobs")
        axes.set_ylabel(found[0].unit)
    return _save("growth")


def plot_hostile(figures: list[Figure]) -> str:
    """What one client's calls take, in each situation."""
    found = [figure for figure in figures if ": GetJob " in figure.name]
    _, axes = plt.subplots(figsize=(7, 0.34 * len(found) + 0.8))
    axes.barh(
        [figure.name for figure in found],
        [figure.value for figure in found],
        color=[FLOOR if figure.name.startswith("alone") else OURS for figure in found],
        height=0.6,
    )
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("ms")
    return _save("hostile")


PLOTS = {
    "stream_throughput": plot_throughput,
    "job_rate": plot_job_rate,
    "isolation": plot_isolation,
    "latency": plot_latency,
    "scale": plot_scale,
    "growth": plot_growth,
    "hostile": plot_hostile,
}


if __name__ == "__main__":
    main()
