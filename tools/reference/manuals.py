# SPDX-License-Identifier: GPL-2.0-or-later
"""The manual pages, in man(7)'s macros: zswapd(8), zswapctl(8), zswapd.toml(5)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from tools.reference.commandline import Command, Option, commands, own_options
from zswapd import __version__, errors
from zswapd.cli import sources, zswapctl, zswapd
from zswapd.cli.failures import INTERRUPTED
from zswapd.config import Context
from zswapd.config.kinds import shown
from zswapd.config.table import sections
from zswapd.core import compress

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# Defaults and ranges are those of a fixed machine, so every machine writes the same pages.
CONTEXT = Context(memory_total=8 << 30, page_size=4096, codecs=frozenset(compress.names()))

_DESCRIPTION = (
    "`zswapd run` serves swap files below a mount point, and keeps their pages compressed in"
    " memory. `zswapctl swapon` makes the kernel swap to one of them. `zswapd run` is the"
    " supervisor; its worker serves the files. If the worker dies, in any way, the supervisor"
    " starts the next one, which takes over with all pages."
)
_SIGNALS = (
    (
        "SIGTERM, SIGINT",
        (
            "Run swapoff, and end when all swapped-out pages are back in memory. If they do not"
            " fit, the daemon goes on."
        ),
    ),
    (
        "SIGHUP",
        (
            "Read the settings again, and change to the installed program, while swap is on. If"
            " either is not right, the log says so, and nothing changes. `zswapctl upgrade` does"
            " the same, and waits for the end. The SIGHUP of a closed terminal changes nothing."
        ),
    ),
    (
        "SIGTSTP, SIGQUIT, SIGUSR1 and others",
        (
            "These change nothing: job control does not stop zswapd, and a stray signal does not"
            " end it."
        ),
    ),
    (
        "SIGKILL",
        (
            "Sent to the worker, it makes the next worker take over, and no page is lost. Sent to"
            " the supervisor, it leaves the worker to serve alone until `zswapd run` starts"
            " again."
        ),
    ),
)
_FILES = (
    ("/etc/zswapd/zswapd.toml", "Settings; see zswapd.toml(5)."),
    (
        "/etc/zswapd/zswapd.toml.d/*.toml",
        (
            "Drop-ins with more settings, read in the order of their names; later ones win. A file"
            " whose name begins with a dot is ignored."
        ),
    ),
    ("/run/zswapd/zswapd.sock", "The control socket, unless `control.socket` names another."),
    ("/run/zswapd/mnt/swap", "The swap file; others beside it if `swap.files` names some."),
    ("/run/zswapd/mnt/stats/, /run/zswapd/mnt/params/", "Counters and settings, one file each."),
    ("/run/zswapd/mnt/cache/", "Cache volumes."),
)
_EXAMPLES = (
    ("zswapctl swapon", "Swap to the daemon's file, through a new loop device."),
    ("zswapctl set pool.limit=2G pool.compressor=lzo", "Change both settings, or neither."),
    ("zswapctl reset --all", "Give all settings their configured values again."),
    ("zswapctl status --json | jq .pool", "Print the pool's figures for a script."),
    (
        "zswapctl cache add films --backing /srv/films.img",
        "Show a slow file, read through the cache, as /run/zswapd/mnt/cache/films.",
    ),
)
_SOURCES = (
    "Settings come from four places: the defaults below, the config file, its drop-ins in the order"
    " of their names, and the options of `zswapd run`. Later ones win. `zswapd config check` says"
    " whether the settings are right. `zswapd config show` says where each comes from. `zswapd"
    " config defaults` prints a file to begin with. With an unknown key, a wrong type or a value"
    " out of range the daemon does not start; the error names file, line and what would be right."
)
_LIVE = (
    "Some settings can change while the daemon runs; their text says so. `zswapctl set` changes"
    " them, or a write to their file below params/. One command's changes are applied together or"
    " not at all. A value set at run time wins over the files until `zswapctl reset` or a stop of"
    " the daemon. Takeovers, upgrades and reloads keep it, and so does a start that adopts the swap"
    " of a dead daemon. `systemctl reload`, `zswapctl upgrade` and SIGHUP read the files again; if"
    " anything in them is not right, nothing changes."
)
_SIZES = (
    "A size is a number of bytes, or has a unit: K, M, G, T (each 1024 of the one before), or % of"
    " the machine's memory. min(50%, 4G) and max(...) choose among several sizes."
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
            "Ask the daemon over its control socket, which belongs to root. "
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
    for section, cls, rows in sections():
        lines += [f".SH [{section}]", _text((cls.__doc__ or "").partition(": ")[2], capital=True)]
        for row in rows:
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
    yield "Success."
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
    """Return running text as one line, with `code` in bold and a full stop at the end."""
    text = " ".join(text.split())
    text = (text[:1].upper() + text[1:] if capital else text) + (
        "" if text.endswith((".", "…")) else "."
    )
    return re.sub(r"`([^`]*)`", r"\\fB\1\\fR", _escape(text))


def _escape(text: str) -> str:
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("…", "...")
    return "\\&" + text if text[:1] in (".", "'") else text
