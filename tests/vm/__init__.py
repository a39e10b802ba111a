# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests in virtual machines: those that could hang this machine.

Some need rights, or a systemd, that this machine may not have.
"""
