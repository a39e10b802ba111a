# SPDX-License-Identifier: GPL-2.0-or-later
"""The top edge: one FUSE request in, one reply out. The only package that knows pyfuse3.

Importing any part of it loads `_lowlevel` first, which has to come before pyfuse3 in the search
order of the dynamic linker: `_lowlevel.c` defines two functions of libfuse that pyfuse3 calls, and
the first definition found wins. Loaded, it only passes calls on; `session.Session` switches it on.
A pyfuse3 that somebody imported earlier is bound to libfuse already: the session notices and goes
without.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

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
