# SPDX-License-Identifier: GPL-2.0-or-later
"""The user at the other end of a connection, as the kernel tells it:
of one socket or from its list of all.
"""

from __future__ import annotations

import errno
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import capabilities
from zswapd.metrics import peers
from zswapd.metrics.peers import EVERYBODY, Diag, Doorkeeper, Owner, Verdict, find_listed, number_of

NONE = Path("/nonexistent")
PAIRS = [
    (socket.AF_INET, "127.0.0.1", "127.0.0.1"),
    (socket.AF_INET, "0.0.0.0", "127.0.0.9"),
    (socket.AF_INET6, "::1", "::1"),
    (socket.AF_INET6, "::", "::1"),
    (socket.AF_INET6, "::", "127.0.0.1"),
    (socket.AF_INET6, "::", "::ffff:127.0.0.1"),
]
"""Family of the listening socket, its address, the address that is connected to."""


def listening(family: socket.AddressFamily, address: str) -> socket.socket:
    try:
        server = socket.socket(family)
        server.bind((address, 0))
    except OSError:
        if family == socket.AF_INET:
            raise
        pytest.skip("this machine has no IPv6")
    server.listen()
    return server


@pytest.fixture(params=PAIRS, ids=[f"{listens}-{connects}" for _, listens, connects in PAIRS])
def ends(
    request: pytest.FixtureRequest,
) -> Iterator[tuple[socket.socket, socket.socket, socket.socket]]:
    """A listening socket, the client's end of a connection to it, and the other end."""
    family, listens, connects = request.param
    with (
        listening(family, listens) as server,
        socket.create_connection((connects, server.getsockname()[1])) as client,
    ):
        accepted, _ = server.accept()
        with accepted:
            yield server, client, accepted


def names(accepted: socket.socket) -> tuple[tuple[str, int], tuple[str, int]]:
    return accepted.getpeername()[:2], accepted.getsockname()[:2]


def begun(server: socket.socket, users: tuple[str, ...] = ()) -> Doorkeeper:
    doorkeeper = Doorkeeper(users)
    assert doorkeeper.begin(server.getsockname()[:2]), "this kernel has no tcp_diag"
    return doorkeeper


def inode(of: socket.socket) -> int:
    return os.fstat(of.fileno()).st_ino


def test_the_kernel_tells_the_owner_of_one_socket_whatever_the_family(
    ends: tuple[socket.socket, socket.socket, socket.socket],
) -> None:
    server, client, accepted = ends
    peer, own = names(accepted)
    with Diag() as diag:
        # Both ends are sockets of this machine, and the other one's owner counts.
        assert diag.find(peer, own) == find_listed(peer, own) == Owner(os.geteuid(), inode(client))
        assert (
            diag.find(own, peer) == find_listed(own, peer) == Owner(os.geteuid(), inode(accepted))
        )
    with begun(server) as doorkeeper:
        assert doorkeeper.judge(peer, own) is Verdict.ALLOWED
    assert doorkeeper.judge(peer, own) is Verdict.ALLOWED  # from the list


def test_a_socket_that_its_owner_has_closed_is_gone_and_not_roots(
    ends: tuple[socket.socket, socket.socket, socket.socket],
) -> None:
    server, client, accepted = ends
    peer, own = names(accepted)
    with begun(server) as doorkeeper:
        client.shutdown(socket.SHUT_WR)
        assert doorkeeper.judge(peer, own) is Verdict.ALLOWED  # it can still read
        client.close()
        assert doorkeeper.judge(peer, own) is Verdict.GONE
        assert Doorkeeper(()).judge(peer, own) is Verdict.GONE
        accepted.close()  # TIME_WAIT
        for one in (doorkeeper, Doorkeeper(())):
            assert one.judge(peer, own) in {Verdict.GONE, Verdict.DENIED}


def test_a_listening_socket_at_the_clients_address_is_not_the_client() -> None:
    local = socket.AF_INET, "127.0.0.1"
    with listening(*local) as server, listening(*local) as other, begun(server) as doorkeeper:
        assert doorkeeper.judge(other.getsockname(), server.getsockname()) is Verdict.DENIED


@capabilities.requires_root()
@pytest.mark.parametrize("bound", [False, True], ids=["any interface", "bound to lo"])
def test_another_users_socket_is_known_as_such_also_if_it_hides_behind_an_interface(
    *, bound: bool
) -> None:
    code = (
        "import os, socket, sys; os.setgroups([]); os.setgid(65534); os.setuid(65534); s ="
        f" socket.socket();{bound} and s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE,"
        " b'lo');s.connect(('127.0.0.1', int(sys.argv[1]))); sys.stdin.read()"
    )
    with listening(socket.AF_INET, "127.0.0.1") as server:
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(server.getsockname()[1])], stdin=subprocess.PIPE
        )
        try:
            server.settimeout(20)
            accepted, _ = server.accept()
            with accepted:
                peer, own = names(accepted)
                with begun(server, ("0",)) as doorkeeper:
                    assert doorkeeper.judge(peer, own) is Verdict.DENIED
                assert doorkeeper.judge(peer, own) is Verdict.DENIED
                with begun(server, ("nobody", "0")) as doorkeeper:
                    assert doorkeeper.judge(peer, own) is (
                        Verdict.DENIED if bound else Verdict.ALLOWED
                    )
        finally:
            process.communicate(timeout=20)


def test_the_question_costs_the_same_however_many_sockets_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        peers, "find_listed", lambda *_args, **_kw: pytest.fail("the list of all sockets was read")
    )
    with (
        listening(socket.AF_INET, "127.0.0.1") as server,
        socket.create_connection(server.getsockname()) as client,
    ):
        accepted, _ = server.accept()
        with accepted:
            peer, own = names(accepted)
            with begun(server) as doorkeeper:
                assert doorkeeper.judge(peer, own) is Verdict.ALLOWED
                client.close()
                assert doorkeeper.judge(("127.0.0.1", 1), own) is Verdict.DENIED


@pytest.mark.parametrize("broken", ["no such family", "no such protocol", "later on"])
def test_where_the_kernel_does_not_answer_its_list_is_read(
    broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))

    with (
        listening(socket.AF_INET, "127.0.0.1") as server,
        socket.create_connection(server.getsockname()),
    ):
        accepted, _ = server.accept()
        with accepted:
            peer, own = names(accepted)
            with Doorkeeper(()) as doorkeeper:
                if broken == "later on":
                    assert doorkeeper.begin(server.getsockname())
                    monkeypatch.setattr(Diag, "find", refuse)
                else:
                    if broken == "no such family":
                        monkeypatch.setattr(Diag, "__init__", refuse)
                    else:
                        monkeypatch.setattr(Diag, "find", lambda *_: None)
                    assert not doorkeeper.begin(server.getsockname())
                assert doorkeeper.judge(peer, own) is Verdict.ALLOWED
                assert doorkeeper._diag is None


def lists(directory: Path, *users: int, others: int = 0) -> Path:
    """Write a list of sockets, the client's of each user at port 40000 and so on.

    As a little-endian machine has it.
    """
    lines = [
        "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout"
        " inode"
    ]

    def add(local: str, remote: str, owner: int) -> None:
        number = f"{len(lines):4}: {local} {remote}"
        lines.append(
            f"{number} 01 00000000:00000000 00:00000000 00000000 {owner:5}        0 1234 1 0 20 4"
            " 30 10 -1"
        )

    for place in range(others):
        add(f"0200007F:{place:04X}", "0300007F:2677", 17)
    for place, user in enumerate(users):
        port = 40000 + place
        add("0100007F:2677", f"0100007F:{port:04X}", 0)
        add(f"0100007F:{port:04X}", "0100007F:2677", user)
    (directory / "tcp").write_text("\n".join(lines) + "\n")
    return directory


@pytest.mark.parametrize("others", [0, 1000, 3000])
def test_it_is_the_other_end_whose_user_counts(tmp_path: Path, others: int) -> None:
    proc, own = lists(tmp_path, 1000, 7, 65534, others=others), ("127.0.0.1", 9847)
    found = [find_listed(("127.0.0.1", 40000 + place), own, proc=proc) for place in range(4)]
    assert found == [Owner(1000, 1234), Owner(7, 1234), Owner(65534, 1234), None]


def test_the_list_is_read_in_pieces(tmp_path: Path) -> None:
    proc = lists(tmp_path, 1000, others=20_000)
    assert (proc / "tcp").stat().st_size > 2 << 20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert find_listed(("127.0.0.1", 40000), ("127.0.0.1", 9847), proc=proc) == Owner(1000, 1234)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1024


@pytest.mark.parametrize(
    ("users", "outcomes"),
    [
        ((), [True, False, False]),
        (("1000",), [True, True, False]),
        (("1000", "7"), [True] * 3),
        ((EVERYBODY,), [True] * 3),
    ],
)
def test_root_and_those_who_are_named_may_read(
    tmp_path: Path, users: tuple[str, ...], outcomes: list[bool]
) -> None:
    doorkeeper, own = Doorkeeper(users, proc=lists(tmp_path, 0, 1000, 7)), ("127.0.0.1", 9847)
    verdicts = [doorkeeper.judge(("127.0.0.1", 40000 + place), own) for place in range(3)]
    assert verdicts == [Verdict.ALLOWED if outcome else Verdict.DENIED for outcome in outcomes]


def test_another_machine_may_read_and_a_local_socket_that_is_not_known_may_not() -> None:
    doorkeeper = Doorkeeper(("prometheus",), proc=NONE)
    assert doorkeeper.judge(("192.0.2.7", 40000), ("192.0.2.1", 9847)) is Verdict.ALLOWED
    assert doorkeeper.judge(("fe80::1%eth0", 40000), ("fe80::2%eth0", 9847)) is Verdict.ALLOWED
    for local in ("127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"):
        assert doorkeeper.judge((local, 40000), (local, 9847)) is Verdict.DENIED


def test_a_local_socket_at_an_address_that_is_not_a_loopback_one_is_looked_for_in_the_list_too(
    tmp_path: Path,
) -> None:
    """By its hash it is not found if it is bound to an interface,
    and would pass for another machine's.
    """
    line = (
        "   1: 07020 01 00000000:00000000 00:00000000 00000000  1000        0 1234 1 0 20 4 30"
        " 10 -1"
    )
    addresses = " 070200C0:9C40 010200C0:2677 "  # 192.0.2.7:40000, 192.0.2.1:9847
    (tmp_path / "tcp").write_text(line.replace(" 07020 ", addresses) + "\n")
    with (
        Doorkeeper(("7",), proc=tmp_path) as doorkeeper,
        listening(socket.AF_INET, "127.0.0.1") as server,
    ):
        assert doorkeeper.begin(server.getsockname())
        assert doorkeeper.judge(("192.0.2.7", 40000), ("192.0.2.1", 9847)) is Verdict.DENIED


def test_names_are_looked_up_now_and_then_and_an_unknown_one_is_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert number_of("root") == 0
    assert number_of("17") == 17
    assert number_of("no-such-user") == -1
    asked: list[str] = []
    monkeypatch.setattr(peers, "number_of", lambda name: asked.append(name) or 1000)  # type: ignore[func-returns-value]
    doorkeeper, own = Doorkeeper(("made-later",), proc=lists(tmp_path, 1000)), ("127.0.0.1", 9847)
    for _ in range(5):
        assert doorkeeper.judge(("127.0.0.1", 40000), own) is Verdict.ALLOWED
    assert asked == ["made-later"]
    monkeypatch.setattr(peers, "NAMES_S", 0.0)
    Doorkeeper(("made-later",), proc=tmp_path).judge(("127.0.0.1", 40000), own)
    assert len(asked) == 2
