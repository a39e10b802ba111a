# SPDX-License-Identifier: GPL-2.0-or-later
"""The settings that a supervisor begins with when a predecessor has left files to serve.

The settings' files may have changed meanwhile.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from zswapd import config
from zswapd.config import Config
from zswapd.config import document as document_module
from zswapd.core import compress
from zswapd.errors import ConfigError, HandoverError
from zswapd.handover.geometry import describe_geometry
from zswapd.handover.resources import InheritedFiles
from zswapd.handover.state import SharedState
from zswapd.supervisor.settings import choose
from zswapd.worker.upgrade import _settings_in


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Config]:
    """Return a function that loads settings: `load(swap__size="64M")`."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 1048576 kB\n")

    def load(**settings: str) -> Config:
        named = {
            "swap.size": "25%",
            **{name.replace("__", "."): text for name, text in settings.items()},
        }
        return config.load(
            codecs=compress.names(),
            assignments=[(*item, "--set") for item in named.items()],
            root=tmp_path,
        )

    return load


@pytest.fixture
def state(load: Callable[..., Config]) -> Iterator[SharedState]:
    """What a worker with a swap file of 256 MiB has left."""
    made = SharedState.new(describe_geometry(load()), lost={}, max_io=1 << 20, kind="memfd")
    yield made
    made.close()


def refused() -> Config:
    raise ConfigError("z.toml:3: no")


def test_where_nothing_is_left_the_files_decide(load: Callable[..., Config]) -> None:
    assert choose(load, None) == load()
    with pytest.raises(ConfigError, match="no"):
        choose(refused, None)


def test_files_in_another_order_are_those_that_were_in_use(
    load: Callable[..., Config], expect_log: Callable[..., None]
) -> None:
    before = load(swap__files__a="4M", swap__files__b="8M")
    state = SharedState.new(describe_geometry(before), lost={}, max_io=1 << 20, kind="memfd")
    state.save({"configured": config.to_document(before)})
    expect_log(
        "the settings in the files cannot be used, beginning with those that were in use: .* order"
        " of swap files is",
        level=logging.ERROR,
    )
    found = choose(
        lambda: load(swap__files__b="8M", swap__files__a="4M"),
        InheritedFiles({"state": state.fd}, 0),
    )
    assert list(found.swap_files()) == list(before.swap_files())
    state.close()


def test_an_upgrade_takes_what_was_checked(load: Callable[..., Config], state: SharedState) -> None:
    state.save(
        {
            "checked": config.to_document(load(pool__limit="5M")),
            "configured": config.to_document(load()),
        }
    )
    left = InheritedFiles({"state": state.fd}, 7)
    for files in (refused, load, lambda: load(swap__size="1G")):
        assert choose(files, left) == load(pool__limit="5M")
    state.save(
        {"checked": None, "configured": config.to_document(load())}
    )  # a program that says nothing of it
    assert choose(lambda: load(pool__limit="6M"), left).pool.limit == 6 << 20
    os.fstat(state.fd)  # still open


def test_the_files_count_after_a_death_and_what_was_in_use_if_they_are_not_right(
    load: Callable[..., Config], state: SharedState, expect_log: Callable[..., None]
) -> None:
    state.save(
        {
            "checked": config.to_document(load(pool__limit="5M")),
            "configured": config.to_document(load(pool__limit="4M")),
        }
    )
    left = InheritedFiles({"state": state.fd}, 0)
    assert choose(lambda: load(pool__limit="6M"), left).pool.limit == 6 << 20
    what = "the settings in the files cannot be used, beginning with those that were in use"
    expect_log(f"{what}: z.toml:3: no", level=logging.ERROR)
    assert choose(refused, left) == load(pool__limit="4M")
    expect_log(f"{what}: the running daemon's swap.size is", level=logging.ERROR)
    assert choose(lambda: load(swap__size="1G"), left) == load(pool__limit="4M")


def test_a_worker_that_may_live_is_looked_for_where_it_is(
    load: Callable[..., Config], state: SharedState, expect_log: Callable[..., None]
) -> None:
    """At another socket a supervisor would hear of none, and have two workers serve one arena."""
    state.save({"checked": None, "configured": config.to_document(load())})
    for name, value in (("control.socket", "/run/other.sock"), ("pool.max_zspage_frames", "4")):
        expect_log(
            f"beginning with those that were in use: the running daemon's {name} is",
            level=logging.ERROR,
        )
        changed = load(**{name.replace(".", "__"): value})
        left = InheritedFiles({"state": state.fd}, 0)
        assert choose(lambda changed=changed: changed, left) == load()


def test_what_an_older_program_has_left_needs_the_files(
    load: Callable[..., Config], state: SharedState
) -> None:
    state.save({})
    for worker in (0, 7):
        left = InheritedFiles({"state": state.fd}, worker)
        assert choose(load, left) == load()
        with pytest.raises(
            HandoverError, match="no"
        ):  # after a ConfigError the service manager would not try again
            choose(refused, left)
        with pytest.raises(HandoverError, match=r"swap\.size is"):
            choose(lambda: load(swap__size="1G"), left)


@pytest.mark.parametrize(
    "document",
    [3, [], {}, {"memory_total": "x"}, {"memory_total": 1, "page_size": 2, "given": [3]}],
)
def test_a_document_that_makes_no_sense_is_refused(document: object) -> None:
    with pytest.raises(ConfigError, match="are invalid"):
        config.from_document(document, compress.names())


def test_a_document_of_a_program_with_other_settings_is_refused(
    load: Callable[..., Config],
) -> None:
    document = json.loads(json.dumps(config.to_document(load())))
    document["given"][0][0] = "swap.colour"
    with pytest.raises(ConfigError, match="unknown setting"):
        config.from_document(document, compress.names())


def test_the_same_comes_of_it_when_memory_has_grown(
    load: Callable[..., Config], tmp_path: Path
) -> None:
    before = load()
    document = json.loads(json.dumps(config.to_document(before)))
    (tmp_path / "proc/meminfo").write_text("MemTotal: 2097152 kB\n")
    assert load().swap.size == 512 << 20
    assert (
        config.from_document(document, compress.names()).swap.size == before.swap.size == 256 << 20
    )


def test_what_is_too_long_is_not_carried(
    load: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document_module, "LONGEST_DOCUMENT", 100)
    assert config.to_document(load()) is None


def test_what_a_check_prints_is_taken_if_it_fits() -> None:
    assert _settings_in(b'{"given": []}\n') == {"given": []}
    assert _settings_in(b'"' + b"x" * (document_module.LONGEST_DOCUMENT - 2) + b'"\n') is not None
    for output in (
        b"",
        b"null\n",
        b"a warning\n",
        b"\xff",
        b'"' + b"x" * document_module.LONGEST_DOCUMENT + b'"\n',
    ):
        assert _settings_in(output) is None
