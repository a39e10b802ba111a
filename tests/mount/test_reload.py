# SPDX-License-Identifier: GPL-2.0-or-later
"""Settings that are read again while a daemon runs: all that stands in the files, or nothing."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

import zswapd
from tests.support.swap import Stage, next_worker, stage, wait_for
from tools.bench.harness.daemon import Daemon, program
from tools.bench.harness.system import HarnessError
from zswapd.errors import AlreadyRunningError
from zswapd.supervisor.supervisor import AGAIN_S

__all__ = ["stage"]
pytestmark = pytest.mark.mount

PAGE = os.urandom(4096)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "zswapd.toml"
    path.write_text('[pool]\ncompressor = "lz4"\nlimit = "32M"\n')
    return path


@pytest.fixture
def daemon(stage: Stage, file: Path) -> Daemon:
    """Return a daemon with a page in its swap file."""
    started = stage.daemon("64M", ["--config", str(file)], memory__reserve="8M")
    with started.file.open("r+b", buffering=0) as swap:
        os.pwrite(swap.fileno(), PAGE, 4096)
    return started


def values(daemon: Daemon) -> dict[str, Any]:
    return {name: row["value"] for name, row in daemon.ask("get").items()}


def the_page_is_there(daemon: Daemon) -> None:
    with daemon.file.open("rb", buffering=0) as swap:
        assert os.pread(swap.fileno(), 4096, 4096) == PAGE


def test_sighup_reads_the_files_again(daemon: Daemon, file: Path) -> None:
    daemon.ctl("set", "pool.zv_max_zsize=2000")
    old = daemon.worker_pid()
    file.write_text(
        '[pool]\ncompressor = "lzo"\nlimit = "16M"\nzv_max_zsize = 3000\n[log]\nlevel = "debug"\n'
    )
    os.kill(daemon.pid, signal.SIGHUP)
    next_worker(daemon, old)
    rows = daemon.ask("get")
    assert (rows["pool.compressor"]["value"], rows["pool.compressor"]["origin"]) == (
        "lzo",
        f"{file}:2",
    )
    assert rows["pool.limit"]["value"] == 16 << 20
    assert rows["log.level"]["value"] == "debug"
    assert (rows["pool.zv_max_zsize"]["value"], rows["pool.zv_max_zsize"]["origin"]) == (
        2000,
        "zswapctl set",
    )
    # A set value stays in each later worker. A reset gives the value that the files have now.
    for end in (lambda pid: os.kill(pid, signal.SIGKILL), lambda _: daemon.ctl("upgrade")):
        old = daemon.worker_pid()
        end(old)
        next_worker(daemon, old)
        assert values(daemon)["pool.zv_max_zsize"] == 2000
    daemon.ctl("reset", "pool.zv_max_zsize")
    rows = daemon.ask("get")
    assert (rows["pool.zv_max_zsize"]["value"], rows["pool.zv_max_zsize"]["origin"]) == (
        3000,
        f"{file}:4",
    )
    the_page_is_there(daemon)


def test_reset_gives_back_what_is_configured_for_good(daemon: Daemon) -> None:
    before = daemon.ask("get")
    changed = ("pool.limit=8M", "pool.compressor=lzo", "fuse.poll_us=7")
    daemon.ctl("set", *changed)
    daemon.ctl("reset", "pool.limit", "fuse.poll_us", "swap.size")
    after = daemon.ask("get")
    assert {name for name in before if before[name] != after[name]} == {"pool.compressor"}
    assert (daemon.mountpoint / "params/pool.limit").read_text() == f"{32 << 20}\n"
    with pytest.raises(HarnessError, match="unknown setting"):
        daemon.ctl("reset", "pool.compressor", "pool.limits")
    assert daemon.ask("get") == after
    daemon.ctl("set", *changed)
    daemon.ctl("reset", "--all")
    assert daemon.ask("get") == before
    old = daemon.worker_pid()
    os.kill(old, signal.SIGKILL)
    next_worker(daemon, old)
    assert daemon.ask("get") == before
    the_page_is_there(daemon)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('[pool]\ncompressor = "lzo"\nlimit = "much"\n', ":3: pool.limit is"),
        ('[pool]\ncompressor = "lzo"\n[swap]\nfiles.more = "much"\n', ":4: swap.files.more is"),
        ('[pool]\ncompressor = "lzo"\n[', "TOML"),
        (
            '[pool]\ncompressor = "lzo"\nmax_zspage_frames = 4\n',
            "pool.max_zspage_frames is 8, the settings say 4",
        ),
        ('[pool]\ncompressor = "lzo"\nlimits = 3\n', ":3: unknown setting pool.limits"),
    ],
)
def test_files_that_are_wrong_anywhere_change_nothing(
    daemon: Daemon, file: Path, text: str, reason: str
) -> None:
    before, old = values(daemon), daemon.worker_pid()
    file.write_text(text)
    os.kill(daemon.pid, signal.SIGHUP)
    wait_for(lambda: "not reloaded" in daemon.log_text(), "the log says nothing")
    (line,) = (line for line in daemon.log_text().splitlines() if "not reloaded" in line)
    assert "error: not reloaded" in line
    assert reason in line or reason == "TOML"
    with pytest.raises(HarnessError, match="cannot take over"):
        daemon.ctl("upgrade")
    assert values(daemon) == before
    assert daemon.worker_pid() == old
    the_page_is_there(daemon)


def test_files_in_another_order_are_refused(stage: Stage, file: Path) -> None:
    file.write_text('[swap.files]\na = "4M"\nb = "8M"\n')
    daemon = stage.daemon("4M", ["--config", str(file)], memory__reserve="8M")
    old = daemon.worker_pid()
    file.write_text('[swap.files]\nb = "8M"\na = "4M"\n')
    with pytest.raises(HarnessError, match=r"cannot take over: .* files is"):
        daemon.ctl("upgrade")
    assert daemon.worker_pid() == old
    file.write_text('[swap.files]\na = "4M"\nb = "8M"\n')
    daemon.ctl("upgrade")
    assert daemon.worker_pid() != old


def test_a_service_manager_is_not_answered_at_once_with_what_it_would_try_again_at_once(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = stage.daemon("64M", memory__reserve="8M")
    second = [
        *program("zswapd"),
        "run",
        "--config",
        "/dev/null",
        "--set",
        f"control.socket={daemon.socket}",
    ]

    def refusal() -> float:
        began = time.monotonic()
        done = subprocess.run(second, check=False, capture_output=True, timeout=30)
        assert done.returncode == AlreadyRunningError.exit_code
        return time.monotonic() - began

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        alone = refusal()
        manager.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        assert refusal() > alone + AGAIN_S / 2
    assert daemon.ask("status")["state"] == "serving"


AFTER_CHECK = """
import atexit, pathlib, sys
if "--upgrade-check" in sys.argv:
    atexit.register(pathlib.Path({file!r}).write_text, {text!r})
"""
"""A sitecustomize.py that writes a file at the end of the check."""


@pytest.mark.parametrize("text", ["[", '[swap]\nfiles.more = "64M"\n', '[pool]\nlimit = "8M"\n'])
def test_what_was_checked_counts_and_not_what_has_become_of_it(
    stage: Stage, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    (tmp_path / "sitecustomize.py").write_text(AFTER_CHECK.format(file=str(file), text=text))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    daemon = stage.daemon("64M", ["--config", str(file)], memory__reserve="8M")
    with daemon.file.open("r+b", buffering=0) as swap:
        os.pwrite(swap.fileno(), PAGE, 4096)
    file.write_text('[pool]\nlimit = "16M"\n')
    report = daemon.ctl_json("upgrade")
    assert file.read_text() == text
    rows = daemon.ask("get", keys=["pool.limit", "pool.compressor"])
    assert (rows["pool.limit"]["value"], rows["pool.limit"]["origin"]) == (16 << 20, f"{file}:2")
    status = daemon.ask("status")
    assert (status["pid"], status["worker"]["pid"]) == (daemon.pid, report["worker"])
    assert status["worker"]["supervised"]
    the_page_is_there(daemon)


NO_START = """
import os
if "ZSWAPD_ESTATE" in os.environ:
    os._exit(9)
"""


def test_a_program_that_fails_after_its_check_leaves_the_worker_serving(
    stage: Stage, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "sitecustomize.py"
    broken.write_text(NO_START)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    daemon = stage.daemon("64M", ["--config", str(file)], memory__reserve="8M")
    with daemon.file.open("r+b", buffering=0) as swap:
        os.pwrite(swap.fileno(), PAGE, 4096)
    old = daemon.worker_pid()
    os.kill(daemon.pid, signal.SIGHUP)
    assert daemon.wait_for_end() == 9
    the_page_is_there(daemon)
    status = daemon.ask("status")
    assert (status["worker"]["pid"], status["worker"]["supervised"]) == (old, False)
    daemon.start()  # as the service manager does
    assert daemon.ask("status")["worker"]["supervised"]
    assert daemon.worker_pid() != old
    the_page_is_there(daemon)


TOP = Path(__file__).resolve().parents[2]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where Python looks first; a program that is put there is the installed one from then on."""
    place = tmp_path / "installed"
    place.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(place))
    return place


def install(place: Path, *, version: str, changes: dict[str, tuple[str, str]]) -> None:
    """Put a copy of this program there, with another version and some changes."""
    shutil.copytree(TOP / "zswapd", place / "zswapd", ignore=shutil.ignore_patterns("__pycache__"))
    for library in TOP.glob("zswapd__mypyc*.so"):
        shutil.copy(library, place)
    for name, (before, after) in {"__init__.py": (zswapd.__version__, version), **changes}.items():
        path = place / "zswapd" / name
        text = path.read_text()
        assert before in text
        path.write_text(text.replace(before, after))


def test_an_upgrade_replaces_the_running_code(stage: Stage, installed: Path) -> None:
    daemon = stage.daemon("64M", memory__reserve="8M")
    with daemon.file.open("r+b", buffering=0) as swap:
        os.pwrite(swap.fileno(), PAGE, 4096)
    assert daemon.ask("status")["version"] == zswapd.__version__
    install(installed, version="9.9.9", changes={})
    report = daemon.ctl_json("upgrade")
    assert (report["old_version"], report["version"]) == (zswapd.__version__, "9.9.9")
    assert daemon.ask("status")["version"] == "9.9.9"
    for pid in (daemon.pid, daemon.worker_pid()):
        libraries = {
            line.split()[-1]
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines()
            if "zswapd" in line
        }
        assert any(str(installed) in name for name in libraries)
        assert not any(name.startswith(f"{TOP}/zswapd") for name in libraries), (
            "nothing is left of the old program"
        )
    the_page_is_there(daemon)
    old = daemon.worker_pid()
    os.kill(old, signal.SIGKILL)
    next_worker(daemon, old)
    assert daemon.ask("status")["version"] == "9.9.9"
    the_page_is_there(daemon)


@pytest.mark.parametrize(
    ("name", "before", "after", "said"),
    [
        (
            "core/core.py",
            "wrong = self.frames.adopt()",
            "raise KeyError('frames')",
            "fails in a rehearsal.*KeyError",
        ),
        ("worker/worker.py", "import trio\n", "import trio_of_tomorrow\n", "trio_of_tomorrow"),
        (
            "fuse/__init__.py",
            "from zswapd.fuse import _lowlevel",
            "raise ImportError('no hook')",
            "no hook",
        ),
        (
            "core/allocators/arena.py",
            "\nREADABLE_LAYOUTS = ",
            "\nREADABLE_LAYOUTS = (99,)  # ",
            "knows .99,.",
        ),
    ],
)
def test_a_program_whose_workers_would_not_come_up_does_not_replace_one_that_serves(
    stage: Stage, installed: Path, name: str, before: str, after: str, said: str
) -> None:
    daemon = stage.daemon("64M", memory__reserve="8M")
    with daemon.file.open("r+b", buffering=0) as swap:
        os.pwrite(swap.fileno(), PAGE, 4096)
    old = daemon.worker_pid()
    install(installed, version="9.9.9", changes={name: (before, after)})
    with pytest.raises(HarnessError, match=f"cannot take over.*{said}"):
        daemon.ctl("upgrade")
    assert daemon.worker_pid() == old
    status = daemon.ask("status")
    assert (status["version"], status["worker"]["number"]) == (zswapd.__version__, 1)
    the_page_is_there(daemon)


@pytest.mark.parametrize(
    "assignments",
    [
        ("pool.compressor=lzo", "pool.limit=much"),
        ("pool.compressor=lzo", "swap.size=1G"),
        ("pool.compressor=lzo", "cache.limit="),
        ("pool.compressor=lzo", "pool.limits=1G"),
        ("log.level=debug", "cache.limit=90%"),
    ],
)
def test_settings_that_are_wrong_anywhere_change_nothing(
    daemon: Daemon, assignments: tuple[str, ...]
) -> None:
    before = values(daemon)
    for order in (assignments, assignments[::-1]):
        with pytest.raises(HarnessError, match="error: "):
            daemon.ctl("set", *order)
        assert values(daemon) == before
    files = {path.name: path.read_text() for path in (daemon.mountpoint / "params").iterdir()}
    assert files["pool.compressor"] == "lz4\n"
    assert files["log.level"] == "info\n"
