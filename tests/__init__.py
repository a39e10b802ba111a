# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests of zswapd; `tests.support` holds what several of them share."""
