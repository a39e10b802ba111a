# SPDX-License-Identifier: GPL-2.0-or-later
"""Simulated memory errors: pages that no process may touch, and EHWPOISON.

A `Poison` stands for the kernel. It makes the poisoned pages of an arena's file inaccessible in
every new mapping, until a hole is punched there. A process that touches one gets SIGSEGV, where the
kernel sends SIGBUS. A process that reads the page in another way finds junk.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import traceback
from collections.abc import Callable

import pytest

from zswapd.core.allocators import arena as arena_module
from zswapd.core.allocators.arena import Arena
from zswapd.host.machine import EHWPOISON

_libc = ctypes.CDLL(None, use_errno=True)
_PROT_NONE, _PROT_ALL = 0, mmap.PROT_READ | mmap.PROT_WRITE


class Poison:
    """Poisoned pages of one arena's file.

    Args:
        patch: the fixture that undoes the simulation.

    Attributes:
        pages: the offsets of the poisoned pages.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.pages: set[int] = set()
        map_file, punch = Arena._map_file, Arena.punch

        def mapped(arena: Arena, *args: object) -> None:
            map_file(arena, *args)  # type: ignore[arg-type]
            for offset in self.pages:
                self._protect(arena, offset, _PROT_NONE)

        def punched(arena: Arena, offset: int, length: int) -> None:
            punch(arena, offset, length)
            for page in [page for page in self.pages if offset <= page < offset + length]:
                self._protect(arena, page, _PROT_ALL)
                self.pages.remove(page)

        patch.setattr(Arena, "_map_file", mapped)
        patch.setattr(Arena, "punch", punched)
        patch.setattr(arena_module, "_libc", self)
        self._arena: Arena | None = None

    def __getattr__(self, name: str) -> object:
        return getattr(_libc, name)

    def _protect(self, arena: Arena, offset: int, rights: int) -> None:
        assert (
            _libc.mprotect(
                ctypes.c_void_p(arena._address + offset), ctypes.c_size_t(mmap.PAGESIZE), rights
            )
            == 0
        )
        self._arena = arena

    def madvise(self, address: int, length: int, advice: int) -> int:
        """Call madvise(2); to populate a poisoned page fails with EHWPOISON, as in the kernel."""
        begin = address - self._arena._address if self._arena is not None else -1
        if advice == arena_module._MADV_POPULATE_READ and any(
            begin <= page < begin + length for page in self.pages
        ):
            ctypes.set_errno(EHWPOISON)
            return -1
        done: int = _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), advice)
        return done

    def strike(self, arena: Arena, offset: int) -> None:
        """Poison a page of an arena that no process uses."""
        start = offset - offset % mmap.PAGESIZE
        arena.view[start : start + mmap.PAGESIZE] = random.Random(offset).randbytes(mmap.PAGESIZE)
        self.pages.add(start)


def in_child(work: Callable[[], None]) -> None:
    """Run `work` in another process, which the touch of a poisoned page would end.

    Raises:
        AssertionError: the process failed.
    """
    pid = os.fork()
    if not pid:
        code = 1
        try:
            work()
            code = 0
        except BaseException:  # noqa: BLE001 - the exit code tells the parent
            traceback.print_exc()
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == 0, f"the other process ended with {code}"
