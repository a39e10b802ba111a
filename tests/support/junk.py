# SPDX-License-Identifier: GPL-2.0-or-later
"""Hypothesis strategies for the daemon's input: right, nearly right, and junk."""

from __future__ import annotations

import json

from hypothesis import strategies as st

from zswapd.config import SECTIONS, SETTINGS, Context, reloadable_names
from zswapd.control.protocol import COMMANDS, VERSION

LEAVING = ("upgrade", "inherit")
HARMLESS = sorted(set(COMMANDS) - set(LEAVING))
"""Commands that do not end or replace the daemon."""

_GOOD = [
    "1",
    "4096",
    "true",
    "off",
    "lz4",
    "lzo",
    "store",
    "refuse",
    "32M",
    "50%",
    "min(1G, 10%)",
    "error",
    "info",
    "",
    "0",
    "75",
]
_BAD = [
    "-1",
    "nan",
    "1e9",
    "9" * 40,
    "min(",
    "min(1G,",
    "%",
    "1G1G",
    "\0",
    "/",
    "lz4\n",
    "٣",
    "0x10",
    "max(" * 20 + "1" + ")" * 20,
]
WORDS = st.one_of(st.sampled_from(_GOOD), st.sampled_from(_BAD), st.text(max_size=30))
"""Values as text."""

_PLAIN = st.one_of(
    WORDS,
    st.booleans(),
    st.none(),
    st.integers(),
    st.integers(-(1 << 70), 1 << 70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.dates().map(str),
)
ANYTHING = st.recursive(
    _PLAIN,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
"""Values of JSON."""

NAMES = st.one_of(
    st.sampled_from(sorted(SETTINGS)),
    st.sampled_from(sorted(SETTINGS)).map(lambda name: name[:-1]),
    st.tuples(st.sampled_from(sorted(SECTIONS)), st.text(max_size=8)).map(".".join),
    st.sampled_from(["swap.files.more", "cache.volumes.x", "swap.files", ""]),
    st.text(max_size=12),
)
"""Names of settings."""


_CONTEXT = Context(memory_total=8 << 30, page_size=4096, codecs=frozenset({"lz4", "lzo"}))
RELOADABLE = reloadable_names()


def values(name: str) -> st.SearchStrategy[str]:
    """Return text for a setting: its default, nothing, or junk."""
    default = str(SETTINGS[name].default_for(_CONTEXT))
    return st.one_of(
        st.sampled_from([default, "", "1", default.rjust(9000), "true" + " " * 9000]), WORDS
    )


CHANGES = st.sampled_from(RELOADABLE).flatmap(lambda name: st.tuples(st.just(name), values(name)))
"""One setting that can change at run time, and a value."""


@st.composite
def requests(draw: st.DrawFn) -> dict[str, object]:
    """Return a request that is mostly well-formed."""
    command = draw(
        st.one_of(st.sampled_from([*HARMLESS, "set", "set", "set", "get"]), st.text(max_size=8))
    )
    if command == "recompress" and draw(st.integers(0, 49)):
        command = "set"  # a recompress takes a second
    arguments: dict[str, object] = {}
    for argument in COMMANDS.get(command, ()):
        if draw(st.integers(0, 5)):
            arguments[argument.name] = draw(
                st.one_of(_FITTING.get(argument.kind, ANYTHING), ANYTHING)
            )
    if draw(st.integers(0, 9)) == 0:
        arguments[draw(st.text(max_size=6))] = draw(ANYTHING)
    message: dict[str, object] = {"v": VERSION, "cmd": command, "args": arguments}
    if draw(st.integers(0, 9)) == 0:
        message[draw(st.sampled_from(["v", "cmd", "args", "id"]))] = draw(ANYTHING)
    if message["cmd"] in LEAVING:  # Hypothesis also tries words of our sources
        message["cmd"] = "get"
    return message


_FITTING: dict[str, st.SearchStrategy[object]] = {
    "name": st.sampled_from(
        [
            "swap",
            "a",
            "/dev/null",
            "/nonexistent",
            "/proc/self/mem",
            "/etc",
            "ro",
            "writethrough",
            "..",
            "x" * 300,
        ]
    ),
    "names": st.lists(NAMES, max_size=3),
    "settings": st.one_of(
        st.lists(CHANGES, min_size=1, max_size=3).map(dict),
        st.dictionaries(NAMES, WORDS, max_size=3),
    ),
    "count": st.sampled_from([0, 1, 64, 1 << 61]),
    "flag": st.booleans(),
}


@st.composite
def lines(draw: st.DrawFn) -> bytes:
    """Return one line for the control socket, without its end."""
    line = json.dumps(draw(requests())).encode()
    if draw(st.integers(0, 3)):
        return line
    return damaged(draw, line).replace(b"\n", b" ")


def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Return bytes with a few of them changed, taken out or put in."""
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(data) - 1, 0)))
        data = data[:place] + draw(st.binary(max_size=3)) + data[place + draw(st.integers(0, 4)) :]
    return data


@st.composite
def documents(draw: st.DrawFn) -> bytes:
    """Return the text of a config file."""
    text = []
    for _ in range(draw(st.integers(0, 5))):
        kind = draw(st.integers(0, 11))
        if kind == 0:
            text.append(
                f"[{draw(st.one_of(st.sampled_from(sorted(SECTIONS)), st.text(max_size=6)))}]"
            )
        elif kind == 1:
            text.append(draw(st.text(max_size=30)))
        elif kind < 4:
            name = draw(NAMES)
            text.append(
                f"{name if kind == 2 else name.partition('.')[2]} = {_toml(draw(ANYTHING))}"
            )
        else:
            name = draw(st.sampled_from(sorted(SETTINGS)))
            value = SETTINGS[name].default_for(_CONTEXT) if kind > 5 else draw(WORDS)
            text.append(f"{name} = {_toml(value)}")
    data = "\n".join(text).encode()
    return damaged(draw, data) if draw(st.integers(0, 3)) == 0 else data


def _toml(value: object) -> str:
    if isinstance(value, dict):
        return (
            "{"
            + ", ".join(f"{json.dumps(key)} = {_toml(item)}" for key, item in value.items())
            + "}"
        )
    return json.dumps(value)
