# SPDX-License-Identifier: GPL-2.0-or-later
"""Counters and settings as files, of a real daemon.

What they hold, what they take, and what survives a worker.
"""

from __future__ import annotations

import errno
import os
import signal
import stat
from pathlib import Path

import pytest

from tests.support.swap import Stage, next_worker, stage
from tools.bench.harness.daemon import Daemon

__all__ = ["stage"]
pytestmark = pytest.mark.mount


@pytest.fixture
def daemon(stage: Stage) -> Daemon:
    return stage.daemon("64M", memory__reserve="8M")


def stats(daemon: Daemon, name: str) -> str:
    return (daemon.mountpoint / "stats" / name).read_text()


def params(daemon: Daemon, name: str) -> Path:
    return daemon.mountpoint / "params" / name


def test_counters_say_what_zswapctl_says_under_both_of_their_names(daemon: Daemon) -> None:
    with (daemon.mountpoint / "swap").open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), os.urandom(1000) + bytes(3096), 4096)
        os.pread(file.fileno(), 4096, 4096)
    assert stats(daemon, "frontswap.succ_stores") == stats(daemon, "succ_stores") == "1\n"
    told = daemon.ask("stats")
    assert int(stats(daemon, "zv.curr_zbytes")) == told["core"]["zv"]["curr_zbytes"] > 1000
    assert (
        stats(daemon, "zv_curr_dist_counts").count(",")
        == len(told["core"]["zv"]["curr_dist_counts"]) - 1
    )
    heads, row = stats(daemon, "devices").splitlines()
    assert dict(zip(heads.split(), row.split(), strict=True))["stored_pages"] == "1"
    assert "1" in stats(daemon, "zsmalloc.classes")


def test_a_setting_is_read_and_written(daemon: Daemon) -> None:
    knob = params(daemon, "pool.limit")
    assert knob.read_text() == "\n"
    knob.write_text("32M\n")
    assert knob.read_text() == f"{32 << 20}\n"
    assert daemon.ask("get")["pool.limit"]["value"] == 32 << 20
    params(daemon, "zv_max_zsize").write_text("2048")
    assert params(daemon, "pool.zv_max_zsize").read_text() == "2048\n"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            ("zv_max_zsize", value)
            for value in (b"much", b" ", b"-1", b"\xff\xfe", b"9" * 5000, b"1\0")
        ),
        ("pool.limit", b"200%"),
    ],
)
def test_a_bad_value_is_einval_and_changes_nothing(daemon: Daemon, name: str, value: bytes) -> None:
    knob = params(daemon, name)
    before = daemon.ask("get")
    descriptor = os.open(knob, os.O_WRONLY)
    try:
        with pytest.raises(OSError, match="Invalid argument") as caught:
            os.write(descriptor, value)
    finally:
        os.close(descriptor)
    assert caught.value.errno == errno.EINVAL
    assert daemon.ask("get") == before


def test_what_cannot_change_is_read_only(daemon: Daemon) -> None:
    for path in (params(daemon, "swap.size"), daemon.mountpoint / "stats/loads"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o400
        with pytest.raises(PermissionError):
            path.write_text("1")
    assert params(daemon, "swap.size").read_text() == f"{64 << 20}\n"


def test_every_file_can_be_read(daemon: Daemon) -> None:
    for directory in ("stats", "params"):
        for path in sorted((daemon.mountpoint / directory).iterdir()):
            assert path.read_text()[-1:] in {"\n", ""}, path


def test_the_next_worker_has_the_same_files_settings_and_counts(daemon: Daemon) -> None:
    names = sorted(path.name for path in (daemon.mountpoint / "stats").iterdir())
    params(daemon, "pool.compressor").write_text("lzo")
    with (daemon.mountpoint / "swap").open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), bytes(4096), 0)
    daemon.ask("stats")  # what was told must not be less later
    old = daemon.ask("status")["worker"]["pid"]
    os.kill(old, signal.SIGKILL)
    next_worker(daemon, old)
    assert params(daemon, "pool.compressor").read_text() == "lzo\n"
    assert stats(daemon, "succ_stores") == "1\n"
    assert stats(daemon, "worker.number") == "2\n"
    assert sorted(path.name for path in (daemon.mountpoint / "stats").iterdir()) == names
