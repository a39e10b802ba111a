# SPDX-License-Identifier: GPL-2.0-or-later
"""The generators of the files that follow from the programs' own tables.

These are the manual pages, the references of settings and metrics, and the shell completions.

The files are in the repository: a package only copies them, and a reader finds them.
`scripts/reference` writes them. `tests/unit/tools/test_reference.py` fails when one is out of date.
"""
