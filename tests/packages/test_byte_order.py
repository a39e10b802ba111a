# SPDX-License-Identifier: GPL-2.0-or-later
"""The core on a machine of the other byte order: an emulated Python of Debian's s390x port,
with the C modules built for it.

Pages of every kind are stored by each allocator, for each size of page, and taken over twice. What
the kernel does is this machine's; whether the modules were built right, and words are read as they
were written, is the other's.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
TRIPLET = "s390x-linux-gnu"
TOOLS = ("mmdebstrap", "qemu-s390x-static", f"{TRIPLET}-gcc")
PACKAGES = (
    "python3",
    "python3-lz4",
    "python3-lzo",
    "python3-zstandard",
    "python3-xxhash",
    "python3-hypothesis",
    "libpython3.11-dev",
    "liblz4-dev",
    "libxxhash-dev",
)
MODULES = {
    "allocators/_populate": ("core/allocators/_populate.c",),
    "pam/_pages": ("core/pam/_pages.c", "core/pam/_digest.c", "core/pam/_digest_avx2.c"),
}
PROGRAM = """
import mmap, sys
assert sys.byteorder == "big"
from tests.support.successor import check_all, fill, make_config, succeed
from zswapd.core.allocators.arena import Arena
from zswapd.core.core import Core

populate = Arena.populate

def touched(self, offset, length, **more):
    # The emulator ignores MADV_POPULATE_WRITE, and untouched memory is no data to the kernel.
    done = populate(self, offset, length, **more)
    for at in range(offset - offset % mmap.PAGESIZE, offset + done, mmap.PAGESIZE):
        self.view[at] = self.view[at]
    return done

Arena.populate = touched
for page_size in (4096, 16384, 65536):
    for allocator in ("zsmalloc", "zbud"):
        settings = ("memory.arena=memfd", f"pool.allocator={allocator}")
        config = make_config(*settings, page_size=page_size)
        core = Core(config)
        assert core.zv.packer is not None
        core.self_test()
        expected = fill(core, 200)
        for _ in range(2):
            core = succeed(core, config)
            check_all(core, expected)
            assert core.statistics().recovery.damaged == 0
        core.close()
print("all is well")
"""


def run(*command: object, limit: float = 600, **more: object) -> str:
    done = subprocess.run(  # type: ignore[call-overload]
        [str(word) for word in command],
        check=False,
        capture_output=True,
        text=True,
        timeout=limit,
        **more,
    )
    assert done.returncode == 0, f"{command[0]}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return str(done.stdout)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with the files of that machine."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        pytest.skip(
            f"{', '.join(missing)} is missing: apt install mmdebstrap qemu-user-static"
            f" gcc-{TRIPLET} libc6-dev-s390x-cross"
        )
    path = tmp_path_factory.mktemp("s390x") / "root"
    run(
        "mmdebstrap",
        "--architectures=s390x",
        "--variant=extract",
        f"--include={','.join(PACKAGES)}",
        "bookworm",
        path,
    )
    return path


@pytest.mark.package
@pytest.mark.timeout(1200)
def test_pages_are_stored_and_taken_over_on_a_big_endian_machine(
    root: Path, tmp_path: Path
) -> None:
    tree, headers, libraries = tmp_path / "tree", root / "usr/include", root / "usr/lib" / TRIPLET
    for name in ("zswapd", "tests/__init__.py", "tests/support"):
        source, target = TOP / name, tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(source, target)
    for module, sources in MODULES.items():
        paths = (
            f"-I{headers}/python3.11",
            f"-I{headers}/{TRIPLET}/python3.11",
            "-idirafter",
            headers,
        )
        files = [tree / "zswapd" / source for source in sources]
        target = tree / "zswapd" / f"{module}.so"
        run(
            f"{TRIPLET}-gcc",
            "-shared",
            "-fPIC",
            "-O2",
            *paths,
            *files,
            "-o",
            target,
            libraries / "liblz4.so.1",
        )
    (tree / "program.py").write_text(PROGRAM)
    variables = {
        "LD_LIBRARY_PATH": libraries,
        "PYTHONHOME": root / "usr",
        "PYTHONPATH": f"{tree}:{root}/usr/lib/python3/dist-packages",
    }
    given = [word for name, value in variables.items() for word in ("-E", f"{name}={value}")]
    said = run(
        "qemu-s390x-static", "-L", root, *given, root / "usr/bin/python3.11", "program.py", cwd=tree
    )
    assert "all is well" in said
