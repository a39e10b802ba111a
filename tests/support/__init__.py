# SPDX-License-Identifier: GPL-2.0-or-later
"""Shared by the tests: capabilities, fakes, strategies, strict logs, the search for leftovers."""

from __future__ import annotations

from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
"""The checkout. A test takes it from here, so that the test's own folder may change."""
