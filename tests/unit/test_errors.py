# SPDX-License-Identifier: GPL-2.0-or-later
"""Errors: exit codes a script can tell apart, errnos FUSE can answer, hints that are shown."""

from __future__ import annotations

import errno
import inspect
import re

import pytest

from tests.support import TOP
from zswapd import errors
from zswapd.control import protocol

CLASSES = [
    value
    for _, value in inspect.getmembers(errors, inspect.isclass)
    if issubclass(value, errors.ZswapdError) and value.__module__ == errors.__name__
]


def test_exit_codes_are_unique() -> None:
    codes = [cls.exit_code for cls in CLASSES]
    assert sorted(codes) == sorted(set(codes))


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
class TestEachError:
    def test_exit_code_is_a_failure_no_shell_uses(self, cls: type[errors.ZswapdError]) -> None:
        assert 1 <= cls.exit_code < 126

    def test_errno_is_known(self, cls: type[errors.ZswapdError]) -> None:
        assert cls.errno_ in errno.errorcode

    def test_states_its_own_exit_code_and_errno(self, cls: type[errors.ZswapdError]) -> None:
        # An inherited code would make two failures look alike to a script.
        assert {"exit_code", "errno_"} <= set(vars(cls))

    def test_is_documented(self, cls: type[errors.ZswapdError]) -> None:
        assert cls.__doc__

    def test_message_and_hint_are_shown(self, cls: type[errors.ZswapdError]) -> None:
        error = cls("no room on /run", hint="give it --size 1G")
        assert str(error) == "no room on /run (give it --size 1G)"
        assert (error.message, error.hint) == ("no room on /run", "give it --size 1G")

    def test_without_hint_is_the_message_alone(self, cls: type[errors.ZswapdError]) -> None:
        assert str(cls("no room on /run")) == "no room on /run"


def test_corruption_reads_as_an_io_error() -> None:
    assert errors.CorruptedPageError.errno_ == errors.LostPageError.errno_ == errno.EIO


SYSEXITS = (
    "USAGE DATAERR NOINPUT NOUSER NOHOST UNAVAILABLE SOFTWARE OSERR OSFILE CANTCREAT IOERR TEMPFAIL"
    " PROTOCOL NOPERM CONFIG"
)
SYSTEMD = {
    "INVALIDARGUMENT": 2,
    "NOTIMPLEMENTED": 3,
    "NOPERMISSION": 4,
    "NOTINSTALLED": 5,
    "NOTCONFIGURED": 6,
    "NOTRUNNING": 7,
    **{name: 64 + number for number, name in enumerate(SYSEXITS.split())},
}
"""What `systemctl status` calls exit codes (systemd.exec(5)): LSB's, and those of sysexits.h."""
FITS = {
    errors.UsageError: "INVALIDARGUMENT",
    errors.PermissionsError: "NOPERMISSION",
    errors.ControlError: "UNAVAILABLE",
    errors.InvariantError: "SOFTWARE",
    errors.SwapDeviceError: "OSERR",
    errors.MountError: "CANTCREAT",
    errors.HeadroomError: "TEMPFAIL",
    errors.ConfigError: "CONFIG",
}


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_systemd_names_no_code_after_something_else(cls: type[errors.ZswapdError]) -> None:
    named = {code: name for name, code in SYSTEMD.items()}
    assert named.get(cls.exit_code) == FITS.get(cls)
    assert cls.exit_code < 200, "these are systemd's own"


def test_the_unit_gives_up_at_settings_that_are_wrong_and_at_nothing_else() -> None:
    unit = (TOP / "systemd/zswapd.service").read_text()
    assert re.findall("^RestartPreventExitStatus=(.*)$", unit, re.MULTILINE) == [
        f"{errors.ConfigError.exit_code} {errors.MachineError.exit_code}"
    ]


def test_codes_of_before_are_still_understood() -> None:
    for code, cls in (
        (2, errors.ConfigError),
        (3, errors.MountError),
        (5, errors.ControlError),
        (6, errors.SwapDeviceError),
        (7, errors.HeadroomError),
        (4, errors.PermissionsError),
        (13, errors.HandoverError),
    ):
        with pytest.raises(cls) as caught:
            protocol.decode_reply(protocol.encode_error("no", None, code))
        assert type(caught.value) is cls
