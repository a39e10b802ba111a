# SPDX-License-Identifier: GPL-2.0-or-later
"""The program behind `scripts/deb`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tools.bench.harness.system import HarnessError
from tools.deb.build import TOP, build


def main() -> int:
    """Make the package and print its path; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="scripts/deb", description="Make the Debian package for the release this is run on."
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=TOP / "dist",
        metavar="DIR",
        help="where it goes (default: dist)",
    )
    parser.add_argument("--revision", default="1", help="of the package (default: 1)")
    options = parser.parse_args()
    try:
        print(build(options.output, revision=options.revision))
    except HarnessError as error:
        print(f"scripts/deb: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
