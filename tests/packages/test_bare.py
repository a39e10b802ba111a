# SPDX-License-Identifier: GPL-2.0-or-later
"""scripts/demo in a root directory with a bare Debian, without Python and without a compiler.

The kernel and its devices are this machine's, all else is the release's: it takes a mirror of
Debian's and of PyPI's. Ubuntu's mirrors cannot be reached from where these tests were written, so
nothing is said of it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.bench.harness import system

pytestmark = [pytest.mark.kernel, pytest.mark.mount, pytest.mark.package, pytest.mark.timeout(2400)]

TOP = Path(__file__).resolve().parents[2]
PROGRAMS = ("mmdebstrap", "unshare", "chroot", "git", "tar")
DEMO = ("/src/scripts/demo", "--data-mib", "96", "--memory-mib", "32")
SERVE = (
    "cd /src; mkdir /tmp/mnt; PYTHONPATH=/src timeout 10 .venv/bin/python -P -m"
    " tests.support.fileserver /tmp/mnt"
)
LIMIT_S = 1500.0
"""A slow mirror, and a compilation on a machine that has other things to do."""
INSIDE = """
set -e
for place in dev proc sys; do mount --rbind "/$place" "$0/$place"; done
exec chroot "$0" "$@"
"""
HANDED_IN = ("PIP_INDEX_URL", "PIP_DEFAULT_TIMEOUT", "http_proxy", "https_proxy", "no_proxy")
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")


@pytest.fixture(params=["bookworm", "trixie"])
def bare(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A root directory of a release with this checkout in /src, as git has it."""
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    root = tmp_path / "root"
    source = f"deb http://deb.debian.org/debian {request.param} main\n"
    command = [
        "mmdebstrap",
        "--quiet",
        "--mode=root",
        "--variant=minbase",
        request.param,
        str(root),
        "-",
    ]
    private = ["unshare", "--mount", "--propagation", "private"]
    try:
        subprocess.run([*private, *command], input=source, check=True, text=True, timeout=600)
        shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
        shutil.copy(
            CERTIFICATES, root / "certificates.crt"
        )  # with that of a proxy between this machine and PyPI
        (root / "src").mkdir()
        files = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=TOP,
            check=True,
            capture_output=True,
        ).stdout
        packed = subprocess.run(
            ["tar", "--null", "-T", "-", "-c"],
            cwd=TOP,
            input=files,
            check=True,
            capture_output=True,
        ).stdout
        subprocess.run(["tar", "-x", "-C", root / "src"], input=packed, check=True)
        yield root
    finally:
        shutil.rmtree(
            root, ignore_errors=True
        )  # whatever is mounted in it, is so in another namespace


def run_in(root: Path, *command: str) -> tuple[int, str]:
    """Run a program in a root directory; return its exit code and what it said."""
    environment = {name: os.environ[name] for name in HANDED_IN if name in os.environ}
    environment |= {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "PIP_CERT": "/certificates.crt",
    }
    with subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", INSIDE, str(root), *command],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            said = process.communicate(timeout=LIMIT_S)[0]
        except BaseException:
            # Not SIGKILL: it may have swapped on.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.communicate(timeout=60)
            raise
    return process.returncode, said


def test_demo_installs_what_is_missing_and_runs(bare: Path) -> None:
    code, said = run_in(bare, *DEMO)
    print(said)
    assert code == 0
    assert "installing gcc" in said
    assert "all 96 MiB verified" in said
    assert "nothing left behind" in said
    assert not [path for path in (bare / "tmp").iterdir() if path.name.startswith("zswapd")]
    assert system.loops_below(bare) == []

    # The hook works, whatever the release's libfuse calls its functions.
    assert '"ready": true' in run_in(bare, "sh", "-c", SERVE)[1]

    code, said = run_in(bare, *DEMO)  # and now nothing is missing
    assert code == 0
    assert said.startswith("starting zswapd\n")
