# SPDX-License-Identifier: GPL-2.0-or-later
"""zsmalloc's size classes: the object sizes that exist, and the frames of a zspage of each.

Pure arithmetic. A class holds objects of one size in zspages of 1 to N frames. N adjacent frames
waste less at their end than one frame does. Sizes go from 32 bytes to a page in steps of page/256,
which is 16 bytes for 4 KiB pages. So rounding up costs less than half a percent of a page.

Neighbouring sizes with the same zspage (as many frames, as many objects) are one class, with the
largest of these sizes. That costs no memory and leaves fewer half-filled zspages. So the class of a
whole page, one object in one frame, has all sizes that gain nothing from sharing.

Source of the ideas: zsmalloc (Nitin Gupta, 2012): its classes and merging, with a longer chain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MIN_ALLOC_SIZE: Final = 32
"""The smallest object in bytes: a header of 24 bytes and eight bytes of data."""

FULLNESS_GROUPS: Final = 10
"""The number of groups of zspages with room, by tenths of their objects in use."""


@dataclass(frozen=True, slots=True)
class SizeClass:
    """One size class.

    Attributes:
        number: index in the pool's list of classes.
        size: bytes of an object.
        frames: frames of a zspage.
        objects: objects in a zspage.
        group_of: fullness group for each number of objects in use. 0 is the emptiest group,
            FULLNESS_GROUPS means full.
    """

    number: int
    size: int
    frames: int
    objects: int
    group_of: tuple[int, ...]


def frames_for(size: int, page_size: int, max_frames: int) -> int:
    """Return the frames, 1 to `max_frames`, with the least waste for objects of `size` bytes."""
    return min(
        range(1, max_frames + 1), key=lambda frames: (frames * page_size % size / frames, frames)
    )


def build_classes(page_size: int, max_frames: int) -> tuple[list[SizeClass], list[int]]:
    """Return the size classes for one page size, and a table to look them up.

    Args:
        page_size: bytes of a frame.
        max_frames: longest zspage, in frames.

    Returns:
        The classes by ascending size, and class numbers indexed by size in steps, rounded up. The
        class of an object of s bytes is `classes[table[(s + step - 1) // step]]`, with step =
        page_size // 256.
    """
    step = page_size // 256
    shapes: list[tuple[int, int, int]] = []
    for size in range(max(MIN_ALLOC_SIZE, step), page_size + 1, step):
        frames = frames_for(size, page_size, max_frames)
        objects = frames * page_size // size
        if shapes and shapes[-1][1:] == (frames, objects):
            shapes.pop()
        shapes.append((size, frames, objects))
    classes = [
        SizeClass(
            number,
            size,
            frames,
            objects,
            tuple(used * FULLNESS_GROUPS // objects for used in range(objects + 1)),
        )
        for number, (size, frames, objects) in enumerate(shapes)
    ]
    table: list[int] = []
    number = 0
    for steps in range(page_size // step + 1):
        if steps * step > classes[number].size:
            number += 1
        table.append(number)
    return classes, table
