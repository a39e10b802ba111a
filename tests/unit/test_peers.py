# SPDX-License-Identifier: GPL-2.0-or-later
"""Whose process is at the other end of a connection: told from the kernel's list of sockets."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from zswapd.metrics.peers import EVERYBODY, may_read, number_of, user_of

NONE = Path("/nonexistent")


@pytest.mark.parametrize(
    ("family", "listens", "connects"),
    [
        (socket.AF_INET, "127.0.0.1", "127.0.0.1"),
        (socket.AF_INET6, "::1", "::1"),
        (socket.AF_INET6, "::", "::1"),
        (socket.AF_INET6, "::", "127.0.0.1"),
        (socket.AF_INET6, "::", "::ffff:127.0.0.1"),
    ],
)
def test_a_local_peer_is_known_whatever_the_family(family: socket.AddressFamily, listens: str, connects: str) -> None:
    with socket.socket(family) as server:
        try:
            server.bind((listens, 0))
        except OSError:
            if family == socket.AF_INET:
                raise
            pytest.skip("this machine has no IPv6")
        server.listen()
        port = server.getsockname()[1]
        with socket.create_connection((connects, port)) as client:
            accepted, _ = server.accept()
            with accepted:
                peer, own = accepted.getpeername()[:2], accepted.getsockname()[:2]
                assert user_of(peer, own) == os.geteuid()
                # Both ends are sockets of this machine; it is the other one's user that counts.
                assert user_of(own, peer) == os.geteuid()
                assert may_read(peer, own, ())
        del client


def lists(directory: Path, *users: int) -> Path:
    """Write a list of sockets, the client's of each user at port 40000 and so on, as a little-endian machine has it."""
    lines = ["  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode"]
    for place, user in enumerate(users):
        port = 40000 + place
        addresses = (f"0100007F:2677 0100007F:{port:04X}", f"0100007F:{port:04X} 0100007F:2677")
        for number, owner in zip(addresses, (0, user), strict=True):
            lines.append(
                f"{len(lines):4}: {number} 01 00000000:00000000 00:00000000 00000000 {owner:5}        0 1234 1 0 20 4 30 10 -1"
            )
    (directory / "tcp").write_text("\n".join(lines) + "\n")
    return directory


def test_it_is_the_other_end_whose_user_counts(tmp_path: Path) -> None:
    proc, own = lists(tmp_path, 1000, 7, 65534), ("127.0.0.1", 9847)
    assert [user_of(("127.0.0.1", 40000 + place), own, proc=proc) for place in range(4)] == [1000, 7, 65534, None]


@pytest.mark.parametrize(
    ("users", "outcomes"),
    [((), [True, False, False]), (("1000",), [True, True, False]), (("1000", "7"), [True] * 3), ((EVERYBODY,), [True] * 3)],
)
def test_root_and_those_who_are_named_may_read(tmp_path: Path, users: tuple[str, ...], outcomes: list[bool]) -> None:
    proc, own = lists(tmp_path, 0, 1000, 7), ("127.0.0.1", 9847)
    assert [may_read(("127.0.0.1", 40000 + place), own, users, proc=proc) for place in range(3)] == outcomes


def test_another_machine_may_read_and_somebody_local_who_is_not_listed_may_not() -> None:
    assert may_read(("192.0.2.7", 40000), ("192.0.2.1", 9847), (), proc=NONE)
    assert may_read(("fe80::1%eth0", 40000), ("fe80::2%eth0", 9847), (), proc=NONE)
    for local in ("127.0.0.1", "::1", "::ffff:127.0.0.1"):
        assert not may_read((local, 40000), (local, 9847), ("prometheus",), proc=NONE)


def test_names_are_looked_up_and_an_unknown_one_is_nobody() -> None:
    assert number_of("root") == 0
    assert number_of("17") == 17
    assert number_of("no-such-user") == -1
