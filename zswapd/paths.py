# SPDX-License-Identifier: GPL-2.0-or-later
"""Where things are by default, for those who must not import the table of settings to know it.

What the kernel calls them.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

SOCKET = "/run/zswapd/zswapd.sock"
"""The control socket: zswapctl is to answer at once.

And the table takes a sixth of its time to import.
"""

_LINKS = 40  # one after the other, as the kernel follows them
_OF_THE_KERNEL = frozenset({"proc", "sysfs"})


def without_links(path: Path) -> Path:
    """Return the absolute name under which mountinfo and sysfs list `path`.

    The last component is not asked what it is, only whether it is a link: a `stat` of a mount whose
    daemon hangs, or is this very process, would hang as well; readlink fails without asking the
    daemon.
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
    """Return the errno for which nothing can be made in a directory.

    0 if something can, as far as can be told without it.
    """
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
    """Return a path if it is there, else the lowest of those above it that is."""
    return next(place for place in (path, *path.parents) if os.path.lexists(place))
