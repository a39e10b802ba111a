# SPDX-License-Identifier: GPL-2.0-or-later
"""[swap.files.NAME]: the settings that a swap file has for itself, in all sources."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from zswapd import config
from zswapd.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20
GUEST = '[swap.files.guest]\nsize = "1G"\nlimit = "100M"\nweight = 300\n'


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: {6 << 20} kB\n")
    (tmp_path / "etc/zswapd/zswapd.toml.d").mkdir(parents=True)
    return tmp_path


def load(root: Path, text: str = "", *assignments: tuple[str, str]) -> config.Config:
    (root / "etc/zswapd/zswapd.toml").write_text(text)
    rows = [(dest, value, "--set") for dest, value in assignments]
    return config.load(codecs=("lz4", "lzo"), assignments=rows, root=root)


def test_table_has_size_and_client_and_the_short_form_has_the_defaults(root: Path) -> None:
    found = load(root, f'{GUEST}\n[swap.files.tier]\nsize = "2G"\nwriteback = "never"\n')
    assert found.swap_files()["guest"] == 1 << 30
    guest, tier, first = (found.clients[name] for name in ("guest", "tier", "swap"))
    assert (guest.limit, guest.weight, guest.writeback) == (100 * MIB, 300, "disk")
    assert (tier.limit, tier.writeback, tier.priority, tier.compressor) == (None, "never", None, "")
    assert (first.limit, first.weight) == (None, 100)
    assert load(root, '[swap.files]\nguest = "1G"\n').clients["guest"] == first


def test_drop_in_changes_one_key_of_a_file(root: Path) -> None:
    (root / "etc/zswapd/zswapd.toml.d/a.toml").write_text("[swap.files.guest]\nweight = 50\n")
    guest = load(root, GUEST).clients["guest"]
    assert (guest.limit, guest.weight) == (100 * MIB, 50)


def test_first_file_has_its_settings_without_a_size(root: Path) -> None:
    found = load(root, '[swap.files.swap]\nlimit = "1G"\n', ("swap.files.swap.weight", "7"))
    assert (found.clients["swap"].limit, found.clients["swap"].weight) == (1 << 30, 7)


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ('[swap.files.g]\nsize = "1G"\nlimits = "1G"\n', "toml:1.*unknown setting limits", "limit"),
        ('[swap.files.g]\nlimit = "1G"\n', "toml:2.*no swap file g", "swap.files.g.size"),
        ("[swap.files.g]\n", "is {}", "write"),
        ('[swap.files.g]\nsize = "1G"\nweight = 0\n', r"toml:3: swap\.files\.g\.weight", "whole"),
        ('[swap.files.g]\nsize = "1G"\nwriteback = "tape"\n', "not known", "disk"),
        ('[swap.files.swap]\nsize = "1G"\n', "reserved", "another"),
        ('[swap.files.g]\nsize = "1G"\ncompressor = "gzip"\n', "gzip", "lz4"),
        ('[swap]\nsize = ""\n[swap.files.swap]\nlimit = "1G"\n', "no swap file swap", "swap.size"),
    ],
)
def test_bad_tables_are_refused_with_their_line(
    root: Path, text: str, message: str, hint: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(root, text)
    assert hint in str(caught.value.hint)


def test_settings_of_a_file_change_at_run_time_and_are_described(root: Path) -> None:
    before = load(root, GUEST)
    after = config.changed(before, {"swap.files.guest.limit": "50M"}, source="zswapctl set")
    assert after.clients["guest"].limit == 50 * MIB
    assert after.clients["guest"].weight == 300
    (row,) = config.describe(after, ["swap.files.guest.limit"]).items()
    assert row[0] == "swap.files.guest.limit"
    assert (row[1]["value"], row[1]["origin"], row[1]["reloadable"]) == (
        50 * MIB,
        "zswapctl set",
        True,
    )
    assert "swap.files.guest.weight" in config.describe(after)
    off = config.changed(after, {"swap.files.guest.limit": ""}, source="zswapctl set")
    assert off.clients["guest"].limit is None


@pytest.mark.parametrize(
    "settings",
    [
        {"swap.files.guest": "2G"},
        {"swap.files.guest.size": "2G"},
        {"swap.files.other.limit": "1G"},
        {"swap.files.guest.limit": "1G", "swap.files.guest.weight": "-1"},
    ],
)
def test_change_that_is_not_right_changes_nothing(root: Path, settings: dict[str, object]) -> None:
    before = load(root, GUEST)
    with pytest.raises(ConfigError):
        config.changed(before, settings, source="zswapctl set")


def test_successor_gets_the_settings_of_each_file(root: Path) -> None:
    before = load(root, GUEST)
    document = config.to_document(before)
    assert config.from_document(document, ("lz4", "lzo")).clients == before.clients


def test_file_whose_name_ends_like_a_setting_is_still_a_file(root: Path) -> None:
    """Programs before these settings had no other meaning for the name."""
    text = '[swap.files]\n"a.limit" = "1G"\n'
    assert load(root, text).swap_files()["a.limit"] == 1 << 30
    assert load(root, "", ("swap.files.a.limit", "1G")).swap_files()["a.limit"] == 1 << 30
