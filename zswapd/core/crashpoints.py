# SPDX-License-Identifier: GPL-2.0-or-later
"""Crash points: places in the core where a test can end the process, as SIGKILL does.

Each point is between two writes. Either a successor can distinguish the states before and after, or
a reader of the code might doubt that it need not. While no point is armed, `reach` costs one
compare (measured by tests/unit/core/test_crashpoints.py). So the points are in the code that users
run, and the tests kill the same code.

A test arms a point in the process that must die:

    crashpoints.arm("store_alive", 3)      dies at the third time from now on

A daemon is armed with ZSWAPD_CRASH=store_alive:3 in the environment of the process that calls
`arm_from_environment`. No other code reads this variable. ZSWAPD_CRASH=store_alive:3:hang hangs at
the point instead of dying (`HOW` lists all ways).

The points are constants, so that compiled code has numbers.
"""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

FRAMES_OFF_LIST: Final = 1
FRAMES_SPLIT: Final = 2
FRAMES_HEADED: Final = 3
FRAMES_UNSEALED: Final = 4
FRAMES_JOINED: Final = 5
ZSPAGE_TAKEN: Final = 6
ZSPAGE_CLEARED: Final = 7
ZSPAGE_SEALED: Final = 8
OBJECT_OFF_CHAIN: Final = 9
OBJECT_ALLOCATED: Final = 10
OBJECT_DEAD: Final = 11
OBJECT_FREED: Final = 12
ZSPAGE_EMPTY: Final = 13
STORE_BODY: Final = 14
STORE_BODY_WRITTEN: Final = 15
STORE_DATA: Final = 16
STORE_HEADER: Final = 17
STORE_CHECKED: Final = 18
STORE_ALIVE: Final = 19
STORE_INDEXED: Final = 20
STORE_REPLACED: Final = 21
STORE_STILL_LOST: Final = 22
FREE_HEADER: Final = 23
REFUSED_MARKED: Final = 24
REFUSED_FLUSHED: Final = 25
DISCARD_PAGE: Final = 26
DISCARD_STILL_LOST: Final = 27
COMPACT_COPIED: Final = 28
COMPACT_ALIVE: Final = 29
COMPACT_INDEXED: Final = 30
COMPACT_FREED: Final = 31
REFILL_TABLE: Final = 32
REFILL_POPULATED: Final = 33
JOB_COMMITTED: Final = 34
TRIM_TAKEN: Final = 35
TRIM_PUNCHED: Final = 36
TAKEOVER_RUN: Final = 37
TAKEOVER_FRAMES: Final = 38
TAKEOVER_ZSPAGE: Final = 39
TAKEOVER_ZSPAGES: Final = 40
TAKEOVER_PAGE: Final = 41
TAKEOVER_DUPLICATE: Final = 42
TAKEOVER_INDEXED: Final = 43
TAKEOVER_MARKED: Final = 44
TAKEOVER_DROPPED: Final = 45
SLOT_STALE: Final = 46
SPILL_MARKED: Final = 47
SPILL_CLEARED: Final = 48
SLOT_CLAIMED: Final = 49
SLOT_WRITTEN: Final = 50
SLOT_VALID: Final = 51
WRITEBACK_DROPPED: Final = 52
DISCARD_SLOTS: Final = 53
TAKEOVER_SLOT: Final = 54
PAGE_LOADED: Final = 55
TAKEOVER_REWRITTEN: Final = 56

POINTS: Final[dict[str, tuple[int, str]]] = {
    "frames_off_list": (
        FRAMES_OFF_LIST,
        "take: a free run is off its list; its new state is not yet written",
    ),
    "frames_split": (
        FRAMES_SPLIT,
        "take: the rest of the run is free again; the part taken still looks free",
    ),
    "frames_headed": (FRAMES_HEADED, 'take: the first frame says "used", the other frames do not'),
    "frames_unsealed": (FRAMES_UNSEALED, "put: the seal is removed, and nothing else has changed"),
    "frames_joined": (FRAMES_JOINED, "put: free neighbours are off their lists"),
    "zspage_taken": (ZSPAGE_TAKEN, "a zspage has frames with the bytes of an earlier owner"),
    "zspage_cleared": (ZSPAGE_CLEARED, "all live words of the new zspage are DEAD"),
    "zspage_sealed": (ZSPAGE_SEALED, "the new zspage is sealed and has no live object"),
    "object_off_chain": (
        OBJECT_OFF_CHAIN,
        "alloc: the object is off the free list and not yet counted",
    ),
    "object_allocated": (OBJECT_ALLOCATED, "alloc: the object is counted"),
    "object_dead": (OBJECT_DEAD, "free: the live word is DEAD, and nothing else has changed"),
    "object_freed": (OBJECT_FREED, "free: the object is on the free list"),
    "zspage_empty": (
        ZSPAGE_EMPTY,
        "free: the last object is freed with its zspage, which is still sealed",
    ),
    "store_body": (STORE_BODY, "a raw page has a frame but no header"),
    "store_body_written": (STORE_BODY_WRITTEN, "the frame of a raw page has the page"),
    "store_data": (STORE_DATA, "the data is written behind the place of the header"),
    "store_header": (STORE_HEADER, "header and data are written, the live word is not"),
    "store_checked": (STORE_CHECKED, "the checksum is computed but not written"),
    "store_alive": (STORE_ALIVE, "the object is live; the index does not have it"),
    "store_indexed": (STORE_INDEXED, "the index has the object; the older copy still exists"),
    "store_replaced": (STORE_REPLACED, "the older copy is freed"),
    "store_still_lost": (STORE_STILL_LOST, "a lost page is stored again and still marked as lost"),
    "free_header": (FREE_HEADER, "a raw page's header is freed, its body is not"),
    "refused_marked": (
        REFUSED_MARKED,
        "a refused overwrite: the page is marked as lost; its older copy still exists",
    ),
    "refused_flushed": (REFUSED_FLUSHED, "a refused overwrite: the older copy is freed"),
    "discard_page": (DISCARD_PAGE, "one page of a discarded range is freed"),
    "discard_still_lost": (
        DISCARD_STILL_LOST,
        "a discarded range is freed; its lost pages are still marked",
    ),
    "compact_copied": (COMPACT_COPIED, "an object is copied except for its live word"),
    "compact_alive": (COMPACT_ALIVE, "both copies are live"),
    "compact_indexed": (COMPACT_INDEXED, "the index has the new copy"),
    "compact_freed": (COMPACT_FREED, "the old copy is freed"),
    "refill_table": (REFILL_TABLE, "a refill has populated the table for its frames"),
    "refill_populated": (REFILL_POPULATED, "a run is populated and not yet counted"),
    "job_committed": (JOB_COMMITTED, "one run of a job is counted"),
    "trim_taken": (TRIM_TAKEN, "a run for a trim is off its list"),
    "trim_punched": (TRIM_PUNCHED, "runs have lost their memory; the table does not say so"),
    "takeover_run": (TAKEOVER_RUN, "a stretch of frames has been rebuilt"),
    "takeover_frames": (TAKEOVER_FRAMES, "all frames have been rebuilt"),
    "takeover_zspage": (TAKEOVER_ZSPAGE, "a zspage has been rebuilt"),
    "takeover_zspages": (TAKEOVER_ZSPAGES, "all zspages have been rebuilt"),
    "takeover_page": (TAKEOVER_PAGE, "a page is in the index"),
    "takeover_duplicate": (TAKEOVER_DUPLICATE, "one of two copies has been chosen"),
    "takeover_indexed": (TAKEOVER_INDEXED, "the index is complete"),
    "takeover_marked": (
        TAKEOVER_MARKED,
        "lost pages are marked; dropped objects are not yet freed",
    ),
    "takeover_dropped": (TAKEOVER_DROPPED, "one dropped object is freed"),
    "takeover_rewritten": (
        TAKEOVER_REWRITTEN,
        "all steps are done; an older arena is still marked as being rewritten",
    ),
    "slot_stale": (SLOT_STALE, "a page is stored again; its slot is still valid"),
    "spill_marked": (SPILL_MARKED, "a refused page is marked as lost; its slot is still valid"),
    "spill_cleared": (SPILL_CLEARED, "the slot of a refused page is invalid"),
    "slot_claimed": (SLOT_CLAIMED, "a write of slots is announced and not yet submitted"),
    "slot_written": (SLOT_WRITTEN, "slots are written but not yet valid"),
    "slot_valid": (SLOT_VALID, "a slot is valid; its page is still in the pool or marked as lost"),
    "writeback_dropped": (WRITEBACK_DROPPED, "a written-back page is dropped from the pool"),
    "discard_slots": (
        DISCARD_SLOTS,
        "slots of a discarded range are invalid; its pages are still in the pool",
    ),
    "takeover_slot": (TAKEOVER_SLOT, "the slot of a page in the pool is invalid"),
    "page_loaded": (PAGE_LOADED, "a page is loaded; its reader does not have it yet"),
}
"""The points by name: number, and the state of the core when the point is reached."""


HOW: Final = ("kill", "segv", "hang", "sleep", "memory", "bug")
"""The things that can happen at a point.

They are SIGKILL, SIGSEGV, an endless loop, a MemoryError, and another exception.
"""

ON_PURPOSE: Final = "armed by a test"
"""The message of these exceptions."""


class _Trigger:
    """The armed point (0 for none), the times left to reach it, and the way to fail."""

    def __init__(self) -> None:
        self.point = 0
        self.left = 0
        self.how = "kill"


_trigger: Final = _Trigger()


def reach(point: int) -> None:
    """Die here if this point is armed and has been reached often enough."""
    if _trigger.point == point:
        _count()


def _count() -> None:
    _trigger.left -= 1
    if _trigger.left:
        return
    if _trigger.how == "memory":
        raise MemoryError(ON_PURPOSE)
    if _trigger.how == "bug":
        raise RuntimeError(ON_PURPOSE)
    while _trigger.how == "sleep":
        time.sleep(3600)
    if _trigger.how != "hang":
        os.kill(os.getpid(), signal.SIGSEGV if _trigger.how == "segv" else signal.SIGKILL)
    while True:
        pass


def armed() -> int:
    """Return the number of the armed point, 0 for none.

    For C code, where a call of `reach` would be expensive.
    """
    return _trigger.point


def arm(name: str, nth: int = 1, how: str = "kill") -> None:
    """Have this process die when it reaches a point for the nth time from now on.

    This replaces an earlier armed point.

    Args:
        name: the point.
        nth: number of times that the point must be reached.
        how: the way to fail there, one of HOW.

    Raises:
        ValueError: there is no such point or way, or `nth` is below 1.
    """
    if name not in POINTS or nth < 1:
        raise ValueError(
            f"there is no crash point {name!r}, or {nth} is below 1; known points:"
            f" {', '.join(POINTS)}"
        )
    if how not in HOW:
        raise ValueError(f"there is no way to fail named {how!r}; known: {', '.join(HOW)}")
    _trigger.left = nth
    _trigger.how = how
    _trigger.point = POINTS[name][0]


def disarm() -> None:
    """Disarm the point."""
    _trigger.point = 0


def arm_from_environment(
    environment: Mapping[str, str], worker: int = 1, *, is_takeover: bool = False
) -> bool:
    """Arm the point that ZSWAPD_CRASH names, as `name[:nth[:how[:worker]]]`.

    Args:
        environment: has the variable.
        worker: number of this worker. If the variable names a worker, only that one is armed.
        is_takeover: a takeover is about to begin. Its points are armed then, and all others after
            it.

    Returns:
        Whether a point was armed now.

    Raises:
        ValueError: the variable cannot be understood.
    """
    wanted = environment.get("ZSWAPD_CRASH", "")
    if not wanted or wanted.startswith("takeover_") != is_takeover:
        return False
    name, nth, how, only, *_ = *wanted.split(":"), "", "", ""
    if only and int(only) != worker:
        return False
    arm(name, int(nth or "1"), how or "kill")
    return True
