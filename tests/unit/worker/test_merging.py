# SPDX-License-Identifier: GPL-2.0-or-later
"""When requests to loop devices are kept apart, and what a successor has to know of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.support.stack import build
from zswapd.core.block.device import UNREADABLE_MAX, Device
from zswapd.errors import ZswapdError
from zswapd.swapdevice import merging as sysfs
from zswapd.worker import merging as merging_module
from zswapd.worker.merging import Merging

PAGE = 4096


class Attendant:
    """Does at once what it is given."""

    async def run(self, function: Callable[[], Any], *, abandon: bool = False) -> Any:
        return function()


class Box:
    """A device, and the sysfs of its loop devices."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.stack = build(PAGE, frames=64)
        self.device = Device("swap", 64 * PAGE, self.stack.frontswap, 0, page_size=PAGE)
        self.told = 0
        self.is_prompt = True
        for name in ("loops_over", "set_merging", "restore_merging"):
            real = getattr(sysfs, name)
            monkeypatch.setattr(
                merging_module, name, lambda *a, real=real, **k: real(*a, **k, root=root)
            )
        (root / "proc/self").mkdir(parents=True)
        (root / "proc/self/mountinfo").write_text("")

    def attach(self, number: int, file: str = "/mnt/swap") -> None:
        loop = self.root / f"sys/block/loop{number}"
        for directory in ("loop", "queue"):
            (loop / directory).mkdir(parents=True, exist_ok=True)
        (loop / "loop/backing_file").write_text(f"{file}\n")
        (loop / "queue/nomerges").write_text("0\n")

    def detach(self, number: int) -> None:
        (self.root / f"sys/block/loop{number}/loop/backing_file").unlink()

    def nomerges(self, number: int) -> str:
        return (self.root / f"sys/block/loop{number}/queue/nomerges").read_text().strip()

    def merging(self, left: dict[str, Any] | None = None) -> Merging:
        def remember() -> None:
            self.told += 1

        attendant: Any = Attendant()
        made = Merging(
            [self.device],
            [Path("/mnt/swap")],
            identities=dict,
            swapoff_thread=attendant,
            is_prompt=lambda: self.is_prompt,
            left=left or {},
        )
        made.when_changed = remember
        return made

    def lose(self, number: int) -> None:
        self.device._mark_lost(number)

    def fail(self, number: int) -> None:
        with pytest.raises(ZswapdError):
            self.device.read_into(number * PAGE, memoryview(bytearray(PAGE)))


@pytest.fixture
def box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Box:
    return Box(tmp_path, monkeypatch)


@pytest.fixture
def unmerged(expect_log: Callable[..., None]) -> None:
    """Announce that the log says so."""
    expect_log(r"requests to /dev/loop\d are not merged", count=None)


@pytest.mark.usefixtures("unmerged")
def test_requests_are_kept_apart_as_long_as_a_page_cannot_be_read(box: Box) -> None:
    box.attach(0)
    box.attach(1, "/srv/image")
    box.attach(2)  # by hand, over the same file
    merging = box.merging()
    box.lose(5)
    assert not trio.run(merging.look), (
        "the kernel has kept what was refused, and reads no such slot"
    )
    assert box.nomerges(0) == "0"
    box.fail(5)
    assert trio.run(merging.look)
    assert [box.nomerges(number) for number in (0, 1, 2)] == ["2", "0", "2"]
    assert merging.remembered() == {
        "loops": ["/dev/loop0", "/dev/loop2"],
        "pages": {"swap": [5]},
        "lost": [],
    }
    assert box.told > 0
    box.attach(3)
    assert trio.run(merging.look)
    assert box.nomerges(3) == "2", "one that came later"
    box.device.discard(5 * PAGE, PAGE)
    assert not trio.run(merging.look)
    assert [box.nomerges(number) for number in (0, 2, 3)] == ["0", "0", "0"]
    assert merging.remembered() == {}


@pytest.mark.usefixtures("unmerged")
def test_loop_device_of_another_file_is_given_back_as_it_was(box: Box) -> None:
    box.attach(0)
    merging = box.merging()
    box.lose(5)
    box.fail(5)
    trio.run(merging.look)
    box.detach(0)
    trio.run(merging.look)
    assert box.nomerges(0) == "0"
    box.attach(0, "/srv/image")
    trio.run(merging.look)
    assert box.nomerges(0) == "0"


@pytest.mark.usefixtures("unmerged")
@pytest.mark.parametrize("is_cured", [False, True])
def test_successor_goes_on_with_it_or_ends_it(box: Box, is_cured: bool) -> None:
    box.attach(0)
    merging = box.merging()
    box.lose(5)
    box.fail(5)
    trio.run(merging.look)
    left = merging.remembered()
    box.device.unreadable.clear()  # as the successor's own
    if is_cured:
        box.device.discard(5 * PAGE, PAGE)
    successor = box.merging(left)
    assert trio.run(successor.look) is not is_cured
    assert box.nomerges(0) == ("0" if is_cured else "2")


@pytest.mark.usefixtures("unmerged")
def test_pages_that_a_takeover_has_found_missing_count_until_none_is_left(box: Box) -> None:
    box.attach(0)
    box.device.write(0, memoryview(b"x" * PAGE))
    box.device.adopt(distrust=True)
    merging = box.merging()
    assert trio.run(merging.look)
    assert box.nomerges(0) == "2"
    assert merging.remembered()["lost"] == ["swap"]
    left = merging.remembered()
    box.device.has_lost_by_damage = False
    assert trio.run(box.merging(left).look), (
        "the next successor finds nothing missing, and has to know"
    )
    box.device.discard(0, 64 * PAGE)
    assert not trio.run(merging.look)
    assert box.nomerges(0) == "0"


def test_queue_is_not_frozen_while_requests_wait_for_a_slow_disk(
    box: Box, autojump_clock: trio.testing.MockClock
) -> None:
    box.attach(0)
    box.is_prompt = False
    merging = box.merging()
    box.lose(5)
    box.fail(5)

    async def look() -> None:
        with trio.move_on_after(60):
            await merging.look()
        assert box.nomerges(0) == "0"
        box.is_prompt = True
        await merging.look()
        assert box.nomerges(0) == "2"

    trio.run(look, clock=autojump_clock)


def test_page_path_wakes_it_and_keeps_few_numbers(box: Box) -> None:
    device = Device("many", 4 * UNREADABLE_MAX * PAGE, box.stack.frontswap, 1, page_size=PAGE)
    calls = []
    device.when_unreadable = lambda: calls.append(1)
    for number in range(2 * UNREADABLE_MAX):
        device._mark_lost(number)
        with pytest.raises(ZswapdError):
            device.read_into(number * PAGE, memoryview(bytearray(PAGE)))
    assert len(device.unreadable) == len(calls) == UNREADABLE_MAX
