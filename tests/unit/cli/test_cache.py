# SPDX-License-Identifier: GPL-2.0-or-later
"""`zswapctl cache`: from words to commands of a real worker's handlers, and what is printed."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest
import trio

from tests.support.volumes import PAGE, Box, Device, make_file
from zswapd.cli import zswapctl
from zswapd.control.protocol import decode_request, encode_request
from zswapd.volumes.commands import CacheCommands


@pytest.fixture
def box(monkeypatch: pytest.MonkeyPatch) -> Box:
    return Box(Device(monkeypatch))


Ctl = Callable[..., str]


@pytest.fixture
def ctl(
    box: Box, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Any]:
    """Runs zswapctl in a thread, its requests checked as the server checks them.

    Returns what it prints.
    """
    remembered: list[int] = []

    class Client:
        handlers: dict[str, Any]

        def __init__(self, *_: object) -> None:
            pass

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def call(self, command: str, **arguments: object) -> object:
            request = decode_request(encode_request(command, arguments))

            async def answer() -> object:
                result = self.handlers[request.command](**request.arguments)
                return json.loads(
                    json.dumps(await result if inspect.isawaitable(result) else result)
                )

            return trio.from_thread.run(answer)

    monkeypatch.setattr(zswapctl, "Client", Client)
    monkeypatch.setattr(zswapctl.signal, "signal", lambda *_: None)  # not in a thread

    async def run(*words: str, code: int = 0) -> str:
        Client.handlers = CacheCommands(
            box.volumes, box.cache, lambda: remembered.append(1)
        ).handlers()
        assert await trio.to_thread.run_sync(zswapctl.main, ["cache", *words]) == code
        captured = capsys.readouterr()
        return captured.err if code else captured.out

    run.remembered = remembered  # type: ignore[attr-defined]
    return run


async def test_volume_is_added_listed_invalidated_resized_and_removed(
    box: Box, ctl: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_file(tmp_path / "backing", 256)
    monkeypatch.chdir(tmp_path)
    async with box.running():
        assert "there are no volumes" in await ctl("list")
        added = await ctl("add", "disk", "--backing", "backing", "--mode", "writethrough")
        assert added == f"volume disk shows {tmp_path}/backing: 1.0 MiB, writethrough\n"
        volume = box.volumes.find("disk")
        for _ in range(2):
            await volume.read(0, 8 * PAGE)
        listed = await ctl("list")
        assert "50.0%" in listed
        assert f"{tmp_path}/backing" in listed
        assert all(len(line) <= 80 + len(str(tmp_path)) for line in listed.splitlines())
        (row,) = json.loads(await ctl("list", "--json"))["volumes"]
        assert (row["hit_ratio"], row["pages"], row["problem"]) == (0.5, 8, None)
        assert "8 pages of disk dropped" in await ctl("invalidate", "disk")
        os.truncate(tmp_path / "backing", 2 << 20)
        assert "2.0 MiB" in await ctl("resize", "disk")
        assert "is removed" in await ctl("remove", "disk")
        assert "there is no volume disk" in await ctl("remove", "disk", code=15)
        assert len(ctl.remembered) == 2, (
            "a successor is to have what was added, and not what was removed"
        )


async def test_what_is_wrong_with_a_volume_is_told(
    box: Box, ctl: Any, tmp_path: Path, expect_log: Callable[..., None]
) -> None:
    expect_log("a cache volume cannot be used: .*No such file")
    make_file(tmp_path / "backing", 2)
    async with box.running():
        assert "is a directory" in await ctl("add", "dir", "--backing", str(tmp_path), code=15)
        assert "No such file" in await ctl(
            "add", "none", "--backing", str(tmp_path / "none"), code=15
        )
        await ctl("add", "disk", "--backing", str(tmp_path / "backing"))
        (tmp_path / "backing").unlink()
        assert "No such file" in await ctl("resize", "disk", code=15)
        assert "disk: " in await ctl("list")


async def test_freeze_is_told_and_ends(box: Box, ctl: Any) -> None:
    async with box.running():
        assert "frozen" in await ctl("freeze")
        assert box.cache.frozen
        assert "frozen" in await ctl("list") or box.volumes.volumes() == []
        assert "thawed" in await ctl("thaw")
        assert not box.cache.frozen
