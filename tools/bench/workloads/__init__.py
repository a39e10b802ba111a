# SPDX-License-Identifier: GPL-2.0-or-later
"""Workloads that put a load on a contender, and the reports on them."""
