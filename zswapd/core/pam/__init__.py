# SPDX-License-Identifier: GPL-2.0-or-later
"""Page accessible memory: how a page is kept, behind tmem's protocol."""
