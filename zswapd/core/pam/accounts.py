# SPDX-License-Identifier: GPL-2.0-or-later
"""Accounts: what each client keeps in the pool, and what it may keep.

A client is one swap file, and its number is in the oid of each of its pages (`oid >> CLIENT_SHIFT`,
core/frontends/frontswap.py). A back end adds to an account when it creates an object, and subtracts
when it frees one. An account is not saved: a successor adds up the headers that it finds.

An account counts the bytes of objects with their headers, and the page of a raw page, as they are
asked of the allocator. Frames are shared by the objects of all clients, so no frame has an owner.

A client at its limit is refused as if the whole pool were full, until it is down to
`accept_percent` of its limit.

Limit: the length of a page that was damaged when it was freed is unknown. It stays in the account
until the next takeover.
"""

from __future__ import annotations

from typing import Final

from zswapd.core.pam.base import MAX_CLIENTS

NO_LIMIT: Final = 1 << 62


class Accounts:
    """The accounts of all clients, by number. They are read and changed on the page path.

    The account of the client that was changed last is an attribute, because each change of a number
    in a list makes an object. Its place in the list is out of date.

    Attributes:
        limits: bytes that each client may keep; NO_LIMIT for no limit.
        resume: bytes at which a client that was refused is accepted again.
        is_full: whether each client was refused and is not down to `resume` yet.
        limit_hits: pages of each client that were refused because of its limit.
    """

    def __init__(self) -> None:
        self._client = self._bytes = 0
        self._others: list[int] = [0] * MAX_CLIENTS
        self.limits: list[int] = [NO_LIMIT] * MAX_CLIENTS
        self.resume: list[int] = [NO_LIMIT] * MAX_CLIENTS
        self.is_full: list[bool] = [False] * MAX_CLIENTS
        self.limit_hits: list[int] = [0] * MAX_CLIENTS

    def add(self, client: int, change: int) -> None:
        """Add bytes to an account, or subtract them."""
        if client != self._client:
            self._others[self._client] = self._bytes
            self._client, self._bytes = client, self._others[client]
        self._bytes += change

    def object_bytes(self, client: int) -> int:
        """Return the bytes of a client's objects."""
        return self._bytes if client == self._client else self._others[client]

    def reset(self, client: int) -> None:
        """Begin the account of a new client, which has no objects."""
        self.add(client, -self.object_bytes(client))
        self.limit_hits[client] = 0

    def refuses(self, client: int) -> bool:
        """Return whether a client is at its limit, and count the refusal.

        It is called only for a client that has a limit.
        """
        held = self.object_bytes(client)
        if held >= self.limits[client] or (self.is_full[client] and held > self.resume[client]):
            self.is_full[client] = True
            self.limit_hits[client] += 1
            return True
        self.is_full[client] = False
        return False

    def has_limits(self) -> bool:
        """Return whether any client has a limit."""
        return min(self.limits) < NO_LIMIT

    def set_limit(self, client: int, limit: int, accept_percent: int) -> None:
        """Set the limit of a client; pages that it already keeps stay.

        Args:
            client: its number.
            limit: bytes, or NO_LIMIT.
            accept_percent: share of the limit at which a refused client is accepted again.
        """
        self.limits[client] = limit
        self.resume[client] = limit if limit == NO_LIMIT else limit * accept_percent // 100
        self.is_full[client] = False
