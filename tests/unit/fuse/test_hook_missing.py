# SPDX-License-Identifier: GPL-2.0-or-later
"""A program whose hook was not built, or does not load: a start is refused with the reason."""

from __future__ import annotations

import pytest

from zswapd import fuse
from zswapd.errors import MountError
from zswapd.worker.main import make_worker


def test_worker_without_the_hook_is_refused_before_anything_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fuse, "lowlevel", None)
    monkeypatch.setattr(fuse, "lowlevel_problem", "no such file")
    with pytest.raises(MountError, match="the FUSE hook cannot be used: no such file") as raised:
        make_worker(None, None, None)  # type: ignore[arg-type]
    assert raised.value.hint
