# SPDX-License-Identifier: GPL-2.0-or-later
"""Metrics for Prometheus: families.py says what, from a snapshot; exporter.py serves it over HTTP from a thread of its own."""
