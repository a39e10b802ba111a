# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel's own rival: zram, a compressed RAM disk as swap device."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import ClassVar

from tools.bench.contenders.base import Contender, MemoryUse
from tools.bench.harness import system

CONTROL = Path("/sys/class/zram-control")
MM_STAT = (
    "orig_data_size",
    "compr_data_size",
    "mem_used_total",
    "mem_limit",
    "mem_used_max",
    "same_pages",
    "pages_compacted",
    "huge_pages",
)
"""The columns of /sys/block/zram*/mm_stat; newer kernels append more."""


class ZramLz4(Contender):
    """A free zram device with lz4; a new device if all are in use."""

    name: ClassVar[str] = "zram-lz4"
    algorithm: ClassVar[str] = "lz4"

    def __init__(self) -> None:
        self._number: int | None = None
        self._added = False

    @property
    def _device(self) -> str:
        return f"/dev/zram{self._number}"

    def _sysfs(self, name: str) -> Path:
        return Path(f"/sys/block/zram{self._number}") / name

    def missing(self) -> str:
        """Return why there is no zram here, or an empty string."""
        if not CONTROL.exists():
            with contextlib.suppress(system.HarnessError):
                system.run("modprobe", "zram")
        return "" if CONTROL.exists() else "this kernel has no zram (modprobe zram does not help)"

    def _take_device(self) -> None:
        for disksize in sorted(Path("/sys/block").glob("zram*/disksize")):
            number = int(disksize.parent.name.removeprefix("zram"))
            if disksize.read_text().strip() == "0" and Path(f"/dev/zram{number}").exists():
                self._number = number
                return
        self._number = int((CONTROL / "hot_add").read_text())
        self._added = True

    def start(self, size: int) -> None:
        """Set a free device up and run swapon.

        zram needs no discard: the kernel reports each freed slot to it (swap_slot_free_notify).
        """
        self._take_device()
        try:
            self._sysfs("comp_algorithm").write_text(self.algorithm)
            self._sysfs("disksize").write_text(str(size))
        except OSError as exc:
            raise system.HarnessError(
                f"{self._device} cannot be set up for {self.algorithm}: {exc.strerror}"
            ) from exc
        system.swap_on(self._device, discard=False)

    def devices(self) -> list[str]:
        """Return the path of its device, while there is one."""
        return [self._device] if self._number is not None else []

    def memory_used(self) -> MemoryUse:
        """Return mem_used_total, with the allocator's waste, without the table of pages."""
        stat = dict(
            zip(MM_STAT, map(int, self._sysfs("mm_stat").read_text().split()), strict=False)
        )
        return MemoryUse(
            stat["mem_used_total"], stat["mem_used_total"], stat["compr_data_size"], stat
        )

    def stop(self) -> None:
        """Swap off and reset the device."""
        if self._number is None:
            return
        system.swap_off(self._device)
        self._sysfs("reset").write_text("1")
        if self._added:
            (CONTROL / "hot_remove").write_text(str(self._number))
        self._number = None


class ZramLzoRle(ZramLz4):
    """A zram device with lzo-rle, the kernel's default."""

    name: ClassVar[str] = "zram-lzo-rle"
    algorithm: ClassVar[str] = "lzo-rle"
