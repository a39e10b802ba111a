# SPDX-License-Identifier: GPL-2.0-or-later
"""The kinds of a setting's value: one small class for each, from the written to the typed value.

A value has a TOML type if it comes from a file. It is text if it comes from the command line or the
control socket. `from_text` converts the text to a TOML type. `convert` checks the value and returns
it in the form that the program uses: bytes for a size, a Path for a path.

Invariants: `convert` raises ValueRefused and no other exception, because any text can arrive on the
control socket. All classes are pure: facts about the machine come in a Context.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Generic, Protocol, TypeVar

from zswapd.config.sizes import EXAMPLES, Size, ValueRefused, parse_size
from zswapd.host.hints import nearest
from zswapd.pages import round_down, round_up

T_co = TypeVar("T_co", covariant=True)

_TRUE = {"true", "on", "yes", "1"}
_FALSE = {"false", "off", "no", "0"}
_MOST_PAGES = (1 << 32) - 1  # mkswap's header and the headers of stored pages count them in 32 bits
_SOCKET_PATH_LONGEST = 107  # sun_path of sockaddr_un, less the closing zero


@dataclass(frozen=True, slots=True)
class Context:
    """The facts about the machine and the program that the checks need."""

    memory_total: int
    """Bytes that are 100 % of a size.

    It is MemTotal, or the lowest limit of a memory cgroup above this process.
    """
    page_size: int
    """Bytes in a page."""
    codecs: frozenset[str]
    """Names that `pool.compressor` may have."""
    limited_by: str = ""
    """The file with the limit of the memory cgroup, or empty without a limit."""


class Kind(Protocol[T_co]):
    """A kind of value: its description, its parser and its check."""

    def describe(self, context: Context) -> str:
        """Return the valid values as a noun phrase, for hints and reference pages."""
        ...

    def from_text(self, text: str) -> object:
        """Return the TOML value of a text."""
        ...

    def convert(self, value: object, context: Context) -> T_co:
        """Return the typed value.

        Raises:
            ValueRefused: the value has the wrong type or is out of range.
        """
        ...


def shown(value: object) -> str:
    """Return a value in the form of TOML, for messages; at most 60 characters."""
    if isinstance(value, bool):
        return "true" if value else "false"
    text = f'"{"".join(map(_escaped, value[:60]))}"' if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else text[:59] + "…"


def _escaped(character: str) -> str:
    """Return a character as a basic string of TOML has it, safe for a terminal and a log."""
    if character in '"\\':
        return "\\" + character
    if character.isprintable():
        return character
    return f"\\u{ord(character):04x}" if ord(character) < 1 << 16 else f"\\U{ord(character):08x}"


@dataclass(frozen=True, slots=True)
class Boolean:
    """True or false."""

    def describe(self, context: Context) -> str:
        """Return the valid words."""
        return "true or false"

    def from_text(self, text: str) -> object:
        """Return a bool for true, on, yes, 1, false, off, no and 0, otherwise the text."""
        word = text.strip().lower()
        return True if word in _TRUE else False if word in _FALSE else text

    def convert(self, value: object, context: Context) -> bool:
        """Return the value, which must be a bool."""
        if not isinstance(value, bool):
            raise ValueRefused(f"is {shown(value)}", f"write {self.describe(context)}")
        return value


@dataclass(frozen=True, slots=True)
class Integer:
    """A whole number from `low` to `high`, or to the page size if `high` is None."""

    low: int
    high: int | None = None

    def _high(self, context: Context) -> int:
        return context.page_size if self.high is None else self.high

    def describe(self, context: Context) -> str:
        """Return the range."""
        return f"a whole number from {self.low} to {self._high(context)}"

    def from_text(self, text: str) -> object:
        """Return an int if the text is one, otherwise the text."""
        return int(text) if re.fullmatch(r"\s*[+-]?[0-9]{1,18}\s*", text) else text

    def convert(self, value: object, context: Context) -> int:
        """Return the value, which must be an int in the range and not a bool."""
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueRefused(f"is {shown(value)}", f"write {self.describe(context)}")
        if not self.low <= value <= self._high(context):
            raise ValueRefused(
                f"is {shown(value)}, out of range", f"write {self.describe(context)}"
            )
        return value


@dataclass(frozen=True, slots=True)
class _Word:
    """The base of the kinds whose TOML value is a string."""

    def from_text(self, text: str) -> object:
        """Return the text unchanged."""
        return text


@dataclass(frozen=True, slots=True)
class Choice(_Word):
    """One of `words`, or a codec's name if `words` is empty."""

    words: tuple[str, ...] = ()

    def _words(self, context: Context) -> tuple[str, ...]:
        return self.words or tuple(sorted(context.codecs))

    def describe(self, context: Context) -> str:
        """Return the valid words."""
        *others, last = self._words(context)
        return f"{', '.join(others)} or {last}" if others else last

    def convert(self, value: object, context: Context) -> str:
        """Return the value, which must be one of the words."""
        words = self._words(context)
        if not isinstance(value, str) or value not in words:
            near = nearest(value, set(words)) if isinstance(value, str) else None
            meant = f"did you mean {near}? " if near else ""
            raise ValueRefused(
                f"is {shown(value)}, which is not known", f"{meant}write {self.describe(context)}"
            )
        return value


@dataclass(frozen=True, slots=True)
class OptionalInteger(Integer):
    """A whole number, or an empty string for none."""

    def describe(self, context: Context) -> str:
        """Return the range and the meaning of the empty string."""
        return f'{Integer.describe(self, context)}, or "" for none'

    def convert(self, value: object, context: Context) -> int | None:  # type: ignore[override] # None is the point
        """Return the number, or None."""
        return None if value == "" else Integer.convert(self, value, context)


@dataclass(frozen=True, slots=True)
class OptionalChoice(Choice):
    """One of some words, or an empty string for none."""

    def describe(self, context: Context) -> str:
        """Return the valid words and the meaning of the empty string."""
        return f'{Choice.describe(self, context)}, or "" for none'

    def convert(self, value: object, context: Context) -> str:
        """Return the word, or an empty string."""
        return "" if value == "" else Choice.convert(self, value, context)


@dataclass(frozen=True, slots=True)
class AbsolutePath(_Word):
    """An absolute path. If `socket` is True, it is short enough for a Unix socket."""

    socket: bool = False

    def describe(self, context: Context) -> str:
        """Return the rule."""
        return (
            f"an absolute path of at most {_SOCKET_PATH_LONGEST} bytes"
            if self.socket
            else "an absolute path"
        )

    def convert(self, value: object, context: Context) -> Path:
        """Return the path without trailing and double slashes."""
        hint = f"write {self.describe(context)}"
        if not isinstance(value, str) or not value.startswith("/") or "\0" in value:
            raise ValueRefused(f"is {shown(value)}", hint)
        path = PurePosixPath(value)
        if ".." in path.parts or str(path) in ("/", "//"):
            raise ValueRefused(
                f"is {shown(value)}", f"{hint}, without '..' and not the root directory"
            )
        if self.socket and len(bytes(path)) > _SOCKET_PATH_LONGEST:
            raise ValueRefused(f"is {len(bytes(path))} bytes long", hint)
        return Path(path)


@dataclass(frozen=True, slots=True)
class OptionalPath(AbsolutePath):
    """An absolute path, or an empty string for none."""

    def describe(self, context: Context) -> str:
        """Return the rule and the meaning of the empty string."""
        return f'{AbsolutePath.describe(self, context)}, or "" for none'

    def convert(self, value: object, context: Context) -> Path | None:  # type: ignore[override] # None is the point
        """Return the path, or None."""
        return None if value == "" else AbsolutePath.convert(self, value, context)


@dataclass(frozen=True, slots=True)
class ListenAddress(_Word):
    """An IP address and a TCP port, or an empty string for none."""

    def describe(self, context: Context) -> str:
        """Return examples."""
        return 'an IP address and a port, such as 127.0.0.1:9847 or [::1]:9847, or "" for none'

    def convert(self, value: object, context: Context) -> str:
        """Return the text, which must be an address with a port, or empty."""
        if value == "":
            return ""
        hint = f"write {self.describe(context)}"
        host, colon, port = value.rpartition(":") if isinstance(value, str) else ("", "", "")
        try:
            version = ipaddress.ip_address(
                host[1:-1] if host[:1] + host[-1:] == "[]" else host
            ).version
        except ValueError:
            raise ValueRefused(f"is {shown(value)}", hint) from None
        is_port = colon and re.fullmatch(r"[0-9]{1,5}", port) and 0 < int(port) < 65536
        if not is_port or (version == 6) != (host[0] == "["):
            raise ValueRefused(f"is {shown(value)}", hint)
        return str(value)


@dataclass(frozen=True, slots=True)
class UserNames(_Word):
    """Names or numbers of users, separated by spaces.

    `*` stands for all users. An empty string stands for none.
    """

    def describe(self, context: Context) -> str:
        """Return examples."""
        return 'names of users such as "prometheus telegraf", "*" for all, or "" for none'

    def convert(self, value: object, context: Context) -> str:
        """Return the names with one space between them."""
        names = value.split() if isinstance(value, str) else [""]
        if not all(
            name == "*" or re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,31}\$?", name)
            for name in names
        ):
            raise ValueRefused(f"is {shown(value)}", f"write {self.describe(context)}")
        return " ".join(names)


@dataclass(frozen=True, slots=True)
class MemorySize(_Word):
    """A size expression, rounded down to whole pages.

    It is at most `percent` of the memory. 0 means no limit.
    """

    percent: int = 0

    def describe(self, context: Context) -> str:
        """Return examples and the limit."""
        bound = f", at most {self.percent}%" if self.percent else ""
        return f"a size such as 2G, 512M, 50% or min(50%, 4G){bound}"

    def convert(self, value: object, context: Context) -> int:
        """Return the size in bytes."""
        size = _evaluate(value, context)
        rounded = round_down(size.bytes, context.page_size)
        if not rounded:
            raise ValueRefused(
                f"is {size.bytes} bytes, less than a page",
                f"write {context.page_size} or more; {EXAMPLES}",
            )
        if self.percent and size.bytes * 100 > context.memory_total * self.percent:
            share = "all" if self.percent == 100 else f"{self.percent}%"
            raise ValueRefused(
                f"is {size.bytes} bytes, more than {share} of the memory ({context.memory_total}"
                f" bytes{f', by {context.limited_by}' if context.limited_by else ''})",
                f"write {self.describe(context)}",
            )
        return rounded


@dataclass(frozen=True, slots=True)
class OptionalSize(MemorySize):
    """A size, or an empty string for none."""

    def describe(self, context: Context) -> str:
        """Return examples and the meaning of the empty string."""
        # Not super(): dataclass(slots=True) makes a new class, and super() without arguments would
        # refer to the old one.
        return f'{MemorySize.describe(self, context)}, or "" for none'

    def convert(self, value: object, context: Context) -> int | None:  # type: ignore[override] # None is the point
        """Return the size in bytes, or None."""
        return None if value == "" else MemorySize.convert(self, value, context)


@dataclass(frozen=True, slots=True)
class SwapSize(MemorySize):
    """The size of a swap file, in whole pages.

    mkswap(8) requires ten pages at least. Its header counts 2^32 - 1 pages at most.
    """

    def convert(self, value: object, context: Context) -> int:
        """Return the size in bytes.

        A whole number must be a multiple of the page size. Other sizes are rounded down.
        """
        size, page = _evaluate(value, context), context.page_size
        rounded = round_down(size.bytes, page)
        if size.exact and rounded != size.bytes:
            near = {max(rounded, 10 * page), max(round_up(size.bytes, page), 10 * page)}
            raise ValueRefused(
                f"is {size.bytes} bytes, not a multiple of the page ({page} bytes)",
                f"write {' or '.join(str(right) for right in sorted(near))}",
            )
        if rounded // page > _MOST_PAGES:
            raise ValueRefused(
                f"is {size.bytes} bytes, more than a swap area can have: {_MOST_PAGES} pages",
                f"write {_MOST_PAGES * page} or less; {EXAMPLES}",
            )
        if rounded < 10 * page:
            raise ValueRefused(
                f"is {size.bytes} bytes, too small for a swap file",
                f"write {10 * page} or more; {EXAMPLES}",
            )
        return rounded


@dataclass(frozen=True, slots=True)
class OptionalSwapSize(SwapSize):
    """The size of a swap file, or an empty string for no such file."""

    def describe(self, context: Context) -> str:
        """Return examples and the meaning of the empty string."""
        return f'{SwapSize.describe(self, context)}, or "" for none'

    def convert(self, value: object, context: Context) -> int | None:  # type: ignore[override] # as above
        """Return the size in bytes, or None."""
        return None if value == "" else SwapSize.convert(self, value, context)


@dataclass(frozen=True, slots=True)
class BackingFile(_Word):
    """The backing file of a cache volume, as PATH (mode `ro`) or MODE:PATH."""

    modes: tuple[str, ...]

    def describe(self, context: Context) -> str:
        """Return examples."""
        return 'the absolute path of a file or block device, as it is or as "writethrough:PATH"'

    def convert(self, value: object, context: Context) -> str:
        """Return MODE:PATH."""
        if isinstance(value, str) and "\0" not in value:
            mode, colon, path = (
                ("ro", ":", value) if value.startswith("/") else value.partition(":")
            )
            if colon and mode in self.modes and path.startswith("/"):
                return f"{mode}:{path}"
        raise ValueRefused(f"is {shown(value)}", f"write {self.describe(context)}")


@dataclass(frozen=True, slots=True)
class Named(Generic[T_co]):
    """A table of names, each with a value of one kind. The entries of all sources are merged."""

    kind: Kind[T_co]
    reserved: frozenset[str] = frozenset()
    _NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

    def describe(self, context: Context) -> str:
        """Return the form of one entry."""
        return f"NAME = {self.kind.describe(context)}"

    def from_text(self, text: str) -> object:
        """Return the text. `convert` refuses it, because a text sets one entry, not the table."""
        return text

    def check_name(self, name: str) -> None:
        """Check that a name is a valid file name and is not reserved.

        Raises:
            ValueRefused: the name is invalid or reserved.
        """
        if not self._NAME.fullmatch(name):
            raise ValueRefused(
                f"has the name {shown(name)}",
                "use up to 64 letters, digits, '.', '_' and '-', a letter or digit first",
            )
        if name in self.reserved:
            raise ValueRefused(f"has the name {shown(name)}, which is reserved", "choose another")

    def convert(self, value: object, context: Context) -> dict[str, T_co]:
        """Return the table with its values converted."""
        if not isinstance(value, dict):
            raise ValueRefused(f"is {shown(value)}", f"write a table of {self.describe(context)}")
        for name in value:
            self.check_name(name)
        return {name: self.kind.convert(item, context) for name, item in value.items()}


def _evaluate(value: object, context: Context) -> Size:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueRefused(f"is {shown(value)}", EXAMPLES)
    try:
        return parse_size(str(value), memory_total=context.memory_total)
    except ValueRefused as refused:
        raise ValueRefused(f"is {shown(value)}; it {refused.message}", refused.hint) from None
