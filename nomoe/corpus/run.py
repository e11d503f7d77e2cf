"""Embedding a corpus on one machine: what `nomoe embed` runs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..backends import BackendName
from ..checkpoint import DEFAULT_REPO
from ..files import check_output
from ..pipeline import progress
from .embedder import Embedder, Precision
from .manifest import (
    Manifest,
    check_folder,
    check_same,
    check_same_input,
    finished_shards,
    locked,
    read_manifest,
    remove_empty,
    remove_unfinished,
)
from .outputs import JsonlOutput, NpyOutput, Output, ParquetOutput
from .plan import OnBad, Plan
from .request import (
    OUTPUT_SUFFIXES,
    Request,
    default_shard_rows,
    describe_origin,
    make_request,
)
from .shards import Progress, embed_shards
from .sources import Source
from .workers import Job, refuse_reentry, run_here, run_processes, threads_of, using_threads

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CorpusReport:
    """What a run did.

    Attributes:
        output: The file or folder.
        rows: Rows of the whole output.
        bad: Rows that were left out, by reason.
        shards: Shards of the whole output; 1 for a file.
        found: Shards that an earlier run had finished.
        embedded: Rows embedded by this run.
        tokens: Their tokens, prompt and special tokens included.
        cut: Of those rows, the ones whose text was longer than `max_seq_length` and was cut.
        seconds: Time from the loading of the model to the last shard.
    """

    output: Path
    rows: int
    bad: dict[str, int]
    shards: int
    found: int
    embedded: int
    tokens: int
    cut: int
    seconds: float


def embed_corpus(
    inputs: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    overwrite: bool = False,
    model: str | Path = DEFAULT_REPO,
    revision: str | None = None,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    backend: BackendName = "auto",
    prompt_name: str | None = "document",
    prompt: str | None = None,
    dim: int | None = None,
    precision: Precision = "float32",
    max_seq_length: int | None = None,
    batch_tokens: int | None = None,
    column: str = "text",
    columns: Sequence[str] | None = None,
    on_bad: OnBad = "fail",
    limit: int | None = None,
    shard_rows: int | None = None,
    workers: int | None = None,
    show_progress_bar: bool | None = None,
    local_files_only: bool = False,
) -> CorpusReport:
    """Embed the texts of files into files, and go on where a run was interrupted.

    Memory is bounded. The input is read once before the model is loaded, to count and check its
    rows. A folder of shards is then written one shard at a time, each under a temporary name until
    it is whole; called again with the same settings, the function skips the shards that are there.
    Each row has its number in the input (`source_row`), the columns that go along, and its vector
    (`embedding`).

    Args:
        inputs: A .parquet, .arrow (.feather, .ipc), .jsonl, .csv (.tsv) or .txt file, a folder, a
            pattern, or a list of those; paths or URIs that pyarrow opens.
        output: A folder (no suffix), or one .parquet, .jsonl or .npy file.
        overwrite: Replace an output file that exists.
        model: A repository's name or a folder, as for `Encoder.from_pretrained`; so also
            `revision`, `dtype`, `backend`, `max_seq_length` and `local_files_only`.
        revision: Branch, tag or commit.
        device: "cpu", "cuda" for every GPU, "cuda:1" for one; None takes the GPUs if there are any.
        dtype: Type of the weights.
        backend: Implementation of the MoE layers.
        prompt_name: Name of the prompt put before each text; None takes the checkpoint's default.
        prompt: The prompt itself, in place of `prompt_name`.
        dim: Features to keep; None keeps all.
        precision: How vectors are stored: as for `Encoder.encode`, or "float16".
        max_seq_length: Longest text in tokens; longer ones are cut.
        batch_tokens: Most tokens of a batch; None takes the device's own, or an earlier run's.
        column: Where the text is.
        columns: Names of the columns that go along; None for all.
        on_bad: "fail" refuses an input with a bad row before the model is loaded, "skip" leaves
            such rows out and counts them.
        limit: Read only so many rows.
        shard_rows: Rows of a shard; None takes 4,096 on a CPU and 32,768 on CUDA, or an earlier
            run's.
        workers: Processes; None takes one for each GPU, and on a CPU one for each eight cores.
        show_progress_bar: None shows a bar on a terminal once the work has taken a while.
        local_files_only: Ask the Hub nothing.

    Returns:
        What was done.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError: Input or checkpoint cannot be had.
        ValueError: An argument is wrong, a row or file is bad, or the folder was begun with other
            settings or another input; the message says which.
        FileExistsError: The output file exists, and `overwrite` is not set.
        ImportError: pyarrow is needed and not installed.
        TypeError: `prompt` is not a str, or `columns` is one.
        RuntimeError: The backend or device cannot run, another run is at work in the folder, a
            process died, the input changed meanwhile, or a script that starts processes has no
            `if __name__ == "__main__":`.
        OSError: The output cannot be written; finished shards stay.
    """
    refuse_reentry()
    request = make_request(
        inputs,
        output,
        model=model,
        revision=revision,
        device=device,
        dtype=dtype,
        backend=backend,
        prompt_name=prompt_name,
        prompt=prompt,
        dim=dim,
        precision=precision,
        max_seq_length=max_seq_length,
        batch_tokens=batch_tokens,
        column=column,
        columns=columns,
        on_bad=on_bad,
        limit=limit,
        shard_rows=shard_rows,
        workers=workers,
        show_progress_bar=show_progress_bar,
        local_files_only=local_files_only,
    )
    check_destination(request, overwrite=overwrite)
    return write_folder(request, _embed) if request.is_folder else _to_file(request)


def check_destination(request: Request, *, overwrite: bool) -> None:
    """Refuse an output that cannot be written, before any work.

    Raises:
        ValueError: `overwrite` is set for a folder, or the folder holds something else.
        FileExistsError, FileNotFoundError, OSError: As `embed_corpus`.
    """
    if not request.is_folder:
        check_output(request.output, OUTPUT_SUFFIXES, overwrite=overwrite)
        return
    if overwrite:
        raise ValueError(f"overwrite is for one file; to begin anew, remove {request.output}")
    check_folder(request.output)


def _to_file(request: Request) -> CorpusReport:
    request = replace(request, shard_rows=request.shard_rows or default_shard_rows(request))
    plan = request.plan()
    settings = request.settings
    size = (settings.stored_dim, settings.stored_dtype)
    output: Output
    if request.output.suffix == ".npy":
        output = NpyOutput(request.output, *size)
    elif request.output.suffix == ".jsonl":
        output = JsonlOutput(request.output, numbered=request.is_numbered)
    else:
        assert plan.schema is not None
        output = ParquetOutput(request.output, plan.schema, *size, {})
    try:
        with counting(request, plan, plan.rows) as count:
            device = request.devices[0]
            with using_threads(device, threads_of([device], 1)):
                if plan.rows:
                    embedder = Embedder(settings, device)
                    shards = range(len(plan.shards))
                    embed_shards(embedder, plan, shards, lambda _: _Uncommitted(output), count)
        output.commit()
    finally:
        # nothing is left of one that was not committed
        output.abort()
    return count.report(request, plan, 1, 0)


class _Uncommitted:
    """An output that goes on after a shard."""

    def __init__(self, output: Output) -> None:
        self.add = output.add
        self.abort = output.abort

    def commit(self) -> None:
        """Leave it open."""


def write_folder(
    request: Request,
    embed: Callable[[Request, Job, list[int], Callable[[Progress], None]], None],
) -> CorpusReport:
    """Write a folder of shards, or what is missing of one.

    Args:
        request: Whose output is a folder.
        embed: Embeds shards of a job, and reports each when it is there.

    Raises:
        As `embed_corpus`.
    """
    folder = request.output
    check_folder(folder)
    is_new = not folder.exists()
    # another run may make it at the same moment
    folder.mkdir(exist_ok=True)
    with locked(folder):
        remove_unfinished(folder)
        try:
            request, manifest = begin(request)
        except BaseException:
            if is_new:
                remove_empty(folder)
            raise
        finished = finished_shards(folder, manifest)
        plan = manifest.plan
        todo = [index for index in range(len(plan.shards)) if index not in finished]
        job = Job(request.settings, manifest, folder)
        rows = sum(plan.shards[index].rows for index in todo)
        with counting(request, plan, rows, len(finished)) as count:
            if not plan.rows:
                # the only shard has no row
                for index in todo:
                    job.open_output(index).commit()
                    count(Progress(0, 0, 0, index))
            elif todo:
                embed(request, job, todo, count)
        manifest.complete(folder)
    return count.report(request, plan, len(plan.shards), len(finished))


def _embed(request: Request, job: Job, todo: list[int], report: Callable[[Progress], None]) -> None:
    threads = threads_of(request.devices, len(job.manifest.plan.shards))
    devices = request.devices[: len(todo)]
    if len(devices) == 1:
        run_here(job, devices[0], todo, report, threads)
    else:
        run_processes(job, devices, todo, report, threads)


def begin(request: Request) -> tuple[Request, Manifest]:
    """Begin an output folder, or go on with one; the caller has locked it.

    Returns:
        The request with what it left open settled, and the manifest, which is in the folder.

    Raises:
        ValueError: The folder was begun with other settings or another input, or the input is bad.
    """
    folder = request.output
    begun = read_manifest(folder)
    request = settle(request, begun)
    described = request.describe()
    if begun is None:
        manifest = Manifest(described, request.plan(), describe_origin(request))
        manifest.write(folder)
        return request, manifest
    check_same(begun, described, folder)
    if _is_untouched(begun.plan, request.sources):
        return request, begun
    plan = request.plan()
    check_same_input(begun.plan, plan, folder)
    # the same rows in files that were moved or copied
    manifest = replace(begun, plan=plan)
    manifest.write(folder)
    return request, manifest


def settle(request: Request, begun: Manifest | None) -> Request:
    """Settle what a request left open, by an earlier run's manifest if there is one."""
    earlier = begun.settings if begun is not None else {}
    shard_rows = request.shard_rows or earlier.get("shard_rows") or default_shard_rows(request)
    settings = request.settings
    if request.batch_tokens is None and "batch_tokens" in earlier:
        settings = replace(settings, batch_tokens=earlier["batch_tokens"])
    return replace(request, shard_rows=shard_rows, settings=settings)


def _is_untouched(plan: Plan, sources: Sequence[Source]) -> bool:
    """Whether the input's files are by name, size and time those that were read for the plan."""
    return [file.source for file in plan.files] == list(sources) and all(
        source.modified for source in sources
    )


class _Count:
    """Adds up progress and shows it."""

    def __init__(self, bar: tqdm[Any]) -> None:
        self._bar = bar
        self._start = time.perf_counter()
        self.rows = self.tokens = self.cut = self.shards = 0
        self.seconds = 0.0

    def __call__(self, progress: Progress) -> None:
        self.rows += progress.rows
        self.tokens += progress.tokens
        self.cut += progress.cut
        self.shards += progress.shard is not None
        self.seconds = time.perf_counter() - self._start
        self._bar.set_postfix_str(f"{self.tokens / self.seconds:,.0f} tokens/s", refresh=False)
        self._bar.update(progress.rows)

    def report(self, request: Request, plan: Plan, shards: int, found: int) -> CorpusReport:
        """Return what was done."""
        if self.cut:
            logger.warning(
                "%d of %d texts were longer than max_seq_length=%d tokens and were cut",
                self.cut,
                self.rows,
                request.settings.max_seq_length,
            )
        return CorpusReport(
            output=request.output,
            rows=plan.rows,
            bad=plan.bad,
            shards=shards,
            found=found,
            embedded=self.rows,
            tokens=self.tokens,
            cut=self.cut,
            seconds=self.seconds,
        )


@contextmanager
def counting(request: Request, plan: Plan, rows: int, found: int | None = None) -> Iterator[_Count]:
    """Show the progress of a run, and say what stays if it ends early.

    Args:
        request: The call.
        plan: Its input.
        rows: Rows that are left to embed.
        found: Shards of a folder that were there already; None for a file, of which nothing stays.
    """
    with progress(request.show_progress_bar, plan.rows, unit="rows") as bar:
        bar.initial = bar.n = plan.rows - rows
        count = _Count(bar)
        try:
            yield count
        finally:
            if found is not None and found + count.shards < len(plan.shards):
                logger.warning(
                    "%d of %d shards in %s are finished and stay; the same command goes on from "
                    "there",
                    found + count.shards,
                    len(plan.shards),
                    request.output,
                )
