# SPDX-License-Identifier: GPL-2.0-or-later
"""Settings of the system that are not the daemon's to change.

But that decide how well its swap works.

`advise` only reads, and returns each in a Protection's form: on means as recommended.
`raise_min_free_kbytes` changes the one that `zswapctl swapon` insists on, for machines where nobody
has.
"""

from __future__ import annotations

import re
from pathlib import Path

from zswapd.errors import PermissionsError
from zswapd.host.hints import for_failure
from zswapd.system.protections import Protection

_MIN_FREE = "proc/sys/vm/min_free_kbytes"
_PAGE_CLUSTER = 3  # 8 pages a swap-in; at 0 sequential swap-in collapses (one request through FUSE for each page)


def advise(root: Path = Path("/")) -> tuple[Protection, ...]:
    """Return which of the system's settings are as recommended; what cannot be read is left out.

    Args:
        root: where /proc and /sys are, for tests.
    """
    checks = (_min_free_kbytes(root), _page_cluster(root), _kernel_zswap(root))
    return tuple(check for check in checks if check is not None)


def raise_min_free_kbytes(root: Path = Path("/")) -> bool:
    """Set vm.min_free_kbytes to what is recommended if it is less; return whether it was changed.

    A static file in sysctl.d cannot: what is right depends on the machine's memory.

    Args:
        root: where /proc is, for tests.

    Raises:
        PermissionsError: it cannot be written.
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
    """Return the kernel's own reserve, as it is and as it should be.

    Loop and FUSE live on it while swap is written.

    Recommended: 2 % of memory, between 16 and 64 MiB. The kernel's default on a box of 1 GiB is 4
    MiB.
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
