# SPDX-License-Identifier: GPL-2.0-or-later
"""The command lines against a made-up daemon: output, refusals, exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.support import TOP
from tests.support.commandline import all_commands
from zswapd import __version__, config, errors, swapdevice
from zswapd.cli import render, swap, upgrade, zswapctl, zswapd
from zswapd.cli.failures import guarded
from zswapd.config.loader import memory_total
from zswapd.control.server import Server
from zswapd.errors import ControlError, HeadroomError, SwapDeviceError, ZswapdError
from zswapd.host import installation
from zswapd.pages import PAGE_SIZE

MIB = 1 << 20

STATUS: dict[str, Any] = {
    "version": "0.1.0",
    "pid": 4711,
    "worker": {
        "pid": 4712,
        "number": 1,
        "deaths": 0,
        "takeover_s": 0.0,
        "supervised": True,
        "poisoned_requests": 0,
    },
    "uptime_s": 7503.2,
    "state": "serving",
    "mountpoint": "/run/zswapd/mnt",
    "page_size": 4096,
    "discard": True,
    "pool": {
        "compressor": "lz4",
        "stored_pages": 262144,
        "same_filled_pages": 12,
        "incompressible_pages": 33,
        "compressed_bytes": 380 * MIB,
        "frames": 100000,
        "reserve_bytes": 64 * MIB,
        "limit_bytes": 3 << 30,
        "refused": {"compress_poor": 12, "pool_limit_hit": 3, "frozen": 0},
    },
    "backing": None,
    "cache": None,
    "files": [
        {"name": "swap", "size": 4 << 30, "stored_pages": 196608, "object_bytes": 290 * MIB},
        {"name": "second", "size": 1 << 30, "stored_pages": 65536},
    ],
    "protections": [
        {"name": "lock_memory", "on": True, "detail": "4300 MiB mapped as locked", "hint": None},
        {
            "name": "io_flusher",
            "on": False,
            "detail": "not permitted",
            "hint": "run zswapd as root " + "and so on " * 12,
        },
    ],
    "advice": [
        {"name": "vm.page-cluster", "on": False, "detail": "0", "hint": "sysctl vm.page-cluster=3"},
        {"name": "kernel zswap", "on": True, "detail": "off, as it should be", "hint": None},
    ],
}


class FakeDaemon:
    """A control socket with the real Config behind it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.status: dict[str, Any] = json.loads(json.dumps(STATUS))
        self.statistics: dict[str, Any] = {
            "core": {
                "frames": 3,
                "ratio": 2.5,
                "none": None,
                "classes": [{"size": 32, "by_group": [1, 0]}],
            }
        }
        self.config = config.load(codecs=("lz4", "lzo"))
        self.called: list[str] = []
        self.takeovers: Iterator[int] = iter(())
        self._token: trio.lowlevel.TrioToken | None = None
        self._scope = trio.CancelScope()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._run,))

    async def _run(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        handlers: dict[str, Callable[..., object]] = {
            "status": self._status,
            "stats": lambda: self.statistics,
            "get": lambda keys=(): config.describe(self.config, keys),
            "set": self._set,
            "reset": lambda keys: self._note(
                f"reset {keys}", config.describe(self.config, ["pool.limit"])
            ),
            "freeze": lambda: self._note("freeze", {"frozen": True}),
            "thaw": lambda: self._note("thaw", {"frozen": False}),
            "compact": self._compact,
            "pages": self._pages,
            "upgrade": lambda: {"version": "0.1.0", "worker": 4712, "number": 1},
        }
        with self._scope, Server(self.path, handlers) as server:
            async with trio.open_nursery() as nursery:
                await nursery.start(server.serve)
                self._ready.set()

    async def _compact(self, report: Callable[[object], Awaitable[None]]) -> dict[str, int]:
        await report({"frames_freed": 12})
        return {"frames_before": 100, "frames_after": 70}

    async def _pages(
        self, report: Callable[[object], Awaitable[None]], file: str = "swap"
    ) -> dict[str, Any]:
        await report(
            {
                "file": file,
                "pages": [[12, "compressed", "lz4", 1312, 60], [13, "lost", None, 0, None]],
            }
        )
        await report({"file": file, "pages": []})
        await report({"file": file, "pages": [[1048575, "same-filled", None, 8, None]]})
        return {"pages": {"compressed": 1, "lost": 1, "same-filled": 1}}

    def _status(self) -> dict[str, Any]:
        self.status["worker"]["pid"] = pid = next(self.takeovers, self.status["worker"]["pid"])
        self.status["version"] = "0.2.0" if pid == 6000 else "0.1.0"
        return self.status

    def _note(self, what: str, result: object) -> object:
        self.called.append(what)
        return result

    def _set(self, settings: dict[str, object]) -> object:
        self.config = config.changed(self.config, settings, source="zswapctl set")
        return config.describe(self.config, list(settings))

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(10)

    def stop(self) -> None:
        assert self._token is not None
        self._token.run_sync_soon(self._scope.cancel)
        self._thread.join(10)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    daemon = FakeDaemon(tmp_path / "zswapd.sock")
    daemon.start()
    yield daemon
    daemon.stop()


@pytest.fixture(autouse=True)
def _no_loop_devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test here sees, or touches, the machine's own; and SIGTERM is as it was afterwards."""
    monkeypatch.setattr(swapdevice, "find_attached", lambda _: None)
    monkeypatch.setattr(swapdevice, "attach", lambda *_, **__: pytest.fail("not expected"))
    monkeypatch.setattr(swapdevice, "detach", lambda *_, **__: pytest.fail("not expected"))
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def swapped_on(monkeypatch: pytest.MonkeyPatch, *names: str, used: int = 700 * MIB) -> None:
    def find(file: Path) -> swapdevice.Attachment | None:
        if file.name not in names:
            return None
        device = f"/dev/loop{names.index(file.name)}"
        return swapdevice.Attachment(device, file, swapdevice.SwapArea(device, 4 << 30, used, 100))

    monkeypatch.setattr(swapdevice, "find_attached", find)


def ctl(daemon: FakeDaemon, *arguments: str) -> int:
    return zswapctl.main(["--socket", str(daemon.path), *arguments])


# zswapctl: show and change


def test_status_tells_what_is_stored_and_fits_80_columns(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    swapped_on(monkeypatch, "swap")
    assert ctl(daemon, "status") == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "zswapd 0.1.0, pid 4711, serving for 2 h 5 min"
    assert "Stored     1.0 GiB, pages: 262144 (12 same-filled, 33 incompressible)" in lines
    assert "Memory     390.6 MiB, frames: 100000, ratio 2.62, lz4" in lines
    assert "Objects    380.0 MiB, 97.3% of the memory" in lines
    assert "Limit      13% of 3.0 GiB; 64.0 MiB held ready" in lines
    assert "Refused    12 compress_poor, 3 pool_limit_hit" in lines
    assert "swap    4.0 GiB  768.0 MiB  290.0 MiB  /dev/loop0    700.0 MiB       100" in lines
    assert any(line.startswith("second  1.0 GiB  256.0 MiB        0 B  -") for line in lines)
    assert "  on   lock_memory     4300 MiB mapped as locked" in lines
    assert "  OFF  io_flusher      not permitted" in lines
    assert "  OFF  vm.page-cluster 0" in lines
    assert "kernel zswap" not in text


def test_status_of_an_empty_pool_divides_by_nothing(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.status["pool"] |= {
        "stored_pages": 0,
        "frames": 0,
        "compressed_bytes": 0,
        "limit_bytes": 0,
        "refused": {},
    }
    assert ctl(daemon, "status") == 0
    text = capsys.readouterr().out
    assert "Memory     0 B, frames: 0, lz4" in text
    assert "Limit      no limit" in text
    assert "Refused    nothing" in text


def test_status_has_a_line_for_cache_volumes_when_there_are_any(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = {
        "volumes": 0,
        "pages": 0,
        "frames": 0,
        "limit_bytes": 1 << 30,
        "hit_ratio": None,
        "frozen": False,
    }
    daemon.status["cache"] = cache
    assert ctl(daemon, "status") == 0
    assert "Cache" not in capsys.readouterr().out
    cache["volumes"] = 1
    assert ctl(daemon, "status") == 0
    assert (
        "Cache      0 B of 1 volume in 0 B, at most 1.0 GiB; not read yet"
        in capsys.readouterr().out.splitlines()
    )
    cache |= {"volumes": 2, "pages": 2560, "frames": 1024, "hit_ratio": 0.875, "frozen": True}
    assert ctl(daemon, "status") == 0
    text = capsys.readouterr().out
    assert (
        "Cache      10.0 MiB of 2 volumes in 4.0 MiB, at most 1.0 GiB; hits 87.5%, FROZEN"
        in text.splitlines()
    )


def test_daemon_without_a_swap_file_has_nothing_to_swap_on_or_off(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.status["files"] = []
    assert ctl(daemon, "status") == 0
    assert "Swapped out" not in capsys.readouterr().out
    for command in ("swapon", "swapoff"):
        assert ctl(daemon, command) == SwapDeviceError.exit_code
        assert "swap.size is empty" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [("--json", "status"), ("status", "--json")])
def test_status_as_json_has_the_swap_of_each_file(
    daemon: FakeDaemon,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
) -> None:
    swapped_on(monkeypatch, "swap")
    assert ctl(daemon, *arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["files"] == [
        {**STATUS["files"][0], "device": "/dev/loop0", "swapped_out": 700 * MIB, "priority": 100},
        {**STATUS["files"][1], "device": None, "swapped_out": None, "priority": None},
    ]
    assert {name: value for name, value in report.items() if name != "files"} == {
        name: value for name, value in STATUS.items() if name != "files"
    }


def test_stats_are_one_counter_a_line_and_tables(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ctl(daemon, "stats") == 0
    assert capsys.readouterr().out.splitlines() == [
        "core.frames 3",
        "core.ratio 2.5",
        "core.none -",
        "",
        "core.classes:",
        "  size  by_group",
        "    32       1 0",
        "",
    ]


def test_get_shows_settings_as_a_config_file_has_them(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        ctl(
            daemon,
            "get",
            "pool.checksum",
            "pool.limit",
            "log.level",
            "memory.reserve",
            "swap.files",
        )
        == 0
    )
    assert capsys.readouterr().out.splitlines() == [
        "pool.checksum = true  # default",
        'pool.limit = ""  # default',
        'log.level = "info"  # default',
        "memory.reserve = 16777216  # 16.0 MiB, default",
        "swap.files = {}  # default",
    ]
    assert ctl(daemon, "get") == 0
    assert len(capsys.readouterr().out.splitlines()) == len(config.SETTINGS)


def test_set_changes_all_or_nothing(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    assert ctl(daemon, "set", "pool.compressor=lzo", "pool.checksum=off") == 0
    assert capsys.readouterr().out.splitlines() == [
        'pool.compressor = "lzo"  # zswapctl set',
        "pool.checksum = false  # zswapctl set",
    ]
    assert (
        ctl(daemon, "set", "pool.compressor=lz4", "pool.checksum=maybe")
        == errors.ConfigError.exit_code
    )
    assert 'pool.checksum is "maybe"' in capsys.readouterr().err
    assert daemon.config.pool.compressor == "lzo"
    assert ctl(daemon, "set", "pool.compressor") == errors.ConfigError.exit_code
    assert "is not an assignment" in capsys.readouterr().err


def test_reset_needs_names_or_all(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    assert ctl(daemon, "reset", "pool.limit", "log.level") == ctl(daemon, "reset", "--all") == 0
    assert daemon.called == ["reset ['pool.limit', 'log.level']", "reset []"]
    assert capsys.readouterr().out.splitlines()[0].startswith("pool.limit = ")
    assert (
        ctl(daemon, "reset")
        == ctl(daemon, "reset", "--all", "log.level")
        == errors.ConfigError.exit_code
    )
    assert len(daemon.called) == 2


def test_freeze_thaw_and_compact_say_what_they_did(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ctl(daemon, "freeze") == 0
    assert "frozen" in capsys.readouterr().out
    assert ctl(daemon, "thaw", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"frozen": False}
    assert ctl(daemon, "compact") == 0
    assert capsys.readouterr().out == "30 of 100 frames freed, 70 in use\n"
    assert daemon.called == ["freeze", "thaw"]


def test_pages_are_told_one_by_one_and_counted(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ctl(daemon, "pages", "second") == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split() for line in lines] == [
        ["File", "Page", "State", "Codec", "Bytes", "Unused", "s"],
        ["second", "12", "compressed", "lz4", "1312", "60"],
        ["second", "13", "lost", "-", "0", "-"],
        ["second", "1048575", "same-filled", "-", "8", "-"],
        ["3", "pages:", "1", "compressed,", "1", "lost,", "1", "same-filled"],
    ]
    assert ctl(daemon, "pages", "--json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == {
        "file": "swap",
        "page": 12,
        "state": "compressed",
        "codec": "lz4",
        "bytes": 1312,
        "age_s": 60,
    }
    assert [row["page"] for row in rows[:-1]] == [12, 13, 1048575]
    assert rows[-1] == {"pages": {"compressed": 1, "lost": 1, "same-filled": 1}}


def test_what_takes_long_says_how_far_it_is_to_a_person_only(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ctl(daemon, "compact") == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert ctl(daemon, "compact", "--json") == 0
    assert capsys.readouterr().err == ""
    assert ctl(daemon, "compact") == 0
    assert capsys.readouterr().err == "\r\x1b[Kframes freed: 12\r"


ARGUMENTS = {
    "set": ["pool.limit=1G"],
    "reset": ["--all"],
    "shrink": ["1"],
    "cache add": ["disk", "--backing", "/dev/null"],
    **{f"files {name}": ["guest", "--size", "1G"] for name in ("add", "resize")},
    "files remove": ["guest"],
    **{f"cache {name}": ["disk"] for name in ("remove", "invalidate", "resize")},
}
"""What commands need to be given."""


@pytest.mark.parametrize("words", list(all_commands(zswapctl.make_parser())), ids=" ".join)
def test_what_goes_wrong_is_an_object_with_json(
    words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--socket", str(tmp_path / "none"), *words, *ARGUMENTS.get(" ".join(words), [])]
    assert zswapctl.main(arguments) == ControlError.exit_code
    assert capsys.readouterr().out == ""
    assert zswapctl.main([*arguments, "--json"]) == ControlError.exit_code
    captured = capsys.readouterr()
    error = json.loads(captured.out)["error"]
    assert error == {
        "message": error["message"],
        "hint": error["hint"],
        "exit_code": ControlError.exit_code,
    }
    assert error["message"].startswith("zswapd does not run")
    assert f"zswapctl: error: {error['message']}\nzswapctl: hint: {error['hint']}\n" == captured.err


def test_without_a_daemon_every_command_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["status"], ["swapon"], ["swapoff"], ["get"], ["compact"]):
        assert (
            zswapctl.main(["--socket", str(tmp_path / "none"), *command])
            == errors.ControlError.exit_code
        )
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.splitlines() == [
            f"zswapctl: error: zswapd does not run: there is no listener at {tmp_path}/none",
            (
                f"zswapctl: hint: start it with {installation.found().start()}, or name its socket"
                " with --socket"
            ),
        ]


# zswapctl: swapon and swapoff


def fake_attach(
    monkeypatch: pytest.MonkeyPatch, *warnings: str
) -> list[tuple[Path, dict[str, Any]]]:
    calls: list[tuple[Path, dict[str, Any]]] = []

    def attach(file: Path, **options: Any) -> swapdevice.Attached:
        calls.append((file, options))
        return swapdevice.Attached(
            "/dev/loop5", 4 << 30, discard=options["discard"], warnings=warnings
        )

    monkeypatch.setattr(swapdevice, "attach", attach)
    return calls


def test_swapon_uses_the_daemons_settings(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fake_attach(monkeypatch, "it is slow")
    assert ctl(daemon, "swapon") == 0
    assert calls == [
        (Path("/run/zswapd/mnt/swap"), {"priority": 100, "discard": True, "page_size": 4096})
    ]
    captured = capsys.readouterr()
    assert (
        captured.out
        == "/run/zswapd/mnt/swap is swapped on as /dev/loop5: 4.0 GiB, priority 100, with discard\n"
    )
    warnings = captured.err.splitlines()
    assert warnings[0].startswith(
        "zswapctl: warning: io_flusher: not permitted (run zswapd as root"
    )
    assert warnings[1] == "zswapctl: warning: vm.page-cluster: 0 (sysctl vm.page-cluster=3)"
    assert warnings[2] == "zswapctl: warning: it is slow"
    assert len(warnings) == 3


def test_swapon_takes_name_priority_and_no_discard(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fake_attach(monkeypatch)
    assert ctl(daemon, "swapon", "second", "--priority", "7", "--no-discard", "--json") == 0
    assert calls == [
        (Path("/run/zswapd/mnt/second"), {"priority": 7, "discard": False, "page_size": 4096})
    ]
    captured = capsys.readouterr()
    assert json.loads(captured.out)["swapped_on"] == [
        {
            "file": "/run/zswapd/mnt/second",
            "device": "/dev/loop5",
            "size": 4 << 30,
            "priority": 7,
            "discard": False,
        }
    ]
    assert captured.err == ""


def test_swapon_where_the_kernel_keeps_too_little_free_is_refused_unless_forced(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fake_attach(monkeypatch)
    hint = "sysctl vm.min_free_kbytes=16384"
    daemon.status["advice"] = [
        {"name": "vm.min_free_kbytes", "on": False, "detail": "2048", "hint": hint}
    ]
    assert ctl(daemon, "swapon") == errors.ProtectionError.exit_code
    text = capsys.readouterr().err
    assert "too little memory free for its own part of swapping (2048)" in text
    assert f"{hint}; --force swaps on anyway" in text
    assert calls == []
    assert ctl(daemon, "swapon", "--force") == 0
    assert hint in capsys.readouterr().err  # as a warning


def test_swapon_below_a_limit_that_makes_the_daemon_swap_is_refused_unless_forced(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = {
        "name": "memory_limit",
        "on": False,
        "detail": "1.0 GiB (/c/memory.max)",
        "hint": "echo 0 > /c/memory.swap.max",
    }
    daemon.status["protections"].append(limit)
    assert ctl(daemon, "swapon") == errors.ProtectionError.exit_code
    text = capsys.readouterr().err
    assert "wait for its own swap device (1.0 GiB (/c/memory.max))" in text
    assert "echo 0 > /c/memory.swap.max; --force swaps on anyway" in text
    calls = fake_attach(monkeypatch)
    assert ctl(daemon, "swapon", "--force") == 0
    assert len(calls) == 1


def test_status_names_the_limit_of_a_cgroup(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.status["memory_limit"] = {
        "limit_bytes": 1 << 30,
        "left_bytes": 1 << 28,
        "file": "/sys/fs/cgroup/a/memory.max",
    }
    assert ctl(daemon, "status") == 0
    line = "Bounded    by 1.0 GiB in /sys/fs/cgroup/a/memory.max, 256.0 MiB left of them"
    assert line in capsys.readouterr().out.splitlines()


def test_swapon_to_memory_that_is_not_locked_is_refused_unless_forced(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon.status["protections"][0] |= {
        "on": False,
        "detail": "mlockall: no",
        "hint": "run zswapd as root",
    }
    assert ctl(daemon, "swapon") == errors.ProtectionError.exit_code
    text = capsys.readouterr().err
    assert "not locked (mlockall: no)" in text
    assert "run zswapd as root; --force swaps on anyway" in text
    calls = fake_attach(monkeypatch)
    assert ctl(daemon, "swapon", "--force") == 0
    assert len(calls) == 1
    assert "lock_memory: mlockall: no" in capsys.readouterr().err


def test_swapon_all_takes_what_is_off_and_swapoff_all_what_is_on(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fake_attach(monkeypatch)
    on: set[str] = {"second"}
    area = swapdevice.SwapArea("/dev/loop5", 4 << 30, 0, 100)

    def find(path: Path, *_: object) -> swapdevice.Attachment | None:
        return swapdevice.Attachment("/dev/loop5", path, area) if path.name in on else None

    gone: list[Path] = []
    monkeypatch.setattr(swapdevice, "find_attached", find)
    monkeypatch.setattr(swapdevice, "detach", lambda *files, **_: gone.extend(files) or [])
    assert ctl(daemon, "swapon", "--all") == 0
    assert [path.name for path, _ in calls] == ["swap"]
    assert ctl(daemon, "swapoff", "--all") == 0
    assert [path.name for path in gone] == ["second"]

    on |= {"swap"}
    assert ctl(daemon, "swapon", "--all") == 0
    assert len(calls) == 1
    on.clear()
    assert ctl(daemon, "swapoff", "--all") == 0
    assert len(gone) == 1
    assert ctl(daemon, "swapoff") == errors.SwapDeviceError.exit_code


def test_swapon_tunes_first_when_asked_to(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    low = {
        "name": "vm.min_free_kbytes",
        "on": False,
        "detail": "2048",
        "hint": "sysctl vm.min_free_kbytes=16384",
    }
    daemon.status["advice"] = [low]
    monkeypatch.setattr("zswapd.system.advice.raise_min_free_kbytes", lambda: low.update(on=True))
    calls = fake_attach(monkeypatch)
    assert ctl(daemon, "swapon") == errors.ProtectionError.exit_code
    assert ctl(daemon, "swapon", "--tune") == 0
    assert len(calls) == 1


def test_swapon_while_the_daemon_stops_is_refused(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon.status["state"] = "stopping"
    calls = fake_attach(monkeypatch)
    for force in ([], ["--force"]):
        assert ctl(daemon, "swapon", *force) == errors.SwapDeviceError.exit_code
        assert "the daemon is stopping" in capsys.readouterr().err
    assert calls == []


@pytest.mark.parametrize(
    "failure", [SwapDeviceError("second is in use", hint="look"), KeyboardInterrupt()]
)
def test_swapon_of_several_files_is_all_or_nothing(
    daemon: FakeDaemon,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    failure: BaseException,
) -> None:
    on: list[Path] = []

    def attach(file: Path, **_: Any) -> swapdevice.Attached:
        if file.name == "second":
            raise failure
        on.append(file)
        return swapdevice.Attached("/dev/loop5", 4 << 30, discard=True, warnings=())

    def detach(*files: Path) -> list[str]:
        for file in files:
            on.remove(file)
        return []

    def stuck(*_: Path) -> list[str]:
        raise HeadroomError("does not fit")

    monkeypatch.setattr(swapdevice, "attach", attach)
    monkeypatch.setattr(swapdevice, "detach", detach)
    assert ctl(daemon, "swapon", "swap", "second") != 0
    assert on == []
    text = capsys.readouterr().err
    assert "stays" not in text
    assert (
        isinstance(failure, KeyboardInterrupt) or "second is in use\nzswapctl: hint: look" in text
    )

    monkeypatch.setattr(swapdevice, "detach", stuck)
    assert ctl(daemon, "swapon", "swap", "second") == errors.SwapDeviceError.exit_code
    assert (
        "swap was swapped on before and cannot be swapped off: does not fit"
        in capsys.readouterr().err
    )


def test_swapon_of_an_unknown_file_names_those_there_are(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ctl(daemon, "swapon", "swap", "third") == errors.SwapDeviceError.exit_code
    assert (
        "no swap file 'third'\nzswapctl: hint: there are: swap, second\n" in capsys.readouterr().err
    )


@pytest.mark.parametrize("priority", ["-1", "32768", "high", "1.5"])
def test_swapon_with_a_bad_priority_is_a_usage_error(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str], priority: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        ctl(daemon, "swapon", f"--priority={priority}")
    assert caught.value.code == 2
    assert "from 0 to 32767" in capsys.readouterr().err


def fake_detach(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[Path, ...], dict[str, Any]]]:
    calls: list[tuple[tuple[Path, ...], dict[str, Any]]] = []

    def detach(
        *files: Path, progress: Callable[[str, int, int], None], **options: Any
    ) -> list[str]:
        calls.append((files, options))
        for left in (100 * MIB, 50 * MIB, 0):
            progress("/dev/loop0", left, 100 * MIB)
        return [f"/dev/loop{number}" for number in range(len(files))]

    monkeypatch.setattr(swapdevice, "detach", detach)
    return calls


def test_swapoff_without_a_name_takes_all_that_are_on(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    swapped_on(monkeypatch, "swap", "second")
    calls = fake_detach(monkeypatch)
    assert ctl(daemon, "swapoff") == 0
    files = (Path("/run/zswapd/mnt/swap"), Path("/run/zswapd/mnt/second"))
    assert calls == [(files, {"force": False, "pool_bytes": 100000 * 4096})]
    assert capsys.readouterr().out.splitlines() == [
        "/dev/loop0 is swapped off and detached",
        "/dev/loop1 is swapped off and detached",
    ]


def test_swapoff_of_one_file_counts_its_share_of_the_pool(
    daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    swapped_on(monkeypatch, "swap", "second")
    calls = fake_detach(monkeypatch)
    assert ctl(daemon, "swapoff", "second", "--force") == 0
    assert calls == [
        ((Path("/run/zswapd/mnt/second"),), {"force": True, "pool_bytes": 100000 * 4096 // 4})
    ]


@pytest.mark.parametrize(
    ("names", "message"),
    [((), "swap, second"), (("second",), "second"), (("swap", "second"), "second")],
)
def test_swapoff_of_what_is_not_on_is_refused(
    daemon: FakeDaemon,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    names: tuple[str, ...],
    message: str,
) -> None:
    if len(names) == 2:
        swapped_on(monkeypatch, "swap")
    assert ctl(daemon, "swapoff", *names) == errors.SwapDeviceError.exit_code
    assert f"not swapped on: {message}\n" in capsys.readouterr().err


def test_swapoff_that_does_not_fit_has_its_own_exit_code(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Path, **__: object) -> list[str]:
        raise HeadroomError("too much", hint="end something")

    swapped_on(monkeypatch, "swap")
    monkeypatch.setattr(swapdevice, "detach", refuse)
    assert ctl(daemon, "swapoff") == errors.HeadroomError.exit_code
    assert capsys.readouterr().err == "zswapctl: error: too much\nzswapctl: hint: end something\n"


def test_status_tells_of_workers_only_what_is_unusual(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    swapped_on(monkeypatch)
    ctl(daemon, "status")
    assert "worker" not in capsys.readouterr().out
    daemon.status["worker"] = {
        "pid": 5000,
        "number": 4,
        "deaths": 2,
        "takeover_s": 0.314,
        "supervised": False,
        "poisoned_requests": 1,
    }
    ctl(daemon, "status")
    text = capsys.readouterr().out
    assert "served by worker 4, which took over in 0.31 s; 2 died before it" in text
    assert "1 requests were answered with EIO" in text
    assert "WITHOUT a supervisor" in text


def test_upgrade_waits_for_the_next_worker(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upgrade, "_PAUSE_S", 0.01)
    daemon.takeovers = iter([4712, 4712, 6000])
    assert ctl(daemon, "upgrade") == 0
    assert re.search(
        r"zswapd 0\.1\.0 was replaced by 0\.2\.0 in \d\.\d s; worker 6000 serves",
        capsys.readouterr().out,
    )


def test_upgrade_that_does_not_happen_is_a_failure(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upgrade, "TAKEOVER_S", 0.2)
    assert ctl(daemon, "upgrade") == errors.HandoverError.exit_code
    assert "the upgrade has failed" in capsys.readouterr().err


def test_progress_is_one_moving_line_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    show = swap.SwapoffProgress(quiet=False)
    show.update("/dev/loop12", 1023 * MIB, 4096 * MIB)
    show.close()
    text = capsys.readouterr().err
    assert text.startswith(
        "\r\x1b[K[##################......] /dev/loop12  1023.0 MiB of 4.0 GiB left, "
    )
    assert text.endswith("/s\n")
    assert len(text) < 90  # 80 columns, the line end and what clears the line


def test_progress_elsewhere_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("zswapd.cli.swap.time.monotonic", lambda: now[0])
    show = swap.SwapoffProgress(quiet=False)
    for left in range(10, 0, -1):
        now[0] += 0.5
        show.update("/dev/loop0", left * MIB, 10 * MIB)
    show.close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0] == "/dev/loop0  7.0 MiB of 10.0 MiB left, 1.5 MiB/s"


def test_quiet_progress_and_empty_swap_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    swap.SwapoffProgress(quiet=True).update("/dev/loop0", 1, 2)
    swap.SwapoffProgress(quiet=False).update("/dev/loop0", 0, 0)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.9, "0 s"), (59, "59 s"), (192, "3 min 12 s"), (7500, "2 h 5 min"), (90000, "1 d 1 h")],
)
def test_duration_has_two_units_at_most(seconds: float, text: str) -> None:
    assert render.duration(seconds) == text


# zswapd


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[config.Config]:
    """What the daemon was run with."""
    seen: list[config.Config] = []

    def run(
        configure: Callable[[], config.Config], _guarded: Callable[[Callable[[], int]], int]
    ) -> int:
        seen.append(configure())
        return 0

    monkeypatch.setattr("zswapd.supervisor.run", run)
    monkeypatch.setattr("zswapd.log.setup", lambda _: None)
    # standard error is a test's here
    monkeypatch.setattr("zswapd.cli.standard_files.never_wait", lambda: None)
    return seen


def test_run_builds_the_config_from_its_options(ran: list[config.Config], tmp_path: Path) -> None:
    file = tmp_path / "z.toml"
    file.write_text("[swap]\npriority = 3\nsize = '1G'\n")
    command = ["run", "--config", str(file), "--size", "64M", "--mountpoint", "relative/dir"]
    assert zswapd.main([*command, "--set", "pool.compressor=lzo", "--set", "swap.files.x=1G"]) == 0
    (loaded,) = ran
    assert (loaded.swap.priority, loaded.swap.size, loaded.pool.compressor) == (3, 64 * MIB, "lzo")
    assert loaded.fuse.mountpoint == Path.cwd() / "relative/dir"
    assert loaded.swap.files == {"x": 1 << 30}
    assert config.describe(loaded, ["swap.size"])["swap.size"]["origin"] == "--size"


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["--size", "0"], '--size: swap.size is "0"; it is 0 bytes', "2G"),
        (["--size", "1000000"], "not a multiple of the page", "write 999424 or 1003520"),
        (["--set", "pool.compressor=zip"], '"zip", which is not known', "write lz4"),
        (
            ["--set", "pool.compresor=lzo"],
            "unknown setting pool.compresor",
            "did you mean pool.compressor?",
        ),
        (["--set", "nonsense"], "is not an assignment", "section.key=value"),
        (["--config", "/nonexistent.toml"], "cannot read /nonexistent.toml", "--config"),
    ],
)
def test_run_refuses_a_users_mistake_in_two_lines(
    ran: list[config.Config],
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
    hint: str,
) -> None:
    assert zswapd.main(["run", *arguments]) == errors.ConfigError.exit_code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("zswapd: error: ")
    assert message in lines[0]
    assert lines[1].startswith("zswapd: hint: ")
    assert hint in lines[1]
    assert ran == []


def test_run_help_lists_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        zswapd.main(["run", "--help"])
    text = capsys.readouterr().out
    assert all(f"  {dest} = " in text for dest in config.SETTINGS)
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("program", ["zswapd", "zswapctl"])
def test_version_and_help_of_the_real_programs(program: str) -> None:
    call = f"import sys; from zswapd.cli.{program} import main; sys.exit(main())"

    def run(*arguments: str) -> str:
        command = [sys.executable, "-c", call, *arguments]
        return subprocess.run(
            command, cwd=TOP, check=True, capture_output=True, text=True, timeout=30
        ).stdout

    assert run("--version") == f"{program} {__version__}\n"
    assert "COMMAND" in run("--help")


def test_status_imports_next_to_nothing(daemon: FakeDaemon) -> None:
    code = (
        "import sys; from zswapd.cli import zswapctl; zswapctl.main(['--socket',"
        f" {str(daemon.path)!r}, 'status', '--json']); print(sorted(name for name in sys.modules if"
        " '.' not in name or name.startswith('zswapd')), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=TOP,
        check=True,
        capture_output=True,
        text=True,
        timeout=30,
    )
    imported = set(json.loads(done.stderr.replace("'", '"')))
    assert json.loads(done.stdout)["state"] == "serving"
    # Each of these costs some 5 ms or more, of 60 in all.
    heavy = {
        "trio",
        "pyfuse3",
        "lz4",
        "dataclasses",
        "subprocess",
        "ctypes",
        "curses",
        "difflib",
        "zswapd.config",
    }
    assert not imported & heavy
    assert "zswapd.swapdevice.state" in imported
    assert "zswapd.swapdevice.swapon" not in imported


# How commands end


def fails(error: BaseException) -> Callable[[], int]:
    def command() -> int:
        raise error

    return command


def test_a_failure_is_two_lines_and_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded("prog", fails(HeadroomError("too much", hint="less"))) == HeadroomError.exit_code
    assert capsys.readouterr().err == "prog: error: too much\nprog: hint: less\n"
    assert guarded("prog", fails(ZswapdError("odd"))) == 1
    assert capsys.readouterr().err == "prog: error: odd\n"


def test_a_failure_out_of_nurseries_is_a_failure_too(capsys: pytest.CaptureFixture[str]) -> None:
    group = BaseExceptionGroup("outer", [ExceptionGroup("inner", [SwapDeviceError("busy")])])
    assert guarded("prog", fails(group)) == SwapDeviceError.exit_code
    assert capsys.readouterr().err == "prog: error: busy\n"


@pytest.mark.parametrize(
    "bug", [KeyError("x"), ExceptionGroup("g", [SwapDeviceError("busy"), KeyError("x")])]
)
def test_a_bug_keeps_its_traceback(bug: Exception) -> None:
    with pytest.raises(type(bug)):
        guarded("prog", fails(bug))


def test_an_interrupt_ends_as_a_shell_has_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded("prog", fails(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "prog: interrupted\n"


def test_a_reader_that_has_seen_enough_is_no_failure(daemon: FakeDaemon) -> None:
    call = "import sys; from zswapd.cli.zswapctl import main; sys.exit(main())"
    command = [sys.executable, "-c", call, "--socket", str(daemon.path), "get"]
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(
        command, cwd=TOP, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


# Command lines that are not right


@pytest.mark.parametrize("program", ["zswapctl", "zswapd"])
@pytest.mark.parametrize("json_", [False, True])
def test_a_wrong_command_line_is_two_lines_and_with_json_an_object(
    capsys: pytest.CaptureFixture[str], program: str, json_: bool
) -> None:
    main = {"zswapctl": zswapctl.main, "zswapd": zswapd.main}[program]
    with pytest.raises(SystemExit) as caught:
        main(["bogus", *(["--json"] if json_ else [])])
    assert caught.value.code == errors.UsageError.exit_code == 2
    captured = capsys.readouterr()
    first, second = captured.err.splitlines()
    assert first == f"{program}: error: unknown command 'bogus'"
    assert second.startswith(f"{program}: hint: ")
    if json_:
        error = json.loads(captured.out)["error"]
        assert error == {
            "message": "unknown command 'bogus'",
            "hint": error["hint"],
            "exit_code": 2,
        }
    else:
        assert captured.out == ""


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (
            ["statsu"],
            "unknown command 'statsu'",
            "did you mean `zswapctl stats` or `zswapctl status`?",
        ),
        (["SwapOn"], "unknown command 'SwapOn'", "did you mean `zswapctl swapon`"),
        (["swap-on"], "unknown command 'swap-on'", "did you mean `zswapctl swapon`"),
        (["xyzzy"], "unknown command 'xyzzy'", "commands are: status, stats, top"),
        (["cache", "ad", "x"], "unknown command 'ad'", "did you mean `zswapctl cache add`?"),
        (["cache"], "required: COMMAND", "`zswapctl cache --help`"),
        ([], "required: COMMAND", "`zswapctl --help`"),
        (["swapon", "--priorityy", "5"], "unknown option --priorityy", "did you mean --priority?"),
        (["swapon", "--priorityy=5"], "unknown option --priorityy", "did you mean --priority?"),
        (["status", "--jsno"], "unknown option --jsno", "did you mean --json?"),
        (
            ["cache", "add", "x", "--baking", "/y", "--backing", "/z"],
            "unknown option --baking",
            "did you mean --backing?",
        ),
        (
            ["cache", "add", "x", "--backing", "/z", "--mode", "write-through"],
            "--mode cannot be",
            "did you mean writethrough?",
        ),
        (
            ["cache", "add", "x", "--backing", "/z", "--mode", "q"],
            "--mode cannot be 'q'",
            "one of: ro, writethrough",
        ),
        (["freeze", "swap"], "unexpected argument 'swap'", "`zswapctl freeze --help`"),
        (["set"], "required: SECTION.KEY=VALUE", "`zswapctl set --help`"),
        (["shrink", "much"], "write a number of pages, or a size: 64M", "`zswapctl shrink --help`"),
        (["shrink", "64X"], "unknown unit 'X'", "`zswapctl shrink --help`"),
        (["shrink", "0M"], "0 bytes", "`zswapctl shrink --help`"),
    ],
)
def test_a_wrong_command_line_says_what_was_meant(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str, hint: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        zswapctl.main(words)
    assert caught.value.code == 2
    first, second = capsys.readouterr().err.splitlines()
    assert message in first
    assert hint in second


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["rnu"], "did you mean `zswapd run`?"),
        (["config", "chekk"], "did you mean `zswapd config check`?"),
        (["run", "--siez", "1G"], "did you mean --size?"),
        (["run", "--mount", "x", "--hook"], "`zswapd run --help`"),
    ],
)
def test_the_daemons_wrong_command_line_says_what_was_meant(
    capsys: pytest.CaptureFixture[str], words: list[str], hint: str
) -> None:
    with pytest.raises(SystemExit):
        zswapd.main(words)
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "frames"),
    [
        ("5", 5),
        ("0", 0),
        ("4097", 4097),
        ("4K", 1),
        ("1.5K", 1),
        ("5K", 2),
        ("64M", 16384),
        ("64MiB", 16384),
        ("min(64M, 1G)", 16384),
    ],
)
@pytest.mark.skipif(PAGE_SIZE != 4096, reason="the numbers are for pages of 4 KiB")
def test_amounts_are_pages_or_sizes(text: str, frames: int) -> None:
    assert zswapctl.make_parser().parse_args(["shrink", text]).amount == frames
    assert zswapctl.make_parser().parse_args(["writeback", "--pages", text]).pages == frames
    share = zswapctl.make_parser().parse_args(["shrink", "5%"]).amount
    assert share == -(-(memory_total() * 5 // 100) // PAGE_SIZE)


def test_marking_pages_and_sending_some_are_two_commands(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    for option in (["--pages", "5"], ["--idle", "9"], ["--incompressible"]):
        assert ctl(daemon, "writeback", "--mark-idle", *option) == errors.UsageError.exit_code
        assert "second `zswapctl writeback`" in capsys.readouterr().err
    assert not daemon.called


@pytest.mark.parametrize("command", ["swapon", "swapoff"])
def test_an_unknown_swap_file_is_one_cause_with_one_code(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert ctl(daemon, command, "secondd") == errors.SwapDeviceError.exit_code
    text = capsys.readouterr().err
    assert "error: there is no swap file 'secondd'" in text
    assert "hint: did you mean second? there are: swap, second" in text


def test_a_limit_that_another_setting_bounds_says_what_counts(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ctl(daemon, "set", "pool.limit=90%") == 0
    total = memory_total()
    percent = render.format_size(total * 75 // 100 // PAGE_SIZE * PAGE_SIZE)
    assert f"# {percent} counts, " in capsys.readouterr().out
    assert ctl(daemon, "set", "pool.limit=50%") == 0
    assert "counts" not in capsys.readouterr().out
    assert "all," not in config.SETTINGS["pool.limit"].help


def test_a_service_manager_is_held_up_with_a_command_line_that_is_not_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It may have pages to keep, so it is not told to give up; it would try ten times a second."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    for arguments in (["run", "--sizes", "1G"], ["--version"]):
        with pytest.raises(SystemExit):
            zswapd.main(arguments)
    assert slept == []
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere")
    with pytest.raises(SystemExit):
        zswapd.main(["--version"])
    assert slept == []
    with pytest.raises(SystemExit) as caught:
        zswapd.main(["run", "--sizes", "1G"])
    assert caught.value.code == 2
    assert slept == [zswapd.AGAIN_S]
