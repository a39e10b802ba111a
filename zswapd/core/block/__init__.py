# SPDX-License-Identifier: GPL-2.0-or-later
"""Block devices: byte ranges are turned into whole pages here."""
