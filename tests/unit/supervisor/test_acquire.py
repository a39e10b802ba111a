# SPDX-License-Identifier: GPL-2.0-or-later
"""Where a supervisor's open files come from, and what it refuses to take over."""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import capabilities
from zswapd import config
from zswapd.config import Config
from zswapd.core.allocators.arena import LAYOUT_VERSION as ARENA_LAYOUT
from zswapd.core.sizing import label
from zswapd.errors import ControlError, HandoverError, MountError
from zswapd.handover import geometry as geometry_module
from zswapd.handover.geometry import describe_geometry
from zswapd.handover.resources import NAMES
from zswapd.handover.state import LAYOUT_VERSION as STATE_LAYOUT
from zswapd.supervisor import acquire, check, inheritance, orphan
from zswapd.system import Notifier


@pytest.fixture
def settings(tmp_path: Path) -> Config:
    assignments = [
        ("swap.size", "64M", "--size"),
        ("fuse.mountpoint", str(tmp_path / "mnt"), "--mountpoint"),
    ]
    return config.load(
        codecs=("lz4", "lzo"), assignments=assignments, root=tmp_path_with_proc(tmp_path)
    )


def tmp_path_with_proc(path: Path) -> Path:
    (path / "proc").mkdir()
    (path / "proc/meminfo").write_text("MemTotal: 1048576 kB\n")
    return path


def identity(settings: Config, **changes: object) -> str:
    return json.dumps(
        {
            "arena_layout": ARENA_LAYOUT,
            "state_layout": STATE_LAYOUT,
            "geometry": describe_geometry(settings),
            **changes,
        }
    )


def test_check_accepts_what_it_would_make_itself(settings: Config) -> None:
    check(settings, identity(settings))


@pytest.mark.parametrize("change", [{"arena_layout": 99}, {"state_layout": 99}])
def test_check_refuses_layouts_that_it_does_not_know(
    settings: Config, change: dict[str, int]
) -> None:
    with pytest.raises(HandoverError, match="layout 99") as caught:
        check(settings, identity(settings, **change))
    assert "swap off" in (caught.value.hint or "")


def test_check_knows_what_older_programs_had(
    settings: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = describe_geometry(settings)
    older = {key: shape[key] for key in ("mountpoint", "page_size", "files")}
    check(settings, identity(settings, arena_layout=2, geometry=older))
    wanted = {**describe_geometry(settings), "allocator": "zbud"}
    monkeypatch.setattr(geometry_module, "describe_geometry", lambda _config: wanted)
    with pytest.raises(
        HandoverError, match=r'pool\.allocator is "zsmalloc", the settings say "zbud"'
    ):
        check(settings, identity(settings, geometry=older))


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("mountpoint", "fuse.mountpoint"),
        ("page_size", "page size"),
        ("files", "files"),
        ("allocator", "pool.allocator"),
        ("max_zspage_frames", "pool.max_zspage_frames"),
        ("control.socket", "control.socket"),
    ],
)
def test_check_refuses_another_shape_by_its_name(settings: Config, key: str, name: str) -> None:
    with pytest.raises(HandoverError, match=f"the running daemon's {name} is"):
        check(settings, identity(settings, geometry={**describe_geometry(settings), key: "other"}))


def test_check_refuses_the_same_files_in_another_order(
    settings: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = describe_geometry(settings)
    files = {"swap": 4096, "a": 4096, "b": 8192}
    monkeypatch.setattr(
        geometry_module, "describe_geometry", lambda _config: {**shape, "files": files}
    )
    check(settings, identity(settings, geometry={**shape, "files": dict(files.items())}))
    with pytest.raises(
        HandoverError, match="order of swap files is b, a, swap, the settings say swap, a, b"
    ):
        check(
            settings, identity(settings, geometry={**shape, "files": dict(reversed(files.items()))})
        )


def test_check_refuses_an_arena_for_other_settings(settings: Config) -> None:
    ours = label(settings).decode()
    check(settings, identity(settings, arena_label=ours))
    with pytest.raises(
        HandoverError,
        match=r"arena is for other settings: pool\.max_zspage_frames is 9, the settings say 8",
    ):
        check(settings, identity(settings, arena_label=ours.replace(":8", ":9")))


@capabilities.requires_fuse()
def test_store_that_was_made_for_an_estate_that_cannot_be_is_removed_again(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    store = tmp_path / "store"
    assignments = [
        ("swap.size", "1M", ""),
        ("memory.reserve", "64K", ""),
        ("fuse.mountpoint", str(tmp_path / "file"), ""),
        ("control.socket", str(tmp_path / "socket"), ""),
        ("backing.path", str(store), ""),
    ]
    settings = config.load(
        codecs=("lz4",), assignments=assignments, root=tmp_path_with_proc(tmp_path)
    )
    for before in (None, b""):
        if before is not None:
            store.write_bytes(before)
        with pytest.raises(MountError):
            acquire.make_resources(settings)
        assert store.exists() == (before is not None), "what was there is left"


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def test_environment_is_for_this_process_only_and_read_once(
    monkeypatch: pytest.MonkeyPatch, pipe: tuple[int, int]
) -> None:
    left = {"pid": os.getpid(), "worker": 7, "files": {"fuse": pipe[0], "arena": pipe[1]}}
    monkeypatch.setenv("ZSWAPD_ESTATE", json.dumps(left))
    os.set_inheritable(pipe[0], True)
    assert inheritance.from_environment() == (left["files"], 7)
    assert not os.get_inheritable(pipe[0])
    assert inheritance.from_environment() is None
    monkeypatch.setenv("ZSWAPD_ESTATE", json.dumps({**left, "pid": 1}))
    assert inheritance.from_environment() is None


@pytest.mark.parametrize(
    ("names", "count", "pid", "found"),
    [
        ("zswapd-fuse:zswapd-arena:zswapd-state", "3", None, {"fuse": 3, "arena": 4, "state": 5}),
        (
            "other:zswapd-state:zswapd-arena:zswapd-fuse",
            "4",
            None,
            {"fuse": 6, "arena": 5, "state": 4},
        ),
        ("zswapd-fuse:zswapd-arena", "2", None, None),
        ("zswapd-fuse:zswapd-arena:zswapd-state", "3", "1", None),
        ("zswapd-fuse:zswapd-arena:zswapd-state", "many", None, None),
        ("", "", None, None),
    ],
)
def test_service_manager_gives_all_three_or_nothing(
    monkeypatch: pytest.MonkeyPatch,
    names: str,
    count: str,
    pid: str | None,
    found: dict[str, int] | None,
) -> None:
    monkeypatch.setattr(os, "set_inheritable", lambda *_: None)
    monkeypatch.setenv("LISTEN_FDNAMES", names)
    monkeypatch.setenv("LISTEN_FDS", count)
    monkeypatch.setenv("LISTEN_PID", pid or str(os.getpid()))
    assert inheritance.from_service_manager() == (found and (found, 0))
    assert "LISTEN_PID" not in os.environ  # a child is not meant


def test_notifier_sends_the_file_itself(tmp_path: Path, pipe: tuple[int, int]) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify")})
        assert notifier.store(inheritance.stored_name("arena"), pipe[1])
        data, ancillary, _, _ = manager.recvmsg(4096, socket.CMSG_SPACE(4))
        assert data.split(b"\n") == [b"FDSTORE=1", b"FDNAME=zswapd-arena", b"FDPOLL=0"]
        (descriptor,) = struct.unpack("i", ancillary[0][2])
        assert os.path.samestat(os.fstat(descriptor), os.fstat(pipe[1]))
        os.close(descriptor)
        assert notifier.unstore(inheritance.stored_name("arena"))
        assert manager.recv(4096) == b"FDSTOREREMOVE=1\nFDNAME=zswapd-arena"
        notifier.close()


@pytest.mark.parametrize(
    ("answer", "files"),
    [
        (
            (
                b'{"v":1,"ok":false,"error":{"message":"this worker has a'
                b' supervisor","hint":null,"code":5}}\n'
            ),
            0,
        ),
        (b'{"v":1,"ok":true,"result":77}\n', 4),
        (b'{"v":1,"ok":true,"result":"no number"}\n', 5),
        (b"nonsense\n", 0),
        (b"", 0),
    ],
)
def test_orphan_that_gives_no_whole_estate_is_refused_and_nothing_stays_open(
    tmp_path: Path, pipe: tuple[int, int], answer: bytes, files: int
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ControlError):
        answered(tmp_path / "socket", answer, [pipe[0]] * files)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("count", [5, 6])
def test_orphan_gives_its_files_by_name(tmp_path: Path, pipe: tuple[int, int], count: int) -> None:
    files, worker = answered(
        tmp_path / "socket", b'{"v":1,"ok":true,"result":77}\n', [pipe[0], *[pipe[1]] * (count - 1)]
    )
    assert worker == 77
    assert tuple(files) == NAMES[:count], (
        "what is behind the pool is the last, and may not be there"
    )
    assert os.path.samestat(os.fstat(files["fuse"]), os.fstat(pipe[0]))
    assert os.path.samestat(os.fstat(files["lock"]), os.fstat(pipe[1]))
    assert not any(os.get_inheritable(descriptor) for descriptor in files.values())
    for descriptor in files.values():
        os.close(descriptor)


def answered(path: Path, answer: bytes, files: list[int]) -> tuple[dict[str, int], int]:
    """Call `inherit` on a worker that says `answer` and sends `files`."""
    import threading

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                if answer:
                    rights = (
                        socket.SOL_SOCKET,
                        socket.SCM_RIGHTS,
                        struct.pack(f"{len(files)}i", *files),
                    )
                    connection.sendmsg([answer], [rights] if files else [])

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            return orphan.inherit(path)
        finally:
            thread.join(10)


def test_retire_asks_and_then_kills() -> None:
    import signal
    import time

    child = os.fork()
    if not child:
        signal.signal(orphan.LEAVE, signal.SIG_IGN)
        time.sleep(60)
        os._exit(0)
    time.sleep(0.2)
    begin = time.monotonic()
    orphan.retire(child, limit=0.3)
    assert 0.25 < time.monotonic() - begin < 5
    orphan.retire(child)  # gone: nothing to do


@pytest.mark.parametrize(
    "running", ["", "[]", "{}", '{"arena_layout": 2, "state_layout": 1, "geometry": 7}']
)
def test_check_refuses_what_makes_no_sense(settings: Config, running: str) -> None:
    with pytest.raises(HandoverError, match="is not valid") as caught:
        check(settings, running)
    assert "upgrade" in (caught.value.hint or "")
