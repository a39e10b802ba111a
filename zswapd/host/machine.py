# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel's numbers that differ between machines, and the requirements on a machine.

Words in shared memory are native (`struct` with "=", `memoryview.cast`): a process that adopts
them runs on the same machine. So the byte order does not matter. Two things matter:

- The numbers of some ioctls and mmap flags differ. They are here by the machine's name. All others
  are the same on every machine that is named.
- Each offset, frame number and word of 64 bits is stored by one machine instruction, so the program
  needs a process of 64 bits.

The build (setup.py) and every start refuse a machine that is not named.

Source: arch/*/include/uapi/asm/{ioctl,mman}.h of Linux.
"""

from __future__ import annotations

import os
import sys
from typing import Final, NamedTuple

from zswapd.errors import MachineError

EHWPOISON: Final = 133
"""The errno for memory with an uncorrectable error, the same on all machines below;
Python has no name for it.
"""


class Numbers(NamedTuple):
    """The numbers that differ.

    Attributes:
        ioctl_none: bits of an ioctl that passes a plain argument (_IOC_NONE, shifted).
        map_noreserve: MAP_NORESERVE of mmap(2), for which Python 3.11 has no name.
    """

    ioctl_none: int
    map_noreserve: int


_GENERIC: Final = Numbers(ioctl_none=0, map_noreserve=0x4000)
_POWER: Final = Numbers(ioctl_none=1 << 29, map_noreserve=0x40)
NUMBERS: Final = {
    "x86_64": _GENERIC,
    "aarch64": _GENERIC,
    "riscv64": _GENERIC,
    "loongarch64": _GENERIC,
    "s390x": _GENERIC,
    "ppc64": _POWER,
    "ppc64le": _POWER,
}
"""By the machine's name in uname(2)."""


def numbers(machine: str | None = None) -> Numbers:
    """Return the numbers of a machine, this one by default.

    A machine that is not known gets the generic numbers, so that modules can be imported there;
    `check` refuses to start.
    """
    return NUMBERS.get(machine or os.uname().machine, _GENERIC)


def plain_ioctl(kind: int, number: int, machine: str | None = None) -> int:
    """Return the number of an ioctl without direction (_IO in C)."""
    return numbers(machine).ioctl_none | kind << 8 | number


def check(machine: str | None = None, *, longest: int = sys.maxsize) -> None:
    """Refuse a machine whose numbers are not known.

    Args:
        machine: the machine's name; this one by default.
        longest: the largest index that this Python has.

    Raises:
        MachineError: the machine is refused.
    """
    name = machine or os.uname().machine
    if longest < 1 << 32:
        raise MachineError(
            "zswapd needs a Python of 64 bits, and this one has 32",
            hint=f"install a 64-bit system; known are {_known()}",
        )
    if name not in NUMBERS:
        raise MachineError(
            f"zswapd does not know the kernel's numbers on {name}", hint=f"use one of {_known()}"
        )


def _known() -> str:
    return ", ".join(NUMBERS)
