# SPDX-License-Identifier: GPL-2.0-or-later
"""`scripts/bench disk` on small amounts: it measures what it says, and reads what it wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.bench.harness.figures import Figure
from tools.bench.harness.system import HarnessError
from tools.bench.workloads import disk

pytestmark = pytest.mark.mount


def test_writeback_keeps_what_is_hot_and_its_absence_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "PLACE", tmp_path)
    monkeypatch.setattr(disk, "DATA_MIB", 24)
    measured, figures = disk.hot(tmp_path)
    assert measured["with writeback"] > measured["without"] + 0.2
    assert [figure.value for figure in figures] == [measured["with writeback"], measured["without"]]


def test_both_sides_of_the_cipher_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "PLACE", tmp_path)
    monkeypatch.setattr(disk, "CIPHER_MIB", 16)
    measured, (figure,) = disk.cipher(tmp_path, rounds=1)
    (plain,), (encrypted,) = measured["plain"], measured["encrypted"]
    assert plain > 0
    assert figure.value == encrypted / plain


@pytest.mark.kernel
def test_real_swap_of_noise_is_measured_on_a_file_and_behind_the_pool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "PLACE": tmp_path,
        "SWAPPED_MIB": 64,
        "SWAPPED_IN_MIB": 24,
        "SWAPPED_FAULTS": 500,
    }.items():
        monkeypatch.setattr(disk, name, value)
    measured, (figure,) = disk.swapped(tmp_path, rounds=1)
    (plain,) = measured["plain"]
    assert plain > 0
    for name in ("a loop device alone", "written through", "kept up to pool.limit"):
        assert measured[f"{name} ÷ plain"] == [measured[name][0] / plain]
    assert [figure.value] == measured["written through ÷ plain"]
    assert not list(tmp_path.iterdir())


def test_a_page_that_is_not_what_was_written_ends_it(tmp_path: Path) -> None:
    path = tmp_path / "pages"
    path.write_bytes(bytes(1 << 20))
    pages = disk.Pages(path, 1)
    pages.write(32)
    pages.read(40)
    with path.open("r+b") as file:
        file.seek(40 * 4096 + 100)
        file.write(b"!")
    with pytest.raises(HarnessError, match="page 40"):
        pages.read(40)
    pages.close()


def test_its_document_and_exit_code_tell_whether_all_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for value, code in ((0.96, 0), (0.5, 1)):
        figure = Figure("hot", value, 0.95, at_least=True)
        monkeypatch.setitem(
            disk.PARTS, "hot", lambda _place, figure=figure: ({"with": figure.value}, [figure])
        )
        monkeypatch.setattr(disk.system, "missing_programs", lambda _names: [])
        assert disk.main(["--parts", "hot", "--json", str(tmp_path / "out")]) == code
        assert ("FAILS" in capsys.readouterr().out) is bool(code)
        assert json.loads((tmp_path / "out").read_text())["figures"][0]["value"] == value
