# SPDX-License-Identifier: GPL-2.0-or-later
"""Hints: another one for each of the system's reasons,
and every command in one exists and is understood.
"""

from __future__ import annotations

import ast
import contextlib
import errno
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import TOP
from zswapd.cli import zswapctl, zswapd
from zswapd.config import SECTIONS, SETTINGS, loader
from zswapd.control.listener import Listener, supervisor_of
from zswapd.core.backing import store
from zswapd.errors import ZswapdError
from zswapd.fuse import mount
from zswapd.host import hints, installation
from zswapd.host.installation import Installation
from zswapd.swapdevice import swapon

REASONS = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOENT,
    errno.ENOTDIR, errno.EBUSY, errno.ETXTBSY, errno.ENODEV, errno.ENXIO, errno.ENOMEM,
    errno.EMFILE, errno.ENFILE, errno.EIO, errno.ENAMETOOLONG, errno.ELOOP,
)  # fmt: skip
OUTSIDE = {"docker", "podman"}
"""Programs of the machine around a container, where the hint's command is typed."""
PACKAGES = {
    "apt-get", "blkdiscard", "capsh", "chattr", "df", "dmesg", "free", "fuser", "grep",
    "journalctl", "kill", "losetup", "ls", "lsattr", "lsblk", "mkdir", "modprobe", "mount",
    "namei", "ps", "quota", "rm", "su", "sudo", "swapoff", "swapon", "sysctl", "systemctl",
    "ulimit", "umount", "wipefs",
}  # fmt: skip
"""Of Debian: coreutils, e2fsprogs, kmod, libcap2-bin, procps, psmisc, quota, sudo, systemd,
util-linux; of bash.
"""


def refusal(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def be(monkeypatch: pytest.MonkeyPatch, *, uid: int = 0, **facts: object) -> None:
    """Make this process that of another user, or on another machine."""
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    there = Installation(Path("/usr/bin"), Path("/nonexistent"), is_root=uid == 0, **facts)  # type: ignore[arg-type]
    monkeypatch.setattr(installation, "found", lambda: there)


def test_each_reason_has_a_hint_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    be(monkeypatch)
    texts = {
        number: hints.for_failure(refusal(number), tmp_path / "sock", "choose another")
        for number in REASONS
    }
    assert len(set(texts.values())) == len(REASONS)
    assert all(text.endswith("; or choose another") for text in texts.values())
    assert "as root:" not in " ".join(texts.values()), "root is told to be root"
    assert hints.for_failure(refusal(errno.EPIPE), tmp_path, "choose another") == "choose another"
    assert (
        hints.for_failure(OSError("a text alone"), tmp_path, "choose another") == "choose another"
    )


def test_reasons_name_what_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    be(monkeypatch)
    missing = tmp_path / "my dir/below/sock"
    assert f"`chattr -i {tmp_path}`" in hints.for_failure(refusal(errno.EPERM), missing, "x")
    assert f"`mkdir -p '{missing.parent}'`" in hints.for_failure(
        refusal(errno.ENOENT), missing, "x"
    )
    above = hints.for_failure(refusal(errno.EROFS), missing, "x")
    mountpoint = re.search(r"`mount -o remount,rw ([^`]+)`", above)
    assert mountpoint
    assert os.path.ismount(mountpoint[1])


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM])
def test_who_is_not_root_is_told_the_command_again(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    be(monkeypatch, uid=1000, has_sudo=True)
    monkeypatch.setattr("sys.argv", ["/usr/bin/zswapctl", "--json", "status"])
    assert (
        hints.for_failure(refusal(number), "/run/x", "y")
        == "run it as root: `sudo zswapctl --json status`"
    )
    assert (
        hints.for_device(refusal(number), "/dev/fuse", "fuse")
        == "run it as root: `sudo zswapctl --json status`"
    )
    assert "`sudo zswapctl --json status`" in hints.for_capability("CAP_SYS_ADMIN")


def test_device_that_is_missing_is_loaded_or_passed_in(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    be(monkeypatch)
    assert "`modprobe fuse`" in hints.for_device(refusal(errno.ENOENT), "/dev/fuse", "fuse")
    assert "DeviceAllow=" in hints.for_device(refusal(errno.EPERM), "/dev/fuse", "fuse")
    assert "CAP_SYS_NICE" in hints.for_capability("CAP_SYS_NICE")
    assert "docker" not in hints.for_capability("CAP_SYS_NICE")
    (tmp_path / ".dockerenv").write_text("")
    monkeypatch.setattr(installation, "found", lambda: Installation(None, tmp_path))
    for number in (errno.ENOENT, errno.EPERM):
        assert "`docker run --device /dev/fuse`" in hints.for_device(
            refusal(number), "/dev/fuse", "fuse"
        )
    assert "`docker run --cap-add SYS_NICE`" in hints.for_capability("CAP_SYS_NICE")
    unit = tmp_path / f"proc/{os.getpid()}"
    unit.mkdir(parents=True)
    (unit / "cgroup").write_text("0::/zswapd.service\n")
    assert "CapabilityBoundingSet=" in hints.for_capability("CAP_SYS_NICE")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("swpa", "swap"),
        ("SWAP", "swap"),
        ("scratc", "scratch"),
        ("swap2", "swap"),
        ("zzz", None),
        ("", None),
    ],
)
def test_nearest_name(name: str, near: str | None) -> None:
    assert hints.nearest(name, ["swap", "scratch"]) == near
    assert hints.did_you_mean(name, ["swap", "scratch"], "no idea") == (
        f"did you mean {near}?" if near else "no idea"
    )


def test_swap_file_that_is_missing() -> None:
    assert (
        hints.no_swap_file("scratc", ["swap", "scratch"]).hint
        == "did you mean scratch? there are: swap, scratch"
    )
    assert hints.no_swap_file("third", ["swap", "second"]).hint == "there are: swap, second"
    assert "swap.size" in (hints.no_swap_file("swap", []).hint or "")


# All hints that there are.


def texts(node: ast.expr) -> Iterator[str]:
    """Yield the strings that an expression may give,
    with X for what is not known before it runs.
    """
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else "X" for part in node.values]
        yield "".join(str(part) for part in parts)
    elif isinstance(node, ast.IfExp):
        yield from texts(node.body)
        yield from texts(node.orelse)
    elif isinstance(node, ast.Dict):
        for value in node.values:
            yield from texts(value)
    elif isinstance(node, ast.Call):
        for argument in node.args:
            yield from texts(argument)


def hint_of(node: ast.AST, path: Path) -> list[ast.expr]:
    """Return the expressions in a node that are hints."""
    if isinstance(node, ast.Call):
        found = [keyword.value for keyword in node.keywords if keyword.arg == "hint"]
        named = node.func.id if isinstance(node.func, ast.Name) else ""
        return found + (
            node.args[-1:] if named in ("for_failure", "_refuse", "ValueRefused") else []
        )
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in (
        "hint",
        "hints",
        "otherwise",
        "texts",
    ):
        return [node.value]
    if (
        isinstance(node, ast.Return)
        and path.name in ("host/hints.py", "host/installation.py")
        and node.value
    ):
        return [node.value]
    return []


def all_hints() -> Iterator[tuple[str, str]]:
    """Yield every hint in the program, and where it stands."""
    for path in sorted((TOP / "zswapd").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            for expression in hint_of(node, path):
                for text in texts(expression):
                    yield f"{path.relative_to(TOP)}:{expression.lineno}", text


HINTS = sorted(set(all_hints()))


def test_there_are_many_hints() -> None:
    assert len(HINTS) > 150


def commands(text: str) -> Iterator[list[str]]:
    for command in re.findall(r"`([^`]+)`", text):
        for part in re.split(r" && |\|", command):
            yield shlex.split(part)


def test_every_command_in_a_hint_is_understood() -> None:
    for where, text in HINTS:
        assert text.count("`") % 2 == 0, f"{where}: {text}"
        for words in commands(text):
            if words[0] in ("i", "X"):  # the attribute; a command that another test has
                continue
            if words[0] in ("zswapd", "zswapctl"):
                parser = (zswapd if words[0] == "zswapd" else zswapctl).make_parser()
                try:
                    parser.parse_args(words[1:])
                except ZswapdError as refused:
                    raise AssertionError(f"{where}: {shlex.join(words)}: {refused}") from refused
            else:
                assert words[0] in PACKAGES | OUTSIDE, f"{where}: {shlex.join(words)}"


def test_hints_that_are_a_command_are_one() -> None:
    """Some hints are a command as a whole, without backticks."""
    bare = [
        (where, text) for where, text in HINTS if re.match(r"(umount|losetup|fuser|sysctl) ", text)
    ]
    assert len(bare) >= 6
    for where, text in bare:
        assert shutil.which(shlex.split(text)[0]) or shlex.split(text)[0] in PACKAGES, where


def test_settings_in_hints_exist() -> None:
    for where, text in HINTS:
        for name in re.findall(rf"\b((?:{'|'.join(SECTIONS)})\.[a-z_]{{3,}})\b", text):
            assert name in SETTINGS or name == "section.key", f"{where}: {name}"


@pytest.mark.parametrize("word", ["as root", "umount -l", "umount --lazy"])
def test_what_hints_say_no_more(word: str) -> None:
    """Advice that is wrong for some: root is root already; a dead mount goes by itself,
    unless it is a stranger's.
    """
    fine = (
        "zswapd/host/hints.py",
        "zswapd/fuse/mount.py",
        "zswapd/control/server.py",
        "zswapd/host/installation.py",
    )
    assert not [where for where, text in HINTS if word in text and not where.startswith(fine)]


# Where files cannot be had.


def make_socket(directory: Path) -> None:
    Listener(directory / "zswapd.sock").open()


def look_for_supervisor(directory: Path) -> None:
    supervisor_of(directory / "zswapd.sock")


def make_mountpoint(directory: Path) -> None:
    mount.Mount(directory / "mnt")._make_mountpoint(contextlib.ExitStack())


def open_backing(directory: Path) -> None:
    store._open(directory / "store")


def open_swap_file(directory: Path) -> None:
    with swapon._backing_file(directory / "swap", directory):
        pass


def read_settings(directory: Path) -> None:
    loader._read_file(directory / "zswapd.toml", is_chosen=True)


def read_drop_in(directory: Path) -> None:
    loader._read_file(directory / "zswapd.toml.d/x.toml", is_chosen=False)


PLACES: dict[Callable[[Path], None], str] = {
    make_socket: "--set control.socket=PATH",
    look_for_supervisor: "--set control.socket=PATH",
    make_mountpoint: "choose another --mountpoint",
    open_backing: "choose another",
    open_swap_file: "zswapctl status",
    read_settings: "--config",
    read_drop_in: "`rm ",
}


@pytest.mark.parametrize(
    "number",
    [errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.ENOMEM, errno.EMFILE, errno.EIO],
)
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_each_place_tells_each_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: Callable[[Path], None], number: int
) -> None:
    be(monkeypatch)

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), os.fsdecode(path))

    with monkeypatch.context() as patch:
        (
            patch.setattr(Path, "mkdir", refuse)
            if place is make_mountpoint
            else patch.setattr(os, "open", refuse)
        )
        patch.setattr(Path, "open", refuse)
        with pytest.raises(ZswapdError) as caught:
            place(tmp_path)
    assert os.strerror(number) in caught.value.message
    hint = caught.value.hint or ""
    words = {
        errno.EACCES: "as root, too",
        errno.EPERM: "`chattr -i ",
        errno.EROFS: "read-only",
        errno.ENOSPC: "`df -h ",
        errno.ENOMEM: "`free -m`",
        errno.EMFILE: "`ulimit -n`",
        errno.EIO: "`dmesg`",
    }
    assert words[number] in hint
    assert PLACES[place] in hint
    assert "run zswapd as root" not in hint


@pytest.mark.mount
def test_read_only_file_system_is_named(tmp_path: Path) -> None:
    """The real thing: root may do all, but not this."""
    (tmp_path / "run").mkdir()
    code = "import sys; from zswapd.cli.zswapd import main; sys.exit(main(sys.argv[1:]))"
    script = (
        'mount -t tmpfs -o ro tmpfs "$1/run" && exec "$2" -c "$3" run --size 64M --set'
        ' "control.socket=$1/run/z/sock"'
    )
    command = [
        "unshare",
        "--mount",
        "--propagation=private",
        "sh",
        "-c",
        script,
        "sh",
        tmp_path,
        sys.executable,
        code,
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, cwd=TOP)
    assert f"`mount -o remount,rw {tmp_path}/run`" in done.stderr
    assert "as root" not in done.stderr
