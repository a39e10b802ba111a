# SPDX-License-Identifier: GPL-2.0-or-later
"""The name that the kernel has for a path, found without a request to the file system below it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from zswapd.paths import without_links


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("mnt", None),
        ("here", "a/mnt"),
        ("here", "a/mnt/"),
        ("here", "there/mnt"),
        ("here", "chain"),
        ("here", "there/../a/mnt"),
        ("here", "a/mnt/."),
        ("there/mnt", None),
        ("../{}/here", "a/mnt"),
        ("a/../here", "a/mnt"),
        ("missing", "a/none"),
        ("loop", "loop"),
    ],
)
def test_name_is_that_of_the_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, link: str, target: str | None
) -> None:
    (tmp_path / "a/mnt").mkdir(parents=True)
    (tmp_path / "there").symlink_to("a")
    (tmp_path / "chain").symlink_to("there/mnt")
    path = tmp_path / link.format(tmp_path.name)
    if target is not None:
        (tmp_path / os.path.basename(link)).symlink_to(target)
    wanted = os.path.realpath(path)
    asked: list[str] = []
    lstat = os.lstat
    monkeypatch.setattr(
        os, "lstat", lambda name, **more: asked.append(os.fspath(name)) or lstat(name, **more)
    )
    assert str(without_links(path)) == wanted
    assert str(tmp_path / "a/mnt") not in asked or target == "a/mnt/."


def test_name_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert without_links(Path("x/../mnt")) == tmp_path.resolve() / "mnt"
