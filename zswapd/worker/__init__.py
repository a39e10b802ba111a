# SPDX-License-Identifier: GPL-2.0-or-later
"""The worker: the process that serves the files, with its parts, commands and periodic tasks."""
