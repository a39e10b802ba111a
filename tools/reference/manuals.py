# SPDX-License-Identifier: GPL-2.0-or-later
"""Manual pages in man(7)'s macros: zswapd(8), zswapctl(8), zswapd.toml(5)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from tools.reference.commandline import Command, Option, commands, own_options
from zswapd import __version__, errors
from zswapd.cli import sources, zswapctl, zswapd
from zswapd.cli.failures import INTERRUPTED
from zswapd.config import SECTIONS, SETTINGS, Context
from zswapd.config.kinds import shown
from zswapd.core import compress

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# What defaults and ranges are said for, the same on every machine that writes the pages.
CONTEXT = Context(memory_total=8 << 30, page_size=4096, codecs=frozenset(compress.names()))

_DESCRIPTION = (
    "`zswapd run` serves swap files as files below a mount point, compressed in memory. `zswapctl"
    " swapon` makes one of them swap. A process that serves may die in any way: its supervisor, the"
    " process that was started, has the next one go on where it left off."
)
_SIGNALS = (
    (
        "SIGTERM, SIGINT",
        (
            "Swap off, and end when all that was swapped out is back in memory. If it does not fit,"
            " the daemon goes on."
        ),
    ),
    (
        "SIGHUP",
        (
            "Read the settings again, and become the program that is installed now, while swapped"
            " on. If either is not right, the log says so, and nothing changes. `zswapctl upgrade`"
            " does the same, and waits for it. A SIGHUP that tells of the end of its terminal"
            " changes nothing."
        ),
    ),
    (
        "SIGTSTP, SIGQUIT, SIGUSR1 and others",
        (
            "They change nothing: job control does not stop zswapd, and no signal of a stranger"
            " ends it."
        ),
    ),
    (
        "SIGKILL",
        (
            "To the process that serves: the next one takes over, and no page is lost. To the"
            " supervisor: the process that serves goes on alone until `zswapd run` is started"
            " again."
        ),
    ),
)
_FILES = (
    ("/etc/zswapd/zswapd.toml", "Settings; see zswapd.toml(5)."),
    (
        "/etc/zswapd/zswapd.toml.d/*.toml",
        (
            "More of them, in the order of their names; later ones win. Names that begin with a dot"
            " are left out."
        ),
    ),
    ("/run/zswapd/zswapd.sock", "The control socket, unless `control.socket` names another."),
    ("/run/zswapd/mnt/swap", "The swap file; others beside it if `swap.files` names some."),
    ("/run/zswapd/mnt/stats/, /run/zswapd/mnt/params/", "Counters and settings, a file for each."),
    ("/run/zswapd/mnt/cache/", "Cache volumes."),
)
_EXAMPLES = (
    ("zswapctl swapon", "Swap to the daemon's file, with a loop device of its own."),
    ("zswapctl set pool.limit=2G pool.compressor=lzo", "Change settings, both or none of them."),
    ("zswapctl reset --all", "Have all settings as they are configured."),
    ("zswapctl status --json | jq .pool", "What is stored, for a script."),
    (
        "zswapctl cache add films --backing /srv/films.img",
        "Read a slow file through the cache, as /run/zswapd/mnt/cache/films.",
    ),
)
_SOURCES = (
    "Settings come from, later ones winning: the defaults below, the config file, its drop-ins in"
    " the order of their names, and the options of `zswapd run`. `zswapd config check` says whether"
    " they are right, `zswapd config show` where each comes from, `zswapd config defaults` prints a"
    " file to begin with. An unknown key, a wrong type or a value out of range keeps the daemon"
    " from starting, with file, line and what would be right."
)
_LIVE = (
    "Settings that say so can change while the daemon runs: by `zswapctl set`, or by writing to"
    " their file below params/. What is asked for together is judged together, and applied whole or"
    " not at all; it wins over the files until it is reset (`zswapctl reset`) or the daemon is"
    " stopped: takeovers, upgrades and reloads keep it, and so does a start that adopts what a dead"
    " one has left. Files are read again by `systemctl reload`, `zswapctl upgrade` or SIGHUP; if"
    " anything in them is not right, nothing changes."
)
_SIZES = (
    "Sizes are bytes, or have a unit: K, M, G, T (each 1024 of the one before), or % of the"
    " machine's memory; min(50%, 4G) and max(...) choose among several."
)


def zswapd_8() -> str:
    """Return zswapd(8)."""
    parser, shared = zswapd.make_parser(), sources.options()
    lines = [*_top("zswapd", 8, "compressed swap in user space"), ".SH SYNOPSIS"]
    lines += _synopses("zswapd", commands(parser, shared), "[OPTION...]")
    lines += [".SH DESCRIPTION", _text(_DESCRIPTION), ".SH COMMANDS"]
    lines += _commands(commands(parser, shared))
    lines += [".SH OPTIONS", *_options((*own_options(shared), *own_options(parser)))]
    lines += [".SH SIGNALS", *_list(_SIGNALS), ".SH FILES", *_list(_FILES), *_exit_status()]
    return _page(lines, "zswapctl(8), zswapd.toml(5), swapon(8)")


def zswapctl_8() -> str:
    """Return zswapctl(8)."""
    parser, shared = zswapctl.make_parser(), zswapctl.common()
    lines = [*_top("zswapctl", 8, "show and control a running zswapd"), ".SH SYNOPSIS"]
    lines += [".B zswapctl", "[OPTION...] COMMAND [ARGUMENT...]"]
    lines += [
        ".SH DESCRIPTION",
        _text(
            "Asks the daemon over its control socket, which is root's. "
            + (parser.description or "")
        ),
    ]
    lines += [
        ".SH OPTIONS",
        *_options(own_options(parser)),
        ".SH COMMANDS",
        *_commands(commands(parser, shared)),
    ]
    lines += [".SH FILES", *_list(_FILES[2:]), *_exit_status(), ".SH EXAMPLES", *_list(_EXAMPLES)]
    return _page(lines, "zswapd(8), zswapd.toml(5), swapon(8), losetup(8)")


def zswapd_toml_5() -> str:
    """Return zswapd.toml(5)."""
    lines = [*_top("zswapd.toml", 5, "settings of zswapd"), ".SH SYNOPSIS"]
    lines += [
        "/etc/zswapd/zswapd.toml",
        ".br",
        "/etc/zswapd/zswapd.toml.d/*.toml",
        ".SH DESCRIPTION",
    ]
    lines += [_text(_SOURCES), ".PP", _text(_SIZES), ".PP", _text(_LIVE)]
    for section, cls in SECTIONS.items():
        lines += [f".SH [{section}]", _text((cls.__doc__ or "").partition(": ")[2], capital=True)]
        for row in SETTINGS.values():
            if row.section == section:
                live = " Can change at run time." if row.reloadable else ""
                default = shown(row.default_for(CONTEXT))
                lines += [".TP", f'.BR {_escape(row.key)} " = {_quoted(default)}"']
                lines += [_text(f"{row.help} Takes {row.kind.describe(CONTEXT)}.{live}")]
    example = (
        "[swap]",
        'size = "min(50%, 4G)"',
        'files = { scratch = "1G" }',
        "",
        "[pool]",
        'compressor = "lzo"',
        'limit = "25%"',
    )
    lines += [".SH EXAMPLES", ".nf", *map(_escape, example), ".fi"]
    return _page(lines, "zswapd(8), zswapctl(8)")


def _top(name: str, section: int, what: str) -> list[str]:
    return [
        '.\\" SPDX-License-Identifier: GPL-2.0-or-later',
        '.\\" Written by scripts/reference.',
        f'.TH {name.upper()} {section} "" "zswapd {__version__}" "zswapd"',
        ".SH NAME",
        f"{name} \\- {what}",
    ]


def _page(lines: Iterable[str], see_also: str) -> str:
    pages = re.sub(r"([\w.]+)\((\d)\)(,?) ?", r".BR \1 (\2)\3" + "\n", see_also)
    return "\n".join([*lines, ".SH SEE ALSO", pages.rstrip()]) + "\n"


def _synopses(program: str, found: Iterable[Command], common: str) -> Iterator[str]:
    for place, command in enumerate(found):
        if place:
            yield ".br"
        takes_common = " " + common if command.name != "config defaults" else " [\\-\\-json]"
        yield f".B {program} {command.name}"
        yield takes_common.strip() + (f" {_escape(word)}" if (word := _places(command)) else "")


def _places(command: Command) -> str:
    return " ".join(option.form for option in command.options if not option.names)


def _commands(found: Iterable[Command]) -> Iterator[str]:
    for command in found:
        yield f".SS {_escape(command.name)} {_escape(command.synopsis)}".rstrip()
        yield _text(command.description)
        yield from _options(command.options)


def _options(options: Iterable[Option]) -> Iterator[str]:
    for option in options:
        yield ".TP"
        names = ", ".join(f"\\fB{_escape(name)}\\fR" for name in option.names)
        yield f"{names} \\fI{_escape(option.value)}\\fR".strip() if option.value else names
        yield _text(option.help, capital=True)


def _list(rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    for term, text in rows:
        yield ".TP"
        yield f".B {_escape(term)}"
        yield _text(text)


def _exit_status() -> Iterator[str]:
    yield ".SH EXIT STATUS"
    yield ".TP"
    yield ".B 0"
    yield "All is well."
    yield ".TP"
    yield f".B {INTERRUPTED}"
    yield "Interrupted by Ctrl\\-C."
    classes = [errors.ZswapdError]
    while classes:
        cls = classes.pop(0)
        classes += cls.__subclasses__()
        classes.sort(key=lambda one: one.exit_code)
        yield ".TP"
        yield f".B {cls.exit_code}"
        yield _text(
            "Any other failure"
            if cls is errors.ZswapdError
            else (cls.__doc__ or "").partition("\n")[0]
        )


def _quoted(text: str) -> str:
    return _escape(text).replace('"', "\\(dq")


def _text(text: str, *, capital: bool = False) -> str:
    """Return running text, one line, with `code` in bold and a stop at the end."""
    text = " ".join(text.split())
    text = (text[:1].upper() + text[1:] if capital else text) + (
        "" if text.endswith((".", "…")) else "."
    )
    return re.sub(r"`([^`]*)`", r"\\fB\1\\fR", _escape(text))


def _escape(text: str) -> str:
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("…", "...")
    return "\\&" + text if text[:1] in (".", "'") else text
