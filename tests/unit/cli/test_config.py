# SPDX-License-Identifier: GPL-2.0-or-later
"""`zswapd config`: what is set, where that comes from, whether it is right; without a daemon."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest

from zswapd import config
from zswapd.cli import sources, zswapd
from zswapd.core import compress
from zswapd.errors import ConfigError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "z.toml"
    path.write_text('[swap]\nsize = "64M"\npriority = 7\n')
    (tmp_path / "z.toml.d").mkdir()
    (tmp_path / "z.toml.d/10-more.toml").write_text("[swap]\n\npriority = 9\nfiles.more = '1G'\n")
    return path


def test_show_says_where_each_value_comes_from(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "config",
        "show",
        "--config",
        str(file),
        "--set",
        "pool.compressor=lzo",
        "--mountpoint",
        "/mnt/z",
    ]
    assert (
        zswapd.main(
            [*command, "swap.size", "swap.priority", "swap.files", "pool.compressor", "pool.limit"]
        )
        == 0
    )
    assert capsys.readouterr().out.splitlines() == [
        f"swap.size = 67108864  # 64.0 MiB, {file}:2",
        f"swap.priority = 9  # {file}.d/10-more.toml:3",
        f"swap.files = {{more = 1073741824}}  # {file}.d/10-more.toml:4",
        'pool.compressor = "lzo"  # --set',
        'pool.limit = ""  # default',
    ]
    assert zswapd.main([*command, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert list(shown) == list(config.SETTINGS)
    assert shown["fuse.mountpoint"]["value"] == "/mnt/z"
    assert shown["fuse.mountpoint"]["origin"] == "--mountpoint"
    assert shown["swap.priority"] == {
        "value": 9,
        "written": 9,
        "origin": f"{file}.d/10-more.toml:3",
        "unit": "",
        "reloadable": True,
    }


def test_show_is_a_config_file_again(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert zswapd.main(["config", "show", "--config", str(file)]) == 0
    again = tmp_path / "again.toml"
    again.write_text(capsys.readouterr().out)
    before = config.load(codecs=compress.names(), file=file)
    after = config.load(codecs=compress.names(), file=again)
    assert {dest: after.value(dest) for dest in config.SETTINGS} == {
        dest: before.value(dest) for dest in config.SETTINGS
    }


def test_check_names_the_files_or_the_line_and_what_would_be_right(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert zswapd.main(["config", "check", "--config", str(file)]) == 0
    dropin = f"{file}.d/10-more.toml"
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"{file}: valid", f"{dropin}: valid"]
    assert re.match(r"memory before the first page: \d+\.\d MiB \(the processes: ", lines[2])
    assert lines[3].startswith("books of full swap files: ")
    assert zswapd.main(["config", "check", "--config", str(file), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["ok"], report["files"]) == (True, [str(file), dropin])
    assert report["bytes_at_start"]["the processes"] > 100 << 20
    Path(dropin).write_text("[pool]\n\ncompresor = 'lz4'\n")
    assert zswapd.main(["config", "check", "--config", str(file)]) == ConfigError.exit_code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert (
        captured.err
        == f"zswapd: error: {dropin}:3: unknown setting pool.compresor\nzswapd: hint: did you mean"
        " pool.compressor?\n"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '[control]\n\nsocket = "/mnt/z/sock"\n[fuse]\nmountpoint = "/mnt/z"',
            "{file}:3, {file}:5: control.socket /mnt/z/sock lies",
        ),
        ('[control]\nsocket = "/run/zswapd/mnt/sock"', "{file}:2: control.socket"),
        ('[backing]\nbuffers = "1M"', "{file}:2: backing.buffers is 1048576 bytes"),
    ],
)
def test_values_that_are_wrong_together_have_their_lines_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    file = tmp_path / "z.toml"
    file.write_text(text)
    assert zswapd.main(["config", "check", "--config", str(file)]) == ConfigError.exit_code
    assert message.format(file=file) in capsys.readouterr().err


def test_defaults_are_a_file_that_changes_nothing_and_has_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert zswapd.main(["config", "defaults"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    file = tmp_path / "z.toml"
    file.write_text(text)
    plain = config.load(codecs=compress.names(), root=_empty_root(tmp_path))
    assert config.load(codecs=compress.names(), file=file).given == {}
    file.write_text(re.sub(r"^#(?=\w+ = )", "", text, flags=re.MULTILINE))
    given = config.load(codecs=compress.names(), file=file)
    assert {dest: given.value(dest) for dest in config.SETTINGS} == {
        dest: plain.value(dest) for dest in config.SETTINGS
    }
    written = {
        f"{section}.{key}"
        for section, keys in tomllib.loads(file.read_text()).items()
        for key in keys
    }
    assert written == set(config.SETTINGS)


def _empty_root(tmp_path: Path) -> Path:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(Path("/proc/meminfo").read_text())
    return tmp_path


@pytest.mark.parametrize("command", ["show", "check"])
def test_a_mistake_is_an_object_with_json(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text('[pool]\nlimit = "much"\n')
    assert (
        zswapd.main(["config", command, "--config", str(file), "--json"]) == ConfigError.exit_code
    )
    error = json.loads(capsys.readouterr().out)["error"]
    assert f"{file}:2: pool.limit" in error["message"]
    assert error["hint"]
    assert error["exit_code"] == ConfigError.exit_code


def test_defaults_as_json_say_what_each_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert zswapd.main(["config", "defaults", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report) == list(config.SETTINGS)
    assert report["pool.compressor"] == {
        "default": "lz4",
        "takes": config.SETTINGS["pool.compressor"].kind.describe(sources.context()),
        "unit": "",
        "reloadable": True,
        "help": "Codec for new pages. Stored pages keep their codec.",
    }
