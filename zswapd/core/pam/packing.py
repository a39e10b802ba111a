# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the C form of zpages.py comes from: `_pages`, unless it was not built or ZSWAPD_PURE asks for Python alone."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zswapd.core.pam._pages import Packer


def make_packer(memory: memoryview, page_size: int) -> Packer | None:
    """Return a packer for an arena, None where there is none to be had: everything works without."""
    if os.environ.get("ZSWAPD_PURE"):
        return None
    try:
        from zswapd.core.pam._pages import Packer
    except ImportError:
        return None
    return Packer(memory, page_size)
