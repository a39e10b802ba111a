# SPDX-License-Identifier: GPL-2.0-or-later
"""Fork a worker, and try again for as long as fork(2) fails.

fork(2) fails where the kernel does not overcommit memory (ENOMEM, vm.overcommit_memory=2), or where
a cgroup may have no more processes (EAGAIN, pids.max). Between two workers, no process serves swap.
A supervisor that ended then would lose all swapped-out data, so it tries again without a limit.
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
"""Time between two attempts, s."""
FIRST_TRIES = 20
"""Number of attempts while no page is stored that could be lost."""


def settle_objects() -> None:
    """Prepare all live objects for a fork.

    The garbage collector then never writes marks beside them, so their pages stay shared.
    """
    gc.collect()
    gc.freeze()
    sys.stdout.flush()
    sys.stderr.flush()


def fork(meanwhile: Callable[[], object], *, has_time: bool) -> int:
    """Fork; return the result of os.fork.

    Args:
        meanwhile: called after each failed attempt, for example to free memory.
        has_time: no page is stored, so giving up loses nothing.

    Raises:
        ZswapdError: FIRST_TRIES attempts have failed, and `has_time` is set.
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
