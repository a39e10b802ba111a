# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands that documents tell a reader to type."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from tests.support import TOP

PAGES = sorted([TOP / "README.md", *(TOP / "docs").glob("*.md")])
_BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"\s+#\s.*$|^#.*$")
_INLINE = re.compile(r"`((?:sudo )?(?:\.venv/bin/)?zswap(?:d|ctl)(?: [^`]*)?)`")


def commands(page: Path) -> list[str]:
    """Return the lines of a page's shell blocks in their order, without comments."""
    lines = (line for block in _BLOCK.findall(page.read_text()) for line in block.splitlines())
    return [command for line in lines if (command := _COMMENT.sub("", line).strip())]


def calls(page: Path) -> Iterator[str]:
    """Yield each call of zswapd or zswapctl in a page, in blocks and in sentences."""
    for command in commands(page):
        for part in re.split(r"\s(?:&&|\|)\s|&$", command):
            if re.match(r"(?:sudo )?(?:\.venv/bin/)?zswap(?:d|ctl)\b", part):
                yield part.strip()
    for match in _INLINE.findall(page.read_text()):
        if not re.search(r"\.(?:service|toml|rules|sock|conf)", match):
            yield re.sub(r"\s+", " ", match)
