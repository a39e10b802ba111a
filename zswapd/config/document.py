# SPDX-License-Identifier: GPL-2.0-or-later
"""Settings on their way to whoever serves next.

As a document of plain values, and those that were changed at run time.

A successor need not read the files again: they may be wrong by then, and it has somebody's memory
to serve. Carried is what was written and where, not what came of it; with the size of memory, so
that the same comes of it again.
"""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

from zswapd.config.kinds import Context
from zswapd.config.loader import Config, Given, Origin, build, changed
from zswapd.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

log = logging.getLogger(__name__)

LONGEST_DOCUMENT = 32 << 10
"""Bytes, as JSON; two of them have to fit into the shared state.

Beside what was changed at run time and all counters.
"""


def to_document(config: Config) -> dict[str, Any] | None:
    """Return what a Config was made of, as JSON can say it; None if that is too long to be carried."""
    given = [
        [dest, item.value, item.text, item.origin.source, item.origin.line]
        for dest, item in config.given.items()
    ]
    document = {
        "memory_total": config.context.memory_total,
        "page_size": config.context.page_size,
        "given": given,
    }
    return document if len(json.dumps(document)) <= LONGEST_DOCUMENT else None


def from_document(document: Any, codecs: Iterable[str]) -> Config:
    """Return the Config that a document was made from.

    Args:
        document: what `to_document` has returned, perhaps of another version.
        codecs: see `load`.

    Raises:
        ConfigError: this program does not take it.
    """
    try:
        context = Context(
            int(document["memory_total"]), int(document["page_size"]), frozenset(codecs)
        )
        given = {
            str(dest): Given(value, Origin(str(source), line), text=bool(text))
            for dest, value, text, source, line in document["given"]
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            "the settings that were handed over make no sense", hint="report this as a bug"
        ) from error
    return build(given, context)


def with_changes(
    config: Config, settings: Mapping[str, object], *, source: str
) -> tuple[Config, dict[str, object]]:
    """Return the settings with those changed at run time, and these.

    One that this program does not take is left out.
    """
    taken: dict[str, object] = {}
    for name, value in settings.items():
        try:
            config = changed(config, {name: value}, source=source)
        except ConfigError as error:
            log.warning("%s stays as configured: %s", name, error)
        else:
            taken[name] = value
    return config, taken
