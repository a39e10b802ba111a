# SPDX-License-Identifier: GPL-2.0-or-later
"""The parts of every report: figures that have to hold, tables, plots, the machine."""

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
    """One claim about zswapd, with its measured value.

    Attributes:
        name: the claim in words.
        value: the measured value; None if there is none.
        bound: the bound for the value.
        at_least: whether `bound` is a lower bound.
    """

    name: str
    value: float | None
    bound: float
    at_least: bool

    @property
    def holds(self) -> bool:
        """Whether the value was measured and keeps its bound."""
        if self.value is None:
            return False
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def line(self) -> str:
        """Return the figure as a line of text."""
        shown = "not measured" if self.value is None else f"{self.value:.3f}"
        sign = "≥" if self.at_least else "≤"
        return f"{'holds' if self.holds else 'FAILS'}  {self.name}: {shown} ({sign} {self.bound:g})"


def told(figures: Sequence[Figure]) -> list[dict[str, Any]]:
    """Return claims in the form of a document."""
    return [{**asdict(figure), "holds": figure.holds} for figure in figures]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the interval that contains the true median with a probability of at least 95 %.

    It depends on the ranks of the values alone, so it holds for every distribution. Fewer than six
    values do not reach 95 %; the interval then spans all of them.
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
    """Print a line of progress to standard error."""
    print(line, file=sys.stderr, flush=True)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as a table of text.

    The first column is left-aligned, the others are right-aligned.
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = (
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def machine() -> dict[str, Any]:
    """Return the machine of the figures: kernel, processors, memory, page size, Python."""
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
    """Return matplotlib's pyplot, set up so that equal data gives equal files.

    Raises:
        ImportError: matplotlib is not installed.
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
"""The colours of contenders in every plot; others have matplotlib's own."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One part of a plot.

    Attributes:
        title, unit: the meaning of its heights.
        groups: the names along the horizontal axis.
        heights: by contender, a height for each group; None leaves a gap.
    """

    title: str
    unit: str
    groups: Sequence[str]
    heights: Mapping[str, Sequence[float | None]]


def bars(panels: Sequence[Panel], path: Path, source: str = "") -> None:
    """Draw panels of bars side by side into a file, with the legend in the first."""
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
    """Write a figure into a file, without the date, and close the figure.

    Args:
        figure: a figure of matplotlib.
        path: the path of the file.
        source: the digest of the data; an SVG file contains it.
    """
    from matplotlib import pyplot

    figure.savefig(
        path, metadata={"Date": None, "Source": source or None} if path.suffix == ".svg" else None
    )
    pyplot.close(figure)
