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
from .outputs import JsonlOutput, NpyOutput, Output, ParquetOutput
from .plan import Plan
from .request import Options, Request, default_shard_rows, make_request
from .shards import ShardReader, Window

# texts that are tokenised, from so many places in the input, and for how long a part of them is
# embedded
_SAMPLE_TEXTS = 20_000
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
        tokens_per_s: That speed, of one process here.
        workers: Processes that would run.
        seconds: Time of the run if each were as fast; on a CPU, whose cores they share, as if one
            ran.
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
        yield (
            f"time     {_duration(self.seconds)} ({self.workers} at work, "
            f"{self.tokens_per_s:,.0f} tokens/s measured here over {self.timed_tokens:,} tokens)"
        )


def estimate_corpus(
    inputs: str | Path | Sequence[str | Path], output: str | Path, **options: Unpack[Options]
) -> Estimate:
    """Say what `embed_corpus` would take, without writing anything that stays.

    The input is read and checked as it would be, some texts from all over it are tokenised, and of
    those as many embedded as take some seconds.

    Args:
        inputs: As for `embed_corpus`.
        output: As for `embed_corpus`.
        **options: As for `embed_corpus`.

    Raises:
        As `embed_corpus`.
    """
    request = make_request(inputs, output, **options)
    request = replace(request, shard_rows=request.shard_rows or default_shard_rows(request))
    plan = request.plan()
    sample = _sample(plan)
    texts = [text for window in sample for text in window.texts]
    lengths = [len(ids) for ids in WindowTokenizer(request.settings)(texts).ids]
    timed, rate = _measure(request, texts) if texts else (0, 0.0)
    tokens = sum(lengths)
    if len(texts) < plan.rows:
        # a text that is cut gives its longest, however many bytes it has
        tokens = round(tokens * plan.rows / len(texts))
    is_cpu = request.devices[0] == "cpu"
    speed = rate * (1 if is_cpu else len(request.devices))
    return Estimate(
        rows=plan.rows,
        bad=plan.bad,
        text_bytes=plan.bytes,
        shards=len(plan.shards) if request.is_folder else 1,
        tokens=tokens,
        sampled=len(texts),
        output_bytes=_output_bytes(request, plan, sample),
        timed_tokens=timed,
        tokens_per_s=rate,
        workers=len(request.devices),
        seconds=tokens / speed if speed else 0.0,
    )


def _sample(plan: Plan) -> list[Window]:
    """Read the first rows of shards that lie evenly in the input; all rows of a small one."""
    if not plan.rows:
        return []
    count = min(_SAMPLE_SHARDS, len(plan.shards))
    chosen = sorted({int(place) for place in np.linspace(0, len(plan.shards) - 1, count)})
    each = -(-_SAMPLE_TEXTS // len(chosen))
    reader = ShardReader(plan)
    sample = []
    for shard in chosen:
        left = each
        for window in reader.windows(shard, _SAMPLE_WINDOW_TOKENS):
            sample.append(window)
            left -= len(window.texts)
            if left <= 0:
                break
    return sample


def _measure(request: Request, texts: list[str]) -> tuple[int, float]:
    """Embed texts for some seconds; tokens, and tokens per second."""
    embedder = Embedder(request.settings, request.devices[0])
    # texts of all places in each batch, and the first batch only warms up
    generator = np.random.default_rng(0)
    order = generator.permutation(len(texts)).tolist()
    window = max(1, len(texts) // 50)
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


def _output_bytes(request: Request, plan: Plan, sample: Sequence[Window]) -> int:
    """Size of the output, from that of the sample's rows with vectors that compress as little."""
    settings = request.settings
    rows = sum(len(window.texts) for window in sample)
    if not rows:
        return 0
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(prefix="nomoe-estimate-") as folder:
        path = Path(folder) / f"sample{request.output.suffix or '.parquet'}"
        output: Output
        if path.suffix == ".npy":
            output = NpyOutput(path, settings.stored_dim, settings.stored_dtype)
        elif path.suffix == ".jsonl":
            output = JsonlOutput(path, numbered=False)
        else:
            assert plan.schema is not None
            output = ParquetOutput(
                path, plan.schema, settings.stored_dim, settings.stored_dtype, {}
            )
        for window in sample:
            size = (len(window.texts), settings.stored_dim)
            if settings.stored_dtype.kind == "f":
                vectors = (generator.standard_normal(size) / size[1] ** 0.5).astype(
                    settings.stored_dtype
                )
            else:
                vectors = generator.integers(-128, 128, size).astype(settings.stored_dtype)
            output.add(window.rows, window.columns, vectors)
        output.commit()
        return round(path.stat().st_size * plan.rows / rows)


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
