# SPDX-License-Identifier: GPL-2.0-or-later
"""Forking a worker that has to come, whatever the system says.

fork(2) fails where memory is promised to nobody twice (ENOMEM, vm.overcommit_memory=2), or where a
cgroup has no process left (EAGAIN, pids.max). When a worker has died, nobody serves swap until
there is another: the supervisor that ended then would take all that is swapped out with it, so it
tries again for as long as it takes.
"""

from __future__ import annotations

import errno
import gc
import logging
import math
import os
import sys
import time
from typing import TYPE_CHECKING

from zswapd.errors import ZswapdError

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)

AGAIN_S = 0.1
"""Time between two attempts."""
FIRST_TRIES = 20
"""Attempts where nothing is stored yet that could be lost."""


def settle_objects() -> None:
    """Before a fork: what is alive now stays so.

    Unless the collector's marks are written next to it, its pages stay shared.
    """
    gc.collect()
    gc.freeze()
    sys.stdout.flush()
    sys.stderr.flush()


def fork(meanwhile: Callable[[], object], *, has_time: bool) -> int:
    """Fork; return what os.fork returns.

    Args:
        meanwhile: called after each attempt that failed; gives memory back for example.
        has_time: nothing would be lost by giving up.

    Raises:
        ZswapdError: it has failed FIRST_TRIES times, and there is time.
    """
    settle_objects()
    tries = FIRST_TRIES if has_time else math.inf
    while True:
        try:
            return os.fork()
        except OSError as error:
            tries -= 1
            if tries <= 0:
                hint = (
                    "free some memory, which `free -m` shows; or look at vm.overcommit_memory, and"
                    " pids.max of its cgroup"
                )
                if error.errno == errno.EAGAIN:
                    hint = (
                        "raise pids.max of its cgroup (TasksMax= of the unit), or the limit that"
                        " `ulimit -u` shows"
                    )
                raise ZswapdError(
                    f"no worker can be forked: {error.strerror}", hint=hint
                ) from error
            log.error(  # noqa: TRY400 - a reason, not a bug
                "no worker can be forked, trying again: %s", error.strerror, extra={"rate_limit": 5}
            )
        meanwhile()
        time.sleep(AGAIN_S)
