# SPDX-License-Identifier: GPL-2.0-or-later
"""Where a supervisor finds what it is to supervise, in the order of acquire.py; and what becomes of a worker that has it."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from zswapd.control.listener import supervisor_of
from zswapd.errors import AlreadyRunningError, ZswapdError
from zswapd.handover.state import Word
from zswapd.supervisor import acquire as estates
from zswapd.supervisor import orphan, unresponsive

if TYPE_CHECKING:
    from zswapd.config import Config
    from zswapd.supervisor.acquire import Estate, Left

log = logging.getLogger(__name__)


def find_estate(config: Config, left: Left | None) -> tuple[Estate, int]:
    """Take over what there is, or make everything.

    Args:
        config: the settings.
        left: what needs nobody to be asked.

    Returns:
        The estate, and the process id of the worker that serves it; 0 if there is none any more.

    Raises:
        AlreadyRunningError: there is a supervisor.
        ZswapdError: it can be neither found nor made. In both cases whoever serves goes on serving.
    """
    if left is not None and left.worker:
        return estates.adopt(config, left.files), left.worker
    try:
        return (_counted(estates.adopt(config, left.files)) if left else estates.make(config)), 0
    except AlreadyRunningError as refusal:
        # A worker lives. What it has is the same as what was stored, and its socket besides.
        stored = left.files if left else {}
        patience = min(config.service.hang_timeout or orphan.ANSWER_S, orphan.ANSWER_S)
        try:
            descriptors, worker = orphan.inherit(config.control.socket, limit=patience)
        except TimeoutError:
            if supervisor_of(config.control.socket):
                raise refusal from None
            return _take_from_the_silent(config, stored), 0
        except ZswapdError:
            raise refusal from None
    for descriptor in stored.values():
        os.close(descriptor)
    estate = estates.adopt(config, descriptors)
    # Between its answer and our claim, another program may have taken over from it, and have died.
    worker = unresponsive.living_worker(estate.state) or worker
    log.info("worker %d has lost its supervisor: taking over", worker)
    return estate, worker


def _counted(estate: Estate) -> Estate:
    """Count the death of a worker whose supervisor could not."""
    estate.state.words[Word.DEATHS] += 1
    return estate


def _take_from_the_silent(config: Config, stored: dict[str, int]) -> Estate:
    """End a worker that has lost its supervisor and does not answer, and return what it has served."""
    if not stored:
        descriptors, worker = unresponsive.take_files(config.control.socket)
        estate = estates.adopt(config, descriptors)
        unresponsive.end(worker)
        return _counted(estate)
    if worker := unresponsive.worker_in(stored["state"]):
        unresponsive.end(worker)
    return _counted(estates.adopt(config, stored, seize=True))
