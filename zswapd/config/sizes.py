# SPDX-License-Identifier: GPL-2.0-or-later
"""The parser of size expressions: `2G`, `50%`, `min(50%, 4G)`.

It is a recursive-descent parser over one line of text. The complete grammar:

    size    = ("min" | "max") "(" size { "," size } ")"  |  number [ unit ]
    number  = digits [ "." digits ]
    unit    = "%" | "K" | "M" | "G" | "T"  (also "KiB" …; binary, in either case)

`%` is a share of the machine's memory. The caller passes the memory in, so the parser is pure.

Limits: a text has 200 characters and 16 levels of nesting at most, because it may come from the
control socket. A result of 2^62 bytes or more is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import NoReturn

UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
"""Bytes in each unit."""

EXAMPLES = "write for example 2G, 512M, 50% or min(50%, 4G)"
"""The hint of all syntax errors."""

_LONGEST = 200
_DEEPEST = 16
_LARGEST = 1 << 62
_TOKEN = re.compile(r"\s*(?:[0-9]+(?:\.[0-9]+)?|[A-Za-z]+|[%(),])")


class ValueRefused(ValueError):  # noqa: N818 - a refusal, which the loader turns into a ConfigError with file and line
    """The value is not valid for its setting.

    Args:
        message: the fault, as a clause that follows the setting's name.
        hint: a valid value.
    """

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Size:
    """A size in bytes."""

    bytes: int
    exact: bool
    """True if the user wrote a whole number, with or without a unit. It must not be rounded."""


def parse_size(text: str, *, memory_total: int) -> Size:
    """Evaluate a size expression.

    Args:
        text: the expression.
        memory_total: bytes that are 100 %.

    Returns:
        The size, rounded down to whole bytes.

    Raises:
        ValueRefused: the text is not a size, or the size is not in the range.
    """
    if len(text) > _LONGEST:
        raise ValueRefused(f"is longer than {_LONGEST} characters", EXAMPLES)
    size = _Parser(text, memory_total).parse()
    if size.bytes <= 0:
        raise ValueRefused(f"is {size.bytes} bytes, which is not positive", EXAMPLES)
    if size.bytes >= _LARGEST:
        raise ValueRefused("is larger than the largest file", EXAMPLES)
    return size


class _Parser:
    """One pass over the tokens of a text, with one token of look-ahead."""

    def __init__(self, text: str, memory_total: int) -> None:
        self._memory_total = memory_total
        self._tokens = self._tokenize(text)
        self._next = 0

    @staticmethod
    def _tokenize(text: str) -> list[str]:
        if "-" in text:
            raise ValueRefused("is negative", EXAMPLES)
        tokens: list[str] = []
        position, end = 0, len(text.rstrip())
        while position < end:
            match = _TOKEN.match(text, position)
            if match is None:
                raise ValueRefused(
                    f"has {text[position:].lstrip()[:1]!r}, which is not valid in a size", EXAMPLES
                )
            tokens.append(match[0].strip())
            position = match.end()
        return tokens

    def parse(self) -> Size:
        if not self._tokens:
            raise ValueRefused("is empty", EXAMPLES)
        size = self._size(depth=0)
        if self._next < len(self._tokens):
            raise ValueRefused(f"has {self._tokens[self._next]!r} after a complete size", EXAMPLES)
        return size

    def _peek(self) -> str:
        return self._tokens[self._next] if self._next < len(self._tokens) else ""

    def _size(self, *, depth: int) -> Size:
        token = self._peek()
        if token.lower() in ("min", "max"):
            return self._choice(depth=depth)
        if not token[:1].isdigit():
            self._expected("a number, min(…) or max(…)")
        self._next += 1
        return self._with_unit(Fraction(token), plain=token.isdigit())

    def _choice(self, *, depth: int) -> Size:
        if depth >= _DEEPEST:
            raise ValueRefused(f"has more than {_DEEPEST} levels of nesting", EXAMPLES)
        pick = min if self._peek().lower() == "min" else max
        self._next += 1
        self._take("(")
        sizes = [self._size(depth=depth + 1)]
        while self._peek() == ",":
            self._next += 1
            sizes.append(self._size(depth=depth + 1))
        self._take(")")
        return pick(sizes, key=lambda size: size.bytes)

    def _with_unit(self, number: Fraction, *, plain: bool) -> Size:
        token = self._peek()
        if token == "%":  # noqa: S105 - no password
            self._next += 1
            return Size(int(number * self._memory_total / 100), exact=False)
        if not token.isalpha():
            return Size(int(number), exact=plain)
        self._next += 1
        unit = token.upper().removesuffix("IB")
        if unit not in UNITS:
            raise ValueRefused(
                f"has the unknown unit {token!r}",
                f"units are K, M, G and T, all binary; {EXAMPLES}",
            )
        return Size(int(number * UNITS[unit]), exact=plain)

    def _take(self, sign: str) -> None:
        if self._peek() != sign:
            self._expected(repr(sign) if sign == "(" else f"',' or {sign!r}")
        self._next += 1

    def _expected(self, what: str) -> NoReturn:
        found = repr(self._peek()) if self._peek() else "the end"
        raise ValueRefused(f"has {found} where {what} should be", EXAMPLES)
