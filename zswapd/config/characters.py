# SPDX-License-Identifier: GPL-2.0-or-later
"""A search for characters that editors and web pages put in place of TOML's own.

They look like quotes, blanks or dashes, or are invisible, so the parser's message ("Invalid value")
does not help. They are valid in comments and strings. Therefore a text is searched only after the
parser has refused it, and only near the place where the parser stopped.

Limit: the character that is found may not be the cause. Then the parser reports the cause after the
user has replaced the character.
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
    """A character that TOML does not allow at its place."""

    place: int
    """Index in the text."""
    name: str
    """Code point and name, such as U+201C LEFT DOUBLE QUOTATION MARK."""
    advice: str
    """The advice to the user, for a hint."""


def find_strange_character(text: str, complaint: str) -> StrangeCharacter | None:
    """Return the character that the parser may have refused, or None if its line has none.

    Args:
        text: a text that tomllib has refused.
        complaint: the message of tomllib, with line and column.
    """
    line_begin, line_end, stopped_at = _line(text, complaint)
    if stopped_at < len(text) and _is_strange(text[stopped_at]):
        return _described(text, stopped_at)
    # If a strange quote was meant to end a string, the parser stops later. So the whole line is
    # searched, without its complete strings and comments.
    line = _STRING_OR_COMMENT.sub(lambda found: " " * len(found[0]), text[line_begin:line_end])
    for place, character in enumerate(line, start=line_begin):
        if _is_strange(character):
            return _described(text, place)
    return None


def _line(text: str, complaint: str) -> tuple[int, int, int]:
    """Return begin and end of the line of a complaint, and the place where the parser stopped."""
    found = _PLACE.search(complaint)
    # The parser stopped at the end of the text: the last line that is not empty opened the string.
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
        return f"replace it with {plain}"
    if character == "\r":
        return "end every line with a newline; tr '\\r' '\\n' converts the file"
    category = unicodedata.category(character)
    if category in {"Zs", "Zl", "Zp"}:
        return "replace it with a space" if category == "Zs" else "replace it with a newline"
    if category in {"Cf", "Cc", "Cn", "Co"}:
        return "remove it; it may be invisible"
    return 'names of settings have only ASCII letters; put text in "quotes"'
