# SPDX-License-Identifier: GPL-2.0-or-later
"""A `TextFile` that remembers what was done to it."""

from __future__ import annotations

from zswapd.errors import ConfigError


class SettingFile:
    """A number that can be read and set.

    Args:
        writable: whether it can be set.

    Attributes:
        value: the number.
        reads: how often the content was made.
    """

    def __init__(self, *, writable: bool = True) -> None:
        self.writable = writable
        self.value = 0
        self.reads = 0

    def read(self) -> bytes:
        """The number, and how often it was asked for."""
        self.reads += 1
        return b"%d read %d\n" % (self.value, self.reads)

    def write(self, data: bytes) -> None:
        """Take a number, or refuse."""
        try:
            self.value = int(data)
        except ValueError:
            raise ConfigError(f"{data!r} is no number", hint="write one") from None
