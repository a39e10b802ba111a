# SPDX-License-Identifier: GPL-2.0-or-later
"""A core and its successor on the same arena: settings, pages, and checks after a takeover."""

from __future__ import annotations

from pathlib import Path

from tests.support.strategies import KINDS, page
from zswapd.config import Config, load
from zswapd.core import compress
from zswapd.core.core import Core, Inherited
from zswapd.core.sizing import lost_bitmap_bytes


def make_config(*settings: str, page_size: int = 4096, root: Path = Path("/")) -> Config:
    """Return settings for a small core.

    The default is one swap file of 1024 pages with a reserve of a quarter.
    """
    given = [f"swap.size={1024 * page_size}", f"memory.reserve={256 * page_size}", *settings]
    assignments = [(*setting.split("=", 1), "--set") for setting in given]
    return load(codecs=compress.names(), assignments=assignments, root=root, page_size=page_size)  # type: ignore[arg-type]


def shared_lost(config: Config) -> dict[str, memoryview]:
    """Return bitmaps of lost pages that outlive a core."""
    return {
        name: memoryview(bytearray(length)) for name, length in lost_bitmap_bytes(config).items()
    }


def succeed(core: Core, config: Config, lost: dict[str, memoryview] | None = None) -> Core:
    """Return the core that takes over; the old one must not be used again."""
    successor = Core(config, inherited=Inherited(core.arena.fd, lost or {}))
    core.close()
    return successor


def fill(core: Core, pages: int, *, device: str = "swap", seed: int = 0) -> dict[int, bytes]:
    """Write pages of all kinds from the device's beginning on; return them by number."""
    target = core.devices[device]
    size = core.frames.page_size
    written = {}
    for number in range(pages):
        written[number] = page(KINDS[(number + seed) % len(KINDS)], number + seed, size)
        assert target.write(number * size, memoryview(written[number])) is None
        if core.frames.wants_refill():
            core.frames.refill_now()
    return written


def read(core: Core, number: int, device: str = "swap") -> bytes:
    """Return a page as its reader gets it."""
    size = core.frames.page_size
    out = bytearray(size)
    core.devices[device].read_into(number * size, memoryview(out))
    return bytes(out)


def check_books(core: Core) -> None:
    """Prove every invariant, that zsmalloc has every used frame, and that the arena leaks none."""
    core.check()
    size, seen = core.frames.page_size, core.statistics()
    backed = seen.frames.used_frames + seen.frames.free_frames
    table = core.frames.first_frame
    assert backed * size <= seen.arena_backed_bytes <= (backed + table) * size, (
        "memory that is on no book"
    )


def check_all(core: Core, expected: dict[int, bytes], device: str = "swap") -> None:
    """Prove every invariant, and that a device holds these pages and zeros."""
    check_books(core)
    size = core.frames.page_size
    for number in range(core.devices[device].size // size):
        assert read(core, number, device) == expected.get(number, bytes(size)), f"page {number}"
