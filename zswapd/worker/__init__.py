# SPDX-License-Identifier: GPL-2.0-or-later
"""The process that serves the files: everything that it is made of, its commands, its upkeep."""
