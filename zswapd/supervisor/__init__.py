# SPDX-License-Identifier: GPL-2.0-or-later
"""The parent process: holds what has to outlive a worker (`estate`), forks workers and buries them (`supervising`)."""

from zswapd.supervisor.estate import check, memory_of
from zswapd.supervisor.rehearsal import rehearse
from zswapd.supervisor.supervising import run

__all__ = ["check", "memory_of", "rehearse", "run"]
