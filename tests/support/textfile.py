# SPDX-License-Identifier: GPL-2.0-or-later
"""A `TextFile` that counts its reads and keeps its value."""

from __future__ import annotations

from zswapd.errors import ConfigError


class SettingFile:
    """A file with a number.

    Args:
        writable: whether a write can set it.

    Attributes:
        value: the number.
        reads: the number of reads.
    """

    def __init__(self, *, writable: bool = True) -> None:
        self.writable = writable
        self.value = 0
        self.reads = 0

    def read(self) -> bytes:
        """Return the number and count the read."""
        self.reads += 1
        return b"%d read %d\n" % (self.value, self.reads)

    def write(self, data: bytes) -> None:
        """Set the number, or refuse."""
        try:
            self.value = int(data)
        except ValueError:
            raise ConfigError(f"{data!r} is no number", hint="write one") from None
