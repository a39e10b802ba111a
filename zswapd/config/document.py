# SPDX-License-Identifier: GPL-2.0-or-later
"""The settings as a document of plain values, for the handover to a successor.

A successor does not read the config files again, because they may be wrong by then, and it must
serve stored pages. The document has each value as its source wrote it, and its origin. It also has
the size of memory, so that the successor computes the same sizes. Settings that were changed at run
time are handed over beside it (`with_changes`).
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
"""Limit of a document's length as JSON, in bytes.

Two documents must fit into the shared state, beside the changed settings and all counters.
"""


def to_document(config: Config) -> dict[str, Any] | None:
    """Return the document of a Config, as plain JSON values.

    Return None if it is longer than LONGEST_DOCUMENT.
    """
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
        document: the result of `to_document`, possibly of another version of the program.
        codecs: names that `pool.compressor` may have.

    Raises:
        ConfigError: this program does not accept the document.
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
            "the settings of the handover are invalid", hint="report this as a bug"
        ) from error
    return build(given, context)


def with_changes(
    config: Config, settings: Mapping[str, object], *, source: str
) -> tuple[Config, dict[str, object]]:
    """Apply the settings that were changed at run time.

    A setting that this program does not accept is logged and left out.

    Returns:
        The new Config, and the settings that were applied.
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
