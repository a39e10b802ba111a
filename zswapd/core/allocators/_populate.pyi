# SPDX-License-Identifier: GPL-2.0-or-later
from array import array

def populate(
    fd: int,
    base: int,
    offset: int,
    length: int,
    advice: int,
    piece: int,
    pause_us: int,
    floor: int,
    is_idle: bool,
) -> tuple[int, int]:
    """Populate a byte range of a mapped file, `piece` bytes at a time, with the GIL released.

    Args:
        fd: the file.
        base: address at which byte 0 of the file is mapped.
        offset: begin of the range in bytes, whole pages.
        length: bytes of the range, whole pages.
        advice: MADV_POPULATE_WRITE. A kernel without it still gets the pages of the file.
        piece: bytes at a time, whole pages.
        pause_us: µs to sleep between two pieces, below one second.
        floor: stop before a piece once the system has fewer free bytes; 0 for no floor.
        is_idle: run as an idle task for the first 50 ms.

    Returns:
        0, or the errno of the piece that failed, or EAGAIN for `floor`; and the number of bytes
        populated before that.

    Raises:
        ValueError: `piece` is 0, or the pause is too long.
    """

def punch(fd: int, ranges: array[int]) -> int:
    """Punch byte ranges of a file, with the GIL released for all of them together.

    Args:
        fd: the file.
        ranges: offset and length of each range, as 64-bit numbers.

    Returns:
        The number of ranges punched. If it is less than all, the next one failed.

    Raises:
        ValueError: there is an offset without a length.
    """
