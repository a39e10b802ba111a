# SPDX-License-Identifier: GPL-2.0-or-later
"""What users install: sdist, wheel and the Debian package, built and tried."""
