# SPDX-License-Identifier: GPL-2.0-or-later
"""One real zswapd, driven as a user drives it: by its commands and by SIGTERM.

The daemon has a directory of its own (mountpoint, socket, log), so several can run side by side. It
reports on the notification socket that it is ready, as a systemd service does.

`stop` leaves nothing behind, whatever the state of the daemon. The order matters: swapoff comes
first, while the daemon can still answer, and the daemon ends last. If swapoff fails, `stop` aborts
the FUSE connection, and every process that waits for it gets an I/O error.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tools.bench.harness import system
from tools.bench.harness.display import PoolSample
from tools.bench.harness.system import HarnessError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

START_LIMIT_S = 60.0
CTL_LIMIT_S = 60.0
ASK_LIMIT_S = 20.0
LOG_TAIL = 4000


def program(name: str, tree: Path | None = None) -> list[str]:
    """Return the command for `zswapd` or `zswapctl`, of this environment or of `tree`."""
    if tree is not None:
        return [str(tree / ".venv/bin" / name)]
    script = Path(sys.executable).parent / name
    return [str(script)] if script.exists() else [sys.executable, "-m", f"zswapd.cli.{name}"]


class Daemon:
    """A context manager that starts and stops a zswapd with its own mountpoint and socket.

    Args:
        size: the size of the swap file, in the form of --size.
        settings: values by section.key, passed with --set.
        arguments: further arguments for `zswapd run`.
        parent: the parent of its directory; None for the system's temporary directory.
        is_service: give it a notification socket; without one, its log says when it is ready.
        tree: the checkout of the zswapd, with its environment; None for this one.
    """

    def __init__(
        self,
        *,
        size: str,
        settings: Mapping[str, str] | None = None,
        arguments: Sequence[str] = (),
        parent: Path | None = None,
        is_service: bool = True,
        tree: Path | None = None,
    ) -> None:
        self._tree = tree
        self._size = size
        self._arguments = tuple(arguments)
        self._settings = dict(settings or {})
        self._is_service = is_service
        self.directory = Path(tempfile.mkdtemp(prefix="zswapd-run-", dir=parent))
        self.mountpoint = self.directory / "mnt"
        self.socket = self.directory / "zswapd.sock"
        self._log = self.directory / "log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Start the daemon and wait until it is ready."""
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_exc_info: object) -> None:
        """Stop the daemon."""
        self.stop()

    @property
    def pid(self) -> int:
        """The process id of the supervisor."""
        assert self._process is not None
        return self._process.pid

    def worker_pid(self) -> int:
        """Return the process id of the worker, the supervisor's youngest child of that name.

        Raises:
            HarnessError: there is no worker for five seconds. The supervisor pauses between workers
                that die early.
        """
        end = time.monotonic() + 5
        while time.monotonic() < end:
            workers = [
                pid
                for pid in system.children(self.pid)
                if system.parent(pid) == self.pid and system.name(pid) == "zswapd-worker"
            ]
            if workers:
                return max(workers)
            time.sleep(0.001)
        raise HarnessError(f"zswapd has no worker\n{self.log_text()[-LOG_TAIL:]}")

    @property
    def file(self) -> Path:
        """The swap file; a stat(2) on it hangs while the daemon hangs."""
        return self.mountpoint / "swap"

    def log_text(self) -> str:
        """Return the daemon's standard output and error."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def _command(self) -> list[str]:
        command = [
            *program("zswapd", self._tree),
            "run",
            "--size",
            self._size,
            "--mountpoint",
            str(self.mountpoint),
            *self._arguments,
        ]
        # No metrics: the default port is the same for all daemons.
        settings = {"control.socket": str(self.socket), "metrics.listen": "", **self._settings}
        for name, value in settings.items():
            command += ["--set", f"{name}={value}"]
        return command

    def start(self, stored: Mapping[str, int] | None = None) -> None:
        """Start the daemon and wait until it is ready.

        Args:
            stored: open files by name, passed as a service manager passes its stored ones.

        Raises:
            HarnessError: the daemon ended, or was not ready within `START_LIMIT_S`; the message has
                the end of its log.
        """
        # `exist_ok` would stat the mountpoint, and wait for a worker that hangs.
        with contextlib.suppress(FileExistsError):
            self.mountpoint.mkdir()
        command = self._command()
        environment = {}
        if stored:
            places = " ".join(
                f"{3 + place}<&{descriptor}" for place, descriptor in enumerate(stored.values())
            )
            command = ["bash", "-c", f'export LISTEN_PID=$$; exec "$@" {places}', "bash", *command]
            environment = {
                "LISTEN_FDS": str(len(stored)),
                "LISTEN_FDNAMES": ":".join(f"zswapd-{name}" for name in stored),
            }
        address = self.directory / "notify"
        sources = {"PYTHONPATH": str(self._tree)} if self._tree else {}
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify,
            self._log.open("ab") as log,
        ):
            notify.bind(str(address))
            notify.settimeout(0.2)
            with system.signals_delayed() as in_child:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={
                        **os.environ,
                        **environment,
                        "NOTIFY_SOCKET": str(address) if self._is_service else "",
                        **sources,
                    },
                    pass_fds=tuple((stored or {}).values()),
                    start_new_session=True,
                    preexec_fn=in_child,  # noqa: PLW1509 - one system call
                )
            self._wait_ready(notify)
        address.unlink()

    def _wait_ready(self, notify: socket.socket) -> None:
        assert self._process is not None
        end = time.monotonic() + START_LIMIT_S
        while time.monotonic() < end:
            with contextlib.suppress(TimeoutError):
                if b"READY=1" in notify.recv(4096).split(b"\n"):
                    return
            if not self._is_service and "ready: serving" in self.log_text():
                return
            if self._process.poll() is not None:
                words = self.log_text()[-LOG_TAIL:]
                raise HarnessError(
                    f"zswapd ended with {self._process.returncode} before it was ready:\n{words}"
                )
        raise HarnessError(
            f"zswapd was not ready after {START_LIMIT_S:.0f} s:\n{self.log_text()[-LOG_TAIL:]}"
        )

    def ctl(self, *arguments: str, limit: float = CTL_LIMIT_S) -> str:
        """Run zswapctl with `arguments` and return its output.

        Raises:
            HarnessError: zswapctl failed or took longer than `limit` seconds.
        """
        return system.run(*program("zswapctl"), "--socket", self.socket, *arguments, limit=limit)

    def ctl_json(self, *arguments: str) -> dict[str, Any]:
        """Run zswapctl --json with `arguments` and return the answer."""
        answer = json.loads(self.ctl("--json", *arguments))
        assert isinstance(answer, dict)
        return answer

    def ask(self, command: str, **arguments: object) -> dict[str, Any]:
        """Send one request to the control socket, and return the result.

        This is for readings during a measurement: it saves the start of zswapctl. The protocol is
        one JSON object on each line.

        Raises:
            HarnessError: the daemon does not answer, or refuses the request.
        """
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(ASK_LIMIT_S)
                connection.connect(str(self.socket))
                connection.sendall(
                    json.dumps({"v": 1, "cmd": command, "args": arguments}).encode() + b"\n"
                )
                with connection.makefile("rb") as replies:
                    reply = json.loads(replies.readline())
                    # A long command sends its progress before the answer.
                    while "progress" in reply:
                        reply = json.loads(replies.readline())
        except (OSError, ValueError) as exc:
            raise HarnessError(
                f"zswapd does not answer {command}: {exc}\n{self.log_text()[-LOG_TAIL:]}"
            ) from exc
        if not reply.get("ok"):
            raise HarnessError(f"zswapd refuses {command}: {reply}")
        result = reply["result"]
        assert isinstance(result, dict)
        return result

    def pool_sample(self) -> PoolSample:
        """Return the state of the pool."""
        status = self.ask("status")
        pool, page_size = status["pool"], status["page_size"]
        pages = pool["stored_pages"]
        return PoolSample(
            pages, pages * page_size, pool["compressed_bytes"], pool["frames"] * page_size
        )

    def swapon(self, *arguments: str) -> str:
        """Run `zswapctl swapon`; return the loop device."""
        before = set(self.loops())
        self.ctl_json("swapon", *arguments)
        added = [device for device in self.loops() if device not in before]
        if len(added) != 1 or not system.is_swap(added[0]):
            raise HarnessError(
                f"zswapctl swapon succeeded, but {added or 'no loop device'} is not swapped on"
            )
        return added[0]

    def swapoff(self, *arguments: str, limit: float = 120.0) -> None:
        """Run `zswapctl swapoff`."""
        self.ctl("swapoff", *arguments, limit=limit)

    def loops(self) -> list[str]:
        """Return the loop devices on its files."""
        return system.loops_below(self.mountpoint)

    def alive(self) -> bool:
        """Return whether the supervisor runs."""
        return self._process is not None and self._process.poll() is None

    def wait_for_end(self, *, limit: float = 10.0) -> int:
        """Wait until the supervisor (not its worker) has ended; return its exit code."""
        assert self._process is not None
        return self._process.wait(timeout=limit)

    def terminate(self, *, limit: float = 60.0) -> int:
        """Send SIGTERM and return the exit code.

        Raises:
            HarnessError: the daemon still runs after `limit` seconds.
        """
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            raise HarnessError(f"zswapd still runs {limit:.0f} s after SIGTERM") from None

    def stop(self) -> None:
        """Run swapoff, stop the daemon and remove its directory; do nothing if that is done.

        Raises:
            HarnessError: the daemon did not stop by itself. Everything is removed even then.
        """
        if not self.directory.exists():
            return
        complaint = ""
        for device in self.loops():
            try:
                system.swap_off(device)
                system.detach_loop(device)
            except HarnessError as exc:
                complaint = str(exc)
        if self.alive():
            try:
                if not self.loops():
                    self.terminate()
            except HarnessError as exc:
                complaint = str(exc)
        self._remove_by_force()
        if complaint:
            raise HarnessError(complaint)

    def _remove_by_force(self) -> None:
        """Kill the processes, abort the FUSE connection, unmount, and delete the directory."""
        for _, number in system.mounts_below(self.directory):
            system.abort_fuse(number)
        if self._process is not None and self.alive():
            self._process.kill()
            self._process.wait(timeout=10)
        for device in self.loops():
            system.swap_off(device)
            system.detach_loop(device)
        for mountpoint, _ in system.mounts_below(self.directory):
            system.unmount(mountpoint)
        shutil.rmtree(self.directory)
