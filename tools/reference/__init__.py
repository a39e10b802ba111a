# SPDX-License-Identifier: GPL-2.0-or-later
"""What is written from the programs' own tables.

Manual pages, the reference of settings, completions for shells.

The files are in the repository, so that a package needs nothing but to copy them and a reader finds
them; `scripts/reference` writes them, and `tests/unit/tools/test_reference.py` says when they are
not what it would write.
"""
