# SPDX-License-Identifier: GPL-2.0-or-later
"""Statistics of all parts are snapshots: frozen, slotted, and documented field by field."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil

import pytest

import zswapd


def _snapshots() -> list[type]:
    found = {}
    for layer in ("allocators", "block", "compress", "frontends", "pam", "tmem"):
        package = importlib.import_module(f"zswapd.{layer}")
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            for name, value in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
                if name.endswith("Statistics") or name == "PageKey":
                    found[f"{value.__module__}.{name}"] = value
    assert len(found) > 6, zswapd.__path__
    return [value for _, value in sorted(found.items())]


@pytest.mark.parametrize("cls", _snapshots(), ids=lambda cls: cls.__name__)
class TestEachSnapshot:
    def test_cannot_be_changed(self, cls: type) -> None:
        assert dataclasses.is_dataclass(cls)
        assert cls.__dataclass_params__.frozen  # type: ignore[attr-defined]

    def test_has_slots(self, cls: type) -> None:
        assert "__slots__" in vars(cls)

    def test_documents_every_counter(self, cls: type) -> None:
        if cls.__name__ == "PageKey":
            return
        undocumented = [field.name for field in dataclasses.fields(cls) if field.name not in (cls.__doc__ or "")]
        assert not undocumented
