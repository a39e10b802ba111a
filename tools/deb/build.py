# SPDX-License-Identifier: GPL-2.0-or-later
"""The Debian package: zswapd as compiled in this checkout, with all its Python packages.

The package contains the Python packages in the versions that the tests ran with, in
/usr/lib/zswapd. pyfuse3 and the hook have to agree on one libfuse3, which is the distribution's.
Both are built against it here, and dpkg-shlibdeps makes that a dependency. So a package is for the
release that it was built on, and needs no compiler there.

The release's own Python runs the programs with -I and -S. It sees neither the machine's other
Python packages nor the caller's environment. The package contains bytecode, so a start of the
daemon compiles nothing.

dpkg-deb alone makes the package. packaging/ and systemd/ have its fixed files; man/ and
completions/ have the generated ones. The same checkout gives the same package each time
(SOURCE_DATE_EPOCH, by default the time of the last commit).
"""

from __future__ import annotations

import compileall
import gzip
import hashlib
import os
import py_compile
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tools.bench.harness.system import HarnessError
from tools.vm.payload import copy_packages
from zswapd import __version__
from zswapd.cli import sources
from zswapd.cli.config import template

if TYPE_CHECKING:
    from collections.abc import Iterator

TOP = Path(__file__).resolve().parents[2]
PRIVATE = "usr/lib/zswapd"
DOC = "usr/share/doc/zswapd"
CONFFILES = ("etc/zswapd/zswapd.toml",)
MAINTAINER = "zswapd maintainers <maintainers@zswapd.example>"
COMMAND_LIMIT_S = 300.0
_UNUSED = {"tests", "_tests"}
"""Directories of Python packages that the program does not need."""

_CONTROL = """\
Package: zswapd
Version: {version}
Architecture: {architecture}
Maintainer: {maintainer}
Installed-Size: {size}
Depends: {depends}
Recommends: systemd
Section: admin
Priority: optional
Description: compressed swap in user space
 zswapd serves a FUSE file that the kernel swaps to, and keeps what is swapped
 out compressed in memory. The process that serves may be killed or upgraded at
 any time: the next one takes over, and no page is lost.
 .
 It is off after installation: systemctl enable --now zswapd
"""

_PROGRAM = """\
#!{python} -IS
import sys
sys.path.insert(0, "/{private}")
from zswapd.cli.{name} import main
sys.exit(main())
"""

_CHANGELOG = """\
zswapd ({version}) unstable; urgency=medium

  * Built from the sources of zswapd {upstream}.

 -- {maintainer}  {date}
"""


def build(output: Path, *, revision: str = "1") -> Path:
    """Make the package from this checkout, whose modules have to be compiled; return its path.

    Args:
        output: the directory for the package, made if missing.
        revision: the Debian revision, after the program's version.

    Raises:
        HarnessError: a tool is missing, or the parts do not fit together.
    """
    version = f"{__version__}-{revision}"
    epoch = (
        os.environ.get("SOURCE_DATE_EPOCH")
        or _run("git", "-C", str(TOP), "log", "-1", "--format=%ct").strip()
    )
    with tempfile.TemporaryDirectory(prefix="zdeb-") as name:
        tree = Path(name) / "tree"
        _install_program(tree)
        _install_files(tree)
        _install_docs(tree, version, epoch)
        _set_modes(tree)
        _write_control(tree, Path(name), version)
        output.mkdir(parents=True, exist_ok=True)
        package = output / f"zswapd_{version}_{_architecture()}.deb"
        _run(
            "dpkg-deb",
            "--root-owner-group",
            "-Zgzip",
            "--build",
            str(tree),
            str(package),
            SOURCE_DATE_EPOCH=epoch,
        )
    return package


def _python() -> str:
    return f"/usr/bin/python{sys.version_info[0]}.{sys.version_info[1]}"


def _install_program(tree: Path) -> None:
    private = tree / PRIVATE
    private.mkdir(parents=True)
    copy_packages(private)
    for path in sorted(private.rglob("*"), reverse=True):
        if path.is_dir() and path.name in _UNUSED:
            shutil.rmtree(path)
        elif path.suffix == ".c":
            path.unlink()
    for library in private.rglob("*.so"):
        _run("strip", "--strip-unneeded", str(library))
    # Bytecode goes by content: unpacked files have other times than compiled ones.
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    compileall.compile_dir(
        private, quiet=2, stripdir=str(tree), prependdir="/", invalidation_mode=mode
    )
    for name in ("zswapd", "zswapctl"):
        program = tree / "usr/bin" / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(_PROGRAM.format(python=_python(), private=PRIVATE, name=name))


def _install_files(tree: Path) -> None:
    shutil.copytree(TOP / "systemd", tree / "usr/lib/systemd/system")
    for name in ("zswapd", "zswapctl"):
        _copy(TOP / "completions" / name, tree / "usr/share/bash-completion/completions" / name)
        _copy(
            TOP / "completions" / f"_{name}", tree / "usr/share/zsh/vendor-completions" / f"_{name}"
        )
    _copy(TOP / "packaging/sysctl.conf", tree / "usr/lib/sysctl.d/60-zswapd.conf")
    _copy(TOP / "packaging/tmpfiles.conf", tree / "usr/lib/tmpfiles.d/zswapd.conf")
    config = tree / "etc/zswapd/zswapd.toml"
    config.parent.mkdir(parents=True)
    config.write_text("".join(f"{line}\n" for line in template(sources.context())))
    (config.parent / "zswapd.toml.d").mkdir()


def _install_docs(tree: Path, version: str, epoch: str) -> None:
    for page in (TOP / "man").iterdir():
        _compress(
            page.read_bytes(), tree / f"usr/share/man/man{page.suffix[1:]}" / f"{page.name}.gz"
        )
    _copy(TOP / "README.md", tree / DOC / "README.md")
    for file in (path for path in (TOP / "docs").rglob("*") if path.is_file()):
        _copy(file, tree / DOC / file.relative_to(TOP / "docs"))
    shutil.copytree(TOP / "monitoring", tree / DOC / "examples")
    _copy(TOP / "packaging/debian/copyright", tree / DOC / "copyright")
    _copy(TOP / "packaging/debian/lintian-overrides", tree / "usr/share/lintian/overrides/zswapd")
    date = _run("date", "--utc", "--rfc-email", f"--date=@{epoch}").strip()
    text = _CHANGELOG.format(
        version=version, upstream=__version__, maintainer=MAINTAINER, date=date
    )
    _compress(text.encode(), tree / DOC / "changelog.Debian.gz")


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _compress(data: bytes, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(gzip.compress(data, 9, mtime=0))


def _set_modes(tree: Path) -> None:
    """Give all files the modes of a package, independent of the umask and of the sources."""
    for path in (tree, *tree.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or path.parent == tree / "usr/bin" else 0o644)


def _write_control(tree: Path, work: Path, version: str) -> None:
    files = sorted(path for path in tree.rglob("*") if path.is_file())
    size = sum((path.stat().st_size + 1023) // 1024 for path in files) + sum(
        path.is_dir() for path in tree.rglob("*")
    )
    depends = ", ".join([Path(_python()).name, "mount", *_libraries(tree, work)])
    control = tree / "DEBIAN"
    control.mkdir()
    fields = {
        "version": version,
        "architecture": _architecture(),
        "maintainer": MAINTAINER,
        "size": size,
        "depends": depends,
    }
    (control / "control").write_text(_CONTROL.format(**fields))
    (control / "conffiles").write_text("".join(f"/{name}\n" for name in CONFFILES))
    sums = (
        f"{hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()} "
        f" {path.relative_to(tree)}"
        for path in files
    )
    (control / "md5sums").write_text(
        "".join(f"{line}\n" for line in sums if not line.endswith(CONFFILES))
    )
    for name in ("postinst", "prerm", "postrm"):
        _copy(TOP / "packaging/debian" / name, control / name)
        (control / name).chmod(0o755)


def _libraries(tree: Path, work: Path) -> Iterator[str]:
    """Yield the dependencies that follow from the libraries of the compiled modules."""
    (work / "debian").mkdir()
    (work / "debian/control").write_text("Source: zswapd\n\nPackage: zswapd\nArchitecture: any\n")
    libraries = [str(path) for path in sorted(tree.rglob("*.so"))]
    found = _run("dpkg-shlibdeps", "-O", *(f"-e{path}" for path in libraries), directory=work)
    depends = re.search(r"^shlibs:Depends=(.*)$", found, re.MULTILINE)
    if depends is None or "libfuse3" not in depends[1]:
        raise HarnessError(f"dpkg-shlibdeps does not see that zswapd needs libfuse3: {found!r}")
    yield from depends[1].split(", ")


def _architecture() -> str:
    return _run("dpkg", "--print-architecture").strip()


def _run(*command: str, directory: Path | None = None, **environment: str) -> str:
    try:
        done = subprocess.run(
            command,
            check=False,
            capture_output=True,
            text=True,
            timeout=COMMAND_LIMIT_S,
            cwd=directory,
            env={**os.environ, **environment, "LC_ALL": "C"},
        )
    except FileNotFoundError as error:
        raise HarnessError(
            f"{command[0]} is not installed", hint="scripts/deb installs all that is needed"
        ) from error
    if done.returncode != 0:
        raise HarnessError(f"{command[0]} failed:\n{done.stdout}{done.stderr}")
    return done.stdout
