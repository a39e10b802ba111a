# SPDX-License-Identifier: GPL-2.0-or-later
"""What is in the Debian package. What it does once installed is tried in test_container.py."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.packages.test_units import SERVICES
from tools.deb.build import build
from zswapd import __version__

TOP = Path(__file__).resolve().parents[2]


def run(*command: str | Path) -> str:
    done = subprocess.run(
        command,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def package(packages: Path) -> Path:
    (found,) = (packages / "first").iterdir()
    return found


@pytest.fixture(scope="module")
def contents(package: Path) -> dict[str, str]:
    """Mode and owner of everything in it, by path."""
    lines = (line.split(maxsplit=5) for line in run("dpkg-deb", "--contents", package).splitlines())
    return {path.removeprefix("."): f"{mode} {owner}" for mode, owner, _, _, _, path in lines}


def test_it_has_all_that_a_person_expects(contents: dict[str, str]) -> None:
    expected = {
        "/usr/bin/zswapd",
        "/usr/bin/zswapctl",
        *(f"/usr/lib/systemd/system/{name}" for name in SERVICES),
        "/usr/lib/systemd/system/dev-.swap.d/zswapd.conf",
        "/usr/lib/systemd/system/init.scope.d/zswapd.conf",
        "/usr/lib/sysctl.d/60-zswapd.conf",
        "/usr/lib/tmpfiles.d/zswapd.conf",
        "/etc/zswapd/zswapd.toml",
        "/etc/zswapd/zswapd.toml.d/",
        "/usr/share/man/man8/zswapd.8.gz",
        "/usr/share/man/man8/zswapctl.8.gz",
        "/usr/share/man/man5/zswapd.toml.5.gz",
        "/usr/share/bash-completion/completions/zswapctl",
        "/usr/share/zsh/vendor-completions/_zswapctl",
        "/usr/share/doc/zswapd/README.md",
        "/usr/share/doc/zswapd/operations.md",
        "/usr/share/doc/zswapd/figures/README.md",
        "/usr/share/doc/zswapd/copyright",
        "/usr/share/doc/zswapd/examples/zswapd.rules.yml",
    }
    assert not expected - set(contents)


def test_it_has_nothing_elsewhere_and_nothing_that_only_builds_or_tests(
    contents: dict[str, str],
) -> None:
    places = ("/usr/", "/etc/zswapd/")
    assert not [
        path for path in contents if not path.startswith(places) and path not in ("/", "/etc/")
    ]
    private = [
        path.removeprefix("/usr/lib/zswapd/")
        for path in contents
        if path.startswith("/usr/lib/zswapd/")
    ]
    names = {path.split("/")[0].split("-")[0] for path in private}
    assert not names & {
        "pip",
        "setuptools",
        "mypy",
        "mypyc",
        "pytest",
        "hypothesis",
        "ruff",
        "tests",
        "scripts",
        "build",
    }
    assert not [path for path in private if "/_tests/" in path or path.endswith(".c")]


def test_modes_and_owners_are_a_packages(contents: dict[str, str]) -> None:
    for path, held in contents.items():
        executable = path.endswith("/") or path.startswith("/usr/bin/")
        kind = "d" if path.endswith("/") else "-"
        assert held == f"{kind}{'rwxr-xr-x' if executable else 'rw-r--r--'} root/root", path


def test_the_page_path_is_compiled_and_every_module_has_bytecode(contents: dict[str, str]) -> None:
    assert any(re.search(r"/zswapd/core/pam/zv\.cpython-.*\.so$", path) for path in contents)
    assert any(re.search(r"/zswapd__mypyc\.cpython-.*\.so$", path) for path in contents)
    for path in (
        path for path in contents if path.startswith("/usr/lib/zswapd/") and path.endswith(".py")
    ):
        directory, name = path.rsplit("/", 1)
        assert f"{directory}/__pycache__/{name.removesuffix('.py')}.cpython-311.pyc" in contents


def test_control_names_what_the_modules_are_linked_to(package: Path) -> None:
    fields = run("dpkg-deb", "--field", package)
    assert f"Version: {__version__}-1\n" in fields
    depends = re.search(r"^Depends: (.*)$", fields, re.MULTILINE)
    assert depends is not None
    names = {name.split()[0] for name in depends[1].split(", ")}
    assert names >= {"python3.11", "libfuse3-3", "liblzo2-2", "libssl3", "libc6", "mount"}


def test_settings_are_a_conffile_that_changes_nothing(package: Path, tmp_path: Path) -> None:
    run("dpkg-deb", "--raw-extract", package, tmp_path)
    assert (tmp_path / "DEBIAN/conffiles").read_text() == "/etc/zswapd/zswapd.toml\n"
    config = (tmp_path / "etc/zswapd/zswapd.toml").read_text()
    assert '#size = "min(50%, 4G)"' in config
    assert not [line for line in config.splitlines() if line and not line.startswith(("#", "["))]


@pytest.mark.skipif(
    not shutil.which("lintian"), reason="lintian is not installed; install the package lintian"
)
def test_lintian_finds_nothing(package: Path) -> None:
    assert run("lintian", "--allow-root", "--fail-on", "error,warning", package) == ""


@pytest.mark.package
def test_built_again_it_is_the_same(package: Path, tmp_path: Path) -> None:
    assert build(tmp_path).read_bytes() == package.read_bytes()
