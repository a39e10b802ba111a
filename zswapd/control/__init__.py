# SPDX-License-Identifier: GPL-2.0-or-later
"""The control socket: messages (`protocol`), the daemon's side (`server`, trio), zswapctl's side.

(`client`, without).
"""
