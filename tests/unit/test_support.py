# SPDX-License-Identifier: GPL-2.0-or-later
"""The tests' own machinery: strict logs, the search for leftovers, tiers, capabilities."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import TOP, capabilities, decoy, leftovers


@pytest.fixture
def inner(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A pytest in a process of its own: its log records must not reach our recorder."""
    monkeypatch.setenv("PYTHONPATH", str(TOP))
    pytester.makeini("[pytest]\naddopts = -p no:randomly -p no:cacheprovider")
    return pytester


@pytest.mark.slow
def test_checklogs_fails_what_was_not_announced(
    inner: pytest.Pytester, expect_output: Callable[..., object]
) -> None:
    expect_output("Traceback \\(most recent")  # of the inner run
    inner.makepyfile("""
        import logging, subprocess, sys
        import pytest
        log = logging.getLogger("zswapd.x")

        def test_bad_warning(): log.warning("pool is full")
        def test_bad_error_in_fixture(noisy): pass
        @pytest.fixture
        def noisy():
            yield
            log.error("left late")
        def test_bad_traceback_of_a_child():
            subprocess.run([sys.executable, "-c", "1/0"])
        def test_bad_promise_of_log(expect_log): expect_log("never comes")
        def test_bad_promise_of_output(expect_output): expect_output("never comes")
        def test_bad_count(expect_log):
            expect_log("again", count=1)
            log.warning("again"); log.warning("again")
        def test_bad_level(expect_log):
            expect_log("gentle", level=logging.ERROR, count=0)
            log.warning("gentle")

        def test_good_quiet(): log.info("started"); print("all is well")
        def test_good_announced(expect_log):
            expect_log("pool is f.ll")
            log.warning("pool is full")
        def test_good_announced_many(expect_log):
            expect_log("again", count=None)
            log.warning("again"); log.warning("again")
        def test_good_announced_traceback(expect_output):
            expect_output("^Traceback", count=1)
            subprocess.run([sys.executable, "-c", "1/0"])
        """)
    result = inner.runpytest_subprocess("-p", "tests.support.checklogs", "-rA")
    outcomes = result.parseoutcomes()
    assert (
        outcomes.get("passed") == 4 + 2
    )  # of the two that fail in teardown, the test itself passes
    assert outcomes.get("failed") == 5
    assert outcomes.get("errors") == 2
    result.stdout.no_fnmatch_line("FAILED *test_good*")
    result.stdout.no_fnmatch_line("ERROR *test_good*")
    result.stdout.fnmatch_lines(["*log: WARNING zswapd.x: pool is full*"])


def _tree(
    root: Path, *, mounts: str = "", swaps: str = "", loops: dict[str, str] | None = None
) -> None:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/mounts").write_text(mounts)
    (root / "proc/swaps").write_text("Filename\tType\tSize\tUsed\tPriority\n" + swaps)
    for name, backing in (loops or {}).items():
        directory = root / "sys/block" / name / "loop"
        directory.mkdir(parents=True)
        (directory / "backing_file").write_text(f"{backing}\n")
    (root / "sys/block/loop9").mkdir(parents=True)  # made, but not attached


def test_snapshot_sees_ours_and_only_ours(tmp_path: Path) -> None:
    _tree(
        tmp_path,
        mounts=(
            "proc /proc proc rw 0 0\nzswapd /run/my\\040swap fuse.zswapd rw,user_id=0 0 0\ns3ql"
            " /mnt/s3 fuse.s3ql rw 0 0\n"
        ),
        swaps=(
            "/dev/loop1 partition 1 0 -2\n/dev/loop2 partition 1 0 -3\n/dev/vdb partition 1 0 -4\n"
            "/dev/loop4 partition 1 0 1000\n"
        ),
        loops={
            "loop1": "/run/my swap/swap",
            "loop2": "/var/image",
            "loop3": "/tmp/pytest-of-root/pytest-3/a/disc",
            "loop4": "/var/tmp/zswapd-decoy-12 (deleted)",
        },
    )
    (tmp_path / "sys/fs/cgroup/memory/zswapd-77").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/zswapd-78").mkdir()
    (tmp_path / "sys/fs/cgroup/memory/other").mkdir()
    seen = leftovers.snapshot(tmp_path)
    assert seen.mounts == {"/run/my swap"}
    assert seen.loops == {
        "loop1 on /run/my swap/swap",
        "loop3 on /tmp/pytest-of-root/pytest-3/a/disc",
        "loop4 on /var/tmp/zswapd-decoy-12 (deleted)",
    }
    assert seen.swaps == {"/dev/loop1", "/dev/loop4"}
    assert {Path(path).name for path in seen.cgroups} == {"zswapd-77", "zswapd-78"}
    assert len(seen.lines()) == 8
    assert seen.since(seen).lines() == []
    assert seen.since(leftovers.Leftovers()) == seen


def test_abandoned_spares_live_runs_live_daemons_and_other_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = tmp_path / "pytest-of-root"
    finished = subprocess.Popen([sys.executable, "-c", ""])
    finished.wait()
    for number, lock in {
        1: str(finished.pid),
        2: str(os.getpid()),
        3: str(finished.pid),
        4: None,
    }.items():
        (runs / f"pytest-{number}").mkdir(parents=True)
        if lock is not None:
            (runs / f"pytest-{number}/.lock").write_text(lock)
    at = {
        "dead run, dead daemon": f"{runs}/pytest-1/m",
        "live run": f"{runs}/pytest-2/m",
        "live daemon": f"{runs}/pytest-3/m",
        "ended run": f"{runs}/pytest-4/m",
        "somebody's swap": "/run/zswapd/mnt",
    }
    _tree(tmp_path, mounts="".join(f"zswapd {path} fuse.zswapd rw 0 0\n" for path in at.values()))
    monkeypatch.setattr(
        leftovers, "daemon_is_dead", lambda mountpoint: mountpoint != at["live daemon"]
    )
    assert leftovers.abandoned(tmp_path) == [at["dead run, dead daemon"], at["ended run"]]


def test_decoys_of_the_dead_are_abandoned_and_no_other_loop_device_is(tmp_path: Path) -> None:
    finished = subprocess.Popen([sys.executable, "-c", ""])
    finished.wait()
    _tree(
        tmp_path,
        loops={
            "loop1": f"/var/tmp/zswapd-decoy-{finished.pid} (deleted)",
            "loop2": f"/var/tmp/zswapd-decoy-{os.getpid()} (deleted)",
            "loop3": f"/var/tmp/zswapd-decoy-{finished.pid}/swap",
            "loop4": "/var/image",
        },
    )
    assert leftovers.abandoned_decoys(tmp_path) == ["loop1"]


def test_decoy_is_on_a_disk_or_not_at_all() -> None:
    assert "tmpfs" in decoy.missing(Path("/dev/shm"))


def test_daemon_is_dead_spares_what_answers(tmp_path: Path) -> None:
    assert not leftovers.daemon_is_dead(str(tmp_path))
    assert not leftovers.daemon_is_dead(str(tmp_path / "missing"))


@pytest.mark.slow
def test_tiers_are_off_until_asked_for(inner: pytest.Pytester) -> None:
    inner.makeini("[pytest]\nmarkers =\n soak: x\n bench: x\n mount: x\n kernel: x\n")
    inner.makepyfile("""
        import pytest
        @pytest.mark.soak
        def test_soak(): pass
        @pytest.mark.bench
        def test_bench(): pass
        def test_plain(): pass
        """)
    plugins = (
        "-p",
        "tests.conftest",
        "-p",
        "no:randomly",
        "-p",
        "no:cacheprovider",
        "--shared-machine",
    )
    inner.runpytest_subprocess(*plugins).assert_outcomes(passed=1, skipped=2)
    inner.runpytest_subprocess(*plugins, "--tier", "soak").assert_outcomes(passed=2, skipped=1)
    inner.runpytest_subprocess(*plugins, "-m", "bench").assert_outcomes(passed=1, deselected=2)


@pytest.mark.slow
def test_run_that_leaves_a_cgroup_behind_fails(inner: pytest.Pytester) -> None:
    inner.makepyfile("""
        from tests import conftest
        from tests.support import leftovers

        def test_leaves_something(monkeypatch):
            now = leftovers.snapshot
            leftovers.snapshot = lambda: leftovers.Leftovers(
                mounts=now().mounts | {"/run/forgotten"}
            )
            conftest.GRACE_S = 0.0
        """)
    result = inner.runpytest_subprocess("-p", "tests.conftest", "-p", "no:randomly")
    result.assert_outcomes(passed=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*left behind*", "mount /run/forgotten"])


@pytest.mark.parametrize(
    ("mounts", "layout"),
    [
        ("cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n", "v2"),
        ("cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n", "v1"),
        ("cgroup /m cgroup rw,memory 0 0\ncgroup2 /u cgroup2 rw 0 0\n", "hybrid"),
        ("cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n", "none"),
    ],
)
def test_cgroup_layout_is_told(tmp_path: Path, mounts: str, layout: str) -> None:
    (tmp_path / "mounts").write_text(mounts)
    assert capabilities.cgroup_layout(str(tmp_path / "mounts")) == layout


def test_report_says_why_a_capability_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        capabilities, "zram", lambda: capabilities.Capability("zram", "load the module zram")
    )
    assert "zswapd: lacks zram: load the module zram" in capabilities.report()
