# SPDX-License-Identifier: GPL-2.0-or-later
"""The choice between the compiled page path (mypyc) and its plain Python source.

The tests run on both. With ZSWAPD_PURE in the environment they import the plain source, even if a
compiled module is beside it. Without it, a compiled module that is older than its source stops the
run: the tests would run old code.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

PACKAGE = Path(__file__).resolve().parents[2] / "zswapd"
WANTS_PURE = bool(os.environ.get("ZSWAPD_PURE"))


def compiled_modules() -> dict[Path, Path]:
    """Return the compiled modules by their source."""
    found = {}
    for library in PACKAGE.rglob("*.so"):
        source = library.with_name(library.name.partition(".")[0] + ".py")
        if source.exists():
            found[source] = library
    return found


def stale() -> list[Path]:
    """Return the sources that are newer than their compiled modules."""
    # The modules are shims. Their code is in one library beside the package, and a build may renew
    # only that.
    shared = max(
        (library.stat().st_mtime for library in PACKAGE.parent.glob("zswapd__mypyc*.so")),
        default=0.0,
    )
    return sorted(source for source in compiled_modules() if source.stat().st_mtime > shared)


class _PureFinder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        source = PACKAGE.parent.joinpath(*fullname.split(".")).with_suffix(".py")
        return (
            importlib.util.spec_from_file_location(fullname, source)
            if source in self.sources
            else None
        )

    def __init__(self) -> None:
        self.sources = frozenset(compiled_modules())


def use_pure() -> None:
    """Make all further imports take the plain source."""
    sys.meta_path.insert(0, _PureFinder())


def is_compiled() -> bool:
    """Return whether the tests run on the compiled page path."""
    from zswapd.core.pam import zv

    return not str(zv.__file__).endswith(".py")
