# SPDX-License-Identifier: GPL-2.0-or-later
"""The settings that a supervisor begins with.

Whoever finds pages to serve, serves them, whatever has become of the files.

- Nothing is left: those in the files. If they are refused, so is the start, by an exit code
  (ConfigError's) after which the service manager does not try again. With something left to serve
  it has to, so there it is another.
- It is an upgrade: those that the check has read (`zswapctl upgrade`), not what the files say a
  moment later.
- Supervisor and worker have died, and the service manager kept their files: those in the settings'
  files; if they are refused, or describe other swap files than there are, those that the dead
  worker had. A mistake in a file that nobody has noticed yet must not cost what is swapped out.
"""

from __future__ import annotations

import logging
import os
from functools import partial
from typing import TYPE_CHECKING, Any

from zswapd.config import from_document
from zswapd.core import compress
from zswapd.errors import HandoverError, ZswapdError
from zswapd.handover.geometry import check_geometry
from zswapd.handover.state import SharedState

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from zswapd.config import Config
    from zswapd.handover.resources import InheritedFiles

log = logging.getLogger(__name__)


def choose(configure: Callable[[], Config], left: InheritedFiles | None) -> Config:
    """Return the settings to begin with.

    Args:
        configure: reads the files and the command line.
        left: what is there to be served.

    Raises:
        ConfigError: they are refused, and nothing is left.
        HandoverError: they are refused, or do not describe what is left; and so it is with what
            else there is.
    """
    if left is None:
        return configure()
    document, geometry = _remembered(left.files["state"])
    sources: dict[str, Callable[[], Config]] = {"the settings in the files": configure}
    if left.worker and document.get("checked"):
        sources = {"the settings that were checked": _recalled(document["checked"]), **sources}
    if document.get("configured"):
        sources["those that were in use"] = _recalled(document["configured"])
    refusals: dict[str, ZswapdError] = {}
    for name, source in sources.items():
        try:
            config = source()
            check_geometry(config, geometry)
        except ZswapdError as refusal:
            refusals[name] = refusal
        else:
            for refused, why in refusals.items():
                log.error("%s cannot be used, beginning with %s: %s", refused, name, why)
            return config
    first = next(iter(refusals.values()))
    raise HandoverError(
        f"what is left is not served, since the settings are refused: {first.message}",
        hint=first.hint,
    )


def _recalled(document: object) -> Callable[[], Config]:
    return partial(from_document, document, compress.names())


def _remembered(descriptor: int) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return the last document of a shared state, and its geometry."""
    state = SharedState(os.dup(descriptor))
    try:
        return state.load(), state.geometry
    finally:
        state.close()
