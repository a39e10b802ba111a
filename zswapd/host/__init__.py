# SPDX-License-Identifier: GPL-2.0-or-later
"""The host: its machine type, its memory cgroups, the config files, and how zswapd is installed."""
