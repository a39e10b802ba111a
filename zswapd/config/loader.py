# SPDX-License-Identifier: GPL-2.0-or-later
"""The loader that builds one Config from all sources, or raises one error with a hint.

The sources are the table's defaults, the config file, its drop-ins (host/configfiles.py), and the
command line. A later source overrides an earlier one. Each source is first converted to one flat
form (`section.key` → value and origin), so that one check serves all sources.

Invariant: a Config exists only if all its values are accepted, also after a change at run time.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zswapd.config import clients
from zswapd.config.characters import find_strange_character
from zswapd.config.kinds import Context, Named, shown
from zswapd.config.sizes import ValueRefused
from zswapd.config.table import (
    CLIENT_SETTINGS,
    FILES,
    RETIRED,
    SECTIONS,
    SETTINGS,
    BackingSection,
    CacheSection,
    ClientSection,
    ControlSection,
    FuseSection,
    LogSection,
    MemorySection,
    MetricsSection,
    PoolSection,
    ServiceSection,
    Setting,
    SwapSection,
)
from zswapd.config.toml_lines import find_line
from zswapd.errors import ConfigError
from zswapd.host import cgroups
from zswapd.host.configfiles import config_files, position, read_text
from zswapd.host.hints import nearest
from zswapd.host.installation import restart_daemon
from zswapd.pages import PAGE_SIZE, round_down

# tomllib needs time that grows with the square of the number of parts of a dotted key. This limit
# and the limit of the file's length bound the time to 2 s.
_LONGEST_LINE = 4096
BACKED_LIMIT_PERCENT = 20
"""Default of pool.limit with a disk behind the pool, in percent of all memory."""
LONGEST_TEXT = 1024
"""Limit of a value that is set at run time, in characters.

The values of all settings together must fit into the shared state.
"""


@dataclass(frozen=True, slots=True)
class Origin:
    """The place from which a value comes."""

    source: str
    """Path of a file, name of an option, or `default`."""
    line: int | None = None
    """Line in the file, from 1."""

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source


@dataclass(frozen=True, slots=True)
class Given:
    """A value as its source wrote it."""

    value: object
    origin: Origin
    text: bool = False
    """True if it comes from the command line or the control socket, where every value is text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All settings, checked. Each section is an attribute: `config.pool.compressor`."""

    fuse: FuseSection
    swap: SwapSection
    pool: PoolSection
    cache: CacheSection
    memory: MemorySection
    backing: BackingSection
    service: ServiceSection
    control: ControlSection
    metrics: MetricsSection
    log: LogSection
    context: Context
    """The context of the checks."""
    clients: Mapping[str, ClientSection]
    """The settings of each swap file beside its size, by name."""
    given: Mapping[str, Given]
    """The values that sources wrote, by full name. Each entry of a table has its own full name."""

    @property
    def may_wait_for_files(self) -> bool:
        """Whether requests may wait for a disk behind the pool, or for the files of volumes."""
        return bool(self.backing.path or self.cache.volumes)

    def value(self, dest: str) -> object:
        """Return the typed value of a setting.

        Args:
            dest: full name of the setting.
        """
        setting = SETTINGS[dest]
        return getattr(getattr(self, setting.section), setting.key)

    def origins(self, *dests: str) -> str:
        """Return the origins of settings and of entries of tables, for messages.

        Args:
            dests: full names of the settings.
        """
        found = [
            str(given.origin)
            for dest, given in self.given.items()
            if any(dest == name or dest.startswith(name + ".") for name in dests)
        ]
        return ", ".join(dict.fromkeys(found)) or "default"

    def without_effect(self) -> list[str]:
        """Return a warning for each given setting that no longer exists."""
        return [
            f"{self.given[name].origin}: {name} has no effect: {now}"
            for name, now in RETIRED.items()
            if name in self.given
        ]

    def client(self, name: str) -> ClientSection:
        """Return the settings of a swap file beside its size; the defaults for one without any."""
        return self.clients.get(name) or _convert_client(name, {}, self.context)

    def swap_files(self) -> dict[str, int]:
        """Return the size in bytes of each swap file by name, `swap` first.

        The result is empty for a daemon that only caches.
        """
        first = {} if self.swap.size is None else {"swap": self.swap.size}
        return {**first, **self.swap.files}


def load(
    *,
    codecs: Iterable[str],
    file: Path | None = None,
    assignments: Sequence[tuple[str, str, str]] = (),
    root: Path = Path("/"),
    page_size: int = PAGE_SIZE,
    memory: int = 0,
) -> Config:
    """Build the Config from all sources.

    Args:
        codecs: names that `pool.compressor` may have.
        file: a config file to read instead of the default file. It must exist; the default file
            need not exist.
        assignments: (full name, text, option) of the command line, such as ("swap.size", "2G",
            "--size").
        root: directory that holds /etc and /proc, for tests.
        page_size: bytes in a page.
        memory: bytes that are 100 % of a size; 0 for the memory of the machine now. An upgrade
            passes the value of the running daemon, so that its swap files keep their sizes.

    Raises:
        ConfigError: a file cannot be read, or a setting is unknown or refused.
    """
    context = make_context(codecs, root=root, page_size=page_size)
    if memory:
        context = dataclasses.replace(context, memory_total=memory, limited_by="")
    given: dict[str, Given] = {}
    for path in config_files(file, root):
        given |= _read_file(path, is_chosen=path == file)
    files = clients.names_in([*given, *(dest for dest, _text, _option in assignments)])
    for written, text, option in assignments:
        dest = clients.canonical(written, files)
        given[dest] = Given(text, Origin(option), text=True)
    return build(given, context)


def parse_assignment(text: str) -> tuple[str, str]:
    """Split `section.key=value`.

    Raises:
        ConfigError: there is no `=` or no name before it.
    """
    dest, equals, value = text.partition("=")
    if not equals or not dest.strip():
        raise ConfigError(
            f"{shown(text)} is not an assignment",
            hint="write section.key=value, for example pool.compressor=lzo",
        )
    return dest.strip(), value.strip()


def changed(config: Config, settings: Mapping[str, object], *, source: str) -> Config:
    """Return the Config with some settings changed.

    Args:
        config: the present Config.
        settings: new values by full name, typed or as text.
        source: source of the origin of the new values.

    Raises:
        ConfigError: a setting is unknown, cannot change at run time, or its value is refused.
    """
    files = clients.names_in(config.given)
    settings = {clients.canonical(dest, files): value for dest, value in settings.items()}
    for dest, value in settings.items():
        setting = _find_setting(dest, source)
        if isinstance(value, str) and len(value) > LONGEST_TEXT:
            raise ConfigError(
                f"{clients.spoken(dest)} is {len(value)} characters long",
                hint=f"write {LONGEST_TEXT} at most",
            )
        if not setting.reloadable:
            raise ConfigError(
                f"{dest} cannot change while the daemon runs",
                hint=(
                    f"put it into the config file, then {restart_daemon()}; what can:"
                    f" {', '.join(reloadable_names())}"
                ),
            )
    new = {
        dest: Given(value, Origin(source), text=isinstance(value, str))
        for dest, value in settings.items()
    }
    return build({**config.given, **new}, config.context)


def with_files(config: Config, sizes: Mapping[str, object], *, source: str) -> Config:
    """Return the Config with exactly these swap files beside `swap`.

    Settings of other files are left out.

    Args:
        config: the Config.
        sizes: the size of each file by name, typed or as text.
        source: source of the origin of sizes that differ.

    Raises:
        ConfigError: a name or a size is refused.
    """
    given: dict[str, Given] = {}
    for dest, item in config.given.items():
        client = clients.split(dest)
        name = client[0] if client else dest.removeprefix(f"{FILES}.")
        if not dest.startswith(f"{FILES}.") or name in sizes or name == clients.FIRST:
            given[dest] = item
    for name, size in sizes.items():
        if name != clients.FIRST and config.swap.files.get(name) != size:
            given[f"{FILES}.{name}"] = Given(size, Origin(source))
    return build(given, config.context)


def reloadable_names() -> list[str]:
    """Return the full names of the settings that can change at run time."""
    return [dest for dest, setting in SETTINGS.items() if setting.reloadable]


def describe(config: Config, names: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Return settings as plain values for `get`.

    Args:
        config: the Config.
        names: full names of the settings; all settings if empty.

    Returns:
        By full name: value (paths as strings), written form, origin, unit, and True if the setting
        can change at run time. `pool.limit` also has its effective value in bytes, because
        `pool.zv_page_count_policy_percent` limits the same memory.

    Raises:
        ConfigError: a name is unknown.
    """
    files = clients.names_in(config.given)
    given = [dest for dest in config.given if clients.split(dest)]
    wanted = [clients.canonical(name, files) for name in names] if names else [*SETTINGS, *given]
    rows = {name: _find_setting(name, "get") for name in wanted}
    return {
        clients.spoken(name if clients.split(name) else row.dest): _describe_one(config, name, row)
        for name, row in rows.items()
    }


def _describe_one(config: Config, dest: str, row: Setting) -> dict[str, Any]:
    client = clients.split(dest)
    if client is not None:
        given = config.given.get(dest)
        return {
            "value": getattr(config.clients[client[0]], row.key),
            "written": given.value if given else None,
            "origin": str(given.origin) if given else "default",
            "unit": row.unit,
            "reloadable": row.reloadable,
        }
    value = config.value(row.dest)
    effective = {"effective": pool_limit_bytes(config)} if row.dest == "pool.limit" else {}
    entries = [
        given
        for dest, given in config.given.items()
        if dest == row.dest or dest.startswith(row.dest + ".")
    ]
    return {
        "value": (
            str(value)
            if isinstance(value, Path)
            else dict(value)
            if isinstance(value, Mapping)
            else value
        ),
        "written": (
            entries[0].value if len(entries) == 1 and not isinstance(row.kind, Named) else None
        ),
        "origin": ", ".join(dict.fromkeys(str(given.origin) for given in entries)) or "default",
        "unit": row.unit,
        "reloadable": row.reloadable,
        **effective,
    }


def make_context(
    codecs: Iterable[str], *, root: Path = Path("/"), page_size: int = PAGE_SIZE
) -> Context:
    """Return the context of the checks on this machine.

    Its memory is the lowest limit of a memory cgroup above this process, otherwise MemTotal.

    Args:
        codecs: names that `pool.compressor` may have.
        root: directory that holds /proc and /sys.
        page_size: bytes in a page.

    Raises:
        ConfigError: /proc/meminfo cannot be read or has no MemTotal.
    """
    total, limits = memory_total(root), cgroups.find(root)
    if limits:
        return Context(limits[0].bytes, page_size, frozenset(codecs), str(limits[0].file))
    return Context(total, page_size, frozenset(codecs))


def pool_limit_bytes(config: Config) -> int:
    """Return the limit of the pool in bytes.

    It is the lower of pool.limit and pool.zv_page_count_policy_percent.
    """
    pool, total = config.pool, config.context.memory_total
    default = total * BACKED_LIMIT_PERCENT // 100 if config.backing.path else total
    bound = total * pool.zv_page_count_policy_percent // 100
    return round_down(
        min(default if pool.limit is None else pool.limit, bound), config.context.page_size
    )


def memory_total(root: Path = Path("/")) -> int:
    """Return the machine's memory in bytes.

    Raises:
        ConfigError: /proc/meminfo cannot be read or has no MemTotal.
    """
    path = root / "proc/meminfo"
    try:
        match = re.search(r"^MemTotal:\s*(\d+) kB", path.read_text(), re.MULTILINE)
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}", hint="`mount -t proc proc /proc`"
        ) from error
    if match is None:
        raise ConfigError(f"{path} has no MemTotal", hint="`mount -t proc proc /proc`")
    return int(match[1]) * 1024


def _read_file(path: Path, *, is_chosen: bool) -> dict[str, Given]:
    text = read_text(path, is_chosen=is_chosen)
    _check_length(path, text)
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _not_toml(path, text, error) from error
    except RecursionError as error:
        raise ConfigError(
            f"{path} is nested too deeply", hint="a section holds plain keys"
        ) from error
    return dict(_flatten(document, path, text))


def _not_toml(path: Path, text: str, error: tomllib.TOMLDecodeError) -> ConfigError:
    found = find_strange_character(text, str(error))
    if found is not None:
        place = position(path, text, found.place)
        return ConfigError(
            f"{place}: found {found.name}, which has no meaning in TOML", hint=found.advice
        )
    line = re.search(r"line (\d+)", str(error))
    origin = Origin(str(path), int(line[1]) if line else None)
    return ConfigError(
        f"{origin}: {error}", hint='write TOML: [section], key = value, strings in "quotes"'
    )


def _check_length(path: Path, text: str) -> None:
    for number, line in enumerate(text.split("\n"), start=1):
        if len(line) > _LONGEST_LINE:
            raise ConfigError(
                f"{path}:{number}: the line is longer than {_LONGEST_LINE} characters",
                hint="write each entry of a table on its own line below [section.key]",
            )


def _flatten(document: Mapping[str, object], path: Path, text: str) -> Iterator[tuple[str, Given]]:
    for section, keys in document.items():
        if not isinstance(keys, dict):
            raise _not_in_a_section(section, Origin(str(path), find_line(text, [section])))
        for key, value in keys.items():
            setting = SETTINGS.get(f"{section}.{key}")
            if setting and isinstance(setting.kind, Named) and isinstance(value, dict):
                yield from _flatten_entries(setting, value, path, text)
            else:
                yield (
                    f"{section}.{key}",
                    Given(value, Origin(str(path), find_line(text, [section, key]))),
                )
        if section not in SECTIONS:  # an empty section; `build` refuses the keys of other ones
            raise _unknown_section(section, Origin(str(path), find_line(text, [section])))


def _flatten_entries(
    setting: Setting, table: Mapping[str, object], path: Path, text: str
) -> Iterator[tuple[str, Given]]:
    place = [setting.section, setting.key]
    for name, entry in table.items():
        origin = Origin(str(path), find_line(text, [*place, name]))
        if setting.dest == FILES and isinstance(entry, dict) and entry:
            for key, (dest, value) in zip(entry, clients.entries(name, entry, origin), strict=True):
                line = find_line(text, [*place, name, key])
                yield dest, Given(value, Origin(str(path), line))
        else:
            yield f"{setting.dest}.{name}", Given(entry, origin)


def build(given: Mapping[str, Given], context: Context) -> Config:
    """Return the Config of the given values and of the defaults.

    Args:
        given: values by full name.
        context: the context of the checks.

    Raises:
        ConfigError: a setting is unknown or refused.
    """
    for dest, item in given.items():
        if dest not in RETIRED:
            _find_setting(dest, item.origin)
    sections: dict[str, dict[str, object]] = {section: {} for section in SECTIONS}
    for setting in SETTINGS.values():
        sections[setting.section][setting.key] = _convert(setting, given, context)
    built: dict[str, Any] = {
        section: SECTIONS[section](**keys) for section, keys in sections.items()
    }
    files = {**({} if built["swap"].size is None else {clients.FIRST: 0}), **built["swap"].files}
    config = Config(
        **built,
        clients={name: _convert_client(name, given, context) for name in files},
        context=context,
        given=dict(given),
    )
    _check_clients(config)
    _check_together(config)
    return config


def _convert(setting: Setting, given: Mapping[str, Given], context: Context) -> object:
    if isinstance(setting.kind, Named):
        return _convert_entries(setting, setting.kind, given, context)
    item = given.get(setting.dest)
    if item is None:
        return setting.kind.convert(setting.default_for(context), context)
    value = (
        setting.kind.from_text(item.value)
        if item.text and isinstance(item.value, str)
        else item.value
    )
    try:
        return setting.kind.convert(value, context)
    except ValueRefused as refused:
        raise _refused(setting.dest, item.origin, refused) from None


def _convert_client(name: str, given: Mapping[str, Given], context: Context) -> ClientSection:
    """Return the settings of one swap file beside its size."""
    values: dict[str, Any] = {}
    for key, setting in CLIENT_SETTINGS.items():
        dest = clients.joined(name, key)
        item = given.get(dest, Given(setting.default, Origin("default")))
        kind = setting.kind
        value = (
            kind.from_text(item.value) if item.text and isinstance(item.value, str) else item.value
        )
        try:
            values[key] = kind.convert(value, context)
        except ValueRefused as refused:
            raise _refused(clients.spoken(dest), item.origin, refused) from None
    return ClientSection(**values)


def _check_clients(config: Config) -> None:
    """Refuse settings of swap files that do not exist."""
    for dest, item in config.given.items():
        client = clients.split(dest)
        if client is not None and client[0] not in config.clients:
            name = client[0]
            missing = "swap.size" if name == clients.FIRST else f"{FILES}.{name}.size"
            raise ConfigError(
                f"{item.origin}: {clients.spoken(dest)} is set, and there is no swap file {name}",
                hint=f"set {missing} in the config file, or remove the setting",
            )


def _convert_entries(
    setting: Setting, kind: Named[object], given: Mapping[str, Given], context: Context
) -> dict[str, object]:
    entries: dict[str, object] = {}
    for dest, item in given.items():
        name = dest.removeprefix(setting.dest + ".")
        if (dest != setting.dest and name == dest) or clients.split(dest):
            continue  # another setting's
        try:
            if dest == setting.dest:
                kind.convert(item.value, context)  # refuses a value that is not a table
            kind.check_name(name)
            value = (
                kind.kind.from_text(item.value)
                if item.text and isinstance(item.value, str)
                else item.value
            )
            entries[name] = kind.kind.convert(value, context)
        except ValueRefused as refused:
            raise _refused(dest, item.origin, refused) from None
    return entries


def _check_together(config: Config) -> None:
    """Refuse values that are valid alone but not together."""
    at = config.origins
    _check_volumes(config, at)
    if config.control.socket.is_relative_to(config.fuse.mountpoint):
        raise ConfigError(
            f"{at('control.socket', 'fuse.mountpoint')}: control.socket {config.control.socket}"
            " lies below fuse.mountpoint, which the mount hides",
            hint="put the socket beside the mountpoint",
        )
    if not config.swap_files() and config.cache.limit is None:
        raise ConfigError(
            f"{at('swap.size', 'cache.limit')}: there is neither a swap file nor a cache",
            hint="set swap.size or cache.limit",
        )
    if not config.swap_files() and config.backing.path:
        raise ConfigError(
            f"{at('swap.size', 'backing.path')}: a backing needs a swap file, and there is none",
            hint='set swap.size, or set backing.path = ""',
        )
    if config.backing.path and config.backing.path.is_relative_to(config.fuse.mountpoint):
        raise ConfigError(
            f"{at('backing.path', 'fuse.mountpoint')}: backing.path {config.backing.path} is below"
            " fuse.mountpoint, so the daemon would write to itself",
            hint="choose a file or device outside of the mountpoint",
        )
    if config.backing.buffers < 4 << 20:
        raise ConfigError(
            f"{at('backing.buffers')}: backing.buffers is {config.backing.buffers} bytes, which is"
            " less than two of the longest reads need",
            hint="write 4M or more",
        )


def _check_volumes(config: Config, at: Callable[..., str]) -> None:
    names = [f"cache.volumes.{name}" for name in config.cache.volumes]
    if names and config.cache.limit is None:
        raise ConfigError(
            f"{at(*names, 'cache.limit')}: cache.volumes need a cache, and cache.limit is empty",
            hint="set cache.limit, or remove the volumes",
        )
    if len(names) > config.cache.max_volumes:
        raise ConfigError(
            f"{at(*names, 'cache.max_volumes')}: there are {len(names)} cache.volumes, but"
            f" cache.max_volumes is {config.cache.max_volumes}",
            hint=f"set cache.max_volumes = {len(names)}, or remove volumes",
        )


def _refused(dest: str, origin: Origin, refused: ValueRefused) -> ConfigError:
    return ConfigError(f"{origin}: {dest} {refused.message}", hint=refused.hint)


def _find_setting(dest: str, origin: Origin | str) -> Setting:
    """Return the setting of a full name. The name of an entry gives the setting of its table.

    Raises:
        ConfigError: the setting does not exist; the hint has the nearest name.
    """
    setting = SETTINGS.get(dest)
    if setting is not None:
        return setting
    client = clients.split(dest)
    if client is not None and client[1] in CLIENT_SETTINGS:
        return CLIENT_SETTINGS[client[1]]
    if dest in RETIRED:
        raise ConfigError(
            f"{origin}: {dest} is no setting any more: {RETIRED[dest]}",
            hint="`zswapctl get` lists the settings",
        )
    section, _, key = dest.partition(".")
    for named in SETTINGS.values():
        if isinstance(named.kind, Named) and dest.startswith(named.dest + "."):
            return named
    if section not in SECTIONS:
        raise _unknown_section(section, origin, dest)
    near = _nearest_setting(dest, key)
    keys = ", ".join(row.key for row in SETTINGS.values() if row.section == section)
    raise ConfigError(
        f"{origin}: unknown setting {dest}",
        hint=f"did you mean {near}?" if near else f"[{section}] has: {keys}",
    )


def _nearest_setting(dest: str, key: str) -> str | None:
    same_key = [name for name, row in SETTINGS.items() if row.key == key]
    return same_key[0] if same_key else nearest(dest, set(SETTINGS))


def _unknown_section(section: str, origin: Origin | str, dest: str = "") -> ConfigError:
    near = nearest(section, set(SECTIONS)) or nearest(dest, set(SETTINGS))
    return ConfigError(
        f"{origin}: unknown section [{shown(section)[1:-1]}]",
        hint=f"did you mean {near}?" if near else f"sections are: {', '.join(SECTIONS)}",
    )


def _not_in_a_section(key: str, origin: Origin) -> ConfigError:
    rows = [row for row in SETTINGS.values() if row.key == key]
    hint = (
        f"put it below [{rows[0].section}]"
        if rows
        else f"put it below one of the sections: {', '.join(SECTIONS)}"
    )
    return ConfigError(f"{origin}: {shown(key)[1:-1]} is outside of a section", hint=hint)
