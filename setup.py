# SPDX-License-Identifier: GPL-2.0-or-later
"""Build of the one C extension; everything else is in pyproject.toml.

The extension is linked to the libfuse3 that pkg-config names, which must be the one pyfuse3 was built against: it stands
between the two (docs/architecture.md, "the hook").
"""

import shlex
import subprocess

from setuptools import Extension, setup


def pkg_config(option: str) -> list[str]:
    return shlex.split(subprocess.run(["pkg-config", option, "fuse3"], check=True, capture_output=True, text=True).stdout)


setup(
    ext_modules=[
        Extension(
            "zswapd.fuse._lowlevel",
            sources=["zswapd/fuse/_lowlevel.c"],
            extra_compile_args=[
                *pkg_config("--cflags"),
                "-O2",
                "-Wall",
                "-Wextra",
                "-Wno-cast-function-type",
            ],
            extra_link_args=pkg_config("--libs"),
        )
    ]
)
