# SPDX-License-Identifier: GPL-2.0-or-later
"""Notices to systemd, and the protections: on fake systems for every outcome, and once for real."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import capabilities
from zswapd import system as system_module
from zswapd.errors import PermissionsError
from zswapd.system import Notifier, Protection, protections

ALL_CAPABILITIES = "000001ffffffffff"


class FakeLibc:
    """A libc without mallopt, whose system calls fail with the errno that the test chose."""

    def __init__(self, *, mlockall: int = 0, prctl: int = 0) -> None:
        self.errors = {"mlockall": mlockall, "prctl": prctl}
        self.calls: list[tuple[object, ...]] = []

    def _result(self, name: str, *arguments: object) -> int:
        self.calls.append((name, *arguments))
        ctypes.set_errno(self.errors.get(name, 0))
        return -1 if self.errors.get(name) else 0

    def mlockall(self, flags: int) -> int:
        return self._result("mlockall", flags)

    def prctl(self, *arguments: int) -> int:
        return self._result("prctl", *arguments)

    def madvise(self, address: ctypes.c_void_p, length: ctypes.c_size_t, advice: int) -> int:
        return self._result("madvise", address.value, length.value, advice)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    proc = tmp_path / "proc/self"
    (proc / "task/1").mkdir(parents=True)
    (proc / "status").write_text(
        f"VmLck:\t 9977000 kB\nVmRSS:\t  77000 kB\nCapEff:\t{ALL_CAPABILITIES}\n"
    )
    (proc / "oom_score_adj").write_text("0\n")
    (proc / "maps").write_text(
        "55d000-55e000 r--p 00000000 fe:00 11 /usr/bin/python3.11\n"
        "55e000-560000 r-xp 00001000 fe:00 11 /usr/bin/python3.11\n"
        "560000-561000 rw-p 00003000 fe:00 11 /usr/bin/python3.11\n"
        "7f0000-7f1000 r-xp 00000000 00:00 0 [vdso]\n"
        "7f2000-7f3000 rw-s 00000000 00:01 7 /memfd:arena (deleted)\n"
    )
    return tmp_path


def protect(
    root: Path, libc: FakeLibc, monkeypatch: pytest.MonkeyPatch, **asked: bool | int
) -> dict[str, Protection]:
    monkeypatch.setattr("zswapd.system.protections.ctypes.CDLL", lambda *_, **__: libc)
    wanted: dict[str, bool | int] = {"lock_memory": True, "oom_score_adj": -1000, **asked}
    found = protections.protect(**wanted, python_heap=1 << 20, root=root)  # type: ignore[arg-type]
    return {item.name: item for item in found}


def test_protect_where_all_is_allowed_is_all_on(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    libc = FakeLibc()
    found = protect(root, libc, monkeypatch)
    assert {name for name, item in found.items() if item.on} == {
        "lock_memory", "io_flusher", "oom_score_adj", "no_core_dumps", "memory_limit",
    }  # fmt: skip
    assert ("mlockall", 7) in libc.calls
    assert ("prctl", 57, 1, 0, 0, 0) in libc.calls
    assert ("prctl", 4, 0, 0, 0, 0) in libc.calls
    assert resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)
    assert "75 MiB" in found["lock_memory"].detail
    assert (root / "proc/self/oom_score_adj").read_text() == "-1000\n"


def test_protect_faults_in_code_and_constants_only(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    libc = FakeLibc()
    protect(root, libc, monkeypatch)
    assert [call[1:] for call in libc.calls if call[0] == "madvise" and call[3] != 16] == [
        (0x55D000, 0x1000, 22),
        (0x55E000, 0x2000, 22),
    ]


def test_protect_before_swap_is_served_faults_no_code_in(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    libc = FakeLibc()
    assert protect(root, libc, monkeypatch, populates_code=False)["lock_memory"].on
    assert ("mlockall", 7) in libc.calls
    assert not [call for call in libc.calls if call[0] == "madvise" and call[3] != 16]


def test_protect_with_all_switched_off_keeps_what_is_no_setting(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    libc = FakeLibc()
    found = protect(root, libc, monkeypatch, lock_memory=False, oom_score_adj=0)
    assert not found["lock_memory"].on
    assert found["lock_memory"].hint == "set service.lock_memory=true"
    assert found["oom_score_adj"].on
    # The kernel makes no dump, and no other program's dump has the one private mapping.
    assert libc.calls == [
        ("prctl", 57, 1, 0, 0, 0),
        ("prctl", 4, 0, 0, 0, 0),
        ("madvise", 0x560000, 0x1000, 16),
    ]


def test_the_kernel_dumps_no_protected_process_and_its_memory_is_marked() -> None:
    pid = os.fork()
    if not pid:
        code = 1
        try:
            protections.protect(
                lock_memory=False, oom_score_adj=0, libc_heap=1 << 20, python_heap=1 << 20
            )
            heap = (
                Path("/proc/self/smaps")
                .read_text()
                .partition("[heap]")[2]
                .partition("VmFlags:")[2]
                .splitlines()[0]
            )
            is_dumpable = ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)
            code = (
                0
                if is_dumpable == 0
                and "dd" in heap.split()
                and resource.getrlimit(resource.RLIMIT_CORE)[0] == 0
                else 2
            )
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize(
    ("error", "detail", "hint"),
    [
        (errno.EPERM, "not permitted", "CAP_SYS_RESOURCE"),
        (errno.EINVAL, "kernel does not have it", "Linux 5.6"),
        (errno.EIO, "Input/output error", "CAP_SYS_RESOURCE"),
    ],
)
def test_io_flusher_refused_is_off_with_the_reason(
    root: Path, monkeypatch: pytest.MonkeyPatch, error: int, detail: str, hint: str
) -> None:
    item = protect(root, FakeLibc(prctl=error), monkeypatch)["io_flusher"]
    assert not item.on
    assert detail in item.detail
    assert hint in (item.hint or "")


def test_io_flusher_after_threads_exist_is_off(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "proc/self/task/2").mkdir()
    item = protect(root, FakeLibc(), monkeypatch)["io_flusher"]
    assert not item.on
    assert "2 threads" in item.detail


def test_lock_memory_refused_is_off_with_the_reason(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = protect(root, FakeLibc(mlockall=errno.ENOMEM), monkeypatch)["lock_memory"]
    assert not item.on
    assert "Cannot allocate memory" in item.detail


def test_lock_memory_that_locks_nothing_is_off(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "proc/self/status").write_text(f"VmLck:\t0 kB\nCapEff:\t{ALL_CAPABILITIES}\n")
    assert not protect(root, FakeLibc(), monkeypatch)["lock_memory"].on


@pytest.mark.parametrize(("hard", "on"), [(resource.RLIM_INFINITY, True), (8 << 20, False)])
def test_lock_memory_without_the_capability_needs_an_infinite_limit(
    root: Path, monkeypatch: pytest.MonkeyPatch, hard: int, on: bool
) -> None:
    (root / "proc/self/status").write_text("VmLck:\t77000 kB\nCapEff:\t0000000000000000\n")
    limit = [(64 << 10, hard)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limit[0])
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: limit.__setitem__(0, new))
    libc = FakeLibc()
    item = protect(root, libc, monkeypatch)["lock_memory"]
    assert item.on is on
    assert (
        ("mlockall", 7) in libc.calls
    ) is on  # locking within a limit would let later mappings fail
    if not on:
        assert "8192 KiB" in item.detail
        assert "RLIMIT_MEMLOCK" in (item.hint or "")


def test_oom_score_adj_that_cannot_be_lowered_reports_what_was_reached(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "write_text", refuse)
    item = protect(root, FakeLibc(), monkeypatch)["oom_score_adj"]
    assert not item.on
    assert item.detail == "0 instead of -1000: not permitted"
    assert "CAP_SYS_RESOURCE" in (item.hint or "")


def test_oom_score_adj_that_systemd_has_set_is_on(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "proc/self/oom_score_adj").write_text("-1000\n")
    monkeypatch.setattr(Path, "write_text", lambda *_: pytest.fail("it was right already"))
    assert protect(root, FakeLibc(), monkeypatch)["oom_score_adj"].on


def test_what_is_locked_is_what_is_in_memory_and_not_the_address_space(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = tuple(protect(root, FakeLibc(), monkeypatch).values())
    for resident, mapped, shown in ((2048000, 19817472, "2000 MiB"), (2048000, 1024, "1 MiB")):
        (root / "proc/self/status").write_text(f"VmLck:\t {mapped} kB\nVmRSS:\t {resident} kB\n")
        again = {item.name: item for item in system_module.refreshed(found, root)}
        assert again["lock_memory"].detail.startswith(shown)
    assert again["io_flusher"] in found


REAL = """
import ctypes, gc, json, mmap, resource
from pathlib import Path
from zswapd import system as service

def field(name):
    return next(int(l.split()[1]) for l in Path("/proc/self/status").read_text().splitlines() if
    l.startswith(name))

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def work():
    small = [bytes(100) for _ in range(60_000)]
    table = {number: (number, number) for number in range(20_000)}
    large = [bytes(100_000) for _ in range(40)]
    return len(small) + len(table) + len(large)

cold = faults()
work()
cold = faults() - cold
found = service.protect(lock_memory=True, oom_score_adj=100)
service.freeze_garbage_collector()
work()
warm = faults()
for _ in range(5):
    work()
warm = faults() - warm
locked = field("VmLck")
area = mmap.mmap(-1, 64 << 20)
mapped, resident = field("VmLck") - locked, field("VmRSS")
area[: 8 << 20] = bytes(8 << 20)
print(json.dumps({
    "on": {item.name: item.on for item in found},
    "details": {item.name: item.detail for item in found},
    "cold": cold, "warm": warm, "locked_kb": locked, "mapped_kb": mapped,
    "touched_kb": field("VmRSS") - resident,
    "oom": int(Path("/proc/self/oom_score_adj").read_text()), "collecting": gc.isenabled(),
    "frozen": gc.get_freeze_count(), "collected": service.collect_garbage(),
}))
"""


@capabilities.requires_root()
def test_protect_for_real_locks_memory_and_stops_faults() -> None:
    done = subprocess.run(
        [sys.executable, "-c", REAL], check=True, capture_output=True, text=True, timeout=60
    )
    seen = json.loads(done.stdout)
    assert seen["on"]["lock_memory"], seen["details"]
    assert seen["on"]["heap"], seen["details"]
    assert seen["on"]["oom_score_adj"]
    assert seen["oom"] == 100
    assert seen["on"]["io_flusher"] is capabilities.sys_resource().present
    assert seen["locked_kb"] > 30 << 10
    assert seen["mapped_kb"] == 64 << 10  # MCL_FUTURE: a later mapping counts as locked at once ...
    assert (
        8 << 10 <= seen["touched_kb"] < 30 << 10
    )  # ... and MCL_ONFAULT: is not faulted in at once
    assert seen["cold"] > 1000
    assert seen["warm"] == 0
    assert not seen["collecting"]
    assert seen["frozen"] > 1000


@pytest.mark.parametrize("abstract", [False, True])
def test_notifier_sends_what_systemd_reads(tmp_path: Path, abstract: bool) -> None:
    address = f"@zswapd-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + address[1:] if abstract else address)
        manager.settimeout(5)
        notifier = Notifier({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "30000000"})
        assert notifier.watchdog_interval == 15
        assert notifier.ready("serving\n/run/zswapd/mnt")
        assert manager.recv(4096) == b"READY=1\nSTATUS=serving /run/zswapd/mnt"
        assert notifier.status("12 pages")
        assert manager.recv(4096) == b"STATUS=12 pages"
        assert notifier.watchdog()
        assert manager.recv(4096) == b"WATCHDOG=1"
        assert notifier.set_watchdog(300)
        assert manager.recv(4096) == b"WATCHDOG=1\nWATCHDOG_USEC=300000000"
        assert notifier.more_time()
        assert manager.recv(4096) == b"EXTEND_TIMEOUT_USEC=120000000"
        assert notifier.stopping("swapping off")
        assert manager.recv(4096) == b"STOPPING=1\nSTATUS=swapping off"
        notifier.close()
        assert not notifier.watchdog()


def test_notifier_never_waits_for_a_manager_that_does_not_read(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify")})
        results = [notifier.watchdog() for _ in range(2000)]
        assert results[0]
        assert not results[-1]
        notifier.close()


@pytest.mark.parametrize(
    "environ",
    [{}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "vsock:2:1"}, {"NOTIFY_SOCKET": "/nobody"}],
)
def test_notifier_without_a_manager_does_nothing(environ: dict[str, str]) -> None:
    notifier = Notifier(environ)
    assert not notifier.ready("serving")
    assert notifier.watchdog_interval is None
    notifier.close()


@pytest.mark.parametrize(
    ("environ", "interval"),
    [
        ({"WATCHDOG_USEC": "1000000"}, 0.5),
        ({"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": str(os.getpid())}, 0.5),
        ({"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_watchdog_interval_is_half_the_limit(
    environ: dict[str, str], interval: float | None
) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": "/run/nobody", **environ})
    assert notifier.watchdog_interval == interval
    notifier.close()


def system(root: Path, **values: str) -> dict[str, Protection]:
    files = {
        "proc/meminfo": "MemTotal:        1048576 kB\n",
        "proc/sys/vm/min_free_kbytes": "4096\n",
        "proc/sys/vm/page-cluster": "3\n",
        "sys/module/zswap/parameters/enabled": "N\n",
        **{
            name.replace("__", "/").replace("_cluster", "-cluster"): value
            for name, value in values.items()
        },
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return {item.name: item for item in system_module.advise(root)}


def test_advise_names_the_sysctl_that_is_too_low(tmp_path: Path) -> None:
    found = system(tmp_path, proc__sys__vm__page_cluster="0\n")
    assert not found["vm.min_free_kbytes"].on
    assert found["vm.min_free_kbytes"].hint == "sysctl vm.min_free_kbytes=20971"  # 2 % of 1 GiB
    assert not found["vm.page-cluster"].on
    assert found["vm.page-cluster"].hint == "sysctl vm.page-cluster=3"
    assert found["kernel zswap"].on


def test_advise_warns_of_the_kernels_own_zswap(tmp_path: Path) -> None:
    item = system(tmp_path, sys__module__zswap__parameters__enabled="Y\n")["kernel zswap"]
    assert not item.on
    assert "compressed twice" in item.detail
    assert "echo N" in (item.hint or "")


@pytest.mark.parametrize(("total_kb", "wanted"), [(256 << 10, 16 << 10), (64 << 20, 64 << 10)])
def test_advise_keeps_its_recommendation_within_bounds(
    tmp_path: Path, total_kb: int, wanted: int
) -> None:
    meminfo = f"MemTotal: {total_kb} kB\n"
    assert system(tmp_path, proc__meminfo=meminfo, proc__sys__vm__min_free_kbytes=f"{wanted}\n")[
        "vm.min_free_kbytes"
    ].on
    low = system(tmp_path, proc__meminfo=meminfo, proc__sys__vm__min_free_kbytes=f"{wanted - 1}\n")
    assert not low["vm.min_free_kbytes"].on


@pytest.mark.parametrize(("value", "after"), [("4096", "20971"), ("30000", "30000")])
def test_raise_min_free_kbytes_never_lowers_it(tmp_path: Path, value: str, after: str) -> None:
    system(tmp_path, proc__sys__vm__min_free_kbytes=f"{value}\n")
    assert system_module.raise_min_free_kbytes(tmp_path) is (value != after)
    assert (tmp_path / "proc/sys/vm/min_free_kbytes").read_text().strip() == after


def test_raise_min_free_kbytes_that_cannot_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system(tmp_path)

    def refuse(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(PermissionsError, match="min_free_kbytes"):
        system_module.raise_min_free_kbytes(tmp_path)


def test_advise_leaves_out_what_it_cannot_read(tmp_path: Path) -> None:
    assert system_module.advise(tmp_path) == ()


def test_memory_is_locked_before_more_is_taken(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    """What is taken before could be in swap when this process has to serve."""
    steps: list[str] = []

    def noted(name: str) -> Callable[..., Protection]:
        def step(*_: object, **__: object) -> Protection:
            steps.append(name)
            return Protection(name, on=True, detail="")

        return step

    for name in ("_lock_memory", "take_own_memory", "_grow_heaps"):
        monkeypatch.setattr(protections, name, noted(name))
    protections.protect(lock_memory=True, oom_score_adj=0, owns_memory=True, root=root)
    assert steps == ["_lock_memory", "take_own_memory", "_grow_heaps"]
