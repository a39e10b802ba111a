# SPDX-License-Identifier: GPL-2.0-or-later
"""The generator of docs/metrics.md, from the families in zswapd/metrics/families.py."""

from __future__ import annotations

from zswapd.metrics.families import described

_INTRODUCTION = """\
<!-- Written by scripts/reference from zswapd/metrics/families.py. -->
# Metrics

These are the metrics for Prometheus, in the order of the daemon's answer.
[operations.md](operations.md) says where to read them, and which to watch. Names in parentheses are
the kernel's (zcache's, frontswap's, zram's, zswap's); the same counter is a file of that name in
`stats/`. A part that is not configured (cache, disk behind the pool, zsmalloc) has no metrics.

A label has one value for each reason, protection, swap file, volume or size class in use. It never
has one for each page or client.

| metric | kind | label | meaning |
|---|---|---|---|
"""


def metrics_md() -> str:
    """Return the text of docs/metrics.md."""
    rows = (
        f"| `{one.name}` | {one.kind} | {f'`{one.label}`' if one.label else ''} | {one.help} |\n"
        for one in described()
    )
    return _INTRODUCTION + "".join(rows)
