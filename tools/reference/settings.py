# SPDX-License-Identifier: GPL-2.0-or-later
"""The reference of settings, docs/configuration.md, from the table in zswapd/config/table.py."""

from __future__ import annotations

from tools.reference.manuals import CONTEXT
from zswapd.config import SECTIONS, SETTINGS
from zswapd.config.kinds import shown

_INTRODUCTION = """\
<!-- Written by scripts/reference from zswapd/config/table.py. -->
# Settings

Settings come from these places, later ones winning: the defaults below; `/etc/zswapd/zswapd.toml`,
or the file of `--config`; its drop-ins `<file>.d/*.toml` in the order of their names; the command
line (`--set SECTION.KEY=VALUE`). A file whose name begins with a dot is no drop-in, since editors
leave such files. A link to `/dev/null` counts as an empty file. The files are UTF-8; a byte order
mark is ignored. `zswapctl` reads `control.socket` from the same files, so it needs `--socket` only
for a daemon that was started with `--config` or `--set control.socket=…`.

```sh
zswapd config defaults      # a file with every setting, to begin with
zswapd config check         # right, or what is wrong in which line; `--config FILE` before it is installed
zswapd config show          # each setting with where it comes from, as `zswapd run` would find it
zswapctl get                # the same of the daemon that runs
zswapctl set pool.limit=2G  # at run time, where the table says so; all that is named, or none
zswapctl reset pool.limit   # the configured value again; --all for all that were set
```

Sizes are bytes, or with a unit: `K`, `M`, `G`, `T` (each 1024 of the one before), or `%` of memory;
`min(50%, 4G)` and `max(…)` choose among several. Memory is that of the machine, or the lowest limit
of a memory cgroup above the daemon, at its start. A start and `zswapd config check` refuse settings
that take more memory than there is. Defaults that depend on the page are those of 4 KiB. What is
set at run time wins over the files until it is reset or the daemon is stopped (`systemctl restart`
does that too): takeovers, upgrades and reloads keep it, and so does a start that adopts what a
daemon that died has left. Files are read again by `systemctl reload`, `zswapctl upgrade` or SIGHUP:
as a whole, or not at all if anything in them is not right. What is stored depends on some of them
(`fuse.mountpoint`, `fuse.hook`, `control.socket`, `swap.size`, `swap.files`, `pool.allocator`,
`pool.max_zspage_frames`, `backing.path`, `backing.encrypt`): to change these, swap off and restart.
"""


def configuration_md() -> str:
    """Return the page."""
    lines = [_INTRODUCTION]
    for section, cls in SECTIONS.items():
        what = (cls.__doc__ or "").partition(": ")[2]
        lines += [
            f"## [{section}]",
            "",
            what[:1].upper() + what[1:],
            "",
            "| key | default | takes | at run time |",
            "|---|---|---|---|",
        ]
        for row in SETTINGS.values():
            if row.section == section:
                unit = f" ({row.unit})" if row.unit not in {"", "bytes"} else ""
                cells = (
                    f"`{row.key}`",
                    f"`{shown(row.default_for(CONTEXT))}`{unit}",
                    f"{row.help} Takes {row.kind.describe(CONTEXT)}.",
                )
                lines.append(
                    "| "
                    + " | ".join(cell.replace("|", "\\|") for cell in cells)
                    + f" | {'yes' if row.reloadable else ''} |"
                )
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"
