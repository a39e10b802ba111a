# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests with real loop devices and real swap: the only proof that a workload survives on zswapd."""
