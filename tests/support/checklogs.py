# SPDX-License-Identifier: GPL-2.0-or-later
"""A pytest plugin: a test must announce its warnings and tracebacks.

A daemon's bugs show in its log before they show in a result: a task that died and was restarted, an
unneeded retry. So a log record of level WARNING or above fails its test, and so does a traceback in
the captured output (a subprocess's too), unless the test announced it:

    def test_refusal_is_logged_once(expect_log, expect_output):
        expect_log(r"pool is full", level=logging.WARNING)
        expect_output(r"^Traceback")        # the daemon is made to crash here

An announced record has to come exactly `count` times, or the test fails too: a stale announcement
would hide the next warning. The idea is from the log check of S3QL and pyfuse3.

Limits: the plugin does not see a logger with `propagate = False`. With `-s` there is no captured
output.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

import pytest

SUSPICIOUS_OUTPUT = re.compile(
    r"Traceback \(most recent call|Exception ignored in|[Ss]egmentation fault|Fatal Python error"
    r"|was never awaited"
)
"""Lines of captured output that a test has to announce."""


@dataclass(slots=True)
class Announcement:
    """One expectation of a test about its own log or output.

    Attributes:
        pattern: the pattern to search in a record's message or in a line of output.
        level: the lowest level of a log record that counts; -1 for output.
        count: the expected number of hits; None for one or more.
        hits: the number of hits.
    """

    pattern: re.Pattern[str]
    level: int
    count: int | None
    hits: int = 0

    def take(self, text: str) -> bool:
        """Count `text` and accept it if it matches."""
        found = self.pattern.search(text) is not None
        self.hits += found
        return found

    def broken_promise(self) -> str:
        """Return how the count was missed; empty if it was met."""
        if self.count is None:
            return "" if self.hits else f"announced but never came: {self.pattern.pattern!r}"
        if self.hits == self.count:
            return ""
        return f"announced {self.count} times, came {self.hits} times: {self.pattern.pattern!r}"


class _Recorder(logging.Handler):
    """A handler that keeps the records of one test, unformatted."""

    def __init__(self) -> None:
        super().__init__(level=logging.WARNING)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep `record`."""
        self.records.append(record)


@dataclass(slots=True)
class _State:
    recorder: _Recorder = field(default_factory=_Recorder)
    logs: list[Announcement] = field(default_factory=list)
    outputs: list[Announcement] = field(default_factory=list)
    sections_seen: int = 0


_STATE = pytest.StashKey[_State]()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Listen to the root logger while the test and its fixtures run."""
    state = item.stash[_STATE] = _State()
    logging.getLogger().addHandler(state.recorder)
    try:
        return (yield)
    finally:
        logging.getLogger().removeHandler(state.recorder)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail a passed phase with unannounced lines, and a passed test with a missed announcement."""
    report = yield
    state = item.stash.get(_STATE, None)
    if state is None:
        return report
    complaints = [*_unannounced_records(state), *_unannounced_lines(state, report)]
    if call.when == "call":
        promises = (announcement.broken_promise() for announcement in state.logs)
        complaints += [promise for promise in promises if promise]
    if call.when == "teardown":
        promises = (announcement.broken_promise() for announcement in state.outputs)
        complaints += [promise for promise in promises if promise]
    if complaints and report.outcome == "passed":
        report.outcome = "failed"
        report.longrepr = "\n".join(
            ["noise that the test did not announce (tests/support/checklogs.py):", *complaints]
        )
    return report


def _unannounced_records(state: _State) -> list[str]:
    complaints = []
    for record in state.recorder.records:
        message = record.getMessage()
        accepted = [a for a in state.logs if record.levelno >= a.level and a.take(message)]
        if not accepted:
            complaints.append(
                f"log: {record.levelname} {record.name}: {message}"
                f" ({record.pathname}:{record.lineno})"
            )
    state.recorder.records.clear()
    return complaints


def _unannounced_lines(state: _State, report: pytest.TestReport) -> list[str]:
    complaints = []
    for title, text in report.sections[state.sections_seen :]:
        if "log" in title:  # pytest's own copy of the log records
            continue
        for line in text.splitlines():
            accepted = [a for a in state.outputs if a.take(line)]
            if not accepted and SUSPICIOUS_OUTPUT.search(line):
                complaints.append(f"{title}: {line}")
    state.sections_seen = len(report.sections)
    return complaints


@pytest.fixture
def expect_log(request: pytest.FixtureRequest) -> Callable[..., Announcement]:
    """Announce log records: `expect_log(pattern, level=logging.WARNING, count=1)`.

    A count of None means one or more.
    """

    def announce(
        pattern: str, *, level: int = logging.WARNING, count: int | None = 1
    ) -> Announcement:
        announcement = Announcement(re.compile(pattern), level, count)
        request.node.stash[_STATE].logs.append(announcement)
        return announcement

    return announce


@pytest.fixture
def expect_output(request: pytest.FixtureRequest) -> Callable[..., Announcement]:
    """Announce lines of output: `expect_output(pattern, count=None)`.

    Most announce the first line of a traceback.
    """

    def announce(pattern: str, *, count: int | None = None) -> Announcement:
        announcement = Announcement(re.compile(pattern), -1, count)
        request.node.stash[_STATE].outputs.append(announcement)
        return announcement

    return announce
