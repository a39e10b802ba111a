# SPDX-License-Identifier: GPL-2.0-or-later
"""The key of the backing: made once, and handed from worker to worker in the shared state.

Only the shared state has the key. When the last process that has the shared state is dead, no
process can decrypt the pages on the disk.

A copy with a checksum is in another page of memory. A wrong key makes no wrong data, because
decrypted pages would not match their checksums. But it would cost all pages on the disk.
"""

from __future__ import annotations

import logging
import mmap
import os
from typing import TYPE_CHECKING, Final

from xxhash import xxh3_64_digest

from zswapd.core.backing.store import KEY_BYTES

if TYPE_CHECKING:
    from zswapd.handover.state import SharedState

log = logging.getLogger(__name__)

KEY: Final = "backing.key"
KEY_COPY: Final = "backing.key.copy"
_CHECK_BYTES: Final = 8
"""Checksum behind the copy."""
COPY_BYTES: Final = mmap.PAGESIZE + KEY_BYTES + _CHECK_BYTES
"""Size of the copy's area. The copy is at its end, in another page than the key."""


def make_key(state: SharedState) -> None:
    """Put a random key into a new shared state."""
    key = os.urandom(KEY_BYTES)
    state.area(KEY)[:] = key
    _copy_key(state, key)


def find_key(state: SharedState) -> memoryview:
    """Return the key; it is restored from its copy if it has changed in memory.

    A program without copies (0.1.0) has made none: its key is used as it is.
    """
    key = state.area(KEY)
    if KEY_COPY in state.areas:
        copy = bytes(state.area(KEY_COPY)[-KEY_BYTES - _CHECK_BYTES :])
        whole, check = copy[:KEY_BYTES], copy[KEY_BYTES:]
        if xxh3_64_digest(whole) != check:
            _copy_key(state, bytes(key))
        elif whole != key:
            log.error("the key of the backing has changed in memory: its copy is used")
            key[:] = whole
    return key


def _copy_key(state: SharedState, key: bytes) -> None:
    state.area(KEY_COPY)[-KEY_BYTES - _CHECK_BYTES :] = key + xxh3_64_digest(key)
