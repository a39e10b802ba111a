# SPDX-License-Identifier: GPL-2.0-or-later
"""Messages on the control socket, as pure functions.

JSON objects, one a line, each with the protocol's version.

    → {"v": 1, "cmd": "get", "args": {"keys": ["pool.compressor"]}}
    ← {"v": 1, "progress": {…}}                        any number of these, or none
    ← {"v": 1, "ok": true, "result": {…}}
    ← {"v": 1, "ok": false, "error": {"message": "…", "hint": "…", "code": 69}}

`code` is the exit code that a command line should end with. A client may send its next request on
the same connection when it has its result. COMMANDS is the one table of commands and their
arguments: the server checks requests against it before a handler sees them. What arrives comes from
strangers; whatever is wrong with it ends as a ControlError, never as another exception, and a
message above MAX_REQUEST is not even parsed.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypedDict

from zswapd.errors import OLD_EXIT_CODES, ControlError, ZswapdError
from zswapd.host.hints import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Mapping

VERSION = 1
"""Version of the protocol; both sides refuse another one."""
MAX_REQUEST = 64 << 10
"""Bytes of the longest request, newline included."""
MAX_REPLY = 16 << 20
"""Bytes of the longest reply that a client reads."""

INTERNAL_ERROR = 70
"""The error code of a bug."""


class Argument(NamedTuple):
    """One argument of a command."""

    name: str
    kind: str
    """`name`: a string; `names`: a list of strings.

    `settings`: an object of strings, numbers and booleans; `count`: a whole number from 0 up;
    `flag`: true or false.
    """
    help: str
    is_needed: bool = False


_VOLUME = Argument("name", "name", "the name of a cache volume", is_needed=True)

COMMANDS: Mapping[str, tuple[Argument, ...]] = {
    "status": (),
    "stats": (),
    "get": (Argument("keys", "names", "full names of settings; none for all"),),
    "set": (Argument("settings", "settings", "new values by full name", is_needed=True),),
    "reset": (
        Argument(
            "keys", "names", "full names of settings; none for all that were changed at run time"
        ),
    ),
    "freeze": (),
    "thaw": (),
    "compact": (),
    "pages": (Argument("file", "name", "the name of a swap file; none for all"),),
    "writeback": (
        Argument("pages", "count", "send at most so many"),
        Argument("idle", "flag", "send none, only mark all pages as unused"),
        Argument("incompressible", "flag", "send only such as are stored as they are"),
        Argument("unused", "count", "send only such as were not used for so many seconds"),
    ),
    "recompress": (),
    "cache-add": (
        _VOLUME,
        Argument("path", "name", "absolute path of the backing file", is_needed=True),
        Argument("mode", "name", "ro or writethrough"),
    ),
    "cache-list": (),
    "cache-remove": (_VOLUME,),
    "cache-invalidate": (_VOLUME,),
    "cache-resize": (_VOLUME,),
    "cache-freeze": (),
    "cache-thaw": (),
    "shrink": (Argument("frames", "count", "page frames to take from the cache", is_needed=True),),
    "upgrade": (),
    "inherit": (),
}
"""Every command with its arguments, optional but for those that are needed."""


class ProtectionReport(TypedDict):
    """One protection or recommended setting."""

    name: str
    on: bool
    detail: str
    hint: str | None


class FileReport(TypedDict):
    """One swap file, in bytes and pages."""

    name: str
    size: int
    stored_pages: int


class VolumeReport(TypedDict):
    """One cache volume."""

    name: str
    path: str
    """Of its backing file."""
    mode: str
    size: int
    """Bytes."""
    problem: str | None
    """Why it cannot be read."""


class PoolReport(TypedDict):
    """What the files hold and what that costs; all sizes in bytes."""

    compressor: str
    stored_pages: int
    """Pages that can be read back, same-filled ones included."""
    same_filled_pages: int
    incompressible_pages: int
    """Stored as they are."""
    compressed_bytes: int
    """Of the stored objects, headers included."""
    frames: int
    """Page frames that hold objects."""
    ratio: float | None
    """Of what is stored to those frames' memory; None while there are none."""
    reserve_bytes: int
    """Populated memory that is free for new pages."""
    limit_bytes: int
    """What `frames` may come to."""
    refused: dict[str, int]
    """Refused stores by reason."""


class BackingReport(TypedDict):
    """The disk behind the pool."""

    path: str
    pages: int
    """That are there and nowhere else."""
    encrypted: bool
    trouble: str
    """Why it takes nothing for now; empty if all is well."""
    budget_left: int | None
    """Bytes that writeback may still write today; None for no limit."""


class CacheReport(TypedDict):
    """All cache volumes together."""

    volumes: int
    pages: int
    """That are kept."""
    frames: int
    """Page frames that hold them."""
    limit_bytes: int
    """What `frames` may come to now; less than the setting after a shortage of memory."""
    hit_ratio: float | None
    """Of reads that the kernel's page cache did not answer; None before the first."""
    frozen: bool


class WorkerReport(TypedDict):
    """The process that serves, and those before it."""

    pid: int
    number: int
    """1 for the first."""
    deaths: int
    """How many before it ended without being told to."""
    takeover_s: float
    """What this one took to rebuild the index and serve; 0 for the first."""
    supervised: bool
    """Whether another would follow it; False if the supervisor is dead."""
    poisoned_requests: int
    """Requests answered with EIO because they killed one worker after the other."""


class LimitReport(TypedDict):
    """The limit of a memory cgroup above the daemon, in bytes.

    Of several, that which leaves least.
    """

    limit_bytes: int
    left_bytes: int
    """What may still be charged to it; files in the page cache, which are dropped for us,
    do not count where little is left.
    """
    file: str
    """Where it is set."""


class StatusReport(TypedDict):
    """The result of `status`."""

    version: str
    pid: int
    """Of the supervisor, which stays the same; the worker's changes."""
    worker: WorkerReport
    uptime_s: float
    state: str
    """`serving`, `frozen` or `stopping`."""
    mountpoint: str
    page_size: int
    discard: bool
    """Whether the kernel's discards arrive (False without the hook)."""
    pool: PoolReport
    backing: BackingReport | None
    """None without one."""
    cache: CacheReport | None
    """None if the settings say that there is no cache."""
    memory_limit: LimitReport | None
    """None where no limit is lower than the machine's memory."""
    files: list[FileReport]
    protections: list[ProtectionReport]
    advice: list[ProtectionReport]


class Request(NamedTuple):
    """A valid request."""

    command: str
    arguments: dict[str, Any]


class Progress(NamedTuple):
    """News from a command that takes long."""

    value: object


class Result(NamedTuple):
    """The end of a command that worked."""

    value: object


def encode_request(command: str, arguments: Mapping[str, object]) -> bytes:
    """Return the line that asks for a command."""
    return _encode({"v": VERSION, "cmd": command, "args": dict(arguments)})


def encode_progress(value: object) -> bytes:
    """Return a line of progress."""
    return _encode({"v": VERSION, "progress": value})


def encode_result(value: object) -> bytes:
    """Return the line that ends a command well."""
    return _encode({"v": VERSION, "ok": True, "result": value})


def encode_error(message: str, hint: str | None, code: int) -> bytes:
    """Return the line that ends a command badly."""
    return _encode(
        {"v": VERSION, "ok": False, "error": {"message": message, "hint": hint, "code": code}}
    )


def decode_request(line: bytes, commands: Mapping[str, tuple[Argument, ...]] = COMMANDS) -> Request:
    """Parse and check a request.

    Args:
        line: one line, with or without its newline.
        commands: the commands that exist.

    Raises:
        ControlError: the line is no request, or the command or an argument is unknown or has the
            wrong type.
    """
    message = _decode(line, "request")
    unknown = set(message) - {"v", "cmd", "args"}
    command, arguments = message.get("cmd"), message.get("args", {})
    if unknown or not isinstance(command, str) or not isinstance(arguments, dict):
        _refuse("the request is no command", 'send {"v": 1, "cmd": NAME, "args": {…}}')
    if command not in commands:
        meant = did_you_mean(command[:40], commands, f"commands are: {', '.join(commands)}")
        _refuse(f"unknown command {command[:40]!r}", meant)
    known = {argument.name: argument for argument in commands[command]}
    for name, value in arguments.items():
        if name not in known:
            _refuse(
                f"{command} has no argument {name[:40]!r}",
                f"its arguments are: {', '.join(known) or 'none'}",
            )
        if not _fits(value, known[name].kind):
            _refuse(
                f"argument {name} of {command} has the wrong type", f"it is: {known[name].help}"
            )
    for argument in commands[command]:
        if argument.is_needed and argument.name not in arguments:
            _refuse(f"{command} needs the argument {argument.name}", f"it is: {argument.help}")
    return Request(command, arguments)


def decode_reply(line: bytes) -> Progress | Result:
    """Parse a reply.

    Raises:
        ZswapdError: the reply is an error; of the class that has its code, so that the exit code
            comes through.
        ControlError: the line is no reply.
    """
    message = _decode(line, "reply")
    if "progress" in message:
        return Progress(message["progress"])
    if message.get("ok") is True:
        return Result(message.get("result"))
    error = message.get("error")
    if (
        message.get("ok") is not False
        or not isinstance(error, dict)
        or not isinstance(error.get("message"), str)
    ):
        _refuse("the daemon's reply makes no sense", "use the zswapctl that came with this zswapd")
    hint = error.get("hint")
    raise _error_class(error.get("code"))(
        error["message"], hint=hint if isinstance(hint, str) else None
    )


def _encode(message: Mapping[str, object]) -> bytes:
    return json.dumps(message, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def _decode(line: bytes, what: str) -> dict[str, Any]:
    try:
        message = json.loads(line, parse_constant=_no_constant)
    except (
        ValueError,
        RecursionError,
    ):  # ValueError covers JSON, UTF-8 and numbers of thousands of digits
        _refuse(f"the {what} is not JSON", "send one JSON object a line, in UTF-8")
    if not isinstance(message, dict):
        _refuse(f"the {what} is not a JSON object", "send one JSON object a line, in UTF-8")
    version = message.get("v")
    if type(version) is not int or version != VERSION:
        _refuse(
            f"the {what} has protocol version {version!r:.20}, not {VERSION}",
            "use the zswapctl that came with this zswapd",
        )
    return message


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _fits(value: object, kind: str) -> bool:
    if kind == "name":
        return isinstance(value, str)
    if kind == "names":
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if kind == "flag":
        return isinstance(value, bool)
    if kind == "count":
        return type(value) is int and 0 <= value < 1 << 62
    return isinstance(value, dict) and all(
        isinstance(item, str | int | float | bool) for item in value.values()
    )


def _error_class(code: object) -> type[ZswapdError]:
    classes: list[type[ZswapdError]] = [ZswapdError]
    found: dict[int, type[ZswapdError]] = {}
    while classes:
        cls = classes.pop()
        found[cls.exit_code] = cls
        classes += cls.__subclasses__()
    found |= OLD_EXIT_CODES
    return found.get(code, ControlError) if isinstance(code, int) else ControlError


def _refuse(message: str, hint: str) -> NoReturn:
    raise ControlError(message, hint=hint)
