# SPDX-License-Identifier: GPL-2.0-or-later
"""How much memory the system has to spare, by the kernel's own measure: free pages above the zones' high watermarks.

Below those marks kswapd is at work, and whoever allocates helps it or waits. A refill of the reserve is for later, so it keeps
away from there. Reading /proc allocates in the kernel: never on the page path.
"""

from __future__ import annotations

import re
from pathlib import Path

_ZONE = re.compile(r"^Node \d+, zone +(\S+)\n.*?pages free +(\d+)\n.*?high +(\d+)\n", re.MULTILINE | re.DOTALL)


def spare_pages(root: Path = Path("/")) -> int:
    """Return the free pages above the high watermarks, summed over all zones that have any; 0 if the kernel does not say.

    Args:
        root: where /proc is, for tests.
    """
    try:
        text = (root / "proc/zoneinfo").read_text()
    except OSError:
        return 0
    return sum(max(0, int(free) - int(high)) for _zone, free, high in _ZONE.findall(text))
