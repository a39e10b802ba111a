# SPDX-License-Identifier: GPL-2.0-or-later
"""The supervisor: the parent process. It holds what outlives a worker, forks and reaps workers."""

from zswapd.supervisor.supervisor import run
from zswapd.supervisor.upgrade_check import check, memory_of, try_takeover

__all__ = ["check", "memory_of", "run", "try_takeover"]
