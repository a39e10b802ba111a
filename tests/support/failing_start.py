# SPDX-License-Identifier: GPL-2.0-or-later
"""A program that makes starts of a daemon fail, by an exception at each step in turn.

    python -m tests.support.failing_start DIRECTORY list
    python -m tests.support.failing_start DIRECTORY STEP=EXCEPTION...

A step is a function of zswapd that a start calls, in the supervisor or in its first worker. Its
form is module:function, or module:function@2 for its second call. The first command starts a
daemon, ends it when it serves, and prints the steps in their order, one on each line. The second
command prints a JSON object on each line: the step, the exit code, whether the daemon served, the
output, and the leftovers.

With SIGKILL in place of an exception, every process that comes to the step is killed.

One process imports all modules once, and forks for each start, which then takes 0.1 s.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from tests.support.roles import Roles
from zswapd.cli.zswapd import main
from zswapd.errors import ZswapdError
from zswapd.supervisor import supervisor
from zswapd.worker import worker

PR_SET_CHILD_SUBREAPER = 36
LIMIT_S = 30.0
EXCEPTIONS: dict[str, BaseException | None] = {
    "SIGKILL": None,
    "OSError": OSError(5, "Input/output error"),
    "MemoryError": MemoryError(),
    "KeyboardInterrupt": KeyboardInterrupt(),
    "ImportError": ImportError("no module"),
    "AssertionError": AssertionError(),
    "SystemExit": SystemExit(9),
    "RuntimeError": RuntimeError("a bug"),
    "ZswapdError": ZswapdError("a failure"),
}
_TOP = str(Path(worker.__file__).parents[1]) + "/"


def name_of(frame: FrameType) -> str | None:
    """Return the step that a frame belongs to, or None."""
    code = frame.f_code
    if not code.co_filename.startswith(_TOP) or code.co_name.startswith("<"):
        return None
    return f"{code.co_filename.removeprefix(_TOP)}:{code.co_qualname}"


class Steps:
    """A watch over the calls of a start, from `supervising.run` until a worker has served."""

    def __init__(
        self, fail_at: str = "", exception: BaseException | None = None, record: int = -1
    ) -> None:
        self._fail_at, _, call = fail_at.partition("@")
        self._call = int(call or 1)
        self._exception = exception
        self._record = record
        self._seen: Counter[str] = Counter()

    def begin(self) -> None:
        """Watch a call."""
        sys.setprofile(self._look)

    def _look(self, frame: FrameType, event: str, _argument: object) -> None:
        if event != "call":
            return
        name = name_of(frame)
        if name is None:
            return
        if name.endswith(("Supervisor._say_ready", "Supervisor.abandon", ":Resources.close")):
            sys.setprofile(None)
            return
        self._seen[name] += 1
        if self._record >= 0:
            os.write(self._record, f"{name}\n".encode())
        if name == self._fail_at and self._seen[name] == self._call:
            sys.setprofile(None)
            if self._exception is None:
                os.kill(os.getpid(), signal.SIGKILL)
            else:
                raise self._exception


def become_daemon(roles: Roles, steps: Steps) -> NoReturn:
    """Run the program in a forked process."""
    os.setsid()
    log = os.open(
        roles.directory / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600
    )
    for number in (1, 2):
        os.dup2(log, number)
    run = supervisor.run

    def watched(*arguments: Any) -> int:
        steps.begin()
        try:
            return run(*arguments)
        finally:
            sys.setprofile(None)

    sys.modules["zswapd.supervisor"].run = watched  # type: ignore[attr-defined]
    code = 1
    try:
        code = main(roles.command[roles.command.index("run") :])
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException as error:  # noqa: BLE001 - as the interpreter does at its end
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        os._exit(code)


def start(roles: Roles, steps: Steps) -> dict[str, object]:
    """Start a daemon, wait until it serves or has ended, end it, and return the result."""
    pid = os.fork()
    if not pid:
        become_daemon(roles, steps)
    status: int | None = None
    serves = False
    end = time.monotonic() + LIMIT_S
    while status is None and time.monotonic() < end:
        found, code = os.waitpid(pid, os.WNOHANG)
        if found:
            status = os.waitstatus_to_exitcode(code)
        elif not serves and "ready: serving" in (roles.directory / "log").read_text():
            serves = True
            os.kill(pid, signal.SIGTERM)
        else:
            time.sleep(0.01)
    if status is None:
        roles.kill()
        os.waitpid(pid, 0)
    left = roles.leftovers() + [f"process {child}" for child in _children()]
    roles.kill()
    for path in ("s.sock", "s.sock.lock"):
        (roles.directory / path).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        roles.mountpoint.rmdir()
    output = (roles.directory / "log").read_text()
    return {
        "code": "hangs" if status is None else status,
        "serves": serves,
        "output": output,
        "left": left,
    }


def _children() -> list[int]:
    """Reap the orphans of this process, and return the living ones."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def run(directory: Path, words: list[str]) -> None:
    """Run the command of the command line."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    roles = Roles(directory, service__spare="false")
    (directory / "log").touch()
    if words == ["list"]:
        record = os.open(directory / "steps", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        start(roles, Steps(record=record))
        sys.stdout.write((directory / "steps").read_text())
        return
    for word in words:
        step, _, exception = word.partition("=")
        (directory / "log").write_text("")
        outcome = start(roles, Steps(step, EXCEPTIONS[exception]))
        print(json.dumps({"step": step, "exception": exception, **outcome}), flush=True)


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2:])
