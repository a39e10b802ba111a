# SPDX-License-Identifier: GPL-2.0-or-later
"""Fixtures of the real-swap tests."""

from __future__ import annotations

from tests.support.swap import stage

__all__ = ["stage"]
