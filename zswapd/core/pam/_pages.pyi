# SPDX-License-Identifier: GPL-2.0-or-later
NOT_THE_PAGE: int
WRONG_CHECKSUM: int
NO_LZ4_BLOCK: int
NO_PAGE: int

def digests(data: bytes | memoryview, seed: int) -> tuple[int, int]:
    """Return XXH3 of some bytes as any processor makes it, and as this one does (_digest.h).

    For tests.
    """

class Packer:
    """LZ4 pages of one arena (zpages.py does the same; the C file says why this is here)."""

    def __new__(cls, memory: memoryview, page_size: int) -> Packer:
        """Make one.

        Args:
            memory: the arena, a view of bytes that can be written; once that is released, there is
                no object any more.
            page_size: bytes, a power of two from 4096 to 65536.

        Raises:
            ValueError: that is no page size, or `memory` of another kind.
        """

    def pack(self, page: memoryview) -> int:
        """Compress a page into the scratch buffer.

        Return its length in bytes, times 256, plus its codec.

        The codec is SAME_FILLED, with the one word as data, or LZ4's; the data may be longer than
        the page.

        Raises:
            ValueError: `page` is none.
        """

    def commit(
        self,
        handle: int,
        pool: int,
        oid: int,
        index: int,
        generation: int,
        checksum: bool,
        armed: int,
    ) -> None:
        """Make a new object the page that was packed last.

        Args:
            handle: of the object, whose live word is DEAD and which has room for header and data.
            pool: for the header, as what follows.
            oid: of the page.
            index: of the page.
            generation: serial number of the store.
            checksum: put one there.
            armed: the crash point that is armed, 0 for none.

        Raises:
            IndexError: the object would not lie in the arena.
            ValueError: nothing was packed.
        """

    def unpack(self, handle: int, oid: int, index: int, out: memoryview) -> int:
        """Check a page and write it into `out`, if its codec is SAME_FILLED or LZ4's.

        Return the codec.

        Returns:
            The codec; NOT_THE_PAGE, WRONG_CHECKSUM or NO_LZ4_BLOCK if that is so.

        Raises:
            IndexError: there can be no object at `handle`.
            ValueError: `out` is not as long as a page.
        """

    def weigh(self, handle: int) -> int:
        """Return the length of a page's data, times 256, plus its codec.

        Returns:
            NO_PAGE if there is none, WRONG_CHECKSUM if it is damaged: nothing in its header may be
                believed then.

        Raises:
            IndexError: there can be no object at `handle`.
        """

    def survey(
        self, handle: int, size: int, count: int
    ) -> list[tuple[int, int, int, int, int, int, int]]:
        """Return what the headers of objects in a row say, each verified by its checksum.

        Args:
            handle: of the first object.
            size: bytes of each.
            count: number of objects; dead ones are left out.

        Returns:
            Of each, handle, generation, object, index, bytes of data, codec, pool; of one that is
            no page, is damaged, or whose data would not fit, all but the handle are 0.

        Raises:
            IndexError: there can be no object there.
        """
