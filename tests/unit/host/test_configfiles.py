# SPDX-License-Identifier: GPL-2.0-or-later
"""Which files settings are read from, what is in their text, and where the daemon's socket is."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import TOP, capabilities
from zswapd import config, paths
from zswapd.cli import zswapctl
from zswapd.errors import ConfigError, ControlError
from zswapd.host.configfiles import LARGEST_FILE, config_files, configured_socket, read_text

GOOD = "[swap]\npriority = 7\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:       8388608 kB\n")
    (tmp_path / "etc/zswapd/zswapd.toml.d").mkdir(parents=True)
    return tmp_path


def main_file(root: Path) -> Path:
    return root / "etc/zswapd/zswapd.toml"


def dropin(root: Path, name: str) -> Path:
    return root / "etc/zswapd/zswapd.toml.d" / name


def load(root: Path, file: Path | None = None) -> config.Config:
    return config.load(codecs=("lz4", "lzo", "zstd"), file=file, root=root)


def refusal(root: Path, file: Path | None = None) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(root, file)
    assert caught.value.hint
    return caught.value


# Which files.


@pytest.mark.parametrize(
    "name",
    [
        ".#50-pool.toml",  # Emacs: a lock, which is a link to nothing
        "#50-pool.toml#",
        "50-pool.toml~",
        ".50-pool.toml.swp",
        ".50-pool.toml.swx",
        ".50-pool.toml.un~",
        "4913",
        ".50-pool.toml.kate-swp",
        ".goutputstream-ABCDEF",
        ".50-pool.toml.Ab12Cd",  # rsync
        ".50-pool.toml",
        ".toml",
        "50-pool.toml.bak",
        "50-pool.toml.orig",
        "50-pool.toml.rej",
        *(
            f"50-pool.toml.{end}"
            for end in ("dpkg-new", "dpkg-old", "dpkg-dist", "dpkg-tmp", "ucf-dist", "ucf-old")
        ),
        *(f"50-pool.toml.{end}" for end in ("rpmnew", "rpmsave", "rpmorig", "pacnew", "apk-new")),
        "50-pool.toml.disabled",
        "README",
    ],
)
@pytest.mark.parametrize("kind", ["garbage", "dangling link", "directory", "pipe"])
def test_what_lies_beside_drop_ins_is_none(root: Path, name: str, kind: str) -> None:
    dropin(root, "10-good.toml").write_text(GOOD)
    path = dropin(root, name)
    if kind == "garbage":
        path.write_bytes(b"\0\xff[")
    elif kind == "dangling link":
        path.symlink_to("user@host.4711:1700000000")
    elif kind == "directory":
        path.mkdir()
    else:
        os.mkfifo(path)
    assert config_files(root=root) == [dropin(root, "10-good.toml")]
    assert load(root).swap.priority == 7


def test_drop_ins_are_read_in_alphabetical_order_after_the_file(root: Path) -> None:
    for number, path in enumerate(
        (main_file(root), dropin(root, "10.toml"), dropin(root, "9.toml"), dropin(root, "a b.toml"))
    ):
        path.write_text(f"[swap]\npriority = {number}\n")
    assert [path.name for path in config_files(root=root)] == [
        "zswapd.toml",
        "10.toml",
        "9.toml",
        "a b.toml",
    ]
    assert load(root).swap.priority == 3


@pytest.mark.parametrize("is_main", [True, False])
def test_a_link_to_dev_null_is_an_empty_file_and_a_link_to_a_file_is_that_file(
    root: Path, is_main: bool
) -> None:
    path = main_file(root) if is_main else dropin(root, "50.toml")
    path.symlink_to("/dev/null")
    assert load(root).swap.priority == 100
    path.unlink()
    (root / "elsewhere").write_text(GOOD)
    path.symlink_to(root / "elsewhere")
    assert load(root).swap.priority == 7


@pytest.mark.parametrize("is_main", [True, False])
@pytest.mark.parametrize(
    "kind", ["directory", "pipe", "socket", "device", "terminal", "dangling link", "loop"]
)
def test_what_is_named_like_a_config_file_and_is_none_is_refused_at_once(
    root: Path, kind: str, is_main: bool
) -> None:
    path = main_file(root) if is_main else dropin(root, "50-pool.toml")
    said = kind
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
        said = "named pipe"
    elif kind == "socket":
        made = socket.socket(socket.AF_UNIX)
        here = Path.cwd()
        os.chdir(path.parent)
        try:
            made.bind(path.name)
        finally:
            os.chdir(here)
            made.close()
        said = "No such device"
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "terminal":
        leader, follower = os.openpty()
        path.symlink_to(os.ttyname(follower))
        said = "device"
    elif kind == "dangling link":
        path.symlink_to("nowhere")
        said = "is a link to nowhere, which does not exist"
    else:
        path.symlink_to(path)
        said = "symbolic link"
    error = refusal(root)
    assert str(path) in error.message
    assert said in error.message
    if kind == "terminal":
        os.close(leader)
        os.close(follower)


def test_a_directory_of_drop_ins_that_is_none_is_refused(root: Path) -> None:
    directory = dropin(root, "x").parent
    directory.rmdir()
    assert load(root).swap.priority == 100
    directory.write_text("")
    assert "Not a directory" in refusal(root).message


@capabilities.requires_root()
@pytest.mark.parametrize(
    "closed", ["etc/zswapd", "etc/zswapd/zswapd.toml", "etc/zswapd/zswapd.toml.d", "drop-in"]
)
def test_a_user_who_may_not_read_them_is_told_so(root: Path, closed: str) -> None:
    main_file(root).write_text(GOOD)
    dropin(root, "50.toml").write_text(GOOD)
    path = dropin(root, "50.toml") if closed == "drop-in" else root / closed
    path.chmod(0)
    child = os.fork()
    if not child:
        code = 1
        try:
            root.chmod(0o755)
            for above in root.parents:
                if above.stat().st_uid == os.geteuid() and above != Path("/tmp"):
                    above.chmod(above.stat().st_mode | stat.S_IXOTH)
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            error = refusal(root)
            code = 0 if "Permission denied" in error.message and str(path) in error.message else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("how", ["standard input", "substitution"])
def test_an_open_pipe_may_be_named_and_a_pipe_in_the_file_system_not(how: str, root: Path) -> None:
    read, write = os.pipe()
    os.write(write, GOOD.encode())
    os.close(write)
    code = (
        "import sys; from pathlib import Path; from zswapd import config;"
        "print(config.load(codecs=('lz4',), file=Path(sys.argv[1])).swap.priority)"
    )
    name = "/dev/stdin" if how == "standard input" else f"/dev/fd/{read}"
    command = [sys.executable, "-c", code, name]
    done = subprocess.run(
        command,
        stdin=read,
        pass_fds=[read],
        cwd=TOP,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    os.close(read)
    assert (done.stdout, done.stderr) == ("7\n", "")
    os.mkfifo(root / "pipe")
    assert "named pipe" in refusal(root, root / "pipe").message


# Their text.


@pytest.mark.parametrize(
    "data",
    [
        b"\xef\xbb\xbf[swap]\npriority = 7\n",
        b"\xef\xbb\xbf# comment\r\n[swap]\r\npriority = 7\r\n",
        b"[swap]\r\npriority = 7\r\n",
        b"[swap]\rpriority = 7\r",
        b"[swap]\npriority = 7",
        b"\t[swap]\n\tpriority\t=\t7\t# tabs\n",
        b"\n\n[swap]\n\n\npriority = 7\n\n\n",
        "# \u201ccomments\u201d may\u00a0have \u200b \u2028 \x85\n[swap]\npriority = 7\n".encode(),
    ],
)
def test_what_editors_make_of_a_file_is_read(root: Path, data: bytes) -> None:
    for path in (main_file(root), dropin(root, "50.toml")):
        path.write_bytes(data)
        assert load(root).swap.priority == 7
        path.unlink()


@pytest.mark.parametrize("data", [b"", b"\xef\xbb\xbf", b"\n", b"\r\n", b"# nothing", b" \t"])
def test_a_file_with_nothing_in_it_sets_nothing(root: Path, data: bytes) -> None:
    main_file(root).write_bytes(data)
    assert load(root).given == {}


@pytest.mark.parametrize(
    ("data", "place", "name", "hint"),
    [
        ("[swap]\nsize = \u201c2G\u201d\n", "2, column 8", "U+201C LEFT DOUBLE QUOT", 'it with "'),
        ('[swap]\nsize = "2G\u201d\n', "2, column 11", "U+201D RIGHT DOUBLE QUOT", 'it with "'),
        ("[swap]\nsize = \u201e2G\u201c\n", "2, column 8", "U+201E DOUBLE LOW-9 QU", 'it with "'),
        ("[swap]\nsize = \u00ab2G\u00bb\n", "2, column 8", "U+00AB LEFT-POINTING D", 'it with "'),
        ("[swap]\nsize = \u20182G\u2019\n", "2, column 8", "U+2018 LEFT SINGLE QUOT", "it with '"),
        ("[swap]\nsize = `2G`\n", "2, column 8", "U+0060 GRAVE ACCENT", "it with '"),
        ("[swap]\nsize\u00a0= '2G'\n", "2, column 5", "U+00A0 NO-BREAK SPACE", "with a space"),
        ("[swap]\n\u00a0size = '2G'\n", "2, column 1", "U+00A0 NO-BREAK SPACE", "with a space"),
        ("[swap]\u2003\nsize = '2G'\n", "1, column 7", "U+2003 EM SPACE", "with a space"),
        ("[swap]\n\u200bsize = '2G'\n", "2, column 1", "U+200B ZERO WIDTH SPACE", "remove it"),
        ("[swap]\nsi\u00adze = '2G'\n", "2, column 3", "U+00AD SOFT HYPHEN", "remove it"),
        ("[swap]\n\ufeffsize = '2G'\n", "2, column 1", "U+FEFF ZERO WIDTH NO-BREAK", "remove it"),
        ("[swap]\n\fsize = '2G'\n", "2, column 1", "U+000C FORM FEED", "remove it"),
        ("[swap]\nsize = '2G'\n\x1a", "3, column 1", "U+001A SUBSTITUTE (Ctrl-Z)", "remove it"),
        ("[swap]\npriority = \u22125\n", "2, column 12", "U+2212 MINUS SIGN", "it with -"),
        ("[swap]\nsize \uff1d '2G'\n", "2, column 6", "U+FF1D FULLWIDTH EQUALS SIGN", "it with ="),
        ("[swap]\npriority = \uff17\n", "2, column 12", "U+FF17 FULLWIDTH DIGIT", "it with 7"),
        ("[sw\u0430p]\nsize = '2G'\n", "1, column 4", "U+0430 CYRILLIC SMALL", "ASCII letters"),
        ("[swap]\rsize = '2G'\n", "1, column 7", "U+000D CARRIAGE RETURN", "newline"),
        ("[swap]\nsize = '2G'\u2028[pool]\n", "2, column 12", "U+2028 LINE SEPARATOR", "newline"),
    ],
)  # fmt: skip
def test_a_character_that_means_nothing_is_named_with_its_place_and_what_to_type(
    root: Path, data: str, place: str, name: str, hint: str
) -> None:
    for path in (main_file(root), dropin(root, "50.toml")):
        path.write_bytes(data.encode())
        error = refusal(root)
        assert error.message.startswith(f"{path}:{place}: found {name}")
        assert hint in (error.hint or "")
        path.unlink()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (GOOD.encode("utf-16"), ("is UTF-16, not UTF-8", "iconv -f UTF-16")),
        (b"\xfe\xff" + GOOD.encode("utf-16-be"), ("is UTF-16, not UTF-8", "iconv -f UTF-16")),
        (GOOD.encode("utf-32"), ("is UTF-32, not UTF-8", "iconv -f UTF-32")),
        (GOOD.encode("utf-16-le"), (":1, column 2: there is a NUL character", "iconv -f UTF-16LE")),
        (b"[swap]\npri\0ority = 7\n", (":2, column 4: there is a NUL character", "remove it")),
        (
            "[swap]\n# gr\u00f6\u00dfer\npriority = 7\n".encode("latin-1"),
            (
                ":2, column 5: the byte 0xF6 is not UTF-8",
                "LATIN SMALL LETTER O WITH DIAERESIS",
                "iconv -f LATIN1",
            ),
        ),
        (
            b"[swap]\n# \x93quoted\x94\n",
            (":2, column 3: the byte 0x93 is not UTF-8", "save the file as UTF-8"),
        ),
        (GOOD.encode() + b"# \xc3", (":3, column 3: the byte 0xC3 is not UTF-8",)),
        (b"# x\n" * (LARGEST_FILE // 4 + 1), ("is longer than 64 KiB",)),
        (b"#" * (LARGEST_FILE - 1) + "\u00e4".encode(), ("is longer than 64 KiB",)),
        (b"[swap]\nx = '" + b"y" * 5000 + b"'\n", (":2: the line is longer than 4096 characters",)),
    ],
)
def test_bytes_that_are_no_text_are_named_with_their_place_and_what_to_type(
    root: Path, data: bytes, words: tuple[str, ...]
) -> None:
    main_file(root).write_bytes(data)
    error = refusal(root)
    for word in words:
        assert word in f"{error.message} {error.hint}"


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ("# \u201cquotes\u201d and \u2013 dashes\n[swap]\nsize == '2G'\n", 3),
        ('[swap]\nsize = "\u201c2G\u201d"\n[pool\n', 3),
        ("[swap]\nsize = '2G' '3G' # \u00a0\n", 2),
    ],
)
def test_characters_in_comments_and_strings_are_not_blamed(
    root: Path, data: str, line: int
) -> None:
    main_file(root).write_text(data)
    error = refusal(root)
    assert "there is" not in error.message
    assert f"{main_file(root)}:{line}: " in error.message


def test_lines_are_counted_as_editors_do(root: Path) -> None:
    main_file(root).write_text("# \u2028 \x85\n[swap]\nnonsense = 7\n")
    assert refusal(root).message.startswith(f"{main_file(root)}:3: unknown setting")


# Where the socket is.


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('[control]\nsocket = "/run/a.sock"\n', "/run/a.sock"),
        ("\ufeff[control]\r\nsocket = '/run/a.sock'\r\n", "/run/a.sock"),
        ('control.socket = "/run/a.sock"\n', "/run/a.sock"),
        ('control = {socket = "/run/a.sock"}\n', "/run/a.sock"),
        ('[control]\nsocket = "/run/a.sock" # \n[swap]\nsize = \u201c2G\u201d\n', "/run/a.sock"),
        ('[swap\n[control]\n  socket="/run/a.sock"\n', "/run/a.sock"),
        ('control.socket = "/run/a.sock"\n[swap]\nsize = 2G\n', "/run/a.sock"),
        ('[swap]\nsize = 2G\nsocket = "/run/a.sock"\n', None),
        ('[other]\nsocket = "/run/a.sock"\n', None),
        ('#[control]\n#socket = "/run/a.sock"\n', None),
        ('[control]\nsocket = "a.sock"\n', None),
        ("[control]\nsocket = 7\n", None),
        ("control = 7 # socket\n", None),
        ("control = " + "[" * 2000 + " # socket", None),
        ("[swap]\nsize = '2G'\n", None),
        ("", None),
    ],
)
def test_the_socket_is_where_the_file_says_also_if_the_rest_of_it_is_wrong(
    root: Path, text: str, found: str | None
) -> None:
    main_file(root).write_bytes(text.encode())
    assert configured_socket(root) == (Path(found) if found else None)
    assert zswapctl.daemon_socket(root) == (Path(found) if found else root / paths.SOCKET[1:])


def test_the_last_file_that_names_a_socket_counts_and_those_that_cannot_be_read_do_not(
    root: Path,
) -> None:
    main_file(root).write_text('[control]\nsocket = "/run/a.sock"\n')
    dropin(root, "10.toml").write_text('[control]\nsocket = "/run/b.sock"\n')
    dropin(root, "20.toml").mkdir()
    dropin(root, "30.toml").symlink_to("nowhere")
    dropin(root, "40.toml").write_bytes(b"[control]\nsocket = '/run/\xff'\n")
    os.mkfifo(dropin(root, "50.toml"))
    assert configured_socket(root) == Path("/run/b.sock")
    (dropin(root, "x").parent).rename(root / "away")
    dropin(root, "x").parent.write_text("")
    assert configured_socket(root) is None


def test_it_is_what_the_daemon_makes_of_the_same_files(root: Path) -> None:
    for text in ("", '[control]\nsocket = "/run/a.sock"\n', 'control.socket = "/run/b.sock"\n'):
        main_file(root).write_text(text)
        expected = load(root).control.socket
        assert (configured_socket(root) or Path(paths.SOCKET)) == expected


def test_a_daemon_that_has_the_default_socket_still_is_found_by_it(root: Path) -> None:
    default, configured = root / paths.SOCKET[1:], root / "run/other.sock"
    default.parent.mkdir(parents=True)
    main_file(root).write_text(f'[control]\nsocket = "{configured}"\n')
    assert zswapctl.daemon_socket(root) == configured
    sockets = []
    for path in (default, configured):
        sockets.append(socket.socket(socket.AF_UNIX))
        sockets[-1].bind(str(path))
        assert zswapctl.daemon_socket(root) == path
    for one in sockets:
        one.close()


def test_zswapctl_asks_the_daemon_of_the_config_file(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main_file(root).write_text('[control]\nsocket = "/nonexistent/a.sock"\n')
    monkeypatch.setattr(zswapctl.daemon_socket, "__defaults__", (root,))
    assert zswapctl.main(["status"]) == ControlError.exit_code
    assert "/nonexistent/a.sock" in capsys.readouterr().err
    assert zswapctl.main(["--socket", "/nonexistent/b.sock", "status"]) == ControlError.exit_code
    assert "/nonexistent/b.sock" in capsys.readouterr().err


def test_looking_for_the_socket_costs_next_to_nothing() -> None:
    code = (
        "import sys; from zswapd.cli import zswapctl; zswapctl.daemon_socket(); print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=TOP,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert not {"tomllib", "zswapd.config", "unicodedata"} & set(done.stdout.split())


def test_a_file_is_read_once_and_no_longer_than_it_may_be(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_bytes(b"#" * LARGEST_FILE)
    assert len(read_text(path)) == LARGEST_FILE
