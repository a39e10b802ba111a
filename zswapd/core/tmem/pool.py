# SPDX-License-Identifier: GPL-2.0-or-later
"""A tmem pool: objects by oid, each a radix tree of pampds.

It has no policy. tmem.py has the rules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zswapd.errors import InvariantError

if TYPE_CHECKING:
    from zswapd.core.pam.base import Pam
    from zswapd.core.tmem.objnodes import Objnodes
    from zswapd.core.tmem.radix import Radix


class Pool:
    """One pool of one client.

    Attributes:
        number: number of the pool in tmem, which is in the header of every page of the pool.
        client: the owner of the pool.
        pam: the back end that keeps the pages.
        nodes: memory of the trees.
        persistent: True if pages stay until they are flushed. Pages of an ephemeral pool may be
            evicted at any time.
        objects: trees by oid. An object exists while it has pages.
        pages: pages in all objects.
    """

    __slots__ = ("client", "nodes", "number", "objects", "pages", "pam", "persistent")

    def __init__(
        self, number: int, client: int, pam: Pam, nodes: Objnodes, *, persistent: bool
    ) -> None:
        self.number = number
        self.client = client
        self.pam = pam
        self.nodes = nodes
        self.persistent = persistent
        self.objects: dict[int, Radix] = {}
        self.pages = 0

    def check(self) -> int:
        """Verify the trees and the page count; return the number of index nodes.

        Raises:
            InvariantError: the message names the object.
        """
        nodes = pages = 0
        for oid, tree in self.objects.items():
            nodes += tree.check()
            pages += tree.pages
            if not tree.pages:
                raise InvariantError(
                    f"pool {self.number}: object {oid:#x} has no pages and still exists"
                )
            for index, pampd in tree.items():
                key = self.pam.key_of(pampd)
                if (key.pool, key.oid, key.index) != (self.number, oid, index):
                    raise InvariantError(
                        f"pool {self.number}: object {oid:#x} index {index} names the page of {key}"
                    )
        if pages != self.pages:
            raise InvariantError(f"pool {self.number} holds {pages} pages and counts {self.pages}")
        return nodes
