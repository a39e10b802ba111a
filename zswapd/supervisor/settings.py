# SPDX-License-Identifier: GPL-2.0-or-later
"""Choose the settings that a supervisor begins with.

Pages that are left are served even if the config files have become wrong: an error in a file must
not cost the swapped-out data.

- A start without pages takes the settings in the files. If they are refused, the start fails with
  the exit code of ConfigError, after which the service manager does not try again.
- An upgrade (`zswapctl upgrade`) takes the settings that the check has read. The files may have
  changed since.
- A start after the death of supervisor and worker, with files from the service manager's store,
  takes the settings in the files. If these are refused, or describe other swap files, it takes the
  settings of the dead worker. If those are refused too, the exit code is that of HandoverError,
  after which the service manager tries again.
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
        left: the inherited files; None if there are no pages to serve.

    Raises:
        ConfigError: the settings are refused, and there are no pages to serve.
        HandoverError: every source of settings is refused, or describes other swap files.
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
        f"the pages that are left cannot be served, the settings are refused: {first.message}",
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
