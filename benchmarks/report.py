"""What a benchmark leaves: a record with everything the figures depend on, as JSON and Markdown."""

from __future__ import annotations

import itertools
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import nomoe
from nomoe.files import atomic_output

if TYPE_CHECKING:
    from harness import Case, Result

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"


def machine_line(device: torch.device) -> str:
    """Describe in one line what a result depends on: hardware, versions, commit."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    capability = torch.backends.cpu.get_cpu_capability()
    parts = [
        f"{_cpu_model()} ({capability}, {cores} cores, threads used: {torch.get_num_threads()})",
        f"{platform.system()} {platform.release().partition('-')[0]} {platform.machine()}",
        f"Python {platform.python_version()}",
        f"torch {torch.__version__}",
        *([f"triton {found}"] if (found := _version("triton")) else []),
        f"nomoe {nomoe.__version__}{_commit()}",
    ]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        memory = properties.total_memory / 2**30
        parts.insert(0, f"{properties.name} ({memory:.0f} GiB, CUDA {torch.version.cuda})")
    if hasattr(os, "getloadavg"):
        # work of others shows here, and falsifies times more than ratios
        parts.append(f"load average {os.getloadavg()[0]:.1f} at the start")
    return ", ".join(parts)


def command_line(arguments: Sequence[str]) -> str:
    """Return the command that repeats this run from the repository's root."""
    script = Path(sys.argv[0]).resolve()
    if script.is_relative_to(REPOSITORY):
        script = script.relative_to(REPOSITORY)
    return shlex.join(["python", script.as_posix(), *arguments])


def make_record(
    benchmark: str,
    date: str,
    cases: Sequence[Mapping[str, Any]],
    *,
    command: str,
    machine: str,
    settings: Mapping[str, Any],
    not_run: Mapping[str, str],
    left_out: Mapping[str, str],
    complete: bool = True,
) -> dict[str, Any]:
    """Gather everything a result file holds; `render` makes it readable.

    Args:
        benchmark: Its name.
        date: When it began.
        cases: What `case_record` returned for each.
        command: What `command_line` returns.
        machine: What `machine_line` returned before the run.
        settings: What else the figures depend on.
        not_run: Contenders that cannot run here and why, by name.
        left_out: Cases that have no figures and why, by title.
        complete: No case is to come.
    """
    return {
        "benchmark": benchmark,
        "date": date,
        "command": command,
        "machine": machine,
        "settings": dict(settings),
        "not_run": dict(not_run),
        "left_out": dict(left_out),
        "complete": complete,
        "cases": list(cases),
    }


def case_record(case: Case, results: list[Result]) -> dict[str, Any]:
    """What a record holds of a case and of what `measure` returned for it."""
    return {
        "title": case.title,
        "tokens": case.tokens,
        "baseline": case.baseline,
        "contenders": _rows(case, results),
    }


def _rows(case: Case, results: list[Result]) -> list[dict[str, Any]]:
    # p20, median, p80
    percentiles = {
        one.contender.name: np.percentile(one.seconds, (20, 50, 80)).tolist() for one in results
    }
    # what the work cannot do without takes at least this long
    floors = {
        one.contender.name: percentiles[one.contender.name][1]
        for one in results
        if one.contender.bound is None
    }
    rows = []
    for contender, deviation, seconds in results:
        p20, median, p80 = percentiles[contender.name]
        floor = floors.get(contender.ceiling or max(floors, key=floors.__getitem__, default=""))
        row: dict[str, Any] = {
            "name": contender.name,
            "tokens_per_s": case.tokens / median,
            "median_ms": 1e3 * median,
            "p20_ms": 1e3 * p20,
            "p80_ms": 1e3 * p80,
            "tflop_per_s": contender.flop / median / 1e12,
            "ratio": percentiles[case.baseline][1] / median,
            **({"gb_per_s": contender.bytes / median / 1e9} if contender.bytes else {}),
            **({"of_ceiling": floor / median} if floor and contender.bound else {}),
            "flop": contender.flop,
            "times_ms": [1e3 * one for one in seconds],
        }
        if deviation is not None and contender.bound is not None:
            row["deviation"] = deviation._asdict()
            row["bound"] = contender.bound._asdict()
        rows.append(row)
    return rows


def render(record: Mapping[str, Any]) -> str:
    """Write a record as Markdown that is readable on a terminal too."""
    settings = ", ".join(f"{name} {value}" for name, value in record["settings"].items())
    lines = [
        *heading(record),
        f"Settings: {settings}.",
        "Ratio: speed relative to the contender at 1.00. TFLOP/s: work on real tokens only. "
        "Of ceiling: the time of the slowest ceiling, or of the one that runs the contender's "
        "dtype where there are several dtypes, over this one's.",
        *(f"Not run: {name}: {_line(reason)}." for name, reason in record["not_run"].items()),
        *(f"**Left out**: {_line(why)}." for why in record["left_out"].values()),
        *([] if record["complete"] else ["**Unfinished**: the run ended before its last case."]),
    ]
    for case in record["cases"]:
        cells = [
            "contender,tokens/s,median ms,p20,p80,TFLOP/s,GB/s,ratio,of ceiling,1 - cosine".split(
                ","
            )
        ]
        for row in case["contenders"]:
            times = (row[f"{which}_ms"] for which in ("median", "p20", "p80"))
            cells.append(
                [
                    row["name"],
                    f"{row['tokens_per_s']:,.0f}",
                    *(f"{one:,.1f}" if one >= 10 else f"{one:.3f}" for one in times),
                    f"{row['tflop_per_s']:.3g}",
                    f"{row['gb_per_s']:,.0f}" if "gb_per_s" in row else "",
                    f"{row['ratio']:.2f}",
                    f"{row['of_ceiling']:.0%}" if "of_ceiling" in row else "",
                    f"{row['deviation']['cosine_distance']:.1e}" if "deviation" in row else "",
                ]
            )
        calls = f", {case['calls']} calls in a run" if "calls" in case else ""
        lines += ["", f"## {case['title']}{calls}", "", *table(cells)]
    return "\n".join(lines) + "\n"


def _line(why: str) -> str:
    """The first line of an error, which may have many, without its stop."""
    return why.strip().partition("\n")[0].rstrip(".")


def heading(record: Mapping[str, Any]) -> list[str]:
    """First lines of a report: what, when, how and where."""
    return [
        f"# {record['benchmark']}, {record['date']}",
        "",
        f"    {record['command']}",
        "",
        f"Machine: {record['machine']}.",
    ]


def result_paths(folder: Path, date: str, stem: str) -> tuple[Path, Path]:
    """Where a record goes, `folder/DATE-stem.json`, and its text, `.md`.

    A number is added to the name where there are such files already: a result is never replaced.
    """
    for count in itertools.count(1):
        name = f"{date}-{stem}" + (f"-{count}" if count > 1 else "")
        paths = folder / f"{name}.json", folder / f"{name}.md"
        if not any(path.exists() for path in paths):
            return paths
    raise AssertionError("unreachable")


def write_results(record: Mapping[str, Any], paths: tuple[Path, Path], text: str) -> None:
    """Write a record as JSON, and its text; each is whole at any time."""
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    for path, content in zip(paths, (json.dumps(record, indent=1) + "\n", text), strict=True):
        with atomic_output(path) as file:
            file.write(content.encode())


def table(cells: list[list[str]]) -> list[str]:
    """Align as a Markdown table: names to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rows = [
        "| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |"
        for row in cells
    ]
    rule = ["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]
    return [rows[0], "|" + "|".join(rule) + "|", *rows[1:]]


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def versions(*packages: str) -> str:
    """Versions of packages, as far as they are installed."""
    found = [f"{package} {one}" for package in packages if (one := _version(package))]
    return " and ".join(found) or "none"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    """Name the checkout's commit, or nothing where there is no checkout or no git."""
    outputs = []
    for arguments in (
        ["rev-parse", "--short", "HEAD"],
        ["status", "--porcelain", "--", "*.py", "kernels"],
    ):
        git = ["git", "-C", str(REPOSITORY), *arguments]
        try:
            done = subprocess.run(git, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return ""
        if done.returncode:
            return ""
        outputs.append(done.stdout.strip())
    commit, changes = outputs
    return f" at {commit}" + (" with changes" if changes else "")
