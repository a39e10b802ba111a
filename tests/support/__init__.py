# SPDX-License-Identifier: GPL-2.0-or-later
"""The tests' shared parts: capabilities, fakes, strategies, strict logs, search for leftovers."""

from __future__ import annotations

from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
"""The root of the checkout, so that a test can move to another folder."""
