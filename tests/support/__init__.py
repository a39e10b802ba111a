# SPDX-License-Identifier: GPL-2.0-or-later
"""Shared by the tests: capabilities, fakes, strategies, strict logs, the search for leftovers."""
