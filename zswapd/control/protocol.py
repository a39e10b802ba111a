# SPDX-License-Identifier: GPL-2.0-or-later
"""The messages of the control socket, as pure functions.

A message is a JSON object on one line, with the version of the protocol.

    → {"v": 1, "cmd": "get", "args": {"keys": ["pool.compressor"]}}
    ← {"v": 1, "progress": {…}}                        any number of these, or none
    ← {"v": 1, "ok": true, "result": {…}}
    ← {"v": 1, "ok": false, "error": {"message": "…", "hint": "…", "code": 69}}

`code` is the exit code for a command line. A client may send its next request on the same
connection after it has the result. COMMANDS is the table of commands and their arguments. The
server checks a request with it before a handler gets the request.

Invariants: any text can arrive on the socket. All its faults raise a ControlError and no other
exception. A message longer than MAX_REQUEST is not parsed.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, NotRequired, TypedDict

from zswapd.errors import OLD_EXIT_CODES, ControlError, ZswapdError
from zswapd.host.hints import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Mapping

VERSION = 1
"""Version of the protocol. Both sides refuse other versions."""
MAX_REQUEST = 64 << 10
"""Length of the longest request in bytes, including the newline."""
MAX_REPLY = 16 << 20
"""Length of the longest reply that a client reads, in bytes."""

INTERNAL_ERROR = 70
"""The error code of a bug."""


class Argument(NamedTuple):
    """One argument of a command."""

    name: str
    kind: str
    """The type of the value.

    `name` is a string, `names` a list of strings, `settings` an object of strings, numbers and
    booleans, `count` a whole number from 0 up, and `flag` true or false.
    """
    help: str
    is_needed: bool = False


_FILE = Argument("name", "name", "the name of a swap file", is_needed=True)
_SIZE = Argument("size", "name", "the size of a swap file, as a setting has it", is_needed=True)
_VOLUME = Argument("name", "name", "the name of a cache volume", is_needed=True)

COMMANDS: Mapping[str, tuple[Argument, ...]] = {
    "status": (),
    "stats": (),
    "get": (Argument("keys", "names", "full names of settings; none for all"),),
    "set": (Argument("settings", "settings", "new values by full name", is_needed=True),),
    "reset": (Argument("keys", "names", "full names of settings; none for all changed settings"),),
    "freeze": (),
    "thaw": (),
    "compact": (),
    "pages": (Argument("file", "name", "the name of a swap file; none for all"),),
    "duplicates": (Argument("file", "name", "the name of a swap file; none for all"),),
    "writeback": (
        Argument("pages", "count", "limit of the pages to send"),
        Argument("idle", "flag", "send no pages, only mark all pages as unused"),
        Argument("incompressible", "flag", "send only pages that are stored uncompressed"),
        Argument("unused", "count", "send only pages that were unused for this time in seconds"),
    ),
    "recompress": (),
    "files-add": (
        _FILE,
        _SIZE,
        Argument("settings", "settings", "further settings of the file by key"),
    ),
    "files-remove": (_FILE,),
    "files-resize": (_FILE, _SIZE),
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
"""The commands with their arguments."""


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
    object_bytes: NotRequired[int]
    """Bytes that the stored pages take in the pool; an older daemon does not send it."""
    disk_pages: NotRequired[int]
    """Pages that are only on the disk behind the pool."""
    hits: NotRequired[int]
    """Pages that were read from the pool."""
    disk_reads: NotRequired[int]
    """Pages that were read from the disk."""
    limit_bytes: NotRequired[int]
    """Limit of `object_bytes`; 0 for no limit."""
    limit_hits: NotRequired[int]
    """Pages that were refused because of that limit."""
    weight: NotRequired[int]
    """Weight of the file against the others."""


class VolumeReport(TypedDict):
    """One cache volume."""

    name: str
    path: str
    """Path of its backing file."""
    mode: str
    size: int
    """Size in bytes."""
    problem: str | None
    """The reason if it cannot be read, otherwise None."""


class PoolReport(TypedDict):
    """The pool: its pages and its memory; all sizes in bytes."""

    compressor: str
    stored_pages: int
    """Stored pages, including same-filled pages."""
    same_filled_pages: int
    incompressible_pages: int
    """Pages that are stored uncompressed."""
    compressed_bytes: int
    """Size of the stored objects, including headers."""
    frames: int
    """Page frames that hold objects."""
    ratio: float | None
    """Size of the stored pages divided by the memory of the frames; None without frames."""
    reserve_bytes: int
    """Populated memory that is free for new pages."""
    limit_bytes: int
    """Limit of the memory of `frames`."""
    refused: dict[str, int]
    """Refused stores, by reason."""


class BackingReport(TypedDict):
    """The disk behind the pool."""

    path: str
    pages: int
    """Pages that are only on the disk."""
    encrypted: bool
    trouble: str
    """The reason if the disk takes no pages now, otherwise empty."""
    budget_left: int | None
    """Bytes that writeback may still write today; None for no limit."""


class CacheReport(TypedDict):
    """All cache volumes together."""

    volumes: int
    pages: int
    """Pages in the cache."""
    frames: int
    """Page frames that hold the pages."""
    limit_bytes: int
    """Present limit of the memory of `frames`; less than the setting after a lack of memory."""
    hit_ratio: float | None
    """Share of hits among reads that the page cache did not answer; None before the first read."""
    frozen: bool


class WorkerReport(TypedDict):
    """The worker that serves, and the workers before it."""

    pid: int
    number: int
    """Number of the worker, 1 for the first."""
    deaths: int
    """Workers before it that ended without being told to."""
    takeover_s: float
    """Time in seconds that it needed to rebuild the index and serve; 0 for the first."""
    supervised: bool
    """True if the supervisor would start another worker; False if the supervisor is dead."""
    poisoned_requests: int
    """Requests answered with EIO because they killed one worker after another."""


class LimitReport(TypedDict):
    """The memory cgroup above the daemon that leaves the least room, in bytes."""

    limit_bytes: int
    left_bytes: int
    """Bytes that may still be charged to it.

    The kernel drops files in the page cache when little is left. They then do not count.
    """
    file: str
    """Path of the file with the limit."""


class CostReport(TypedDict):
    """The memory of the daemon in bytes, by part, as in `CostStatistics`."""

    supervisor_bytes: int
    worker_bytes: int
    spare_bytes: int
    code_bytes: int
    index_bytes: int
    state_bytes: int
    ready_bytes: int
    beside_pool_bytes: int
    effective_ratio: float


class StatusReport(TypedDict):
    """The result of `status`."""

    version: str
    pid: int
    """Process id of the supervisor. It does not change; that of the worker does."""
    worker: WorkerReport
    uptime_s: float
    state: str
    """`serving`, `frozen` or `stopping`."""
    mountpoint: str
    page_size: int
    discard: bool
    """Always True: the kernel's discards arrive."""
    pool: PoolReport
    cost: CostReport
    backing: BackingReport | None
    """None without a disk."""
    cache: CacheReport | None
    """None if the settings say that there is no cache."""
    memory_limit: LimitReport | None
    """None if no limit is lower than the machine's memory."""
    files: list[FileReport]
    protections: list[ProtectionReport]
    advice: list[ProtectionReport]


class Request(NamedTuple):
    """A valid request."""

    command: str
    arguments: dict[str, Any]


class Progress(NamedTuple):
    """A report of progress of a command."""

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
        commands: the commands with their arguments.

    Raises:
        ControlError: the line is not a request, the command or an argument is unknown, or an
            argument is missing or has the wrong type.
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
        ZswapdError: the reply is an error. Its class is the one with the exit code of the reply.
        ControlError: the line is not a reply.
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
        _refuse("the daemon's reply is invalid", "use the zswapctl that came with this zswapd")
    hint = error.get("hint")
    raise _error_class(error.get("code"))(
        error["message"], hint=hint if isinstance(hint, str) else None
    )


def _encode(message: Mapping[str, object]) -> bytes:
    return json.dumps(message, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def _decode(line: bytes, what: str) -> dict[str, Any]:
    try:
        message = json.loads(line, parse_constant=_no_constant)
    # ValueError: the text is not JSON or not UTF-8, or a number has too many digits.
    except (ValueError, RecursionError):
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
