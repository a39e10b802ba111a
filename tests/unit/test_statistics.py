# SPDX-License-Identifier: GPL-2.0-or-later
"""Statistics of all parts are snapshots: frozen, slotted, and documented field by field.

How they are declared is read from the source: compiled classes carry neither docstrings nor slots.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

import zswapd
from tests.support.stack import build
from zswapd.core.block.device import Device


def _snapshots() -> Iterator[ast.ClassDef]:
    for path in sorted((Path(zswapd.__path__[0]) / "core").glob("*/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Statistics"):
                yield node


SNAPSHOTS = list(_snapshots())


def test_every_stateful_part_has_one() -> None:
    assert len(SNAPSHOTS) >= 8


@pytest.mark.parametrize("node", SNAPSHOTS, ids=lambda node: node.name)
class TestEachSnapshot:
    def test_is_declared_frozen_and_slotted(self, node: ast.ClassDef) -> None:
        assert "dataclass(frozen=True, slots=True)" in [
            ast.unparse(decorator) for decorator in node.decorator_list
        ]

    def test_documents_every_counter(self, node: ast.ClassDef) -> None:
        text = ast.get_docstring(node) or ""
        fields = [
            line.target.id
            for line in node.body
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
        ]
        assert fields
        assert not [field for field in fields if field not in text]


def test_snapshot_cannot_be_changed_and_does_not_change_by_itself() -> None:
    stack = build()
    device = Device("swap", 64 * 4096, stack.frontswap, 0, page_size=4096)
    parts = (
        stack.frames,
        stack.zv,
        stack.tmem,
        stack.frontswap,
        stack.nodes,
        stack.allocator,
        device,
    )
    before = [part.statistics() for part in parts]  # type: ignore[attr-defined]
    kept = [dataclasses.asdict(snapshot) for snapshot in before]
    for number in range(10):
        device.write(number * 4096, memoryview(bytes([number]) + bytes(4095)))
        device.read_into(number * 4096, memoryview(bytearray(4096)))
    device.discard(0, 4 * 4096)
    for part, snapshot, fields in zip(parts, before, kept, strict=True):
        assert dataclasses.asdict(snapshot) == fields
        assert dataclasses.asdict(part.statistics()) != fields  # type: ignore[attr-defined]
        with pytest.raises((dataclasses.FrozenInstanceError, AttributeError, TypeError)):
            setattr(snapshot, next(iter(fields)), 1)
    stack.close()
