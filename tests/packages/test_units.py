# SPDX-License-Identifier: GPL-2.0-or-later
"""The systemd units, as `systemd-analyze` judges them.

tests/vm and test_container.py try them where systemd runs.
"""

from __future__ import annotations

import configparser
import shutil
import subprocess
from pathlib import Path

import pytest

SYSTEMD = Path(__file__).resolve().parents[2] / "systemd"
SYSTEMS_OWN = Path("/lib/systemd/system")
SERVICES = sorted(path.name for path in SYSTEMD.glob("*.service"))
EXPOSURE = {"zswapd.service": 45, "zswapd-swap.service": 31, "zswapd-hibernate.service": 35}
"""What `systemd-analyze security` may say of each, times ten.

Docs/operations.md says why it is not less.
"""
_NAMES = """
    PrivateMounts PrivateTmp PrivateDevices PrivateIPC ProtectSystem ProtectHome
    ProtectKernelTunables ProtectKernelModules ProtectKernelLogs ProtectControlGroups ProtectProc
    ProcSubset ReadOnlyPaths ReadWritePaths InaccessiblePaths ExecPaths NoExecPaths
    TemporaryFileSystem BindPaths BindReadOnlyPaths RootDirectory RootImage MountFlags DynamicUser
    MountAPIVFS
"""
MOUNT_NAMESPACE = frozenset(_NAMES.split())
"""What would give a service a mount namespace of its own (systemd.exec(5)).

Its files would not be where others see them.
"""

pytestmark = pytest.mark.skipif(
    not shutil.which("systemd-analyze") or not SYSTEMS_OWN.is_dir(),
    reason="systemd is not installed; install the package systemd",
)


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ("systemd-analyze", *arguments), check=False, capture_output=True, text=True, timeout=60
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A system with our units among its own, and programs by the names that are in them."""
    units = tmp_path / "usr/lib/systemd/system"
    shutil.copytree(SYSTEMS_OWN, units, symlinks=True)
    shutil.copytree(SYSTEMD, units, dirs_exist_ok=True)
    for name in ("usr/bin/zswapd", "usr/bin/zswapctl", "bin/grep", "bin/systemctl"):
        program = tmp_path / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.touch(0o755)
    return tmp_path


def settings(path: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(
        strict=False, interpolation=None, comment_prefixes="#", delimiters="="
    )
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(path)
    return parser


def test_verify_finds_nothing(root: Path) -> None:
    found = analyze(f"--root={root}", "verify", "--man=no", *SERVICES)
    assert (found.returncode, found.stderr) == (0, "")


def test_verify_would_find_a_mistake(root: Path) -> None:
    with (root / "usr/lib/systemd/system/zswapd.service").open("a") as unit:
        unit.write("[Service]\nMemorySwapMost=0\n")
    assert (
        "MemorySwapMost" in analyze(f"--root={root}", "verify", "--man=no", "zswapd.service").stderr
    )


def test_no_time_out_kills_swapoff(root: Path) -> None:
    """systemd's own child at shutdown has no limit, by a drop-in for all swap areas.

    The daemon's is not killed at its end.
    """
    units = root / "usr/lib/systemd/system"
    (units / "dev-loop9.swap").write_text("[Swap]\nWhat=/dev/loop9\n")
    assert analyze(f"--root={root}", "verify", "--man=no", "dev-loop9.swap").stderr == ""
    drop_in = units / "dev-.swap.d/zswapd.conf"
    assert settings(drop_in)["Swap"]["TimeoutSec"] == "infinity"
    drop_in.write_text(drop_in.read_text().replace("infinity", "for-ever"))
    assert "for-ever" in analyze(f"--root={root}", "verify", "--man=no", "dev-loop9.swap").stderr
    service = settings(SYSTEMD / "zswapd.service")["Service"]
    assert (service["SendSIGKILL"], service["KillMode"]) == ("no", "process")


@pytest.mark.parametrize("name", SERVICES)
def test_exposure_is_what_the_docs_say(name: str) -> None:
    found = analyze("security", "--offline=true", f"--threshold={EXPOSURE[name]}", SYSTEMD / name)
    assert found.returncode == 0, found.stdout + found.stderr
    assert (
        analyze(
            "security", "--offline=true", f"--threshold={EXPOSURE[name] - 1}", SYSTEMD / name
        ).returncode
        != 0
    )
    assert f"{name} {EXPOSURE[name] / 10}" in (SYSTEMD.parent / "docs/operations.md").read_text()


@pytest.mark.parametrize("name", SERVICES)
def test_no_service_has_a_mount_namespace_of_its_own(name: str) -> None:
    assert not MOUNT_NAMESPACE & set(settings(SYSTEMD / name)["Service"])


def test_units_that_are_to_be_enabled_are_with_the_service() -> None:
    enabled = {name for name in SERVICES if settings(SYSTEMD / name).has_section("Install")} - {
        "zswapd.service"
    }
    assert set(settings(SYSTEMD / "zswapd.service")["Install"]["Also"].split()) == enabled


def test_nothing_binds_the_swap_to_the_service() -> None:
    """Or each restart of a daemon that was killed would swap off and on.

    That must neither be needed nor tried.
    """
    for name in SERVICES:
        unit = settings(SYSTEMD / name)["Unit"]
        assert not {"BindsTo", "PartOf", "Requires", "Requisite", "PropagatesStopTo"} & set(unit)
