# SPDX-License-Identifier: GPL-2.0-or-later
"""Config: sources in order, values with their origin, errors that name file.

Line and what would be right.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zswapd import config
from zswapd.config import kinds
from zswapd.config.loader import LONGEST_TEXT
from zswapd.config.table import RETIRED
from zswapd.config.toml_lines import find_line
from zswapd.errors import ConfigError
from zswapd.handover.state import SLOT_BYTES

MEMORY = 6 << 30


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(f"MemTotal:       {MEMORY >> 10} kB\nMemFree:  17 kB\n")
    (tmp_path / "etc/zswapd/zswapd.toml.d").mkdir(parents=True)
    return tmp_path


def load(
    root: Path, *assignments: tuple[str, str], file: Path | None = None, page_size: int = 4096
) -> config.Config:
    return config.load(
        codecs=("lz4", "lzo"),
        file=file,
        assignments=[(dest, text, "--set") for dest, text in assignments],
        root=root,
        page_size=page_size,
    )


def write(root: Path, text: str, name: str = "zswapd.toml") -> Path:
    path = root / "etc/zswapd" / name
    path.write_text(text)
    return path


def refusal(root: Path, *assignments: tuple[str, str], file: Path | None = None) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(root, *assignments, file=file)
    assert caught.value.hint
    return caught.value


def test_load_without_any_source_gives_the_documented_defaults(root: Path) -> None:
    loaded = load(root)
    assert loaded.fuse.mountpoint == Path("/run/zswapd/mnt")
    assert loaded.fuse.poll_us == 400
    assert loaded.swap_files() == {"swap": 3 << 30}  # min(50% of 6G, 4G)
    assert (loaded.swap.priority, loaded.swap.discard) == (100, True)
    assert loaded.pool.compressor == "lz4"
    assert loaded.pool.limit is None
    assert (loaded.pool.zv_max_zsize, loaded.pool.zv_max_mean_zsize) == (3584, 2560)
    assert (loaded.pool.zv_page_count_policy_percent, loaded.pool.max_zspage_frames) == (75, 8)
    assert (loaded.memory.arena, loaded.memory.reserve) == ("auto", 16 << 20)
    assert (loaded.service.lock_memory, loaded.service.oom_score_adj) == (True, -1000)
    assert loaded.control.socket == Path("/run/zswapd/zswapd.sock")
    assert loaded.log.level == "info"


@pytest.mark.parametrize("page_size", [4096, 16384, 65536])
def test_defaults_are_valid_at_every_page_size(root: Path, page_size: int) -> None:
    loaded = load(root, page_size=page_size)
    assert loaded.swap.size % page_size == 0
    assert loaded.pool.zv_max_zsize == page_size * 7 // 8


def test_later_sources_win_and_each_value_knows_its_origin(root: Path) -> None:
    main = write(
        root, '[pool]\ncompressor = "lzo"\nchecksum = false\n\n[swap]\npriority = 1\nsize = "1G"\n'
    )
    write(root, "[swap]\npriority = 2\n", "zswapd.toml.d/20-b.toml")
    dropin = write(
        root, "[swap]\npriority = 3\n# last\n[fuse]\npoll_us = 0\n", "zswapd.toml.d/30-c.toml"
    )
    write(root, "[swap]\npriority = 4\n", "zswapd.toml.d/10-a.toml")
    write(root, "[swap]\npriority = 5\n", "zswapd.toml.d/99-ignored.conf")
    loaded = load(root, ("swap.size", "2G"))
    assert loaded.pool.compressor == "lzo"
    assert loaded.swap.priority == 3
    assert loaded.swap.size == 2 << 30
    shown = config.describe(loaded)
    assert shown["pool.compressor"]["origin"] == f"{main}:2"
    assert shown["swap.priority"]["origin"] == f"{dropin}:2"
    assert shown["fuse.poll_us"]["origin"] == f"{dropin}:5"
    assert shown["swap.size"] == {
        "value": 2 << 30,
        "written": "2G",
        "origin": "--set",
        "unit": "bytes",
        "reloadable": False,
    }
    assert shown["log.level"]["origin"] == "default"


def test_dropins_are_read_in_the_order_of_their_names(root: Path) -> None:
    settings = [
        "swap.priority",
        "fuse.poll_us",
        "pool.zv_max_zsize",
        "service.oom_score_adj",
        "backing.idle_age",
    ]
    for count, dest in enumerate(
        settings, start=2
    ):  # several, for a directory may happen to list two files in order
        section, key = dest.split(".")
        for number in range(count):
            write(
                root,
                f"[{section}]\n{key} = {100 + number}\n",
                f"zswapd.toml.d/{number:02}-{section}-{key}.toml",
            )
    loaded = load(root)
    assert [loaded.value(dest) for dest in settings] == [101, 102, 103, 104, 105]


def test_dropins_count_without_a_main_file(root: Path) -> None:
    write(root, '[log]\nlevel = "debug"\n', "zswapd.toml.d/x.toml")
    assert load(root).log.level == "debug"


def test_a_named_file_has_its_own_dropins_and_hides_the_default_one(
    root: Path, tmp_path: Path
) -> None:
    write(root, "[swap]\npriority = 1\n")
    other = tmp_path / "other.toml"
    other.write_text('[log]\nlevel = "error"\n')
    (tmp_path / "other.toml.d").mkdir()
    (tmp_path / "other.toml.d/a.toml").write_text("[swap]\ndiscard = false\n")
    loaded = load(root, file=other)
    assert (loaded.log.level, loaded.swap.discard, loaded.swap.priority) == ("error", False, 100)


def test_a_named_file_that_is_missing_is_an_error_the_default_one_is_not(root: Path) -> None:
    assert load(root).log.level == "info"
    error = refusal(root, file=root / "nothing.toml")
    assert "nothing.toml: No such file" in error.message


@pytest.mark.parametrize(
    ("text", "line", "message", "hint"),
    [
        (
            "[pool]\n\ncompresor = 'lzo'\n",
            3,
            "unknown setting pool.compresor",
            "did you mean pool.compressor?",
        ),
        (
            "[swap]\ncompressor = 'lzo'\n",
            2,
            "unknown setting swap.compressor",
            "did you mean pool.compressor?",
        ),
        ("[log]\nxyzzy = 1\n", 2, "unknown setting log.xyzzy", "[log] has: level"),
        ("[poool]\nchecksum = true\n", 1, "unknown section [poool]", "did you mean pool?"),
        ("# x\n[nonsense]\n", 2, "unknown section [nonsense]", "sections are: fuse, swap"),
        ("checksum = true\n", 1, "checksum is outside", "put it below [pool]"),
        ("[pool]\nchecksum = 'yes'\n", 2, 'pool.checksum is "yes"', "true or false"),
        ("[pool]\nchecksum = 1\n", 2, "pool.checksum is 1", "true or false"),
        ("[pool]\ncompressor = 'zstd'\n", 2, 'pool.compressor is "zstd"', "write lz4 or lzo"),
        ("[pool]\ncompressor = 'lz04'\n", 2, 'pool.compressor is "lz04"', "did you mean lz4?"),
        ("[pool]\nzv_max_zsize = 4097\n", 2, "4097, out of range", "from 32 to 4096"),
        ("[pool]\nzv_page_count_policy_percent = 151\n", 2, "151, out of range", "from 1 to 150"),
        (
            "[pool]\nzv_page_count_policy_percent = true\n",
            2,
            "is true",
            "whole number from 1 to 150",
        ),
        ("[pool]\nzv_page_count_policy_percent = 7.5\n", 2, "is 7.5", "whole number"),
        ("[swap]\npriority = -1\n", 2, "-1, out of range", "0 to 32767"),
        ("[swap]\nsize = 0\n", 2, "it is 0 bytes", "2G"),
        ("[swap]\nsize = -4096\n", 2, "it is negative", "2G"),
        ("[swap]\nsize = '0%'\n", 2, "it is 0 bytes", "2G"),
        (
            "[swap]\nsize = 50000\n",
            2,
            "not a multiple of the page (4096 bytes)",
            "write 49152 or 53248",
        ),
        ("[swap]\nsize = 5000\n", 2, "not a multiple of the page (4096 bytes)", "write 40960"),
        ("[swap]\nsize = 4096\n", 2, "too small for a swap file", "write 40960 or more"),
        ("[swap]\nsize = '2 GB'\n", 2, "unknown unit 'GB'", "binary"),
        ("[swap]\nsize = []\n", 2, "swap.size is []", "2G"),
        ("[memory]\nreserve = 100\n", 2, "less than a page", "write 4096 or more"),
        ("[memory]\nreserve = '76%'\n", 2, "more than 75% of the memory", "at most 75%"),
        (
            "[pool]\nlimit = '200%'\n",
            2,
            "more than all of the memory",
            'at most 100%, or "" for none',
        ),
        ("[pool]\nlimit = '100T'\n", 2, "more than all of the memory", "at most 100%"),
        (
            "[backing]\nincompressible_limit = '101%'\n",
            2,
            "more than all of the memory",
            "at most 100%",
        ),
        ("[backing]\nbuffers = '80%'\n", 2, "more than 75% of the memory", "at most 75%"),
        ("[swap.files]\nfast = '1G'\n'a/b' = '1G'\n", 3, 'has the name "a/b"', "letters"),
        ("[swap.files]\nstats = '1G'\n", 2, "which is reserved", "another"),
        ("[swap]\nfiles = '1G'\n", 2, 'swap.files is "1G"', "table of NAME ="),
        ("[swap]\nfiles = { fast = 17 }\n", 2, "swap.files.fast is 17 bytes", "write 40960"),
        ("[fuse]\nmountpoint = 'mnt'\n", 2, 'is "mnt"', "absolute path"),
        ("[fuse]\nmountpoint = '/a/../b'\n", 2, "/a/../b", "without '..'"),
        ("[fuse]\nmountpoint = '/'\n", 2, 'is "/"', "not the root"),
        (
            "[backing]\npath = '/run/zswapd/mnt/store'\n",
            2,
            "is below fuse.mountpoint",
            "outside of the mountpoint",
        ),
        ("[control]\nsocket = '/%s'\n" % ("x" * 107), 2, "108 bytes long", "at most 107"),
        *(
            (
                f"[metrics]\nlisten = {value}\n",
                2,
                f"metrics.listen is {value}",
                'such as 127.0.0.1:9847 or [::1]:9847, or "" for none',
            )
            for value in (
                '"127.0.0.1:0"',
                '"127.0.0.1:65536"',
                '"127.0.0.1"',
                '"localhost:9847"',
                '"::1:9847"',
                '"[127.0.0.1]:80"',
                '"127.0.0.1:+80"',
                '":9847"',
                '" "',
                "9847",
            )
        ),
        ("[log]\nlevel = 'verbose'\n", 2, "verbose", "debug, info, warning or error"),
        ("[pool\n", 1, "", "TOML"),
        ("[pool]\nchecksum = yes\n", 2, "", "TOML"),
        ("[pool]\nchecksum = true\nchecksum = false\n", 3, "overwrite", "TOML"),
    ],
)
def test_a_bad_file_is_refused_with_its_line_and_what_would_be_right(
    root: Path, text: str, line: int, message: str, hint: str
) -> None:
    path = write(root, text)
    error = refusal(root)
    assert error.message.startswith(f"{path}:{line}: ")
    assert message in error.message
    assert hint in (error.hint or "")


def test_a_file_that_is_no_text_or_cannot_be_read_is_refused(root: Path) -> None:
    path = root / "etc/zswapd/zswapd.toml"
    path.write_bytes(b"[pool]\n\xff\xfe")
    assert "not UTF-8" in refusal(root).message
    path.unlink()
    path.mkdir()
    assert "Is a directory" in refusal(root).message


def test_a_file_that_nests_without_end_is_refused(root: Path) -> None:
    write(root, "[pool]\nlimit = " + "[\n" * 5000 + "]" * 100 + "\n")
    assert "is nested too deeply" in refusal(root).message


@pytest.mark.parametrize(
    ("dest", "text", "message", "hint"),
    [
        ("pool.checksum", "maybe", '"maybe"', "true or false"),
        ("swap.priority", "high", '"high"', "whole number"),
        ("swap.priority", "9" * 40, "9999", "whole number"),
        ("swap.size", "0", "0 bytes", "2G"),
        ("swap.files.swap", "1G", "reserved", "another"),
        ("swap.files.more", "", "it is empty", "2G"),
        ("swap.files", "1G", '"1G"', "NAME ="),
        ("nonsense", "1", "unknown section [nonsense]", "sections are"),
        ("compressor", "lzo", "unknown section [compressor]", "did you mean pool.compressor?"),
        ("pool.limits", "1", "pool.limits", "did you mean pool.limit?"),
    ],
)
def test_a_bad_assignment_is_refused_and_names_the_option(
    root: Path, dest: str, text: str, message: str, hint: str
) -> None:
    error = refusal(root, (dest, text))
    assert error.message.startswith("--set: ")
    assert message in error.message
    assert hint in (error.hint or "")


@pytest.mark.parametrize("name", RETIRED)
def test_setting_of_an_earlier_version_has_no_effect_and_a_warning(root: Path, name: str) -> None:
    section, key = name.split(".")
    write(root, f"[{section}]\n{key} = 1\n", "zswapd.toml")
    loaded = load(root)
    assert loaded.without_effect() == [
        f"{root}/etc/zswapd/zswapd.toml:2: {name} has no effect: {RETIRED[name]}"
    ]
    again = config.from_document(config.to_document(loaded), ("lz4", "lzo"))
    assert again.without_effect() == loaded.without_effect(), "a successor takes them as well"
    (root / "etc/zswapd/zswapd.toml").unlink()
    assert dataclasses.replace(loaded, given={}) == load(root)
    with pytest.raises(ConfigError, match="is no setting any more"):
        config.changed(loaded, {name: 1}, source="set")


def test_assignments_give_every_kind_of_value(root: Path) -> None:
    loaded = load(
        root,
        ("pool.checksum", "off"),
        ("swap.discard", "Yes"),
        ("swap.priority", "7"),
        ("service.oom_score_adj", "-500"),
        ("pool.limit", "25%"),
        ("swap.files.fast", "64M"),
        ("swap.files.slow", "1G"),
        ("fuse.mountpoint", "/tmp//m/"),
    )
    assert (loaded.pool.checksum, loaded.swap.discard, loaded.swap.priority) == (False, True, 7)
    assert (loaded.service.oom_score_adj, loaded.pool.limit) == (-500, MEMORY // 4)
    assert loaded.swap_files() == {"swap": 3 << 30, "fast": 64 << 20, "slow": 1 << 30}
    assert loaded.fuse.mountpoint == Path("/tmp/m")


def test_swap_files_of_all_sources_add_up(root: Path) -> None:
    write(root, "[swap.files]\nfast = '64M'\nslow = '1G'\n")
    write(root, "[swap]\nfiles.slow = '2G'\n", "zswapd.toml.d/a.toml")
    loaded = load(root, ("swap.files.third", "128M"))
    assert loaded.swap.files == {"fast": 64 << 20, "slow": 2 << 30, "third": 128 << 20}
    assert "a.toml:2" in config.describe(loaded, ["swap.files"])["swap.files"]["origin"]


@pytest.mark.parametrize("percent", ["33%", "33.333%", "min(33%, 1000000G)"])
def test_a_computed_swap_size_is_rounded_down_to_the_page(root: Path, percent: str) -> None:
    size = load(root, ("swap.size", percent), page_size=65536).swap.size
    assert size % 65536 == 0
    assert MEMORY * 33 // 100 - 65536 < size <= MEMORY * 34 // 100


def test_a_socket_below_the_mountpoint_is_refused(root: Path) -> None:
    error = refusal(root, ("control.socket", "/run/zswapd/mnt/sock"))
    assert "below fuse.mountpoint" in error.message


def test_either_half_can_be_off_and_not_both(root: Path) -> None:
    off = ("swap.size", "")
    assert load(root, off).swap_files() == {}
    assert load(root, off, ("swap.files.more", "1G"), ("cache.limit", "")).swap_files() == {
        "more": 1 << 30
    }
    assert load(root, ("cache.limit", "")).cache.limit is None
    assert "neither a swap file nor a cache" in refusal(root, off, ("cache.limit", "")).message
    assert "a backing needs a swap file" in refusal(root, off, ("backing.path", "/dev/sdb")).message


@pytest.mark.parametrize("text", ["", "swap.size", "=2G", " = 2G"])
def test_parse_assignment_without_a_name_or_value_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not an assignment"):
        config.parse_assignment(text)


def test_parse_assignment_keeps_what_follows_the_first_equals_sign() -> None:
    assert config.parse_assignment("control.socket = /tmp/a=b") == ("control.socket", "/tmp/a=b")


def test_changed_gives_a_new_config_and_leaves_the_old_one(root: Path) -> None:
    before = load(root, ("swap.size", "1G"))
    after = config.changed(
        before,
        {"pool.compressor": "lzo", "swap.priority": "0", "pool.limit": 1 << 30},
        source="set",
    )
    assert (before.pool.compressor, before.swap.priority, before.pool.limit) == ("lz4", 100, None)
    assert (after.pool.compressor, after.swap.priority, after.pool.limit) == ("lzo", 0, 1 << 30)
    assert after.swap.size == 1 << 30
    assert config.describe(after)["pool.compressor"]["origin"] == "set"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pool.compressor": "lzo", "swap.size": "2G"}, "swap.size cannot change while"),
        ({"pool.compressor": "lzo", "pool.zv_max_zsize": "0"}, "out of range"),
        ({"pool.compressor": "lzo", "pool.checksum": 1}, "pool.checksum is 1"),
        ({"pool.compressor": "lzo", "pool.limit": "200%"}, "more than all of the memory"),
        ({"pool.compressor": "lzo", "pool.nothing": "1"}, "unknown setting"),
        ({"swap.files.x": "1G"}, "cannot change while"),
    ],
)
def test_changed_is_all_or_nothing(root: Path, settings: dict[str, object], message: str) -> None:
    before = load(root)
    with pytest.raises(ConfigError, match=message) as caught:
        config.changed(before, settings, source="zswapctl set")
    assert caught.value.hint
    assert before.pool.compressor == "lz4"


def test_changed_refuses_what_a_successor_could_not_be_told(root: Path) -> None:
    loaded = load(root)
    blanks = " " * LONGEST_TEXT
    with pytest.raises(ConfigError, match=r"pool\.checksum is 1028 characters long") as caught:
        config.changed(loaded, {"pool.checksum": "true" + blanks}, source="test")
    assert caught.value.hint
    longest = {name: "1".rjust(LONGEST_TEXT) for name in config.reloadable_names()}
    assert len(json.dumps(longest)) < SLOT_BYTES // 4
    assert config.changed(
        loaded, {"pool.checksum": blanks[4:] + "true"}, source="test"
    ).pool.checksum


def test_describe_of_an_unknown_name_is_refused(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"pool\.compresor"):
        config.describe(load(root), ["pool.compresor"])


def test_every_setting_is_documented_and_can_be_written_as_text(root: Path) -> None:
    loaded = load(root)
    for dest, setting in config.SETTINGS.items():
        assert setting.help.endswith(".")
        assert setting.kind.describe(loaded.context)
        if dest not in {"swap.files", "cache.volumes"}:
            written = setting.default_for(loaded.context)
            text = str(written).lower() if isinstance(written, bool) else str(written)
            assert load(root, (dest, text)).value(dest) == loaded.value(dest)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("/srv/disk.img", "ro:/srv/disk.img"),
        ("ro:/a:b", "ro:/a:b"),
        ("writethrough:/dev/sdb", "writethrough:/dev/sdb"),
        ("/with:colon", "ro:/with:colon"),
        ("relative", None),
        ("rw:/x", None),
        ("writethrough:x", None),
        ("", None),
    ],
)
def test_cache_volumes_are_paths_with_a_mode(
    root: Path, written: str, expected: str | None
) -> None:
    if expected is None:
        with pytest.raises(ConfigError, match=r"cache\.volumes\.disk"):
            load(root, ("cache.volumes.disk", written))
    else:
        assert load(root, ("cache.volumes.disk", written)).cache.volumes == {"disk": expected}


def test_cache_volumes_need_a_cache_and_threads(root: Path) -> None:
    volumes = [(f"cache.volumes.v{number}", "/x") for number in range(5)]
    assert len(load(root, *volumes[:4]).cache.volumes) == 4
    with pytest.raises(
        ConfigError, match=r"5 cache\.volumes, but cache\.max_volumes is 4"
    ) as raised:
        load(root, *volumes)
    assert raised.value.hint == "set cache.max_volumes = 5, or remove volumes"
    assert len(load(root, *volumes, ("cache.max_volumes", "5")).cache.volumes) == 5
    with pytest.raises(ConfigError, match=r"cache\.volumes need a cache"):
        load(root, volumes[0], ("cache.limit", ""))
    assert load(root, ("cache.limit", "")).cache.limit is None


@pytest.mark.parametrize(
    ("written", "is_right"), [("50%", True), ("10M", True), ("", True), ("51%", False)]
)
def test_cache_limit_is_half_of_the_memory_at_most(
    root: Path, written: str, is_right: bool
) -> None:
    if is_right:
        assert (load(root, ("cache.limit", written)).cache.limit is None) == (not written)
        return
    with pytest.raises(ConfigError, match="more than 50% of the memory"):
        load(root, ("cache.limit", written))


def test_sections_and_attributes_are_the_same_names(root: Path) -> None:
    loaded = load(root)
    for name, cls in config.SECTIONS.items():
        assert isinstance(getattr(loaded, name), cls)
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(getattr(loaded, name), dataclasses.fields(cls)[0].name, 1)


@pytest.mark.parametrize("meminfo", [None, "MemFree: 1 kB\n"])
def test_a_machine_that_does_not_tell_its_memory_is_refused(
    root: Path, meminfo: str | None
) -> None:
    (root / "proc/meminfo").unlink()
    if meminfo is not None:
        (root / "proc/meminfo").write_text(meminfo)
    with pytest.raises(ConfigError, match="meminfo"):
        load(root)


@pytest.mark.parametrize(
    ("text", "path", "line"),
    [
        ("[a]\nb = 1\n", ["a", "b"], 2),
        ("[a]\nb = 1\n", ["a"], 1),
        ("[ a . c ] # x\n b=1\n", ["a", "c", "b"], 2),
        ('["a"]\n"b" = 1\n', ["a", "b"], 2),
        ("a.b = 1\n", ["a", "b"], 1),
        ("[a]\nb = { c = 1 }\n", ["a", "b", "c"], 2),
        ("[a]\nx = '''\nb = 1\n'''\nb = 2\n", ["a", "b"], 5),
        ("[a]\nx = '''b''' \nb = 2\n", ["a", "b"], 3),
        ("[x]\nb = 1\n[a]\nb = 1\n", ["a", "b"], 4),
        ("[x]\ny = 1\n", ["a", "b"], None),
    ],
)
def test_find_line_finds_the_key_or_its_table(text: str, path: list[str], line: int | None) -> None:
    assert find_line(text, path) == line


@given(
    dest=st.one_of(st.sampled_from(sorted(config.SETTINGS)), st.text(max_size=20)),
    value=st.one_of(
        st.text(max_size=30),
        st.integers(),
        st.booleans(),
        st.none(),
        st.floats(),
        st.lists(st.integers(), max_size=2),
        st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    ),
)
def test_changed_by_anything_gives_a_config_or_a_config_error(dest: str, value: object) -> None:
    before = config.load(codecs=("lz4", "lzo"), root=Path("/"))
    with contextlib.suppress(ConfigError):
        after = config.changed(before, {dest: value}, source="fuzz")
        assert config.SETTINGS[dest].reloadable
        assert after.given[dest].value == value


@pytest.mark.parametrize(
    "text", ["a\nb", "\x1b[2J", "\x7f\x9b", '"', "\\", "\u2028", "\U000e0001", "fine µ"]
)
def test_values_are_shown_as_toml_and_without_what_a_terminal_obeys(text: str) -> None:
    shown = kinds.shown(text)
    assert shown.isprintable()
    assert tomllib.loads(f"x = {shown}") == {"x": text}
