# SPDX-License-Identifier: GPL-2.0-or-later
"""What watches memory from the side: whether the system has some to spare."""
