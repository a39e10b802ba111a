# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel's frontswap and cleancache interfaces, over tmem."""
