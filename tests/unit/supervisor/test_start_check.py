# SPDX-License-Identifier: GPL-2.0-or-later
"""`zswapd config check` says what a start would say, and changes nothing."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from zswapd.cli import zswapd
from zswapd.config import load
from zswapd.core import compress
from zswapd.core.backing.store import LABEL, check_store, open_store
from zswapd.errors import (
    BackingError,
    ConfigError,
    ControlError,
    MountError,
    PermissionsError,
    VolumeError,
    ZswapdError,
)
from zswapd.supervisor import acquire

MIB = 1 << 20


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory on a disk, since backings in memory are refused."""
    return tmp_path


def settings(place: Path, *more: str) -> list[str]:
    """Return options that are in order, and some more."""
    base = [
        "swap.size=8M", "metrics.listen=", "cache.limit=64M",
        f"control.socket={place}/sock", f"fuse.mountpoint={place}/mnt",
    ]  # fmt: skip
    return [word for setting in (*base, *more) for word in ("--set", setting)]


def seen(directory: Path) -> dict[str, tuple[int, int, int]]:
    """Return everything below a directory with what would tell of a change."""
    files = sorted(directory.rglob("*"))
    found = {str(path): path.lstat() for path in [directory, *files]}
    return {
        name: (status.st_mode, status.st_size, status.st_mtime_ns) for name, status in found.items()
    }


def check(place: Path, *more: str) -> int:
    before = seen(place)
    code = zswapd.main(["config", "check", *settings(place, *more)])
    assert seen(place) == before, "a check has changed something"
    return code


def write(path: Path, data: bytes = b"x" * 4096) -> Path:
    path.write_bytes(data)
    return path


def a_directory(place: Path) -> str:
    (place / "d").mkdir()
    return f"{place}/d"


def below_a_file(place: Path) -> str:
    return f"{write(place / 'f')}/x"


def a_pipe(place: Path) -> str:
    os.mkfifo(place / "pipe")
    return f"{place}/pipe"


def foreign(place: Path) -> str:
    return str(write(place / "theirs"))


def in_the_mount(place: Path) -> str:
    return f"{place}/mnt/store"


def a_link_into_the_mount(place: Path) -> str:
    (place / "link").symlink_to(place / "mnt/store")
    return f"{place}/link"


BAD_BACKINGS = [
    a_directory, below_a_file, a_pipe, foreign, in_the_mount, a_link_into_the_mount,
    lambda place: f"{place}/missing/store",
    lambda _place: "/dev/full",
    lambda _place: "/dev/null",
    lambda _place: "/dev/shm/store",
    lambda _place: "/proc/store",
    lambda _place: "/sys/store",
    lambda _place: "/etc",
]  # fmt: skip


@pytest.mark.mount
@pytest.mark.parametrize("make", BAD_BACKINGS)
def test_backing_that_cannot_be_one_is_refused_as_a_start_refuses_it(
    make: Callable[[Path], str], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make(place)
    code = check(place, f"backing.path={path}")
    said = capsys.readouterr().err
    assert code in {BackingError.exit_code, ConfigError.exit_code}, said
    assert "zswapd: hint: " in said
    if code == BackingError.exit_code:
        with pytest.raises(BackingError):
            os.close(open_store(Path(path), 2048, 4096, mountpoint=place / "mnt"))


@pytest.mark.mount
def test_backing_that_is_too_large_in_use_or_ours(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = place / "store"
    room = os.statvfs(place)
    slots = room.f_bavail * room.f_frsize // 4096 + (1 << 16)
    with pytest.raises(BackingError, match="no room"):
        check_store(store, slots, 4096, mountpoint=place / "mnt")
    assert check(place, f"backing.path={store}") == 0
    assert not store.exists()
    write(store, LABEL + bytes(4096 - len(LABEL)))
    assert check(place, f"backing.path={store}") == 0
    with store.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        capsys.readouterr()
        assert check(place, f"backing.path={store}") == BackingError.exit_code
        assert "in use by another process" in capsys.readouterr().err
    assert check(place, f"backing.path={store}") == 0, "the look holds no lock"


@pytest.fixture
def device(place: Path) -> Iterator[Path]:
    """A loop device of 4 MiB."""
    file = write(place / "disk", bytes(4 * MIB))
    made = subprocess.run(
        ["losetup", "--find", "--show", str(file)], check=True, capture_output=True, text=True
    )
    yield Path(made.stdout.strip())
    subprocess.run(["losetup", "--detach", made.stdout.strip()], check=True)


@pytest.mark.mount
@pytest.mark.kernel
def test_devices_that_are_too_small_or_in_use_or_carry_something(
    device: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    option = f"backing.path={device}"
    assert zswapd.main(["config", "check", *settings(place, option)]) == BackingError.exit_code
    assert "has 4194304 bytes, the swap files need" in capsys.readouterr().err
    small = ("swap.size=1M", option)
    assert zswapd.main(["config", "check", *settings(place, *small)]) == 0
    subprocess.run(["mkswap", str(device)], check=True, capture_output=True)
    assert zswapd.main(["config", "check", *settings(place, *small)]) == BackingError.exit_code
    assert "carries a signature: swap" in capsys.readouterr().err
    holder = os.open(device, os.O_RDONLY | os.O_EXCL)  # as a mount or a swap area has it
    try:
        assert zswapd.main(["config", "check", *settings(place, *small)]) == BackingError.exit_code
        assert "mounted, swapped on" in capsys.readouterr().err
    finally:
        os.close(holder)


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (a_directory, VolumeError.exit_code),
        (a_pipe, VolumeError.exit_code),
        (lambda _place: "/dev/null", VolumeError.exit_code),
        (lambda _place: "/", VolumeError.exit_code),
        (in_the_mount, VolumeError.exit_code),
        (a_link_into_the_mount, VolumeError.exit_code),
        (foreign, 0),
        (lambda place: f"{place}/missing", 0),
    ],
)
def test_volumes(
    make: Callable[[Path], str], code: int, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make(place)
    assert check(place, f"cache.volumes.v=ro:{path}") == code
    said = capsys.readouterr().err
    assert ("cache.volumes.v" in said) == (code != 0 or path.endswith("missing"))


@pytest.mark.mount
def test_mountpoints(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full, file, empty = place / "full", write(place / "file"), place / "empty"
    (full / "x").mkdir(parents=True)
    empty.mkdir()
    for path, what in (
        (full, "is not empty"),
        (file, "is not a directory"),
        (file / "x", "not a directory"),
    ):
        assert check(place, f"fuse.mountpoint={path}") == MountError.exit_code
        assert what in capsys.readouterr().err.lower()
    for path, what in (("/proc", "type proc"), ("/sys/x", "/sys/x")):
        assert check(place, f"fuse.mountpoint={path}") == MountError.exit_code
        assert what in capsys.readouterr().err
    for path in (empty, place / "a/b/c"):
        assert check(place, f"fuse.mountpoint={path}") == 0


@pytest.mark.mount
def test_sockets(place: Path) -> None:
    file = write(place / "file")
    assert check(place, f"control.socket={file}") == ControlError.exit_code
    assert check(place, f"control.socket={file}/sock") == PermissionsError.exit_code
    assert check(place, "control.socket=/proc/x/sock") == PermissionsError.exit_code
    assert check(place, f"control.socket={place}/a/b/sock") == 0


def test_metrics(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        assert check(place, f"metrics.listen=127.0.0.1:{port}") == 0
        assert "Address already in use" in capsys.readouterr().err
    assert check(place, "metrics.listen=198.51.100.7:9847") == 0
    assert "Cannot assign requested address" in capsys.readouterr().err
    assert check(place, "metrics.listen=127.0.0.1:9847", "metrics.users=root no-such-user 12") == 0
    warnings = capsys.readouterr().err
    assert "there is no user no-such-user" in warnings
    assert "user root" not in warnings
    command = [
        "config",
        "check",
        "--json",
        *settings(place, "metrics.users=no-such-user", "metrics.listen=127.0.0.1:9847"),
    ]
    assert zswapd.main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert any("no-such-user" in warning for warning in report["warnings"])


@pytest.mark.mount
def test_another_user_is_told_what_was_not_checked(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pid = os.fork()
    if not pid:
        os.setresuid(65534, 65534, 65534)
        code = zswapd.main(
            [
                "config",
                "check",
                "--json",
                "--set",
                "backing.path=/no/where/at/all",
                *settings(Path("/nix")),
            ]
        )
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.mount
@pytest.mark.parametrize(
    ("more", "error"), [("swap.size=15T", ConfigError), ("backing.buffers=75%", ConfigError)]
)
def test_a_start_refuses_before_anything_is_made(
    place: Path, more: str, error: type[ZswapdError]
) -> None:
    words = [*settings(place, "swap.size=1T", more), "--set", f"backing.path={place}/store"][1::2]
    assignments = [(*word.split("=", 1), "--set") for word in words]
    before = seen(place)
    mounts = Path("/proc/self/mountinfo").read_text().count(str(place))
    with pytest.raises(error):
        acquire.make_resources(load(codecs=compress.names(), assignments=assignments))  # type: ignore[arg-type]
    after = seen(place)
    assert after.keys() == before.keys(), "something was made"
    assert Path("/proc/self/mountinfo").read_text().count(str(place)) == mounts
    assert check(place, "swap.size=1T", more, f"backing.path={place}/store") == error.exit_code


def test_a_check_is_quick(place: Path) -> None:
    began = time.monotonic()
    assert check(place) == 0
    assert time.monotonic() - began < 5
