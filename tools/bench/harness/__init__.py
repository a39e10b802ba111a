# SPDX-License-Identifier: GPL-2.0-or-later
"""The parts of every benchmark: a daemon, swap areas, memory cgroups, figures, their display."""
