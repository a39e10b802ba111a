# SPDX-License-Identifier: GPL-2.0-or-later
"""Programs and libraries are read into memory.

If they may be in the swap that this daemon serves, only their resident pages are used.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from tests.support.successor import make_config
from zswapd import system
from zswapd.supervisor import supervisor
from zswapd.system import code
from zswapd.worker import prepare

PAGE = mmap.PAGESIZE
MAPS = f"""\
10000-{0x10000 + 4 * PAGE:x} r-xp 00001000 fe:00 11 /usr/bin/python3.11
{0x10000 + 4 * PAGE:x}-{0x10000 + 5 * PAGE:x} rw-p 00003000 fe:00 11 /usr/bin/python3.11
90000-{0x90000 + 2 * PAGE:x} r--p 00000000 00:19 12 /usr/lib/lib c.so (deleted)
"""


class FakeLibc:
    """Pages in memory by address; the rest is wherever it is."""

    def __init__(self) -> None:
        self.there: set[int] = set()
        self.populated: list[tuple[int, int]] = []
        self.error = 0

    def mincore(self, address: ctypes.c_void_p, length: ctypes.c_size_t, pages: Any) -> int:
        start = address.value or 0
        for number in range(length.value // PAGE):
            # The other bits are reserved.
            pages[number] = bytes([0xFE | (start + number * PAGE in self.there)])
        return self.error

    def madvise(self, address: ctypes.c_void_p, length: ctypes.c_size_t, advice: int) -> int:
        assert advice == 22
        self.populated.append((address.value or 0, length.value // PAGE))
        return 0


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "proc/self/map_files").mkdir(parents=True)
    (tmp_path / "proc/self/maps").write_text(MAPS)
    return tmp_path


def test_populate_waits_for_nothing(root: Path) -> None:
    libc = FakeLibc()
    libc.there = {0x10000, 0x10000 + PAGE, 0x10000 + 3 * PAGE, 0x90000}
    assert not code.populate(libc, root)  # type: ignore[arg-type]
    assert libc.populated == [(0x10000, 2), (0x10000 + 3 * PAGE, 1), (0x90000, 1)]
    libc.there |= {0x10000 + 2 * PAGE, 0x90000 + PAGE}
    assert code.populate(libc, root)  # type: ignore[arg-type]
    assert libc.populated[3:] == [(0x10000, 4), (0x90000, 2)]


def test_populate_where_the_kernel_does_not_say_populates_nothing(root: Path) -> None:
    libc = FakeLibc()
    libc.error = -1
    assert not code.populate(libc, root)  # type: ignore[arg-type]
    assert libc.populated == []


def test_populate_that_may_wait_populates_all(root: Path) -> None:
    libc = FakeLibc()
    assert code.populate(libc, root, waits=True)  # type: ignore[arg-type]
    assert libc.populated == [(0x10000, 4), (0x90000, 2)]


def test_read_reads_what_is_mapped_and_passes_over_what_it_may_not(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / f"proc/self/map_files/10000-{0x10000 + 4 * PAGE:x}").write_bytes(bytes(8 * PAGE))
    asked = []
    preadv = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda fd, buffers, at: asked.append(at) or preadv(fd, buffers, at)
    )
    code.read(root)
    assert asked == [0x1000]


LARGE = """
from zswapd.system import code
sizes = [item.end - item.start for item in code.mappings()]
assert sum(sizes) > 4 << 20, sizes
code.read()
print(code.populate())
"""


def test_code_that_was_read_is_resident() -> None:
    said = subprocess.run(
        [sys.executable, "-c", LARGE], check=True, capture_output=True, text=True
    ).stdout
    assert said == "True\n"


@pytest.mark.parametrize(
    ("is_new", "is_whole", "is_cold"),
    [(True, True, False), (False, True, False), (False, False, True)],
    ids=["new", "all in memory", "perhaps in swap"],
)
def test_supervisor_waits_for_code_only_if_there_is_nothing_to_serve(
    monkeypatch: pytest.MonkeyPatch, *, is_new: bool, is_whole: bool, is_cold: bool
) -> None:
    events: list[object] = []

    class FakeSupervisor:
        def __init__(self, *_: object, **options: object) -> None:
            events.append(options["is_cold"])

        def run(self) -> int:
            return 0

    found = types.SimpleNamespace(is_new=is_new, close=lambda: None)
    monkeypatch.setattr(supervisor.signal, "pthread_sigmask", lambda *_: None)
    monkeypatch.setattr(supervisor, "find_inherited", lambda: None)
    monkeypatch.setattr(supervisor, "choose", lambda *_: make_config())
    monkeypatch.setattr(
        supervisor, "find_resources", lambda *_: events.append("found") or (found, 4711)
    )
    monkeypatch.setattr(
        supervisor.system, "protect", lambda **options: events.append(options["populates_code"])
    )
    monkeypatch.setattr(
        supervisor.system, "populate_code", lambda *, waits: events.append(waits) or is_whole
    )
    monkeypatch.setattr(supervisor.system, "set_realtime", lambda: None)
    monkeypatch.setattr(supervisor, "Supervisor", FakeSupervisor)
    assert supervisor.run(make_config, lambda work: work()) == 0
    assert events == [False, "found", is_new, is_cold]


@pytest.mark.parametrize("is_cold", [False, True])
def test_worker_that_has_to_serve_first_populates_no_code(
    monkeypatch: pytest.MonkeyPatch, is_cold: bool
) -> None:
    seen: dict[str, Any] = {}

    def protect(**options: Any) -> tuple[()]:
        seen.update(options)
        return ()

    monkeypatch.setattr(system, "protect", protect)
    monkeypatch.setattr(system, "set_realtime", lambda: None)
    prepared = prepare.prepare(make_config("metrics.listen="), is_first=False, is_cold=is_cold)
    assert seen["populates_code"] is not is_cold
    assert prepared.is_cold is is_cold
