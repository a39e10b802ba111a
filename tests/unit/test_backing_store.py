# SPDX-License-Identifier: GPL-2.0-or-later
"""The backing store on real files and a loop device: what is refused, and that slots keep what they are given."""

from __future__ import annotations

import mmap
import os
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from tests.support.capabilities import requires_loop
from tests.support.disk import Disk
from zswapd.backing import cipher
from zswapd.backing._xts import context, transform
from zswapd.backing.cipher import KEY_BYTES, EncryptedStore
from zswapd.backing.store import DATA_AT, LABEL, SlotStore, open_store
from zswapd.backing.transfers import make_buffers
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
    store.write(0, pages(1, 2, 3))
    store.write(15, pages(9))
    store.write(1, pages(7))
    out = pages(0, 0, 0)
    store.read(0, out)
    assert [bytes(page) for page in out] == [bytes([byte]) * PAGE for byte in (1, 7, 3)]
    store.read(15, out[:1])
    assert bytes(out[0]) == b"\x09" * PAGE
    os.close(fd)
    status = (tmp_path / "store").stat()
    assert (status.st_size, status.st_mode & 0o777) == (DATA_AT + 16 * PAGE, 0o600)
    assert status.st_blocks * 512 >= status.st_size, "a slot might be missing"


def test_store_that_ends_early_is_an_error(tmp_path: Path) -> None:
    fd = take(tmp_path / "store")
    os.ftruncate(fd, DATA_AT + 2 * PAGE)
    with pytest.raises(OSError, match="ends before"):
        SlotStore(fd, PAGE).read(1, pages(0, 0))
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


def test_text_of_the_label_is_found_by_no_probe_and_slots_lie_behind_all_signatures(tmp_path: Path) -> None:
    os.close(take(tmp_path / "store"))
    found = subprocess.run(["blkid", "-p", str(tmp_path / "store")], check=False, capture_output=True)
    assert found.returncode == 2, found.stdout


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Path]:
    image = tmp_path / "image"
    image.write_bytes(bytes(DATA_AT + 64 * PAGE))
    device = subprocess.run(["losetup", "--find", "--show", str(image)], check=True, capture_output=True, text=True).stdout
    yield Path(device.strip())
    subprocess.run(["losetup", "-d", device.strip()], check=True)


@requires_loop()
def test_block_device(loop: Path, tmp_path: Path) -> None:
    fd = take(loop, 64)
    store = SlotStore(fd, PAGE)
    store.write(63, pages(5))
    out = pages(0)
    store.read(63, out)
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
    return Cipher(algorithms.AES(key), modes.XTS(slot.to_bytes(16, "little"))).encryptor().update(bytes(page))


@pytest.mark.parametrize("count", [1, 4, 5, 256])
def test_slots_hold_what_another_aes_xts_makes_of_pages(count: int) -> None:
    key, first = os.urandom(KEY_BYTES), 251
    disk = Disk(PAGE, first + count)
    store = EncryptedStore(disk, key, [make_buffers(count * PAGE, PAGE)])
    pages = [memoryview(bytearray(b"secret__" * 512)) for _ in range(count)]
    store.write(first, pages)
    assert all(page == b"secret__" * 512 for page in pages), "readers get them from here meanwhile"
    out = memoryview(bytearray(PAGE))
    for slot in range(first, first + count):
        assert disk.slots[slot] == reference(key, slot, pages[0])
        store.read(slot, [out])
        assert out == pages[0], "each by itself"


def test_large_slot_numbers_are_tweaks_too() -> None:
    key, slot = os.urandom(KEY_BYTES), 0x0102_0304_0506_0708
    page, out = memoryview(os.urandom(PAGE)), memoryview(bytearray(PAGE))
    transform(context(key, True), slot, [page], out)
    assert out == reference(key, slot, page)


def test_threads_that_encrypt_at_the_same_time_share_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    meeting = threading.Barrier(3, timeout=10)
    met: list[tuple[int, object]] = []

    def transform_together(one: object, *args: memoryview) -> None:
        met.append((id(one), args[2].obj))
        meeting.wait()
        transform(one, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(cipher, "transform", transform_together)
    disk = Disk(PAGE, 12)
    store = EncryptedStore(disk, os.urandom(KEY_BYTES), [make_buffers(PAGE, PAGE) for _ in range(3)])
    kept = [memoryview(bytearray(bytes([slot]) * PAGE)) for slot in range(12)]
    with ThreadPoolExecutor(6) as pool:  # more than there are lanes: some wait
        list(pool.map(lambda slot: store.write(slot, [kept[slot]]), range(12)))
    assert len(met) == 12
    assert len({one for one, _ in met}) == len({id(memory) for _, memory in met}) == 3
    monkeypatch.undo()
    out = [memoryview(bytearray(PAGE)) for _ in kept]
    store.read(0, out)
    assert out == kept


@pytest.mark.parametrize("key", [bytes(KEY_BYTES), b"short", os.urandom(32)])
def test_key_that_is_none_is_refused(key: bytes) -> None:
    with pytest.raises(ValueError, match="the key must be 64 bytes"):
        EncryptedStore(Disk(PAGE, 1), key, [make_buffers(PAGE, PAGE)])


def test_pages_that_do_not_fit_are_refused() -> None:
    one = context(os.urandom(KEY_BYTES), True)
    page, short = memoryview(bytearray(PAGE)), memoryview(bytearray(PAGE - 1))
    with pytest.raises(ValueError, match="no room"):
        transform(one, 0, [page, page], page)
    with pytest.raises(ValueError, match="of one length"):
        transform(one, 0, [page, short])
    with pytest.raises(ValueError, match="of one length"):
        transform(one, 0, [page[:15]])
    with pytest.raises(BufferError):
        transform(one, 0, [memoryview(bytes(PAGE))])
