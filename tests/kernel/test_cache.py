# SPDX-License-Identifier: GPL-2.0-or-later
"""Cache volumes of a whole daemon.

Their speed is measured, and what survives the death of a worker. A backing file that hangs delays
only its own readers.
"""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support import slowdevice
from tests.support.swap import Stage, next_worker
from tests.support.volumes import PAGE, make_file
from tools.bench.harness.daemon import Daemon, program
from tools.bench.workloads import cache

pytestmark = pytest.mark.kernel

requires_nbd = pytest.mark.skipif(
    bool(slowdevice.missing()), reason=f"not installed: {slowdevice.missing()}"
)

MIB = 1 << 20


def ctl(daemon: Daemon, *words: str) -> str:
    """Run zswapctl; return what it prints."""
    command = [*program("zswapctl"), "--socket", str(daemon.socket), *words]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout


def volume(daemon: Daemon) -> Path:
    return daemon.mountpoint / "cache" / "disk"


@requires_nbd
@pytest.mark.parametrize(
    ("times", "contents", "passes"),
    [
        (
            4,
            cache.CONTENTS[:1],
            {"device": 1, "volume": 3},
        ),  # others' time slices show in half a second
        pytest.param(20, cache.CONTENTS, cache.PASSES, marks=pytest.mark.bench),
    ],
    ids=["beside others", "alone"],
)
def test_set_twice_the_page_cache_is_read_again_faster(
    times: float, contents: Sequence[str], passes: dict[str, int]
) -> None:
    """At random, by medians; the page cache held half of the set at most.

    By the reader's own cgroup, and not nothing.
    """
    found = cache.run(passes=passes, contents=contents)
    print(cache.table(found))
    assert all(0.05 < one.page_cache <= 0.5 for one in found), found
    assert cache.faster(found, "random") >= times
    # In order the kernel's readahead hides most of the device's latency.
    assert cache.faster(found, "sequential") >= 1


def test_length_and_cutoff_change_in_a_running_daemon(stage: Stage, tmp_path: Path) -> None:
    backing = tmp_path / "backing"
    data = make_file(backing, 1024)
    daemon = stage.daemon("64M", cache__volumes__disk=str(backing), cache__check_ms="3600000")

    def read() -> bytes:
        with volume(daemon).open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            return file.read()

    def counted() -> dict[str, int]:
        (only,) = daemon.ask("stats")["volumes"]
        return {name: only[name] for name in ("size", "pages", "bypassed_bytes", "drops")}

    assert read() == data
    assert counted() == {"size": len(data), "pages": 1024, "bypassed_bytes": 0, "drops": 1}
    data = make_file(backing, 1500)
    assert "5.9 MiB" in ctl(daemon, "cache", "resize", "disk")
    assert counted() == {"size": len(data), "pages": 0, "bypassed_bytes": 0, "drops": 2}
    ctl(daemon, "set", "cache.sequential_cutoff=2M")
    assert read() == data
    after = counted()
    assert after["bypassed_bytes"] >= (1500 - 2 * 512) * PAGE
    assert 256 <= after["pages"] <= 512, "what was read before the cutoff is kept"
    ctl(daemon, "set", "cache.sequential_cutoff=")
    assert read() == data
    assert counted()["pages"] == 1500


def test_volumes_go_on_when_the_worker_is_killed_and_nothing_is_stale(
    stage: Stage, tmp_path: Path
) -> None:
    configured, added = tmp_path / "configured", tmp_path / "added"
    first, old = make_file(configured, 500), make_file(added, 500, seed=1)
    daemon = stage.daemon("64M", cache__volumes__disk=str(configured), cache__check_ms="100")
    ctl(daemon, "cache", "add", "more", "--backing", str(added), "--mode", "writethrough")
    more = daemon.mountpoint / "cache" / "more"
    with (
        volume(daemon).open("rb", buffering=0) as file,
        more.open("r+b", buffering=0) as other,
        mmap.mmap(other.fileno(), 0, access=mmap.ACCESS_READ) as mapping,
    ):
        assert file.read() == first
        assert mapping[:] == old
        for number in range(3):
            worker = daemon.ask("status")["worker"]["pid"]
            time.sleep(0.6)  # what it knows is written down twice a second
            os.kill(worker, 9)
            new = make_file(added, 500, seed=2 + number)
            next_worker(daemon, worker)
            file.seek(0)
            assert file.read() == first
            assert os.pread(other.fileno(), len(new), 0) == new
            assert mapping[:] == new
            assert other.write(b"written") == 7
            assert added.read_bytes()[:7] == b"written"
            other.seek(0)
    report = json.loads(ctl(daemon, "--json", "cache", "list"))["volumes"]
    assert [(row["name"], row["mode"], row["problem"]) for row in report] == [
        ("disk", "ro", None),
        ("more", "writethrough", None),
    ]


@requires_nbd
@pytest.mark.parametrize("seconds", [6, pytest.param(10, marks=pytest.mark.soak)])
def test_worker_whose_threads_hang_in_a_device_is_succeeded_at_once(
    stage: Stage, tmp_path: Path, seconds: int
) -> None:
    make_file(tmp_path / "contents", 1000)
    daemon = stage.daemon("64M", cache__queue_depth="3")
    with slowdevice.slow_file(
        tmp_path / "slow", tmp_path / "contents", delay_ms=seconds * 1000
    ) as slow:
        ctl(daemon, "cache", "add", "disk", "--backing", str(slow.path))

        def read(offset: int) -> None:
            descriptor = os.open(volume(daemon), os.O_RDONLY)
            try:
                assert len(os.pread(descriptor, PAGE, offset)) == PAGE
            finally:
                os.close(descriptor)

        readers = [
            threading.Thread(target=read, args=(number * 200 * PAGE,)) for number in range(4)
        ]
        for reader in readers:
            reader.start()
        time.sleep(0.5)
        worker = daemon.ask("status")["worker"]["pid"]
        begin = time.monotonic()
        os.kill(worker, 9)
        next_worker(daemon, worker)
        assert time.monotonic() - begin < 3, "the successor has waited for the device"
        assert Path(f"/proc/{worker}").exists(), "nothing hung: the test is void"
        descriptor = os.open(daemon.file, os.O_RDWR)
        try:
            slowest = 0.0
            for number in range(100):
                before = time.monotonic()
                assert os.pwrite(descriptor, bytes([number]) * PAGE, number * PAGE) == PAGE
                assert os.pread(descriptor, PAGE, number * PAGE) == bytes([number]) * PAGE
                slowest = max(slowest, time.monotonic() - before)
        finally:
            os.close(descriptor)
        assert slowest < 1, "swap waits for a device that hangs"
        assert "disk" in ctl(daemon, "cache", "list")
        for reader in readers:
            reader.join(60)
            assert not reader.is_alive()
        ctl(daemon, "cache", "remove", "disk")
