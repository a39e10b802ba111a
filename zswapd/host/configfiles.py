# SPDX-License-Identifier: GPL-2.0-or-later
"""Find and read the config files, without the table of settings.

They are the config file and its drop-ins `<file>.d/*.toml`, in alphabetical order. Later files win.
Files that editors and package managers leave are no drop-ins. Their names begin with a dot
(`.#x.toml` of Emacs, `.x.toml.swp` of Vim, `.goutputstream-…`) or do not end in `.toml`
(`x.toml~`, `#x.toml#`, `x.toml.bak`, `x.toml.dpkg-new`, `x.toml.rpmsave`).

Every other name `*.toml` must be readable. A directory, a dangling link and a pipe (an open would
wait for its writer) are errors. A link to /dev/null is an empty file, as for systemd. The file of
--config may also be an open pipe: /dev/stdin, or `<(…)` of a shell.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import os
import re
import shlex
import stat
from pathlib import Path
from typing import Any

from zswapd.errors import ConfigError
from zswapd.host.hints import for_failure

DEFAULT_FILE = Path("etc/zswapd/zswapd.toml")
"""The config file below the root directory."""
LARGEST_FILE = 64 << 10
"""Bytes. It bounds the time of tomllib, which grows with the square of the number of parts of a
dotted key.
"""

_NULL_DEVICE = os.makedev(1, 3)
_ABSENT = (errno.ENOENT, errno.ENOTDIR)
# The longer marks come first, because a mark of UTF-32 may begin with that of UTF-16.
_OTHER_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_SOCKET_LINE = r"""\s*(?:control\s*\.\s*)?socket\s*=\s*(["'])([^"'\\]+)\1"""
_DOTTED_SOCKET_LINE = r"\s*control\s*\."
_HEADER_LINE = r"\s*\[\s*([^\]]*?)\s*\]"
"""Patterns for re.match, compiled at their use: few commands need them."""


def config_files(file: Path | None = None, root: Path = Path("/")) -> list[Path]:
    """Return the files that settings are read from, in order: the config file, and its drop-ins.

    Args:
        file: a config file in place of the default one; it must exist, the default one need not.
        root: where /etc is, for tests.

    Raises:
        ConfigError: the kernel does not say whether there are any.
    """
    main = file or root / DEFAULT_FILE
    directory = main.with_name(main.name + ".d")
    names = sorted(
        name for name in _list(directory) if name.endswith(".toml") and not name.startswith(".")
    )
    return [
        *([main] if file is not None or _is_there(main) else []),
        *(directory / name for name in names),
    ]


def _list(directory: Path) -> list[str]:
    try:
        return [path.name for path in directory.iterdir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _cannot_read(directory, error, is_chosen=False) from error


def _is_there(path: Path) -> bool:
    try:
        path.lstat()
    except OSError as error:
        if error.errno in _ABSENT:
            return False
        raise _cannot_read(path, error, is_chosen=False) from error
    return True


def _cannot_read(path: Path, error: OSError, *, is_chosen: bool) -> ConfigError:
    if error.errno in _ABSENT and path.is_symlink():
        target = path.readlink()
        return ConfigError(
            f"{path} is a link to {target}, which does not exist", hint=f"remove it: rm {path}"
        )
    otherwise = "name an existing, readable file with --config"
    if not is_chosen:
        otherwise = f"`rm {shlex.quote(str(path))}`, if nothing needs it"
    return ConfigError(
        f"cannot read {path}: {error.strerror}", hint=for_failure(error, path, otherwise)
    )


def read_text(path: Path, *, is_chosen: bool = False) -> str:
    """Return the text of a config file, without carriage returns and byte order mark.

    Args:
        path: the file.
        is_chosen: --config names it.

    Raises:
        ConfigError: the file cannot be read, is too long, or is no text.
    """
    try:
        data = _read(path, is_chosen=is_chosen)
    except OSError as error:
        raise _cannot_read(path, error, is_chosen=is_chosen) from error
    if len(data) > LARGEST_FILE:
        raise ConfigError(
            f"{path} is longer than {LARGEST_FILE >> 10} KiB", hint="is it a config file?"
        )
    text = _decode(path, data)
    text = text.replace("\r\n", "\n")
    # without a line feed, carriage returns end the lines, as on an old Macintosh
    return text if "\n" in text else text.replace("\r", "\n")


def _read(path: Path, *, is_chosen: bool) -> bytes:
    """Return the bytes of a file, at most LARGEST_FILE + 1.

    Raises:
        OSError: the file cannot be read.
        ConfigError: it is no file but, for example, a directory.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:  # noqa: PTH123 - a descriptor
        status = os.fstat(descriptor)
        if stat.S_ISCHR(status.st_mode) and status.st_rdev == _NULL_DEVICE:
            return b""
        is_open_pipe = is_chosen and stat.S_ISFIFO(status.st_mode) and not path.resolve().is_fifo()
        if not stat.S_ISREG(status.st_mode) and not is_open_pipe:
            kind = _KINDS.get(stat.S_IFMT(status.st_mode), "no file")
            raise ConfigError(
                f"{path} is {kind}, not a file with settings",
                hint=f"move it away: mv {path} {path}.bak",
            )
        os.set_blocking(descriptor, True)
        return file.read(LARGEST_FILE + 1)


def _decode(path: Path, data: bytes) -> str:
    for mark, name in _OTHER_MARKS:
        if data.startswith(mark):
            raise ConfigError(
                f"{path} is {name}, not UTF-8", hint=f"convert it: iconv -f {name} -t UTF-8 {path}"
            )
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(path, data, error) from error
    place = text.find("\0")
    if place >= 0:
        hint = (
            f"convert it: iconv -f UTF-16LE -t UTF-8 {path}"
            if text.count("\0") > len(text) // 4
            else "remove it"
        )
        raise ConfigError(
            f"{position(path, text, place)}: there is a NUL character (U+0000)", hint=hint
        )
    return text


def _not_utf8(path: Path, data: bytes, error: UnicodeDecodeError) -> ConfigError:
    import unicodedata

    byte = data[error.start : error.start + 1]
    before = data[: error.start].decode()
    character = byte.decode("latin-1")
    name = unicodedata.name(character, "a control character")
    return ConfigError(
        f"{position(path, before, len(before))}: the byte 0x{byte.hex().upper()} is not UTF-8; "
        f"in Latin-1 it would be U+{ord(character):04X} {name}",
        hint=f"save the file as UTF-8: iconv -f LATIN1 -t UTF-8 {path}",
    )


def position(path: Path, text: str, place: int) -> str:
    """Return where a character stands, as `path:line, column N`.

    Args:
        path: the file.
        text: its text.
        place: index of the character.
    """
    line_begin = text.rfind("\n", 0, place) + 1
    return f"{path}:{text.count(chr(10), 0, place) + 1}, column {place - line_begin + 1}"


def configured_socket(root: Path = Path("/")) -> Path | None:
    """Return the value of `control.socket` in the config files; None if no file sets it.

    It is for programs that look for the daemon. A file that cannot be read, or is wrong in another
    place, is no error here: the running daemon has read the files in an earlier state.

    Args:
        root: where /etc is, for tests.
    """
    found = None
    with contextlib.suppress(ConfigError):
        for path in config_files(root=root):
            with contextlib.suppress(ConfigError):
                text = read_text(path)
                if "socket" in text and (value := _socket_in(text)):
                    found = Path(value)
    return found


def _socket_in(text: str) -> str | None:
    import tomllib  # its import takes as long as all others here, and most machines do not need it

    try:
        document: dict[str, Any] = tomllib.loads(text)
        section = document.get("control")
        value = section.get("socket") if isinstance(section, dict) else None
    except (tomllib.TOMLDecodeError, RecursionError):
        value = _socket_in_lines(text)
    return value if isinstance(value, str) and value.startswith("/") else None


def _socket_in_lines(text: str) -> str | None:
    """Return the probable value of the setting in a text that is no TOML."""
    section, value = "", None
    for line in text.split("\n"):
        if header := re.match(_HEADER_LINE, line):
            section = header[1]
        elif (found := re.match(_SOCKET_LINE, line)) and section == (
            "" if re.match(_DOTTED_SOCKET_LINE, line) else "control"
        ):
            value = found[2]
    return value
