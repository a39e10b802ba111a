# SPDX-License-Identifier: GPL-2.0-or-later
"""A process that reads its swapped-out pages through /proc/self/mem.

Where another program would get SIGBUS, this one gets an error for the page, and goes on. The pages
are different random bytes. So each is uncompressed in the pool, and a test finds it by its bytes.
The process writes and swaps them out in their order, so neighbours in memory are neighbours on the
swap device.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import random
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tools.bench.harness.cgroup import MemoryCgroup

PAGE = 4096
LIMIT_S = 50
_PAGEOUT = 21
_NOHUGEPAGE = 15
_PAGEMAP_SWAPPED = 1 << 62


def content(number: int) -> bytes:
    """Return the contents of page `number`."""
    return random.Random(number).randbytes(PAGE)


class Swapped:
    """A process whose pages are swapped out and read.

    Args:
        cgroup: the cgroup to join, with room for its pages.
        pages: the number of its pages.
    """

    def __init__(self, cgroup: MemoryCgroup, pages: int) -> None:
        self._cgroup = cgroup
        self._pages = pages
        command = [
            sys.executable,
            "-P",
            "-m",
            "tests.support.swapped",
            str(pages),
            str(cgroup.path / "cgroup.procs"),
        ]
        top = str(Path(__file__).resolve().parents[2])
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=top,
            env={**os.environ, "PYTHONPATH": top},
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.communicate(timeout=LIMIT_S)

    def _ask(self, **question: object) -> Any:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def swap_out(self) -> list[int]:
        """Swap all pages out; return the slot of each."""
        slots: list[int] = []
        end = time.monotonic() + LIMIT_S
        while not slots or -1 in slots:
            assert time.monotonic() < end, f"{slots.count(-1)} pages are not swapped out"
            slots = self._ask(do="out")
        # Written pages stay in the swap cache until the kernel needs their memory.
        for _ in range(3):
            for name, value in (
                ("memory.force_empty", "0"),
                ("memory.reclaim", str(self._pages * PAGE)),
            ):
                with contextlib.suppress(OSError):
                    (self._cgroup.path / name).write_text(value)
            time.sleep(0.05)
        return slots

    def read(self, numbers: list[int] | range) -> list[int]:
        """Read pages in turn; return those that cannot be read. Wrong bytes fail the test."""
        answer = self._ask(do="read", numbers=list(numbers))
        assert answer["wrong"] == []
        failed: list[int] = answer["failed"]
        return failed


def _main(pages: int, procs: str) -> None:
    Path(procs).write_text(str(os.getpid()))
    libc = ctypes.CDLL(None, use_errno=True)
    memory = mmap.mmap(-1, pages * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(_NOHUGEPAGE)
    for number in range(pages):
        memory[number * PAGE : (number + 1) * PAGE] = content(number)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    entries = os.open("/proc/self/pagemap", os.O_RDONLY)
    own = os.open("/proc/self/mem", os.O_RDONLY)
    for line in sys.stdin:
        question = json.loads(line)
        if question["do"] == "out":
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(pages * PAGE), _PAGEOUT)
            time.sleep(0.1)
            found = struct.unpack(f"{pages}Q", os.pread(entries, 8 * pages, start // PAGE * 8))
            answer: Any = [
                (entry & ((1 << 55) - 1)) >> 5 if entry & _PAGEMAP_SWAPPED else -1
                for entry in found
            ]
        else:
            answer = {"failed": [], "wrong": []}
            for number in question["numbers"]:
                try:
                    got = os.pread(own, PAGE, start + number * PAGE)
                except OSError:
                    answer["failed"].append(number)
                else:
                    if got != content(number):
                        answer["wrong"].append(number)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _main(int(sys.argv[1]), sys.argv[2])
