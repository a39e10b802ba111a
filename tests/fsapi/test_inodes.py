# SPDX-License-Identifier: GPL-2.0-or-later
"""The directory: names, numbers, and which names are none."""

from __future__ import annotations

import pytest

from tests.support.blockfile import MemoryFile
from tests.support.textfile import SettingFile
from zswapd.errors import ConfigError
from zswapd.fuse.inodes import HASHED, NAME_MAX, ROOT_INODE, Directory


def test_empty_directory_has_a_root_that_is_its_own_parent() -> None:
    directory = Directory()
    root = directory.node(ROOT_INODE)
    assert root is not None
    assert root.is_directory
    assert directory.lookup(ROOT_INODE, b"..") == root
    assert directory.entries(ROOT_INODE) == []
    assert len(directory) == 1


def test_files_get_numbers_of_their_own_and_are_found_by_either() -> None:
    directory = Directory()
    files = [
        MemoryFile(name, 4096 * (i + 1))
        for i, name in enumerate(("swap", "second", "dritte Datei ü"))
    ]
    inodes = [directory.add_block_file(file) for file in files]
    assert inodes == [2, 3, 4]
    assert directory.block_files == dict(zip(inodes, files, strict=True))
    for inode, file in zip(inodes, files, strict=True):
        node = directory.node(inode)
        assert node is not None
        assert node == directory.lookup(ROOT_INODE, file.name.encode())
        assert (node.size, node.is_directory, node.file) == (file.size, False, file)


def test_entries_go_on_behind_the_last_one_seen() -> None:
    directory = Directory()
    for name in ("a", "b", "c"):
        directory.add_block_file(MemoryFile(name))
    assert [node.name for node in directory.entries(ROOT_INODE, 2)] == [b"b", b"c"]
    assert directory.entries(ROOT_INODE, 4) == []
    assert directory.entries(2) == []


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "/", "a\0b", "a\nb", "x" * (NAME_MAX + 1), "ü" * 128]
)
def test_impossible_name_is_refused(name: str) -> None:
    directory = Directory()
    with pytest.raises(ConfigError, match="cannot be the name") as raised:
        directory.add_block_file(MemoryFile(name))
    assert raised.value.hint
    assert len(directory) == 1


def test_name_may_be_as_long_as_the_kernel_allows() -> None:
    directory = Directory()
    directory.add_block_file(MemoryFile("x" * NAME_MAX))
    assert len(directory) == 2


def test_second_file_of_a_name_is_refused() -> None:
    directory = Directory()
    directory.add_block_file(MemoryFile("swap"))
    with pytest.raises(ConfigError, match="two files are named 'swap'") as raised:
        directory.add_block_file(MemoryFile("swap"))
    assert raised.value.hint
    assert len(directory.block_files) == 1


def test_numbers_depend_on_names_and_on_nothing_else() -> None:
    """Files stay open when another process takes over, one of another version perhaps.

    With more files.
    """
    one, other = Directory(), Directory()
    one.add_block_file(MemoryFile("swap"))
    first = {
        name: one.add_text_file(one.add_directory("stats"), name, SettingFile())
        for name in ("loads",)
    }
    for name in ("cache", "params"):
        other.add_directory(name)
    stats = other.add_directory("stats")
    second = {name: other.add_text_file(stats, name, SettingFile()) for name in ("a", "b", "loads")}
    assert first["loads"] == second["loads"] >= HASHED
    assert other.add_block_file(MemoryFile("swap")) == 2
    assert (
        len({*second.values(), stats, other.add_text_file(ROOT_INODE, "loads", SettingFile())}) == 5
    )


def test_directories_nest_and_list_what_is_in_them_alone() -> None:
    directory = Directory()
    directory.add_block_file(MemoryFile("swap"))
    stats, params = directory.add_directory("stats"), directory.add_directory("params")
    knob = directory.add_text_file(params, "limit", SettingFile())
    assert {node.name for node in directory.entries(ROOT_INODE)} == {b"swap", b"stats", b"params"}
    assert [node.inode for node in directory.entries(params)] == [knob]
    assert directory.entries(stats) == []
    assert directory.lookup(params, b"..") == directory.node(ROOT_INODE)
    assert directory.lookup(ROOT_INODE, b"limit") is None
    assert directory.entries(ROOT_INODE)[0].name == b"swap", "by number, as readdir goes on"


@pytest.mark.parametrize("name", ["", "..", "a/b", "x" * (NAME_MAX + 1)])
def test_impossible_name_of_a_text_file_or_directory_is_refused(name: str) -> None:
    directory = Directory()
    with pytest.raises(ConfigError, match="cannot be the name"):
        directory.add_directory(name)
    with pytest.raises(ConfigError, match="cannot be the name"):
        directory.add_text_file(ROOT_INODE, name, SettingFile())
    directory.add_directory("stats")
    with pytest.raises(ConfigError, match="two files are named"):
        directory.add_text_file(ROOT_INODE, "stats", SettingFile())
    assert len(directory) == 2
