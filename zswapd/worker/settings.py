# SPDX-License-Identifier: GPL-2.0-or-later
"""The settings of a running worker: the configured ones, and those that were changed since.

Each part that has settings registers a function that applies them (`assembly.build`). So a new
setting changes its part, and not this file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from zswapd.config import Config, changed, describe, to_document, with_changes, with_files
from zswapd.config.table import CLIENT_SETTINGS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

SET_BY: Final = "zswapctl set"
"""The origin of a setting that was changed at run time."""


FILES_BY: Final = "zswapctl files"
"""The origin of a swap file that came at run time."""


class Change(NamedTuple):
    """Settings that were checked and do not count yet."""

    configured: Config
    changes: dict[str, object]
    current: Config


class Settings:
    """The settings that count now.

    Args:
        configured: the settings of the files and the command line.
        changes: the settings that earlier workers were told to change, by full name.
        whole: the settings with those of swap files that do not exist yet.

    Attributes:
        configured: as above.
        current: the settings with all changes.
        changes: the changed settings by full name. Changes that are not possible with these
            configured settings are left out.
        document: the configured settings, for a successor.
        when_applied: called after a change.
    """

    def __init__(
        self, configured: Config, changes: Mapping[str, object], whole: Config | None = None
    ) -> None:
        self.configured = configured
        self._whole = whole or configured
        self.current, self.changes = with_changes(configured, changes, source=SET_BY)
        self.document = to_document(configured)
        self.when_applied: Callable[[], None] = lambda: None
        self._appliers: list[Callable[[Config], None]] = []
        self._checks: list[Callable[[Config, Config], None]] = []

    def register(self, *appliers: Callable[[Config], None]) -> None:
        """Register functions to call with the new settings after each change, in this order."""
        self._appliers += appliers

    def register_check(self, check: Callable[[Config, Config], None]) -> None:
        """Register a function to call with the old and the new settings before each change.

        The function raises ConfigError to refuse the change.
        """
        self._checks.append(check)

    def describe(self, keys: Sequence[str] = ()) -> dict[str, Any]:
        """Return settings with values and origins (see `config.describe`)."""
        return describe(self.current, list(keys))

    def change(self, settings: dict[str, object]) -> dict[str, Any]:
        """Change settings, all or none; return the changed ones.

        Raises:
            ConfigError: one of them is refused.
        """
        self._apply({**self.changes, **settings}, changed(self.current, settings, source=SET_BY))
        return self.describe(list(settings))

    def with_files(self, sizes: Mapping[str, object], settings: Mapping[str, object]) -> Change:
        """Return the settings with other swap files, for `take`.

        Settings of files that are not there any more are left out.

        Args:
            sizes: the size of each file, by name.
            settings: further settings to change, by full name.

        Raises:
            ConfigError: a name, a size or a setting is refused.
        """
        configured = with_files(self._whole, sizes, source=FILES_BY)
        kept = {
            name: value
            for name, value in self.changes.items()
            if not name.startswith("swap.files.") or name in _client_names(configured)
        }
        changes = {**kept, **settings}
        current = changed(configured, changes, source=SET_BY)
        for check in self._checks:
            check(self.current, current)
        return Change(configured, changes, current)

    def take(self, change: Change) -> None:
        """Let the result of `with_files` count."""
        self.configured = change.configured
        self.document = to_document(change.configured)
        self._apply(change.changes, change.current)

    def reset(self, keys: Sequence[str] = ()) -> dict[str, Any]:
        """Give changed settings their configured values again; return these settings.

        Without names, all changed settings are reset.

        Raises:
            ConfigError: a name is unknown, or the resulting settings are refused.
        """
        names = list(describe(self.current, keys)) if keys else list(self.changes)
        left = {name: value for name, value in self.changes.items() if name not in names}
        self._apply(left, changed(self.configured, left, source=SET_BY))
        return describe(self.current, names) if names else {}

    def _apply(self, changes: dict[str, object], config: Config) -> None:
        for check in self._checks:
            check(self.current, config)
        self.current, self.changes = config, changes
        for apply in self._appliers:
            apply(config)
        self.when_applied()


def _client_names(config: Config) -> set[str]:
    """Return the full names of all settings that swap files can have for themselves."""
    return {f"swap.files.{name}.{key}" for name in config.clients for key in CLIENT_SETTINGS}
