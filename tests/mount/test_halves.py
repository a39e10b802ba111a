# SPDX-License-Identifier: GPL-2.0-or-later
"""Either half is off, frozen or full, in a real daemon, and the other one does not notice."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.mount.test_files import errno_of
from tests.support.swap import Stage, next_worker, stage, wait_for
from tools.bench.harness.daemon import Daemon
from tools.bench.harness.system import HarnessError

__all__ = ["stage"]

PAGE = 4096
MIB = 1 << 20
PAGES = 2000
"""Of the volume, 1300 bytes each when compressed: 2.6 MiB of zbud."""


@pytest.fixture
def data(tmp_path: Path) -> bytes:
    content = b"".join(os.urandom(1300) + bytes(PAGE - 1300) for _ in range(PAGES))
    (tmp_path / "slow").write_bytes(content)
    return content


@pytest.fixture(params=["zsmalloc,zbud", "zbud,zsmalloc"])
def start(
    request: pytest.FixtureRequest, stage: Stage, tmp_path: Path, data: bytes
) -> Callable[..., Daemon]:
    """Starts a daemon with a volume, unless its cache is off."""

    def started(size: str = "64M", **settings: str) -> Daemon:
        settings["pool__allocator"], settings["cache__allocator"] = request.param.split(",")
        if settings.get("cache__limit") != "":
            settings["cache__volumes__disk"] = str(tmp_path / "slow")
        return stage.daemon(size, memory__reserve="8M", **settings)

    return started


class Swap:
    """A swap file, written and read as the loop device does it, without the page cache."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR)
        self.model: dict[int, bytes] = {}

    def write(self, number: int, page: bytes) -> int:
        """Write a page; return the errno, 0 for none."""
        code = errno_of(os.pwrite, self._fd, page, number * PAGE)
        if not code:
            self.model[number] = page
        return code

    def goes_on(self) -> None:
        """Write some more and read everything."""
        for number in range(len(self.model), len(self.model) + 200):
            assert self.write(number, os.urandom(1000) + bytes(PAGE - 1000)) == 0
        self.reads()

    def reads(self) -> None:
        """Read everything."""
        for number, page in self.model.items():
            assert os.pread(self._fd, PAGE, number * PAGE) == page

    def close(self) -> None:
        os.close(self._fd)


@pytest.fixture
def swap() -> Iterator[Callable[[Daemon], Swap]]:
    opened: list[Swap] = []

    def open_(daemon: Daemon) -> Swap:
        opened.append(Swap(daemon.file))
        return opened[-1]

    yield open_
    for one in opened:
        one.close()


def cache(daemon: Daemon) -> dict[str, Any]:
    """Return the cache's statistics."""
    found: dict[str, Any] = daemon.ask("stats")["core"]["cache"]
    return found


def read(daemon: Daemon) -> bytes:
    """Read the volume, past the kernel's page cache."""
    with (daemon.mountpoint / "cache/disk").open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return file.read()


def cache_goes_on(daemon: Daemon, data: bytes) -> None:
    """Read the volume until the cache gives out pages, always the right ones."""
    before = cache(daemon)["cleancache"]

    def gives() -> bool:
        assert read(daemon) == data
        now = cache(daemon)["cleancache"]
        return bool(now["succ_gets"] >= before["succ_gets"] + PAGES // 2 and now["pages"] > 0)

    wait_for(gives, "the cache gives out no pages")


# Off.


def test_cache_goes_on_without_a_swap_file(start: Callable[..., Daemon], data: bytes) -> None:
    daemon = start(size="")
    assert sorted(os.listdir(daemon.mountpoint)) == ["cache", "params", "stats"]
    cache_goes_on(daemon, data)
    assert "Cache      " in daemon.ctl("status")
    with pytest.raises(HarnessError, match=r"swap\.size is empty"):
        daemon.ctl("swapon")
    worker = daemon.worker_pid()
    os.kill(worker, signal.SIGKILL)
    next_worker(daemon, worker)
    cache_goes_on(daemon, data)
    assert daemon.ctl_json("shrink", str(10**6))["left"] == 0
    assert read(daemon) == data
    assert daemon.terminate() == 0


def test_swap_goes_on_without_a_cache(
    start: Callable[..., Daemon], swap: Callable[[Daemon], Swap]
) -> None:
    daemon = start(cache__limit="")
    assert sorted(os.listdir(daemon.mountpoint)) == ["params", "stats", "swap"]
    swap(daemon).goes_on()
    assert "Cache" not in daemon.ctl("status")
    for words in (("cache", "list"), ("shrink", "1")):
        with pytest.raises(HarnessError, match="there is no cache"):
            daemon.ctl(*words)


# Frozen.


def test_cache_goes_on_while_swap_is_frozen(
    start: Callable[..., Daemon], swap: Callable[[Daemon], Swap], data: bytes
) -> None:
    daemon = start()
    swapped = swap(daemon)
    swapped.goes_on()
    daemon.ctl("freeze")
    assert swapped.write(PAGE, b"x" * PAGE) == errno.EIO
    cache_goes_on(daemon, data)
    swapped.reads()
    daemon.ctl("thaw")
    swapped.goes_on()


def test_swap_goes_on_while_the_cache_is_frozen(
    start: Callable[..., Daemon], swap: Callable[[Daemon], Swap], data: bytes
) -> None:
    daemon = start()
    cache_goes_on(daemon, data)
    daemon.ctl("cache", "freeze")
    daemon.ctl("cache", "invalidate", "disk")
    swap(daemon).goes_on()
    assert read(daemon) == data
    assert cache(daemon)["cleancache"]["pages"] == 0
    assert cache(daemon)["cleancache"]["rejects"]["frozen"] >= PAGES
    daemon.ctl("cache", "thaw")
    cache_goes_on(daemon, data)


# Full.


def test_cache_goes_on_while_swap_is_full(
    start: Callable[..., Daemon], swap: Callable[[Daemon], Swap], data: bytes
) -> None:
    daemon = start(pool__limit="2M")
    swapped = swap(daemon)
    codes = {swapped.write(number, os.urandom(PAGE)) for number in range(1000)}
    assert codes == {0, errno.ENOSPC}
    assert 330 < len(swapped.model) < 520  # zbud needs half a frame more for a page's header
    cache_goes_on(daemon, data)
    assert cache(daemon)["zbuds"]["evicted_zpages"] == 0, "swap's limit is no reason to evict"
    swapped.reads()


def test_swap_goes_on_while_the_cache_is_full(
    start: Callable[..., Daemon], swap: Callable[[Daemon], Swap], data: bytes
) -> None:
    daemon = start(cache__limit="1M")
    wait_for(
        lambda: read(daemon) == data and cache(daemon)["zbuds"]["evicted_zpages"] > PAGES,
        "the cache does not fill",
    )
    assert cache(daemon)["frames"] <= MIB // PAGE
    swapped = swap(daemon)
    for _ in range(5):
        swapped.goes_on()
        assert read(daemon) == data
    assert sum(daemon.ctl_json("status")["pool"]["refused"].values()) == 0
    assert 0 < cache(daemon)["frames"] <= MIB // PAGE
