# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands that take long tell how far they are, or their clients would lose their patience.

What is told of counters.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from tests.support.snapshots import make_core
from tests.support.successor import make_config
from zswapd.core.core import Core
from zswapd.errors import ControlError, HandoverError
from zswapd.system.offload import Offload
from zswapd.worker import progress, successor
from zswapd.worker.commands import Commands
from zswapd.worker.successor import StateSaver
from zswapd.worker.upgrade import Upgrade

LONG_S = 0.3


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> Iterator[Core]:
    monkeypatch.setattr(progress, "PROGRESS_S", LONG_S / 10)
    core = make_core()
    yield core
    core.close()


def handler(core: Core, name: str, **other: object) -> Any:
    config = make_config()
    words = SimpleNamespace(
        load=dict,
        note_codecs=lambda _: None,
        layout=1,
        geometry={},
        words=dict.fromkeys(range(8), 0),
    )
    parts = {
        "swapoff_thread": Offload("swapoff"),
        "core": core,
        "state": words,
        "session": SimpleNamespace(),
        "parent": SimpleNamespace(is_alive=lambda: True),
        "disk": None,
        "settings": SimpleNamespace(current=config, configured=config, change=None, reset=None),
        **other,
    }
    those: Any = SimpleNamespace(**parts)
    saver: Any = SimpleNamespace(save_state=lambda: None, takeover_s=0.0)
    return Commands(those, saver, Upgrade(those, saver)).handlers()[name]


async def collected(command: Any, news: list[Any] | None = None, **arguments: object) -> list[Any]:
    """Run a command and return what it told on the way."""
    told: list[Any] = [] if news is None else news

    async def report(value: object) -> None:
        told.append(json.loads(json.dumps(value)))

    with trio.fail_after(20):
        await command(report=report, **arguments)
    return told


class Slow:
    """A job that is done when LONG_S has passed."""

    def __init__(self) -> None:
        self._end = trio.current_time() + LONG_S

    def goes_on(self, *_: object) -> bool:
        return trio.current_time() < self._end


async def test_compact_tells(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "compact_step", Slow().goes_on)
    news = await collected(handler(core, "compact"))
    assert len(news) >= 4
    assert set(news[0]) == {"frames_freed"}


async def test_shrink_tells(core: Core) -> None:
    class Shrinking:
        async def shrink(self, frames: int) -> int:
            await trio.sleep(LONG_S)
            return frames

    news = await collected(handler(core, "shrink", shrinking=Shrinking()), frames=3)
    assert len(news) >= 4
    assert news[0] == {"frames_freed": 0}


async def test_recompress_tells(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow()
    monkeypatch.setattr(
        type(core.recompression),
        "is_running",
        property(lambda _: slow.goes_on(), lambda *_: None),
        raising=False,
    )
    news = await collected(handler(core, "recompress"))
    assert len(news) >= 3
    assert set(news[0]) == {"tried"}


async def test_writeback_tells(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow()

    class Writeback:
        in_flight = 0

        def command(self, pages: int, *, incompressible: bool, unused_s: float) -> None:
            assert (pages, incompressible, unused_s) == (7, False, 0)

        @property
        def commanded(self) -> int:
            return int(slow.goes_on())

        def statistics(self, *, ages_sampled: bool) -> None:
            return None

    monkeypatch.setattr(core, "writeback", Writeback())
    news = await collected(handler(core, "writeback"), pages=7)
    assert len(news) >= 4
    assert set(news[0]) == {"written_back"}


@pytest.mark.parametrize("more", [{"pages": 7}, {"incompressible": True}, {"unused": 60}], ids=str)
async def test_pages_are_marked_as_unused_all_together(
    core: Core, more: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    marks: list[bool] = []

    class Writeback:
        def mark_idle(self) -> None:
            marks.append(True)

    monkeypatch.setattr(core, "writeback", Writeback())
    with pytest.raises(ControlError, match="no other option"):
        await collected(handler(core, "writeback"), idle=True, **more)
    assert not marks
    await collected(handler(core, "writeback"), idle=True)
    assert marks


async def test_upgrade_tells_while_the_installed_program_is_checked(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sys, "orig_argv", ["", "-c", f"import time; time.sleep({LONG_S}); raise SystemExit('no')"]
    )
    news: list[object] = []
    with pytest.raises(HandoverError, match="cannot take over: no"):
        await collected(handler(core, "upgrade"), news)
    assert len(news) >= 4
    assert news[0] == {"seconds_of_checking_the_installed_program": 0}


async def test_a_job_goes_on_when_its_client_has_left(core: Core) -> None:
    done = []

    class Shrinking:
        async def shrink(self, frames: int) -> int:
            await trio.sleep(LONG_S)
            done.append(frames)
            return frames

    async def report(_: object) -> None:
        raise trio.BrokenResourceError

    await handler(core, "shrink", shrinking=Shrinking())(report=report, frames=3)
    assert done == [3]


def test_what_is_told_is_fresh_noted_and_taken_no_oftener_than_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Taking it stops the loop that serves pages, and every user of the machine may ask."""
    taken, noted, now = [], [], [100.0]

    def statistics(*, ages_sampled: bool) -> str:
        taken.append(ages_sampled)
        return f"snapshot {len(taken)}"

    saver: Any = SimpleNamespace(_taken=None, statistics=statistics, save_state=noted.append)
    monkeypatch.setattr(successor, "time", SimpleNamespace(monotonic=lambda: now[0]))
    snapshot: Any = StateSaver.snapshot
    assert snapshot(saver) == "snapshot 1"
    for _ in range(100):
        assert snapshot(saver) == "snapshot 1"
    assert snapshot(saver, ages_sampled=True) == "snapshot 2"
    now[0] += 2 * successor.FRESH_S
    assert snapshot(saver) == "snapshot 3"
    assert taken == [False, True, False]
    assert noted == ["snapshot 1", "snapshot 2", "snapshot 3"]
