# SPDX-License-Identifier: GPL-2.0-or-later
"""Logging: the prefixes of journald, and records that are held back.

A full stderr blocks no thread that logs.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

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


def test_lines_for_the_journal_carry_their_priority(
    pipe: tuple[int, int], expect_log: Callable[..., object]
) -> None:
    expect_log("it broke", count=1)
    status = os.fstat(pipe[1])
    environ = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
    zswapd_log.setup("info", descriptor=pipe[1], environ=environ, journal=Path("/nonexistent"))
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


class Journal:
    """What journald does with its socket."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.settimeout(5)

    def take(self) -> dict[str, str]:
        data, fields = self.socket.recv(1 << 20), {}
        while data:
            name, _, data = data.partition(b"\n")
            length = int.from_bytes(data[:8], "little")
            fields[name.decode()] = data[8 : 8 + length].decode()
            assert data[8 + length : 9 + length] == b"\n"
            data = data[9 + length :]
        return fields


@pytest.fixture
def journal(tmp_path: Path, pipe: tuple[int, int]) -> Iterator[Journal]:
    made = Journal(tmp_path / "socket")
    status = os.fstat(pipe[1])
    zswapd_log.setup(
        "info",
        descriptor=pipe[1],
        environ={"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"},
        journal=made.path,
    )
    yield made
    made.socket.close()


def test_the_journal_gets_records_with_their_fields(
    journal: Journal, expect_log: Callable[..., object]
) -> None:
    expect_log("it broke", count=1)
    log = logging.getLogger("zswapd.test")
    log.info("pool has %d frames\nPRIORITY=0", 17)
    taken = journal.take()
    assert taken.pop("CODE_LINE").isdecimal()
    assert taken == {
        "MESSAGE": "pool has 17 frames\nPRIORITY=0",
        "PRIORITY": "6",
        "SYSLOG_IDENTIFIER": "zswapd",
        "LOGGER": "zswapd.test",
        "ZSWAPD_TEMPLATE": "pool has %d frames\nPRIORITY=0",
        "CODE_FILE": __file__,
        "CODE_FUNC": "test_the_journal_gets_records_with_their_fields",
    }
    try:
        os.close(-1)
    except OSError:
        log.exception("it broke")
    taken = journal.take()
    assert taken["PRIORITY"] == "3"
    assert "Traceback" in taken["MESSAGE"]
    assert zswapd_log.statistics() == zswapd_log.LogStatistics(written=2, dropped=0, held_back=0)


def test_a_journal_that_hangs_holds_nobody_up(journal: Journal) -> None:
    log = logging.getLogger("zswapd.test")
    start = time.monotonic()
    for number in range(3000):
        log.info("%d %s", number, "x" * 1000)
    assert time.monotonic() - start < 60
    statistics = zswapd_log.statistics()
    assert statistics.dropped > 100
    assert statistics.written + statistics.dropped == 3000
    for number in range(statistics.written):
        assert journal.take()["MESSAGE"].startswith(f"{number} x")
    log.info("after")
    taken = journal.take()
    assert taken["MESSAGE"] == f"{statistics.dropped} records were dropped: the journal was full"
    assert taken["PRIORITY"] == "4"
    assert journal.take()["MESSAGE"] == "after"


def test_what_the_journal_cannot_take_goes_to_stderr(
    journal: Journal, pipe: tuple[int, int]
) -> None:
    log = logging.getLogger("zswapd.test")
    os.set_blocking(pipe[0], False)
    log.info("long %s", "x" * (1 << 20))
    assert os.read(pipe[0], 16).startswith(b"<6>long xxx")
    while len(os.read(pipe[0], 1 << 16)) == 1 << 16:
        pass
    journal.path.unlink()
    journal.socket.close()
    log.info("it is gone")
    assert os.read(pipe[0], 4096).endswith(b"<6>it is gone\n")
    journal.__init__(journal.path)  # type: ignore[misc] # journald was started again
    log.info("it is back")
    assert journal.take()["MESSAGE"] == "it is back"


@pytest.mark.parametrize("stream", ["", "1:2", "garbage"])
def test_a_journal_stream_that_is_not_this_descriptor_counts_for_nothing(
    pipe: tuple[int, int], stream: str
) -> None:
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
