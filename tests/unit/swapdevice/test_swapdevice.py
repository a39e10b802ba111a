# SPDX-License-Identifier: GPL-2.0-or-later
"""Attach and detach on a made-up machine.

Every step fails once, is interrupted once, and leaves nothing.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import trio

from zswapd import swapdevice
from zswapd.errors import HeadroomError, PermissionsError, SwapDeviceError
from zswapd.host import installation
from zswapd.swapdevice import drain, state
from zswapd.swapdevice import swapon as swapon_module
from zswapd.system.offload import Offload

STEPS = ("free_loop", "open_loop", "configure_loop", "run", "swapon")
MIB = 1 << 20


class FakeChild:
    """A swapoff that takes a few looks to end."""

    def __init__(self, kernel: FakeKernel, code: int, looks: int = 2) -> None:
        self.kernel, self.code, self.looks = kernel, code, looks
        self.interrupted = False

    def wait(self, seconds: float) -> int | None:
        if self.kernel.interrupt_wait and not self.interrupted:
            raise KeyboardInterrupt
        self.looks -= 1
        if self.looks > 0:
            self.kernel.used //= 2
            self.kernel.write_swaps()
            return None
        if self.code == 0 and not self.interrupted:
            self.kernel.swaps.clear()
            self.kernel.write_swaps()
            self.kernel.autoclear()
        return self.code

    def interrupt(self) -> None:
        self.interrupted = True


class FakeKernel:
    """Loop devices, swap and their sysfs, with autoclear, in a temporary directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls: list[str] = []
        self.fail: dict[str, BaseException] = {}
        self.swaps: dict[str, int] = {}
        self.used = 0
        self.open = 0
        self.number = 3
        self.direct_io = "1"
        self.discard_bytes = "4294966784"
        self.is_served = True
        self.autoclear_flag = "1"
        self.mkswap = (0, "")
        self.swapoff_code = 0
        self.interrupt_wait = False
        self.identity = (0, 0)
        self.child: FakeChild | None = None
        (root / "proc/self").mkdir(parents=True)
        (root / "proc/self/mountinfo").write_text("1 0 254:0 / / rw - ext4 /dev/vda rw\n")
        (root / "proc/meminfo").write_text(
            "MemTotal: 8388608 kB\nMemAvailable: 4194304 kB\nSwapCached: 0 kB\n"
        )
        self.write_swaps()

    @property
    def sysfs(self) -> Path:
        return self.root / f"sys/block/loop{self.number}"

    def write_swaps(self) -> None:
        lines = [
            f"{path} partition 65532 {self.used // 1024} {flags & 0x7FFF}"
            for path, flags in self.swaps.items()
        ]
        (self.root / "proc/swaps").write_text(
            "\n".join(["Filename Type Size Used Priority", *lines, ""])
        )

    def autoclear(self) -> None:
        if not self.open and not self.swaps and self.autoclear_flag == "1":
            shutil.rmtree(self.sysfs / "loop", ignore_errors=True)

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name in self.fail:
            raise self.fail[name]

    def free_loop(self) -> int:
        self._call("free_loop")
        return self.number

    def open_loop(self, device: str, *, exclusive: bool = False) -> int:
        self._call("open_loop")
        assert device == f"/dev/loop{self.number}"
        if exclusive and self.swaps:
            raise OSError(errno.EBUSY, "Device or resource busy", device)
        self.open += 1
        return 1001 if exclusive else 1000

    def close(self, loop: int) -> None:
        assert loop in (1000, 1001)
        self.open -= 1
        self.autoclear()

    def configure_loop(self, loop: int, backing: int, name: str, block_size: int) -> None:
        self._call("configure_loop")
        assert block_size == 4096
        assert os.fstat(backing).st_size
        for attribute, value in {
            "loop/backing_file": name,
            "loop/dio": self.direct_io,
            "loop/autoclear": self.autoclear_flag,
            "queue/rotational": "1",
            "queue/discard_max_bytes": self.discard_bytes,
        }.items():
            (self.sysfs / attribute).parent.mkdir(parents=True, exist_ok=True)
            (self.sysfs / attribute).write_text(value + "\n")

    def loop_identity(self, device: str) -> tuple[int, int]:
        self._call("loop_identity")
        assert device == f"/dev/loop{self.number}"
        return self.identity

    def clear_loop(self, loop: int) -> None:
        self._call("clear_loop")
        self.autoclear_flag = "1"

    def is_readable(self, device: str) -> bool:
        self._call("is_readable")
        return self.is_served

    def discard(self, loop: int) -> None:
        assert loop == 1001
        self._call("discard")
        Path((self.sysfs / "loop/backing_file").read_text().rstrip("\n")).write_bytes(b"")

    def run(self, command: Sequence[str]) -> tuple[int, str]:
        self._call("run")
        assert list(command) == ["mkswap", "--label", "zswapd", f"/dev/loop{self.number}"]
        return self.mkswap

    def swapon(self, device: str, flags: int) -> None:
        self._call("swapon")
        assert (self.sysfs / "queue/rotational").read_text() == "0"
        self.swaps[device] = flags
        self.write_swaps()

    def start_swapoff(self, device: str) -> FakeChild:
        self._call("start_swapoff")
        self.child = FakeChild(self, self.swapoff_code)
        return self.child


@pytest.fixture
def kernel(tmp_path: Path) -> FakeKernel:
    return FakeKernel(tmp_path / "root")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mnt/my swap"
    path.parent.mkdir()
    path.write_bytes(bytes(65536))
    return path


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swapon_module, "RELEASE_S", 0.05)


def attach(
    kernel: FakeKernel, file: Path, *, priority: int = 7, discard: bool = True
) -> swapdevice.Attached:
    return swapdevice.attach(
        file,
        priority=priority,
        discard=discard,
        page_size=65536,
        kernel=kernel,  # type: ignore[arg-type]
        root=kernel.root,
    )


def detach(
    kernel: FakeKernel,
    *files: Path,
    force: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[str]:
    return swapdevice.detach(
        *files, force=force, progress=progress, kernel=kernel, root=kernel.root
    )  # type: ignore[arg-type]


def nothing_left(kernel: FakeKernel) -> bool:
    return not kernel.swaps and not kernel.open and not (kernel.sysfs / "loop").exists()


def test_attach_makes_a_fast_loop_device_and_swaps_on(kernel: FakeKernel, file: Path) -> None:
    attached = attach(kernel, file)
    assert attached == swapdevice.Attached("/dev/loop3", 65536, discard=True, warnings=())
    assert kernel.calls == list(STEPS)
    assert kernel.swaps == {"/dev/loop3": 0x8000 | 7 | 0x10000}
    assert kernel.open == 0
    found = swapdevice.find_attached(file, kernel.root)
    assert found is not None
    assert found.swap is not None
    assert (found.device, found.backing, found.swap.priority) == ("/dev/loop3", file, 7)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    "failure",
    [OSError(errno.EIO, "Input/output error", "/dev/x"), KeyboardInterrupt(), MemoryError()],
)
def test_attach_that_fails_at_any_step_leaves_nothing(
    kernel: FakeKernel, file: Path, step: str, failure: BaseException
) -> None:
    kernel.fail[step] = failure
    with pytest.raises(BaseException) as caught:  # noqa: PT011 - the class differs by case
        attach(kernel, file)
    if isinstance(failure, OSError) and step != "run":
        assert isinstance(caught.value, SwapDeviceError | PermissionsError)
        assert caught.value.hint
    assert nothing_left(kernel)
    kernel.fail.clear()
    assert attach(kernel, file).device == "/dev/loop3"


def test_attach_where_direct_io_is_not_had_is_refused(kernel: FakeKernel, file: Path) -> None:
    kernel.direct_io = "0"
    with pytest.raises(SwapDeviceError, match="no direct I/O"):
        attach(kernel, file)
    assert nothing_left(kernel)


def test_attach_takes_another_loop_device_when_one_is_snatched_away(
    kernel: FakeKernel, file: Path
) -> None:
    def snatched(*arguments: object) -> None:
        del kernel.configure_loop  # type: ignore[method-assign]
        raise OSError(errno.EBUSY, "Device or resource busy")

    kernel.configure_loop = snatched  # type: ignore[assignment, method-assign]
    assert attach(kernel, file).device == "/dev/loop3"
    assert kernel.calls.count("free_loop") == 2
    assert kernel.open == 0


def test_attach_gives_up_when_loop_devices_are_snatched_away_for_ever(
    kernel: FakeKernel, file: Path
) -> None:
    kernel.fail["configure_loop"] = OSError(errno.EBUSY, "Device or resource busy")
    with pytest.raises(SwapDeviceError, match="other processes took"):
        attach(kernel, file)
    assert nothing_left(kernel)


@pytest.mark.parametrize(
    ("step", "error", "cls", "message", "hint"),
    [
        ("free_loop", errno.ENOENT, PermissionsError, "no loop device: /dev/x", "modprobe loop"),
        ("open_loop", errno.EACCES, PermissionsError, "no permission for /dev/x", "as root"),
        (
            "configure_loop",
            errno.EINVAL,
            SwapDeviceError,
            "/dev/loop3 cannot be attached",
            "Linux 5.8",
        ),
        ("run", errno.ENOENT, SwapDeviceError, "mkswap is not installed", "util-linux"),
        ("swapon", errno.EPERM, PermissionsError, "swapon /dev/loop3", "as root"),
        ("swapon", errno.EINVAL, SwapDeviceError, "swapon /dev/loop3 failed", "dmesg"),
    ],
)
def test_attach_says_what_to_do_about_a_failed_step(
    kernel: FakeKernel,
    file: Path,
    step: str,
    error: int,
    cls: type[SwapDeviceError],
    message: str,
    hint: str,
) -> None:
    kernel.fail[step] = OSError(error, os.strerror(error), "/dev/x")
    with pytest.raises(cls) as caught:
        attach(kernel, file)
    assert message in caught.value.message
    assert hint in (caught.value.hint or "")


def test_attach_passes_on_what_mkswap_says(kernel: FakeKernel, file: Path) -> None:
    kernel.mkswap = (1, "mkswap: error: swap area needs to be at least 40 KiB")
    with pytest.raises(SwapDeviceError, match="at least 40 KiB"):
        attach(kernel, file)
    assert nothing_left(kernel)


@pytest.mark.parametrize("limit", ["0", ""])
def test_attach_without_discard_on_the_device_says_so(
    kernel: FakeKernel, file: Path, limit: str
) -> None:
    kernel.discard_bytes = limit
    attached = attach(kernel, file)
    assert not attached.discard
    assert "takes no discards" in attached.warnings[0]
    assert kernel.swaps == {"/dev/loop3": 0x8000 | 7}


def test_attach_without_discard_wanted_does_not_complain(kernel: FakeKernel, file: Path) -> None:
    kernel.discard_bytes = "0"
    assert attach(kernel, file, discard=False).warnings == ()
    assert kernel.swaps == {"/dev/loop3": 0x8000 | 7}


def test_attach_where_rotational_cannot_be_cleared_goes_on_with_a_warning(
    kernel: FakeKernel, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(self: Path, text: str) -> int:
        if self.name != "rotational" or text != "0":
            return original(self, text)
        original(self, text)  # what the fake kernel looks at
        raise OSError(errno.EROFS, "Read-only file system")

    original = Path.write_text
    monkeypatch.setattr(Path, "write_text", read_only)
    assert "stays rotational" in attach(kernel, file).warnings[0]


def test_attach_that_fails_leaves_the_queue_as_the_kernel_has_it(
    kernel: FakeKernel, file: Path
) -> None:
    kernel.fail["swapon"] = OSError(errno.EBUSY, "Device or resource busy")
    with pytest.raises(SwapDeviceError):
        attach(kernel, file)
    queue = {
        name: (kernel.sysfs / "queue" / name).read_text()
        for name in ("rq_affinity", "discard_max_bytes")
    }
    assert queue == {"rq_affinity": "1", "discard_max_bytes": str((1 << 32) - (1 << 16))}


def test_attach_where_the_queue_cannot_be_set_goes_on(
    kernel: FakeKernel, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(self: Path, text: str) -> int:
        if self.name in ("rq_affinity", "discard_max_bytes") and not text.endswith(
            "\n"
        ):  # with one, it is the fake kernel's
            raise OSError(errno.EROFS, "Read-only file system")
        return original(self, text)

    original = Path.write_text
    monkeypatch.setattr(Path, "write_text", read_only)
    assert attach(kernel, file).warnings == ()
    assert detach(kernel, file) == ["/dev/loop3"]


def test_attach_of_a_file_that_is_on_already_is_refused(kernel: FakeKernel, file: Path) -> None:
    attach(kernel, file)
    with pytest.raises(SwapDeviceError, match="swapped on already, as /dev/loop3") as caught:
        attach(kernel, file)
    assert "swapoff" in (caught.value.hint or "")
    assert list(kernel.swaps) == ["/dev/loop3"]


@pytest.mark.parametrize(
    ("mounts", "message", "hint"),
    [
        (
            "7 1 7:3 / /mnt/my\\040disk rw - ext4 /dev/loop3 rw\n",
            "mounted at /mnt/my disk, by /dev/loop3",
            "umount '/mnt/my disk'",
        ),
        ("", "attached to /dev/loop3 already", "losetup --detach /dev/loop3"),
    ],
)
def test_a_file_whose_loop_device_serves_something_else_is_left_alone(
    kernel: FakeKernel, file: Path, mounts: str, message: str, hint: str
) -> None:
    with file.open("rb") as backing:
        kernel.configure_loop(1000, backing.fileno(), str(file), 4096)
    (kernel.root / "proc/self/mountinfo").write_text(mounts)
    for operation in (attach, detach):
        with pytest.raises(SwapDeviceError) as caught:
            operation(kernel, file)
        assert message.replace(" already", "") in caught.value.message.replace(" already", "")
        assert caught.value.hint == hint
    assert (kernel.sysfs / "loop").exists()
    assert "start_swapoff" not in kernel.calls


def test_attach_of_what_is_no_file_is_refused(kernel: FakeKernel, tmp_path: Path) -> None:
    with pytest.raises(SwapDeviceError, match="No such file") as caught:
        attach(kernel, tmp_path / "nothing")
    assert "zswapctl status" in (caught.value.hint or "")
    with pytest.raises(SwapDeviceError, match="not a regular file"):
        attach(kernel, Path("/dev/null"))
    assert kernel.calls == []


def test_attach_over_a_dead_mount_says_how_to_get_rid_of_it(
    kernel: FakeKernel, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dead(*_: object) -> int:
        raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")

    monkeypatch.setattr(os, "open", dead)
    with pytest.raises(SwapDeviceError, match="not connected") as caught:
        attach(kernel, file)
    assert installation.found().start() in (caught.value.hint or "")


def test_attach_to_a_daemon_that_is_stopping_says_so(
    kernel: FakeKernel, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(*_: object) -> int:
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(os, "open", busy)
    with pytest.raises(SwapDeviceError, match="busy") as caught:
        attach(kernel, file)
    assert "stopping" in (caught.value.hint or "")


def test_detach_swaps_off_and_shows_how_it_comes_along(kernel: FakeKernel, file: Path) -> None:
    attach(kernel, file)
    kernel.used = 8 * MIB
    kernel.write_swaps()
    seen: list[tuple[str, int, int]] = []
    assert detach(kernel, file, progress=lambda *news: seen.append(news)) == ["/dev/loop3"]
    assert seen == [
        ("/dev/loop3", 8 * MIB, 8 * MIB),
        ("/dev/loop3", 4 * MIB, 8 * MIB),
        ("/dev/loop3", 0, 8 * MIB),
    ]
    assert nothing_left(kernel)


def test_detach_empties_the_file_if_that_can_be_done(kernel: FakeKernel, file: Path) -> None:
    attach(kernel, file)
    detach(kernel, file)
    assert file.read_bytes() == b""
    file.write_bytes(bytes(65536))
    attach(kernel, file)
    kernel.fail["discard"] = OSError(errno.EOPNOTSUPP, "Operation not supported")
    assert detach(kernel, file) == ["/dev/loop3"]


@pytest.mark.parametrize("discard", [errno.EIO, errno.EOPNOTSUPP, 0])
def test_detach_says_that_pages_are_lost_if_the_device_gives_errors_afterwards(
    kernel: FakeKernel, file: Path, discard: int
) -> None:
    """The daemon has ended: swapoff(2) succeeds all the same, and no discard need tell."""
    attach(kernel, file)
    kernel.used = 8 * MIB
    kernel.write_swaps()
    kernel.is_served = False
    if discard:
        kernel.fail["discard"] = OSError(discard, os.strerror(discard))
    with pytest.raises(
        SwapDeviceError, match=r"swapped off: /dev/loop3; but .* are lost"
    ) as caught:
        detach(kernel, file)
    assert "SIGBUS" in (caught.value.hint or "")
    assert nothing_left(kernel)


def test_detach_of_an_empty_device_that_gives_errors_loses_nothing(
    kernel: FakeKernel, file: Path
) -> None:
    attach(kernel, file)
    kernel.is_served = False
    kernel.fail["discard"] = OSError(errno.EIO, "Input/output error")
    assert detach(kernel, file) == ["/dev/loop3"]
    assert nothing_left(kernel)


def test_discard_that_fails_loses_nothing_while_the_device_can_be_read(
    kernel: FakeKernel, file: Path
) -> None:
    attach(kernel, file)
    kernel.used = 8 * MIB
    kernel.write_swaps()
    kernel.fail["discard"] = OSError(errno.EIO, "Input/output error")
    assert detach(kernel, file) == ["/dev/loop3"]


def test_file_is_emptied_while_nobody_can_swap_on_to_it(
    kernel: FakeKernel, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attach(kernel, file)
    seen = []

    def discard(loop: int) -> None:
        with pytest.raises(SwapDeviceError, match="is attached to /dev/loop3 already") as caught:
            attach(kernel, file)
        seen.append(caught.value.message)

    monkeypatch.setattr(kernel, "discard", discard)
    assert detach(kernel, file) == ["/dev/loop3"]
    assert len(seen) == 1
    assert nothing_left(kernel)


def test_detach_discards_nothing_of_what_is_swapped_on_again(
    kernel: FakeKernel, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attach(kernel, file)
    open_loop = kernel.open_loop

    def swapped_on_by_hand(device: str, *, exclusive: bool = False) -> int:
        if exclusive:
            kernel.swapon(device, 0)
        return open_loop(device, exclusive=exclusive)

    monkeypatch.setattr(kernel, "open_loop", swapped_on_by_hand)
    with pytest.raises(SwapDeviceError, match="something still has it open"):
        detach(kernel, file)
    assert "discard" not in kernel.calls


def test_detach_passes_over_a_file_that_has_no_loop_device(kernel: FakeKernel, file: Path) -> None:
    assert detach(kernel, file) == []
    assert kernel.calls == []


def test_detach_of_what_does_not_fit_is_refused_and_force_tries_it(
    kernel: FakeKernel, file: Path
) -> None:
    attach(kernel, file)
    kernel.used = 8 * MIB
    kernel.write_swaps()
    (kernel.root / "proc/meminfo").write_text(
        "MemTotal: 1048576 kB\nMemAvailable: 36864 kB\n"
    )  # 36 MiB; 8 and 32 are needed
    with pytest.raises(
        HeadroomError, match=r"8\.0 MiB swapped out do not fit into memory, by 4\.0 MiB"
    ):
        detach(kernel, file)
    assert "start_swapoff" not in kernel.calls
    assert kernel.swaps
    assert detach(kernel, file, force=True) == ["/dev/loop3"]


@pytest.mark.parametrize(
    ("code", "cls", "message"),
    [
        (2, HeadroomError, "the kernel had no memory"),
        (-9, HeadroomError, "ended by signal 9"),
        (4, SwapDeviceError, "failed with exit code 4"),
    ],
)
def test_detach_that_fails_leaves_the_swap_on_and_says_so(
    kernel: FakeKernel, file: Path, code: int, cls: type[SwapDeviceError], message: str
) -> None:
    attach(kernel, file)
    kernel.used = 8 * MIB
    kernel.write_swaps()
    kernel.swapoff_code = code
    with pytest.raises(SwapDeviceError, match=message) as caught:
        detach(kernel, file)
    assert type(caught.value) is cls
    assert "/dev/loop3 is still on, with 4.0 MiB swapped out" in caught.value.message
    assert caught.value.hint
    assert kernel.swaps
    kernel.swapoff_code = 0
    assert detach(kernel, file) == ["/dev/loop3"]
    assert nothing_left(kernel)


def test_detach_that_is_interrupted_stops_its_child_and_waits_for_it(
    kernel: FakeKernel, file: Path
) -> None:
    attach(kernel, file)
    kernel.interrupt_wait = True
    with pytest.raises(SwapDeviceError, match="interrupted: /dev/loop3 is still on"):
        detach(kernel, file)
    assert kernel.child is not None
    assert kernel.child.interrupted
    assert kernel.child.looks <= 0
    assert kernel.swaps


def test_detach_where_swapoff_is_missing_says_what_to_install(
    kernel: FakeKernel, file: Path
) -> None:
    attach(kernel, file)
    kernel.fail["start_swapoff"] = FileNotFoundError(errno.ENOENT, "No such file", "swapoff")
    with pytest.raises(SwapDeviceError, match="swapoff is not installed"):
        detach(kernel, file)


def test_detach_clears_a_loop_device_that_was_made_by_hand(kernel: FakeKernel, file: Path) -> None:
    attach(kernel, file)
    kernel.autoclear_flag = "0"
    (kernel.sysfs / "loop/autoclear").write_text("0\n")
    assert detach(kernel, file) == ["/dev/loop3"]
    assert "clear_loop" in kernel.calls
    assert nothing_left(kernel)


def test_detach_whose_loop_device_stays_in_use_says_so(kernel: FakeKernel, file: Path) -> None:
    attach(kernel, file)
    kernel.open = 1  # another process has it open
    with pytest.raises(
        SwapDeviceError, match="swapped off, but something still has it open"
    ) as caught:
        detach(kernel, file)
    assert caught.value.hint == "fuser --verbose /dev/loop3"


def detached(kernel: FakeKernel, file: Path, shown: str = "/my swap") -> dict[Path, state.Identity]:
    """Swap a file on, and have the kernel show another path of it; return what it is."""
    attach(kernel, file)
    (kernel.sysfs / "loop/backing_file").write_text(shown + "\n")
    kernel.identity = (53, 2)
    return {file: state.Identity(53, 2)}


@pytest.mark.parametrize("shown", ["/my swap", "/bound/to/my swap"])
def test_detach_finds_a_file_whose_mount_was_detached(
    kernel: FakeKernel, file: Path, monkeypatch: pytest.MonkeyPatch, shown: str
) -> None:
    what = detached(kernel, file, shown)
    monkeypatch.setattr(kernel, "discard", lambda _loop: None)
    assert detach(kernel, file) == []  # by its path
    assert swapdevice.detach(file, identities=what, kernel=kernel, root=kernel.root) == [
        "/dev/loop3"
    ]  # type: ignore[arg-type]
    assert nothing_left(kernel)


def test_detach_leaves_other_files_of_that_name_alone(kernel: FakeKernel, file: Path) -> None:
    what = detached(kernel, file)
    kernel.identity = (254, 2)
    assert swapdevice.detach(file, identities=what, kernel=kernel, root=kernel.root) == []  # type: ignore[arg-type]
    kernel.fail["loop_identity"] = OSError(errno.ENXIO, "No such device or address")
    assert swapdevice.detach(file, identities=what, kernel=kernel, root=kernel.root) == []  # type: ignore[arg-type]
    assert kernel.swaps


def test_daemon_of_another_mount_is_not_asked_what_its_files_are(
    kernel: FakeKernel, file: Path
) -> None:
    mounts = (
        "1 0 254:0 / / rw - ext4 /dev/vda rw\n7 1 0:77 / /run/other rw - fuse.zswapd zswapd rw\n"
    )
    (kernel.root / "proc/self/mountinfo").write_text(mounts)
    what = detached(kernel, file, "/run/other/my swap")
    assert swapdevice.detach(file, identities=what, kernel=kernel, root=kernel.root) == []  # type: ignore[arg-type]
    assert "loop_identity" not in kernel.calls


def test_swap_areas_reads_escaped_and_deleted_paths(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/swaps").write_text(
        "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
        "/dev/dm-0                               partition\t1048572\t\t512\t\t-2\n"
        "/var/my\\040swap\\011file\\040(deleted)     file\t\t4\t\t0\t\t5\n"
    )
    assert swapdevice.swap_areas(tmp_path) == [
        swapdevice.SwapArea("/dev/dm-0", 1048572 * 1024, 512 * 1024, -2),
        swapdevice.SwapArea("/var/my swap\tfile", 4096, 0, 5),
    ]
    assert swapdevice.swap_areas(tmp_path / "kernel without swap") == []


def test_attachments_are_found_by_path_deleted_or_not_and_in_order(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/swaps").write_text(
        "Filename Type Size Used Priority\n/dev/loop10 partition 4 4 1\n"
    )
    for number, backing in ((10, "/a/my swap"), (2, "/a/my swap"), (1, "/a/other (deleted)")):
        directory = tmp_path / f"sys/block/loop{number}/loop"
        directory.mkdir(parents=True)
        (directory / "backing_file").write_text(backing + "\n")
    assert [item.device for item in state.attachments(tmp_path)] == [
        "/dev/loop1",
        "/dev/loop2",
        "/dev/loop10",
    ]
    found = swapdevice.find_attached(Path("/a/my swap"), tmp_path)
    assert found is not None
    assert found.device == "/dev/loop10"  # the one that is swapped on
    assert found.swap == swapdevice.SwapArea("/dev/loop10", 4096, 4096, 1)
    other = swapdevice.find_attached(Path("/a/other"), tmp_path)
    assert other is not None
    assert (other.device, other.swap) == ("/dev/loop1", None)
    assert swapdevice.find_attached(Path("/a/none"), tmp_path) is None


def test_find_attached_follows_symbolic_links_down_to_the_mountpoint(tmp_path: Path) -> None:
    (tmp_path / "run/mnt").mkdir(parents=True)
    (tmp_path / "var").symlink_to(tmp_path / "run")
    (tmp_path / "here").symlink_to("var/mnt")
    directory = tmp_path / "sys/block/loop1/loop"
    directory.mkdir(parents=True)
    (directory / "backing_file").write_text(f"{tmp_path}/run/mnt/swap\n")
    for mountpoint in ("var/mnt", "here", "var/../here"):
        found = swapdevice.find_attached(tmp_path / mountpoint / "swap", tmp_path)
        assert found is not None
        assert found.device == "/dev/loop1"


def test_names_of_strangers_need_not_be_utf_8(kernel: FakeKernel, file: Path) -> None:
    name = b"/a/na\xefve\xc2\xa0\xe2\x80\xa8.img"  # with blanks of Unicode's besides
    other = kernel.root / "sys/block/loop1/loop"
    other.mkdir(parents=True)
    (other / "backing_file").write_bytes(name + b"\n")
    (kernel.root / "proc/self/mountinfo").write_bytes(
        b"1 0 7:1 / " + name + b" rw - ext4 /dev/loop1 rw\n"
    )
    attach(kernel, file)
    with (kernel.root / "proc/swaps").open("ab") as swaps:
        swaps.write(name + b" file 4 0 5\n")
    assert [os.fsencode(item.backing) for item in state.attachments(kernel.root)] == [
        name,
        os.fsencode(file),
    ]
    assert [os.fsencode(area.path) for area in swapdevice.swap_areas(kernel.root)] == [
        b"/dev/loop3",
        name,
    ]
    assert os.fsencode(state.mountpoint_of("/dev/loop1", kernel.root) or "") == name
    assert detach(kernel, file) == ["/dev/loop3"]


async def test_drain_runs_elsewhere_and_tells_what_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, object] = {}

    def fake_detach(
        *files: Path, pool_bytes: int, progress: Callable[[str, int, int], None], identities: object
    ) -> list[str]:
        seen.update(files=files, pool_bytes=pool_bytes, thread=threading.current_thread())
        for left in () if said else (8, 4, 4, 2):
            progress("/dev/loop3", left * MIB, 8 * MIB)
        return ["/dev/loop3"] if not said else []

    said: list[str] = []
    progress_at: list[int] = []
    monkeypatch.setattr(drain, "detach", fake_detach)
    await drain.drain(
        [Path("/a"), Path("/b")],
        pool_bytes=17,
        say=said.append,
        progressed=lambda: progress_at.append(len(said)),
    )
    assert seen["files"] == (Path("/a"), Path("/b"))
    assert seen["pool_bytes"] == 17
    assert seen["thread"] is not threading.main_thread()
    assert said[1:3] == ["swapping off /dev/loop3: 4.0 MiB of 8.0 MiB left"] * 2
    assert progress_at == [2, 4]  # neither at the start nor while it stands still


async def test_drain_takes_back_a_file_that_came_on_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on = [["/dev/loop3"], ["/dev/loop4"], []]
    monkeypatch.setattr(drain, "detach", lambda *_, **__: on.pop(0))
    await drain.drain([Path("/a"), Path("/b")], pool_bytes=0, say=print, progressed=lambda: None)
    assert on == []


async def test_drain_runs_in_the_thread_that_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    offload, said, threads = Offload("attendant"), list[str](), list[str]()

    def fake_detach(*_: Path, progress: Callable[[str, int, int], None], **__: object) -> list[str]:
        threads.append(threading.current_thread().name)
        progress("/dev/loop3", MIB, MIB)
        return []

    monkeypatch.setattr(drain, "detach", fake_detach)
    monkeypatch.setattr(
        trio.to_thread, "run_sync", lambda *_: pytest.fail("a new thread may wait for memory")
    )
    await drain.drain(
        [Path("/a")], pool_bytes=0, say=said.append, progressed=lambda: None, run=offload.run
    )
    assert threads == ["attendant"]
    assert said == ["swapping off /dev/loop3: 1.0 MiB of 1.0 MiB left"]


async def test_drain_waits_a_moment_for_a_swapon_that_has_begun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on: list[list[str]] = [[], [], ["/dev/loop3"], [], []]
    monkeypatch.setattr(drain, "detach", lambda *_, **__: on.pop(0))
    await drain.drain(
        [Path("/a")],
        pool_bytes=0,
        say=print,
        progressed=lambda: None,
        is_opened=lambda: len(on) > 1,
    )
    assert len(on) == 1

    monkeypatch.setattr(drain, "OPENED_S", 0.1)
    looks = []
    monkeypatch.setattr(drain, "detach", lambda *_, **__: looks.append(1) or [])
    with trio.fail_after(5):  # an opener without swap does not stop it for ever
        await drain.drain(
            [Path("/a")], pool_bytes=0, say=print, progressed=lambda: None, is_opened=lambda: True
        )
    assert len(looks) > 1


async def test_drain_passes_a_refusal_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Path, **__: object) -> list[str]:
        raise HeadroomError("too much")

    monkeypatch.setattr(drain, "detach", refuse)
    with pytest.raises(HeadroomError, match="too much"):
        await drain.drain([Path("/a")], pool_bytes=0, say=print, progressed=lambda: None)
