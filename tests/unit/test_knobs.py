# SPDX-License-Identifier: GPL-2.0-or-later
"""Settings as files take whatever is written to them, or refuse it with EINVAL: never anything in between."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zswapd import compress
from zswapd.config import SETTINGS, changed, describe, load
from zswapd.errors import ConfigError
from zswapd.knobs import Knob

RELOADABLE = sorted(dest for dest, setting in SETTINGS.items() if setting.reloadable)


class Settings:
    """The settings of a daemon."""

    def __init__(self) -> None:
        self.config = load(codecs=compress.names())

    def change(self, settings: dict[str, object]) -> None:
        self.config = changed(self.config, settings, source="test")

    def knob(self, dest: str) -> Knob:
        return Knob(dest, lambda: self.config, self.change)


WRITTEN = st.one_of(
    st.binary(max_size=40),
    st.text(max_size=30).map(str.encode),
    st.sampled_from(
        [b"1", b"4096\n", b"true\n", b"lzo\n", b"32M", b"50%", b"min(1G, 10%)", b"error", b"store\n", b"nan", b"1e9"]
    ),
)


@given(dest=st.sampled_from(RELOADABLE), data=WRITTEN)
def test_it_is_taken_whole_or_refused_whole(dest: str, data: bytes) -> None:
    settings = Settings()
    before = describe(settings.config)
    knob = settings.knob(dest)
    try:
        knob.write(data)
    except ConfigError:  # EINVAL
        assert describe(settings.config) == before
        return
    after = describe(settings.config)
    assert {name for name in after if after[name] != before[name]} <= {dest}
    content = knob.read()
    knob.write(content)  # what it says can be written
    assert knob.read() == content


def test_every_setting_can_be_read() -> None:
    settings = Settings()
    settings.config = replace(settings.config, swap=replace(settings.config.swap, files={"more": 4096 * 10}))
    settings.config = replace(settings.config, cache=replace(settings.config.cache, volumes={"disk": "ro:/dev/sda"}))
    assert settings.knob("swap.files").read() == b"more 40960\n"
    for dest in SETTINGS:
        assert settings.knob(dest).read().endswith(b"\n")


@pytest.mark.parametrize("data", [b"x" * 4097, b" " * 5000])
def test_a_value_is_no_longer_than_a_page(data: bytes) -> None:
    with pytest.raises(ConfigError):
        Settings().knob("pool.compressor").write(data)
