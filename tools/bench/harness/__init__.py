# SPDX-License-Identifier: GPL-2.0-or-later
"""What every benchmark needs: a daemon, swap areas, memory cgroups, figures and their display."""
