# SPDX-License-Identifier: GPL-2.0-or-later
"""The zswapd of this checkout, packed for a virtual machine.

The payload is a small disk with zswapd, its libraries, the agent and the workload. Each run of the
tests makes it anew, in about two seconds, from the environment of the tests. So it has the same
compiled modules and the same versions of the dependencies. The guest needs the host's Python, and a
C library that is not older than the host's. `unsuitable` says when that is not so.

The guest mounts the disk at /opt/zvm, read-only. It has bin/ with programs, lib/ with Python
packages, units/ with systemd units, and packages/ with Debian packages.
"""

from __future__ import annotations

import compileall
import importlib.metadata
import platform
import py_compile
import re
import shutil
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement

from tools.bench.harness import workload
from tools.bench.harness.system import HarnessError
from tools.vm import image

TOP = Path(__file__).resolve().parents[2]
AGENT = Path(__file__).with_name("agent.c")
GLIBC = (2, 36)
"""The version of the C library in the guest's suite."""
MOUNTPOINT = "/opt/zvm"

_PROGRAM = """\
#!/usr/bin/python3
import sys
sys.path.insert(0, "{mountpoint}/lib")
from zswapd.cli.{name} import main
sys.exit(main())
"""


def unsuitable() -> str:
    """Return why programs built here do not run in the guest, or an empty string."""
    if platform.machine() != "x86_64":
        return f"the virtual machine is x86_64, and this one is {platform.machine()}"
    if sys.version_info[:2] != image.PYTHON:
        guest = ".".join(map(str, image.PYTHON))
        return (
            f"the virtual machine has Python {guest}, and the tests run on"
            f" {platform.python_version()}"
        )
    library, version = platform.libc_ver()
    numbers = tuple(map(int, re.findall(r"\d+", version)))
    if library != "glibc" or numbers > GLIBC:
        return (
            f"the virtual machine has glibc {GLIBC[0]}.{GLIBC[1]}, and this one {library}"
            f" {version}: use Debian 12"
        )
    return ""


def pack(directory: Path, *packages: Path) -> Path:
    """Make the disk in a directory; return its path.

    Args:
        directory: the directory for the disk.
        packages: Debian packages to put on it too.

    Raises:
        HarnessError: a program is missing, a source does not compile, or the guest could not run
            the result.
    """
    reason = unsuitable()
    if reason:
        raise HarnessError(reason)
    tree = directory / "payload"
    for name in ("bin", "lib", "packages"):
        (tree / name).mkdir(parents=True)
    _compile_agent(tree / "bin/agent")
    shutil.copy2(workload.build(), tree / "bin/workload")
    for name in ("zswapd", "zswapctl"):
        program = tree / "bin" / name
        program.write_text(_PROGRAM.format(mountpoint=MOUNTPOINT, name=name))
        program.chmod(0o755)
    copy_packages(tree / "lib")
    shutil.copytree(TOP / "systemd", tree / "units")
    for package in packages:
        shutil.copy2(package, tree / "packages")
    # Bytecode goes by content, because a disk image keeps a file's time only to the second.
    compileall.compile_dir(
        tree / "lib", quiet=2, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
    )
    disk = directory / "payload.img"
    subprocess.run(
        [
            "mke2fs",
            "-q",
            "-t",
            "ext4",
            "-O",
            "^has_journal",
            "-m",
            "0",
            "-d",
            str(tree),
            str(disk),
            "96M",
        ],
        check=True,
        capture_output=True,
        timeout=60,
    )
    shutil.rmtree(tree)
    return disk


def _compile_agent(program: Path) -> None:
    command = [
        "cc",
        "-std=gnu11",
        "-O2",
        "-Wall",
        "-Wextra",
        "-static",
        "-o",
        str(program),
        str(AGENT),
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    if done.returncode != 0:
        raise HarnessError(
            f"agent.c does not compile:\n{done.stderr}", hint="apt-get install gcc libc6-dev"
        )


def copy_packages(target: Path) -> None:
    """Copy zswapd from the checkout, and its installed dependencies with all of theirs."""
    shutil.copytree(TOP / "zswapd", target / "zswapd", ignore=shutil.ignore_patterns("__pycache__"))
    for library in TOP.glob("zswapd__mypyc*.so"):
        shutil.copy2(library, target)
    for name in sorted(_closure("zswapd")):
        for file in importlib.metadata.distribution(name).files or ():
            if ".." not in file.parts and "__pycache__" not in file.parts and file.suffix != ".pyc":
                copy = target / file
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(str(file.locate()), copy)


def _closure(name: str) -> set[str]:
    """Return the distributions that one depends on, directly or not.

    Extras and dependencies for other systems do not count.
    """
    found: set[str] = set()
    wanted = [name]
    while wanted:
        for line in importlib.metadata.requires(wanted.pop()) or ():
            needed = Requirement(line)
            if needed.name not in found and (
                needed.marker is None or needed.marker.evaluate({"extra": ""})
            ):
                found.add(needed.name)
                wanted.append(needed.name)
    return found
