"""Embed a million short rows with a small model: what the work around it costs, and memory.

    python benchmarks/bench_corpus.py           # a million rows, two layers of width 96
    python benchmarks/bench_corpus.py --smoke   # thousands, in seconds
    python benchmarks/bench_corpus.py --ray     # also on a local cluster, by number of actors

The run is a process of its own, with one CPU thread for the model. The overhead is what it takes
beyond the forwards inside it, timed in the same run: reading, tokenising, batching and writing, as
far as they do not run beside a forward. The vectors are compared with the Encoder's before a figure
is reported. Results go to benchmarks/results/ as dated JSON and Markdown.
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pyarrow as pa
import report
import script
import torch
import workload
from pyarrow import parquet

from nomoe import Encoder, data, embed_corpus, synthetic
from nomoe.engine import Engine

SEED = 0
# rows of which the vectors are compared with the Encoder's, and how far they may be off
CHECKED = 2000
BOUND = harness.Deviation(cosine_distance=1e-10, max_abs=2e-6)
# what the whole may take beyond its forwards, and memory at the end beyond that after a tenth
MOST_OVERHEAD = 0.15
MOST_GROWTH = 0.15
# points of the curve by rows
POINTS = 50


def write_corpus(folder: Path, rows: int) -> None:
    """Write Parquet files of short rows: an id and one to twelve words."""
    folder.mkdir()
    generator = np.random.default_rng(SEED)
    words = np.array(
        " ".join(text for group in data.sentences().values() for text in group).split(),
        dtype=object,
    )
    step = 100_000
    for start in range(0, rows, step):
        count = min(step, rows - start)
        lengths = generator.integers(1, 12, count, endpoint=True)
        drawn = generator.choice(words, int(lengths.sum()))
        texts = [" ".join(part) for part in np.split(drawn, np.cumsum(lengths)[:-1])]
        table = pa.table({"id": np.arange(start, start + count), "text": texts})
        parquet.write_table(table, folder / f"{start:08d}.parquet")


class Meter:
    """Samples rows done and this process's memory, and adds up the time within forwards."""

    def __init__(self) -> None:
        self.forward_s = 0.0
        self.rows = 0
        # when, rows, bytes
        self.samples: list[tuple[float, int, int]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measure a block; the last sample is taken after it."""
        embed, stop = Engine.embed, threading.Event()

        def timed(engine: Engine, ids: Any, lengths: Any, *rest: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            pending = embed(engine, ids, lengths, *rest, **options)
            self.forward_s += time.perf_counter() - begin
            self.rows += len(lengths)
            return pending

        def sample() -> None:
            stopped = False
            while not stopped:
                stopped = stop.wait(0.2)
                self.samples.append((time.perf_counter(), self.rows, resident_bytes()))

        Engine.embed = timed
        sampler = threading.Thread(target=sample, daemon=True)
        sampler.start()
        try:
            yield
        finally:
            Engine.embed = embed
            stop.set()
            sampler.join()


def resident_bytes() -> int:
    """Memory of this process that is in RAM."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def run_alone(inputs: Path, output: Path, options: dict[str, Any], pipe: Any) -> None:
    """Embed in this process, and send what was measured."""
    torch.set_num_threads(1)
    meter = Meter()
    begin, processor = time.perf_counter(), time.process_time()
    with meter.running():
        report = embed_corpus(inputs, output, **options)
        end = time.perf_counter()
    started = end - report.seconds
    curve = [
        next(sample for sample in meter.samples if sample[1] >= report.rows * point / POINTS)
        for point in range(1, POINTS + 1)
    ]
    pipe.send(
        {
            "rows": report.rows,
            "tokens": report.tokens,
            "seconds": end - begin,
            "reading_s": started - begin,
            "forward_s": meter.forward_s,
            "processor_s": time.process_time() - processor,
            "curve": [
                {"seconds": when - started, "rows": rows, "resident": size}
                for when, rows, size in dict.fromkeys(curve)
            ],
            "resident_at_10": curve[POINTS // 10 - 1][2],
            "resident_at_50": curve[POINTS // 2 - 1][2],
            # the last sample may be taken after the model is gone
            "resident_last_tenth": max(
                size for _, rows, size in meter.samples if rows >= 0.9 * report.rows
            ),
            # Linux brings its own peak up to date in batches of pages, after what is resident
            "resident_peak": max(
                resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                *(size for _, _, size in meter.samples),
            ),
        }
    )


def in_process(function: Any, *arguments: Any) -> dict[str, Any]:
    """Call a function in a process that has done nothing else."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=function, args=(*arguments, there))
    process.start()
    there.close()
    try:
        measured: dict[str, Any] = here.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"a run ended with exit code {process.exitcode}") from None
    process.join()
    return measured


def check(inputs: Path, output: Path, model: Path, rows: int) -> harness.Deviation:
    """Compare some vectors with the Encoder's, and every id with the input's.

    Raises:
        DisagreementError: A row is missing, doubled, in another place, or its vector is off.
    """
    table = parquet.read_table(output, columns=["source_row", "id"])
    expected = np.arange(rows)
    for name in table.column_names:
        if not np.array_equal(table[name].to_numpy(), expected):
            raise harness.DisagreementError(f"{output}: column {name} is not 0 to {rows - 1}")
    chosen = np.random.default_rng(1).choice(rows, min(CHECKED, rows), replace=False)
    chosen = pa.array(np.sort(chosen))
    texts = parquet.read_table(inputs, columns=["text"])["text"].take(chosen).to_pylist()
    vectors = parquet.read_table(output, columns=["embedding"])["embedding"].take(chosen)
    found = vectors.combine_chunks().flatten().to_numpy().reshape(len(texts), -1)
    encoder = Encoder.from_pretrained(model, device="cpu")
    return harness.check_agreement(
        str(output),
        torch.from_numpy(found.copy()),
        torch.from_numpy(encoder.encode_document(texts)),
        BOUND,
    )


def run_ray(
    inputs: Path, folder: Path, options: dict[str, Any], actors: tuple[int, ...]
) -> list[dict[str, Any]]:
    """Embed on a local cluster with each number of actors."""
    import ray

    import nomoe.ray

    # nothing here needs as many cores as it is given: the actors share the machine's
    ray.init(num_cpus=2 * max(actors) + 2, num_gpus=0, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = []
    for count in actors:
        output = folder / f"ray{count}"
        begin = time.perf_counter()
        report = nomoe.ray.embed_dataset(inputs, output, actors=count, **options)
        seconds = time.perf_counter() - begin
        rows.append({"actors": count, "seconds": seconds, "rows": report.rows})
    ray.shutdown()
    return rows


def render(record: dict[str, Any]) -> str:
    """Write a record as Markdown."""
    one, model = record["one_process"], record["model"]
    whole, forward, reading = (one[name] for name in ("seconds", "forward_s", "reading_s"))
    overhead = whole - forward
    growth = one["resident_last_tenth"] / one["resident_at_10"] - 1
    cells = [
        ["", "seconds", "share"],
        ["whole run", f"{whole:,.1f}", ""],
        ["forwards", f"{forward:,.1f}", f"{forward / whole:.1%}"],
        ["overhead: all but the forwards", f"{overhead:,.1f}", f"{overhead / whole:.1%}"],
        ["of which reading before the model", f"{reading:,.1f}", f"{reading / whole:.1%}"],
    ]
    memory = [["memory in RAM", "MB"]] + [
        [name, f"{one[key] / 1e6:,.0f}"]
        for name, key in (
            ("after 10 % of the rows", "resident_at_10"),
            ("after half", "resident_at_50"),
            ("at most in the last tenth", "resident_last_tenth"),
            ("at most", "resident_peak"),
        )
    ]
    lines = [
        *report.heading(record),
        f"{one['rows']:,} rows, {one['tokens']:,} tokens, in {record['files']} Parquet files; "
        f"{model}. {one['rows'] / whole:,.0f} rows/s. Vectors off the Encoder's by at most "
        f"{record['max_abs']:.1e} on {record['checked']:,} rows; every id in its place. Load "
        f"average {record['load_at_the_end']:.1f} at the end.",
        "",
        *report.table(cells),
        "",
        f"Overhead {overhead / whole:.1%} (at most {MOST_OVERHEAD:.0%}); memory {growth:+.1%} from "
        f"a tenth to the end (at most {MOST_GROWTH:.0%} either way).",
        "",
        *report.table(memory),
    ]
    if record["ray"]:
        rows = record["ray"][0]["rows"]
        lines += ["", f"Ray on this machine, {rows:,} rows, with the start of the actors:", ""]
        cells = [["actors", "seconds", "rows/s"]]
        for row in record["ray"]:
            speed = f"{rows / row['seconds']:,.0f}"
            cells.append([str(row["actors"]), f"{row['seconds']:,.1f}", speed])
        lines += report.table(cells)
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description="Time and memory of embedding a corpus.")
    parser.add_argument("--smoke", action="store_true", help="few rows, in seconds")
    parser.add_argument("--rows", type=int, help="(default: a million)")
    parser.add_argument("--ray", action="store_true", help="also with 1, 2 and 4 actors of Ray")
    parser.add_argument("--ray-rows", type=int, default=100_000, help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, default=report.RESULTS, help="folder for results")
    args = parser.parse_args(arguments)
    rows = args.rows
    if rows is None:
        rows = 4000 if args.smoke else 1_000_000
    if rows < 1 or args.ray_rows < 1:
        parser.error("rows must be at least 1")
    machine = report.machine_line(torch.device("cpu"))
    scratch = Path(tempfile.mkdtemp(prefix="nomoe-bench-corpus-"))
    try:
        tiny = synthetic.write_checkpoint(scratch / "tiny")
        model = workload.write_shallow(tiny, scratch / "shallow")
        write_corpus(scratch / "in", rows)
        options = {"model": model, "device": "cpu", "workers": 1}
        if args.smoke:
            options["shard_rows"] = 500
        print(f"embedding {rows:,} rows ...", file=sys.stderr)
        one = in_process(run_alone, scratch / "in", scratch / "out", options)
        try:
            deviation = check(scratch / "in", scratch / "out", model, rows)
        except harness.DisagreementError as error:
            print(script.disagreement(error), file=sys.stderr)
            return 1
        on_ray = []
        if args.ray:
            del options["workers"]
            limit = min(rows, 2000 if args.smoke else args.ray_rows)
            options |= {"limit": limit, "shard_rows": max(1, limit // 40)}
            on_ray = run_ray(scratch / "in", scratch, options, (1, 2, 4))
    finally:
        shutil.rmtree(scratch)
    record = {
        "benchmark": "bench_corpus",
        "date": datetime.date.today().isoformat(),
        "command": report.command_line(arguments),
        "machine": machine,
        "model": "2 layers of width 96, random weights, float32, one thread",
        "files": -(-rows // 100_000),
        "one_process": one,
        "load_at_the_end": os.getloadavg()[0],
        "checked": min(CHECKED, rows),
        "max_abs": deviation.max_abs,
        "ray": on_ray,
    }
    script.finish(record, args, "bench_corpus" + ("-ray" if args.ray else ""), render(record))
    overhead = 1 - one["forward_s"] / one["seconds"]
    growth = one["resident_last_tenth"] / one["resident_at_10"] - 1
    missed = [
        *([f"overhead {overhead:.1%}"] if overhead > MOST_OVERHEAD else []),
        *([f"memory {growth:+.1%}"] if abs(growth) > MOST_GROWTH else []),
    ]
    # of fewer rows too large a part is beginning
    if missed and rows >= 1_000_000:
        print(f"over the bound: {', '.join(missed)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
