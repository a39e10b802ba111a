# SPDX-License-Identifier: GPL-2.0-or-later
"""A browser with more tabs than memory: headless Chromium, with all tabs looked at in turn.

Each tab is a local page with text, an object graph and the pixels of a picture. For a look, the
page walks through all of these and returns a sum, which has to equal that of the first look. The
program talks to the browser through its debugging pipe: JSON, ended by zeros, on descriptors 3 and
4.

The browser is Debian's chromium-headless-shell, or chromium.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tools.bench.applications.base import (
    Application,
    Column,
    Level,
    TooSlowError,
    in_cgroup,
    running,
)
from tools.bench.harness.system import HarnessError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PROGRAMS = ("chromium-headless-shell", "chromium", "google-chrome")
LOOKS = 3
PAGE = """<!doctype html><title>tab</title><body><script>
let seed = SEED;
const random = () => (seed = (seed * 1103515245 + 12345) % 2147483648) / 2147483648;
const words = Array.from({length: 4096}, () => Math.floor(random() * 1e9).toString(36));
const line = () => Array.from({length: 12}, () => words[Math.floor(random() * 4096)]).join(" ");
const text = Array.from({length: 24000}, line);
const node = (_, n) => ({id: n, next: null, label: words[n % 4096], weight: random()});
const graph = Array.from({length: 60000}, node);
graph.forEach((one) => { one.next = graph[Math.floor(random() * graph.length)]; });
const pixels = new Uint8ClampedArray(1024 * 768 * 4).map((_, n) => (n >> 5) ^ (n >> 13));
for (let n = 0; n < 800; n++) {
  const p = document.createElement("p");
  p.textContent = text[n];
  document.body.append(p);
}
function look() {
  let sum = document.body.textContent.length;
  for (const one of text)
    for (let n = 0; n < one.length; n += 8) sum = (sum * 31 + one.charCodeAt(n)) >>> 0;
  for (const one of graph) sum = (sum * 31 + one.next.id) >>> 0;
  for (let n = 0; n < pixels.length; n += 64) sum = (sum * 31 + pixels[n]) >>> 0;
  return sum;
}
</script>"""


class Tabs(Application):
    """Chromium with N tabs, each looked at in turn."""

    name: ClassVar[str] = "tabs"
    levels: ClassVar[Sequence[Level]] = (
        Level("8 tabs, no limit", 8, None),
        Level("8 tabs", 8, 256),
        Level("16 tabs", 16, 256),
    )
    short: ClassVar[Sequence[Level]] = (Level("2 tabs", 2, 96),)
    columns: ClassVar[Mapping[str, Column]] = {
        "median": Column("look, median ms"),
        "worst": Column("worst ms"),
        "open": Column("open all s"),
    }

    def __init__(self) -> None:
        self._program = next((found for name in PROGRAMS if (found := shutil.which(name))), "")

    def missing(self) -> str:
        """Return why there is no browser, or an empty string."""
        return (
            ""
            if self._program
            else f"none of {', '.join(PROGRAMS)} is installed (apt-get install {PROGRAMS[0]})"
        )

    def prepare(self, *, quick: bool) -> None:
        """Start the browser once, so that its program is in the page cache."""
        self.run(Level("", 1, None), None, 60.0)

    def run(self, level: Level, cgroup: Path | None, limit: float) -> Mapping[str, float]:
        """Open `level.amount` tabs, then look at each of them `LOOKS` times, in turn."""
        directory = Path(tempfile.mkdtemp(prefix="zbench-tabs-"))
        requests, answers = os.pipe(), os.pipe()
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-dev-shm-usage",
        ]
        flags += ["--remote-debugging-pipe", f"--user-data-dir={directory}"]
        command = in_cgroup(cgroup, [self._program, *flags, "about:blank"])
        # bash turns the pipes into descriptors 3 and 4, which may be taken in this process. sh does
        # not do it: it takes one digit only. requests[0] is the lowest free descriptor, so
        # answers[1] is never 3.
        command = [
            "bash",
            "-c",
            f'exec 3<&{requests[0]} 4>&{answers[1]}; exec "$@"',
            "bash",
            *command,
        ]
        theirs = (requests[0], answers[1])
        try:
            with (
                (directory / "log").open("wb") as log,
                running(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=theirs),
            ):
                for descriptor in theirs:
                    os.close(descriptor)  # so that the pipe ends with the browser
                return _look(
                    _Browser(requests[1], answers[0], time.monotonic() + limit, limit),
                    level,
                    directory,
                )
        finally:
            for descriptor in (requests[1], answers[0]):
                os.close(descriptor)
            shutil.rmtree(directory, ignore_errors=True)  # a helper process may still write into it


class _Browser:
    """The browser's debugging pipe."""

    def __init__(self, requests: int, answers: int, end: float, limit: float) -> None:
        self._requests, self._answers = requests, answers
        self._poll = select.poll()
        self._poll.register(answers, select.POLLIN)
        self._end, self._limit = end, limit
        self._number = 0
        self._unread = b""

    def ask(self, method: str, session: str = "", **parameters: Any) -> dict[str, Any]:
        """Send a request and return its result; events meanwhile are dropped."""
        self._number += 1
        request = {"id": self._number, "method": method, "params": parameters}
        if session:
            request["sessionId"] = session
        os.write(self._requests, json.dumps(request).encode() + b"\0")
        while True:
            answer = json.loads(self._message())
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise HarnessError(f"the browser refuses {method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result

    def _message(self) -> bytes:
        while b"\0" not in self._unread:
            left = self._end - time.monotonic()
            if left <= 0 or not self._poll.poll(left * 1000):
                raise TooSlowError(self._limit, {})
            more = os.read(self._answers, 1 << 16)
            if not more:
                raise HarnessError("the browser has ended")
            self._unread += more
        message, _, self._unread = self._unread.partition(b"\0")
        return message

    def open(self, address: str) -> str:
        """Open a tab and return its session."""
        target = self.ask("Target.createTarget", url=address)["targetId"]
        session: str = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        return session

    def look(self, session: str) -> int:
        """Have a tab walk through its data; return the sum."""
        while True:
            result = self.ask(
                "Runtime.evaluate", session, expression="typeof look == 'function' && look()"
            )["result"]
            if isinstance(result.get("value"), int) and not isinstance(result["value"], bool):
                return int(result["value"])
            time.sleep(0.01)  # the page is not loaded yet


def _look(browser: _Browser, level: Level, directory: Path) -> dict[str, float]:
    started = time.monotonic()
    sessions, sums = [], []
    for number in range(level.amount):
        page = directory / f"tab{number}.html"
        page.write_text(PAGE.replace("SEED", str(number + 1)))
        sessions.append(browser.open(page.as_uri()))
        sums.append(browser.look(sessions[-1]))
    opened = time.monotonic() - started
    times: list[float] = []
    for place in list(range(level.amount)) * LOOKS:
        before = time.monotonic()
        if browser.look(sessions[place]) != sums[place]:
            raise HarnessError(f"DATA WAS LOST: tab {place} holds something else")
        times.append(time.monotonic() - before)
    times.sort()
    return {"median": times[len(times) // 2] * 1e3, "worst": times[-1] * 1e3, "open": opened}
