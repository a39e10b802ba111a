# SPDX-License-Identifier: GPL-2.0-or-later
"""One virtual machine: qemu with an image, a payload, a console log and a line to the agent.

Every way out ends qemu. The context manager kills it, the kernel kills it when the thread that
started it dies (PR_SET_PDEATHSIG), and a limit on its processor time ends a lost one. Its disks are
snapshots whose changes go to an unlinked file. A machine that hangs raises `Silent` after a time
limit. `autopsy` then makes the guest's kernel print its blocked tasks and their stacks.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import subprocess
import threading
import time
from typing import TYPE_CHECKING, Self

from tools.bench.harness import system
from tools.bench.harness.system import HarnessError
from tools.vm.channel import Channel, Silent

if TYPE_CHECKING:
    from pathlib import Path

    from tools.vm.channel import Done, Running
    from tools.vm.image import Image

BOOT_LIMIT_S = 240.0
PROCESSOR_LIMIT_S = 3600
CONSOLE_TAIL = 8_000
SYSRQ_S = 6.0
ALL_TASKS_S = 40.0
_TASKS = re.compile(
    r"^\[[^]]*\] task:(?:zswapd|offload|kthreadd|kswapd|loop|kworker/u)[^\n]*\n(?:(?!\[[^]]*\]"
    r" task:)[^\n]*\n)*",
    re.MULTILINE,
)
"""Seconds that the console takes to print the answer to one sysrq."""
COMMAND_LINE = (
    "root=/dev/disk/by-id/virtio-root rw console=ttyS0 loglevel=5 systemd.show_status=0"
    " mitigations=off panic=-1"
)
"""A panic ends the machine at once: it reboots, and -no-reboot makes that the end of qemu."""
PROCESSOR = "max,-cx16,-la57"
"""The emulated processor, without cmpxchg16b and without five-level page tables.

qemu 7.2 sometimes emulates cmpxchg16b wrongly with two processors: flags are wrong, and SLUB has a
double fault. Without it, SLUB uses a lock. Four-level page tables save a step in an emulated walk.
"""


class Machine:
    """A virtual machine; a context manager that boots and kills it.

    Args:
        image: the operating system.
        payload: the disk with the programs under test.
        directory: the directory for sockets and the console log. Its path is short, because a
            socket address has 107 bytes.
        kernel: "old" or "new".
        memory_mib: the memory of the guest in MiB.
        options: more words for the kernel's command line.
        reboots: whether a reboot starts the machine again, with its disk unchanged, instead of
            ending it.
    """

    def __init__(
        self,
        image: Image,
        payload: Path,
        directory: Path,
        *,
        kernel: str = "new",
        memory_mib: int = 768,
        options: str = "",
        reboots: bool = False,
    ) -> None:
        self.directory = directory
        self.console = directory / "console.log"
        self._command = _qemu(
            image, payload, directory, kernel, memory_mib, f"{COMMAND_LINE} {options}".strip()
        )
        if not reboots:
            self._command.append("-no-reboot")
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None
        self._serial: socket.socket | None = None

    def __enter__(self) -> Self:
        """Boot, and wait until the agent answers and systemd has started everything.

        Raises:
            HarnessError: the machine does not come up.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            with (
                (self.directory / "qemu.log").open("wb") as log,
                system.signals_delayed() as in_child,
            ):
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=in_child,  # noqa: PLW1509 - one system call
                )
            self._serial = self._connect("serial")
            threading.Thread(target=_swallow, args=(self._serial,), daemon=True).start()
            self._channel = Channel(self._connect("agent"))
            self.wait_for_boot()
        except BaseException as error:
            tail = self.console_tail()
            self.kill()
            if isinstance(error, HarnessError):
                raise HarnessError(
                    f"the virtual machine did not come up: {error}\n{tail}"
                ) from error
            raise
        return self

    def __exit__(self, *_exc_info: object) -> None:
        """Kill qemu."""
        self.kill()

    @property
    def alive(self) -> bool:
        """Whether qemu runs."""
        return self._process is not None and self._process.poll() is None

    def wait_for_boot(self, limit: float = BOOT_LIMIT_S) -> None:
        """Wait until systemd has started everything.

        Raises:
            Silent: the boot takes longer than `limit` seconds.
        """
        end = time.monotonic() + limit
        # A message sent before the agent runs waits in the port. A lost one must not take the whole
        # limit.
        while True:
            try:
                self.channel.ping(5)
                break
            except Silent:
                if time.monotonic() > end or not self.alive:
                    raise
        self.run("systemctl is-system-running --wait", max(end - time.monotonic(), 1))

    @property
    def channel(self) -> Channel:
        """The line to the agent."""
        assert self._channel is not None
        return self._channel

    def run(self, command: str, limit: float = 60.0) -> Done:
        """Run a shell command to its end; see `Channel.run`."""
        return self.channel.run(command, limit)

    def start(self, command: str) -> Running:
        """Start a shell command."""
        return self.channel.start(command)

    def wait_for_end(self, limit: float) -> None:
        """Wait until the machine has powered off; a reboot ends it too.

        Raises:
            Silent: the machine still runs after `limit` seconds.
        """
        assert self._process is not None
        try:
            self._process.wait(limit)
        except subprocess.TimeoutExpired:
            raise Silent(f"the virtual machine has not gone down after {limit:.0f} s") from None

    def console_tail(self, most: int = CONSOLE_TAIL) -> str:
        """Return the end of the console log: the kernel's log, and the journal."""
        if not self.console.exists():
            return ""
        return self.console.read_bytes()[-most:].decode(errors="replace").replace("\r", "")

    def autopsy(self) -> str:
        """Make the kernel print blocked tasks, memory and processors; return the console's end.

        This works on a machine that does not answer, as long as its interrupts work.
        """
        if not self.alive:
            return self.console_tail(3 * CONSOLE_TAIL)
        seen = self.console_tail(CONSOLE_TAIL)
        before = self.console.stat().st_size
        for key in b"wml":  # blocked tasks, memory, what the processors do
            self._ask_kernel(key, SYSRQ_S)
        seen += self.console.read_bytes()[before:].decode(errors="replace").replace("\r", "")
        before = self.console.stat().st_size
        self._ask_kernel(ord("t"), ALL_TASKS_S)
        tasks = self.console.read_bytes()[before:].decode(errors="replace").replace("\r", "")
        return seen + "".join(found[0] for found in _TASKS.finditer(tasks))

    def _ask_kernel(self, key: int, patience: float) -> None:
        """Send a sysrq key, and wait for the console to print the answer."""
        with contextlib.suppress(OSError):
            self._break()
            time.sleep(0.3)
            assert self._serial is not None
            self._serial.sendall(bytes([key]))
            time.sleep(patience)

    def kill(self) -> None:
        """Kill qemu."""
        if self._process is not None:
            if self._process.poll() is None:
                self._process.kill()
            self._process.wait(30)
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._serial is not None:
            self._serial.close()
            self._serial = None

    def _break(self) -> None:
        """Send a break on the serial line, which makes the next byte a sysrq."""
        with self._connect("qmp") as line, line.makefile("rw") as stream:
            line.settimeout(10)
            for command in (
                {"execute": "qmp_capabilities"},
                {"execute": "chardev-send-break", "arguments": {"id": "serial"}},
            ):
                stream.readline()  # the greeting, then the answer to the one before
                stream.write(json.dumps(command) + "\n")
                stream.flush()
            stream.readline()

    def _connect(self, name: str) -> socket.socket:
        """Connect to one of qemu's sockets, which appear soon after its start."""
        line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        end = time.monotonic() + 20
        while True:
            try:
                line.connect(str(self.directory / f"{name}.sock"))
            except OSError as error:
                if time.monotonic() > end or not self.alive:
                    line.close()
                    log = (self.directory / "qemu.log").read_text(errors="replace")
                    raise HarnessError(f"qemu did not start: {error}\n{log}") from error
                time.sleep(0.05)
            else:
                return line


def _swallow(line: socket.socket) -> None:
    """Read the console to its end; a full socket would make qemu stop the guest."""
    with contextlib.suppress(OSError):
        while line.recv(65536):
            pass


def _qemu(
    image: Image, payload: Path, directory: Path, kernel: str, memory_mib: int, command_line: str
) -> list[str]:
    if shutil.which("qemu-system-x86_64") is None:
        raise HarnessError(
            "qemu-system-x86_64 is not installed", hint="apt-get install qemu-system-x86"
        )

    def server(name: str) -> str:
        return f"socket,id={name},path={directory / name}.sock,server=on,wait=off"

    limits = [
        "setpriv",
        "--pdeathsig",
        "KILL",
        "prlimit",
        f"--cpu={PROCESSOR_LIMIT_S}",
        "--core=0",
        "--",
    ]
    return [
        *limits,
        "qemu-system-x86_64",
        *("-nodefaults", "-no-user-config", "-display", "none"),
        *("-accel", "tcg,thread=multi", "-cpu", PROCESSOR, "-smp", "2", "-m", str(memory_mib)),
        *(
            "-kernel",
            str(image.kernel(kernel)),
            "-initrd",
            str(image.initrd(kernel)),
            "-append",
            command_line,
        ),
        *("-drive", f"file={image.disk},format=raw,if=none,id=root,snapshot=on,cache=unsafe"),
        *("-device", "virtio-blk-pci,drive=root,serial=root"),
        *("-drive", f"file={payload},format=raw,if=none,id=payload,readonly=on"),
        *("-device", "virtio-blk-pci,drive=payload,serial=payload"),
        *(
            "-chardev",
            f"{server('serial')},logfile={directory / 'console.log'}",
            "-serial",
            "chardev:serial",
        ),
        *(
            "-device",
            "virtio-serial-pci",
            "-chardev",
            server("agent"),
            "-device",
            "virtserialport,chardev=agent,name=zvm",
        ),
        *("-chardev", server("qmp"), "-mon", "chardev=qmp,mode=control"),
    ]
