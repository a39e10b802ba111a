# SPDX-License-Identifier: GPL-2.0-or-later
"""Transcendent memory: (pool, object, index) to an opaque page descriptor."""
