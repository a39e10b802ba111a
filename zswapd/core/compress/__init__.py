# SPDX-License-Identifier: GPL-2.0-or-later
"""Compressors by name.

A new one is a class with the shape of `base.Compressor` in a module of its own, and a line in
`_ALL`.
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
        ConfigError: there is none.
    """
    for compressor in _ALL:
        if compressor.name == name:
            return compressor
    raise ConfigError(f"unknown compressor {name!r}", hint=f"use one of: {', '.join(names())}")


def by_codec() -> dict[int, Compressor]:
    """Return all compressors by the number that object headers carry."""
    return {compressor.codec: compressor for compressor in _ALL}
