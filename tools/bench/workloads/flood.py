# SPDX-License-Identifier: GPL-2.0-or-later
"""An attack on the metrics port, in the ways that cost the daemon most.

`python -m tools.bench.workloads.flood KIND PORT SECONDS` prints "begins", attacks, and prints the
number of its connections. Root becomes the user `nobody` after all modules are loaded, because that
user may not be able to read them.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable

REQUEST = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
NOBODY = 65534
_SOCKETS = 900
"""Sockets that the attacker holds at most; the usual limit of a user is 1024 descriptors."""

Attack = Callable[[int, float], int]


def _connect(port: int) -> socket.socket:
    made = socket.socket()
    made.settimeout(1)
    try:
        made.connect(("127.0.0.1", port))
    except OSError:
        made.close()
        raise
    return made


def connect(port: int, end: float) -> int:
    """Connect and close; return the number of connections, as the other attacks do."""
    count = 0
    while time.monotonic() < end:
        with contextlib.suppress(OSError), _connect(port):
            count += 1
    return count


def reset(port: int, end: float) -> int:
    """Connect, send a request, and close at once."""
    count = 0
    while time.monotonic() < end:
        with contextlib.suppress(OSError), _connect(port) as made:
            made.sendall(REQUEST)
            count += 1
    return count


def get(port: int, end: float) -> int:
    """Ask and read the answer, with 900 other sockets in the kernel's list."""
    with socket.create_server(("127.0.0.1", 0), backlog=_SOCKETS) as own:
        held = [socket.create_connection(own.getsockname()) for _ in range(_SOCKETS // 2)]
        held += [own.accept()[0] for _ in range(len(held))]
        count = 0
        while time.monotonic() < end:
            with contextlib.suppress(OSError), _connect(port) as made:
                made.sendall(REQUEST)
                while made.recv(1 << 16):
                    pass
                count += 1
    for one in held:
        one.close()
    return count


def silent(port: int, end: float) -> int:
    """Hold connections without a request."""
    return _hold(port, end, b"")


def slow(port: int, end: float) -> int:
    """Hold connections with a request that does not end."""
    return _hold(port, end, b"GET /metrics HTTP/1.1\r\nX: ")


def unread(port: int, end: float) -> int:
    """Hold connections without reading the answer."""
    return _hold(port, end, REQUEST)


def _hold(port: int, end: float, words: bytes) -> int:
    held: list[socket.socket] = []
    count = 0
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            held.append(_connect(port))
            held[-1].sendall(words)
            count += 1
        if len(held) >= _SOCKETS:
            for one in held[: _SOCKETS // 2]:
                with contextlib.suppress(OSError):
                    one.sendall(b"x")
                one.close()
            del held[: _SOCKETS // 2]
    for one in held:
        one.close()
    return count


ATTACKS: dict[str, Attack] = {
    "connect": connect,
    "reset": reset,
    "get": get,
    "silent": silent,
    "slow": slow,
    "unread": unread,
}


def main() -> None:
    """Run the attack that the command line names."""
    attack, port, seconds = ATTACKS[sys.argv[1]], int(sys.argv[2]), float(sys.argv[3])
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    print("begins", flush=True)
    print(attack(port, time.monotonic() + seconds))


if __name__ == "__main__":
    main()
