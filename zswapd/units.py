# SPDX-License-Identifier: GPL-2.0-or-later
"""Quantities as text for users."""

from __future__ import annotations


def format_size(count: int) -> str:
    """Return a byte count as text: `512.0 MiB`, `1.5 GiB`, `17 B`."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
