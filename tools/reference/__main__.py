# SPDX-License-Identifier: GPL-2.0-or-later
"""The program behind `scripts/reference`: it writes all generated files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tools.reference.completions import bash, zsh
from tools.reference.manuals import zswapctl_8, zswapd_8, zswapd_toml_5
from tools.reference.metrics import metrics_md
from tools.reference.settings import configuration_md
from zswapd.cli import zswapctl, zswapd

if TYPE_CHECKING:
    from collections.abc import Mapping

TOP = Path(__file__).resolve().parent.parent.parent


def files() -> Mapping[str, str]:
    """Return the text of every file by its path in the checkout."""
    found = {
        "docs/configuration.md": configuration_md(),
        "docs/metrics.md": metrics_md(),
        "man/zswapd.8": zswapd_8(),
        "man/zswapctl.8": zswapctl_8(),
        "man/zswapd.toml.5": zswapd_toml_5(),
    }
    for program in (zswapd, zswapctl):
        parser = program.make_parser()
        found[f"completions/{parser.prog}"] = bash(parser)
        found[f"completions/_{parser.prog}"] = zsh(parser)
    return found


def main() -> int:
    """Write every file that is out of date, and print its name."""
    for name, text in files().items():
        path = TOP / name
        path.parent.mkdir(exist_ok=True)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
            print(f"written: {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
