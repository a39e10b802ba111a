# SPDX-License-Identifier: GPL-2.0-or-later
"""Metrics for Prometheus.

families.py makes them from a snapshot. exporter.py serves them over HTTP from its own thread.
"""
