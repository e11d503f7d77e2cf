"""What a run would take: `nomoe embed --dry-run`."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Unpack

import numpy as np

from .embedder import Embedder, WindowTokenizer
from .manifest import check_same, check_same_input, finished_shards, read_manifest
from .outputs import JsonlOutput, NpyOutput, Output, ParquetOutput
from .plan import Plan
from .request import Options, Request, make_request
from .run import check_destination, settle
from .shards import ShardReader, Window
from .workers import threads_of, using_threads

# most texts that are tokenised and about the most bytes of them (a few seconds of a core), from so
# many places in the input, and for how long a part of them is embedded
_SAMPLE_TEXTS = 20_000
_SAMPLE_BYTES = 8 << 20
_SAMPLE_SHARDS = 50
_SAMPLE_SECONDS = 5.0
# small windows, lest a sample take in more than it should
_SAMPLE_WINDOW_TOKENS = 256


@dataclass(frozen=True)
class Estimate:
    """What a run would take.

    Attributes:
        rows: Rows that would be embedded; counted.
        bad: Rows that would be left out, by reason; counted.
        text_bytes: Bytes of their texts; counted.
        shards: Files that would be written; counted.
        tokens: Tokens, prompt and special tokens included, after the cut.
        sampled: Texts that were tokenised; where these are all, `tokens` is counted.
        output_bytes: Size of the output, from rows of the sample written to a temporary file.
        timed_tokens: Tokens that were embedded to measure the speed.
        tokens_per_s: That speed, of one process here; on a CPU with its share of the cores.
        workers: Processes that would run.
        left: Rows that no earlier run into the folder has embedded; counted.
        seconds: Time of the run for those rows if each were as fast.
    """

    rows: int
    bad: dict[str, int]
    text_bytes: int
    shards: int
    tokens: int
    sampled: int
    output_bytes: int
    timed_tokens: int
    tokens_per_s: float
    workers: int
    left: int
    seconds: float

    def lines(self) -> Iterator[str]:
        """Say it, and what each figure is based on."""
        left_out = f"; {_list(self.bad)} would be left out" if self.bad else ""
        yield f"rows     {self.rows:,}, {self.text_bytes:,} bytes of text (counted){left_out}"
        basis = (
            "counted"
            if self.sampled == self.rows
            else f"estimated from {self.sampled:,} texts from all over the input"
        )
        yield f"tokens   {self.tokens:,} ({basis})"
        if not self.rows:
            return
        yield (
            f"output   {_size(self.output_bytes)} in {self.shards:,} files (estimated from rows "
            "written here)"
        )
        if not self.left:
            yield "time     none: an earlier run has embedded every row"
            return
        yield (
            f"time     {_duration(self.seconds)} ("
            + (f"for {self.left:,} rows that are left, " if self.left < self.rows else "")
            + f"{self.workers} at work, "
            f"{self.tokens_per_s:,.0f} tokens/s measured here over {self.timed_tokens:,} tokens)"
        )


def estimate_corpus(
    inputs: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    overwrite: bool = False,
    **options: Unpack[Options],
) -> Estimate:
    """Say what `embed_corpus` would take, without writing anything that stays.

    The input is read and checked as it would be, some texts from all over it are tokenised, and of
    those as many embedded as take some seconds.

    Args:
        inputs: As for `embed_corpus`.
        output: As for `embed_corpus`, and refused where that would be, but for a run at work in it.
        overwrite: As for `embed_corpus`.
        **options: As for `embed_corpus`.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError: Input or checkpoint cannot be had.
        ValueError: An argument is wrong, a row or file is bad, or the folder was begun with other
            settings or another input.
        FileExistsError: The output file exists, and `overwrite` is not set.
        ImportError: pyarrow is needed and not installed.
        RuntimeError: The backend or device cannot run, or the input changed meanwhile.
        OSError: The output cannot be written.
    """
    request = make_request(inputs, output, **options)
    check_destination(request, overwrite=overwrite)
    begun = read_manifest(request.output) if request.is_folder else None
    request = settle(request, begun)
    if begun is not None:
        check_same(begun, request.describe(), request.output)
    plan = request.plan()
    left = plan.rows
    files = len(plan.shards) if request.is_folder else 1
    workers = min(len(request.devices), files)
    if begun is not None:
        check_same_input(begun.plan, plan, request.output)
        finished = finished_shards(request.output, replace(begun, plan=plan))
        left -= sum(plan.shards[index].rows for index in finished)
        workers = min(workers, max(1, files - len(finished)))
    texts, output_bytes = _write_sample(request, plan)
    lengths = [len(ids) for ids in WindowTokenizer(request.settings)(texts).ids]
    tokens = sum(lengths)
    timed, rate = 0, 0.0
    if left:
        with using_threads(request.devices[0], threads_of(request.devices, files)):
            timed, rate = _measure(request, texts, tokens)
    if len(texts) < plan.rows:
        # a text that is cut gives its longest, however many bytes it has
        tokens = round(tokens * plan.rows / len(texts))
    speed = rate * workers
    return Estimate(
        rows=plan.rows,
        bad=plan.bad,
        text_bytes=plan.bytes,
        shards=files,
        tokens=tokens,
        sampled=len(texts),
        output_bytes=output_bytes,
        timed_tokens=timed,
        tokens_per_s=rate,
        workers=workers,
        left=left,
        seconds=tokens * left / plan.rows / speed if left else 0.0,
    )


def _sample(plan: Plan) -> Iterator[Window]:
    """Read the first rows of shards that lie evenly in the input; all rows of a small one."""
    # as many of each shard, decided before any is read, lest long texts count for less
    most = min(_SAMPLE_TEXTS, max(1, _SAMPLE_BYTES * plan.rows // max(1, plan.bytes)))
    count = min(_SAMPLE_SHARDS, len(plan.shards), most)
    chosen = sorted({int(place) for place in np.linspace(0, len(plan.shards) - 1, count)})
    each = -(-most // len(chosen))
    reader = ShardReader(plan)
    for shard in chosen:
        left = each
        for window in reader.windows(shard, _SAMPLE_WINDOW_TOKENS):
            yield window
            left -= len(window.texts)
            if left <= 0:
                break


def _measure(request: Request, texts: list[str], tokens_of_all: int) -> tuple[int, float]:
    """Embed texts for some seconds; tokens, and tokens per second."""
    embedder = Embedder(request.settings, request.devices[0])
    # texts of all places in each window, and the first only warms up; a window of more than a
    # batch would run long past the end on a CPU
    generator = np.random.default_rng(0)
    order = generator.permutation(len(texts)).tolist()
    batch = request.settings.batch_tokens * len(texts) // max(1, tokens_of_all)
    window = max(1, min(len(texts) // 2, batch))
    tokens: list[int] = []
    windows = (
        [texts[position] for position in order[start : start + window]]
        for start in range(0, len(texts), window)
    )
    running = embedder.embed_texts(windows, lambda one: tokens.append(sum(map(len, one.ids))))
    begun = time.perf_counter()
    next(running)
    start, first = time.perf_counter(), tokens[0]
    for _ in running:
        if time.perf_counter() - start > _SAMPLE_SECONDS:
            break
    if len(tokens) == 1:
        return first, first / (start - begun)
    return sum(tokens) - first, (sum(tokens) - first) / (time.perf_counter() - start)


def _write_sample(request: Request, plan: Plan) -> tuple[list[str], int]:
    """Write a sample with vectors that compress as little; its columns are not held.

    Returns:
        The texts of the sample, and the size of the whole output by its size.
    """
    settings = request.settings
    texts: list[str] = []
    if not plan.rows:
        return texts, 0
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(prefix="nomoe-estimate-") as folder:
        path = Path(folder) / f"sample{request.output.suffix or '.parquet'}"
        output: Output
        if path.suffix == ".npy":
            output = NpyOutput(path, settings.stored_dim, settings.stored_dtype)
        elif path.suffix == ".jsonl":
            output = JsonlOutput(path, numbered=request.is_numbered)
        else:
            assert plan.schema is not None
            output = ParquetOutput(
                path, plan.schema, settings.stored_dim, settings.stored_dtype, {}
            )
        for window in _sample(plan):
            texts += window.texts
            size = (len(window.texts), settings.stored_dim)
            if settings.stored_dtype.kind == "f":
                vectors = (generator.standard_normal(size) / size[1] ** 0.5).astype(
                    settings.stored_dtype
                )
            else:
                vectors = generator.integers(-128, 128, size).astype(settings.stored_dtype)
            output.add(window.rows, window.columns, vectors)
        output.commit()
        return texts, round(path.stat().st_size * plan.rows / len(texts))


def _list(bad: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in bad.items())


def _size(count: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:,.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:,.0f} min"
    return f"{seconds / 3600:,.1f} h"
