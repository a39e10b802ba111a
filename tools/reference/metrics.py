# SPDX-License-Identifier: GPL-2.0-or-later
"""The reference of metrics, docs/metrics.md, from the families in zswapd/metrics/families.py."""

from __future__ import annotations

from zswapd.metrics.families import described

_INTRODUCTION = """\
<!-- Written by scripts/reference from zswapd/metrics/families.py. -->
# Metrics

What Prometheus is told, in the order of the answer; [operations.md](operations.md) says where, and what to look at when. Names
in parentheses are the kernel's (zcache's, frontswap's, zram's, zswap's), by which the same counter is a file of `stats/`. What
belongs to a part that is not configured (cache, disk behind the pool, zsmalloc) is not told of.

A label has one value for each reason, protection, swap file, volume or size class in use: never one for a page or a client.

| metric | kind | label | what it is |
|---|---|---|---|
"""


def metrics_md() -> str:
    """Return the page."""
    rows = (
        f"| `{one.name}` | {one.kind} | {f'`{one.label}`' if one.label else ''} | {one.help} |\n"
        for one in described()
    )
    return _INTRODUCTION + "".join(rows)
