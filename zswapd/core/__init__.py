# SPDX-License-Identifier: GPL-2.0-or-later
"""The synchronous core: from the block device down to the stored page.

It imports no trio, no pyfuse3, no prometheus_client, and nothing of the system around it. Nothing
in it awaits. Its parts take plain values; `core.py` alone knows the configuration.
"""
