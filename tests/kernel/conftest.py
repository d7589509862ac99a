"""Runs the tests of `inside` in a kernel of their own, and reports each as if it had run here.

outside: collect ▶ boot once, with the ids of what was collected ▶ replay the reports
inside:  the same pytest, with JOBWORKER_KERNEL_REPORTS: run, and write each report there
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kernel import uml

INSIDE = Path(__file__).parent / "inside"
REPORTS = os.environ.get("JOBWORKER_KERNEL_REPORTS")
# For all tests together, which take a quarter of that on a machine that does nothing else; one
# that hangs is ended before that by a timeout of its own.
WHOLE_SECONDS = 600
TEST_SECONDS = 90
CONSOLE_LINES = 60


def pytest_configure(config: pytest.Config) -> None:
    plugin = Inside(config, REPORTS) if REPORTS else Outside(config)
    config.pluginmanager.register(plugin)


class Inside:
    """In the kernel: tells the outside what happens to each test."""

    def __init__(self, config: pytest.Config, path: str) -> None:
        self._config = config
        self._reports = open(path, "wb", buffering=0)  # noqa: SIM115 as long as the process

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        self._reports.write(json.dumps(data).encode() + b"\n")


class Outside:
    """On the machine: boots the kernel for the first test of `inside`, replays the reports."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._selected: list[str] = []
        self._kernel: uml.Kernel | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._reports: Iterator[bytes] = iter(())
        self._arrived: dict[str, list[pytest.TestReport]] = {}
        self._failed = ""
        self._not_tested = ""

    @pytest.hookimpl(trylast=True)  # when the other plugins have selected
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        inside = [item for item in items if item.path.is_relative_to(INSIDE)]
        problem = uml.why_not() if inside else ""
        if not problem:
            self._selected = [item.nodeid for item in inside]
            for item in inside:
                item.add_marker(pytest.mark.timeout(0))  # the kernel has its own
            return
        self._not_tested = f"{len(inside)} tests of limits on the real kernel: {problem}"
        config.hook.pytest_deselected(items=inside)
        items[:] = [item for item in items if item not in inside]
        items.append(NotTested.from_parent(inside[0].session, problem=problem, items=inside))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        if item.nodeid not in self._selected:
            return None
        if self._kernel is None:
            self._boot()
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self._reports_of(item):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def pytest_sessionfinish(self) -> None:
        if self._kernel and self._folder:
            self._kernel.end()
            self._folder.cleanup()

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """At the very end, as the reason of a skip is lost among others."""
        if self._not_tested:
            terminalreporter.write_sep("!", "NOT TESTED", red=True, bold=True)
            terminalreporter.write_line(self._not_tested, red=True, bold=True)

    def _boot(self) -> None:
        # Not below pytest's folder: its name may have what the kernel's command line cannot.
        self._folder = tempfile.TemporaryDirectory(prefix="jobworker-kernel-")
        arguments = [
            *("-p", "no:cacheprovider", "--quiet", "--color=no"),
            # By a signal: that ends one test, and a thread would end them all.
            *("-o", f"timeout={TEST_SECONDS}", "-o", "timeout_method=signal"),
            *self._selected,
        ]
        self._kernel = uml.Kernel(Path(self._folder.name), self._config.rootpath, arguments)
        self._reports = self._kernel.reports(time.monotonic() + WHOLE_SECONDS)

    def _reports_of(self, item: pytest.Item) -> list[pytest.TestReport]:
        """Those of setup, call and teardown, once all have arrived."""
        while not self._failed and not self._is_complete(self._arrived.get(item.nodeid, [])):
            self._take_next()
        arrived = self._arrived.pop(item.nodeid, [])
        if not self._is_complete(arrived):
            arrived.append(_failure(item, self._failed))
        assert self._kernel
        for report in arrived:
            if report.failed:
                report.sections.append(("the kernel's console", _tail(self._kernel.console())))
        return arrived

    @staticmethod
    def _is_complete(reports: list[pytest.TestReport]) -> bool:
        return any(report.when == "teardown" for report in reports)

    def _take_next(self) -> None:
        try:
            data = json.loads(next(self._reports))
        except StopIteration:
            self._failed = "the kernel ended before this test did"
        except TimeoutError:
            self._failed = f"the kernel's tests took longer than {WHOLE_SECONDS} s"
        else:
            report = self._config.hook.pytest_report_from_serializable(
                config=self._config, data=data
            )
            if isinstance(report.longrepr, list):  # of a skip: a tuple, which JSON does not have
                report.longrepr = tuple(report.longrepr)
            self._arrived.setdefault(report.nodeid, []).append(report)


class NotTested(pytest.Item):
    """Stands for all tests of `inside` where there is no kernel to run them in."""

    def __init__(self, *, problem: str, items: list[pytest.Item], **rest: object) -> None:
        super().__init__("limits on the real kernel", **rest)  # type: ignore[arg-type]
        self._problem = problem
        self._items = items

    def runtest(self) -> None:
        nodes = (item.nodeid.rpartition("/")[2].partition("[")[0] for item in self._items)
        names = "\n".join(f"    {node}" for node in dict.fromkeys(nodes))
        pytest.skip(f"NOT TESTED: {self._problem}. Without that kernel:\n{names}")


def _failure(item: pytest.Item, problem: str) -> pytest.TestReport:
    return pytest.TestReport(
        nodeid=item.nodeid,
        location=item.location,
        keywords={},
        outcome="failed",
        longrepr=problem,
        when="call",
    )


def _tail(text: str) -> str:
    return "\n".join(text.splitlines()[-CONSOLE_LINES:])
