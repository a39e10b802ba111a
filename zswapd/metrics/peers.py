# SPDX-License-Identifier: GPL-2.0-or-later
"""The user at the other end of a TCP connection, and the permission of that user to read metrics.

TCP has no peer credentials, but the kernel knows the user of every socket of this machine.
NETLINK_SOCK_DIAG looks up the one socket of a pair of addresses in a hash table. This takes 4 µs
for any number of sockets. A kernel without tcp_diag and a sandbox without AF_NETLINK do not have
it. There the Doorkeeper reads the list in /proc/net/tcp, in pieces of fixed size. The list has
150 bytes a socket and costs about 1 µs a socket. Any user can have many thousand sockets.

The Doorkeeper also reads the list if the lookup finds no socket and the address is not a loopback
address. The reason: the lookup finds a socket that is bound to an interface only together with that
interface. A peer in neither place belongs to another machine or another network namespace.

A socket without an inode belongs to no process. Its owner has closed it, or TCP keeps only its
addresses (TIME_WAIT). For some of these sockets the kernel reports user 0. They therefore count as
gone, never as sockets of root.

Limits:

- User names are looked up every NAMES_S, because the lookup can need a directory service. A user
  that is added later counts after that time.
- Only the user's number is known. All programs of an allowed user may therefore read.

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
"""The word for all users in a list of user names."""

NAMES_S = 10.0
"""Time in seconds for which the numbers of user names are kept."""

_MAPPED = bytes(10) + b"\xff\xff"
_LOOPBACK_SIX = bytes(15) + b"\x01"
_SOCK_DIAG = 4  # NETLINK_SOCK_DIAG
_BY_FAMILY, _NLMSG_ERROR, _NLM_F_REQUEST = 20, 2, 1
_NLMSGHDR = struct.Struct("=IHHII")  # length, type, flags, sequence, port id
_REQUEST = struct.Struct("=BBBxI")  # family, protocol, extensions, states
# ports and addresses of the wanted socket and of its peer
_SOCKET_ID = struct.Struct("!HH16s16s")
_INTERFACE_AND_COOKIE = struct.pack("=III", 0, 0xFFFFFFFF, 0xFFFFFFFF)  # any
# family, state, timer, retransmissions, id, expiry, queues, user, inode
_MESSAGE = struct.Struct("=BBBB48sIIIII")
_LISTEN, _ALL_STATES = 10, 0xFFFFFFFF
_PIECE = 64 << 10
_UID_FIELD, _INODE_FIELD = 4, 6
"""Fields of a line after both addresses.

They are: state, queues, timer, retransmissions, user, timeout, inode.
"""


class Verdict(enum.Enum):
    """The decision on the other end of a connection."""

    ALLOWED = enum.auto()
    DENIED = enum.auto()
    GONE = enum.auto()
    """The client's process has closed the connection, so there is no client to answer."""


@dataclass(frozen=True, slots=True)
class Owner:
    """A socket of this machine."""

    user: int
    inode: int
    """The inode number, or 0 if no process has the socket open."""
    listens: bool = False


def _packed(address: str) -> bytes:
    """Return an address in network byte order: 4 bytes for IPv4, 16 bytes for IPv6.

    An IPv4 address that is mapped into IPv6 gives 4 bytes.
    """
    if ":" not in address:
        return socket.inet_pton(socket.AF_INET, address)
    packed = socket.inet_pton(socket.AF_INET6, address.partition("%")[0])
    return packed.removeprefix(_MAPPED)


class Diag:
    """A connection to the kernel's NETLINK_SOCK_DIAG; a context manager.

    Raises:
        OSError: NETLINK_SOCK_DIAG is not available.
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
        """Return the socket with an address and a peer address, or None.

        Args:
            address: address of the wanted socket.
            peer: address of the socket at its other end.

        Raises:
            OSError: the kernel does not support this lookup.
        """
        own, other = _packed(address[0]), _packed(peer[0])
        # A lookup by IPv4 also finds IPv6 sockets with a mapped address.
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
            # The kernel answers before sendto() returns, so this never waits.
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
    """Return an address as /proc/net/tcp has it: its bytes, as words in native byte order."""
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    return f"{''.join(f'{word:08X}' for word in words)}:{port:04X}"


def find_listed(
    address: Address, peer: Address, *, proc: Path = Path("/proc/self/net")
) -> Owner | None:
    """Return the socket with an address and a peer address from the kernel's list, or None.

    Args:
        address: address of the wanted socket.
        peer: address of the socket at its other end.
        proc: directory of the lists.
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
    """Yield the lines of a file that contain the wanted bytes; read _PIECE bytes at a time."""
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
    """Decides whether the other end of a connection may read the metrics; a context manager.

    Root, the daemon's own user, the named users and other machines may read.

    Args:
        users: names or numbers of users, or EVERYBODY.
        proc: directory of the kernel's lists.
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
        """Return whether the kernel can look up one socket. Try it with a socket that exists.

        Args:
            listening: address of a listening socket of this process.
        """
        self.close()
        self._allowed()  # loads the modules of the name lookup before they are needed
        try:
            self._diag = Diag()
            no_peer = "0.0.0.0" if len(_packed(listening[0])) == 4 else "::"  # noqa: S104 - no bind
            if self._diag.find(listening, (no_peer, 0)) is not None:
                return True
        except OSError:
            pass
        self.close()
        return False

    def close(self) -> None:
        """Close NETLINK_SOCK_DIAG; later lookups read the kernel's list."""
        if self._diag is not None:
            self._diag.close()
            self._diag = None

    def owner(self, peer: Address, own: Address) -> Owner | None:
        """Return the socket at the other end of a connection, or None if it is not local.

        Args:
            peer: address and port of the other end.
            own: address and port of this end.
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
        """Return whether the other end of a connection may read the metrics.

        Args:
            peer: address and port of the other end.
            own: address and port of this end.
        """
        if EVERYBODY in self._users:
            return Verdict.ALLOWED
        owner = self.owner(peer, own)
        if owner is None:
            # `metrics.listen` decides which other machines can connect. A local socket with an
            # unknown owner is denied.
            return Verdict.DENIED if _is_loopback(peer[0]) else Verdict.ALLOWED
        if not owner.inode:
            return Verdict.GONE
        return Verdict.ALLOWED if owner.user in self._allowed() else Verdict.DENIED

    def _allowed(self) -> frozenset[int]:
        """Return the numbers of the users that may read, at most NAMES_S old."""
        now = time.monotonic()
        if now >= self._looked_up_until:
            self._numbers = frozenset({0, os.geteuid(), *map(number_of, self._users)})
            self._looked_up_until = now + NAMES_S
        return self._numbers


def _is_loopback(address: str) -> bool:
    packed = _packed(address)
    return packed[0] == 127 if len(packed) == 4 else packed == _LOOPBACK_SIX


def number_of(name: str) -> int:
    """Return the number of a user, or -1 if the user does not exist."""
    if name.isdecimal():
        return int(name)
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        return -1
