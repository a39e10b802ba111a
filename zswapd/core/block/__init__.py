# SPDX-License-Identifier: GPL-2.0-or-later
"""Byte ranges of a device turned into whole pages."""
