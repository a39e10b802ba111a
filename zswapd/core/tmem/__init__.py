# SPDX-License-Identifier: GPL-2.0-or-later
"""Transcendent memory: an index from (pool, object, index) to opaque page descriptors."""
