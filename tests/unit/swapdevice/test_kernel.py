# SPDX-License-Identifier: GPL-2.0-or-later
"""Loop devices and swap for real, over plain files of 64 MiB.

What a failure undoes, and which process swapoff would have killed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.support import TOP
from zswapd import swapdevice
from zswapd.errors import HeadroomError, PermissionsError, SwapDeviceError
from zswapd.swapdevice.drain import drain
from zswapd.swapdevice.kernel import Kernel
from zswapd.swapdevice.state import attachments, read_sysfs

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(60)]

MIB = 1 << 20
HIGHEST = 32767  # before any other swap of the machine


class FailingKernel(Kernel):
    """The real one, but one step fails after it was done."""

    def __init__(self, step: str, failure: BaseException) -> None:
        super().__init__()
        self.step, self.failure = step, failure

    def _fail_at(self, step: str) -> None:
        if step == self.step:
            raise self.failure

    def free_loop(self) -> int:
        number = super().free_loop()
        self._fail_at("free_loop")
        return number

    def configure_loop(self, loop: int, backing: int, name: str, block_size: int) -> None:
        super().configure_loop(loop, backing, name, block_size)
        self._fail_at("configure_loop")

    def run(self, command: Sequence[str]) -> tuple[int, str]:
        result = super().run(command)
        self._fail_at("run")
        return result

    def swapon(self, device: str, flags: int) -> None:
        self._fail_at("swapon")
        super().swapon(device, flags)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "my swap"
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 64 * MIB)
    yield path
    swapdevice.detach(path, force=True)


def loops_over(file: Path) -> list[str]:
    return [item.device for item in attachments() if item.backing == file]


def test_attach_gives_swap_as_it_has_to_be_and_detach_takes_it_away(file: Path) -> None:
    attached = swapdevice.attach(file, priority=5, discard=True)
    name = attached.device.removeprefix("/dev/")
    assert attached.warnings == ()
    assert attached.discard
    assert read_sysfs(name, "loop/dio") == "1"
    assert read_sysfs(name, "queue/logical_block_size") == "4096"
    assert read_sysfs(name, "queue/rotational") == "0"
    assert read_sysfs(name, "queue/rq_affinity") == "2"
    assert read_sysfs(name, "queue/discard_max_bytes") == str(16 * MIB)
    found = swapdevice.find_attached(file)
    assert found is not None
    assert found.swap is not None
    assert (found.swap.priority, found.swap.used) == (5, 0)
    assert 63 * MIB < found.swap.size < 64 * MIB

    with pytest.raises(SwapDeviceError, match="swapped on already"):
        swapdevice.attach(file, priority=5, discard=True)

    assert file.stat().st_blocks > 0
    assert swapdevice.detach(file) == [attached.device]
    # The next user of this loop device finds it as it was.
    assert read_sysfs(name, "queue/rq_affinity") == "1"
    assert int(read_sysfs(name, "queue/discard_max_bytes")) > 16 * MIB
    assert loops_over(file) == []
    assert (file.stat().st_size, file.stat().st_blocks) == (
        64 * MIB,
        0,
    )  # emptied, mkswap's header too
    assert swapdevice.detach(file) == []


@pytest.mark.parametrize("step", ["free_loop", "configure_loop", "run", "swapon"])
@pytest.mark.parametrize(
    "failure", [OSError(errno.EIO, "Input/output error", "/dev/x"), KeyboardInterrupt()]
)
def test_attach_that_fails_at_any_step_leaves_nothing(
    file: Path, step: str, failure: BaseException
) -> None:
    with pytest.raises((SwapDeviceError, PermissionsError, OSError, KeyboardInterrupt)):
        swapdevice.attach(file, priority=5, discard=True, kernel=FailingKernel(step, failure))
    assert loops_over(file) == []


ATTACH = "import sys; from pathlib import Path; from zswapd import swapdevice; \
swapdevice.attach(Path(sys.argv[1]), priority=5, discard=True)"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_attach_that_is_killed_in_the_middle_leaves_nothing(
    file: Path, tmp_path: Path, number: signal.Signals
) -> None:
    slow = tmp_path / "bin/mkswap"
    slow.parent.mkdir()
    slow.write_text(f"#!/bin/sh\ntouch '{tmp_path}/started'\nexec sleep 30\n")
    slow.chmod(0o755)
    environ = {**os.environ, "PATH": f"{slow.parent}:{os.environ['PATH']}"}
    process = subprocess.Popen(
        [sys.executable, "-c", ATTACH, str(file)],
        env=environ,
        cwd=TOP,
        stderr=subprocess.DEVNULL,
        process_group=0,
    )
    deadline = time.monotonic() + 20
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(loops_over(file)) == 1
    os.killpg(process.pid, number)  # as the terminal does
    assert process.wait(20) != 0
    while loops_over(file) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert loops_over(file) == []


def test_of_two_attaches_at_once_one_is_refused(file: Path) -> None:
    class Interrupted(Kernel):
        """While a process has found the file free, another one comes."""

        def free_loop(self) -> int:
            with pytest.raises(SwapDeviceError, match="another process is swapping on"):
                swapdevice.attach(file, priority=5, discard=True)
            return super().free_loop()

    device = swapdevice.attach(file, priority=5, discard=True, kernel=Interrupted()).device
    assert loops_over(file) == [device]
    with file.open("rb") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of no longer than that


@pytest.mark.slow
def test_attach_and_detach_many_times_leaves_no_descriptor(file: Path) -> None:
    swapdevice.detach(*[file] * bool(swapdevice.attach(file, priority=5, discard=True).device))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        swapdevice.attach(file, priority=5, discard=True)
        swapdevice.detach(file)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_loop_device_made_by_hand_is_detached_too(file: Path) -> None:
    device = subprocess.run(
        ["losetup", "--find", "--show", "--direct-io=on", file],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    with pytest.raises(SwapDeviceError, match=f"attached to {device}"):
        swapdevice.attach(file, priority=5, discard=True)
    with pytest.raises(SwapDeviceError, match="not swapped on") as caught:
        swapdevice.detach(file)
    assert caught.value.hint == f"losetup --detach {device}"
    subprocess.run(["mkswap", device], check=True, capture_output=True)
    subprocess.run(["swapon", device], check=True)
    assert swapdevice.detach(file) == [device]
    assert loops_over(file) == []


def test_a_loop_device_that_is_mounted_is_named_with_its_mountpoint(
    file: Path, tmp_path: Path
) -> None:
    (tmp_path / "a mount").mkdir()
    subprocess.run(["mke2fs", "-q", "-F", file], check=True)
    subprocess.run(["mount", "-o", "loop", file, tmp_path / "a mount"], check=True)
    try:
        with pytest.raises(SwapDeviceError, match=f"is mounted at {tmp_path}/a mount"):
            swapdevice.attach(file, priority=5, discard=True)
    finally:
        subprocess.run(["umount", tmp_path / "a mount"], check=True)


def test_swapoff_by_hand_detaches_the_loop_device_as_well(file: Path) -> None:
    device = swapdevice.attach(file, priority=5, discard=True).device
    subprocess.run(["swapoff", device], check=True)
    assert loops_over(file) == []


@contextlib.contextmanager
def memory_cgroup(limit: int) -> Iterator[Path]:
    """A cgroup of either layout."""
    v1 = Path("/sys/fs/cgroup/memory")
    group = (v1 if v1.is_dir() else Path("/sys/fs/cgroup")) / f"zswapd-swapdevice-{os.getpid()}"
    group.mkdir()
    try:
        (group / ("memory.limit_in_bytes" if v1.is_dir() else "memory.max")).write_text(str(limit))
        yield group
    finally:
        group.rmdir()


WORKLOAD = """
import os, sys, time
from pathlib import Path
Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
pages = [bytes([number % 251 + 1]) * 4096 for number in range(96 << 8)]
print("filled", flush=True)
sys.stdin.readline()
assert all(page == bytes([number % 251 + 1]) * 4096 for number, page in enumerate(pages))
print("verified", flush=True)
"""


@pytest.mark.slow
def test_detach_that_would_kill_a_cgroup_is_refused_by_its_name_and_works_when_there_is_room(
    file: Path,
) -> None:
    swapdevice.attach(file, priority=HIGHEST, discard=True)
    with memory_cgroup(64 * MIB) as group:
        limit = next(
            path for path in group.iterdir() if path.name in ("memory.limit_in_bytes", "memory.max")
        )
        with subprocess.Popen(
            [sys.executable, "-c", WORKLOAD, str(group)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as workload:
            try:
                assert workload.stdout is not None
                assert workload.stdout.readline() == "filled\n"
                found = swapdevice.find_attached(file)
                assert found is not None
                assert found.swap is not None
                assert found.swap.used > 16 * MIB

                with pytest.raises(HeadroomError, match=f"cgroup /{group.name} has") as caught:
                    swapdevice.detach(file)
                assert str(limit) in (caught.value.hint or "")
                assert swapdevice.find_attached(file) is not None

                limit.write_text(str(256 * MIB))
                seen: list[tuple[str, int, int]] = []
                assert swapdevice.detach(file, progress=lambda *news: seen.append(news)) == [
                    found.device
                ]
                assert seen[0][1] == seen[0][2] > 16 * MIB
                assert seen[-1][1] == 0
                assert workload.communicate("go\n", timeout=30)[0] == "verified\n"
            finally:
                workload.kill()
        assert loops_over(file) == []


async def test_drain_swaps_off_from_several_files(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    with other.open("wb") as handle:
        os.posix_fallocate(handle.fileno(), 0, 64 * MIB)
    for path in (file, other):
        swapdevice.attach(path, priority=5, discard=True)
    said: list[str] = []
    await drain(
        [file, other, tmp_path / "never on"], pool_bytes=0, say=said.append, progressed=lambda: None
    )
    assert loops_over(file) == loops_over(other) == []
    assert len(said) == 4  # at the start and at the end of each
