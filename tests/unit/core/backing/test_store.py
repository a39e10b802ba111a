# SPDX-License-Identifier: GPL-2.0-or-later
"""The backing store on real files and a loop device.

What is refused, and that slots keep what they are given.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import random
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import ciphers
from cryptography.hazmat.primitives.ciphers import algorithms, modes

from tests.support.capabilities import requires_loop
from tests.support.descriptors import is_readable
from zswapd.core.backing._disk import Cipher, Job, Queue
from zswapd.core.backing.store import DATA_AT, KEY_BYTES, LABEL, SlotStore, make_buffers, open_store
from zswapd.errors import BackingError

PAGE = 4096
MOUNT = Path("/run/zswapd/mnt")


def pages(*fill: int) -> list[memoryview]:
    memory = memoryview(mmap.mmap(-1, PAGE * len(fill)))
    for number, byte in enumerate(fill):
        memory[number * PAGE : (number + 1) * PAGE] = bytes([byte]) * PAGE
    return [memory[number * PAGE : (number + 1) * PAGE] for number in range(len(fill))]


def take(path: Path, slots: int = 16, *, force: bool = False) -> int:
    return open_store(path, slots, PAGE, mountpoint=MOUNT, force=force)


def test_slots_keep_what_they_are_given(tmp_path: Path) -> None:
    fd = take(tmp_path / "store")
    store = SlotStore(fd, PAGE)
    store.writing(0, pages(1, 2, 3))()
    store.writing(15, pages(9))()
    store.writing(1, pages(7))()
    out = pages(0, 0, 0)
    store.reading(0, out)()
    assert [bytes(page) for page in out] == [bytes([byte]) * PAGE for byte in (1, 7, 3)]
    store.reading(15, out[:1])()
    assert bytes(out[0]) == b"\x09" * PAGE
    os.close(fd)
    status = (tmp_path / "store").stat()
    assert (status.st_size, status.st_mode & 0o777) == (DATA_AT + 16 * PAGE, 0o600)
    assert status.st_blocks * 512 >= status.st_size, "a slot might be missing"


def test_store_that_ends_early_is_an_error(tmp_path: Path) -> None:
    fd = take(tmp_path / "store")
    os.ftruncate(fd, DATA_AT + 2 * PAGE)
    with pytest.raises(OSError, match="Input/output error"):
        SlotStore(fd, PAGE).reading(1, pages(0, 0))()
    os.close(fd)


def test_our_own_file_is_taken_again_and_nobody_elses(tmp_path: Path) -> None:
    os.close(take(tmp_path / "store"))
    os.close(take(tmp_path / "store"))
    foreign = tmp_path / "letters"
    foreign.write_text("dear diary")
    with pytest.raises(BackingError, match="none of ours"):
        take(foreign)
    assert foreign.read_text() == "dear diary"
    os.close(take(foreign, force=True))
    assert foreign.read_bytes().startswith(LABEL)


def test_a_second_user_is_refused(tmp_path: Path) -> None:
    fd = take(tmp_path / "store")
    with pytest.raises(BackingError, match="another process"):
        take(tmp_path / "store", force=True)
    os.close(fd)


def test_what_cannot_be_a_store_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    for path, why in (
        (tmp_path, "neither a file nor"),
        (Path("/dev/null"), "neither a file nor"),
        (tmp_path / "no/where", "cannot be opened"),
        (MOUNT / "swap", "in the mount itself"),
    ):
        with pytest.raises(BackingError, match=why):
            take(path)
    link = tmp_path / "link"
    link.symlink_to(MOUNT / "swap")
    with pytest.raises(BackingError, match="in the mount itself"):
        take(link)
    with pytest.raises(BackingError, match="no room"):
        take(tmp_path / "huge", slots=1 << 40)
    assert not (tmp_path / "huge").exists()


def test_refusal_leaves_a_dangling_link_and_makes_nothing(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "target")
    with pytest.raises(BackingError, match="no room"):
        take(link, slots=1 << 40)
    assert link.is_symlink()
    assert not (tmp_path / "target").exists()
    os.close(take(link))
    assert (tmp_path / "target").stat().st_size == DATA_AT + 16 * PAGE


@pytest.fixture
def memory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


def test_what_lies_in_memory_is_refused_unless_forced(memory: Path) -> None:
    with pytest.raises(BackingError, match=r"is in memory \(tmpfs\)"):
        take(memory / "store")
    assert not (memory / "store").exists()
    with contextlib.suppress(BackingError):  # before Linux 6.6 it has no direct I/O either
        os.close(take(memory / "store", force=True))


def test_text_of_the_label_is_found_by_no_probe_and_slots_lie_behind_all_signatures(
    tmp_path: Path,
) -> None:
    os.close(take(tmp_path / "store"))
    found = subprocess.run(
        ["blkid", "-p", str(tmp_path / "store")],
        env={"PATH": "/usr/sbin:/sbin:/usr/bin:/bin"},  # a user's PATH may lack /usr/sbin
        check=False,
        capture_output=True,
    )
    assert found.returncode == 2, found.stdout


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Path]:
    image = tmp_path / "image"
    image.write_bytes(bytes(DATA_AT + 64 * PAGE))
    device = subprocess.run(
        ["losetup", "--find", "--show", str(image)], check=True, capture_output=True, text=True
    ).stdout
    yield Path(device.strip())
    subprocess.run(["losetup", "-d", device.strip()], check=True)


@requires_loop()
def test_block_device(loop: Path, tmp_path: Path) -> None:
    fd = take(loop, 64)
    store = SlotStore(fd, PAGE)
    store.writing(63, pages(5))()
    out = pages(0)
    store.reading(63, out)()
    assert bytes(out[0]) == b"\x05" * PAGE
    with pytest.raises(BackingError, match="cannot be opened"):
        take(loop, 64)
    os.close(fd)
    os.close(take(loop, 64))  # ours
    with pytest.raises(BackingError, match="the swap files need"):
        take(loop, 65)
    with pytest.raises(BackingError, match="in use by /dev/loop"):
        take(tmp_path / "image", 64, force=True)
    with pytest.raises(BackingError, match="lies on our own file"):
        open_store(loop, 64, PAGE, mountpoint=tmp_path)


@pytest.fixture
def disk(loop: Path, tmp_path: Path) -> Iterator[Path]:
    """A file system on a loop device on `tmp_path`."""
    subprocess.run(
        ["mkfs.ext4", "-q", "-O", "^has_journal", str(loop)], check=True, capture_output=True
    )
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", str(loop), str(place)], check=True)
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@requires_loop()
def test_file_on_a_file_system_on_our_own_file_is_refused(disk: Path, tmp_path: Path) -> None:
    with pytest.raises(BackingError, match="lies on our own file"):
        open_store(disk / "store", 4, PAGE, mountpoint=tmp_path / "image")
    assert not (disk / "store").exists()
    os.close(take(disk / "store", 4))


@requires_loop()
def test_file_that_does_not_fit_is_left_as_it_was_and_so_is_its_file_system(disk: Path) -> None:
    os.close(take(disk / "store", 4))

    def seen() -> tuple[int, int, int]:
        status = (disk / "store").stat()
        return status.st_size, status.st_blocks, os.statvfs(disk).f_bfree

    before = seen()
    for slots in (1 << 9, 1 << 40):
        with pytest.raises(BackingError, match="no room"):
            take(disk / "store", slots)
        assert seen() == before


@requires_loop()
def test_loop_device_of_a_file_with_any_name_is_nobodys_business(tmp_path: Path) -> None:
    image = Path(os.fsdecode(os.fsencode(tmp_path) + b"/ima\xffge"))
    image.write_bytes(bytes(1 << 20))
    device = subprocess.run(
        ["losetup", "--find", "--show", str(image)], check=True, capture_output=True
    ).stdout.strip()
    try:
        os.close(take(tmp_path / "store"))
        os.close(take(Path(os.fsdecode(device)), 0))
    finally:
        subprocess.run(["losetup", "-d", device], check=True)


@requires_loop()
def test_device_that_nobody_can_look_into_is_refused_unless_forced(
    loop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(BackingError, match="blkid cannot be asked") as caught:
        take(loop, 64)
    assert "util-linux" in (caught.value.hint or "")
    os.close(take(loop, 64, force=True))


@requires_loop()
def test_device_with_a_signature_is_refused_unless_forced(loop: Path) -> None:
    subprocess.run(["mkswap", str(loop)], check=True, capture_output=True)
    with pytest.raises(BackingError, match="carries a signature: swap"):
        take(loop, 64)
    os.close(take(loop, 64, force=True))
    subprocess.run(["mkfs.ext4", "-q", str(loop)], check=True, capture_output=True)
    with pytest.raises(BackingError, match="carries a signature: ext4"):
        take(loop, 64)


def reference(key: bytes, slot: int, page: memoryview) -> bytes:
    """What another AES-XTS makes of a page."""
    return (
        ciphers.Cipher(algorithms.AES(key), modes.XTS(slot.to_bytes(16, "little")))
        .encryptor()
        .update(bytes(page))
    )


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    made = take(tmp_path / "store", 1536)
    yield made
    os.close(made)


@pytest.mark.parametrize("count", [1, 5, 256])
def test_slots_hold_what_another_aes_xts_makes_of_pages(fd: int, count: int) -> None:
    key, first = os.urandom(KEY_BYTES), 251
    store = SlotStore(fd, PAGE, Cipher(key, [make_buffers(count * PAGE, PAGE)]))
    secret = pages(*(slot % 251 for slot in range(count)))
    before = [bytes(page) for page in secret]
    store.writing(first, secret)()
    assert secret == before, "readers get them from here meanwhile"
    held, (out,) = pages(*[0] * count), pages(0)
    SlotStore(fd, PAGE).reading(first, held)()
    for slot, page in enumerate(secret):
        assert held[slot] == reference(key, first + slot, page)
        store.reading(first + slot, [out])()
        assert out == page, "each by itself"
    store.reading(first, held)()
    assert held == secret


def test_large_slot_numbers_are_tweaks_too(fd: int) -> None:
    key, slot = os.urandom(KEY_BYTES), 0x0102_0304_0506_0708
    cipher = Cipher(key, [make_buffers(PAGE, PAGE)])
    (page,), (held,) = pages(77), pages(0)
    Job(fd, writes=True, offset=DATA_AT, pages=[page], slot=slot, cipher=cipher)()
    SlotStore(fd, PAGE).reading(0, [held])()
    assert held == reference(key, slot, page)


@pytest.mark.parametrize("key", [bytes(KEY_BYTES), b"short", bytes(range(32))])
def test_key_that_is_none_is_refused(key: bytes) -> None:
    with pytest.raises(ValueError, match="the key must be 64 bytes"):
        Cipher(key, [make_buffers(PAGE, PAGE)])


def test_requests_that_make_no_sense_are_refused(fd: int) -> None:
    cipher = Cipher(os.urandom(KEY_BYTES), [make_buffers(4 * PAGE, PAGE), make_buffers(PAGE, PAGE)])
    page, other = pages(1, 2)
    for some, what in (
        ([page, other], "the cipher has no room for"),
        ([page, other[: PAGE // 2]], "of one length"),
        ([page[:15]], "of one length"),
        ([], "a request has"),
        ([page] * 1025, "a request has"),
    ):
        with pytest.raises(ValueError, match=what):
            Job(fd, writes=True, offset=0, pages=some, cipher=cipher)
    with pytest.raises(BufferError):
        Job(fd, writes=False, offset=0, pages=[memoryview(bytes(PAGE))])
    with pytest.raises(TypeError):
        Job(fd, writes=False, offset=0, pages=[page], cipher=page)  # type: ignore[arg-type]


# Threads.


class Threads:
    """A queue, threads that do what is in it, and what became of it."""

    def __init__(self, count: int, *, spin_ns: int = 0) -> None:
        self.queue = Queue()
        self.queue.spin_ns = spin_ns
        self.codes: list[int] = []
        for _ in range(count):
            threading.Thread(target=self.queue.work, daemon=True).start()

    def wait(self, count: int) -> None:
        """Wait until `count` requests have ended."""
        while len(self.codes) < count:
            assert is_readable(self.queue.fd, 10), (
                "the queue does not tell that the request has ended"
            )
            for done, code in self.queue.ended():
                done(code)


def test_threads_do_requests_and_say_what_became_of_them(fd: int) -> None:
    threads, store = Threads(3), SlotStore(fd, PAGE)
    written, out = pages(*range(1, 41)), pages(*[0] * 40)
    for requests in (
        [store.writing(number, [page]) for number, page in enumerate(written)],
        [store.reading(number, [page]) for number, page in enumerate(out)],
    ):
        threads.codes.clear()
        for request in requests:
            threads.queue.submit(request, threads.codes.append)
        threads.wait(len(requests))
        assert threads.codes == [0] * 40
    assert out == written
    assert threads.queue.ended() == []
    assert not is_readable(threads.queue.fd, 0), "nothing more is to be heard"
    threads.codes.clear()
    threads.queue.submit(store.reading(2000, out[:1]), threads.codes.append)
    threads.queue.submit(SlotStore(-1, PAGE).reading(0, out[1:2]), threads.codes.append)
    threads.wait(2)
    assert sorted(threads.codes) == [errno.EIO, errno.EBADF]


@pytest.mark.parametrize("count", [1, 2, 8])
@pytest.mark.slow
def test_threads_that_wait_busily_leave_nothing_undone(fd: int, count: int) -> None:
    threads, store, rng = Threads(count, spin_ns=200_000), SlotStore(fd, PAGE), random.Random(count)
    some = pages(*range(1, 5))
    for number, page in enumerate(some):
        store.writing(number, [page])()
    out = [make_buffers(PAGE, PAGE) for _ in range(4)]
    for _ in range(3000):
        threads.codes.clear()
        numbers = rng.sample(range(4), rng.randrange(1, 5))
        for number in numbers:
            threads.queue.submit(store.reading(number, [out[number]]), threads.codes.append)
            if rng.random() < 0.3:
                time.sleep(
                    rng.choice((0, 20e-6, 90e-6, 200e-6))
                )  # as the wait begins, in it, and as it ends
        threads.wait(len(numbers))
        assert not any(threads.codes)
        assert all(out[number] == some[number] for number in numbers)


@pytest.mark.slow
def test_nobody_waits_busily_who_is_not_told_to(fd: int) -> None:
    store = SlotStore(fd, PAGE)
    (page,) = pages(1)
    store.writing(0, [page])()

    def used(spin_ns: int, tries: int) -> float:
        begin = time.process_time()
        while tries and time.process_time() - begin < 0.03:
            threads = Threads(1, spin_ns=spin_ns)  # no other task has delayed them yet
            threads.queue.submit(store.reading(0, [page]), threads.codes.append)
            threads.wait(1)
            time.sleep(0.06)
            tries -= 1
        return time.process_time() - begin

    assert used(0, 10) < 0.02
    assert used(50_000_000, 100) > 0.03, "nobody waits at all, or never undisturbed"


def test_request_is_done_once(fd: int) -> None:
    queue = Queue()
    (page,) = pages(1)
    request = SlotStore(fd, PAGE).writing(0, [page])
    queue.submit(request, print)
    with pytest.raises(ValueError, match="in a queue already"):
        queue.submit(request, print)


def test_threads_encrypt_at_the_same_time_without_hurting_each_other(fd: int) -> None:
    """More threads than there are lanes: some wait."""
    threads = Threads(4)
    store = SlotStore(
        fd, PAGE, Cipher(os.urandom(KEY_BYTES), [make_buffers(256 * PAGE, PAGE) for _ in range(3)])
    )
    secret = [pages(*((run + place) % 256 for place in range(256))) for run in range(6)]
    out = [pages(*[0] * 256) for _ in secret]
    for turn in range(1, 11):
        threads.codes.clear()
        for run, some in enumerate(secret):
            threads.queue.submit(store.writing(256 * run, some), threads.codes.append)
        threads.wait(6)
        for run, some in enumerate(out):
            threads.queue.submit(store.reading(256 * run, some), threads.codes.append)
        threads.wait(12)
        assert out == secret, turn
