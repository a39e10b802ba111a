# SPDX-License-Identifier: GPL-2.0-or-later
"""The parent process: holds what has to outlive a worker (`estate`), forks workers and buries them (`supervising`)."""

from zswapd.supervisor.acquire import check, memory_of
from zswapd.supervisor.supervisor import run
from zswapd.supervisor.upgrade_check import rehearse

__all__ = ["check", "memory_of", "rehearse", "run"]
