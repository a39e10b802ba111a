# SPDX-License-Identifier: GPL-2.0-or-later
"""The workload has to notice one wrong byte, and its data has to be what it claims to be."""

from __future__ import annotations

import mmap
import re
import shutil
import subprocess
from pathlib import Path

import lz4.block
import pytest

from tools.bench.harness.system import MIB, HarnessError
from tools.bench.harness.workload import Workload, WorkloadOptions, build

PAGE = mmap.PAGESIZE

pytestmark = pytest.mark.skipif(
    not (shutil.which("cc") or shutil.which("gcc")), reason="no C compiler; install gcc"
)


@pytest.fixture(scope="module")
def dumped() -> list[bytes]:
    command = [str(build()), "--mib", "16", "--phases", "dump"]
    data = subprocess.run(command, check=True, capture_output=True, timeout=30).stdout
    assert len(data) == 16 * MIB
    return [data[start : start + PAGE] for start in range(0, len(data), PAGE)]


def test_data_no_two_pages_are_alike(dumped: list[bytes]) -> None:
    assert len(set(dumped)) == len(dumped)
    assert bytes(PAGE) not in dumped  # the kernel swaps no zero pages


def test_data_compresses_as_documented(dumped: list[bytes]) -> None:
    same = [page for page in dumped if page == page[:8] * (PAGE // 8)]
    sizes = [min(PAGE, len(lz4.block.compress(page, store_size=False))) for page in dumped]
    incompressible = sum(size == PAGE for size in sizes)

    assert 0.03 < len(same) / len(dumped) < 0.07
    assert 0.03 < incompressible / len(dumped) < 0.07
    assert 2.4 < PAGE * len(dumped) / sum(sizes) < 2.8


def test_data_depends_on_seed_only() -> None:
    def dump(seed: int) -> bytes:
        command = [str(build()), "--mib", "1", "--phases", "dump", "--seed", str(seed)]
        return subprocess.run(command, check=True, capture_output=True, timeout=30).stdout

    assert dump(1) == dump(1)
    assert dump(1) != dump(2)


def poke(pid: int, page: int, offset: int) -> None:
    """Flip one bit in a page of the workload's data, which is its largest anonymous mapping."""
    mappings = re.findall(
        r"^([0-9a-f]+)-([0-9a-f]+) rw-p 0+ 00:00 0 *$",
        Path(f"/proc/{pid}/maps").read_text(),
        re.MULTILINE,
    )
    start, _ = max(
        ((int(low, 16), int(high, 16)) for low, high in mappings),
        key=lambda pair: pair[1] - pair[0],
    )
    with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
        memory.seek(start + page * PAGE + offset)
        old = memory.read(1)
        memory.seek(start + page * PAGE + offset)
        memory.write(bytes([old[0] ^ 0x10]))


@pytest.mark.parametrize("phase", ["seq", "random", "mixed", "rewrite", "verify"])
@pytest.mark.parametrize("offset", [0, 9, PAGE // 2, PAGE - 1])
def test_one_wrong_bit_is_noticed_by_each_phase(phase: str, offset: int) -> None:
    pages = 8 * MIB // PAGE
    options = WorkloadOptions(8, phases=("fill", phase), faults=pages, rewrites=pages)
    with Workload(options, None) as workload:
        phases = workload.phases()
        assert next(phases).mismatches == 0
        poke(workload.pid, pages // 3, offset)

        assert next(phases).mismatches == 1
        with pytest.raises(
            HarnessError, match=rf"DATA WAS LOST(.|\n)*page {pages // 3} .*from byte {offset} on"
        ):
            next(phases)


def test_swapped_pages_are_noticed() -> None:
    with Workload(WorkloadOptions(8, phases=("fill", "verify")), None) as workload:
        phases = workload.phases()
        next(phases)
        for offset in (8, 9):  # the page's index: as if another page had been read
            poke(workload.pid, 7, offset)
        next(phases)
        with pytest.raises(HarnessError, match="DATA WAS LOST"):
            next(phases)


def test_rewrite_changes_pages_and_verifies_them() -> None:
    with Workload(
        WorkloadOptions(8, phases=("fill", "rewrite", "verify"), rewrites=100), None
    ) as workload:
        assert [(phase.name, phase.mismatches) for phase in workload.phases()] == [
            ("fill", 0),
            ("rewrite", 0),
            ("verify", 0),
        ]


def test_time_limit_ends_the_workload() -> None:
    with Workload(WorkloadOptions(8, phases=("fill", "verify"), time_limit=1), None) as workload:
        phases = workload.phases()
        next(phases)
        assert workload._process is not None
        workload._process.wait(timeout=10)
        with pytest.raises(HarnessError, match="not done after its 1 s"):
            next(phases)


def test_killed_workload_is_reported() -> None:
    with Workload(WorkloadOptions(8, phases=("fill", "verify")), None) as workload:
        phases = workload.phases()
        next(phases)
        assert workload._process is not None
        workload._process.kill()
        workload._process.wait(timeout=10)
        with pytest.raises(HarnessError, match="was killed"):
            next(phases)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--mib is missing"),
        (["--mib", "1", "--phases", "dance"], "unknown phase 'dance'"),
        (["--mib", "1", "--faults", "999"], "at most the number of pages"),
        (["--mib", "1", "--cgroup", "/nowhere"], "/nowhere/cgroup.procs: No such file"),
    ],
)
def test_bad_arguments_are_refused(arguments: list[str], message: str) -> None:
    done = subprocess.run(
        [str(build()), *arguments], check=False, capture_output=True, text=True, timeout=10
    )

    assert done.returncode == 2
    assert message in done.stderr
