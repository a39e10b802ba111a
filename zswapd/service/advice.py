# SPDX-License-Identifier: GPL-2.0-or-later
"""Settings of the system that are not the daemon's to change, but that decide how well its swap works.

Read-only. Each is returned in a Protection's form: on means as recommended.
"""

from __future__ import annotations

import re
from pathlib import Path

from zswapd.service.protections import Protection

_PAGE_CLUSTER = 3  # 8 pages a swap-in; at 0 sequential swap-in collapses (one request through FUSE for each page)


def advise(root: Path = Path("/")) -> tuple[Protection, ...]:
    """Return which of the system's settings are as recommended; what cannot be read is left out.

    Args:
        root: where /proc and /sys are, for tests.
    """
    checks = (_min_free_kbytes(root), _page_cluster(root), _kernel_zswap(root))
    return tuple(check for check in checks if check is not None)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _min_free_kbytes(root: Path) -> Protection | None:
    """The kernel's own reserve, which its loop and FUSE drivers live on while swap is written out.

    Recommended: 2 % of memory, between 16 and 64 MiB. The kernel's default on a box of 1 GiB is 4 MiB.
    """
    value = _read(root / "proc/sys/vm/min_free_kbytes")
    total = re.search(r"^MemTotal:\s*(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE)
    if not value.isdecimal() or total is None:
        return None
    wanted = min(max(int(total[1]) // 50, 16 << 10), 64 << 10)
    enough = int(value) >= wanted
    hint = None if enough else f"sysctl vm.min_free_kbytes={wanted}"
    return Protection("vm.min_free_kbytes", on=enough, detail=f"{value}, {wanted} or more is recommended", hint=hint)


def _page_cluster(root: Path) -> Protection | None:
    value = _read(root / "proc/sys/vm/page-cluster")
    if not value.isdecimal():
        return None
    enough = int(value) >= _PAGE_CLUSTER
    hint = None if enough else f"sysctl vm.page-cluster={_PAGE_CLUSTER}"
    detail = f"{value}, a swap-in reads {1 << int(value)} pages; {_PAGE_CLUSTER} or more is recommended"
    return Protection("vm.page-cluster", on=enough, detail=detail, hint=hint)


def _kernel_zswap(root: Path) -> Protection | None:
    value = _read(root / "sys/module/zswap/parameters/enabled")
    if not value:
        return None
    if value not in ("Y", "1"):
        return Protection("kernel zswap", on=True, detail="off, as it should be")
    return Protection(
        "kernel zswap",
        on=False,
        detail="on: pages would be compressed twice and zswapd would see only what zswap evicts",
        hint="echo N > /sys/module/zswap/parameters/enabled",
    )
