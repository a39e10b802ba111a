# SPDX-License-Identifier: GPL-2.0-or-later
"""sdist and wheel: whole, and what comes out of the wheel runs; the wheel itself needs no compiler.

The sdist is of the checkout as git knows it, the wheel is made of the sdist: what one lacks, the
other lacks too. In the normal run the page path stays uncompiled, which takes seconds; the tier
`package` compiles it, in an environment of the build's own.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

TOP = Path(__file__).resolve().parents[2]
MADE_BY_SETUPTOOLS = {"PKG-INFO", "setup.cfg"}


def run(*command: str | Path, limit: float = 240, **environment: str) -> str:
    done = subprocess.run(
        command,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=limit,
        cwd="/",
        env={
            **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            **environment,
        },
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}"
    return done.stdout


def known_to_git() -> list[str]:
    return run(
        "git", "-C", TOP, "ls-files", "--cached", "--others", "--exclude-standard"
    ).splitlines()


def page_path() -> list[str]:
    """Return what setup.py has compiled, without running it."""
    for statement in ast.parse((TOP / "setup.py").read_text()).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "PAGE_PATH":
            return list(ast.literal_eval(statement.value))
    raise AssertionError("setup.py has no PAGE_PATH")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist of what git knows, unpacked.

    From a copy, since setuptools leaves things where it builds.
    """
    copy = tmp_path_factory.mktemp("checkout")
    for name in filter(os.path.exists, (TOP / name for name in known_to_git())):
        target = copy / Path(name).relative_to(TOP)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(Path(name).read_bytes())
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", copy / "dist", copy)
    (archive,) = (copy / "dist").iterdir()
    (copy / "unpacked").mkdir()
    run("tar", "--extract", "--file", archive, "--directory", copy / "unpacked")
    (unpacked,) = (copy / "unpacked").iterdir()
    return unpacked


def copied(sdist: Path, directory: Path) -> Path:
    """Copy the sdist to where a build may leave things."""
    return Path(shutil.copytree(sdist, directory / "source"))


def fresh_environment(directory: Path, wheel: Path) -> Path:
    """Install a wheel, without what it needs, where there is nothing and no compiler.

    Return the directory of its programs.
    """
    venv.create(directory, with_pip=False, symlinks=True)
    run(
        *(
            sys.executable,
            "-m",
            "pip",
            "--python",
            directory / "bin/python",
            "install",
            "--no-index",
            "--no-deps",
            wheel,
        ),
        CC="/bin/false",
        PATH="/nowhere",
    )
    # What it needs comes from where the tests run; a .pth file found there is not followed, so the
    # checkout stays unseen.
    (site,) = directory.glob("lib/python*/site-packages")
    (site / "needed.pth").write_text(sysconfig.get_path("platlib"))
    return directory / "bin"


def check_programs(programs: Path) -> None:
    version = run(programs / "zswapd", "--version").strip()
    assert version == run(programs / "zswapctl", "--version").strip().replace("zswapctl", "zswapd")
    assert "fuse.mountpoint" in run(programs / "zswapd", "run", "--help")
    assert "/run/zswapd/mnt" in run(programs / "zswapd", "config", "defaults")
    where = (
        "import zswapd.worker.worker, zswapd.fuse._lowlevel as hook,"
        " zswapd.core.allocators._populate; print(hook.__file__)"
    )
    hook = run(programs / "python", "-P", "-c", where).strip()
    assert Path(hook).is_relative_to(programs.parent)


def test_sdist_is_the_whole_checkout(sdist: Path) -> None:
    packed = {str(path.relative_to(sdist)) for path in sdist.rglob("*") if path.is_file()}
    own = {name for name in packed if name.startswith("zswapd.egg-info/")} | MADE_BY_SETUPTOOLS
    assert packed - own == {name for name in known_to_git() if (TOP / name).exists()}


def test_wheel_of_the_sdist_runs_in_a_fresh_environment(sdist: Path, tmp_path: Path) -> None:
    source = copied(sdist, tmp_path)
    run(
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        tmp_path,
        source,
        ZSWAPD_PURE="1",
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "zswapd",
        f"zswapd-{wheel.name.split('-')[1]}.dist-info",
    }
    assert "zswapd/py.typed" in names

    check_programs(fresh_environment(tmp_path / "venv", wheel))


def test_what_the_wheel_needs_a_compiler_for_is_what_the_readme_says() -> None:
    """What pip has built here itself is tagged for this machine.

    ("linux"), what was there for it for many ("manylinux").
    """
    with (TOP / "pyproject.toml").open("rb") as file:
        needed = [Requirement(line).name for line in tomllib.load(file)["project"]["dependencies"]]
    tags = {name: distribution(name).read_text("WHEEL") or "" for name in needed}
    built = {
        name for name, text in tags.items() if re.search(r"^Tag: .*-linux_", text, re.MULTILINE)
    }
    line = re.search(
        r"dependencies,\s+(.+), are on PyPI as sources only", (TOP / "README.md").read_text()
    )
    assert line is not None
    assert built == set(line[1].split(" and "))


@pytest.mark.package
@pytest.mark.timeout(900)
def test_wheel_built_in_isolation_has_all_of_the_page_path_compiled(
    sdist: Path, tmp_path: Path
) -> None:
    run(sys.executable, "-m", "build", "--outdir", tmp_path, copied(sdist, tmp_path), limit=800)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    for source in page_path():
        assert source.replace(".py", suffix) in names
    assert f"zswapd__mypyc{suffix}" in names

    check_programs(fresh_environment(tmp_path / "venv", wheel))
