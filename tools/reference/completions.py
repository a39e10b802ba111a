# SPDX-License-Identifier: GPL-2.0-or-later
"""The completions of both programs for bash and zsh, written by shtab.

They complete names of settings and of files too.
"""

# ruff: noqa: SLF001 - argparse has no public way to its actions

from __future__ import annotations

import argparse

import shtab

from zswapd.config import SETTINGS, reloadable_names

_FILES = {"config", "socket", "backing"}
_NO_BLANK = "  compopt -o nospace 2>/dev/null\n"  # a name that ends in = is not complete
_DIRECTORIES = {"mountpoint"}


def bash(parser: argparse.ArgumentParser) -> str:
    """Return a script for /usr/share/bash-completion/completions."""
    return _complete(parser, "bash")


def zsh(parser: argparse.ArgumentParser) -> str:
    """Return a script for a directory of zsh's fpath."""
    return _complete(parser, "zsh")


def _complete(parser: argparse.ArgumentParser, shell: str) -> str:
    _mark(parser)
    words = {"bash": _bash_words, "zsh": _zsh_words}[shell]
    return shtab.complete(parser, shell=shell, preamble=words())


def _mark(parser: argparse.ArgumentParser, *, live: bool = False) -> None:
    """Mark each argument with the function that completes it.

    Args:
        parser: the parser of one command or of several.
        live: complete only the keys of settings that can change at run time.
    """
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                _mark(sub, live=name == "reset")
        elif action.dest in _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined] # shtab's way
        elif action.dest in _DIRECTORIES:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        elif action.dest == "key":
            keys = "_zswapd_live_keys" if live else "_zswapd_keys"
            action.complete = {"bash": keys, "zsh": keys}  # type: ignore[attr-defined]
        elif action.dest == "set":
            action.complete = {"bash": "_zswapd_all", "zsh": "_zswapd_all"}  # type: ignore[attr-defined]
        elif action.dest == "assignment":
            action.complete = {"bash": "_zswapd_live", "zsh": "_zswapd_live"}  # type: ignore[attr-defined]


def _word_lists() -> dict[str, list[str]]:
    return {
        "_zswapd_keys": list(SETTINGS),
        "_zswapd_live_keys": reloadable_names(),
        "_zswapd_all": [f"{name}=" for name in SETTINGS],
        "_zswapd_live": [f"{name}=" for name in reloadable_names()],
    }


def _bash_words() -> str:
    functions = [
        f'{name}() {{\n{_NO_BLANK if words[0][-1] == "=" else ""}  compgen -W "{" ".join(words)}"'
        ' -- "$1"\n}'
        for name, words in _word_lists().items()
    ]
    return "\n".join(functions)


def _zsh_words() -> str:
    return "\n".join(
        f"{name}() {{\n  compadd -S '' -- {' '.join(words)}\n}}"
        for name, words in _word_lists().items()
    )
