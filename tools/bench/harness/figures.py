# SPDX-License-Identifier: GPL-2.0-or-later
"""What every report is made of.

Figures that have to hold, tables, plots, and what they were measured on.
"""

from __future__ import annotations

import math
import mmap
import os
import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.bench.harness.system import page_cluster

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True, slots=True)
class Figure:
    """One claim about zswapd and whether it held.

    Attributes:
        name: the claim, in words.
        value: what was measured; None when it was not.
        bound: what it has to reach, or not to pass.
        at_least: whether `bound` is a lower bound.
    """

    name: str
    value: float | None
    bound: float
    at_least: bool

    @property
    def holds(self) -> bool:
        """Whether it was measured and keeps its bound."""
        if self.value is None:
            return False
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def line(self) -> str:
        """Return it as a line of text."""
        shown = "not measured" if self.value is None else f"{self.value:.3f}"
        sign = "≥" if self.at_least else "≤"
        return f"{'holds' if self.holds else 'FAILS'}  {self.name}: {shown} ({sign} {self.bound:g})"


def told(figures: Sequence[Figure]) -> list[dict[str, Any]]:
    """Return claims as a document has them."""
    return [{**asdict(figure), "holds": figure.holds} for figure in figures]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return what the median of what `values` are drawn from lies between.

    With a probability of 95 % at least.

    By their ranks alone, so whatever the distribution is; fewer than six values do not give that,
    and all of them are returned.
    """
    ordered = sorted(values)
    count, cut, tail = len(ordered), 0, 0.0
    for rank in range(count // 2):
        tail += math.comb(count, rank) / 2**count
        if tail > 0.025:
            break
        cut = rank
    return ordered[cut], ordered[count - 1 - cut]


def progress(line: str) -> None:
    """Tell the user how far it is."""
    print(line, file=sys.stderr, flush=True)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as a table of text.

    The first column to the left, the others to the right.
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = (
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def machine() -> dict[str, Any]:
    """Return what the figures were measured on."""
    model = [
        line
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "kernel": platform.release(),
        "cpus": len(os.sched_getaffinity(0)),
        "cpu": model[0].partition(": ")[2] if model else platform.machine(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE,
        "page_size": mmap.PAGESIZE,
        "page_cluster": page_cluster(),
        "python": platform.python_version(),
    }


def quiet_pyplot() -> Any:
    """Return matplotlib's pyplot, set up to draw into files that are the same for the same data.

    Raises:
        ImportError: it is not installed.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "zswapd"
    from matplotlib import pyplot

    return pyplot


COLOURS = {
    "zswapd": "#c23b2c",
    "zram-lz4": "#2c6fc2",
    "zram-lzo-rle": "#7fa8dc",
    "nbdkit-zstd": "#8a5fb0",
    "loop-ram": "#bbbbbb",
    "file": "#4d8f4d",
    "file-slow": "#222222",
    "none": "#d9b23c",
}
"""Of contenders, the same in every plot; others take matplotlib's own."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One part of a plot.

    Attributes:
        title, unit: what its heights are.
        groups: names along the horizontal axis.
        heights: contender → a height for each group; None leaves a gap.
    """

    title: str
    unit: str
    groups: Sequence[str]
    heights: Mapping[str, Sequence[float | None]]


def bars(panels: Sequence[Panel], path: Path, source: str = "") -> None:
    """Draw panels of bars side by side into a file, as `save` does; the legend stands in the first."""
    pyplot = quiet_pyplot()
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(3.6 * len(panels), 3.4), layout="constrained", squeeze=False
    )
    for axis, panel in zip(axes[0], panels, strict=True):
        width = 0.8 / max(len(panel.heights), 1)
        for place, (name, heights) in enumerate(panel.heights.items()):
            there = [
                (group + place * width, height)
                for group, height in enumerate(heights)
                if height is not None
            ]
            axis.bar(
                [x for x, _ in there],
                [y for _, y in there],
                width * 0.95,
                label=name,
                color=COLOURS.get(name),
            )
        axis.set_title(panel.title, fontsize=9)
        axis.set_ylabel(panel.unit, fontsize=8)
        axis.set_xticks(
            [group + 0.4 - width / 2 for group in range(len(panel.groups))],
            panel.groups,
            fontsize=8,
        )
    axes[0][0].legend(fontsize=7)
    save(figure, path, source)


def save(figure: Any, path: Path, source: str = "") -> None:
    """Write a figure into a file, without the date, and let go of it.

    Args:
        figure: matplotlib's.
        path: of the file.
        source: what it was drawn from, said in the file where that is an SVG.
    """
    from matplotlib import pyplot

    figure.savefig(
        path, metadata={"Date": None, "Source": source or None} if path.suffix == ".svg" else None
    )
    pyplot.close(figure)
