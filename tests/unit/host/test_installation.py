# SPDX-License-Identifier: GPL-2.0-or-later
"""Which command starts, stops and calls zswapd: by how it was installed,
in made-up root directories.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support import TOP
from zswapd.cli import zswapctl, zswapd
from zswapd.host import installation
from zswapd.host.installation import Installation

UNIT = (TOP / "systemd/zswapd.service").read_text()


def program(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("zswapd", "zswapctl"):
        (directory / name).write_text("#!/bin/sh\n")
        (directory / name).chmod(0o755)
    return directory


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine with systemd, and nothing of zswapd on it."""
    for name in ("run/systemd/system", "etc/systemd/system", "usr/lib/systemd/system", "usr/bin"):
        (tmp_path / name).mkdir(parents=True)
    return tmp_path


def unit(root: Path, text: str = UNIT, directory: str = "usr/lib/systemd/system") -> None:
    (root / directory).mkdir(parents=True, exist_ok=True)
    (root / directory / "zswapd.service").write_text(text)


@pytest.fixture
def package(root: Path) -> Installation:
    program(root / "usr/bin")
    unit(root)
    # Below the test's directory /usr/bin is no place that a shell searches; what counts is the
    # unit.
    return Installation(root / "usr/bin", root)


def test_package_is_started_by_its_unit(package: Installation) -> None:
    assert package.start() == "`systemctl start zswapd`"
    assert package.restart() == "`systemctl restart zswapd`"
    assert package.log() == "`journalctl -u zswapd -e`"


@pytest.mark.parametrize("kind", ["no systemd", "no unit"])
def test_without_unit_or_systemd_the_program_is_named(package: Installation, kind: str) -> None:
    if kind == "no unit":
        (package.root / "usr/lib/systemd/system/zswapd.service").unlink()
    else:
        (package.root / "run/systemd/system").rmdir()  # a container: no systemd answers systemctl
    assert package.start() == f"`{package.root}/usr/bin/zswapd run`"
    assert "systemctl" not in package.restart() + package.log()


@pytest.mark.parametrize("has_package", [False, True])
def test_checkout_is_not_what_the_packages_unit_starts(root: Path, has_package: bool) -> None:
    if has_package:
        program(root / "usr/bin")
        unit(root)
    checkout = root / "home/me/zswapd"
    there = Installation(program(checkout / ".venv/bin"), root, here=checkout)
    assert there.start() == "`.venv/bin/zswapd run`"
    assert there._replace(is_root=False, has_sudo=True).start() == "`sudo .venv/bin/zswapd run`"
    elsewhere = there._replace(here=root / "tmp")
    assert elsewhere.start() == f"`{checkout}/.venv/bin/zswapd run`"
    inside = there._replace(here=checkout / ".venv/bin")
    assert inside.start() == "`./zswapd run`"


@pytest.mark.parametrize(
    "directory", ["etc/systemd/system", "run/systemd/system", "usr/local/lib/systemd/system"]
)
@pytest.mark.parametrize("prefix", ["", "-", "@", "!"])
def test_wheel_with_a_unit_of_its_own_is_started_by_that(
    root: Path, directory: str, prefix: str
) -> None:
    unit(root)  # the package's, which another one in /etc hides
    unit(root, f"[Service]\nExecStart={prefix}/opt/zswapd/bin/zswapd run --size 1G\n", directory)
    assert (
        Installation(program(root / "opt/zswapd/bin"), root).start() == "`systemctl start zswapd`"
    )


def test_wheel_without_unit_is_called_where_it_is(root: Path) -> None:
    there = Installation(program(root / "opt/my tools/bin"), root)
    (command,) = shlex.split(there.start().strip("`"))[:1]
    assert command == f"{root}/opt/my tools/bin/zswapd"


def test_masked_unit_is_unmasked_first(package: Installation) -> None:
    (package.root / "etc/systemd/system/zswapd.service").symlink_to("/dev/null")
    assert package.start() == "`systemctl unmask zswapd && systemctl start zswapd`"
    user = package._replace(is_root=False, has_sudo=True)
    assert user.start() == "`sudo systemctl unmask zswapd && sudo systemctl start zswapd`"


def test_who_is_not_root_becomes_root_by_what_there_is(package: Installation) -> None:
    user = package._replace(is_root=False, has_sudo=True)
    assert user.start() == "`sudo systemctl start zswapd`"
    assert user._replace(has_sudo=False).start() == "`su -c 'systemctl start zswapd'`"


def test_daemon_that_was_started_by_hand_is_not_the_units(package: Installation) -> None:
    (package.root / "proc/11").mkdir(parents=True)
    (package.root / "proc/12").mkdir()
    (package.root / "proc/11/cgroup").write_text("0::/zswapd.service\n")
    (package.root / "proc/12/cgroup").write_text("0::/user.slice/user-0.slice/session-1.scope\n")
    assert package.stop(11) == "`systemctl stop zswapd`"
    assert package.restart(11) == "`systemctl restart zswapd`"
    assert package.stop(12) == "`kill 12`"
    assert package.restart(12) == f"`kill 12` and then `{package.root}/usr/bin/zswapd run`"
    assert package.stop(13) == "`kill 13`", "it has just ended"


@pytest.mark.parametrize(
    ("name", "is_there"), [(".dockerenv", True), ("run/systemd/container", True), ("else", False)]
)
def test_container_is_told_by_its_marks(package: Installation, name: str, is_there: bool) -> None:
    (package.root / name).write_text("")
    assert package.is_in_container() is is_there


def test_names_in_every_path_are_short() -> None:
    assert Installation(Path("/usr/bin"), Path("/nonexistent")).program("zswapctl") == "zswapctl"
    assert Installation(None, Path("/nonexistent")).start() == "`zswapd run`"


def test_this_environments_programs_are_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    here = Path(sys.executable).parent
    assert (here / "zswapd").exists()
    assert installation.found().directory == here
    monkeypatch.setattr(
        sys, "argv", [str(program(tmp_path / "bin") / "zswapctl"), "swapon", "--priority", "5"]
    )
    assert installation.found().directory == tmp_path / "bin"
    assert f"{tmp_path}/bin/zswapctl swapon --priority 5" in installation.called_again()
    link = tmp_path / "zswapctl"
    link.symlink_to(tmp_path / "bin/zswapctl")
    monkeypatch.setattr(sys, "argv", [str(link)])
    assert installation.found().directory == tmp_path / "bin", (
        "the other program is not beside the link"
    )
    assert installation.of_daemon().here is None


def test_directory_that_was_removed_is_no_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert installation.found().here is None


def test_commands_are_right(package: Installation) -> None:
    """What is named parses."""
    start = package._replace(root=Path("/none")).start
    words = shlex.split(start().strip("`"))
    zswapd.make_parser().parse_args(words[1:])
    zswapctl.make_parser().parse_args(shlex.split(package.call("swapoff", "--all").strip("`"))[1:])


def test_reinstalling_is_by_what_it_was_installed_from() -> None:
    command = Installation(TOP / ".venv/bin", is_root=True).reinstall()
    assert command == f"`{TOP}/scripts/demo --help`"
    assert os.access(TOP / "scripts/demo", os.X_OK)
    assert tomllib.loads((TOP / "pyproject.toml").read_text())["project"]["name"] == "zswapd"


def test_restart_names_the_supervisor_above(tmp_path: Path) -> None:
    """A worker, or the check of an upgrade below it, names the topmost process of the daemon."""
    code = "from zswapd.host.installation import restart_daemon as text; print(text(), flush=True)"
    fake = tmp_path / "zswapd"
    fake.write_text(
        "import os, sys\nif os.fork() == 0:\n    os.execv(sys.executable, [sys.executable, '-c',"
        f" {code!r}])\nos.wait()\n"
    )
    done = subprocess.Popen(
        [sys.executable, str(fake), "run"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(TOP)},
    )
    out, _ = done.communicate(timeout=30)
    assert re.search(rf"\bkill {done.pid}\b", out)
