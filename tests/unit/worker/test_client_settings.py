# SPDX-License-Identifier: GPL-2.0-or-later
"""The settings of a worker while swap files come and go."""

from __future__ import annotations

import pytest

from tests.support.successor import make_config
from zswapd.config import with_files
from zswapd.errors import ConfigError
from zswapd.worker.settings import Settings

MIB = 1 << 20


def test_file_that_comes_with_the_files_has_its_settings_from_there() -> None:
    whole = make_config("swap.files.guest=8M", "swap.files.guest.limit=2M")
    settings = Settings(with_files(whole, {"swap": 4 * MIB}, source="test"), {}, whole)
    assert "guest" not in settings.current.swap_files()
    settings.take(settings.with_files({"swap": 4 * MIB, "guest": 8 * MIB}, {}))
    assert settings.current.client("guest").limit == 2 * MIB


def test_changes_of_a_file_go_with_it() -> None:
    settings = Settings(make_config(), {})
    sizes = {"swap": 4 * MIB, "guest": 8 * MIB}
    settings.take(settings.with_files(sizes, {"swap.files.guest.limit": "1M"}))
    settings.change({"swap.files.guest.weight": "7", "pool.checksum": False})
    client = settings.current.client("guest")
    assert (client.limit, client.weight) == (MIB, 7)
    settings.take(settings.with_files({"swap": 4 * MIB}, {}))
    assert settings.changes == {"pool.checksum": False}
    with pytest.raises(ConfigError):
        settings.change({"swap.files.guest.weight": "7"})
