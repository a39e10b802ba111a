# SPDX-License-Identifier: GPL-2.0-or-later
"""Advice on settings of the system that affect swap, and that the daemon does not change.

`advise` only reads them. It returns each as a Protection: on means as recommended.
`raise_min_free_kbytes` changes the one that `zswapctl swapon` requires, for machines on which it
has the kernel's default.
"""

from __future__ import annotations

import re
from pathlib import Path

from zswapd.errors import PermissionsError
from zswapd.host.hints import for_failure
from zswapd.system.protections import Protection

_MIN_FREE = "proc/sys/vm/min_free_kbytes"
# 8 pages for each swap-in. At 0, sequential swap-in is slow: each page is a FUSE request.
_PAGE_CLUSTER = 3


def advise(root: Path = Path("/")) -> tuple[Protection, ...]:
    """Return the system's settings, each with its recommendation, without unreadable ones.

    Args:
        root: directory of /proc and /sys, for tests.
    """
    checks = (_min_free_kbytes(root), _page_cluster(root), _kernel_zswap(root))
    return tuple(check for check in checks if check is not None)


def raise_min_free_kbytes(root: Path = Path("/")) -> bool:
    """Raise vm.min_free_kbytes to the recommended value; return whether it was changed.

    A static file in sysctl.d could not, because the value depends on the machine's memory.

    Args:
        root: directory of /proc, for tests.

    Raises:
        PermissionsError: the setting cannot be written.
    """
    found = _min_free(root)
    if found is None or found[0] >= found[1]:
        return False
    path = root / _MIN_FREE
    try:
        path.write_text(f"{found[1]}\n")
    except OSError as error:
        elsewhere = f"set it outside of the container: `sysctl vm.min_free_kbytes={found[1]}`"
        raise PermissionsError(
            f"cannot write {path}: {error.strerror}", hint=for_failure(error, path, elsewhere)
        ) from error
    return True


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _min_free(root: Path) -> tuple[int, int] | None:
    """Return the kernel's own reserve and its recommended value, KiB.

    Loop and FUSE allocate from it while swap is written. Recommended are 2 % of memory, between 16
    and 64 MiB. The kernel's default on a machine of 1 GiB is 4 MiB.
    """
    value = _read(root / _MIN_FREE)
    total = re.search(r"^MemTotal:\s*(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE)
    if not value.isdecimal() or total is None:
        return None
    return int(value), min(max(int(total[1]) // 50, 16 << 10), 64 << 10)


def _min_free_kbytes(root: Path) -> Protection | None:
    found = _min_free(root)
    if found is None:
        return None
    value, wanted = found
    enough = value >= wanted
    hint = None if enough else f"sysctl vm.min_free_kbytes={wanted}"
    return Protection(
        "vm.min_free_kbytes",
        on=enough,
        detail=f"{value}, {wanted} or more is recommended",
        hint=hint,
    )


def _page_cluster(root: Path) -> Protection | None:
    value = _read(root / "proc/sys/vm/page-cluster")
    if not value.isdecimal():
        return None
    enough = int(value) >= _PAGE_CLUSTER
    hint = None if enough else f"sysctl vm.page-cluster={_PAGE_CLUSTER}"
    detail = (
        f"{value}, a swap-in reads {1 << int(value)} pages; {_PAGE_CLUSTER} or more is recommended"
    )
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
