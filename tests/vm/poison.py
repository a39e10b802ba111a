# SPDX-License-Identifier: GPL-2.0-or-later
"""A program for the guest: it stores pages, poisons the daemon's memory, and reads the pages back.

    python3 poison.py write PATH PAGES    store pages through a file of the daemon
    python3 poison.py read PATH PAGES     read them; count right, refused, zero and wrong ones
    python3 poison.py poison PID PLACE    poison a page of the worker's memory (MADV_HWPOISON)
    python3 poison.py core LIB PLACE      do all three with a core of its own, no daemon;
                                          LIB holds the packages

PLACE is a page of the arena (first, middle, body, free, table, superblock) or of the shared state
(marks, buffer). The output is JSON.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import random
import signal
import struct
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

PAGE = 4096
MADV_HWPOISON = 100
USED, USED_TAIL, FREE, STATE = 3, 4, 1, 7


def page(number: int) -> bytes:
    """Return a page by its number: one in five does not compress."""
    if number % 5 == 0:
        return random.Random(number).randbytes(PAGE)
    return (
        b"%d-" % number * 300
        + random.Random(number).randbytes(1500 + number % 7 * 150)
        + bytes(PAGE)
    )[:PAGE]


def write(path: str, pages: int) -> dict[str, int]:
    fd = os.open(path, os.O_RDWR)
    for number in range(pages):
        os.pwrite(fd, page(number), number * PAGE)
    os.close(fd)
    return {"written": pages}


def read(path: str, pages: int) -> dict[str, int]:
    found = dict.fromkeys(("right", "refused", "zeros", "wrong"), 0)
    fd = os.open(path, os.O_RDONLY)
    for number in range(pages):
        try:
            data = os.pread(fd, PAGE, number * PAGE)
        except OSError:
            found["refused"] += 1
            continue
        found["right" if data == page(number) else "zeros" if data == bytes(PAGE) else "wrong"] += 1
    os.close(fd)
    return found


def open_file(pid: int, magic: bytes) -> int:
    """Open a file of a process by how it begins."""
    for entry in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{entry}"
        target = os.readlink(path)
        if target.endswith(" (deleted)") or target.startswith("/memfd:"):
            fd = os.open(path, os.O_RDWR)
            if os.pread(fd, len(magic), 0) == magic:
                return fd
            os.close(fd)
    raise SystemExit(f"process {pid} has no file that begins with {magic!r}")


def find_frame(memory: mmap.mmap, place: str) -> int:
    """Return the offset of a page of the arena that is what `place` says."""
    _magic, _version, _size, frames, first_frame, _kind, _label = struct.unpack_from(
        "=8sIIQIHH", memory
    )
    words = memoryview(memory)[PAGE : PAGE + 16 * frames].cast("I")
    body = {page(number)[:64] for number in range(0, 2000, 5)}
    for frame in range(first_frame, frames):
        state, count = words[4 * frame] & STATE, words[4 * frame + 1] & 255
        if place == "free" and state == FREE:
            return frame * PAGE
        if state != USED:
            continue
        if place == "table":
            return (PAGE + 16 * frame) // PAGE * PAGE
        if (place == "first" and count >= 2) or (
            place == "body" and bytes(memory[frame * PAGE : frame * PAGE + 64]) in body
        ):
            return frame * PAGE
        if place == "middle" and count >= 3:
            return (frame + 1) * PAGE
    raise SystemExit(f"there is no frame that is {place}")


def poison(pid: int, place: str) -> dict[str, int]:
    in_state = place in ("marks", "buffer")
    fd = open_file(pid, b"zswapd\0H" if in_state else b"zswapd\0A")
    memory = mmap.mmap(fd, os.fstat(fd).st_size)
    if in_state:
        _magic, _version, _page, hook_at, lost_at, _end = struct.unpack_from("=8sIIQQQ", memory)
        offset = lost_at // PAGE * PAGE if place == "marks" else hook_at + 2 * PAGE
    else:
        offset = 0 if place == "superblock" else find_frame(memory, place)
    damage(memory, offset)
    return {"offset": offset}


def damage(memory: mmap.mmap, offset: int) -> None:
    """Have the kernel take a page of a mapping for damaged: in another process,
    which newer kernels end by SIGBUS for it.
    """

    def inject() -> dict[str, int]:
        memory[offset]  # mapped, or there is nothing to be damaged
        libc = ctypes.CDLL(None, use_errno=True)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory, offset))
        code = libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(PAGE), MADV_HWPOISON)
        return {"errno": ctypes.get_errno() if code else 0}

    seen = in_child(inject)
    if seen not in ({"errno": 0}, {"signal": int(signal.SIGBUS)}):
        raise SystemExit(f"MADV_HWPOISON: {seen}")


def in_child(work: Callable[[], dict[str, int]]) -> dict[str, int]:
    """Do some work in another process; return what it returned, or the signal that has ended it."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if not pid:
        os.write(theirs, json.dumps(work()).encode())
        os._exit(0)
    os.close(theirs)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with os.fdopen(ours, "rb") as answer:
        text = answer.read()
    return json.loads(text) if not code else {"signal": -code}


def core(library: str, place: str) -> dict[str, object]:
    """Store pages, damage one page of memory; say how a process ends
    that touches it, and what two successors find.
    """
    sys.path.insert(0, library)
    from zswapd.config import load
    from zswapd.core import compress
    from zswapd.core.core import Core, Inherited
    from zswapd.errors import ZswapdError

    given = {"swap.size": "8M", "memory.reserve": "4M", "cache.limit": ""}
    config = load(
        codecs=compress.names(),
        assignments=[(name, value, "test") for name, value in given.items()],
    )
    first = Core(config)
    for number in range(1000):
        if first.devices["swap"].write(number * PAGE, memoryview(page(number))) is not None:
            raise SystemExit("a page was refused")
    memory = first.arena._map
    offset = 0 if place == "superblock" else find_frame(memory, place)
    description = first.arena.description()
    damage(memory, offset)

    def touch() -> dict[str, int]:
        return {"byte": memory[offset]}

    def take_over() -> dict[str, int]:
        then = Core(config, inherited=Inherited(first.arena.fd, arena_copy=description))
        then.check()
        found = dict.fromkeys(("right", "refused", "zeros", "wrong"), 0)
        out = memoryview(bytearray(PAGE))
        for number in range(1000):
            try:
                then.devices["swap"].read_into(number * PAGE, out)
            except ZswapdError:
                found["refused"] += 1
                continue
            found[
                "right" if out == page(number) else "zeros" if out == bytes(PAGE) else "wrong"
            ] += 1
        for number in range(1000):
            if then.devices["swap"].write(number * PAGE, memoryview(page(number))) is not None:
                found["wrong"] += 1000
        return {**found, "poisoned": then.statistics().recovery.poisoned}

    return {
        "touched": in_child(touch),
        "successor": in_child(take_over),
        "next": in_child(take_over),
    }


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    jobs = {
        "write": lambda: write(rest[0], int(rest[1])),
        "read": lambda: read(rest[0], int(rest[1])),
        "poison": lambda: poison(int(rest[0]), rest[1]),
        "core": lambda: core(rest[0], rest[1]),
    }
    print(json.dumps(jobs[what]()))
