# SPDX-License-Identifier: GPL-2.0-or-later
"""Death at every crash point, again and again, against a model of what every page may hold.

After each death a process takes over and finds: of every acknowledged write the data; of the one
under way the old page, the new one or (where it was being refused) an error, never a mixture, nor
zeros that no request wrote; and no frame that no part counts.

The short form kills a process at every point by a fixed list of operations, and some hundred
processes at random; the long one (`--tier soak`) does thousands.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.dying import PAGES, Op, World
from tests.support.strategies import KINDS, contents
from zswapd.core import crashpoints
from zswapd.core.allocators.arena import Arena
from zswapd.errors import ArenaError

ALLOCATORS = ("zsmalloc", "zbud")
OF_SLOTS = [
    name
    for name, (number, _) in crashpoints.POINTS.items()
    if crashpoints.SLOT_STALE <= number <= crashpoints.TAKEOVER_SLOT
]
POINTS = [
    name for name in crashpoints.POINTS if not name.startswith("takeover_") and name not in OF_SLOTS
]
TAKEOVER_POINTS = [
    name for name in crashpoints.POINTS if name.startswith("takeover_") and name not in OF_SLOTS
]


def _kinds_of_arena() -> list[str]:
    try:
        Arena(1, 4096, kind="tmpfs").close()
    except ArenaError:
        return ["memfd"]
    return ["tmpfs", "memfd"]


def _scenario(*, cached: bool = False) -> list[Op]:
    """Operations that come by every point several times.

    Of the cache's own too, if it is used first.
    """
    ops: list[Op] = [("cache", 0, 60, "words"), ("evict", 4)] if cached else []
    ops += [("write", number, KINDS[number % len(KINDS)], number) for number in range(120)]
    ops += [
        ("write", number, KINDS[number * 5 % len(KINDS)], number + 1) for number in range(0, 120, 2)
    ]
    ops += [("write", number, "half", number) for number in range(120, 200)]
    ops += [("write", number, KINDS[number % len(KINDS)], 3) for number in range(285, PAGES)]
    ops += [("read", 0, 20), ("refill", PAGES)]
    # Zspages with holes in them, to be packed.
    ops += [("discard", number, 3) for number in range(120, 200, 4)]
    ops += [("compact", 7), ("compact", 1000)]
    ops += [
        ("freeze", True),
        *(("write", number, "words", 5) for number in range(3, 20)),
        ("freeze", False),
    ]
    ops += [("write", 4, "words", 6), ("discard", 3, 4), ("discard", 8, 2)]
    ops += [
        ("keep_poor", False),
        *(("write", number, "noise", 7) for number in range(25, 40)),
        ("keep_poor", True),
    ]
    ops += [("write", 26, "words", 6), ("discard", 0, 280), ("trim", 0), ("refill", 60)]
    return ops + [("write", number, KINDS[number % len(KINDS)], 9) for number in range(20)]


@pytest.mark.parametrize("allocator", ALLOCATORS)
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("nth", [1, 2, 9])
def test_death_at_each_point_by_the_list(point: str, nth: int, allocator: str) -> None:
    with World("memfd", 4096, allocator, cache="zbud", packer=nth != 2) as world:
        life = world.live(_scenario(cached=nth > 1), point, nth)
        assert life.killed or nth > 1, "the list of operations does not come by this point"
        world.check()
        # And on from there.
        world.live(_scenario()[100:], "store_indexed", 3)
        world.check()


@pytest.mark.parametrize("how", ["memory", "bug"])
@pytest.mark.parametrize("allocator", ALLOCATORS)
@pytest.mark.parametrize("point", POINTS)
def test_exception_at_each_point_is_a_death(point: str, allocator: str, how: str) -> None:
    # What runs on the exception's way out runs over lists and counts that are in the middle of
    # something.
    with World("memfd", 4096, allocator, cache="zbud") as world:
        for nth in (1, 2, 9):
            life = world.live(_scenario(cached=nth > 1), point, nth, how=how)
            assert life.killed or nth > 1, "the list of operations does not come by this point"
            world.check()


@pytest.mark.parametrize(("allocator", "kind"), [("zsmalloc", "half"), ("zbud", "words")])
@pytest.mark.parametrize("point", POINTS[: POINTS.index("store_still_lost")])
def test_what_lay_in_frames_before_does_not_come_back(
    point: str, allocator: str, kind: str
) -> None:
    # Whole objects, live words and all, are left in freed frames; new zspages of the same class are
    # made of just these, and so are buddies of the same size.
    with World("memfd", 4096, allocator) as world:
        work: list[Op] = [("write", number, kind, 1) for number in range(120)]
        work += [("discard", 0, PAGES), ("arm", point, 1)]
        work += [("write", number, kind, 2) for number in range(200, 205)]
        work += [("write", number, "noise", 2) for number in range(200, 205)]
        world.live(work, "takeover_run", 1)
        world.check()


@pytest.mark.parametrize("point", POINTS[: POINTS.index("compact_copied")])
@pytest.mark.parametrize("kind", ["half", "noise"])
def test_lost_page_is_lost_until_its_new_copy_lives(point: str, kind: str) -> None:
    with World("memfd", 4096) as world:
        work: list[Op] = [
            ("write", 5, "words", 1),
            ("freeze", True),
            ("write", 5, kind, 2),
            ("freeze", False),
            ("arm", point, 1),
        ]
        world.live([*work, ("write", 5, kind, 3), ("discard", 4, 3)], "takeover_run", 1)
        world.check()


@pytest.mark.parametrize("allocator", ALLOCATORS)
@pytest.mark.parametrize(
    "point",
    [
        *(
            name
            for name in POINTS
            if name.startswith("store_") and "body" not in name and "lost" not in name
        ),
        "free_header",
    ],
)
def test_death_while_pages_are_compressed_again(point: str, allocator: str) -> None:
    with World("memfd", 4096, allocator) as world:
        work: list[Op] = [
            ("write", number, ("words", "letters", "pointers")[number % 3], 1)
            for number in range(90)
        ]
        for nth in (1, 7):
            assert world.live(
                [*work, ("arm", point, nth), ("recompress", 0, 90)], "takeover_run", 1
            ).killed
            world.check()


@pytest.mark.parametrize("allocator", ALLOCATORS)
@pytest.mark.parametrize("point", TAKEOVER_POINTS)
@pytest.mark.parametrize(
    "before",
    [
        "store_indexed",
        "store_checked",
        "store_body_written",
        "compact_alive",
        "trim_punched",
        "frames_headed",
    ],
)
def test_death_in_the_takeover_after_a_death(point: str, before: str, allocator: str) -> None:
    with World("memfd", 4096, allocator) as world:
        assert world.live(_scenario(), before, 2 if before != "trim_punched" else 1).killed
        for nth in (1, 2, 3):
            life = world.live([("write", 250, "words", nth)], point, nth, in_takeover=True)
            if nth == 1 and point not in ("takeover_duplicate", "takeover_dropped"):
                assert life.killed
            if nth == 1 and before in ("store_indexed", "compact_alive"):
                assert life.killed, "there are two copies of a page"
        world.check()


def ops() -> st.SearchStrategy[Op]:
    """Draw an operation, writes and discards mostly."""
    number = st.integers(0, 60) | st.integers(0, PAGES - 1)
    write = st.tuples(st.just("write"), number, contents()).map(lambda op: ("write", op[1], *op[2]))
    poor = st.tuples(st.just("write"), number, st.just("noise"), st.integers(0, 9))
    discard = st.tuples(st.just("discard"), number, st.integers(1, 8) | st.just(PAGES))
    weather = st.sampled_from(
        [
            ("cache", 0, 30, "half"),
            ("cache", 20, 90, "words"),
            ("evict", 5),
            ("compact", 1),
            ("compact", 1 << 30),
            ("freeze", True),
            ("freeze", False),
            ("freeze", False),
            ("keep_poor", False),
            ("keep_poor", True),
            ("codec", "lzo"),
            ("codec", "lz4"),
            ("codec", "zstd"),
            ("recompress", 0, PAGES),
            ("recompress", 20, 30),
            ("checksum", False),
            ("hog", 0),
            ("hog", 5),
            ("refill", PAGES),
            ("trim", 0),
            ("trim", 20),
        ]
    )
    return st.one_of(write, write, poor, discard, weather)


def crowds() -> st.SearchStrategy[list[Op]]:
    """Draw many writes, or many discards with room left between them.

    What makes zspages full, and what makes them sparse.
    """
    fill = st.tuples(
        st.integers(0, PAGES - 80),
        st.integers(5, 80),
        st.sampled_from((*KINDS, "half", "words")),
        st.integers(1, 3),
    )
    writes = fill.map(lambda f: [("write", f[0] + n, f[2], n) for n in range(0, f[1], f[3])])
    thin = st.tuples(st.integers(0, PAGES - 80), st.integers(5, 80), st.integers(2, 5))
    discards = thin.map(lambda f: [("discard", f[0] + n, f[2] - 1) for n in range(0, f[1], f[2])])
    return st.one_of(writes, discards)


def lives() -> st.SearchStrategy[tuple[list[Op], str, int, bool]]:
    """Draw what a process does and where it dies."""
    pieces = st.lists(
        st.one_of(crowds(), st.lists(ops(), min_size=1, max_size=10)), min_size=1, max_size=5
    )
    work = pieces.map(lambda lists: [op for piece in lists for op in piece])
    nth = st.integers(1, 4) | st.integers(1, 150)
    dies_at_work = st.tuples(work, st.sampled_from(POINTS), nth, st.just(False))
    dies_taking_over = st.tuples(work, st.sampled_from(TAKEOVER_POINTS), nth, st.just(True))
    return st.one_of(dies_at_work, dies_at_work, dies_at_work, dies_taking_over)


def _run(
    kind: str,
    allocator: str,
    cache: str,
    page_size: int,
    each: list[tuple[list[Op], str, int, bool]],
    checks: list[bool],
    packers: list[bool],
) -> None:
    with World(kind, page_size, allocator, cache=cache) as world:
        for (work, point, nth, in_takeover), check, packer in zip(
            each, checks, packers, strict=False
        ):
            world.packer = packer  # the successor may have the other form
            world.live(work, point, nth, in_takeover=in_takeover)
            if check:
                world.check()
        world.check()


_given = given(
    kind=st.sampled_from(_kinds_of_arena()),
    allocator=st.sampled_from(ALLOCATORS),
    cache=st.sampled_from(("", "zbud", "zsmalloc")),
    page_size=st.sampled_from((4096, 4096, 4096, 4096, 16384, 65536)),
    each=st.lists(lives(), min_size=1, max_size=4),
    checks=st.lists(st.booleans(), min_size=4, max_size=4),
    packers=st.lists(st.booleans(), min_size=4, max_size=4),
)
_quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]


@settings(max_examples=160, suppress_health_check=_quiet)
@_given
def test_death_at_random(
    kind: str,
    allocator: str,
    cache: str,
    page_size: int,
    each: list[tuple[list[Op], str, int, bool]],
    checks: list[bool],
    packers: list[bool],
) -> None:
    _run(kind, allocator, cache, page_size, each, checks, packers)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@settings(max_examples=6000, suppress_health_check=_quiet)
@_given
def test_death_at_random_for_long(
    kind: str,
    allocator: str,
    cache: str,
    page_size: int,
    each: list[tuple[list[Op], str, int, bool]],
    checks: list[bool],
    packers: list[bool],
) -> None:
    _run(kind, allocator, cache, page_size, each, checks, packers)
