# SPDX-License-Identifier: GPL-2.0-or-later
"""Which user's process is at the other end of a TCP connection, and whether it may read metrics.

TCP has no peer credentials, but the kernel knows the user of every socket of this machine.
NETLINK_SOCK_DIAG finds the one socket of a pair of addresses by its hash: 4 µs, however many
sockets there are. Where that is not available (a kernel without tcp_diag, a sandbox without
AF_NETLINK), the list in /proc/net/tcp is read instead, in pieces of fixed size: 150 bytes and about
1 µs a socket, and any user can have many thousands.

The list is also read for an address that is not a loopback one and has no socket by its hash: a
socket that is bound to an interface is found by its hash only together with that interface. A peer
that neither knows is another machine's, or another network namespace's.

A socket without an inode belongs to no process: its owner has closed it, or TCP keeps no more of it
than its addresses (TIME_WAIT). The kernel tells user 0 for some of these, so they count as gone and
never as root's.

Limits: names of users are looked up every NAMES_S, since that may take a directory service, so a
user that is made later counts after that time. The user's number is all that is known, so all
programs of an allowed user may read.

Sources: sock_diag(7), net/ipv4/inet_diag.c.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import pwd
import socket
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    Address = tuple[str, int]

EVERYBODY = "*"
"""Stands for all users where their names are asked for."""

NAMES_S = 10.0
"""Time for which the number of a user's name is kept."""

_MAPPED = bytes(10) + b"\xff\xff"
_LOOPBACK_SIX = bytes(15) + b"\x01"
_SOCK_DIAG = 4  # NETLINK_SOCK_DIAG
_BY_FAMILY, _NLMSG_ERROR, _NLM_F_REQUEST = 20, 2, 1
_NLMSGHDR = struct.Struct("=IHHII")  # length, type, flags, sequence, port id
_REQUEST = struct.Struct("=BBBxI")  # family, protocol, extensions, states
# ports and addresses, of the socket that is looked for and of its peer
_SOCKET_ID = struct.Struct("!HH16s16s")
_INTERFACE_AND_COOKIE = struct.pack("=III", 0, 0xFFFFFFFF, 0xFFFFFFFF)  # any
# family, state, timer, retransmissions, id, expiry, queues, user, inode
_MESSAGE = struct.Struct("=BBBB48sIIIII")
_LISTEN, _ALL_STATES = 10, 0xFFFFFFFF
_PIECE = 64 << 10
_UID_FIELD, _INODE_FIELD = 4, 6
"""Of a line, behind both addresses: state, queues, timer, retransmissions, user, timeout, inode."""


class Verdict(enum.Enum):
    """What a connection's other end is to get."""

    ALLOWED = enum.auto()
    DENIED = enum.auto()
    GONE = enum.auto()
    """Its process has closed it: no client is left to answer."""


@dataclass(frozen=True, slots=True)
class Owner:
    """A socket of this machine."""

    user: int
    inode: int
    """0 if no process has it open."""
    listens: bool = False


def _packed(address: str) -> bytes:
    """Return an address in network byte order: 4 bytes of IPv4, 16 of IPv6.

    An IPv4 address that is mapped into IPv6 has 4 bytes as well.
    """
    if ":" not in address:
        return socket.inet_pton(socket.AF_INET, address)
    packed = socket.inet_pton(socket.AF_INET6, address.partition("%")[0])
    return packed.removeprefix(_MAPPED)


class Diag:
    """The kernel's answer to which socket has a pair of addresses; a context manager.

    Raises:
        OSError: there is no NETLINK_SOCK_DIAG here.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _SOCK_DIAG
        )
        self._sequence = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection to the kernel."""
        self._socket.close()

    def find(self, address: Address, peer: Address) -> Owner | None:
        """Return the socket that has an address and a peer; None if there is none.

        Args:
            address: of the socket that is looked for.
            peer: of the socket at its other end.

        Raises:
            OSError: the kernel does not answer such questions.
        """
        own, other = _packed(address[0]), _packed(peer[0])
        # Asked by IPv4, the kernel finds IPv6 sockets with a mapped address as well.
        family = socket.AF_INET if len(own) == 4 else socket.AF_INET6
        ends = _SOCKET_ID.pack(address[1], peer[1], own, other)
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        question = (
            _REQUEST.pack(family, socket.IPPROTO_TCP, 0, _ALL_STATES) + ends + _INTERFACE_AND_COOKIE
        )
        length = _NLMSGHDR.size + len(question)
        self._socket.sendto(
            _NLMSGHDR.pack(length, _BY_FAMILY, _NLM_F_REQUEST, self._sequence, 0) + question, (0, 0)
        )
        return self._answer()

    def _answer(self) -> Owner | None:
        while True:
            # The kernel answers before sendto returns, so this never waits.
            answer = self._socket.recv(4096, socket.MSG_DONTWAIT)
            _, kind, _, sequence, _ = _NLMSGHDR.unpack_from(answer)
            if sequence != self._sequence:
                continue
            if kind == _NLMSG_ERROR:
                number = -struct.unpack_from("=i", answer, _NLMSGHDR.size)[0]
                if number == errno.ENOENT:
                    return None
                raise OSError(number, os.strerror(number))
            _, state, _, _, _, _, _, _, user, inode = _MESSAGE.unpack_from(answer, _NLMSGHDR.size)
            return Owner(user, inode, listens=state == _LISTEN)


def _listed(packed: bytes, port: int) -> str:
    """Return an address as the kernel's list has it: the bytes, read as the machine reads words."""
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    return f"{''.join(f'{word:08X}' for word in words)}:{port:04X}"


def find_listed(
    address: Address, peer: Address, *, proc: Path = Path("/proc/self/net")
) -> Owner | None:
    """Return the socket that has an address and a peer, as `Diag.find`, from the kernel's list.

    Args:
        address: see `Diag.find`, as for `peer`.
        peer: of the socket at its other end.
        proc: where the lists are.
    """
    own, other = _packed(address[0]), _packed(peer[0])
    forms = (
        [("tcp6", own, other)]
        if len(own) == 16
        else [("tcp", own, other), ("tcp6", _MAPPED + own, _MAPPED + other)]
    )
    for name, end, far_end in forms:
        wanted = f" {_listed(end, address[1])} {_listed(far_end, peer[1])} ".encode()
        with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6 has one list only
            for line in _lines_with(proc / name, wanted):
                fields = line.partition(wanted)[2].split(maxsplit=_INODE_FIELD + 1)
                return Owner(int(fields[_UID_FIELD]), int(fields[_INODE_FIELD]))
    return None


def _lines_with(path: Path, wanted: bytes) -> Iterator[bytes]:
    """Yield the lines of a file that have some bytes; hold a piece of the file at a time."""
    rest = b""
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_PIECE):
            piece = rest + piece
            end = piece.rfind(b"\n") + 1
            place = piece.find(wanted, 0, end)
            if place >= 0:
                yield piece[piece.rfind(b"\n", 0, place) + 1 : piece.find(b"\n", place)]
            rest = piece[end:]


class Doorkeeper:
    """Says whether root, the daemon's own user, a named one, another machine asks.

    A context manager.

    Args:
        users: names or numbers, or EVERYBODY.
        proc: where the kernel's lists are.
    """

    def __init__(self, users: Sequence[str], *, proc: Path = Path("/proc/self/net")) -> None:
        self._users = tuple(users)
        self._proc = proc
        self._diag: Diag | None = None
        self._numbers: frozenset[int] = frozenset()
        self._looked_up_until = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin(self, listening: Address) -> bool:
        """Return whether the kernel answers questions about one socket.

        It is tried with one that is there.

        Args:
            listening: address of a listening socket of this process.
        """
        self.close()
        self._allowed()  # what looking up names loads is loaded now
        try:
            self._diag = Diag()
            nobody = "0.0.0.0" if len(_packed(listening[0])) == 4 else "::"  # noqa: S104 - stands for no peer
            if self._diag.find(listening, (nobody, 0)) is not None:
                return True
        except OSError:
            pass
        self.close()
        return False

    def close(self) -> None:
        """Ask the kernel's list from here on."""
        if self._diag is not None:
            self._diag.close()
            self._diag = None

    def owner(self, peer: Address, own: Address) -> Owner | None:
        """Return the socket at the other end of a connection.

        None if it is no socket of this machine.

        Args:
            peer: address and port of the other end.
            own: of this end.
        """
        if self._diag is not None:
            try:
                found = self._diag.find(peer, own)
            except OSError:
                self.close()
            else:
                if found is not None and not found.listens:
                    return found
                if _is_loopback(peer[0]):
                    return None
        return find_listed(peer, own, proc=self._proc)

    def judge(self, peer: Address, own: Address) -> Verdict:
        """Say whether the other end of a connection may read the metrics.

        Args:
            peer: see `owner`, as for `own`.
            own: of this end.
        """
        if EVERYBODY in self._users:
            return Verdict.ALLOWED
        owner = self.owner(peer, own)
        if owner is None:
            # For other machines `metrics.listen` decides. A local socket of unknown owner is
            # denied.
            return Verdict.DENIED if _is_loopback(peer[0]) else Verdict.ALLOWED
        if not owner.inode:
            return Verdict.GONE
        return Verdict.ALLOWED if owner.user in self._allowed() else Verdict.DENIED

    def _allowed(self) -> frozenset[int]:
        """Return the numbers of the users who may read, as they were at most NAMES_S ago."""
        now = time.monotonic()
        if now >= self._looked_up_until:
            self._numbers = frozenset({0, os.geteuid(), *map(number_of, self._users)})
            self._looked_up_until = now + NAMES_S
        return self._numbers


def _is_loopback(address: str) -> bool:
    packed = _packed(address)
    return packed[0] == 127 if len(packed) == 4 else packed == _LOOPBACK_SIX


def number_of(name: str) -> int:
    """Return a user's number; -1 if there is none of that name."""
    if name.isdecimal():
        return int(name)
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        return -1
