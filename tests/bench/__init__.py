# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests of the harness that measures: a benchmark that cannot see an error proves nothing."""
