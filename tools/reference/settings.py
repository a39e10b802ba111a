# SPDX-License-Identifier: GPL-2.0-or-later
"""The generator of docs/configuration.md, from the table in zswapd/config/table.py."""

from __future__ import annotations

from tools.reference.manuals import CONTEXT
from zswapd.config.kinds import shown
from zswapd.config.table import sections

_INTRODUCTION = """\
<!-- Written by scripts/reference from zswapd/config/table.py. -->
# Settings

Settings come from these places, and later ones win:

1. the defaults below;
2. `/etc/zswapd/zswapd.toml`, or the file of `--config`;
3. the drop-ins `<file>.d/*.toml`, in the order of their names;
4. the command line (`--set SECTION.KEY=VALUE`).

A file whose name begins with a dot is not a drop-in, because editors leave files with those names.
A link to `/dev/null` counts as an empty file. The files are UTF-8; a byte order mark is ignored.
`zswapctl` reads `control.socket` from the same files. It needs `--socket` only for a daemon that
was started with `--config` or `--set control.socket=…`.

```sh
zswapd config defaults      # print a file with every setting, to begin with
zswapd config check         # check the files, name errors by line; --config FILE checks another
zswapd config show          # print each setting and its origin, as `zswapd run` would find it
zswapctl get                # print the settings of the running daemon
zswapctl set pool.limit=2G  # change settings at run time, all that are named or none
zswapctl reset pool.limit   # go back to the configured value; --all for every setting
```

A size is a number of bytes, or has a unit: `K`, `M`, `G`, `T` (each 1024 of the one before), or `%`
of memory. `min(50%, 4G)` and `max(…)` choose among several sizes. Memory is the machine's memory,
or the lowest limit of a memory cgroup above the daemon, at its start. A start and `zswapd config
check` refuse settings that take more memory than there is. Defaults that depend on the page size
are those of 4 KiB pages.

A value set at run time wins over the files until a reset or a stop of the daemon; `systemctl
restart` is a stop too. Takeovers, upgrades and reloads keep the value, and so does a start that
adopts the swap of a dead daemon.

`systemctl reload`, `zswapctl upgrade` and SIGHUP read the files again. The new settings apply as a
whole, or not at all if anything in them is not right. The stored pages depend on these settings:
`fuse.mountpoint`, `control.socket`, `swap.size`, sizes of `swap.files`, `pool.allocator`,
`pool.max_zspage_frames`, `backing.path`, `backing.encrypt`. To change one, run swapoff and restart.
"""


def configuration_md() -> str:
    """Return the text of docs/configuration.md."""
    lines = [_INTRODUCTION]
    for section, cls, rows in sections():
        what = (cls.__doc__ or "").partition(": ")[2]
        lines += [
            f"## [{section}]",
            "",
            what[:1].upper() + what[1:],
            "",
            "| key | default | takes | at run time |",
            "|---|---|---|---|",
        ]
        for row in rows:
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
