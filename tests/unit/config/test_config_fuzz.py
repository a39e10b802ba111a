# SPDX-License-Identifier: GPL-2.0-or-later
"""Config files with anything in them give a Config, or an error for a person.

The soak tier looks at 100,000.
"""

from __future__ import annotations

import gc
import json
import re
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from tests.support import junk
from zswapd import config
from zswapd.errors import ConfigError

LONG = settings(max_examples=100_000, suppress_health_check=list(HealthCheck), deadline=None)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("root")
    (made / "proc").mkdir()
    (made / "proc/meminfo").write_text("MemTotal: 6291456 kB\n")
    (made / "z.toml.d").mkdir()
    return made


def attempt(file: Path, root: Path) -> tuple[config.Config | None, ConfigError]:
    try:
        return config.load(codecs=("lz4", "lzo"), file=file, root=root), ConfigError("")
    except ConfigError as error:
        return None, error


@pytest.fixture(scope="module")
def look(root: Path) -> Callable[[bytes, bytes], None]:
    """Load a file and a drop-in; fail on anything but a Config or a proper error."""
    file, dropin = root / "z.toml", root / "z.toml.d/1.toml"

    def look(main: bytes, more: bytes) -> None:
        file.write_bytes(main)
        dropin.write_bytes(more)
        began = time.monotonic()
        loaded, refusal = attempt(file, root)
        assert time.monotonic() - began < 5
        if loaded is None:
            assert refusal.hint
            assert str(file) in refusal.message, "which file"
            assert len(refusal.message) < 1000
            return
        carried = json.loads(json.dumps(config.to_document(loaded)))
        assert carried is None or config.from_document(carried, ("lz4", "lzo")) == loaded
        again = config.load(
            codecs=("lz4", "lzo"),
            root=root,
            assignments=[
                (dest, str(given.value), "test")
                for dest, given in loaded.given.items()
                if given.value is not None
            ],
        )
        assert {dest: again.value(dest) for dest in config.SETTINGS} == {
            dest: loaded.value(dest) for dest in config.SETTINGS
        }

    return look


@given(main=junk.documents(), more=junk.documents())
def test_any_file_is_a_config_or_an_error_with_its_name(
    look: Callable[[bytes, bytes], None], main: bytes, more: bytes
) -> None:
    look(main, more)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@LONG
@given(main=junk.documents(), more=junk.documents())
def test_any_of_a_hundred_thousand_files_is(
    look: Callable[[bytes, bytes], None], main: bytes, more: bytes
) -> None:
    look(main, more)


@pytest.mark.slow
def test_looking_again_and_again_takes_no_more_memory(look: Callable[[bytes, bytes], None]) -> None:
    right = b"[swap]\nsize = '1G'\nfiles.more = '2G'\n"
    wrong = [
        b"[swap]\nsice = 1",
        b"[pool]\nlimit = '9Q'",
        b"\xff",
        b"[",
        b"[a.b.c]\nd = 1",
        b"swap = 1",
        b"[pool]\ncompressor='lz5'",
    ]
    held: list[int] = []
    tracemalloc.start()
    try:
        for _ in range(12):
            for main in (right, *wrong):
                look(main, right)
            gc.collect()
            held.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert held[-1] - held[5] < 4096


@pytest.mark.parametrize(
    "text",
    [
        "a" * (1 << 20),
        "[" * 10_000,
        "x = " + "[" * 10_000,
        "x = " + "{a=" * 5_000,
        "#" * (4 << 20),
        "a.b.c.d" * 10_000 + " = 1",
    ],
    ids=lambda text: re.sub(r"(.)\1+", r"\1…", text[:12]),
)
def test_huge_and_deep_files_end_soon(look: Callable[[bytes, bytes], None], text: str) -> None:
    look(text.encode(), b"")
