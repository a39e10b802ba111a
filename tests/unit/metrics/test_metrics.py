# SPDX-License-Identifier: GPL-2.0-or-later
"""Metrics: every family has the values of the snapshot, and promtool finds no fault.

Clients that misbehave delay no other client.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
import trio
from prometheus_client.core import Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tests.support import TOP, capabilities
from tests.support.backed import Files
from tests.support.snapshots import make, make_core, make_snapshot
from tests.support.strategies import page
from zswapd.core.pam.base import RejectReason
from zswapd.metrics import exporter as exporting
from zswapd.metrics.exporter import Exporter
from zswapd.metrics.families import (
    BACKED_ROWS,
    CLASS_ROWS,
    FILE_ROWS,
    ROWS,
    VOLUME_ROWS,
    collect,
    described,
)
from zswapd.metrics.peers import Verdict
from zswapd.metrics.snapshot import Snapshot
from zswapd.worker.files import OWN_NAMES


@pytest.fixture(scope="module")
def snapshot() -> Iterator[Snapshot]:
    core = make_core()
    yield make_snapshot(core)
    core.close()


class Families:
    """What generate_latest takes."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        return collect(self._snapshot)


@pytest.fixture(scope="module")
def text(snapshot: Snapshot) -> str:
    return generate_latest(Families(snapshot)).decode()


def samples(text: str) -> dict[tuple[str, str], float]:
    """Return value by (name, the first label's value)."""
    return {
        (sample.name, next(iter(sample.labels.values()), "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_values_are_the_snapshots(text: str, snapshot: Snapshot) -> None:
    seen = samples(text)
    frames = snapshot.core.frames
    assert seen["zswapd_frontswap_stores_total", ""] == snapshot.core.frontswap.succ_stores == 64
    assert seen["zswapd_pool_bytes", ""] == frames.used_frames * frames.page_size > 0
    assert seen["zswapd_requests_total", "discard"] == snapshot.fuse.discards
    assert seen["zswapd_protection_on", "lock_memory"] == 0
    assert seen["zswapd_protection_on", "heap"] == 1
    assert seen["zswapd_memory_stall_seconds_total", "full"] == snapshot.pressure.full_seconds
    assert seen["zswapd_file_stored_pages", "swap"] == 64
    assert seen["zswapd_build_info", "1.2.3"] == 1
    assert {reason for name, reason in seen if name == "zswapd_frontswap_rejects_total"} == {
        reason.name.lower() for reason in RejectReason
    }


def test_the_disk_behind_the_pool_is_told_of_number_by_number() -> None:
    files = Files(64)
    for number in range(40):
        files.put(number, page("half", number, 4096))
    files.write_back(range(30))
    files.settle()
    files.disk.failing = errno.EIO
    files.write_back([35])
    files.settle()
    files.disk.failing = 0
    files.get(3)
    files.core.zv.limit_frames = 0
    files.put(50, page("half", 50, 4096))
    writeback = files.core.writeback
    assert writeback
    writeback.budget = 10 * 4096
    writeback.command(2)
    writeback.step("command")
    files.transfers.kick()
    files.settle()
    core = files.core.statistics()
    seen = samples(generate_latest(Families(make_snapshot(files.core))).decode())
    # The names of zram and zswap, in zswapctl stats, and what Prometheus makes of them.
    assert core.transfers
    assert core.writeback
    assert seen["zswapd_file_backed_pages", "swap"] == core.backed[0].bd_count == 33
    assert (
        seen["zswapd_file_written_back_pages_total", "swap"]
        == core.backed[0].written_back_pages
        == 32
    )
    assert (
        seen["zswapd_file_written_through_pages_total", "swap"]
        == core.backed[0].written_through_pages
        == 1
    )
    assert seen["zswapd_file_failed_slots_total", "swap"] == core.backed[0].failed_slots == 1
    assert seen["zswapd_backing_read_pages_total", ""] == core.transfers.bd_reads == 1
    assert seen["zswapd_backing_written_pages_total", ""] == core.transfers.bd_writes == 33
    assert seen["zswapd_backing_errors_total", "write"] == core.transfers.failed_writes == 1
    assert seen["zswapd_backing_degraded", ""] == core.transfers.degraded == 0
    assert seen["zswapd_pool_limit_hits_total", ""] == core.zv.pool_limit_hit == 1
    assert (
        seen["zswapd_frontswap_rejects_total", "pool_limit_hit"]
        == core.frontswap.rejects["pool_limit_hit"]
        == 1
    )
    assert seen["zswapd_writeback_sent_pages_total", "command"] == core.writeback.by_command == 2
    triggers = {label for name, label in seen if name == "zswapd_writeback_sent_pages_total"}
    assert triggers == {"command", "incompressible", "file", "limit", "reserve", "age"}
    assert (
        seen["zswapd_writeback_budget_left_bytes", ""]
        == core.writeback.budget_left_bytes
        == 10 * 4096
    )
    assert seen["zswapd_writeback_oldest_age_seconds", ""] >= 0
    files.close()


def test_classes_in_use_are_there_and_no_others(text: str, snapshot: Snapshot) -> None:
    seen = samples(text)
    sizes = {one.size: one.used_frames for one in snapshot.core.zsmalloc.classes if one.used_frames}
    assert len(sizes) > 1
    assert {
        int(size): value
        for (name, size), value in seen.items()
        if name == "zswapd_zsmalloc_class_frames"
    } == sizes


def test_frames_of_zbud_are_told_by_what_they_hold() -> None:
    core = make(pool__allocator="zbud")
    # Twice two share a frame; one shares its with the header of the last, which has a frame of its
    # own; one is alone.
    for number, size in enumerate((1800, 1800, 1800, 1800, 2700, 2700, 4096)):
        core.devices["swap"].write(number * 4096, memoryview(os.urandom(size).ljust(4096, b"0")))
    seen = samples(generate_latest(Families(make_snapshot(core))).decode())
    core.close()
    assert (seen["zswapd_zbud_frames", "two"], seen["zswapd_zbud_frames", "page"]) == (3, 1)
    assert {
        key: value for key, value in seen.items() if key[0] == "zswapd_zbud_unbuddied_frames"
    } == {("zswapd_zbud_unbuddied_frames", "44"): 1}


def test_every_row_finds_its_values(snapshot: Snapshot, text: str) -> None:
    names = {name for name, _ in samples(text)}
    files = Files(64)
    names |= {
        name for name, _ in samples(generate_latest(Families(make_snapshot(files.core))).decode())
    }
    files.close()
    core = make(pool__allocator="zbud")
    names |= {name for name, _ in samples(generate_latest(Families(make_snapshot(core))).decode())}
    core.close()
    assert not [row.name for row in ROWS if f"zswapd_{row.name}" not in names]


def families(snapshot: Snapshot) -> dict[str, tuple[str, str]]:
    """Return (kind, help) by name, as a scraper sees them."""
    return {
        (
            f"{one.name}_{'total' if one.type == 'counter' else 'info'}"
            if one.type in {"counter", "info"}
            else one.name
        ): (one.type, one.documentation)
        for one in collect(snapshot)
    }


def test_the_reference_describes_what_is_told_and_nothing_else(snapshot: Snapshot) -> None:
    files = Files(64)
    core = make(pool__allocator="zbud")
    told = families(snapshot) | families(make_snapshot(files.core)) | families(make_snapshot(core))
    core.close()
    files.close()
    assert {one.name: (one.kind, one.help) for one in described()} == told


KERNELS = {
    *OWN_NAMES,
    "pages_compacted",
    "pool_limit_hit",
    "bd_count",
    "bd_reads",
    "bd_writes",
    "succ_gets",
    "failed_gets",
    "puts",
}
"""Counters that the kernel has by the same name.

Zcache's, frontswap's and cleancache's, zsmalloc's, zswap's, zram's.
"""


def test_help_names_the_kernels_counter() -> None:
    rows = [
        (row.help, [row.paths] if isinstance(row.paths, str) else list(row.paths.values()))
        for row in ROWS
    ]
    rows += [
        (text, [field]) for _, text, field in (*FILE_ROWS, *BACKED_ROWS, *VOLUME_ROWS, *CLASS_ROWS)
    ]
    named = 0
    for text, paths in rows:
        for name in (path.rsplit(".", 1)[-1] for path in paths):
            if name in KERNELS:
                assert re.search(rf"\(.*\b{name}\b.*\)", text), (name, text)
                named += 1
    assert named > 25


def test_labels_are_of_what_is_configured_and_not_of_what_happens(text: str) -> None:
    """Their values stand in the tables here, in the settings.

    Or in the classes that an allocator has.
    """
    core = make_core(600)
    for number in range(300):
        core.devices["swap"].read_into(number * 4096, memoryview(bytearray(4096)))
    later = generate_latest(Families(make_snapshot(core))).decode()
    core.close()

    def labels(text: str) -> set[tuple[str, str]]:
        parsed = text_string_to_metric_families(text)
        return {
            pair
            for one in parsed
            for sample in one.samples
            for pair in sample.labels.items()
            if pair[0] != "size"
        }

    assert labels(later) == labels(text)
    assert {name for name, _ in labels(text)} <= {one.label for one in described()} | {"le"}
    sizes = [
        value
        for one in text_string_to_metric_families(later)
        for sample in one.samples
        if (value := sample.labels.get("size"))
    ]
    assert len(set(sizes)) < 256


def test_histograms_are_cumulative_with_bounds_in_seconds(text: str) -> None:
    lines = [line for line in text.splitlines() if line.startswith("zswapd_load_duration_seconds")]
    assert lines[0] == 'zswapd_load_duration_seconds_bucket{le="1e-06"} 5.0'
    assert lines[1] == 'zswapd_load_duration_seconds_bucket{le="2e-06"} 15.0'
    assert 'zswapd_load_duration_seconds_bucket{le="0.524288"} 15.0' in lines
    assert 'zswapd_load_duration_seconds_bucket{le="+Inf"} 17.0' in lines
    assert "zswapd_load_duration_seconds_count 17.0" in lines
    assert "zswapd_load_duration_seconds_sum 0.25" in lines


@pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool (Debian: prometheus) is not installed"
)
def test_promtool_finds_nothing(text: str) -> None:
    files = Files(64)
    text += generate_latest(
        Families(make_snapshot(files.core))
    ).decode()  # of the disk behind the pool, too
    files.close()
    _, *families = re.split("^(?=# HELP )", text, flags=re.MULTILINE)
    text = "".join({family.split()[2]: family for family in families}.values())
    assert "zswapd_backing_errors_total" in text
    result = subprocess.run(
        ["promtool", "check", "metrics"],
        input=text,
        text=True,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_it_is_made_in_time(snapshot: Snapshot) -> None:
    times = []
    for _ in range(5):
        began = time.perf_counter()
        generate_latest(Families(snapshot))
        times.append(time.perf_counter() - began)
    assert min(times) < 0.02


# The exporter.


@pytest.fixture
async def exporter(snapshot: Snapshot) -> Exporter:
    made = Exporter("127.0.0.1", 0)
    made.start(lambda: snapshot)
    with trio.fail_after(10):
        while made.address is None:
            await trio.sleep(0.01)
    return made


def ask(
    address: tuple[str, int], method: str = "GET", path: str = "/metrics"
) -> tuple[int, str, bytes]:
    connection = http.client.HTTPConnection(*address, timeout=10)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.getheader("Content-Type", ""), response.read()
    finally:
        connection.close()


async def get(
    exporter: Exporter, method: str = "GET", path: str = "/metrics"
) -> tuple[int, str, bytes]:
    assert exporter.address
    return await trio.to_thread.run_sync(ask, exporter.address, method, path)


async def test_a_scrape_is_the_text(exporter: Exporter, text: str) -> None:
    status, kind, body = await get(exporter)
    assert (status, kind) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert body.decode() == text


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("HEAD", "/metrics", 200),
        ("GET", "/", 404),
        ("POST", "/metrics", 405),
        ("GET", "/metrics?a=b", 200),
    ],
)
async def test_other_requests_are_told_what_is_right(
    exporter: Exporter, method: str, path: str, status: int
) -> None:
    answered, _, body = await get(exporter, method, path)
    assert answered == status
    assert bool(body) == (method != "HEAD")


@contextlib.contextmanager
def connections(exporter: Exporter, number: int) -> Iterator[list[socket.socket]]:
    assert exporter.address
    held = [socket.create_connection(exporter.address, timeout=5) for _ in range(number)]
    try:
        yield held
    finally:
        for one in held:
            one.close()


async def received(one: socket.socket, size: int = 100) -> bytes:
    return await trio.to_thread.run_sync(one.recv, size)


REQUEST = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"


async def test_a_client_that_misbehaves_is_shown_out_and_no_other_waits(
    exporter: Exporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "CLIENT_S", 0.5)
    with connections(exporter, 6) as (slow, rude, endless, long, binary, unread):
        slow.sendall(b"GET /metr")
        rude.sendall(b"\x16\x03\x01\x00\xff\r\n\r\n")
        binary.sendall(b"\x16\x03\x01\x00\xff")
        endless.sendall(b"GET /metrics HTTP/1.1\r\nHost: " + b"x" * 20_000)
        long.sendall(b"GET /" + b"x" * 20_000)
        unread.sendall(REQUEST)
        began = time.monotonic()
        assert (await get(exporter))[0] == 200
        assert time.monotonic() - began < 0.4
        for one in (rude, endless, long, binary):
            assert (await received(one)).startswith(b"HTTP/1.1 400")
        assert await received(slow) == b""
        await trio.sleep(0.3)
        # it was sent, and waits with its reader's kernel
        assert (await received(unread)).startswith(b"HTTP/1.1 200")
    assert (await get(exporter))[0] == 200


async def test_clients_that_hold_connections_keep_no_other_out(exporter: Exporter) -> None:
    with connections(exporter, 3 * exporting.CLIENTS) as held:
        for number, one in enumerate(held):
            one.sendall(REQUEST if number % 2 else b"GET /metr")
        for _ in range(3):
            assert (await get(exporter))[0] == 200
        assert await received(held[0]) == b""
        held[-2].sendall(b"ics HTTP/1.1\r\nHost: x\r\n\r\n")  # those that came last are still there
        assert (await received(held[-2])).startswith(b"HTTP/1.1 200")
        assert len(exporter._clients) <= exporting.CLIENTS


async def test_a_request_may_come_in_pieces_and_the_client_may_close_its_end(
    exporter: Exporter, text: str
) -> None:
    with connections(exporter, 1) as (one,):
        for number in range(len(REQUEST)):
            one.sendall(REQUEST[number : number + 1])
            await trio.sleep(0.001)
        one.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := await received(one, 1 << 16):
            answer += piece
            await trio.sleep(0.01)
    assert answer.partition(b"\r\n\r\n")[2].decode() == text


async def test_one_request_a_connection(exporter: Exporter) -> None:
    with connections(exporter, 1) as (one,):
        one.sendall(2 * REQUEST)
        one.sendall(2 * REQUEST)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while piece := await received(one, 1 << 16):
                answer += piece
    assert answer.count(b"HTTP/1.1") == 1


async def test_an_answer_that_is_not_read_is_kept_for_a_while_only(
    exporter: Exporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "CLIENT_S", 0.3)
    monkeypatch.setattr(Exporter, "_make_text", lambda _self: bytes(64 << 20))
    exporter._made = None
    assert exporter.address
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        one.settimeout(5)
        one.connect(exporter.address)
        one.sendall(REQUEST)
        with trio.fail_after(5):
            while not exporter._clients:
                await trio.sleep(0.01)
            while exporter._clients:
                await trio.sleep(0.01)

        def read_all() -> int:
            size = 0
            while piece := one.recv(1 << 20):
                size += len(piece)
            return size

        with pytest.raises(ConnectionResetError):
            await trio.to_thread.run_sync(read_all)


async def test_how_often_text_is_made_is_not_up_to_who_asks(
    snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "TEXT_S", 60.0)
    taken = []
    made = Exporter("127.0.0.1", 0)
    made.start(lambda: taken.append(1) or snapshot)  # type: ignore[func-returns-value]
    with trio.fail_after(10):
        while made.address is None:
            await trio.sleep(0.01)
    for _ in range(5):
        assert (await get(made))[0] == 200
    assert len(taken) == 1
    monkeypatch.setattr(exporting, "TEXT_S", 0.0)
    await get(made)
    assert len(taken) == 2


async def test_a_user_who_may_not_read_gets_no_place_and_no_time(
    exporter: Exporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter._doorkeeper, "judge", lambda *_: Verdict.DENIED)
    with connections(exporter, 5) as held:
        for one, request in zip(
            held,
            (REQUEST, b"GET /", b"\x16\x03", b"x" * 5000, b"POST / HTTP/1.1\r\n\r\n"),
            strict=True,
        ):
            one.sendall(request)
        for one in held:
            assert (await received(one)).startswith(b"HTTP/1.1 403 Forbidden\r\n")
            assert not exporter._clients
    for gone in (Verdict.GONE, OSError("on cue")):

        def judge(*_: object, outcome: Verdict | OSError = gone) -> Verdict:
            if isinstance(outcome, OSError):
                raise outcome
            return outcome

        monkeypatch.setattr(exporter._doorkeeper, "judge", judge)
        with pytest.raises((http.client.HTTPException, ConnectionError)):
            await get(exporter)
    monkeypatch.undo()
    assert (await get(exporter))[0] == 200


async def test_a_failing_snapshot_fails_its_scrape_only(
    snapshot: Snapshot,
    caplog: pytest.LogCaptureFixture,
    expect_log: Callable[..., object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(exporting, "TEXT_S", 0.0)
    expect_log("metrics: a scrape has failed", level=logging.ERROR)
    failures = iter([False, True, False])

    def take() -> Snapshot:
        if next(failures):
            raise RuntimeError("on cue")
        return snapshot

    made = Exporter("127.0.0.1", 0)
    made.start(take)
    with trio.fail_after(10):
        while made.address is None:
            await trio.sleep(0.01)
    with pytest.raises(http.client.HTTPException):
        await get(made)
    assert "on cue" in caplog.text
    assert (await get(made))[0] == 200


async def test_an_address_that_is_taken_is_a_warning_and_tried_again(
    snapshot: Snapshot,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    expect_log: Callable[..., object],
) -> None:
    expect_log("cannot listen on 127.0.0.1 port [0-9]+: Address already in use", count=1)
    monkeypatch.setattr(exporting, "RETRY_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        made = Exporter("127.0.0.1", taken.getsockname()[1])
        made.start(lambda: snapshot)
        with trio.fail_after(10):
            while "Address already in use" not in caplog.text:
                await trio.sleep(0.01)
        assert made.address is None
    with trio.fail_after(10):
        while made.address is None:
            await trio.sleep(0.01)
    assert (await get(made))[0] == 200


async def test_the_loop_that_serves_pages_survives_a_failed_snapshot_and_a_dead_exporter(
    snapshot: Snapshot,
) -> None:
    made = Exporter("127.0.0.1", 0)

    def take() -> Snapshot:
        raise KeyError("on cue")

    made._snapshot = take
    made._main = trio.lowlevel.current_trio_token()
    with pytest.raises(KeyError):
        await trio.to_thread.run_sync(made._take)
    made._snapshot = lambda: snapshot
    assert await trio.to_thread.run_sync(made._take) is snapshot


@capabilities.requires_root()
@pytest.mark.slow
def test_the_thread_is_an_ordinary_task_below_the_page_path_once_it_listens() -> None:
    code = """if True:
        import os, sys, trio
        from zswapd import system as service
        from zswapd.metrics.exporter import Exporter
        from zswapd.system.protections import _set_scheduling
        from tests.support.snapshots import make_core, make_snapshot
        _set_scheduling(sys.argv[1])
        service.set_realtime()
        async def main():
            made = Exporter("127.0.0.1", 0)
            made.start(lambda: make_snapshot(make_core()))
            while made.address is None:
                await trio.sleep(0.01)
            for n in os.listdir("/proc/self/task"):
                if open(f"/proc/self/task/{n}/comm").read() == "metrics\\n":
                    print(os.sched_getscheduler(int(n)), os.getpriority(os.PRIO_PROCESS, int(n)))
        trio.run(main)
    """
    for kind in ("nice", "rr", "normal"):
        done = subprocess.run(
            [sys.executable, "-c", code, kind],
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
            cwd=TOP,
        )
        assert (done.stdout.split(), done.stderr) == ([str(os.SCHED_OTHER), "0"], "")
