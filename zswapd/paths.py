# SPDX-License-Identifier: GPL-2.0-or-later
"""Default paths for modules that must not import the table of settings, and names of paths."""

from __future__ import annotations

import errno
import os
from pathlib import Path

SOCKET = "/run/zswapd/zswapd.sock"
"""The control socket. To import the table of settings would take a sixth of zswapctl's time."""

_LINKS = 40  # the kernel's limit of links in a path
_OF_THE_KERNEL = frozenset({"proc", "sysfs"})


def without_links(path: Path) -> Path:
    """Return the absolute name under which mountinfo and sysfs list `path`.

    Of the last component, only the link is read. It may be a mount that this process or a hanging
    daemon serves, and a `stat` of it would hang. readlink fails without a request to the daemon.
    """
    name = os.path.abspath(path)  # noqa: PTH100 - Path.absolute() keeps `..`
    for _ in range(_LINKS):
        above, last = os.path.split(name)
        name = os.path.join(os.path.realpath(above), last)  # noqa: PTH118 - as text
        try:
            target = os.readlink(name)  # noqa: PTH115 - as text
        except OSError:
            break
        name = os.path.join(os.path.dirname(name), target).rstrip("/")  # noqa: PTH118, PTH120 - as text
        if os.path.basename(name) in (".", ".."):  # noqa: PTH119 - as text
            return Path(os.path.realpath(name))
    return Path(name)


def why_unmakeable(directory: Path) -> int:
    """Return the errno because of which no file can be made in a directory; 0 if none is known."""
    if not directory.is_dir():
        return errno.ENOTDIR
    if not os.access(directory, os.W_OK | os.X_OK):
        return errno.EROFS if os.statvfs(directory).f_flag & os.ST_RDONLY else errno.EACCES
    status = directory.stat()
    device = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        fields = line.split(" ")
        if fields[2] == device and fields[fields.index("-") + 1] in _OF_THE_KERNEL:
            return errno.EPERM
    return 0


def nearest_existing(path: Path) -> Path:
    """Return the path if it exists; else the lowest directory above it that exists."""
    return next(place for place in (path, *path.parents) if os.path.lexists(place))
