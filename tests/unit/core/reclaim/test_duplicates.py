# SPDX-License-Identifier: GPL-2.0-or-later
"""The estimate of equal pages, against pools of which the answer is known."""

from __future__ import annotations

import pytest

from tests.support.strategies import page
from tests.support.successor import make_config
from zswapd.core import compress
from zswapd.core.core import Core
from zswapd.core.reclaim import duplicates
from zswapd.core.reclaim.duplicates import DuplicateSearch, DuplicateStatistics

SIZE = 4096


@pytest.fixture
def core() -> Core:
    return Core(make_config("swap.size=16M", "swap.files.more=16M", "memory.arena=memfd"))


def write(core: Core, name: str, number: int, kind: str, seed: int) -> None:
    if core.frames.wants_refill():
        core.frames.refill_now()
    core.devices[name].write(number * SIZE, memoryview(page(kind, seed, SIZE)))


def search(core: Core) -> dict[str, DuplicateStatistics]:
    found = core.duplicate_search(list(core.devices.values()))
    while not found.is_done:
        found.step()
    return {one.name: one for one in found.result()}


def test_equal_pages_are_counted_in_each_file_and_across_files(core: Core) -> None:
    for number in range(30):
        write(core, "swap", number, "half", number % 10)  # each three times
        write(core, "more", number, "half", number + 5)  # five of them are in `swap` too
        write(core, "more", 100 + number, "same", 7)
    write(core, "more", 50, "noise", 1)
    write(core, "more", 51, "noise", 1)
    found = search(core)
    assert (found["swap"].pages, found["swap"].duplicates) == (30, 20)
    assert (found["more"].pages, found["more"].duplicates) == (32, 1)
    assert (found["more"].same_filled, found[""].same_filled) == (30, 30)
    assert (found[""].pages, found[""].duplicates) == (62, 20 + 1 + 5)
    assert found["more"].saved_bytes == SIZE
    half = core.devices["swap"].state_of(0)
    assert half is not None
    assert 20 * (half.size - 64) < found["swap"].saved_bytes < 20 * half.size + 20 * 64


def test_sample_of_a_large_pool_is_near_the_truth(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "SAMPLED", 500)
    for number in range(4000):
        write(core, "swap", number, "sparse", number % 3000)
    found = search(core)
    assert found[""].pages == 4000
    assert 0.6 * 1000 < found[""].duplicates < 1.4 * 1000


def test_a_step_takes_its_time_and_no_more() -> None:
    now = [0.0]

    class Device:
        name, pages = "d", 1 << 30

        def pampd_of(self, number: int) -> int:
            now[0] += 1e-5
            return 0

    search = DuplicateSearch(
        [Device()],
        memoryview(b""),
        lambda _pampd: None,  # type: ignore[arg-type,return-value]
        page_size=SIZE,
        stored=0,
        clock=lambda: now[0],
    )
    search.step()
    assert duplicates.STEP_S <= now[0] < duplicates.STEP_S + 2 * duplicates.LOOKS * 1e-5
    assert not search.is_done


def test_another_codec_hides_a_copy(core: Core) -> None:
    write(core, "swap", 0, "words", 1)
    write(core, "swap", 1, "words", 1)
    assert core.devices["swap"].recompress(1, compress.get("zstd"), 1) == 1
    found = core.duplicate_search(list(core.devices.values()))
    while not found.is_done:
        found.step()
    assert found.result()[-1].duplicates == 0
