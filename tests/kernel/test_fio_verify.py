# SPDX-License-Identifier: GPL-2.0-or-later
"""fio writes checksummed blocks, mixes discards in, and reads everything back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.swap import Stage
from tools.bench.harness import system

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.mount,
    pytest.mark.slow,
    pytest.mark.timeout(120),
    pytest.mark.skipif(
        not shutil.which("fio"), reason="fio is not installed; install the package fio"
    ),
]

COMMON = (
    "--verify=crc32c",
    "--verify_fatal=1",
    "--do_verify=1",
    "--direct=1",
    "--output-format=json",
    "--randseed=7",
)
COMPRESSIBLE = (
    "--refill_buffers=1",
    "--buffer_compress_percentage=60",
    "--buffer_compress_chunk=512",
)


def fio(directory: Path, name: str, target: str, *options: str) -> dict[str, Any]:
    """Run one job on `target` and return its report.

    Fio exits non-zero on the first block that differs.
    """
    report = directory / f"{name}.json"
    words = [
        "fio",
        f"--name={name}",
        f"--filename={target}",
        f"--output={report}",
        f"--aux-path={directory}",
    ]
    system.run(*words, *COMMON, *COMPRESSIBLE, *options, limit=90)
    text = report.read_text()
    job: dict[str, Any] = json.loads(text[text.index("{") :])["jobs"][0]
    assert job["error"] == 0
    return job


@pytest.mark.parametrize("pattern", ["write", "randwrite"])
def test_mounted_file_verifies(stage: Stage, tmp_path: Path, pattern: str) -> None:
    daemon = stage.daemon(size="128M")
    options = (
        f"--rw={pattern}",
        "--size=96M",
        "--bsrange=4k-128k",
        "--ioengine=libaio",
        "--iodepth=16",
        "--fallocate=none",
    )

    job = fio(tmp_path, pattern, str(daemon.file), *options)

    assert job["read"]["io_bytes"] >= 60 << 20  # what was verified


def test_mounted_file_verifies_partial_pages(stage: Stage, tmp_path: Path) -> None:
    daemon = stage.daemon(size="64M")
    options = ("--rw=randwrite", "--size=8M", "--bs=512", "--ioengine=psync", "--fallocate=none")

    job = fio(tmp_path, "partial", str(daemon.file), *options)

    assert job["read"]["io_bytes"] == 8 << 20


def test_loop_device_verifies_with_discards_mixed_in(stage: Stage, tmp_path: Path) -> None:
    daemon = stage.daemon(size="128M")
    device = system.attach_loop(daemon.file)
    try:
        # Each block is trimmed, then written; a third is trimmed again later and has to read as
        # zeros in the end.
        options = (
            "--rw=randtrimwrite",
            "--size=96M",
            "--bs=16k",
            "--ioengine=libaio",
            "--iodepth=8",
        )
        trims = (
            "--trim_percentage=33",
            "--trim_verify_zero=1",
            "--trim_backlog=64",
            "--trim_backlog_batch=16",
        )

        job = fio(tmp_path, "trim", device, *options, *trims)

        assert job["read"]["io_bytes"] == 96 << 20  # what was verified
        assert job["trim"]["io_bytes"] > 110 << 20
        assert 0 < daemon.pool_sample().page_bytes < 80 << 20
        system.run("blkdiscard", device)
        assert daemon.pool_sample().pages == 0
    finally:
        system.detach_loop(device)


def test_loop_device_trims_at_random(stage: Stage, tmp_path: Path) -> None:
    daemon = stage.daemon(size="128M")
    device = system.attach_loop(daemon.file)
    try:
        fio(tmp_path, "fill", device, "--rw=write", "--size=64M", "--bs=64k")
        before = daemon.pool_sample().pages

        system.run(
            "fio",
            "--name=trim",
            f"--filename={device}",
            "--rw=randtrim",
            "--bs=64k",
            "--size=64M",
            "--io_size=32M",
            "--direct=1",
        )

        assert before == (64 << 20) // daemon.ctl_json("status")["page_size"]
        assert daemon.pool_sample().pages == before // 2
    finally:
        system.detach_loop(device)
