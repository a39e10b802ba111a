# SPDX-License-Identifier: GPL-2.0-or-later
"""Cache volumes as programs see them, through the kernel.

Its page cache, mmap, signals, and files that are slow or fail.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.mount.test_files import errno_of
from tests.support import remembering, slowdevice
from tests.support.mounting import ALLOCATORS, FileServer, loop_device, serving
from tests.support.volumes import PAGE, make_file

CHECK_S = 0.1
"""As fileserver.py sets it."""

OVER = [("--allocators", pair) for pair in ALLOCATORS]
"""Options for fileserver.py."""

requires_nbd = pytest.mark.skipif(
    bool(slowdevice.missing()), reason=f"not installed: {slowdevice.missing()}"
)


@contextlib.contextmanager
def volumes(tmp_path: Path, *options: str, **specs: tuple[Path, str]) -> Iterator[FileServer]:
    """Serve volumes."""
    words = json.dumps({name: (str(path), mode) for name, (path, mode) in specs.items()})
    with serving(tmp_path / "mnt", "--volumes", words, *options) as server:
        yield server


def reads(server: FileServer) -> int:
    """How many reads of volumes have reached the server, by kind."""
    (only,) = server.ask("statistics")["done"]
    return int(only["hits"] + only["misses"])


def becomes(read: Callable[[], bytes], expected: bytes | bytearray) -> None:
    """Read until what is read is as long as expected, half a second at most.

    An answer about the length that crosses a notification is dropped by the kernel, which then goes
    by the old one once more.
    """
    end = time.monotonic() + 0.5
    while len(got := read()) != len(expected) and time.monotonic() < end:
        time.sleep(0.01)
    assert got == expected


@pytest.mark.parametrize("options", [(), *OVER], ids=["memory", *ALLOCATORS])
def test_volume_reads_as_its_backing_file_and_from_the_page_cache_first(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    data = make_file(tmp_path / "backing", 300.5)
    with volumes(tmp_path, *options, disk=(tmp_path / "backing", "ro")) as server:
        path = server.mountpoint / "cache" / "disk"
        assert os.listdir(server.mountpoint / "cache") == ["disk"]
        assert path.stat().st_size == len(data)
        assert path.read_bytes() == data
        count = reads(server)
        assert path.read_bytes() == data, "opened anew, from the page cache"
        assert reads(server) == count
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert path.read_bytes() == data
        (statistics,) = server.ask("statistics")["done"]
        assert statistics["hits"] > 0
        assert statistics["backing_read_bytes"] <= len(data) + PAGE, (
            "the second time, cleancache had it"
        )
        assert errno_of(os.open, path, os.O_RDWR) == errno.EROFS
        assert errno_of(os.truncate, path, 5) in {errno.EPERM, errno.EROFS}


@pytest.mark.parametrize("options", OVER, ids=ALLOCATORS)
def test_change_underneath_is_seen_by_open_files_and_mappings(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    backing = tmp_path / "backing"
    old = make_file(backing, 20)
    with volumes(tmp_path, *options, disk=(backing, "ro")) as server:
        path = server.mountpoint / "cache" / "disk"
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping,
        ):
            assert mapping[:] == old
            new = make_file(backing, 20, seed=1)
            assert path.read_bytes() == new, "opening looks at once"
            assert mapping[:] == new
            newer = make_file(backing, 20, seed=2)
            time.sleep(CHECK_S + 0.02)
            assert os.pread(file.fileno(), len(newer), 0) == newer
            assert mapping[:] == newer
            longer = make_file(backing, 40, seed=3)
            time.sleep(CHECK_S + 0.02)
            becomes(lambda: os.pread(file.fileno(), 10**6, 0), longer)
            shorter = make_file(backing, 1.5, seed=4)
            time.sleep(CHECK_S + 0.02)
            becomes(lambda: os.pread(file.fileno(), 10**6, 0), shorter)
            assert os.fstat(file.fileno()).st_size == len(shorter)


def test_change_underneath_is_seen_by_a_program_that_only_reads_memory(tmp_path: Path) -> None:
    backing = tmp_path / "backing"
    old = make_file(backing, 20)
    with volumes(tmp_path, disk=(backing, "ro")) as server:
        path = server.mountpoint / "cache" / "disk"
        with path.open("rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with mapping:  # it keeps the file open
            assert mapping[:] == old
            for seed in (1, 2):
                new = make_file(backing, 20, seed=seed)
                deadline = time.monotonic() + 5
                while mapping[:] != new and time.monotonic() < deadline:
                    time.sleep(0.01)
                assert mapping[:] == new


def test_change_on_a_file_system_that_remembers_attributes_is_seen(tmp_path: Path) -> None:
    """As NFS does, and FUSE file systems: stat(2) says for half a minute what it said before."""
    with (
        remembering.served(tmp_path / "net") as net,
        volumes(
            tmp_path, read=(net / "file", "ro"), written=(net / "file", "writethrough")
        ) as server,
    ):
        paths = [server.mountpoint / "cache" / name for name in ("read", "written")]
        contents = b"A" * remembering.SIZE
        for path in paths:
            assert path.read_bytes() == contents
        for letter in b"BC":
            contents = bytes([letter]) * remembering.SIZE
            (net / "file").stat()  # is remembered from now on
            remembering.change(net)
            for path in paths:
                assert path.read_bytes() == contents, "opening looks at once"
        descriptor = os.open(paths[1], os.O_RDWR)
        try:
            remembering.change(net)
            assert (
                os.pwrite(descriptor, b"own", 0) == 3
            )  # which is no reason to take the change for our own
            time.sleep(CHECK_S + 0.02)
            assert os.pread(descriptor, remembering.SIZE, 0) == b"own" + b"D" * (
                remembering.SIZE - 3
            )
        finally:
            os.close(descriptor)


@pytest.mark.parametrize("options", OVER, ids=ALLOCATORS)
def test_writes_go_through_and_readers_see_them(tmp_path: Path, options: tuple[str, ...]) -> None:
    backing = tmp_path / "backing"
    data = bytearray(make_file(backing, 64))
    with volumes(tmp_path, *options, disk=(backing, "writethrough")) as server:
        path = server.mountpoint / "cache" / "disk"
        descriptor = os.open(path, os.O_RDWR)
        try:
            assert os.pread(descriptor, len(data), 0) == data
            for offset, length in (
                (0, 1),
                (PAGE - 1, 2),
                (3 * PAGE, 20 * PAGE),
                (len(data) - 3, 3),
            ):
                piece = os.urandom(length)
                assert os.pwrite(descriptor, piece, offset) == length
                data[offset : offset + length] = piece
                assert backing.read_bytes() == data, (
                    "not on the backing file when it was acknowledged"
                )
            os.fsync(descriptor)
            assert os.pread(descriptor, len(data), 0) == data
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            assert os.pread(descriptor, len(data), 0) == data
            time.sleep(CHECK_S + 0.02)
            assert os.pread(descriptor, len(data), 0) == data
            assert errno_of(os.pwrite, descriptor, b"x", len(data)) == errno.ENOSPC
            with mmap.mmap(descriptor, 0) as mapping:
                mapping[5 * PAGE : 5 * PAGE + 4] = b"mmap"
                mapping.flush()
            assert backing.read_bytes()[5 * PAGE : 5 * PAGE + 4] == b"mmap"
        finally:
            os.close(descriptor)


def test_fsync_of_a_volume_that_was_removed_fails(tmp_path: Path) -> None:
    backing = tmp_path / "backing"
    make_file(backing, 20)
    with volumes(tmp_path, disk=(backing, "writethrough")) as server:
        descriptor = os.open(server.mountpoint / "cache" / "disk", os.O_RDWR)
        try:
            assert os.pwrite(descriptor, b"q" * PAGE, 0) == PAGE
            assert errno_of(os.fsync, descriptor) == 0
            server.ask("remove", "disk")
            assert errno_of(os.fsync, descriptor) == errno.ESTALE
        finally:
            os.close(descriptor)


@pytest.mark.parametrize("options", OVER, ids=ALLOCATORS)
def test_volume_removed_while_open_gives_estale_and_no_old_byte(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    backing = tmp_path / "backing"
    old = make_file(backing, 20)
    with volumes(tmp_path, *options, disk=(backing, "ro")) as server:
        path = server.mountpoint / "cache" / "disk"
        with path.open("rb", buffering=0) as file:
            assert file.read() == old
            server.ask("remove", "disk")
            deadline = time.monotonic() + 5
            while errno_of(os.pread, file.fileno(), 10, 0) == 0 and time.monotonic() < deadline:
                time.sleep(0.01)  # the kernel forgets in a thread
            assert errno_of(os.pread, file.fileno(), 10, 0) == errno.ESTALE
            assert errno_of(os.stat, path) == errno.ENOENT
            new = make_file(backing, 20, seed=1)
            server.ask("add", "disk", str(backing), "ro")
            assert path.read_bytes() == new
            assert errno_of(os.pread, file.fileno(), 10, 0) == errno.ESTALE


@pytest.mark.parametrize("mode", ["ro", "writethrough"])
@pytest.mark.parametrize("options", OVER[::3], ids=ALLOCATORS[::3])
def test_block_device_is_cached_written_invalidated_and_grows(
    tmp_path: Path, options: tuple[str, ...], mode: str
) -> None:
    store = tmp_path / "store"
    data = bytearray(make_file(store, 300))
    with loop(store) as device, volumes(tmp_path, *options, disk=(Path(device), mode)) as server:
        path = server.mountpoint / "cache" / "disk"
        assert path.stat().st_size == len(data)
        with path.open("r+b" if mode == "writethrough" else "rb", buffering=0) as file:

            def reread() -> bytes:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                return os.pread(file.fileno(), 1 << 21, 0)

            def changed_by_somebody(offset: int, content: bytes) -> None:
                with Path(device).open("r+b") as other:
                    other.seek(offset)
                    other.write(content)
                    os.fsync(other.fileno())
                data[offset : offset + len(content)] = content

            assert reread() == data
            assert reread() == data
            (statistics,) = server.ask("statistics")["done"]
            assert statistics["hits"] > 0
            assert statistics["backing_read_bytes"] == len(data), (
                "the second time, cleancache had it"
            )
            if mode == "writethrough":
                data[5000:14000] = b"xyz" * 3000
                assert os.pwrite(file.fileno(), data[5000:14000], 5000) == 9000
                assert Path(device).read_bytes() == data, (
                    "not on the device when it was acknowledged"
                )
                os.fsync(file.fileno())
                assert reread() == data
                assert errno_of(os.pwrite, file.fileno(), b"x", len(data)) == errno.ENOSPC
            before = bytes(data)
            changed_by_somebody(8 * PAGE, b"somebody else")
            assert reread() == before, (
                "this change of a block device should be invisible: the test is void"
            )
            server.ask("invalidate", "disk")
            assert reread() == data
            data += make_file(store, 400)[300 * PAGE :]
            store.write_bytes(data)
            subprocess.run(["losetup", "--set-capacity", device], check=True, timeout=30)
            time.sleep(CHECK_S + 0.02)
            becomes(reread, data)
            assert os.fstat(file.fileno()).st_size == len(data)
            assert os.lseek(file.fileno(), 0, os.SEEK_END) == len(data)


@pytest.mark.parametrize("options", OVER[:1], ids=ALLOCATORS[:1])
def test_file_above_16_tib_is_cached_and_dropped_page_by_page(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    """Numbers of its pages differ by multiples of 2**32, which must not be taken for each other."""
    size = 80 << 40
    offsets = [0, (16 << 40) - PAGE, 16 << 40, 48 << 40, size - PAGE]
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as backing:  # ext4 ends at 16 TiB
        os.truncate(backing.name, size)
        for number, offset in enumerate(offsets):
            os.pwrite(backing.fileno(), b"%02d" % number * (PAGE // 2), offset)
        with volumes(tmp_path, *options, disk=(Path(backing.name), "ro")) as server:
            path = server.mountpoint / "cache" / "disk"
            assert path.stat().st_size == size
            for again in range(3):
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
                    for number, offset in enumerate(offsets):
                        assert os.pread(file.fileno(), PAGE, offset) == b"%02d" % number * (
                            PAGE // 2
                        )
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                (statistics,) = server.ask("statistics")["done"]
                assert (statistics["hits"], statistics["pages"]) == (
                    len(offsets) * again,
                    len(offsets),
                )
            server.ask("remove", "disk")
            core = server.stop()["core"]
        assert core["cleancache"]["pages"] == 0
        assert core["cleancache"]["invalidates"] == len(offsets)


def test_backing_on_our_own_mount_is_refused(tmp_path: Path) -> None:
    with serving(tmp_path / "mnt", "--volumes", "{}", "--size", str(1 << 20)) as server:
        assert (
            "ELOOP"
            in server.ask("try-add", "disk", str(server.mountpoint / "swap"), "ro")["refused"]
        )
        with loop(server.path) as device:
            assert "ELOOP" in server.ask("try-add", "disk", device, "ro")["refused"]


@contextlib.contextmanager
def loop(path: Path) -> Iterator[str]:
    command = ["losetup", "--find", "--show", str(path)]
    device = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=30
    ).stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True, timeout=30)


# Slow and failing.


@requires_nbd
def test_second_read_of_a_slow_file_is_five_times_faster(tmp_path: Path) -> None:
    data = make_file(tmp_path / "contents", 2000)
    with (
        slowdevice.slow_file(tmp_path / "slow", tmp_path / "contents") as slow,
        volumes(tmp_path, disk=(slow.path, "ro")) as server,
    ):
        path = server.mountpoint / "cache" / "disk"
        with path.open("rb", buffering=0) as file:
            begin = time.monotonic()
            assert b"".join(iter(lambda: file.read(1 << 20), b"")) == data
            first = time.monotonic() - begin
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            begin = time.monotonic()
            assert b"".join(iter(lambda: file.read(1 << 20), b"")) == data
            second = time.monotonic() - begin
        (statistics,) = server.ask("statistics")["done"]
        assert statistics["backing_read_bytes"] == len(data)
        assert statistics["hits"] > 10
        assert second < first / 5, (first, second)


@requires_nbd
@pytest.mark.parametrize("options", OVER, ids=ALLOCATORS)
def test_failing_file_fails_its_readers_alone(tmp_path: Path, options: tuple[str, ...]) -> None:
    data = make_file(tmp_path / "contents", 64)
    other = make_file(tmp_path / "other", 64, seed=1)
    with (
        slowdevice.slow_file(tmp_path / "slow", tmp_path / "contents", delay_ms=1) as slow,
        volumes(
            tmp_path, *options, bad=(slow.path, "ro"), good=(tmp_path / "other", "ro")
        ) as server,
    ):
        bad, good = server.mountpoint / "cache" / "bad", server.mountpoint / "cache" / "good"
        with bad.open("rb", buffering=0) as file:
            assert os.pread(file.fileno(), 8 * PAGE, 0) == data[: 8 * PAGE]
            slow.error_file.touch()
            assert errno_of(os.pread, file.fileno(), PAGE, 60 * PAGE) == errno.EIO
            assert os.pread(file.fileno(), 8 * PAGE, 0) == data[: 8 * PAGE], (
                "what is cached needs no device"
            )
            assert good.read_bytes() == other
            slow.error_file.unlink()
            assert os.pread(file.fileno(), PAGE, 60 * PAGE) == data[60 * PAGE : 61 * PAGE]


READER = """
import os, sys, signal
signal.signal(signal.SIGALRM, lambda *_: None)
signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02) if sys.argv[2] == "ticking" else None
print("reading", flush=True)
fd = os.open(sys.argv[1], os.O_RDONLY)
os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
data = os.pread(fd, 4096, int(sys.argv[3]))
signal.setitimer(signal.ITIMER_REAL, 0)
print(len(data), flush=True)
"""


@pytest.fixture
def reader() -> Iterator[Callable[[Path, str, int], subprocess.Popen[str]]]:
    """Starts a process that reads a page."""
    started: list[subprocess.Popen[str]] = []

    def start(path: Path, kind: str, offset: int) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", READER, str(path), kind, str(offset)],
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "reading\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait(30)
        assert process.stdout is not None
        process.stdout.close()


DIRECT_READERS = """
import mmap, os, sys, threading
def read(path, page):
    buffer = mmap.mmap(-1, 4096)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    started.release()
    os.preadv(fd, [buffer], page * 4096)
threading.stack_size(1 << 16)
started = threading.Semaphore(0)
for path in sys.argv[2:]:
    for page in range(int(sys.argv[1])):
        threading.Thread(target=read, args=(path, 8 * page)).start()
        started.acquire()
print("reading", flush=True)
"""


@contextlib.contextmanager
def direct_readers(threads: int, *paths: Path) -> Iterator[subprocess.Popen[str]]:
    """Run `threads` threads for each file; each reads a page of it around the page cache."""
    command = [sys.executable, "-c", DIRECT_READERS, str(threads), *map(str, paths)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "reading\n"
            yield process
        finally:
            process.kill()


def swap_latencies(path: Path, count: int) -> list[float]:
    """Write and read `count` pages of a block device, as the kernel swaps.

    Return the time of each pair in s, shortest first.
    """
    latencies = []
    descriptor = os.open(path, os.O_RDWR | os.O_DIRECT)
    try:
        with mmap.mmap(-1, PAGE) as page:
            for number in range(count):
                content = b"%09d" % number
                page[:9] = content
                before = time.monotonic()
                assert os.pwritev(descriptor, [page], number % 90 * PAGE) == PAGE
                assert os.preadv(descriptor, [page], number % 90 * PAGE) == PAGE
                latencies.append(time.monotonic() - before)
                assert page[:9] == content
    finally:
        os.close(descriptor)
    return sorted(latencies)


@requires_nbd
def test_swap_goes_on_beside_files_that_hang_for_ten_seconds_and_their_readers_can_be_killed(
    tmp_path: Path, reader: Callable[[Path, str, int], subprocess.Popen[str]]
) -> None:
    make_file(tmp_path / "contents", 2000)
    with contextlib.ExitStack() as stack:

        def hung(name: str, seconds: int) -> Path:
            return stack.enter_context(
                slowdevice.slow_file(
                    tmp_path / name, tmp_path / "contents", delay_ms=seconds * 1000
                )
            ).path

        # The time of those whose readers are killed only has to be longer than what is measured.
        specs = {
            name: (hung(name, seconds), "ro")
            for name, seconds in (("one", 10), ("two", 4), ("three", 4))
        }
        server = stack.enter_context(volumes(tmp_path, **specs))
        swap = stack.enter_context(loop_device(server.path))
        one, two, three = (server.mountpoint / "cache" / name for name in specs)
        alone = swap_latencies(swap, 1000)
        begin = time.monotonic()
        ticking = reader(one, "ticking", 1900 * PAGE)
        # Far apart: readers of one page wait for its lock, and the daemon need not let them go.
        victims = [reader(two, "quiet", number * 400 * PAGE) for number in range(4)]
        time.sleep(0.3)
        latencies = swap_latencies(swap, 1000)
        # More than the places that the loop device and all that they have to share had without a
        # bound.
        with direct_readers(200, two, three):
            pending = sum(item["pending"] for item in server.ask("statistics")["done"])
            assert pending >= 400, "not all readers wait"
            beside_many = swap_latencies(swap, 1000)
        for victim in victims:
            victim.send_signal(signal.SIGKILL)
        for victim in victims:
            assert victim.wait(2) == -signal.SIGKILL
        assert time.monotonic() - begin < 8, "they have waited for the device"
        for name, sample in (
            ("nobody", alone),
            ("a few readers", latencies),
            ("many readers", beside_many),
        ):
            print(
                f"swap beside {name}: {sample[500] * 1e6:.0f} µs, {sample[990] * 1e3:.1f} ms,"
                f" {sample[-1] * 1e3:.1f} ms"
            )
            # Compared with itself: a busy machine has a tail of its own.
            assert sample[500] < alone[500] + 0.001, "swap waits for files that hang"
            assert sample[990] < alone[990] + 0.1, "swap waits for files that hang"
            assert sample[-1] < alone[-1] + 0.5, "swap waits for files that hang"
        assert ticking.stdout is not None
        assert ticking.stdout.readline() == f"{PAGE}\n", (
            "a signal that does not kill must not fail a read"
        )
        assert time.monotonic() - begin > 9.5, "nothing hung: the test is void"
        assert ticking.wait(5) == 0
        assert sum(item["pending"] for item in server.ask("statistics")["done"]) == 0
        assert server.stop()["statistics"]["let_go"] >= 404


@requires_nbd
@pytest.mark.parametrize("options", OVER, ids=ALLOCATORS)
def test_two_hundred_threads_read_a_slow_file(tmp_path: Path, options: tuple[str, ...]) -> None:
    data = make_file(tmp_path / "contents", 1600)
    with (
        slowdevice.slow_file(tmp_path / "slow", tmp_path / "contents") as slow,
        volumes(tmp_path, *options, disk=(slow.path, "ro")) as server,
        (server.mountpoint / "cache" / "disk").open("rb") as file,
    ):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        got: dict[int, bytes] = {}

        def read(page: int) -> None:
            got[page] = os.pread(file.fileno(), PAGE, page * PAGE)

        threads = [threading.Thread(target=read, args=(8 * number,)) for number in range(200)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert got == {page: data[page * PAGE :][:PAGE] for page in range(0, 1600, 8)}
        (statistics,) = server.ask("statistics")["done"]
        assert (statistics["turned_away"], statistics["read_errors"]) == (0, 0)
