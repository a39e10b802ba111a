# SPDX-License-Identifier: GPL-2.0-or-later
"""A daemon that turns a FUSE file into compressed swap and a compressed second-chance cache."""

__version__ = "0.2.0"
