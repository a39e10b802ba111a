# SPDX-License-Identifier: GPL-2.0-or-later
"""The names that fuse_session_new() has in newer libfuses.

A pyfuse3 that was compiled with their headers gets the hook.

With the headers of libfuse 3.17 a call of fuse_session_new() is one of another function with the
version as a further argument. No machine has all of them, so a library made here stands for
libfuse, and another one for pyfuse3.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.support import TOP

HOOK = TOP / "zswapd/fuse/_lowlevel.c"
NAMES = ["fuse_session_new_versioned", "_fuse_session_new_317"]

LIBFUSE = """
#include <stddef.h>
void *seen[5];
static int session;
void *NAME(void *args, void *ops, size_t size, void *version, void *userdata)
{
	seen[0] = args, seen[1] = ops, seen[2] = (void *)size;
	seen[3] = version, seen[4] = userdata;
	return &session;
}
void *the_session(void) { return &session; }
"""

PYFUSE3 = """
#define FUSE_USE_VERSION 35
#include <fuse_lowlevel.h>
void *NAME(void *args, const void *ops, size_t size, void *version, void *userdata);
extern void *seen[5];
void *the_session(void);
static struct fuse_lowlevel_ops ops;
static void read_(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off, struct fuse_file_info *fi)
{ (void)req, (void)ino, (void)size, (void)off, (void)fi; }
static void lookup_(fuse_req_t req, fuse_ino_t parent, const char *name)
{ (void)req, (void)parent, (void)name; }

/* 0 if all arguments arrive unchanged but the table, which has the hook's functions in place. */
int check(int is_hooked)
{
	int args, version, userdata;

	ops.lookup = lookup_;
	ops.read = read_;
	if (NAME(&args, &ops, sizeof(ops), &version, &userdata) != the_session())
		return 1;
	if (seen[0] != &args || seen[2] != (void *)sizeof(ops))
		return 2;
	if (seen[3] != &version || seen[4] != &userdata)
		return 2;
	const struct fuse_lowlevel_ops *got = seen[1];
	if (got->lookup != lookup_)
		return 3;
	if (!is_hooked)
		return got == &ops ? 0 : 4;
	if (got->read == read_ || !got->read || !got->write || !got->fallocate || !got->init)
		return 5;
	return got->write_buf ? 5 : 0;
}
"""

NEWER_HEADER = """
#include_next <fuse_lowlevel.h>
struct libfuse_version;
struct fuse_session *NAME(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t,
                          CONST struct libfuse_version *, void *);
static inline struct fuse_session *
fuse_session_new_fn(struct fuse_args *args, const struct fuse_lowlevel_ops *op, size_t size,
                    void *userdata)
{ return NAME(args, op, size, NULL, userdata); }
#define fuse_session_new(args, op, size, userdata) fuse_session_new_fn(args, op, size, userdata)
"""

PROGRAM = """
import ctypes, importlib.util, os, sys
sys.setdlopenflags(os.RTLD_NOW | os.RTLD_GLOBAL)  # as zswapd.fuse does it
spec = importlib.util.spec_from_file_location("_lowlevel", sys.argv[1])
lowlevel = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lowlevel)
pyfuse3 = ctypes.CDLL(sys.argv[2])
assert pyfuse3.check(0) == 0  # loaded, it only passes calls on
lowlevel.attach(len, len, len, poll_us=0, budget_us=1000, max_io=1 << 20, max_background=1)
assert (got := pyfuse3.check(1)) == 0, got
assert pyfuse3.check(0) == 0  # one session is ours, no other
"""


def flags_of(package: str) -> list[str]:
    command = ["pkg-config", "--cflags", "--libs", package]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=20
    ).stdout.split()


def compiled(source: str, target: Path, *flags: str | Path) -> Path:
    command = [
        "cc",
        "-shared",
        "-fPIC",
        "-Wl,--no-as-needed",
        "-o",
        target,
        "-x",
        "c",
        "-",
        "-x",
        "none",
        *flags,
    ]
    subprocess.run(command, input=source, check=True, text=True, timeout=60)
    return target


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("const", ["", "const"])
@pytest.mark.slow
def test_hook_compiles_with_the_headers_that_declare_a_newer_name(
    tmp_path: Path, name: str, const: str
) -> None:
    (tmp_path / "fuse_lowlevel.h").write_text(
        NEWER_HEADER.replace("NAME", name).replace("CONST", const)
    )
    python = f"-I{sysconfig.get_path('include')}"
    flags = (
        f"-I{tmp_path}",
        python,
        *flags_of("fuse3"),
        "-O2",
        "-Wall",
        "-Wextra",
        "-Wno-cast-function-type",
        "-Werror",
    )
    compiled(HOOK.read_text(), tmp_path / "_lowlevel.so", *flags)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_a_session_made_by_a_newer_name_gets_the_hook(tmp_path: Path, name: str) -> None:
    libfuse = compiled(LIBFUSE.replace("NAME", name), tmp_path / "libnewer.so")
    python = f"-I{sysconfig.get_path('include')}"
    # The hook looks behind itself, which is in what it was linked with.
    hook = compiled(
        HOOK.read_text(), tmp_path / "_lowlevel.so", python, libfuse, *flags_of("fuse3")
    )
    pyfuse3 = compiled(
        PYFUSE3.replace("NAME", name),
        tmp_path / "pyfuse3.so",
        "-Wall",
        "-Werror",
        *flags_of("fuse3"),
    )
    command = [sys.executable, "-P", "-c", PROGRAM, hook, pyfuse3]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
