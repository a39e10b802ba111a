# SPDX-License-Identifier: GPL-2.0-or-later
"""Fixtures of the tests in virtual machines.

`boot` gives a `Box` with the kernel and memory asked for. The next test that wants the same uses
the box again if nothing has failed in it, because a boot takes longer than many tests. A test that
fails shows the guest's console, after the guest's kernel was asked which tasks are blocked.

Images are cached (tools/vm/image.py); the first run on a machine builds one, in the fixture, which
counts towards that test's time.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tools.deb.build import build
from tools.vm import image, payload
from tools.vm.guest import Box
from tools.vm.machine import Machine

Boot = Callable[..., Box]
_FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Remember that a test failed, for the fixture that ends after it."""
    report = yield
    if report.failed:
        item.stash[_FAILED] = True
    return report


class Boxes:
    """The machine that is up, if any.

    One at a time, the host has not memory and processors for more.

    Args:
        directory: with a short path.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._numbers = itertools.count(1)
        self._payload: Path | None = None
        self._undo = contextlib.ExitStack()
        self.kind: tuple[str, int, bool] | None = None
        self.box: Box | None = None

    def get(self, kernel: str, memory_mib: int, *, reboots: bool) -> Box:
        """Return a box with this kernel and memory, that ends when it reboots or does not."""
        if (
            self.kind != (kernel, memory_mib, reboots)
            or self.box is None
            or not self.box.machine.alive
        ):
            self.end()
            self._payload = self._payload or payload.pack(
                self._directory, build(self._directory / "packages")
            )
            machine = Machine(
                image.build(),
                self._payload,
                self._directory / f"vm{next(self._numbers)}",
                kernel=kernel,
                memory_mib=memory_mib,
                reboots=reboots,
            )
            self.box, self.kind = (
                Box(self._undo.enter_context(machine)),
                (kernel, memory_mib, reboots),
            )
        return self.box

    def end(self) -> None:
        """Kill the machine that is up."""
        self._undo.close()
        self.box = self.kind = None


@pytest.fixture(scope="session")
def boxes() -> Iterator[Boxes]:
    with tempfile.TemporaryDirectory(prefix="zvm-") as name:
        boxes = Boxes(Path(name))
        try:
            yield boxes
        finally:
            boxes.end()


@pytest.fixture
def boot(request: pytest.FixtureRequest, boxes: Boxes) -> Iterator[Boot]:
    """Give the test a function that boots: boot(kernel="new", memory_mib=768, reboots=False)."""

    def get(*, kernel: str = "new", memory_mib: int = 768, reboots: bool = False) -> Box:
        return boxes.get(kernel, memory_mib, reboots=reboots)

    yield get
    box = boxes.box
    if box is None:
        return
    if request.node.stash.get(_FAILED, False):
        print(box.machine.autopsy())
        boxes.end()
    elif box.machine.alive:
        try:
            box.stop()
        except Exception:
            print(box.machine.autopsy())
            boxes.end()
            raise
    else:
        boxes.end()
