# SPDX-License-Identifier: GPL-2.0-or-later
"""Waiting for a descriptor, whatever its number: select(2) takes none above 1023."""

from __future__ import annotations

import select


def is_readable(descriptor: int, timeout_s: float) -> bool:
    """Wait until a descriptor is readable or the time is up; return whether it is readable."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))
