# SPDX-License-Identifier: GPL-2.0-or-later
"""Head-room: the memory that swapoff needs against the memory that is available.

Cgroups of both versions count too, if swapoff would exceed their limit.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from zswapd import swapdevice
from zswapd.errors import HeadroomError
from zswapd.swapdevice import Headroom
from zswapd.swapdevice.headroom import CrowdedCgroup

MIB = 1 << 20


def headroom(**amounts: int) -> Headroom:
    """Return a head-room in MiB; by default it fits exactly."""
    values = {
        "swapped": 100,
        "cached": 0,
        "available": 132,
        "other_swap": 0,
        "pool_returns": 0,
        "margin": 32,
        **amounts,
    }
    return Headroom(**{name: value * MIB for name, value in values.items()}, crowded=())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("amounts", "short_by"),
    [
        ({}, 0),
        ({"available": 131}, 1),
        ({"available": 131, "other_swap": 1}, 0),
        ({"available": 100, "pool_returns": 32}, 0),
        ({"available": 100, "pool_returns": 31}, 1),
        ({"available": 100, "cached": 32}, 0),
        ({"swapped": 0, "available": 0}, 32),
    ],
)
def test_short_by_is_what_is_needed_less_what_there_is(
    amounts: dict[str, int], short_by: int
) -> None:
    assert headroom(**amounts).short_by == short_by * MIB


def test_check_of_what_fits_or_is_empty_says_nothing() -> None:
    headroom().check()
    headroom(swapped=0, available=0).check()


def test_check_of_what_does_not_fit_names_the_figures() -> None:
    with pytest.raises(HeadroomError) as caught:
        headroom(available=100, other_swap=2).check()
    assert (
        caught.value.message
        == "100.0 MiB swapped out do not fit into memory, by 30.0 MiB (100.0 MiB available, 2.0 MiB"
        " free in other swap)"
    )
    assert "--force" in (caught.value.hint or "")


def test_check_of_crowded_cgroups_names_the_worst() -> None:
    crowded = (
        CrowdedCgroup("/a", 9 * MIB, 1 * MIB, "/a/limit"),
        CrowdedCgroup("/b", 8 * MIB, 3 * MIB, "/b/limit"),
    )
    fits = headroom()
    with pytest.raises(HeadroomError) as caught:
        Headroom(fits.swapped, 0, fits.available, 0, 0, 0, crowded).check()
    assert (
        "cgroup /b (and 1 more) has 8.0 MiB swapped out, 3.0 MiB more than its limit has room for"
        in caught.value.message
    )
    assert "raise /b/limit" in (caught.value.hint or "")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "proc").mkdir()
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    set_memory(tmp_path)
    set_swaps(tmp_path, ("/dev/loop0", 1024, 100), ("/dev/sda2", 512, 500))
    return tmp_path


def set_memory(root: Path, *, total: int = 4096, available: int = 2048, cached: int = 0) -> None:
    text = (
        f"MemTotal: {total * 1024} kB\nMemAvailable: {available * 1024} kB\nSwapCached:"
        f" {cached * 1024} kB\n"
    )
    (root / "proc/meminfo").write_text(text)


def set_swaps(root: Path, *areas: tuple[str, int, int]) -> None:
    lines = [f"{path} partition {size * 1024} {used * 1024} 1" for path, size, used in areas]
    (root / "proc/swaps").write_text("\n".join(["Filename Type Size Used Priority", *lines, ""]))


def measure(root: Path, *, pool_bytes: int = 0) -> Headroom:
    areas = [area for area in swapdevice.swap_areas(root) if area.path.startswith("/dev/loop")]
    return swapdevice.measure(areas, pool_bytes=pool_bytes, root=root)


def test_measure_reads_memory_and_other_swap(root: Path) -> None:
    found = measure(root, pool_bytes=40 * MIB)
    assert (found.swapped, found.available, found.other_swap) == (100 * MIB, 2048 * MIB, 12 * MIB)
    assert found.pool_returns == 20 * MIB  # half
    assert found.margin == 4096 * MIB // 50
    found.check()


@pytest.mark.parametrize(("total", "margin"), [(512, 32), (4000, 80), (1 << 20, 256)])
def test_measure_keeps_a_margin_within_bounds(root: Path, total: int, margin: int) -> None:
    set_memory(root, total=total)
    assert measure(root).margin == margin * MIB


def test_measure_shares_the_swap_cache_out_by_use(root: Path) -> None:
    set_memory(root, cached=60)
    assert measure(root).cached == 10 * MIB  # 100 of the 600 MiB in use are ours
    set_memory(root, cached=6000)
    assert measure(root).cached == 100 * MIB


def test_measure_of_several_areas_adds_them_up_and_counts_none_as_other(root: Path) -> None:
    set_swaps(root, ("/dev/loop0", 1024, 100), ("/dev/loop1", 1024, 50), ("/dev/sda2", 512, 512))
    found = measure(root)
    assert (found.swapped, found.other_swap) == (150 * MIB, 0)


def v1(
    root: Path, path: str, *, limit: int, usage: int, swap: int, cached: int = 0, files: int = 0
) -> None:
    group = root / "sys/fs/cgroup/memory" / path
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (group / "memory.usage_in_bytes").write_text(f"{usage * MIB}\n")
    stat = {
        "swap": 0,
        "total_swap": swap,
        "total_swapcached": cached,
        "total_inactive_file": files,
        "total_active_file": 0,
    }
    (group / "memory.stat").write_text(
        "".join(f"{name} {value * MIB}\n" for name, value in stat.items())
    )


def v2(
    root: Path,
    path: str,
    *,
    limit: int | str,
    usage: int,
    swap: int,
    cached: int = 0,
    files: int = 0,
) -> None:
    top = root / "sys/fs/cgroup"
    (top / "cgroup.controllers").write_text("memory\n")
    group = top / path
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.max").write_text(f"{limit}\n")
    (group / "memory.current").write_text(f"{usage * MIB}\n")
    (group / "memory.swap.current").write_text(f"{swap * MIB}\n")
    (group / "memory.stat").write_text(
        f"inactive_file {files * MIB}\nactive_file 0\nswapcached {cached * MIB}\n"
    )


@pytest.mark.parametrize("make", [v1, v2])
@pytest.mark.parametrize(
    ("usage", "swap", "cached", "files", "short_by"),
    [
        (60, 40, 0, 0, 0),  # fits exactly
        (100, 60, 0, 0, 60),
        (100, 60, 20, 0, 40),  # of what is swapped out, 20 are in memory as well
        (100, 60, 0, 20, 40),  # 20 are files, which can be dropped
        (100, 9999, 0, 0, 100),  # no more than what is on our areas can come back
        (100, 0, 0, 0, 0),
        (120, 10, 10, 0, 0),
    ],
)
def test_a_cgroup_whose_swapped_pages_exceed_its_limit_is_crowded(  # type: ignore[no-untyped-def]
    root: Path,
    make,  # noqa: ANN001
    usage: int,
    swap: int,
    cached: int,
    files: int,
    short_by: int,
) -> None:
    set_swaps(root, ("/dev/loop0", 1024, 100))
    make(root, "system/work", limit=100 * MIB, usage=usage, swap=swap, cached=cached, files=files)
    crowded = measure(root).crowded
    assert [(item.path, item.short_by // MIB) for item in crowded] == (
        [("/system/work", short_by)] if short_by else []
    )
    if crowded:
        assert crowded[0].limit_file.startswith(str(root / "sys/fs/cgroup"))


def test_a_cgroup_without_a_limit_is_never_crowded(root: Path) -> None:
    v1(root, ".", limit=9223372036854771712, usage=4000, swap=600)
    v1(root, "a", limit=8192 * MIB, usage=4000, swap=600)
    assert measure(root).crowded == ()
    v2(root, "b", limit="max", usage=4000, swap=600)
    assert measure(root).crowded == ()


def test_a_cgroup_that_can_swap_elsewhere_is_not_crowded(root: Path) -> None:
    set_swaps(root, ("/dev/loop0", 1024, 100), ("/dev/sda2", 512, 500))
    v1(root, "a", limit=100 * MIB, usage=100, swap=12)
    v1(root, "b", limit=100 * MIB, usage=100, swap=13)
    assert [item.path for item in measure(root).crowded] == ["/b"]


def test_nothing_swapped_out_is_no_reason_to_look_at_cgroups(root: Path) -> None:
    set_swaps(root, ("/dev/loop0", 1024, 0))
    v1(root, "a", limit=10 * MIB, usage=100, swap=50)
    assert measure(root).crowded == ()


def test_measure_where_nothing_can_be_read_gives_no_room(tmp_path: Path) -> None:
    area = swapdevice.SwapArea("/dev/loop0", 64 * MIB, 32 * MIB, 1)
    with pytest.raises(HeadroomError):
        swapdevice.measure([area], root=tmp_path).check()
