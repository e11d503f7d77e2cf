"""A call of `embed_corpus`, checked before the input is read and the model loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch

from .. import __version__
from ..arguments import check_count
from ..backends import BackendName
from ..checkpoint import DEFAULT_REPO, NEEDED_FILES, find_weights
from ..pipeline import progress
from .embedder import ModelSettings, Precision, WindowTokenizer, resolve_settings
from .plan import OnBad, OutputForm, Plan, check_on_bad, is_numbered, make_plan
from .sources import Source, find_sources, require_pyarrow, resolved, takes_in
from .workers import choose_devices

OUTPUT_SUFFIXES = (".npy", ".jsonl", ".parquet")
# Rows of a shard: what an interruption can cost one process, and the last batches of a shard run
# less full. Some minutes on a CPU and seconds on a large GPU, at a hundred tokens a row.
SHARD_ROWS = {"cpu": 4096, "cuda": 32_768}


class ModelOptions(TypedDict, total=False):
    """Keywords of `resolve_settings`."""

    revision: str | None
    device: str | None
    dtype: str | torch.dtype | None
    backend: BackendName
    prompt_name: str | None
    prompt: str | None
    dim: int | None
    precision: Precision
    max_seq_length: int | None
    batch_tokens: int | None
    local_files_only: bool


class Options(ModelOptions, total=False):
    """Keywords of `embed_corpus`, where they are explained."""

    model: str | Path
    column: str
    columns: Sequence[str] | None
    on_bad: OnBad
    limit: int | None
    shard_rows: int | None
    workers: int | None
    show_progress_bar: bool | None


@dataclass(frozen=True)
class Request:
    """A checked call, whose model is not loaded yet."""

    sources: list[Source]
    output: Path
    settings: ModelSettings
    devices: list[str]
    # how the checkpoint was named
    model: str
    column: str
    columns: tuple[str, ...] | None
    on_bad: OnBad
    limit: int | None
    # None for the default, or what an earlier run took
    shard_rows: int | None
    batch_tokens: int | None
    show_progress_bar: bool | None

    @property
    def form(self) -> OutputForm:
        """What is written."""
        forms: dict[str, OutputForm] = {".npy": "npy", ".jsonl": "jsonl"}
        return forms.get(self.output.suffix, "parquet")

    @property
    def is_numbered(self) -> bool:
        """Whether each row's number is written."""
        return is_numbered(self.form, self.on_bad)

    @property
    def is_folder(self) -> bool:
        """Whether the output is a folder of shards."""
        return not self.output.suffix

    def describe(self) -> dict[str, Any]:
        """Return all that decides the output but the input itself."""
        return {
            "version": __version__,
            **_file_hashes(self.settings.folder),
            **self.settings.describe(),
            "column": self.column,
            "columns": None if self.columns is None else list(self.columns),
            "on_bad": self.on_bad,
            "limit": self.limit,
            "shard_rows": self.shard_rows,
        }

    def plan(self) -> Plan:
        """Read the input once; see `make_plan`."""
        assert self.shard_rows is not None
        with progress(self.show_progress_bar, None, unit="rows", what="reading") as bar:
            return make_plan(
                self.sources,
                self.column,
                columns=self.columns,
                on_bad=self.on_bad,
                limit=self.limit,
                shard_rows=self.shard_rows,
                form=self.form,
                seen=bar.update,
            )


def make_request(
    inputs: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
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
) -> Request:
    """Check a call of `embed_corpus`, reading no more than names and small files.

    Raises:
        As `embed_corpus`.
    """
    check_on_bad(on_bad)
    limit = None if limit is None else check_count("limit", limit)
    shard_rows = None if shard_rows is None else check_count("shard_rows", shard_rows)
    if isinstance(columns, str):
        raise TypeError("columns is a str, expected a list of column names")
    if columns is None and Path(output).suffix == ".npy":
        # it has room for none
        columns = ()
    columns = None if columns is None else tuple(columns)
    output = Path(output).expanduser()
    if output.suffix and output.suffix not in OUTPUT_SUFFIXES:
        raise ValueError(
            f"{output} has suffix {output.suffix!r}, expected {', '.join(OUTPUT_SUFFIXES)}, or "
            "none for a folder of shards"
        )
    if output.suffix == ".npy" and on_bad == "skip":
        raise ValueError(
            "a .npy file has no room for row numbers, so rows left out would shift the others: "
            "write .parquet, .jsonl or a folder, or take on_bad='fail'"
        )
    if output.suffix and (workers or 1) > 1:
        raise ValueError(
            f"{output} is one file, which one process writes; several workers need a folder"
        )
    if output.suffix in ("", ".parquet"):
        require_pyarrow("writing Parquet")
    sources = find_sources(inputs)
    _check_apart(inputs, sources, output)
    devices = choose_devices(device, workers)
    settings = resolve_settings(
        model,
        revision=revision,
        device=devices[0],
        dtype=dtype,
        backend=backend,
        prompt_name=prompt_name,
        prompt=prompt,
        max_seq_length=max_seq_length,
        dim=dim,
        precision=precision,
        batch_tokens=batch_tokens,
        local_files_only=local_files_only,
    )
    find_weights(settings.folder)
    # it is small beside them, and a run that it ends would have read its input in vain
    WindowTokenizer(settings)
    return Request(
        sources=sources,
        output=output,
        settings=settings,
        devices=devices,
        model=str(model),
        column=column,
        columns=columns,
        on_bad=on_bad,
        limit=limit,
        shard_rows=shard_rows,
        # checked, and None where it was not given
        batch_tokens=None if batch_tokens is None else settings.batch_tokens,
        show_progress_bar=show_progress_bar,
    )


def _check_apart(
    inputs: str | Path | Sequence[str | Path], sources: Sequence[Source], output: Path
) -> None:
    """Refuse an output that is input, or that the next run would take for input."""
    target = output.resolve()
    for source in sources:
        path = Path(resolved(source.path))
        if path == target:
            raise ValueError(f"the output {output} is an input file")
        if target in path.parents:
            raise ValueError(f"{source.path} is in the output folder {output}")
    for one in [inputs] if isinstance(inputs, str | Path) else inputs:
        if takes_in(str(one), target if output.suffix else target / "part-000000.parquet"):
            raise ValueError(
                f"the output {output} is inside the input {one}, and would be input of the next "
                "run; write it elsewhere"
            )


def default_shard_rows(request: Request) -> int:
    """Return the rows of a shard where the call does not say."""
    return SHARD_ROWS["cuda" if request.devices[0].startswith("cuda") else "cpu"]


def describe_origin(request: Request) -> dict[str, Any]:
    """Return what a reader of the output wants to know and what decides nothing."""
    folder = request.settings.folder
    return {
        "model": request.model,
        # a folder of the Hub's cache has the commit for its name
        "revision": folder.name if folder.parent.name == "snapshots" else None,
        "torch": torch.__version__,
        "devices": request.devices,
    }


def _file_hashes(folder: Path) -> dict[str, str]:
    """Hash every file of a checkpoint that is read."""
    paths = {path for pattern in NEEDED_FILES for path in folder.glob(pattern)}
    hashes = {}
    for path in sorted(paths):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        hashes[f"sha256 of {path.relative_to(folder).as_posix()}"] = digest
    return hashes
