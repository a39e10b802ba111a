# SPDX-License-Identifier: GPL-2.0-or-later
"""What one worker leaves to the next: shared state, geometry, the cost of both in memory."""
