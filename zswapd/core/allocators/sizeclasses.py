# SPDX-License-Identifier: GPL-2.0-or-later
"""zsmalloc's size classes: which object sizes exist, and how many frames a zspage of each has.

Pure arithmetic.

A class holds objects of one size in zspages of 1 to N frames; N frames side by side waste less at
their end than one does. Sizes go from 32 bytes to a page in steps of page/256 (16 bytes for 4 KiB
pages), so that rounding up costs under half a percent of a page. Neighbouring sizes that lead to
the same zspage (as many frames, as many objects) are one class, of the largest of these sizes: that
costs no memory and leaves fewer half-filled zspages. So the class of a whole page, one object in
one frame, has all sizes that gain nothing from sharing.

Source of the ideas: zsmalloc (Nitin Gupta, 2012); its classes and merging, with a longer chain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MIN_ALLOC_SIZE: Final = 32
"""Smallest object in bytes: a header and eight bytes."""

FULLNESS_GROUPS: Final = 10
"""Groups that zspages with room are kept in, by tenths of their objects in use."""


@dataclass(frozen=True, slots=True)
class SizeClass:
    """One class.

    Attributes:
        number: its place in the pool's list of classes.
        size: bytes an object.
        frames: frames a zspage.
        objects: objects a zspage.
        group_of: fullness group for each number of objects in use: 0 for the emptiest,
            FULLNESS_GROUPS for full.
    """

    number: int
    size: int
    frames: int
    objects: int
    group_of: tuple[int, ...]


def frames_for(size: int, page_size: int, max_frames: int) -> int:
    """Return the number of frames.

    (1 to `max_frames`) of which objects of `size` bytes waste the smallest part.
    """
    return min(
        range(1, max_frames + 1), key=lambda frames: (frames * page_size % size / frames, frames)
    )


def build_classes(page_size: int, max_frames: int) -> tuple[list[SizeClass], list[int]]:
    """Build the classes for one page size.

    Args:
        page_size: bytes in a frame.
        max_frames: longest zspage, in frames.

    Returns:
        The classes by ascending size, and a table of class numbers indexed by size in steps,
        rounded up: the class of an object of s bytes is `classes[table[(s + step - 1) // step]]`,
        with step = page_size // 256.
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
