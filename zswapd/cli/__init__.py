# SPDX-License-Identifier: GPL-2.0-or-later
"""Command lines: thin, they parse, call and print."""
