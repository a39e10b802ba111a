# SPDX-License-Identifier: GPL-2.0-or-later
"""The clients whose pages writeback takes next: who is above a limit, who is above its share.

A client is a swap file, here a device. Its share of the pool is its weight divided by the sum of
all weights. Nothing is taken from a client that keeps less than its share, as long as another one
is above and has old pages. So a client that floods the pool pushes out its own pages.

A client above its limit is drained to `accept_percent` of it. Draining begins halfway between, as
for the whole pool (writeback.py), so that its stores are not refused meanwhile.

A client without old pages is passed over until the next `look`.

Source of the idea: proportional shares, as in lottery scheduling (Waldspurger, Weihl 1994) and in
memory.min of the kernel's cgroups.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence


class Shareholder(Protocol):
    """A device with an account, such as `block.device.Device`."""

    weight: int
    limit_bytes: int
    is_kept: bool

    def object_bytes(self) -> int:
        """Return the bytes that its pages take in the pool."""


class Shares:
    """The choice among clients.

    Args:
        clients: all clients. The list may change between two calls.

    Attributes:
        accept_percent: how full a client may be after draining, in percent of its limit.
    """

    def __init__(self, clients: Sequence[Shareholder]) -> None:
        self._clients = clients
        self.accept_percent = 90
        self._draining: set[int] = set()
        self._passed: set[int] = set()

    def look(self) -> None:
        """Consider clients again that had no old pages."""
        self._passed.clear()

    def begin_anew(self) -> None:
        """Forget all places: the list of clients has changed."""
        self._passed.clear()
        self._draining.clear()

    def pass_over(self, place: int) -> None:
        """Leave a client out until the next `look`: it has no old pages."""
        self._passed.add(place)

    def low(self, place: int) -> int:
        """Return the bytes to which a client is drained."""
        return self._clients[place].limit_bytes * self.accept_percent // 100

    def has_room(self, place: int) -> bool:
        """Return whether a page that returns from the disk would not have to leave soon."""
        client = self._clients[place]
        start = client.limit_bytes * (100 + self.accept_percent) // 200
        return client.object_bytes() < (start + client.limit_bytes) // 2

    def above_limit(self) -> int:
        """Return the place of a client that is to be drained, or -1."""
        for place, client in enumerate(self._clients):
            held = client.object_bytes()
            if held > client.limit_bytes * (100 + self.accept_percent) // 200:
                self._draining.add(place)
            elif held <= self.low(place):
                self._draining.discard(place)
            if place in self._draining and place not in self._passed and not client.is_kept:
                return place
        return -1

    def above_share(self) -> int:
        """Return the place of the client that is most above its share, or -1 for none."""
        clients = self._clients
        held = [client.object_bytes() for client in clients]
        total, weights = sum(held), sum(client.weight for client in clients)
        best, most = -1, -(1 << 62)
        for place, client in enumerate(clients):
            # Bytes above the share, times the sum of weights.
            excess = held[place] * weights - total * client.weight
            if held[place] and excess > most and not client.is_kept and place not in self._passed:
                best, most = place, excess
        return best
