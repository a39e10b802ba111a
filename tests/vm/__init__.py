# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests in virtual machines: what could hang this one.

And what takes rights and a systemd that it may not have.
"""
