# SPDX-License-Identifier: GPL-2.0-or-later
"""The program `scripts/bench docs`.

It writes the tables and plots of docs/benchmarks.md from docs/figures/*.json.

    scripts/bench docs          write them
    scripts/bench docs --test   write nothing; exit 1 when they differ from the JSON

A table stands between `<!-- bench: NAME -->` and `<!-- bench: end -->`; only the program writes
there. A plot (docs/NAME.svg) holds the digest of its JSON. The page marks parts that are not
measured yet, and trials.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import textwrap
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from tools.bench.applications import APPLICATIONS, jobs
from tools.bench.harness.figures import Figure, interval, progress
from tools.bench.workloads import density, raw, report, scale, swapoff
from tools.bench.workloads.profile import ORDER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = DOCS / "benchmarks.md"
FIGURES = DOCS / "figures"

Document = dict[str, Any]
_BLOCK = re.compile(r"(<!-- bench: (\w+) -->\n).*?(<!-- bench: end -->)", re.DOTALL)


def load(directory: Path = FIGURES) -> dict[str, Document]:
    """Return the documents in a directory, by their names."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))}


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as a Markdown table; the first row has the headings.

    The first column is left-aligned, the others are right-aligned.
    """
    ruler = ["---", *["---:"] * (len(rows[0]) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ruler, *rows[1:]])


def number(value: float | None) -> str:
    """Return a measured value with three significant digits."""
    if value is None:
        return "-"
    if abs(value) >= 99.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 9.995 else f"{value:.2f}"


def caption(document: Document) -> str:
    """Return a line with the date, commit and machine of a document."""
    machine = document["machine"]
    where = f"Linux {machine['kernel']}, {machine['cpus']} processors ({machine['cpu']})"
    words = f"Taken on {document['date']} at `{document['commit']}`, {where}."
    return (
        f"**A trial of seconds (`--quick`), no measurement.** {words}"
        if document["quick"]
        else words
    )


def _raw(document: Document) -> str:
    names = report.HEADINGS
    rows = [["", *names.values(), "verified"]]
    runs = document["runs"]
    for name, values in document["medians"].items():
        own = [run for run in runs if run["contender"] == name]
        cells = [number(values.get(key)) for key in names]
        rows.append([name, *cells, f"{sum(run['verified'] for run in own)}/{len(own)}"])
    for rival, ratios in document["ratios"].items():
        if ratios:
            cells = [f"{median(ratios[key]):.2f}" if key in ratios else "-" for key in names]
            rows.append([f"zswapd ÷ {rival}", *cells, ""])
    lost = [
        f"{run['contender']} in round {run['round'] + 1}: {run['error'].splitlines()[0]}"
        for run in runs
        if run["error"]
    ]
    killed = {
        name: sum(run.get("kills", 0) for run in runs if run["contender"] == name)
        for name in document["medians"]
    }
    again = [f"{name} {times} time{'s' * (times > 1)}" for name, times in killed.items() if times]
    notes = [f"Without figures: {'; '.join(lost)}."] * bool(lost)
    notes += [f"Made again, since the kernel had killed the workload: {', '.join(again)}."] * bool(
        again
    )
    return "\n\n".join([markdown(rows), *notes])


def _application(document: Document) -> str:
    columns = APPLICATIONS[document["workload"]]().columns
    first = next(iter(columns))
    tables = []
    for level, medians in document["medians"].items():
        runs = [run for run in document["runs"] if run["level"] == level]
        rows = [
            [
                level,
                *(column.heading for column in columns.values()),
                "zswapd ÷ it",
                "memory MiB",
                "verified",
            ]
        ]
        for name in dict.fromkeys(run["contender"] for run in runs):
            own = [run for run in runs if run["contender"] == name]
            values = medians.get(name, {})
            cells = [_bound(values.get(key), own, columns[key].more_is_better) for key in columns]
            ratios = document["ratios"][level].get(name, {}).get(first, [])
            done = sum(not run["error"] and not run["cut"] for run in own)
            rows.append(
                [
                    name,
                    *cells,
                    _ratio(ratios),
                    number(values.get("memory_mib") or None),
                    f"{done}/{len(own)}",
                ]
            )
        tables.append(markdown(rows))
    return "\n\n".join(tables)


def _bound(value: float | None, runs: Sequence[Mapping[str, Any]], more_is_better: bool) -> str:  # noqa: FBT001
    sign = ("<" if more_is_better else ">") if any(run["cut"] for run in runs) else ""
    return "-" if value is None else sign + number(value)


def _ratio(values: Sequence[float]) -> str:
    if len(values) < 6:
        return f"{median(values):.2f}" if values else "-"
    return "{:.3f} ({:.3f} to {:.3f})".format(median(values), *interval(values))


def _scale(document: Document) -> str:
    rows = [["pages", *scale.COLUMNS.values()]]
    rows += [
        [f"2^{one['pages'].bit_length() - 1}", *(f"{one[key]:.2f}" for key in scale.COLUMNS)]
        for one in document["measurements"]
    ]
    return markdown(rows)


def _swapoff(document: Document) -> str:
    rows = [["device, MiB", "contender", "in use", "swapoff, s", "MiB/s", "verified"]]
    for one in document["measurements"]:
        fine = "no" if one["error"] or one["wrong_pages"] else "yes"
        cells = (
            [f"{one['used'] * 100:.1f} %", f"{one['seconds']:.2f}", number(one["rate"])]
            if not one["error"]
            else ["-"] * 3
        )
        rows.append([str(one["size_mib"]), one["contender"], *cells, fine])
    return markdown(rows)


def _shrink(document: Document) -> str:
    rows = [
        [
            "cache on",
            "shrinks",
            "MiB",
            "pages",
            "90 % back, s",
            "batch, ms",
            "reads before, ms",
            "meanwhile, ms",
        ]
    ]
    for one in document["runs"]:
        reads = [
            " / ".join(f"{value:.2f}" for value in one[key]) for key in ("before_ms", "during_ms")
        ]
        cells = [
            f"{one['cached_mib']:.0f}",
            str(one["pages"]),
            f"{one['back_s']:.2f}",
            f"{one['batch_ms']:.2f}",
        ]
        rows.append([one["allocator"], f"by {one['by']}", *cells, *reads])
    return markdown(rows) + "\n\nReads of swap: median / 99 % / slowest. Batch: the longest."


def _cache(document: Document) -> str:
    rows = [
        [
            "contents",
            "order",
            "from the device, s",
            "from the volume, s",
            "faster",
            "slowest pass",
            "in the page cache",
        ]
    ]
    volumes = [one for one in document["measurements"] if one["place"] == "volume"]
    devices = {one["order"]: one for one in document["measurements"] if one["place"] == "device"}
    for volume in volumes:
        device = devices[volume["order"]]
        times = [
            f"{device['median_s'] / seconds:.1f} times"
            for seconds in (volume["median_s"], max(volume["again_s"]))
        ]
        share = max(device["page_cache"], volume["page_cache"])
        shown = [f"{one['median_s']:.3f}" for one in (device, volume)]
        rows.append([volume["contents"], volume["order"], *shown, *times, f"{share * 100:.0f} %"])
    return markdown(rows)


def _density(document: Document) -> str:
    return density.table([density.Measurement(**one) for one in document["measurements"]])


def _profile(document: Document) -> str:
    rows = [["phase", "program", "MiB/s", "µs a page", *ORDER]]
    for one in sorted(document["profiles"], key=lambda one: one["phase"], reverse=True):
        parts = [f"{one['shares'][part] * one['cpu_us'] / 100:.2f}" for part in ORDER]
        rows.append(
            [one["phase"], one["label"], number(one["rate"]), f"{one['cpu_us']:.2f}", *parts]
        )
    busiest = []
    for one in document["profiles"]:
        functions = ", ".join(
            f"`{name}` {percent:.1f} %" for name, _thing, percent in one["busiest"]
        )
        line = f"- {one['phase']}, {one['label']}: {functions}"
        busiest.append(textwrap.fill(line, 100, subsequent_indent="  ", break_on_hyphens=False))
    return markdown(rows) + "\n\nThe busiest functions:\n\n" + "\n".join(busiest)


def _check(documents: Mapping[str, Document]) -> str:
    rows = [["what has to hold", "asked", "measured", "", "lacking"]]
    for document in (documents[name] for name in TABLES if name in documents):
        for told in document["figures"]:
            one = Figure(told["name"], told["value"], told["bound"], told["at_least"])
            asked = f"at {'least' if one.at_least else 'most'} {one.bound:g}"
            lacking = "" if one.holds or not one.value else _lacking(one)
            shown = "not measured" if one.value is None else f"{one.value:.3g}"
            trial = " (trial)" if document["quick"] else ""
            rows.append(
                [one.name, asked, shown + trial, "holds" if one.holds else "**no**", lacking]
            )
    return markdown(rows)


def _lacking(figure: Figure) -> str:
    assert figure.value
    if not figure.bound:
        return f"{figure.value:g}"
    share = figure.bound / figure.value - 1 if figure.at_least else figure.value / figure.bound - 1
    return f"{share * 100:.0f} %"


TABLES: dict[str, Callable[[Document], str]] = {
    "raw": _raw,
    **dict.fromkeys(APPLICATIONS, _application),
    "scale": _scale,
    "swapoff": _swapoff,
    "shrink": _shrink,
    "cache": _cache,
    "density": _density,
    "profile": _profile,
}
"""The function for each table, by the name of the document, which is also the block's name."""


def _block(name: str, documents: Mapping[str, Document]) -> str:
    if name == "check":
        return _check(documents) if documents else _missing("all")
    if name not in documents:
        return _missing(name)
    picture = f"\n\n![{name}]({name}.svg)" if name in PLOTS else ""
    return f"{TABLES[name](documents[name])}{picture}\n\n{caption(documents[name])}"


def _missing(name: str) -> str:
    return f"*Not measured yet: `scripts/bench all{'' if name == 'all' else f' --parts {name}'}`.*"


def render(text: str, documents: Mapping[str, Document]) -> str:
    """Return the page with every block written from the documents.

    Raises:
        KeyError: a block has a name that no document has.
    """
    unknown = [found[2] for found in _BLOCK.finditer(text) if found[2] not in {*TABLES, "check"}]
    if unknown:
        raise KeyError(f"no table is called {unknown[0]}")
    return _BLOCK.sub(
        lambda found: f"{found[1]}\n{_block(found[2], documents)}\n\n{found[3]}", text
    )


def digest(document: Document) -> str:
    """Return the digest of a document, which its plot holds."""
    return "sha256 " + hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _plot_application(document: Document, path: Path, source: str) -> None:
    jobs.plot(APPLICATIONS[document["workload"]](), document["medians"], path, source)


def _plot_raw(document: Document, path: Path, source: str) -> None:
    raw.plot(document["medians"], path, source)


def _plot_scale(document: Document, path: Path, source: str) -> None:
    scale.plot([scale.Measurement(**one) for one in document["measurements"]], path, source)


def _plot_density(document: Document, path: Path, source: str) -> None:
    density.plot([density.Measurement(**one) for one in document["measurements"]], path, source)


def _plot_swapoff(document: Document, path: Path, source: str) -> None:
    swapoff.plot(document["measurements"], path, source)


PLOTS: dict[str, Callable[[Document, Path, str], None]] = {
    "raw": _plot_raw,
    "compile": _plot_application,
    "scale": _plot_scale,
    "density": _plot_density,
    "swapoff": _plot_swapoff,
}


def stale(documents: Mapping[str, Document], docs: Path = DOCS) -> Iterator[str]:
    """Yield the name of each file, page or plot, that differs from the documents."""
    text = (docs / "benchmarks.md").read_text()
    if render(text, documents) != text:
        yield "benchmarks.md"
    for name in PLOTS:
        path = docs / f"{name}.svg"
        if name in documents and (
            not path.exists() or digest(documents[name]) not in path.read_text()
        ):
            yield path.name


def write(docs: Path = DOCS) -> None:
    """Write the page and the plots that differ from the documents."""
    documents = load(docs / "figures")
    page = docs / "benchmarks.md"
    page.write_text(render(page.read_text(), documents))
    for name in list(stale(documents, docs)):
        progress(f"drawing {name}")
        stem = Path(name).stem
        PLOTS[stem](documents[stem], docs / name, digest(documents[stem]))


def main(argv: Sequence[str]) -> int:
    """Write or compare the files; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench docs", description="Writes docs/benchmarks.md from docs/figures."
    )
    parser.add_argument(
        "--test",
        action="store_true",
        help="write nothing; exit 1 when a file differs from the figures",
    )
    args = parser.parse_args(argv)
    if not args.test:
        write()
        return 0
    found = list(stale(load()))
    for name in found:
        progress(f"docs/{name} differs from docs/figures: run scripts/bench docs")
    return 1 if found else 0
