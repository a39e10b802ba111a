# SPDX-License-Identifier: GPL-2.0-or-later
NOT_THE_PAGE: int
WRONG_CHECKSUM: int
NO_LZ4_BLOCK: int
NO_PAGE: int

def digests(data: bytes | memoryview, seed: int) -> tuple[int, int]:
    """Return XXH3 of some bytes by the version for any processor, and by the version in use.

    For tests (_digest.h).
    """

class Packer:
    """Packs and unpacks the LZ4 pages of one arena (see _pages.c; zpages.py is the reference)."""

    def __new__(cls, memory: memoryview, page_size: int) -> Packer:
        """Make a packer.

        Args:
            memory: the arena, a writable view of bytes. After its release every access is an
                IndexError.
            page_size: bytes of a page, a power of two from 4096 to 65536.

        Raises:
            ValueError: the page size or the kind of `memory` is wrong.
        """

    def pack(self, page: memoryview) -> int:
        """Compress a page into the scratch buffer; return its length, times 256, plus its codec.

        The length is in bytes. The codec is SAME_FILLED with one word as data, or LZ4. The data may
        be longer than the page.

        Raises:
            ValueError: `page` does not have the length of a page.
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
        """Store the page that was packed last in a new object.

        Args:
            handle: that of the object. Its live word is DEAD, and it has room for header and data.
            pool: tmem pool, for the header.
            oid: object of the page.
            index: index of the page.
            generation: serial number of the store.
            checksum: let the checksum cover the data of a compressed page too.
            armed: the crash point that is armed, or 0.

        Raises:
            IndexError: the object is not inside the arena.
            ValueError: no page was packed.
        """

    def unpack(self, handle: int, oid: int, index: int, out: memoryview) -> int:
        """Verify a page and write it into `out` if its codec is SAME_FILLED or LZ4.

        Returns:
            The codec, or NOT_THE_PAGE, WRONG_CHECKSUM or NO_LZ4_BLOCK.

        Raises:
            IndexError: there can be no object at `handle`.
            ValueError: `out` does not have the length of a page.
        """

    def weigh(self, handle: int) -> int:
        """Return the codec of a page in bits 0-7, its length in bits 8-23, then its client.

        The result is NO_PAGE if there is no page. It is WRONG_CHECKSUM if the page is damaged: no
        field of its header can be trusted then.

        Raises:
            IndexError: there can be no object at `handle`.
        """

    def survey(
        self, handle: int, size: int, count: int
    ) -> list[tuple[int, int, int, int, int, int, int]]:
        """Return the contents of the headers of adjacent objects, each verified by its checksum.

        Dead objects are left out.

        Args:
            handle: that of the first object.
            size: bytes of each object.
            count: number of objects.

        Returns:
            Handle, generation, oid, index, bytes of data, codec and pool of each. All fields except
            the handle are 0 if the object is no page, is damaged, or is too small for its data.

        Raises:
            IndexError: there can be no object there.
        """
