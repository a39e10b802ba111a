# SPDX-License-Identifier: GPL-2.0-or-later
"""Programs for developers: benchmarks, virtual machines, packages, reference pages.

A package of zswapd contains none of them.
"""
