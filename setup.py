# SPDX-License-Identifier: GPL-2.0-or-later
"""Build of what is compiled; everything else is in pyproject.toml.

Five things are:

- `zswapd.fuse._lowlevel`, the hook, in C. It is linked to the libfuse3 that pkg-config names, which
  must be the one pyfuse3 was built against: it stands between the two (docs/architecture.md, "the
  hook").
- `zswapd.core.allocators._populate`, which fills the reserve, in C because it must not take the GIL
  between its steps;
- `zswapd.core.backing._disk`, requests to the disk and their encryption, in C because that must not
  take the GIL either;
- `zswapd.core.pam._pages`, LZ4 pages behind their headers in one call, from the distribution's LZ4
  and xxHash (header only);
- the modules of the page path, by mypyc, from the same Python source that runs without compilation.
  ZSWAPD_PURE=1 leaves them out: everything works, a store takes about a quarter longer.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup

PAGE_PATH = [
    "zswapd/core/allocators/base.py",
    "zswapd/core/allocators/frametable.py",
    "zswapd/core/allocators/jobs.py",
    "zswapd/core/allocators/lru.py",
    "zswapd/core/allocators/pageframes.py",
    "zswapd/core/allocators/sizeclasses.py",
    "zswapd/core/allocators/zbud.py",
    "zswapd/core/allocators/zsmalloc.py",
    "zswapd/core/block/backed.py",
    "zswapd/core/block/device.py",
    "zswapd/core/block/slotmap.py",
    "zswapd/core/compress/lz4.py",
    "zswapd/core/compress/lzo.py",
    "zswapd/core/compress/zstd.py",
    "zswapd/core/crashpoints.py",
    "zswapd/core/frontends/cleancache.py",
    "zswapd/core/frontends/frontswap.py",
    "zswapd/core/memory.py",
    "zswapd/core/pam/accounts.py",
    "zswapd/core/pam/recovery.py",
    "zswapd/core/pam/zbuds.py",
    "zswapd/core/pam/zpages.py",
    "zswapd/core/pam/zv.py",
    "zswapd/core/reclaim/eviction.py",
    "zswapd/core/tmem/tmem.py",
    "zswapd/core/tmem/objnodes.py",
    "zswapd/core/tmem/pool.py",
    "zswapd/core/tmem/radix.py",
]

FUSE = ("fuse3", "libfuse3-dev")
CRYPTO = ("libcrypto", "libssl-dev")
LZ4 = ("liblz4", "liblz4-dev")
XXHASH = ("libxxhash", "libxxhash-dev")
"""pkg-config's names, and Debian's."""


def pkg_config(option: str, library: str, package: str) -> list[str]:
    """Return what pkg-config says about a library, or end with what to install."""
    try:
        result = subprocess.run(
            ["pkg-config", option, library], check=True, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        raise SystemExit(
            f"{library} was not found; install it with: apt install {package} pkg-config"
        ) from None
    return shlex.split(result.stdout)


def refuse_unknown_machine() -> None:
    """End with the reason if the program would not run on this machine.

    It would not where the kernel's numbers of the machine are not known.
    """
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from zswapd.errors import MachineError
    from zswapd.host.machine import check

    try:
        check()
    except MachineError as error:
        raise SystemExit(str(error)) from None
    finally:
        del sys.path[0]


COMPILES_NOTHING = {"egg_info", "dist_info", "sdist"}
"""Commands that want names and sources only.

Mypyc would compile at each, and its C files would go into the sdist.
"""


def compiled_page_path() -> list[Extension]:
    """Return what mypyc makes of the page path.

    Nothing when ZSWAPD_PURE is set, or nothing is to be compiled.
    """
    if os.environ.get("ZSWAPD_PURE") or COMPILES_NOTHING & set(sys.argv):
        return []
    from mypyc.build import mypycify

    return mypycify(["--ignore-missing-imports", *PAGE_PATH], opt_level="3", group_name="zswapd")


if not COMPILES_NOTHING & set(sys.argv):
    refuse_unknown_machine()

setup(
    ext_modules=[
        Extension(
            "zswapd.fuse._lowlevel",
            sources=["zswapd/fuse/_lowlevel.c"],
            extra_compile_args=[
                *pkg_config("--cflags", *FUSE),
                *pkg_config("--cflags", *XXHASH),
                "-O2",
                "-Wall",
                "-Wextra",
                "-Wno-cast-function-type",
            ],
            extra_link_args=pkg_config("--libs", *FUSE),
        ),
        Extension(
            "zswapd.core.allocators._populate",
            sources=["zswapd/core/allocators/_populate.c"],
            extra_compile_args=["-O2", "-Wall", "-Wextra"],
        ),
        Extension(
            "zswapd.core.backing._disk",
            sources=["zswapd/core/backing/_disk.c"],
            extra_compile_args=[*pkg_config("--cflags", *CRYPTO), "-O2", "-Wall", "-Wextra"],
            extra_link_args=pkg_config("--libs", *CRYPTO),
        ),
        Extension(
            "zswapd.core.pam._pages",
            sources=[
                "zswapd/core/pam/_pages.c",
                "zswapd/core/pam/_digest.c",
                "zswapd/core/pam/_digest_avx2.c",
            ],
            depends=["zswapd/core/pam/_digest.h"],
            extra_compile_args=[
                *pkg_config("--cflags", *LZ4),
                *pkg_config("--cflags", *XXHASH),
                "-O2",
                "-Wall",
                "-Wextra",
            ],
            extra_link_args=pkg_config("--libs", *LZ4),
        ),
        *compiled_page_path(),
    ]
)
