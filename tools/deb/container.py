# SPDX-License-Identifier: GPL-2.0-or-later
"""A Debian with systemd in a container, to install the package in.

It boots in a second, on the running kernel. So it is cheap, but it swaps this machine's memory.

`root` makes the file system once and caches it: a bare Debian of the package's release, with
systemd. zswapd's dependencies are not installed; they are in apt's cache, so no test waits for a
mirror. `Container` boots it under systemd-nspawn with a tmpfs layer on top, which goes with the
container. Commands run in it by nsenter, so it needs no listening program.

The container is privileged, because the tests need mount, loop devices and swapon. It is not
registered with this machine's service manager (--register=no --keep-unit), and its systemd manages
a cgroup of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import shutil
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

from tools.bench.harness.system import HarnessError
from tools.vm import image

if TYPE_CHECKING:
    from collections.abc import Iterator

BOOT_LIMIT_S = 60.0
COMMAND_LIMIT_S = 120.0
BUILD_LIMIT_S = 300.0
LOOP_DEVICES = 64
_ENVIRONMENT = (
    "env",
    "-i",
    "PATH=/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL=C.UTF-8",
    "DEBIAN_FRONTEND=noninteractive",
)
SOURCES = "".join(f"{line}\n" for line in image.SOURCES.splitlines() if "backports" not in line)
_NEEDED = (f"python{image.PYTHON[0]}.{image.PYTHON[1]}", "libfuse3-3", "liblzo2-2", "mount")
_OPTIONS = (
    "--mode=root",
    "--variant=apt",
    "--skip=cleanup/apt",
    "--aptopt=APT::Install-Recommends false",
    "--include=systemd,systemd-sysv",
)
_HOOK = f"""set -e
chroot "$1" apt-get clean
chroot "$1" apt-get install --yes --download-only {" ".join(_NEEDED)}
: > "$1/etc/machine-id"
"""


def root() -> Path:
    """Return the bare Debian; make it first if it is missing, which takes half a minute.

    Raises:
        HarnessError: not root, a program is missing, or the mirror cannot be reached.
    """
    recipe = hashlib.sha256(repr((image.SUITE, SOURCES, _OPTIONS, _HOOK)).encode()).hexdigest()[:16]
    target = image.cache() / f"root-{recipe}"
    with image.locked():
        if not target.is_dir():
            work = image.cache() / f"building-{os.getpid()}"
            command = (
                "mmdebstrap",
                "--quiet",
                *_OPTIONS,
                f"--customize-hook={_HOOK}",
                image.SUITE,
                str(work),
                "-",
            )
            done = subprocess.run(
                (*image.UNSHARED, *command),
                check=False,
                input=SOURCES,
                capture_output=True,
                text=True,
                timeout=BUILD_LIMIT_S,
            )
            if done.returncode != 0:
                raise HarnessError(
                    f"mmdebstrap failed:\n{done.stderr}",
                    hint="it needs a Debian mirror: deb.debian.org",
                )
            for old in image.cache().glob("root-*"):
                shutil.rmtree(old, ignore_errors=True)
            work.rename(target)
    return target


class Container:
    """A context manager that boots a Debian and ends it.

    Args:
        name: the name of the container and of its cgroup.
        packages: a directory of this machine that the container has as /packages, read-only.
    """

    def __init__(self, name: str, packages: Path) -> None:
        self._name = name
        self._packages = packages
        self._nspawn: subprocess.Popen[bytes] | None = None
        self._leader = 0
        self._log = b""

    def __enter__(self) -> Self:
        """Boot, and wait until systemd has started everything.

        Raises:
            HarnessError: the container does not come up.
        """
        cgroups = list(_make_cgroups(self._name))
        enter = "".join(
            f"echo $$ > {shlex.quote(str(path / 'cgroup.procs'))}; " for path in cgroups
        )
        self._nspawn = subprocess.Popen(
            # When this process is killed, the container shuts down, which runs swapoff.
            (
                "setpriv",
                "--pdeathsig",
                "TERM",
                "--",
                "sh",
                "-c",
                f'{enter} exec "$@"',
                "sh",
                *self._command(),
            ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            self._wait_for_boot()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_exc_info: object) -> None:
        """Run swapoff and end the container, whatever its state."""
        for command in (
            "zswapctl swapoff --all --force",
            "systemctl stop zswapd.service",
            "systemctl poweroff",
        ):
            with contextlib.suppress(HarnessError, subprocess.TimeoutExpired):
                self.call(command, limit=30)
        self._end()

    def call(
        self, command: str, limit: float = COMMAND_LIMIT_S
    ) -> subprocess.CompletedProcess[str]:
        """Run a shell command in the container as root, to its end."""
        return subprocess.run(
            ("nsenter", f"--target={self._leader}", "--all", *_ENVIRONMENT, "sh", "-c", command),
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=limit,
        )

    def run(self, command: str, limit: float = COMMAND_LIMIT_S) -> str:
        """Run a shell command in the container as root; return its output.

        Raises:
            HarnessError: the command failed.
        """
        done = self.call(command, limit)
        if done.returncode != 0:
            raise HarnessError(
                f"in the container, {command!r} ended with {done.returncode}:\n{done.stdout}"
            )
        return done.stdout

    def wait_until(self, command: str, limit: float) -> None:
        """Wait until a shell command succeeds.

        Raises:
            HarnessError: the command has not succeeded within `limit` seconds.
        """
        end = time.monotonic() + limit
        while self.call(command).returncode != 0:
            if time.monotonic() > end:
                raise HarnessError(
                    f"in the container, {command!r} has not come true after {limit:.0f} s"
                )
            time.sleep(0.1)

    def _command(self) -> tuple[str, ...]:
        if shutil.which("systemd-nspawn") is None:
            raise HarnessError(
                "systemd-nspawn is not installed", hint="apt-get install systemd-container"
            )
        return (
            "systemd-nspawn",
            "--quiet",
            f"--directory={root()}",
            f"--machine={self._name}",
            *(
                "--volatile=overlay",
                "--boot",
                "--register=no",
                "--keep-unit",
                "--console=pipe",
                "--kill-signal=SIGRTMIN+4",
            ),
            *("--capability=all", "--system-call-filter=@swap", "--bind=/dev/fuse"),
            f"--bind-ro={self._packages}:/packages",
            "systemd.unit=multi-user.target",
        )

    def _wait_for_boot(self) -> None:
        assert self._nspawn is not None
        end = time.monotonic() + BOOT_LIMIT_S
        while (
            not self._leader
            or self.call("systemctl --quiet is-active multi-user.target").returncode != 0
        ):
            self._leader = self._leader or _child_of(self._nspawn.pid)
            if time.monotonic() > end or self._nspawn.poll() is not None:
                self._end()
                raise HarnessError(
                    f"the container did not come up:\n{self._log.decode(errors='replace')}"
                )
            time.sleep(0.05)
        self.run(
            f"mknod /dev/loop-control c 10 237; for n in $(seq 0 {LOOP_DEVICES - 1}); do mknod"
            " /dev/loop$n b 7 $n || exit; done"
        )

    def _end(self) -> None:
        assert self._nspawn is not None
        try:
            _, self._log = self._nspawn.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            self._nspawn.kill()
            _, self._log = self._nspawn.communicate()
        for hierarchy in _hierarchies():
            _remove_cgroup(hierarchy / self._name)


def _hierarchies() -> Iterator[Path]:
    """Yield the roots of systemd's cgroups: one, or two with cgroup version 1."""
    top = Path("/sys/fs/cgroup")
    if (top / "cgroup.controllers").exists():
        yield top
        return
    yield from (path for path in (top / "systemd", top / "unified") if path.is_dir())


def _make_cgroups(name: str) -> Iterator[Path]:
    for hierarchy in _hierarchies():
        (hierarchy / name).mkdir(exist_ok=True)
        yield hierarchy / name


def _remove_cgroup(top: Path) -> None:
    """Remove a cgroup and all below it, after its dead processes are reaped."""
    end = time.monotonic() + 5
    for path in sorted((path for path in (top, *top.rglob("*")) if path.is_dir()), reverse=True):
        while True:
            try:
                path.rmdir()
                break
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)


def _child_of(pid: int) -> int:
    """Return the first descendant that is pid 1 of a namespace; 0 if there is none yet."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for child in map(int, children):
            status = Path(f"/proc/{child}/status").read_text()
            if any(
                line.startswith("NSpid:") and line.split()[-1] == "1"
                for line in status.splitlines()
            ):
                return child
    except FileNotFoundError:
        return 0
    return 0
