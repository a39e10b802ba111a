# SPDX-License-Identifier: GPL-2.0-or-later
"""A supervisor that meets errors of its own: it stays, since all that is stored ends with it."""

from __future__ import annotations

import errno
import logging
import os
import signal
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.successor import make_config
from zswapd.core.sizing import make_arena
from zswapd.errors import ArenaError, ZswapdError
from zswapd.handover.state import Phase, SharedState, Word
from zswapd.supervisor import fork as fork_module
from zswapd.supervisor import supervisor as supervisor_module
from zswapd.supervisor.supervisor import Supervisor


@pytest.fixture
def estate() -> Iterator[Any]:
    """Return what a worker has served, as far as a supervisor looks at it."""
    arena = make_arena(make_config("memory.arena=memfd"))
    state = SharedState.new({}, lost={}, max_io=1 << 20, kind="memfd")
    yield types.SimpleNamespace(arena=arena.fd, state=state, is_new=False, descriptors=dict)
    state.close()
    arena.close()


@pytest.fixture
def supervisor(estate: Any) -> Supervisor:
    estate.state.words[Word.PHASE] = Phase.SERVING
    return Supervisor(
        make_config("memory.arena=memfd", "service.spare=false"),
        estate,
        guarded=lambda work: work(),
    )


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch) -> list[int | OSError]:
    """Return what the next calls of fork give."""
    results: list[int | OSError] = []

    def fork() -> int:
        result = results.pop(0)
        if isinstance(result, OSError):
            raise result
        return result

    monkeypatch.setattr(os, "fork", fork)
    monkeypatch.setattr(fork_module, "AGAIN_S", 0)
    return results


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EAGAIN])
def test_fork_that_fails_is_tried_until_it_works(
    supervisor: Supervisor, forks: list[int | OSError], number: int, expect_log: Callable[..., None]
) -> None:
    forks += [*[OSError(number, os.strerror(number))] * (fork_module.FIRST_TRIES + 5), 4711]
    expect_log("worker 0 died: SIGKILL", level=logging.ERROR)
    expect_log("no worker can be forked", level=logging.ERROR, count=None)
    assert supervisor._worker_ended(signal.SIGKILL) is None
    assert supervisor._worker == 4711
    assert supervisor._words[Word.PHASE] == Phase.STARTING


def test_first_worker_that_cannot_be_forked_is_given_up(
    estate: Any, forks: list[int | OSError], expect_log: Callable[..., None]
) -> None:
    estate.is_new = True
    forks += [OSError(errno.ENOMEM, "Cannot allocate memory")] * fork_module.FIRST_TRIES
    expect_log("no worker can be forked", level=logging.ERROR, count=None)
    supervisor = Supervisor(make_config("memory.arena=memfd"), estate, guarded=lambda work: work())
    with pytest.raises(ZswapdError, match="no worker can be forked: Cannot allocate") as caught:
        supervisor.run()
    assert "pids.max" in (caught.value.hint or "")


@pytest.mark.parametrize(
    "error", [ArenaError("no memory"), OSError(errno.ENOMEM, "no memory"), RuntimeError("a bug")]
)
@pytest.mark.parametrize("part", ["_arena_lock.lock", "_ballast.look", "_keep_spare", "_say_ready"])
def test_look_that_fails_is_no_reason_to_end(
    supervisor: Supervisor,
    monkeypatch: pytest.MonkeyPatch,
    expect_log: Callable[..., None],
    part: str,
    error: Exception,
) -> None:
    def fail(*_: object) -> None:
        raise error

    expect_log("the supervisor goes on after an error", level=logging.ERROR, count=None)
    owner, _, name = part.rpartition(".")
    monkeypatch.setattr(getattr(supervisor, owner) if owner else supervisor, name, fail)
    watched = []
    monkeypatch.setattr(supervisor, "_end_if_it_hangs", lambda *_: watched.append(1))
    supervisor._tick()
    assert watched  # a worker that hangs is ended all the same


def test_estate_that_is_new_is_given_back_when_no_worker_can_be_forked(
    monkeypatch: pytest.MonkeyPatch, estate: Any
) -> None:
    closed = []
    estate.close = lambda: closed.append(1)

    def fail(_self: Supervisor) -> int:
        raise ZswapdError("no worker can be forked")

    monkeypatch.setattr(Supervisor, "run", fail)
    monkeypatch.setattr(supervisor_module, "find_resources", lambda *_: (estate, 0))
    monkeypatch.setattr(supervisor_module.system, "protect", lambda **_: ())
    monkeypatch.setattr(supervisor_module.system, "populate_code", lambda **_: True)
    monkeypatch.setattr(supervisor_module.system, "set_realtime", lambda: None)
    monkeypatch.setattr(signal, "pthread_sigmask", lambda *_: None)
    for is_new in (False, True):
        estate.is_new = is_new
        with pytest.raises(ZswapdError, match="no worker"):
            supervisor_module.run(lambda: make_config("memory.arena=memfd"), lambda work: work())
        assert bool(closed) is is_new
