# SPDX-License-Identifier: GPL-2.0-or-later
"""The host: its processor, its memory cgroups, how zswapd is installed on it.

Its configuration files.
"""
