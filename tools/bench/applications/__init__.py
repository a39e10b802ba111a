# SPDX-License-Identifier: GPL-2.0-or-later
"""Programs from practice as workloads, one plug-in each.

A new one is a module with a subclass of `Application` and an entry in `_ALL`. Rounds, table, plot
and JSON (jobs.py) know it by its name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tools.bench.applications.base import Application, Column, Level, TooSlowError
from tools.bench.applications.compile import Compile
from tools.bench.applications.database import Database
from tools.bench.applications.nopressure import NoPressure
from tools.bench.applications.tabs import Tabs

if TYPE_CHECKING:
    from collections.abc import Callable

_ALL: tuple[type[Application], ...] = (Compile, Database, Tabs, NoPressure)

APPLICATIONS: dict[str, Callable[[], Application]] = {maker.name: maker for maker in _ALL}
"""The class of each application, by its name."""

__all__ = ["APPLICATIONS", "Application", "Column", "Level", "TooSlowError"]
