# SPDX-License-Identifier: GPL-2.0-or-later
"""Death at every crash point while pages are written back, written through and read from a disk.

(see test_crash_model.py).

After each death: an acknowledged page is where it was, in the pool or in its slot, whatever reaches
the disk late; one that was under way is old, new, or lost if the pool was refusing it.
"""

from __future__ import annotations

import errno

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.model.test_crash_model import OF_SLOTS, POINTS, crowds, ops
from tests.support.dying import PAGES, Op
from tests.support.dying_backed import BackedWorld
from tests.support.strategies import KINDS, contents
from zswapd.core import crashpoints

ALL_POINTS = [*POINTS, *OF_SLOTS]


def _scenario() -> list[Op]:
    """Operations that come by every point several times."""
    written: list[Op] = [
        ("write", number, KINDS[number % len(KINDS)], number) for number in range(120)
    ]
    back: list[Op] = [("write_back", 0, 60), ("disk", 1000)]
    stale: list[Op] = [
        ("write", number, "words", number) for number in range(20)
    ]  # what was on the disk is in the pool again
    through: list[Op] = [
        ("limit", 0),
        *(("write", number, "half", 5) for number in range(10, 160, 3)),
        ("limit", 1 << 20),
    ]
    again: list[Op] = [
        ("freeze", True),
        *(("write", number, "poor", 6) for number in range(10, 90, 5)),
        ("freeze", False),
    ]
    promoted: list[Op] = [
        ("write_back", 100, 30),
        ("disk", 99),
        ("read", 100, 30),
        ("read", 100, 30),
    ]
    pool: list[Op] = [("write", number, "words", 9) for number in range(10, 70, 3)]
    under_way: list[Op] = [
        ("write_back", 60, 60),
        ("write", 70, "half", 1),
        ("discard", 80, 10),
        ("disk", 1),
        ("compact", 50),
    ]
    failing: list[Op] = [
        ("disk_fails", errno.EIO),
        ("write_back", 100, 20),
        ("disk", 99),
        ("disk_fails", 0),
    ]
    return [
        *written,
        *back,
        *stale,
        *through,
        *again,
        *promoted,
        *pool,
        *under_way,
        *failing,
        ("discard", 0, 30),
        ("write_back", 0, PAGES),
    ]


@pytest.mark.parametrize(
    "point", [*OF_SLOTS, "store_alive", "store_indexed", "refused_marked", "discard_page"]
)
@pytest.mark.parametrize("nth", [1, 2, 9])
def test_death_at_each_point_by_the_list(point: str, nth: int) -> None:
    with BackedWorld("memfd", 4096) as world:
        life = world.live(_scenario(), point, nth)
        assert life.killed or nth > 1 or point.startswith("takeover"), (
            "the list of operations does not come by this point"
        )
        world.check()
        world.live([("late_writes",), *_scenario()], point, nth + 20)
        world.check()
        world.live(_scenario()[100:], "slot_valid", 3)
        world.check()


@pytest.mark.parametrize("nth", [1, 3])
def test_death_in_the_takeover_of_pages_that_are_in_both_places(nth: int) -> None:
    with BackedWorld("memfd", 4096) as world:
        for point in ("slot_valid", "slot_stale", "slot_valid"):
            world.live(_scenario(), point, nth)
            world.live([], "takeover_slot", 1, in_takeover=True)
        world.check()


def test_slots_that_a_dead_process_may_still_write_are_left_alone() -> None:
    with BackedWorld("memfd", 4096) as world:
        pages: list[Op] = [("write", number, "half", number) for number in range(40)]
        assert world.live([*pages, ("write_back", 0, 40)], "slot_claimed", 1).killed
        # The next one writes as much as it can to the disk, and the late writes come behind it.
        world.live(
            [
                ("write_back", 0, 40),
                ("disk", 99),
                ("limit", 0),
                ("write", 45, "half", 1),
                ("late_writes",),
            ],
            "store_alive",
            99,
        )
        world.check()


@pytest.mark.parametrize("kind", ["pointers", "poor", "noise"])
@pytest.mark.parametrize("point", ["spill_marked", "spill_cleared", "slot_claimed", "slot_valid"])
def test_death_while_a_page_refused_for_its_contents_is_written_through(
    kind: str, point: str
) -> None:
    """The pool refuses "pointers" for the mean of all pages,
    "poor" and "noise" for their own size.
    """
    writes: list[Op] = [("write", number, kind, seed) for seed in (1, 2) for number in range(5)]
    with BackedWorld("memfd", 4096) as world:
        assert world.live([*writes, *writes], point, 1).killed
        world.check()
        for nth in (1, 3, 7):
            world.live(writes, point, nth)
            world.check()


def backed_ops() -> st.SearchStrategy[Op]:
    number = st.integers(0, 60) | st.integers(0, PAGES - 1)
    back = st.tuples(st.just("write_back"), number, st.integers(1, 40))
    write = st.tuples(st.just("write"), number, contents()).map(lambda op: ("write", op[1], *op[2]))
    weather = st.sampled_from(
        [
            ("limit", 0),
            ("limit", 1 << 20),
            ("disk", 1),
            ("disk", 100),
            ("disk_fails", errno.EIO),
            ("disk_fails", 0),
            ("late_writes",),
        ]
    )
    read = st.tuples(st.just("read"), number, st.integers(1, 40))
    return st.one_of(back, back, read, write, weather, ops())


def lives() -> st.SearchStrategy[tuple[list[Op], str, int, bool]]:
    pieces = st.lists(
        st.one_of(crowds(), st.lists(backed_ops(), min_size=1, max_size=15)), min_size=1, max_size=6
    )
    work = pieces.map(lambda lists: [op for piece in lists for op in piece])
    nth = st.integers(1, 4) | st.integers(1, 60)
    at_slots = st.tuples(work, st.sampled_from(OF_SLOTS), nth, st.just(False))
    anywhere = st.tuples(work, st.sampled_from(ALL_POINTS), nth, st.just(False))
    taking_over = st.tuples(
        work,
        st.sampled_from([name for name in crashpoints.POINTS if "takeover" in name]),
        nth,
        st.just(True),
    )
    return st.one_of(at_slots, at_slots, anywhere, taking_over)


def _run(each: list[tuple[list[Op], str, int, bool]], checks: list[bool]) -> None:
    with BackedWorld("memfd", 4096) as world:
        for (work, point, nth, in_takeover), check in zip(each, checks, strict=False):
            world.live(work, point, nth, in_takeover=in_takeover)
            if check:
                world.check()
        world.check()


_given = given(
    each=st.lists(lives(), min_size=1, max_size=4),
    checks=st.lists(st.booleans(), min_size=4, max_size=4),
)
_quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]


@settings(max_examples=80, suppress_health_check=_quiet)
@_given
def test_death_at_random(each: list[tuple[list[Op], str, int, bool]], checks: list[bool]) -> None:
    _run(each, checks)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@settings(max_examples=5000, suppress_health_check=_quiet)
@_given
def test_death_at_random_for_long(
    each: list[tuple[list[Op], str, int, bool]], checks: list[bool]
) -> None:
    _run(each, checks)
