# SPDX-License-Identifier: GPL-2.0-or-later
"""The compressors by name.

A new compressor is a class like `base.Compressor` in a module of its own, and an entry in `_ALL`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zswapd.core.compress.lz4 import Lz4
from zswapd.core.compress.lzo import Lzo
from zswapd.core.compress.zstd import Zstd
from zswapd.errors import ConfigError

if TYPE_CHECKING:
    from zswapd.core.compress.base import Compressor

_ALL: tuple[Compressor, ...] = (Lz4(), Lzo(), Zstd())


def names() -> tuple[str, ...]:
    """Return the names of all compressors, the default first."""
    return tuple(compressor.name for compressor in _ALL)


def get(name: str) -> Compressor:
    """Return the compressor of that name.

    Raises:
        ConfigError: there is no compressor of that name.
    """
    for compressor in _ALL:
        if compressor.name == name:
            return compressor
    raise ConfigError(f"unknown compressor {name!r}", hint=f"use one of: {', '.join(names())}")


def by_codec() -> dict[int, Compressor]:
    """Return all compressors by their number in object headers."""
    return {compressor.codec: compressor for compressor in _ALL}
