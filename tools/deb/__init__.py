# SPDX-License-Identifier: GPL-2.0-or-later
"""The Debian package: `build` makes it, `container` boots a Debian to test it in."""
