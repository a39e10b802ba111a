# SPDX-License-Identifier: GPL-2.0-or-later
"""What differs between machines: right numbers for those that are known,
and a clear refusal for all others.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import TOP
from tests.support.capabilities import requires_loop
from zswapd.cli import zswapd
from zswapd.core.allocators import arena as arena_module
from zswapd.core.allocators.arena import Arena
from zswapd.errors import MachineError
from zswapd.host import machine
from zswapd.swapdevice.kernel import BLKDISCARD

PROGRAM = """
#include <errno.h>
#include <linux/fs.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/syscall.h>
int main(void)
{
	printf("%lu %d %d ", (unsigned long)BLKDISCARD, MAP_NORESERVE, EHWPOISON);
	printf("%d %d %d %d\\n", SYS_fsopen, SYS_fsconfig, SYS_fsmount, SYS_pidfd_getfd);
}
"""


def test_numbers_are_those_of_this_machines_headers(tmp_path: Path) -> None:
    (tmp_path / "numbers.c").write_text(PROGRAM)
    subprocess.run(["cc", "-o", tmp_path / "numbers", tmp_path / "numbers.c"], check=True)
    said = [
        int(word)
        for word in subprocess.run(
            [tmp_path / "numbers"], check=True, capture_output=True
        ).stdout.split()
    ]
    system_calls = (
        arena_module._SYS_FSOPEN,
        arena_module._SYS_FSCONFIG,
        arena_module._SYS_FSMOUNT,
        438,
    )
    assert said == [BLKDISCARD, machine.numbers().map_noreserve, machine.EHWPOISON, *system_calls]


@pytest.mark.parametrize(
    ("name", "blkdiscard", "noreserve"), [("s390x", 0x1277, 0x4000), ("ppc64le", 0x20001277, 0x40)]
)
def test_numbers_of_other_machines(name: str, blkdiscard: int, noreserve: int) -> None:
    assert machine.plain_ioctl(0x12, 119, name) == blkdiscard
    assert machine.numbers(name).map_noreserve == noreserve


@pytest.mark.parametrize("name", machine.NUMBERS)
def test_known_machines_are_let_in(name: str) -> None:
    machine.check(name)


@pytest.mark.parametrize(
    "name", ["mips64", "sparc64", "alpha", "parisc64", "armv7l", "i686", "ppc"]
)
def test_other_machines_are_refused_with_those_that_are_known(name: str) -> None:
    with pytest.raises(MachineError, match=name) as caught:
        machine.check(name)
    assert "ppc64le" in str(caught.value.hint)


def test_python_of_32_bits_is_refused() -> None:
    with pytest.raises(MachineError, match="64 bits"):
        machine.check("x86_64", longest=(1 << 31) - 1)


def test_daemon_does_not_start_on_an_unknown_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "NUMBERS", {"vax": machine.Numbers(0, 0)})
    assert zswapd.main(["run"]) == MachineError.exit_code
    assert "does not know the kernel's numbers" in capsys.readouterr().err


def test_build_is_refused_on_an_unknown_machine(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, posix\nos.uname = lambda: posix.uname_result(('', '', '', '', 'vax'))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "ZSWAPD_PURE": "1"}
    built = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path],
        check=False,
        cwd=TOP,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert built.returncode != 0
    assert "does not know the kernel's numbers on vax" in built.stderr
    assert not list(tmp_path.rglob("*.so"))


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena(8, mmap.PAGESIZE, kind="memfd", label=b"{}")
    yield made
    made.close()


def test_superblock_is_in_the_machines_byte_order(arena: Arena) -> None:
    """The version is stamped by one store of a machine word, so that is how it has to be read."""
    arena.words32[2] = 0
    arena.is_older = True
    arena.end_rewriting()
    (version,) = struct.unpack_from("=8xI", arena.view)
    assert version == arena_module.LAYOUT_VERSION
    fields = arena_module._SUPERBLOCK.unpack_from(arena.view)
    assert fields == struct.unpack_from("@8sIIQIHH", arena.view), "native, and without padding"
    Arena.adopt(os.dup(arena.fd)).close()


def test_no_word_in_shared_memory_has_a_byte_order_of_its_own() -> None:
    """What is read with an explicit order and written by a machine store is right on some machines
    only.
    """
    for source in (TOP / "zswapd").rglob("*.py"):
        text = source.read_text()
        assert 'Struct("<' not in text, source
        assert 'Struct(">' not in text, source
        assert "ioctl(fd, 0x" not in text, source


@requires_loop()
def test_size_of_a_block_device_takes_no_number(tmp_path: Path) -> None:
    """As `_check_device` finds it; the ioctl's number differs between machines."""
    image = tmp_path / "image"
    image.write_bytes(bytes(3 << 20))
    device = subprocess.run(
        ["losetup", "--find", "--show", image], check=True, capture_output=True, text=True
    ).stdout.strip()
    try:
        fd = os.open(device, os.O_RDONLY | os.O_DIRECT)
        size = os.lseek(fd, 0, os.SEEK_END)
        told = struct.unpack("=Q", fcntl.ioctl(fd, 0x80081272, bytes(8)))[0]  # BLKGETSIZE64 of x86
        os.close(fd)
        assert size == told == 3 << 20
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
