# SPDX-License-Identifier: GPL-2.0-or-later
"""The FUSE edge of the daemon: one request in, one reply out. No other package uses pyfuse3.

An import of any module here loads `_lowlevel` first. It must come before pyfuse3 in the search
order of the dynamic linker. `_lowlevel.c` defines two functions of libfuse that pyfuse3 calls, and
the linker takes the first definition. Until `session.Session` switches it on, `_lowlevel` passes
all calls on to libfuse. If pyfuse3 was imported earlier, it is already bound to libfuse. The
session detects this and refuses to start.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from zswapd.errors import MountError
from zswapd.host import installation

if TYPE_CHECKING:
    from types import ModuleType


def _load_globally() -> tuple[ModuleType | None, str]:
    """Import `_lowlevel` into the global symbol scope; return it, or None and the reason."""
    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_NOW | os.RTLD_GLOBAL)
    try:
        from zswapd.fuse import _lowlevel
    except ImportError as error:
        return None, str(error)
    finally:
        sys.setdlopenflags(flags)
    return _lowlevel, ""


lowlevel, lowlevel_problem = _load_globally()


def hook_error(problem: str) -> MountError:
    """Return the error of a program whose hook cannot be used."""
    return MountError(
        f"the FUSE hook cannot be used: {problem}", hint=installation.found().reinstall()
    )


def require_hook() -> None:
    """Check that the hook was built and can be loaded.

    Raises:
        MountError: it cannot.
    """
    if lowlevel is None:
        raise hook_error(lowlevel_problem)
