# SPDX-License-Identifier: GPL-2.0-or-later
"""Metrics for Prometheus: families.py says what, from a snapshot.

Exporter.py serves it over HTTP from a thread of its own.
"""
