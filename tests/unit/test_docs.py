# SPDX-License-Identifier: GPL-2.0-or-later
"""What documents name is there.

Files, tests, headings, and an answer for each finding of the review.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.support import TOP, documents
from zswapd import errors
from zswapd.cli import zswapctl, zswapd
from zswapd.metrics.families import described

PAGES = sorted([*TOP.glob("*.md"), *(TOP / "docs").glob("*.md")])
_ROOTS = "tests|zswapd|tools|docs|scripts|systemd|monitoring|man|completions"
_PATH = re.compile(rf"`(?:\./|sudo )?((?:{_ROOTS})/[\w./-]*\w/?)(?:::(\w+))?[^`]*`")
_LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page: Path) -> None:
    text = page.read_text()
    for name, test in _PATH.findall(text):
        path = TOP / name
        assert path.exists(), f"{page.name} names {name}"
        if test:
            assert re.search(rf"^(async )?def {test}\(", path.read_text(), re.MULTILINE), (
                f"{name} has no {test}"
            )
    for link in _LINK.findall(text):
        assert (page.parent / link).exists(), f"{page.name} links to {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_quoted_headings_of_other_pages_exist(page: Path) -> None:
    for other, heading in re.findall(r'\[[\w.]+\]\(([\w./-]+\.md)\), "([^"]+)"', page.read_text()):
        assert re.search(
            rf"^##+ {re.escape(heading)}$", (page.parent / other).read_text(), re.MULTILINE
        ), heading


@pytest.mark.parametrize(
    "page",
    [*PAGES, TOP / "monitoring/zswapd.rules.yml", TOP / "monitoring/grafana.json"],
    ids=lambda page: page.name,
)
def test_metrics_that_are_named_are_told(page: Path) -> None:
    named = set(re.findall(r"\bzswapd_[a-z_]+[a-z]\b(?!\*|-|\.py)", page.read_text())) - {
        "zswapd_rules"
    }
    assert {re.sub("_(bucket|count|sum)$", "", name) for name in named} <= {
        one.name for one in described()
    }


def test_every_alert_has_something_to_do() -> None:
    alerts = re.findall(r"- alert: (\w+)", (TOP / "monitoring/zswapd.rules.yml").read_text())
    text = (TOP / "docs/operations.md").read_text()
    found = dict(re.findall(r"^\| `(Zswapd\w+)` \| .{20,} \| (.{8,}) \|$", text, re.MULTILINE))
    assert len(alerts) >= 15
    assert set(found) == set(alerts)


def test_every_exit_code_is_in_the_table() -> None:
    text = (TOP / "docs/operations.md").read_text()
    table = dict(re.findall(r"^\| (\d+) \| (\w+): .* \|$", text, re.MULTILINE))
    classes = [
        one
        for one in vars(errors).values()
        if isinstance(one, type) and issubclass(one, errors.ZswapdError)
    ]
    assert {str(one.exit_code): one.__name__ for one in classes} == table
    for one in classes:
        first = (one.__doc__ or "").splitlines()[0]
        assert f"| {one.exit_code} | {one.__name__}: {first} |\n" in text


def rows() -> list[list[str]]:
    text = (TOP / "docs/review-2012.md").read_text()
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [line for line in lines if line[0] not in {"finding", "asked for"}]


NITS = (
    "POISON",
    "Kconfig",
    "debugging field",
    "`allocated`",
    "NULL",
    "NUM_CHUNK",
    "bool",
    "allocating",
    "compressing",
    "one line",
)
"""What the review found on the side, by a word of each."""


def test_every_finding_has_an_answer_and_a_test() -> None:
    found = rows()
    assert len(found) >= 50
    assert not [word for word in NITS if not any(word in row[0] for row in found)]
    for row in found:
        assert len(row) == 3, row[0]
        assert len(row[1]) > 20, row[0]
        assert "`tests/" in row[2], row[0]


CALLS = sorted({(page.name, call) for page in documents.PAGES for call in documents.calls(page)})


def test_there_are_many_calls() -> None:
    assert len(CALLS) > 50
    assert len(documents.commands(TOP / "README.md")) > 12


@pytest.mark.parametrize(("page", "call"), CALLS)
def test_every_call_of_our_programs_is_understood(page: str, call: str) -> None:
    words = shlex.split(call.removeprefix("sudo ").replace("[", "").replace("]", ""))
    parser = (zswapctl if Path(words[0]).name == "zswapctl" else zswapd).make_parser()
    # What a table means by a letter.
    given = [{"N": "1", "…": "x"}.get(word, word) for word in words[1:]]
    try:
        parser.parse_args(given)
    except errors.UsageError as refused:
        # A sentence may name a command without its arguments.
        if not refused.message.startswith("the following arguments are required"):
            pytest.fail(f"{page}: {call}: {refused}")


def test_manual_pages_examples_are_understood() -> None:
    for page in ("zswapd.8", "zswapctl.8"):
        text = (TOP / "man" / page).read_text().replace("\\-", "-")
        for call in re.findall(
            r"^\.B (zswap(?:d|ctl) [^\n]*)", text.partition(".SH EXAMPLES")[2], re.MULTILINE
        ):
            words = shlex.split(call.partition(" | ")[0])
            (zswapctl if words[0] == "zswapctl" else zswapd).make_parser().parse_args(words[1:])
