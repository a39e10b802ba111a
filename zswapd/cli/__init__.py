# SPDX-License-Identifier: GPL-2.0-or-later
"""The command lines of zswapd and zswapctl: they parse, call and print, and do no work."""
