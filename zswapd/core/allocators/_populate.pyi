# SPDX-License-Identifier: GPL-2.0-or-later
from array import array

def populate(
    fd: int, base: int, offset: int, length: int, advice: int, piece: int, pause_us: int, floor: int
) -> tuple[int, int]:
    """Back a byte range of a mapped file with memory and map it, `piece` bytes at a time.

    With the GIL released.

    Args:
        fd: the file.
        base: address at which its byte 0 is mapped.
        offset: where the range begins, in bytes; whole pages.
        length: its bytes; whole pages.
        advice: MADV_POPULATE_WRITE; a kernel that does not know it is good enough.
        piece: bytes at a time, whole pages.
        pause_us: µs to sleep between two pieces, below a second.
        floor: end before a piece once the system has fewer free bytes. With one there is no hurry:
            as an idle task, for 50 ms.

    Returns:
        0, the errno of the piece that failed, or EAGAIN for `floor`; and the bytes populated before
        it.

    Raises:
        ValueError: `piece` is 0 or the pause too long.
    """

def punch(fd: int, ranges: array[int]) -> int:
    """Give byte ranges of a file back to the system.

    With the GIL released for all of them together.

    Args:
        fd: the file.
        ranges: 64-bit numbers: offset and length of each.

    Returns:
        How many were punched; the next one failed if there are more.

    Raises:
        ValueError: there is an offset without a length.
    """
