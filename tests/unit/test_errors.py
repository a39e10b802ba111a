# SPDX-License-Identifier: GPL-2.0-or-later
"""Errors: exit codes a script can tell apart, errnos FUSE can answer, hints that are shown."""

from __future__ import annotations

import errno
import inspect

import pytest

from zswapd import errors

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
