# SPDX-License-Identifier: GPL-2.0-or-later
"""The notifier: messages to the service manager by the protocol of sd_notify(3).

Each message is one datagram to the socket in NOTIFY_SOCKET. The socket is made once, at start, and
never blocks: a daemon that serves swap must not wait, so a message that systemd does not take at
once is dropped. Without a service manager, all calls do nothing.
"""

from __future__ import annotations

import os
import socket
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

STOP_S = 120.0
"""Time, s, that a stop may take after the last progress of swapoff."""


class Notifier:
    """The connection to the service manager.

    Args:
        environ: the environment, which has the address.
    """

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket: socket.socket | None = None
        if self._address.startswith(("/", "\0")):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.watchdog_interval = _watchdog_interval(environ) if self._socket else None
        """Seconds between two pings: half of what systemd tolerates; None if it does not watch."""

    @property
    def is_heard(self) -> bool:
        """Whether there is a service manager."""
        return self._socket is not None

    def ready(self, status: str) -> bool:
        """Say that the files are served; return whether it was sent."""
        return self._send(f"READY=1\nSTATUS={_one_line(status)}")

    def status(self, text: str) -> bool:
        """Set the line that `systemctl status` shows; return whether it was sent."""
        return self._send(f"STATUS={_one_line(text)}")

    def stopping(self, status: str) -> bool:
        """Say that the daemon is stopping; return whether it was sent."""
        return self._send(f"STOPPING=1\nSTATUS={_one_line(status)}")

    def more_time(self) -> bool:
        """Extend the time limit of a stop to STOP_S from now; return whether it was sent."""
        return self._send(f"EXTEND_TIMEOUT_USEC={STOP_S * 1e6:.0f}")

    def watchdog(self) -> bool:
        """Ping the watchdog; return whether it was sent."""
        return self._send("WATCHDOG=1")

    def set_watchdog(self, seconds: float) -> bool:
        """Set the timeout of the watchdog to `seconds`; return whether it was sent."""
        return self._send(f"WATCHDOG=1\nWATCHDOG_USEC={seconds * 1e6:.0f}")

    def store(self, name: str, descriptor: int) -> bool:
        """Have the service manager keep a file for the next start; return whether it was sent."""
        return self._send(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", (descriptor,))

    def unstore(self, name: str) -> bool:
        """Have the service manager close a file that it keeps; return whether it was sent."""
        return self._send(f"FDSTOREREMOVE=1\nFDNAME={name}")

    def close(self) -> None:
        """Give the socket back; later calls do nothing."""
        if self._socket:
            self._socket.close()
            self._socket = None

    def _send(self, message: str, descriptors: tuple[int, ...] = ()) -> bool:
        if self._socket is None:
            return False
        rights = (
            socket.SOL_SOCKET,
            socket.SCM_RIGHTS,
            struct.pack(f"{len(descriptors)}i", *descriptors),
        )
        try:
            # Not connected: systemd may bind its socket anew (daemon-reexec).
            self._socket.sendmsg(
                [message.encode(errors="replace")],
                [rights] if descriptors else [],
                0,
                self._address,
            )
        except OSError:
            return False
        return True


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _watchdog_interval(environ: Mapping[str, str]) -> float | None:
    if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    limit = environ.get("WATCHDOG_USEC", "")
    return int(limit) / 2e6 if limit.isdecimal() and int(limit) > 0 else None
