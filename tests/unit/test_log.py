# SPDX-License-Identifier: GPL-2.0-or-later
"""Logging: journald's prefixes, records held back, and above all that a full stderr holds nobody up."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator

import pytest

from zswapd import log as zswapd_log


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe()
    before = logging.getLogger().level, logging.raiseExceptions
    yield reading, writing
    logging.getLogger().removeHandler(zswapd_log._handler)  # type: ignore[arg-type]
    logging.getLogger().setLevel(before[0])
    logging.raiseExceptions = before[1]
    os.close(reading)
    os.close(writing)


def test_setup_writes_records_of_its_level_and_above(pipe: tuple[int, int]) -> None:
    zswapd_log.setup("info", descriptor=pipe[1], environ={})
    log = logging.getLogger("zswapd.test")
    log.debug("not this")
    log.info("pool has %d frames", 17)
    zswapd_log.set_level("debug")
    log.debug("but this")
    lines = os.read(pipe[0], 4096).decode().splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == [
        "zswapd: pool has 17 frames",
        "zswapd: debug: but this",
    ]
    assert zswapd_log.statistics() == zswapd_log.LogStatistics(written=2, dropped=0, held_back=0)


def test_setup_again_replaces_the_handler(pipe: tuple[int, int]) -> None:
    for _ in range(3):
        zswapd_log.setup("info", descriptor=pipe[1], environ={})
    logging.getLogger("zswapd.test").info("once")
    assert os.read(pipe[0], 4096).count(b"once") == 1


def test_lines_for_the_journal_carry_their_priority(pipe: tuple[int, int], expect_log: Callable[..., object]) -> None:
    expect_log("it broke", count=1)
    status = os.fstat(pipe[1])
    zswapd_log.setup("info", descriptor=pipe[1], environ={"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"})
    log = logging.getLogger("zswapd.test")
    log.info("ready")
    try:
        os.close(-1)
    except OSError:
        log.exception("it broke")
    lines = os.read(pipe[0], 65536).decode().splitlines()
    assert lines[:2] == ["<6>ready", "<3>it broke"]
    assert len(lines) > 4
    assert all(line.startswith("<3>") for line in lines[1:])


@pytest.mark.parametrize("stream", ["", "1:2", "garbage"])
def test_a_journal_stream_that_is_not_this_descriptor_counts_for_nothing(pipe: tuple[int, int], stream: str) -> None:
    zswapd_log.setup("info", descriptor=pipe[1], environ={"JOURNAL_STREAM": stream})
    logging.getLogger("zswapd.test").info("ready")
    assert not os.read(pipe[0], 4096).startswith(b"<")


def test_a_full_pipe_drops_lines_and_never_waits(pipe: tuple[int, int]) -> None:
    zswapd_log.setup("info", descriptor=pipe[1], environ={})
    log = logging.getLogger("zswapd.test")
    start = time.monotonic()
    for number in range(2000):
        log.info("%d %s", number, "x" * 100)  # 220 KB into a pipe of 64 KiB
    assert time.monotonic() - start < 5
    statistics = zswapd_log.statistics()
    assert statistics.written + statistics.dropped == 2000
    assert statistics.dropped > 1000
    os.read(pipe[0], 65536)
    log.info("after")
    tail = os.read(pipe[0], 65536).decode().splitlines()[-2:]
    assert f"{statistics.dropped} log lines were dropped" in tail[0]
    assert tail[1].endswith("after")
    log.info("and no second report")
    assert b"dropped" not in os.read(pipe[0], 65536)


def test_a_reader_that_went_away_hurts_nobody() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    handler = zswapd_log.UnblockingHandler(writing)
    handler.emit(logging.makeLogRecord({"msg": "into the void"}))
    os.close(writing)
    handler.emit(logging.makeLogRecord({"msg": "into a closed descriptor"}))
    assert (handler.written, handler.dropped) == (0, 2)


def test_a_record_that_cannot_be_formatted_is_reported_not_raised(pipe: tuple[int, int]) -> None:
    zswapd_log.setup("info", descriptor=pipe[1], environ={})
    zswapd_log._handler.emit(logging.makeLogRecord({"msg": "%d", "args": ("x",)}))  # type: ignore[union-attr]
    assert b"cannot be formatted" in os.read(pipe[0], 4096)


def record(message: str, *args: object, **extra: object) -> logging.LogRecord:
    return logging.makeLogRecord({"name": "zswapd.test", "msg": message, "args": args, **extra})


def test_rate_limit_passes_one_record_in_its_time_and_counts_the_rest() -> None:
    now = [100.0]
    filter_ = zswapd_log.RepetitionFilter(clock=lambda: now[0])
    assert filter_.filter(record("full at %d%%", 1, rate_limit=10))
    assert not filter_.filter(record("full at %d%%", 2, rate_limit=10))
    assert not filter_.filter(record("full at %d%%", 3, rate_limit=10))
    assert filter_.filter(record("another", rate_limit=10))
    now[0] += 10
    passed = record("full at %d%%", 4, rate_limit=10)
    assert filter_.filter(passed)
    assert passed.getMessage() == "full at 4% (and 2 more like it)"
    now[0] += 10
    passed = record("full at %d%%", 5, rate_limit=10)
    assert filter_.filter(passed)
    assert passed.getMessage() == "full at 5%"
    assert filter_.held_back == 2


def test_log_once_tells_messages_apart_by_their_arguments() -> None:
    filter_ = zswapd_log.RepetitionFilter()
    assert filter_.filter(record("no %s", "discard", log_once=True))
    assert not filter_.filter(record("no %s", "discard", log_once=True))
    assert filter_.filter(record("no %s", "hook", log_once=True))
    assert filter_.filter(record("no %s", "discard"))
    assert filter_.held_back == 1


def test_the_filter_forgets_the_oldest_and_stays_small() -> None:
    filter_ = zswapd_log.RepetitionFilter()
    for number in range(5000):
        filter_.filter(record("%d", number, log_once=True))
        filter_.filter(record(f"{number}", rate_limit=1000))
    assert len(filter_._seen) <= 1024
    assert len(filter_._limited) <= 1024
