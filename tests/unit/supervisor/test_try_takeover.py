# SPDX-License-Identifier: GPL-2.0-or-later
"""What an upgrade is refused for before the worker that serves is told to leave."""

from __future__ import annotations

import resource
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.successor import make_config
from zswapd.core import compress
from zswapd.core.allocators.pageframes import PageFrames
from zswapd.core.compress.lzo import Lzo
from zswapd.core.core import Core
from zswapd.core.selftest import sample_pages
from zswapd.errors import ArenaError, HandoverError
from zswapd.supervisor import upgrade_check


@pytest.mark.parametrize("size", [4096, 16384, 65536])
@pytest.mark.parametrize("allocator", ["zsmalloc", "zbud"])
def test_program_as_it_is_passes(allocator: str, size: int) -> None:
    upgrade_check.try_takeover(
        make_config("swap.size=1G", f"pool.allocator={allocator}", page_size=size)
    )


def test_rehearsal_costs_little_whatever_the_settings_say(tmp_path: Any) -> None:
    config = make_config(
        "swap.size=256G",
        "memory.reserve=8G",
        "cache.limit=1G",
        "swap.files.more=64G",
        "metrics.listen=",
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    upgrade_check.try_takeover(config)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10


def fails(*_: object) -> None:
    raise ArenaError("cannot be")


def does_nothing(*_: object) -> int:
    return 0


@pytest.mark.parametrize(
    ("what", "name", "how"),
    [
        (Core, "_recover", fails),
        (Core, "_recover", does_nothing),
        (Core, "self_test", fails),
        (Lzo, "decompress", fails),
        (PageFrames, "adopt", does_nothing),
    ],
)
def test_program_whose_workers_would_not_come_up_is_refused(
    what: type, name: str, how: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        monkeypatch.setattr(what, name, how)
    except TypeError:  # a compiled class: the pure run shows it
        return
    with pytest.raises(HandoverError, match="rehearsal"):
        upgrade_check.try_takeover(make_config())


@pytest.mark.parametrize("size", [4096, 16384, 65536])
@pytest.mark.parametrize("codec", compress.names())
def test_sample_pages_try_every_codec(codec: str, size: int) -> None:
    _same, compresses, _poorly, noise = sample_pages(size)
    compressor = compress.get(codec)
    data = compressor.compress(memoryview(compresses))
    assert len(data) < size // 2, "it is kept compressed"
    assert compressor.decompress(memoryview(data), size) == compresses
    assert len(compressor.compress(memoryview(noise))) >= size


def test_program_without_its_hook_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upgrade_check, "lowlevel", None)
    monkeypatch.setattr(upgrade_check, "lowlevel_problem", "no such file")
    with pytest.raises(HandoverError, match="no such file"):
        upgrade_check.try_takeover(make_config())
