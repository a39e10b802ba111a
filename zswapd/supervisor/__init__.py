# SPDX-License-Identifier: GPL-2.0-or-later
"""The parent process: it holds all that outlives a worker, forks workers and reaps them."""

from zswapd.supervisor.supervisor import run
from zswapd.supervisor.upgrade_check import check, memory_of, try_takeover

__all__ = ["check", "memory_of", "run", "try_takeover"]
