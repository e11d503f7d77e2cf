"""Draw the results of benchmarks, for light and dark pages.

    python benchmarks/pictures.py benchmarks/results/2026-11-25-bench_scaling-cpu-float32.json
    python benchmarks/pictures.py RESULT.json ... --output docs/pictures

Each result gives the pictures that its benchmark can: of bench_encoder and bench_cpu the speed of
every contender by input, and how long one text takes; of bench_scaling a curve for each sweep; of
bench_corpus speed and memory by rows done; of bench_moe and bench_kernels a roofline; of expert_use
a map of languages and experts. Every picture is written twice, NAME-light.svg and NAME-dark.svg,
with machine and date below it. Needs matplotlib (`pip install nomoe[plot]`).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from report import REPOSITORY

Record = dict[str, Any]

# told apart by those who see no red or green too (Okabe and Ito); nomoe's own first
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#F0E442")
_THEMES = {
    "light": {"text": "#1f2328", "grid": "#d0d7de"},
    "dark": {"text": "#e6edf3", "grid": "#3d444d"},
}


class Picture(NamedTuple):
    """A drawing yet to be made."""

    name: str
    title: str
    draw: Callable[[Axes], None]
    size: tuple[float, float] = (7.2, 4.0)


def main(arguments: list[str] | None = None) -> int:
    """Draw; return the exit status."""
    parser = argparse.ArgumentParser(description="Draw the results of benchmarks.")
    parser.add_argument("results", type=Path, nargs="+", help="JSON files of results")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "docs" / "pictures")
    args = parser.parse_args(arguments)
    records = []
    for path in args.results:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            parser.error(f"{path} cannot be read: {error}")
        if not isinstance(record, dict) or not {"benchmark", "machine", "date"} <= record.keys():
            parser.error(f"{path} is not a result of a benchmark")
        records.append((path.stem, record))
    args.output.mkdir(parents=True, exist_ok=True)
    for stem, record in records:
        drawn = list(pictures(record))
        if not drawn:
            print(f"{stem}: {record['benchmark']} has no picture", file=sys.stderr)
        for picture in drawn:
            # without the date, so that a page goes on showing the newest
            name = f"{re.sub(r'^[0-9-]+-', '', stem)}-{picture.name}"
            for theme in _THEMES:
                path = args.output / f"{name}-{theme}.svg"
                write(path, picture, record, theme)
                print(f"wrote {path}", file=sys.stderr)
    return 0


def pictures(record: Record) -> Iterator[Picture]:
    """What can be drawn of a record."""
    cases = record.get("cases", [])
    if record["benchmark"] == "bench_scaling":
        for sweep in dict.fromkeys(case["sweep"] for case in cases):
            yield curve(sweep, [case for case in cases if case["sweep"] == sweep])
    elif record["benchmark"] in ("bench_encoder", "bench_cpu"):
        for kind in ("from ids", "from strings", ""):
            chosen = [case for case in cases if kind_of(case) == kind]
            # one text is a matter of time, several are one of speed
            single = [case for case in chosen if case["title"].startswith("1 ")]
            several = [case for case in chosen if case not in single]
            suffix = f", {kind}" if kind else ""
            name = f"-{kind.replace(' ', '-')}" if kind else ""
            if several:
                yield speeds(f"speed{name}", f"Tokens per second{suffix}", several)
            for place, case in enumerate(single):
                number = f"-{place + 1}" if place else ""
                title = f"Time of a single text{suffix}"
                yield latency(f"latency{name}{number}", title, case)
    elif record["benchmark"] in ("bench_moe", "bench_kernels"):
        rows = [
            row
            for case in cases
            for row in case["contenders"]
            if row.get("gb_per_s") and row["flop"]
        ]
        if rows:
            yield roofline(cases)
    elif record["benchmark"] == "bench_corpus":
        yield growth(record)
    elif record["benchmark"] == "expert_use":
        yield languages(record)


def kind_of(case: Record) -> str:
    """What a case begins with, or nothing where it does not say."""
    _, comma, last = case["title"].rpartition(", ")
    return last if comma and last.startswith("from ") else ""


def contenders(cases: list[Record]) -> list[str]:
    """Names of all that were timed but for the ceilings, nomoe's first."""
    names = dict.fromkeys(
        row["name"] for case in cases for row in case["contenders"] if "deviation" in row
    )
    return sorted(names, key=lambda name: not name.startswith("nomoe"))


def row_of(case: Record, name: str) -> Record | None:
    """A contender's figures in a case, where it ran."""
    return next((row for row in case["contenders"] if row["name"] == name), None)


def speeds(name: str, title: str, cases: list[Record]) -> Picture:
    """Bars by input and contender, longer is faster."""
    names = contenders(cases)

    def draw(axes: Axes) -> None:
        height = 0.8 / len(names)
        first = {one: next(case for case in cases if row_of(case, one)) for one in names}
        for index, contender in enumerate(names):
            for place, case in enumerate(cases):
                row = row_of(case, contender)
                if row is None:
                    continue
                y = place + (index - (len(names) - 1) / 2) * height
                axes.barh(
                    y, row["tokens_per_s"], 0.9 * height, color=colour(index),
                    label=contender if case is first[contender] else None,
                )  # fmt: skip
                axes.annotate(
                    f"{row['tokens_per_s']:,.0f}", (row["tokens_per_s"], y), (3, 0),
                    textcoords="offset points", va="center", fontsize=7,
                )  # fmt: skip
        axes.set_yticks(range(len(cases)), [shorten(case["title"]) for case in cases])
        axes.invert_yaxis()
        axes.set_xlabel("tokens per second (more is better)")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.grid(visible=False, axis="y")
        axes.margins(x=0.12)
        legend(axes)

    return Picture(name, title, draw, (7.2, 1.6 + 0.26 * len(names) * len(cases)))


def latency(name: str, title: str, case: Record) -> Picture:
    """Bars of the median time, with the 20th and 80th percentile."""
    rows = [(one, row) for one in contenders([case]) if (row := row_of(case, one)) is not None]

    def draw(axes: Axes) -> None:
        for place, (_, row) in enumerate(rows):
            low, high = row["median_ms"] - row["p20_ms"], row["p80_ms"] - row["median_ms"]
            axes.barh(
                place, row["median_ms"], 0.6, color=colour(place), xerr=[[low], [high]],
                ecolor=axes.xaxis.label.get_color(), capsize=3,
            )  # fmt: skip
            axes.annotate(
                f"{row['median_ms']:.3g} ms", (row["p80_ms"], place), (5, 0),
                textcoords="offset points", va="center", fontsize=8,
            )  # fmt: skip
        axes.set_yticks(range(len(rows)), [one for one, _ in rows])
        axes.invert_yaxis()
        axes.set_xlabel(f"milliseconds for {case['title'].partition(' (')[0]} (less is better)")
        axes.grid(visible=False, axis="y")
        axes.margins(x=0.15)

    return Picture(name, title, draw, (7.2, 1.4 + 0.4 * len(rows)))


# of each sweep: title, what grows, and whether it doubles from point to point
_SWEEPS = {
    "length": ("Speed by length of the texts", "tokens of each text, as many in all", True),
    "batch": ("Speed by tokens in flight", "tokens of a batch of texts of 128", True),
    "routing": ("Speed by how uneven the routing is", "busiest expert's share of rows", False),
    "experts": ("Speed by number of experts, two to a token", "experts", True),
}


def curve(sweep: str, cases: list[Record]) -> Picture:
    """Lines of tokens per second, with the 20th to 80th percentile shaded."""
    title, grows, doubles = _SWEEPS[sweep]

    def draw(axes: Axes) -> None:
        for index, name in enumerate(contenders(cases)):
            points = [(case["x"], case["tokens"], row_of(case, name)) for case in cases]
            found = [(x, tokens, row) for x, tokens, row in points if row is not None]
            xs = [x for x, _, _ in found]
            axes.plot(
                xs, [row["tokens_per_s"] for _, _, row in found], marker="o", markersize=4,
                color=colour(index), label=name,
            )  # fmt: skip
            fast, slow = (
                [1e3 * tokens / row[which] for _, tokens, row in found]
                for which in ("p20_ms", "p80_ms")
            )
            axes.fill_between(xs, slow, fast, color=colour(index), alpha=0.2, linewidth=0)
        if doubles:
            axes.set_xscale("log", base=2)
            xs = [case["x"] for case in cases]
            axes.set_xticks(xs, [f"{x:,.0f}" for x in xs])
            axes.minorticks_off()
        axes.set_xlabel(grows)
        axes.set_ylabel("tokens per second")
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.set_ylim(bottom=0)
        legend(axes)

    return Picture(sweep, title, draw)


def roofline(cases: list[Record]) -> Picture:
    """Every kernel by its operations to a byte, below what the ceilings of the run allow."""
    # work that counts operations and bytes, nomoe's and others' by kernel; and the ceilings
    dots: dict[str, dict[bool, list[tuple[float, float]]]] = {}
    ceilings = []
    for case in cases:
        kernel = case["title"].partition(",")[0]
        for row in case["contenders"]:
            moved = 1e6 * row.get("gb_per_s", 0) * row["median_ms"]
            if "deviation" not in row:
                # a product's bytes pass slowly: only a copy tells how fast memory is
                speed = 0 if row["tflop_per_s"] else row.get("gb_per_s", 0)
                ceilings.append((row["tflop_per_s"], moved if speed else 0, speed))
            elif moved and row["flop"]:
                ours = dots.setdefault(kernel, {True: [], False: []})[
                    row["name"].startswith("nomoe")
                ]
                ours.append((row["flop"] / moved, row["tflop_per_s"]))

    def draw(axes: Axes) -> None:
        compute = max(speed for speed, _, _ in ceilings)
        # what moves most is read from memory, and not from a cache
        _, memory = max((moved, speed) for _, moved, speed in ceilings)
        intensities = [x for both in dots.values() for some in both.values() for x, _ in some]
        ridge = 1e3 * compute / memory
        low, high = min(*intensities, ridge) / 2, 2 * max(*intensities, ridge)
        axes.plot(
            [low, ridge, high], [low * memory / 1e3, compute, compute], color="#999999",
            label=f"ceilings measured: {compute:.3g} TFLOP/s, {memory:,.0f} GB/s",
        )  # fmt: skip
        for index, (kernel, both) in enumerate(dots.items()):
            for is_ours, some in both.items():
                if some:
                    axes.plot(
                        *zip(*some, strict=True), "o" if is_ours else "x", color=colour(index),
                        label=f"{kernel}, {'nomoe' if is_ours else 'others'}",
                    )  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("operations to a byte")
        axes.set_ylabel("TFLOP/s")
        legend(axes)

    return Picture("roofline", "Kernels and what the machine allows", draw, (7.2, 5.0))


def growth(record: Record) -> Picture:
    """Lines of rows a second, and of memory, by rows done."""
    points = record["one_process"]["curve"]
    rows = [point["rows"] for point in points]

    def draw(axes: Axes) -> None:
        # of the last so many points, lest the writing of a shard show as a dip
        several = max(1, len(points) // 10)
        speeds = [
            (end["rows"] - begin["rows"]) / (end["seconds"] - begin["seconds"])
            for begin, end in zip(points, points[several:], strict=False)
        ]
        axes.plot(rows[several:], speeds, color=colour(0), label="rows per second")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("rows done")
        axes.set_ylabel("rows per second")
        memory = axes.twinx()
        sizes = [point["resident"] / 1e6 for point in points]
        memory.plot(rows, sizes, color=colour(1), linestyle="--", label="memory in RAM, MB")
        # below the other line
        memory.set_ylim(0, 1.6 * max(sizes))
        memory.set_ylabel("MB")
        memory.grid(visible=False)
        memory.spines["right"].set_visible(True)
        for one in (axes.xaxis, axes.yaxis, memory.yaxis):
            one.set_major_formatter("{x:,.0f}")
        legend(axes)

    return Picture("growth", "Speed and memory as a corpus goes by", draw)


def languages(record: Record) -> Picture:
    """Languages down, layers and in each its experts across; darker or brighter has more rows."""
    names, layers = list(record["shares"]), record["layers"]
    shares = [[share for row in record["shares"][name] for share in row] for name in names]
    experts = len(shares[0]) // len(layers)

    def draw(axes: Axes) -> None:
        image = axes.imshow(shares, cmap="viridis", vmin=0, aspect="auto")
        axes.grid(visible=False)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        middles = [(experts - 1) / 2 + experts * place for place in range(len(layers))]
        axes.set_xticks(middles, [f"layer {layer}" for layer in layers])
        for place in range(1, len(layers)):
            axes.axvline(experts * place - 0.5, color="white", linewidth=1.5)
        axes.set_xlabel(f"{experts} experts of each MoE layer; weights: {record['weights']}")
        assert axes.figure is not None
        bar = axes.figure.colorbar(image, ax=axes)
        bar.set_label(f"share of the layer's rows (even: {1 / experts:.1%})")

    size = (7.2, 1.6 + 0.2 * len(names))
    return Picture("languages", "Expert use by language and layer", draw, size)


def colour(index: int) -> str:
    """Of the contender at a place."""
    return _COLOURS[index % len(_COLOURS)]


def shorten(title: str) -> str:
    """A case's title without what every one says."""
    return re.sub(r", from (ids|strings)$|, [\d,]+ when padded", "", title).replace(" (", "\n(")


def legend(axes: Axes) -> None:
    """Above the drawing, where it hides nothing, not even the machine below."""
    figure = axes.figure
    assert isinstance(figure, Figure)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)


def write(path: Path, picture: Picture, record: Record, theme: str) -> None:
    """Draw in the colours of a page, on no background."""
    text, grid = (_THEMES[theme][which] for which in ("text", "grid"))
    settings = {
        "text.color": text, "axes.labelcolor": text, "xtick.color": text, "ytick.color": text,
        "axes.edgecolor": grid, "grid.color": grid, "axes.grid": True, "axes.axisbelow": True,
        "axes.spines.top": False, "axes.spines.right": False, "font.size": 9,
        # text stays text, and the same picture gives the same file
        "svg.fonttype": "none", "svg.hashsalt": picture.name,
    }  # fmt: skip
    with mpl.rc_context(settings):
        figure = Figure(figsize=picture.size, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        picture.draw(axes)
        axes.set_title(picture.title, fontsize=11)
        below = textwrap.fill(f"{record['date']}. {record['machine']}.", 118)
        figure.supxlabel(below, fontsize=6.5, color=text)
        figure.savefig(path, format="svg", transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    sys.exit(main())
