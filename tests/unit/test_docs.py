# SPDX-License-Identifier: GPL-2.0-or-later
"""What documents name is there: files, tests, headings, and an answer for each finding of the review."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parent.parent.parent
PAGES = sorted([TOP / "README.md", *(TOP / "docs").glob("*.md")])
_ROOTS = "tests|zswapd|docs|scripts|systemd|monitoring|man|completions"
_PATH = re.compile(rf"`(?:\./|sudo )?((?:{_ROOTS})/[\w./-]*\w/?)(?:::(\w+))?[^`]*`")
_LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page: Path) -> None:
    text = page.read_text()
    for name, test in _PATH.findall(text):
        path = TOP / name
        assert path.exists(), f"{page.name} names {name}"
        if test:
            assert re.search(rf"^(async )?def {test}\(", path.read_text(), re.MULTILINE), f"{name} has no {test}"
    for link in _LINK.findall(text):
        assert (page.parent / link).exists(), f"{page.name} links to {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_quoted_headings_of_other_pages_exist(page: Path) -> None:
    for other, heading in re.findall(r'\[[\w.]+\]\(([\w./-]+\.md)\), "([^"]+)"', page.read_text()):
        assert re.search(rf"^##+ {re.escape(heading)}$", (page.parent / other).read_text(), re.MULTILINE), heading


def rows() -> list[list[str]]:
    text = (TOP / "docs/review-2012.md").read_text()
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [line for line in lines if line[0] not in {"finding", "asked for"}]


def test_every_finding_has_an_answer_and_a_test() -> None:
    found = rows()
    assert len(found) >= 40
    for row in found:
        assert len(row) == 3, row[0]
        assert len(row[1]) > 20, row[0]
        assert "`tests/" in row[2], row[0]
