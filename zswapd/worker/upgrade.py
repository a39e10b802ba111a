# SPDX-License-Identifier: GPL-2.0-or-later
"""Replace a worker: by the installed program, or by a supervisor that takes over an orphan.

Before an upgrade, the installed program checks that it can take over, while this one serves. If it
cannot, it is refused, and the running program goes on.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import trio

from zswapd import __version__
from zswapd.config.document import LONGEST_DOCUMENT
from zswapd.control.server import WithDescriptors
from zswapd.core.allocators.arena import LAYOUT_VERSION as ARENA_LAYOUT
from zswapd.errors import ControlError, HandoverError, ZswapdError
from zswapd.handover.state import UPGRADE_WANTED, Word
from zswapd.host import installation
from zswapd.system import spawn
from zswapd.worker.progress import discard_progress, run_with_progress

if TYPE_CHECKING:
    from zswapd.worker.parts import Parts
    from zswapd.worker.progress import Report
    from zswapd.worker.successor import StateSaver

log = logging.getLogger(__name__)

CHECK_S = 60.0
"""Time limit of the installed program's check, s."""
_HINT: Final = "zswapd: hint: "
"""Prefix of the installed program's hint (cli/failures.py)."""


class Upgrade:
    """The replacement of one worker on request.

    Args:
        parts: the parts of this worker.
        saver: saves the checked settings for the next supervisor.
    """

    def __init__(self, parts: Parts, saver: StateSaver) -> None:
        self._parts = parts
        self._saver = saver

    async def upgrade(self, report: Report) -> dict[str, Any]:
        """Check the installed program, then have it take over; answer before it does."""
        parts = self._parts
        if not parts.parent.is_alive():
            raise HandoverError(
                "there is no supervisor to replace",
                hint=f"{installation.of_daemon().start()} starts one, which takes over",
            )
        identity = {
            "arena_layout": ARENA_LAYOUT,
            "arena_label": parts.core.arena.label.decode(),
            "state_layout": parts.state.layout,
            "geometry": parts.state.geometry,
            "memory_total": parts.settings.configured.context.memory_total,
        }
        command = [sys.executable, *sys.orig_argv[1:], "--upgrade-check", json.dumps(identity)]
        began = trio.current_time()
        check = await run_with_progress(
            report,
            lambda: {"seconds_of_checking_the_installed_program": int(trio.current_time() - began)},
            partial(self._check, command),
        )
        if check.code != 0:
            reason, hint = _reason_in(check.err)
            reason = reason or f"exit code {check.code}"
            hint = f"{hint}; the running one goes on" if hint else "the running one goes on"
            raise HandoverError(f"the installed program cannot take over: {reason}", hint=hint)
        self._saver.checked = _settings_in(check.out)
        self._saver.save_state()
        parts.state.words[Word.UPGRADE] = UPGRADE_WANTED
        parts.parent.call()
        return {
            "version": __version__,
            "worker": os.getpid(),
            "number": parts.state.words[Word.STARTED],
        }

    async def _check(self, command: list[str]) -> spawn.Finished:
        hint = "the running one goes on"
        try:
            return await self._parts.swapoff_thread.run(
                partial(spawn.run, command, limit=CHECK_S), abandon=True
            )
        except TimeoutError as error:
            raise HandoverError(
                f"the installed program did not answer within {CHECK_S:g} s", hint=hint
            ) from error
        except OSError as error:  # the program's file is being replaced, or memory is short
            raise HandoverError(
                f"the installed program cannot be started: {error.strerror}", hint=hint
            ) from error

    async def reload(self) -> None:
        """Upgrade because of a signal: an upgrade reads the settings again. Log a refusal."""
        try:
            await self.upgrade(discard_progress)
        except ZswapdError as error:
            log.error("not reloaded: %s", error)  # noqa: TRY400 - a reason, not a bug

    def hand_over(self) -> WithDescriptors:
        """Hand the open files to a new supervisor, if the old one is dead."""
        parts = self._parts
        if parts.parent.is_alive():
            raise ControlError("this worker has a supervisor", hint="use `zswapctl upgrade`")
        listening, lock = parts.listener.descriptors()
        backing = (parts.disk.fd,) if parts.disk else ()
        files = (
            parts.session.descriptor,
            parts.core.arena.fd,
            parts.state.fd,
            listening,
            lock,
            *backing,
        )
        return WithDescriptors(os.getpid(), files)


def _reason_in(output: bytes) -> tuple[str, str]:
    """Return the reason of a failed check, and its hint; "" for one that is missing.

    The reason is the first line, or the last line of a traceback.
    """
    lines = output.decode(errors="replace").strip().splitlines()
    if not lines:
        return "", ""
    hint = next((line.removeprefix(_HINT) for line in lines if line.startswith(_HINT)), "")
    return lines[-1 if lines[0].startswith("Traceback") else 0].removeprefix(
        "zswapd: error: "
    ), hint


def _settings_in(output: bytes) -> object:
    """Return the settings that a check has printed.

    The result is None if the program is too old to print them, or prints too much.
    """
    try:
        return json.loads(output) if len(output) <= LONGEST_DOCUMENT + 1 else None
    except ValueError:
        return None
