# SPDX-License-Identifier: GPL-2.0-or-later
"""Standard files that are closed, full, stopped or gone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support import TOP
from zswapd.cli.standard_files import LossyFile

COMPLETE = """
import os, sys
from zswapd.cli import standard_files
standard_files.complete()
for number, name in enumerate(("stdin", "stdout", "stderr")):
    assert os.get_inheritable(number)
    assert getattr(sys, name) is not None
assert sys.stdin.read() == "" or 0 not in {closed}
print("out")
print("err", file=sys.stderr)
sys.stdout.flush()
"""


@pytest.mark.parametrize(
    "closed", [(), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)], ids=str
)
def test_closed_files_are_the_null_device(closed: tuple[int, ...]) -> None:
    program = COMPLETE.format(closed=closed)
    redirections = " ".join(f"{number}{'<' if number == 0 else '>'}&-" for number in closed)
    command = ["sh", "-c", f'exec "$@" {redirections}', "sh", sys.executable, "-c", program]
    done = subprocess.run(
        command, cwd=TOP, check=False, capture_output=True, stdin=subprocess.DEVNULL, timeout=30
    )
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == (
        b"" if 1 in closed else b"out\n",
        b"" if 2 in closed else b"err\n",
    )


NEVER_WAIT = """
import os, sys
from zswapd.cli import standard_files
standard_files.never_wait()
for stream in (sys.stdout, sys.stderr):
    for _ in range(100):
        print("x" * 4000, file=stream)
    print("\\udcff\\u20ac", file=stream, flush=True)
sys.__stdout__.flush()
open(sys.argv[1], "w").write("done")
"""


@pytest.mark.parametrize("kind", ["pipe", "no reader", "full", "terminal", "terminal gone", "file"])
def test_output_never_waits_and_never_fails(tmp_path: object, kind: str) -> None:
    screen = -1
    if kind in ("pipe", "no reader"):
        screen, output = os.pipe()
    elif kind.startswith("terminal"):
        screen, output = os.openpty()
    else:
        output = os.open(
            "/dev/full" if kind == "full" else f"{tmp_path}/file",
            os.O_WRONLY | os.O_CREAT | os.O_APPEND,
        )
    try:
        os.set_inheritable(output, True)
        if kind in ("no reader", "terminal gone"):
            os.close(screen)
            screen = -1
        command = [sys.executable, "-c", NEVER_WAIT, f"{tmp_path}/done"]
        environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        done = subprocess.run(
            command,
            cwd=TOP,
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            timeout=30,
        )
        assert done.returncode == 0
        with open(f"{tmp_path}/done") as file:
            assert file.read() == "done"
        assert os.get_blocking(output)  # the description that the shell has, too, is as it was
        if kind == "file":
            assert os.stat(f"{tmp_path}/file").st_size > 800_000
    finally:
        os.close(output)
        if screen >= 0:
            os.close(screen)


def test_lossy_file_writes_what_can_be_written() -> None:
    end, begin = os.pipe()
    os.set_blocking(begin, False)
    try:
        file = LossyFile(begin)
        assert file.writable()
        assert file.fileno() == begin
        assert file.write(b"x" * (1 << 20)) == 1 << 20
        assert 0 < len(os.read(end, 1 << 20)) < 1 << 20
        file.close()
        os.fstat(begin)
    finally:
        os.close(end)
        os.close(begin)
