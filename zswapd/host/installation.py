# SPDX-License-Identifier: GPL-2.0-or-later
"""The installation of this program, and the commands that start, stop and call it.

A hint names the next command to type. The command depends on three things:

- Does systemd run, and does a unit `zswapd.service` start this program? The unit may be that of the
  Debian package, or made by hand. The unit does not start a checkout on the same machine.
- If not, in which directory are the programs? They are beside the running program. A hint names
  them as a shell in the current directory needs it.
- Is the caller root, and if not, is there sudo?

All functions return text for a sentence, with each command in backticks. They are called after
failures, and never raise.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

UNIT = "zswapd"
_UNITS = (
    "etc/systemd/system",
    "run/systemd/system",
    "usr/local/lib/systemd/system",
    "usr/lib/systemd/system",
    "lib/systemd/system",
)
"""The directories of systemd's units; the first one wins (systemd.unit(5))."""
_IN_EVERY_PATH = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
"""Directories that sudo searches too (secure_path of sudoers(5))."""
_CONTAINERS = ("run/.containerenv", ".dockerenv", "run/systemd/container")
"""Files that exist in a container: of podman, docker, systemd's interface (systemd-nspawn, LXC)."""


class Installation(NamedTuple):
    """An installation of the program on a machine, and its caller.

    `found` returns that of this process; tests make others.
    """

    directory: Path | None
    """The directory of `zswapd` and `zswapctl`; None if it is not known."""
    root: Path = Path("/")
    """The root directory."""
    is_root: bool = True
    has_sudo: bool = False
    here: Path | None = None
    """The caller's directory, for names relative to it; None for absolute names."""

    @property
    def is_service(self) -> bool:
        """Whether systemd runs, and has a unit that starts this program."""
        if not (self.root / "run/systemd/system").is_dir():
            return False
        return any(self._is_ours(_started_by(unit)) for unit in self._units())

    @property
    def is_masked(self) -> bool:
        """Whether the unit is masked, by a link to /dev/null."""
        first = next(iter(self._units()), None)
        return first is not None and first.is_symlink() and first.readlink().name == "null"

    def program(self, name: str) -> str:
        """Return the name or path of one of the programs, quoted for a shell."""
        if self.directory is None or str(self.directory) in _IN_EVERY_PATH:
            return name
        path = self.directory / name
        if self.here is not None and path.is_relative_to(self.here):
            relative = str(path.relative_to(self.here))
            return shlex.quote(relative if "/" in relative else f"./{relative}")
        return shlex.quote(str(path))

    def as_root(self, *commands: str) -> str:
        """Return commands for root, one after the other, as the caller has to type them."""
        if self.is_root:
            return f"`{' && '.join(commands)}`"
        if self.has_sudo:
            return f"`{' && '.join(f'sudo {command}' for command in commands)}`"
        return f"`su -c {shlex.quote(' && '.join(commands))}`"

    def start(self) -> str:
        """Return the command that starts the daemon."""
        if not self.is_service:
            return self.as_root(f"{self.program('zswapd')} run")
        unmask = (f"systemctl unmask {UNIT}",) if self.is_masked else ()
        return self.as_root(*unmask, f"systemctl start {UNIT}")

    def restart(self, pid: int = 0) -> str:
        """Return the commands that restart the daemon.

        Both ways begin with swapoff. If the swapped-out data does not fit into memory, the daemon
        goes on.

        Args:
            pid: the supervisor's process id, if that is known.
        """
        if self.is_service and (not pid or self.is_of_unit(pid)):
            return self.as_root(f"systemctl restart {UNIT}")
        stop = self.as_root(f"kill {pid}") if pid else "SIGTERM to `zswapd run`"
        return f"{stop} and then {self.as_root(self.program('zswapd') + ' run')}"

    def stop(self, pid: int) -> str:
        """Return the command that stops a daemon.

        Args:
            pid: the supervisor's process id.
        """
        return self.as_root(f"systemctl stop {UNIT}" if self.is_of_unit(pid) else f"kill {pid}")

    def reinstall(self) -> str:
        """Return the command that installs the program anew, with all that is compiled."""
        code = Path(__file__).resolve().parents[2]
        if (code / "pyproject.toml").exists():
            return self.as_root(f"{shlex.quote(str(code / 'scripts/demo'))} --help")
        if code == Path("/usr/lib/zswapd"):
            return self.as_root("apt-get install --reinstall ./zswapd_*.deb")
        return self.as_root(
            f"{shlex.quote(sys.executable)} -m pip install --force-reinstall ./zswapd-*.whl"
        )

    def log(self) -> str:
        """Return where the daemon's log is."""
        return (
            self.as_root(f"journalctl -u {UNIT} -e")
            if self.is_service
            else "what `zswapd run` wrote on standard error"
        )

    def call(self, *words: str) -> str:
        """Return the command that calls zswapctl, as root."""
        return self.as_root(" ".join((self.program("zswapctl"), *map(shlex.quote, words))))

    def is_of_unit(self, pid: int) -> bool:
        """Say whether a process belongs to the unit."""
        try:
            text = (self.root / f"proc/{pid}/cgroup").read_text()
        except OSError:
            return False
        return re.search(rf"/{UNIT}\.service(/|$)", text, re.MULTILINE) is not None

    def is_in_container(self) -> bool:
        """Say whether this is a container, whose devices and capabilities come from the outside."""
        return any((self.root / name).exists() for name in _CONTAINERS)

    def _units(self) -> list[Path]:
        """Return the unit's files; systemd takes the first one."""
        files = [self.root / directory / f"{UNIT}.service" for directory in _UNITS]
        return [file for file in files if os.path.lexists(file)]

    def _is_ours(self, program: str) -> bool:
        if not program or self.directory is None:
            return bool(program)
        try:
            return (self.root / program.lstrip("/")).samefile(self.directory / "zswapd")
        except OSError:
            return False


def _started_by(unit: Path) -> str:
    """Return the program that a unit file starts; an empty string if it names none."""
    try:
        found = re.findall(
            r"^ExecStart\s*=\s*[-@:+!]*(/\S+)", unit.read_text(errors="replace"), re.MULTILINE
        )
    except OSError:
        return ""
    return str(found[-1]) if found else ""


def found() -> Installation:
    """Return the installation that this process belongs to."""
    import shutil

    is_root = os.geteuid() == 0
    try:
        here = Path.cwd()
    except OSError:  # the directory was removed
        here = None
    return Installation(
        _directory(), is_root=is_root, has_sudo=shutil.which("sudo") is not None, here=here
    )


def of_daemon() -> Installation:
    """Return the installation for messages of the daemon.

    Its names are absolute, because the reader is in another directory than the daemon.
    """
    return found()._replace(here=None)


def look_into_log() -> str:
    """Return where to read the daemon's reasons."""
    return f"look into {found().log()}"


def restart_daemon() -> str:
    """Return the commands that restart the daemon that this process belongs to or becomes."""
    pid = 0
    for above in _processes_above(os.getpid()):
        if _is_daemon(above):
            pid = above
        elif pid or above == os.getppid():
            break
    return of_daemon().restart(pid)


def called_again() -> str:
    """Return the command line of this process, as root has to type it."""
    installation = found()
    name = os.path.basename(sys.argv[0])  # noqa: PTH119 - as text
    words = sys.argv[1:] if name in ("zswapd", "zswapctl") else []
    program = installation.program(name if name in ("zswapd", "zswapctl") else "zswapctl")
    return installation.as_root(" ".join((program, *map(shlex.quote, words))))


def _processes_above(pid: int) -> Iterator[int]:
    """Yield a process id, its parent's, and so on."""
    while pid > 0:
        yield pid
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            return


def _is_daemon(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(word.rpartition(b"/")[2] == b"zswapd" for word in words[:5]) and b"run" in words


def _directory() -> Path | None:
    """Return where the programs are.

    They are beside the running script, or beside the interpreter of its environment.
    """
    import shutil

    script = None
    with contextlib.suppress(FileNotFoundError):  # the current directory was removed
        script = Path(os.path.abspath(sys.argv[0])) if "/" in sys.argv[0] else None  # noqa: PTH100 - links stay
    candidates = [*((script, script.resolve()) if script else ()), Path(sys.executable)]
    found_beside = (path.parent for path in candidates if (path.parent / "zswapd").is_file())
    in_path = shutil.which("zswapd")
    return next(found_beside, Path(in_path).parent if in_path else None)
