# SPDX-License-Identifier: GPL-2.0-or-later
"""Settings: the table (`table`), kinds of values (`kinds`, `sizes`) and sources (`loader`)."""

from zswapd.config.document import from_document, to_document, with_changes
from zswapd.config.kinds import Context
from zswapd.config.loader import (
    Config,
    Origin,
    changed,
    describe,
    load,
    parse_assignment,
    reloadable_names,
    with_files,
)
from zswapd.config.sizes import parse_size
from zswapd.config.table import SECTIONS, SETTINGS, Setting

__all__ = [
    "SECTIONS",
    "SETTINGS",
    "Config",
    "Context",
    "Origin",
    "Setting",
    "changed",
    "describe",
    "from_document",
    "load",
    "parse_assignment",
    "parse_size",
    "reloadable_names",
    "to_document",
    "with_changes",
    "with_files",
]
