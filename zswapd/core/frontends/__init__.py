# SPDX-License-Identifier: GPL-2.0-or-later
"""What the kernel called frontswap and cleancache: the vocabulary of swap and cache over tmem."""
