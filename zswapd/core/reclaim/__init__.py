# SPDX-License-Identifier: GPL-2.0-or-later
"""Reclaim of the pool's and the cache's memory: pressure, eviction, writeback, recompression."""
