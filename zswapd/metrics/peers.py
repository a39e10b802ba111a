# SPDX-License-Identifier: GPL-2.0-or-later
"""Whose process is at the other end of a TCP connection, and whether he may read the metrics.

TCP has no peer credentials, but the kernel lists the sockets of this machine with their users (/proc/net/tcp). A peer that is
in that list is a local process; one that is not is another machine's, or another network namespace's.

Limits: one look at the list for each connection, in the thread of the metrics; 150 bytes a socket. A user's name is looked up
each time, so one that is made later counts; it is no more than his number that is known, so all of his programs may.
"""

from __future__ import annotations

import ipaddress
import os
import pwd
import struct
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

EVERYBODY = "*"
"""Stands for all users where their names are asked for."""
_UID_FIELD = 4
"""Of a line, behind both addresses: state, queues, timer, retransmissions, user."""


def _listed(address: str, port: int) -> str:
    """Return an address as the kernel's list has it: words of network byte order, read as the machine reads words."""
    packed = ipaddress.ip_address(address).packed
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    return f"{''.join(f'{word:08X}' for word in words)}:{port:04X}"


def _forms(address: str) -> tuple[str, str]:
    """Return an address as IPv4 and as IPv6 sockets have it; the first is empty if it is none of IPv4's."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    four = parsed if parsed.version == 4 else parsed.ipv4_mapped
    return str(four or ""), f"::ffff:{four}" if four else str(parsed)


def user_of(peer: tuple[str, int], own: tuple[str, int], *, proc: Path = Path("/proc/self/net")) -> int | None:
    """Return the number of the user whose socket is at the other end; None if that is no process of this machine.

    Args:
        peer: address and port of the other end.
        own: of this end.
        proc: where the lists are.
    """
    (peer_four, peer_six), (own_four, own_six) = _forms(peer[0]), _forms(own[0])
    for name, theirs, ours in (("tcp", peer_four, own_four), ("tcp6", peer_six, own_six)):
        if not theirs or not ours or not (proc / name).exists():
            continue
        sockets = (proc / name).read_text()
        found = f" {_listed(theirs, peer[1])} {_listed(ours, own[1])} "
        place = sockets.find(found)
        if place >= 0:
            return int(sockets[place + len(found) :].split(maxsplit=_UID_FIELD + 1)[_UID_FIELD])
    return None


def may_read(peer: tuple[str, int], own: tuple[str, int], users: Sequence[str], *, proc: Path = Path("/proc/self/net")) -> bool:
    """Say whether the metrics are for whoever is at the other end: root, the daemon's own user, those named, other machines.

    Args:
        peer: address and port of the other end.
        own: of this end.
        users: names or numbers, or EVERYBODY.
        proc: see `user_of`.
    """
    if EVERYBODY in users:
        return True
    allowed = {0, os.geteuid(), *map(number_of, users)}
    user = user_of(peer, own, proc=proc)
    if user is None:  # has left already, or comes from elsewhere, for whom `listen` decides
        address = ipaddress.ip_address(peer[0].partition("%")[0])
        return not (getattr(address, "ipv4_mapped", None) or address).is_loopback
    return user in allowed


def number_of(name: str) -> int:
    """Return a user's number; -1 if there is none of that name."""
    if name.isdecimal():
        return int(name)
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        return -1
