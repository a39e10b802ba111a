# SPDX-License-Identifier: GPL-2.0-or-later
"""Names the characters that editors and web pages write in place of those that TOML knows.

They look like quotes, blanks or dashes, or like nothing at all, so the parser's word for them
("Invalid value") helps little. Within comments and strings they are right; so a text is searched
only after the parser has refused it, and only near where it has stopped. Where the character that
is found was not the cause, the parser says so once that one is replaced.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

_PLACE = re.compile(r"at line (\d+), column (\d+)")
_STRING_OR_COMMENT = re.compile(r"""("(?:[^"\\\n]|\\.)*"|'[^'\n]*'|#[^\n]*)""")
_BLANKS = " \t\n"
_REPLACED_BY = {
    '"': (
        "\u201c\u201d\u201e\u201f\u00ab\u00bb\u2033\u2036\u275d\u275e\u301d\u301e\u301f\uff02\u02ba"
    ),
    "'": "\u2018\u2019\u201a\u201b\u2032\u2035\u2039\u203a\u275b\u275c\uff07\u02bc\u02b9\u00b4`",
    "-": "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d",
    "=": "\uff1d\ua78a\u2550",
    "_": "\uff3f",
    ",": "\u3001\uff0c",
    ".": "\u3002\u2024\uff0e",
    "#": "\uff03\ufe5f",
}
_REPLACEMENT = {
    character: plain for plain, characters in _REPLACED_BY.items() for character in characters
}
_NAMES = {
    "\v": "LINE TABULATION",
    "\f": "FORM FEED",
    "\r": "CARRIAGE RETURN",
    "\x1a": "SUBSTITUTE (Ctrl-Z)",
}


@dataclass(frozen=True, slots=True)
class StrangeCharacter:
    """A character that TOML has no use for where it stands."""

    place: int
    """Index in the text."""
    name: str
    """As U+201C LEFT DOUBLE QUOTATION MARK."""
    advice: str


def find_strange_character(text: str, complaint: str) -> StrangeCharacter | None:
    """Return the character that a parser may have stumbled over; None if its line has none.

    Args:
        text: a text that tomllib has refused.
        complaint: what it said, with the line and column.
    """
    line_begin, line_end, stopped_at = _line(text, complaint)
    if stopped_at < len(text) and _is_strange(text[stopped_at]):
        return _described(text, stopped_at)
    # A string that a strange quote was to end runs on, so the whole line counts, but not its whole
    # strings and comments.
    line = _STRING_OR_COMMENT.sub(lambda found: " " * len(found[0]), text[line_begin:line_end])
    for place, character in enumerate(line, start=line_begin):
        if _is_strange(character):
            return _described(text, place)
    return None


def _line(text: str, complaint: str) -> tuple[int, int, int]:
    """Return where the line of a complaint begins and ends, and where the parser has stopped."""
    found = _PLACE.search(complaint)
    # at the end: what is open there was opened by the last line that is not empty
    if found is None:
        end = len(text.rstrip())
        return text.rfind("\n", 0, end) + 1, end, len(text)
    begin = 0
    for _ in range(int(found[1]) - 1):
        begin = text.find("\n", begin) + 1
    end = text.find("\n", begin)
    return begin, end if end >= 0 else len(text), begin + int(found[2]) - 1


def _is_strange(character: str) -> bool:
    return character not in _BLANKS and (character == "`" or not "!" <= character <= "~")


def _described(text: str, place: int) -> StrangeCharacter:
    character = text[place]
    name = _NAMES.get(character) or unicodedata.name(character, "a control character")
    return StrangeCharacter(place, f"U+{ord(character):04X} {name}", _advice(character))


def _advice(character: str) -> str:
    plain = _REPLACEMENT.get(character)
    if plain is None:
        compatible = unicodedata.normalize("NFKC", character)
        plain = compatible if len(compatible) == 1 and " " < compatible <= "~" else None
    if plain is not None:
        return f"type {plain} in its place"
    if character == "\r":
        return "end every line with a newline: tr '\\r' '\\n' makes one of it"
    category = unicodedata.category(character)
    if category in {"Zs", "Zl", "Zp"}:
        return "type a blank in its place" if category == "Zs" else "begin a new line in its place"
    if category in {"Cf", "Cc", "Cn", "Co"}:
        return "remove it; it may be invisible"
    return 'names of settings have plain letters only; text stands in "quotes"'
