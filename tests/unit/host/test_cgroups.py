# SPDX-License-Identifier: GPL-2.0-or-later
"""Every memory limit above a process: both versions, nested, hybrid, in containers;
and whether reclaim at one swaps.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.cgrouptree import MIB, TOTAL, first, second, write_system
from tools.bench.harness.cgroup import MemoryCgroup
from zswapd import system
from zswapd.config import load
from zswapd.host import cgroups
from zswapd.host.cgroups import HEADROOM_LEAST, HEADROOM_MOST, Limits, headroom

V1, V2 = "/sys/fs/cgroup/memory", "/sys/fs/cgroup"


def own_v1(root: Path) -> None:
    write_system(root, "4:memory:/a", "3:cpu:/x", mounts=(f"/ {V1} 1",))
    first(root, V1)
    first(root, f"{V1}/a", 300 * MIB)


def above_v1(root: Path) -> None:
    write_system(root, "4:cpu,memory:/a/b/c", mounts=(f"/ {V1} 1",))
    first(root, V1)
    first(root, f"{V1}/a", 300 * MIB)
    first(root, f"{V1}/a/b", 700 * MIB)
    first(root, f"{V1}/a/b/c")


def together_v1(root: Path) -> None:
    write_system(root, "4:memory:/a", mounts=(f"/ {V1} 1",))
    first(root, V1)
    first(root, f"{V1}/a", memory__memsw__limit_in_bytes=300 * MIB)


def hidden_v1(root: Path) -> None:
    """In a container that sees its own cgroup only, of which the one above has the limit."""
    write_system(root, "4:memory:/docker/abc", mounts=(f"/docker/abc {V1} 1",))
    first(root, V1, memory__stat=f"hierarchical_memory_limit {300 * MIB}")


def container_v1(root: Path) -> None:
    write_system(root, "4:memory:/docker/abc/d", mounts=(f"/docker/abc {V1} 1",))
    first(root, V1, 300 * MIB)
    first(root, f"{V1}/d")


def hybrid(root: Path) -> None:
    write_system(root, "4:memory:/a", "0::/u", mounts=(f"/ {V1} 1", "/ /sys/fs/cgroup/unified 2"))
    first(root, V1)
    first(root, f"{V1}/a", 300 * MIB)
    (root / "sys/fs/cgroup/unified/u").mkdir(parents=True)


def own_v2(root: Path) -> None:
    write_system(root, "0::/zswapd.service", mounts=(f"/ {V2} 2",))
    second(root, f"{V2}/zswapd.service", 300 * MIB)


def above_v2(root: Path) -> None:
    write_system(root, "0::/a/b/c", mounts=(f"/ {V2} 2",))
    second(root, f"{V2}/a", 300 * MIB)
    second(root, f"{V2}/a/b", 2 * TOTAL)
    second(root, f"{V2}/a/b/c")


def high_v2(root: Path) -> None:
    write_system(root, "0::/a/b", mounts=(f"/ {V2} 2",))
    second(root, f"{V2}/a", 500 * MIB)
    second(root, f"{V2}/a/b", memory__high=300 * MIB)


def container_v2(root: Path) -> None:
    """With a namespace: the container's own cgroup is / to it."""
    write_system(root, "0::/", mounts=(f"/ {V2} 2",))
    second(root, V2, 300 * MIB)


def outside_v2(root: Path) -> None:
    """Joined to a container from outside: neither path nor mount are below the namespace's root."""
    write_system(root, "0::/../other", mounts=(f"/../.. {V2} 2",))
    second(root, V2, 300 * MIB)


def odd_name_v2(root: Path) -> None:
    write_system(root, "0::/a:b c", mounts=(r"/ /sys/fs/cg\040roup 2",))
    second(root, "/sys/fs/cg roup/a:b c", 300 * MIB)


LAYOUTS = [
    own_v1, above_v1, together_v1, hidden_v1, container_v1, hybrid,
    own_v2, above_v2, high_v2, container_v2, outside_v2, odd_name_v2,
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_lowest_limit_above_is_100_percent_of_every_size(
    layout: Callable[[Path], None], tmp_path: Path
) -> None:
    layout(tmp_path)
    assert cgroups.find(tmp_path)[0].bytes == 300 * MIB
    settings = [
        ("swap.size", "50%", "--size"),
        ("memory.reserve", "10%", "x"),
        ("pool.limit", "min(50%, 4G)", "x"),
    ]
    config = load(codecs=["lz4"], root=tmp_path, assignments=settings)
    assert (config.swap.size, config.memory.reserve, config.pool.limit) == (
        150 * MIB,
        30 * MIB,
        150 * MIB,
    )
    assert config.context.limited_by == str(cgroups.find(tmp_path)[0].file)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout is not hidden_v1])
def test_room_is_what_the_lowest_limit_leaves_and_follows_it(
    layout: Callable[[Path], None], tmp_path: Path
) -> None:
    layout(tmp_path)
    limit = cgroups.find(tmp_path)[0]
    usage = {
        "memory.limit_in_bytes": "memory.usage_in_bytes",
        "memory.memsw.limit_in_bytes": "memory.memsw.usage_in_bytes",
    }
    limits = Limits(tmp_path)
    for left in (200, 50, 0):
        (limit.file.parent / usage.get(limit.file.name, "memory.current")).write_text(
            f"{(300 - left) * MIB}\n"
        )
        room = limits.room()
        assert room is not None
        assert (room.limit, room.left, room.file) == (300 * MIB, left * MIB, str(limit.file))
        assert room.spare == left * MIB - headroom(300 * MIB)
    limit.file.write_text(f"{100 * MIB}\n")  # lowered at run time, below what is used
    room = limits.room()
    assert room is not None
    assert room.left == -200 * MIB
    limit.file.write_text(f"{TOTAL}\n")
    room = limits.room()
    assert room is None or room.limit > 300 * MIB
    limits.close()


def test_no_limit_is_none(tmp_path: Path) -> None:
    for make in (lambda: None, lambda: write_system(tmp_path, "0::/a", mounts=())):
        make()
        assert cgroups.find(tmp_path) == ()
        assert Limits(tmp_path).room() is None
    write_system(tmp_path, "0::/a", "4:memory:/b", mounts=(f"/ {V1} 1", f"/ {V2} 2"))
    first(tmp_path, f"{V1}/b", TOTAL)
    second(tmp_path, f"{V2}/a", "max")
    assert cgroups.find(tmp_path) == ()
    assert load(codecs=["lz4"], root=tmp_path).context.memory_total == TOTAL


def test_limits_beyond_a_cgroup_without_hierarchy_do_not_count(tmp_path: Path) -> None:
    above_v1(tmp_path)
    first(tmp_path, f"{V1}/a", 300 * MIB, memory__use_hierarchy=0)
    assert [limit.bytes // MIB for limit in cgroups.find(tmp_path)] == [700]


def test_files_in_the_page_cache_do_not_count_as_used_where_little_is_left(tmp_path: Path) -> None:
    own_v2(tmp_path)
    second(
        tmp_path, f"{V2}/zswapd.service", 300 * MIB, usage=290 * MIB,
        memory__stat=f"inactive_file {100 * MIB}\nactive_file {20 * MIB}",
    )  # fmt: skip
    room = Limits(tmp_path).room()
    assert room is not None
    assert room.left == 120 * MIB


@pytest.mark.parametrize(
    ("limit", "kept"), [(MIB, HEADROOM_LEAST), (256 * MIB, 32 * MIB), (TOTAL, HEADROOM_MOST)]
)
def test_headroom_is_an_eighth_within_bounds(limit: int, kept: int) -> None:
    assert headroom(limit) == kept


# Whether a process at a limit swaps.


def protection(root: Path, *, is_flusher: bool) -> system.Protection:
    from zswapd.system import protections

    return protections._look_at_limits(root, is_flusher=is_flusher)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout is not together_v1])
def test_a_limit_with_swap_is_no_protection_unless_allocations_start_no_io(
    layout: Callable[[Path], None], tmp_path: Path
) -> None:
    layout(tmp_path)
    off = protection(tmp_path, is_flusher=False)
    assert not off.on
    assert str(cgroups.find(tmp_path)[0].file) in off.detail
    assert off.hint
    assert protection(tmp_path, is_flusher=True).on


@pytest.mark.parametrize(
    ("layout", "file", "value"),
    [
        (own_v1, f"{V1}/a/memory.swappiness", 0),
        (own_v1, f"{V1}/a/memory.memsw.limit_in_bytes", 300 * MIB),
        (own_v2, f"{V2}/zswapd.service/memory.swap.max", 0),
        (container_v2, f"{V2}/memory.swap.max", 0),
        (high_v2, f"{V2}/a/memory.swap.max", 0),  # of all below it, whatever they say themselves
        (outside_v2, f"{V2}/memory.swap.max", 0),
    ],
)
def test_a_limit_at_which_nothing_is_swapped_is_one(
    layout: Callable[[Path], None], file: str, value: int, tmp_path: Path
) -> None:
    layout(tmp_path)
    (tmp_path / file.lstrip("/")).write_text(f"{value}\n")
    assert protection(tmp_path, is_flusher=False).on


def test_a_limit_above_is_met_by_the_neighbours_pages_too(tmp_path: Path) -> None:
    above_v2(tmp_path)
    # our cgroup; pages of a and b are swapped out in our context
    second(tmp_path, f"{V2}/a/b/c", memory__swap__max=0)
    assert not protection(tmp_path, is_flusher=False).on
    other = tmp_path / "other"
    above_v1(other)
    for below in ("", "/b", "/b/c"):
        (other / f"{V1}/a{below}/memory.swappiness".lstrip("/")).write_text("0\n")
    (other / f"{V1}/a/b/memory.swappiness".lstrip("/")).write_text("60\n")
    assert not protection(other, is_flusher=False).on


@pytest.mark.parametrize(
    ("layout", "hint"),
    [
        (own_v1, "echo 0 > {root}/sys/fs/cgroup/memory/a/memory.swappiness"),
        (own_v2, "systemctl set-property zswapd.service MemorySwapMax=0"),
        (container_v2, "echo 0 > {root}/sys/fs/cgroup/memory.swap.max"),
        (
            above_v1,
            f"echo {300 * MIB} > {{root}}/sys/fs/cgroup/memory/a/memory.memsw.limit_in_bytes",
        ),
        (hidden_v1, "start the container with as much memory and swap together as memory"),
    ],
)
def test_the_hint_is_the_command_that_helps(
    layout: Callable[[Path], None], hint: str, tmp_path: Path
) -> None:
    layout(tmp_path)
    assert (protection(tmp_path, is_flusher=False).hint or "").startswith(
        hint.format(root=tmp_path)
    )


@pytest.mark.kernel
def test_limits_of_this_kernels_own_cgroups_are_seen() -> None:
    program = (
        "from pathlib import Path; from zswapd.host import cgroups\nimport sys; Path(sys.argv[1],"
        " 'cgroup.procs').write_text('0')\nroom ="
        " cgroups.Limits().room()\nprint(cgroups.find()[0].bytes, cgroups.find()[0].file,"
        " room.limit, 0 < room.left < room.limit)"
    )
    with MemoryCgroup("limits", 256 * MIB) as cgroup:
        below = cgroup.path / "below"
        below.mkdir()
        try:
            done = subprocess.run(
                [sys.executable, "-c", program, str(below)],
                check=True,
                capture_output=True,
                text=True,
                timeout=60,
            )
        finally:
            below.rmdir()
        name = "memory.limit_in_bytes" if "memory" in cgroup.path.parts else "memory.max"
        assert done.stdout.split() == [
            str(256 * MIB),
            str(cgroup.path / name),
            str(256 * MIB),
            "True",
        ]
