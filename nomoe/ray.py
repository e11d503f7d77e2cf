"""Corpora on a cluster, with Ray Data (`pip install 'nomoe[ray]'`).

`embed_dataset` embeds files into a folder of shards, the same as `nomoe.embed_corpus` writes on one
machine and with the same manifest, so that either goes on where the other stopped. `EmbedBatch` and
`TokenizeBatch` are for `Dataset.map_batches` in a pipeline of one's own:

    dataset.map_batches(
        nomoe.ray.EmbedBatch,
        fn_constructor_kwargs={"model": "/shared/nomic-embed-text-v2-moe"},
        compute=ray.data.ActorPoolStrategy(size=4),
        num_gpus=1,
        batch_size=4096,
    )
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import numpy.typing as npt

from .batching import windows
from .checkpoint import DEFAULT_REPO, locate
from .corpus.embedder import Embedder, ModelSettings, WindowTokenizer, resolve_settings
from .corpus.manifest import check_folder, finished_shards, locked, remove_unfinished
from .corpus.plan import VECTOR_COLUMN, OnBad
from .corpus.run import (
    CorpusReport,
    ModelOptions,
    Options,
    Request,
    begin,
    counting,
    make_request,
)
from .corpus.shards import Progress, ShardReader
from .corpus.workers import Job
from .tokenizer import Tokens

if TYPE_CHECKING:
    import ray.data

logger = logging.getLogger(__name__)

TOKENS_COLUMN = "input_ids"


class TokenizeBatch:
    """Adds the token ids of each text of a batch, for a stage that needs no GPU.

    The tokenizer is loaded with the first batch; until then an object is small, and it can be
    pickled at any time.

    Args:
        model: Folder that every node sees, or a repository, which every node downloads.
        column: Where the text is.
        on_bad: "fail" ends the run at a row without a text, "skip" drops such rows, logged with
            their number.
        **options: As for `EmbedBatch`.
    """

    def __init__(
        self,
        model: str | Path = DEFAULT_REPO,
        *,
        column: str = "text",
        on_bad: OnBad = "fail",
        **options: Unpack[ModelOptions],
    ) -> None:
        self._model, self._column, self._on_bad, self._options = model, column, on_bad, options
        self._tokenize: WindowTokenizer | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tokenize": None}

    def __call__(self, batch: Any) -> Any:
        """Tokenise a batch: dict of numpy arrays, pyarrow.Table or pandas.DataFrame.

        Returns:
            The same kind, with a column "input_ids" of lists.

        Raises:
            ValueError: No such column, or a row without a text under "fail".
        """
        if self._tokenize is None:
            # token ids do not depend on where the model runs
            options: ModelOptions = {**self._options, "device": "cpu"}
            self._tokenize = WindowTokenizer(resolve_settings(self._model, **options))
        batch, texts = _texts(batch, self._column, self._on_bad)
        ids = [np.array(one, dtype=np.int32) for one in self._tokenize(texts).ids]
        return _with_column(batch, TOKENS_COLUMN, ids)


class EmbedBatch:
    """Adds the vector of each text of a batch.

    Pass the class itself to `map_batches`, with `fn_constructor_kwargs` and an actor pool: the
    model is then loaded once in each actor, with its first batch. Until then an object is small,
    and it can be pickled at any time. Nothing is registered anywhere.

    Args:
        model: Folder that every node sees, or a repository, which every node downloads.
        column: Where the text is.
        tokens_column: Where `TokenizeBatch` put the token ids; the column is dropped. None
            tokenises here.
        output_column: Name of the column of vectors.
        on_bad: "fail" ends the run at a row without a text, "skip" drops such rows, logged with
            their number.
        **options: `revision`, `device`, `dtype`, `backend`, `prompt_name`, `prompt`, `dim`,
            `precision`, `max_seq_length`, `batch_tokens`, `local_files_only` as for
            `nomoe.embed_corpus`.
    """

    def __init__(
        self,
        model: str | Path = DEFAULT_REPO,
        *,
        column: str = "text",
        tokens_column: str | None = None,
        output_column: str = VECTOR_COLUMN,
        on_bad: OnBad = "fail",
        **options: Unpack[ModelOptions],
    ) -> None:
        self._model, self._column, self._on_bad, self._options = model, column, on_bad, options
        self._tokens_column, self._output_column = tokens_column, output_column
        self._embedder: Embedder | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_embedder": None}

    def __call__(self, batch: Any) -> Any:
        """Embed a batch: dict of numpy arrays, pyarrow.Table or pandas.DataFrame.

        Returns:
            The same kind with one more column: an (n, d) array, a fixed-size list, or arrays.

        Raises:
            ValueError: No such column, or a row without a text under "fail".
        """
        if self._embedder is None:
            settings = resolve_settings(self._model, **self._options)
            self._embedder = Embedder(settings, self._options.get("device"))
        embedder = self._embedder
        if self._tokens_column is not None:
            ids = _column(batch, self._tokens_column)
            batch = _without_column(batch, self._tokens_column)
            parts = list(embedder.embed(_token_windows(ids, embedder.settings.batch_tokens)))
        else:
            batch, texts = _texts(batch, self._column, self._on_bad)
            parts = list(embedder.embed_texts(windows(texts, embedder.settings.batch_tokens)))
        settings = embedder.settings
        empty = np.empty((0, settings.stored_dim), settings.stored_dtype)
        return _with_column(batch, self._output_column, np.concatenate([empty, *parts]))


def embed_dataset(
    inputs: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    actors: int | None = None,
    num_gpus: float | None = None,
    num_cpus: float | None = None,
    readers: int = 1,
    **options: Unpack[Options],
) -> CorpusReport:
    """Embed files into a folder of shards on a Ray cluster.

    Reading and tokenising is one stage, on CPUs; forwards the next, in actors that do nothing else;
    writing the third, on CPUs again. A shard travels as one row and is written whole, so the shards
    are those that `nomoe.embed_corpus` writes, and a run goes on where any run before it stopped.
    What an actor or node that dies was at work on, Ray does again.

    Args:
        inputs: As for `nomoe.embed_corpus`; every node must see them.
        output: A folder that every node sees.
        actors: Models at work; None takes one for each GPU of the cluster, or one.
        num_gpus: GPUs of an actor, such as 0.5 for two on each; None takes 1 where the cluster has
            GPUs.
        num_cpus: CPUs of an actor; None takes 1, and none beside a GPU.
        readers: Actors that read and tokenise, with a CPU each.
        **options: As for `nomoe.embed_corpus`, but no `workers`.

    Raises:
        ValueError, ...: As `nomoe.embed_corpus`.
        TypeError: `inputs` is a Ray Dataset, whose rows have no place of their own.
        ray.exceptions.RayError: The cluster failed; finished shards stay.
    """
    import ray

    if isinstance(inputs, ray.data.Dataset):
        raise TypeError(
            "embed_dataset takes files, by whose rows a run resumes; for a Dataset, "
            "map_batches(EmbedBatch, ...) and write_parquet, with Ray's own checkpointing"
        )
    if "workers" in options:
        raise TypeError("embed_dataset has no workers=; actors= says how many models are at work")
    for name, value in (("actors", actors), ("readers", readers)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
    if Path(output).suffix:
        raise ValueError(f"{output} has a suffix; a cluster writes a folder of shards")
    if not ray.is_initialized():
        ray.init()
    gpus = ray.cluster_resources().get("GPU", 0)
    num_gpus = min(1.0, gpus) if num_gpus is None else num_gpus
    num_cpus = (0.0 if num_gpus else 1.0) if num_cpus is None else num_cpus
    actors = actors or max(1, int(gpus / num_gpus) if num_gpus else 1)

    # device, dtype and backend are settled where an actor would run, which may not be here
    # on another node a relative path would be another's
    given = [inputs] if isinstance(inputs, str | Path) else list(inputs)
    given = [one if "://" in str(one) else Path(one).expanduser().absolute() for one in given]
    output = Path(output).expanduser().absolute()
    local = Path(options.get("model", DEFAULT_REPO)).expanduser()
    if local.is_dir():
        options["model"] = local.absolute()
    settle = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus)(_settle)
    settled = ray.get(settle.remote(given, output, options))
    if isinstance(settled, Exception):
        raise settled
    request: Request = settled
    folder = locate(request.model, revision=options.get("revision"))
    request = replace(request, settings=replace(request.settings, folder=folder))
    check_folder(request.output)
    with locked(request.output):
        remove_unfinished(request.output)
        request, manifest = begin(request)
        finished = finished_shards(request.output, manifest)
        todo = [index for index in range(len(manifest.plan.shards)) if index not in finished]
        job = Job(request.settings, manifest, request.output)
        rows = sum(manifest.plan.shards[index].rows for index in todo)
        with counting(request, manifest.plan, rows, len(finished)) as count:
            if not manifest.plan.rows:
                for index in todo:
                    job.open_output(index).commit()
                    count(Progress(0, 0, 0, index))
            elif todo:
                model = _SharedModel(request.model, options.get("revision"))
                pools = {"actors": min(actors, len(todo)), "readers": min(readers, len(todo))}
                dataset = _stages(job, model, todo, num_gpus=num_gpus, num_cpus=num_cpus, **pools)
                for row in dataset.iter_rows():
                    count(Progress(row["rows"], row["tokens"], row["cut"], row["shard"]))
        manifest.complete(request.output)
    return count.report(request, manifest.plan, len(manifest.plan.shards), len(finished))


def _settle(
    inputs: str | Path | Sequence[str | Path], output: str | Path, options: Options
) -> Request | Exception:
    try:
        return make_request(inputs, output, **options)
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        # raised here, Ray would wrap it
        return error


def _stages(
    job: Job,
    model: _SharedModel,
    todo: list[int],
    *,
    actors: int,
    readers: int,
    num_gpus: float,
    num_cpus: float,
) -> ray.data.Dataset:
    import ray.data
    from ray.data import ActorPoolStrategy

    arguments = (job, model)
    dataset = ray.data.from_items(
        [{"shard": index} for index in todo], override_num_blocks=len(todo)
    )
    return (
        dataset.map(
            ReadShard,
            fn_constructor_args=arguments,
            compute=ActorPoolStrategy(size=readers),
            num_cpus=1,
        )
        .map(
            EmbedShard,
            fn_constructor_args=arguments,
            compute=ActorPoolStrategy(size=actors),
            num_cpus=num_cpus,
            num_gpus=num_gpus,
        )
        .map(WriteShard(job), num_cpus=0.5)
    )


class _SharedModel:
    """A checkpoint, found anew on every node."""

    def __init__(self, name: str, revision: str | None) -> None:
        self._name, self._revision = name, revision

    def here(self, settings: ModelSettings) -> ModelSettings:
        """Return settings with the folder that this node has it in."""
        return replace(settings, folder=locate(self._name, revision=self._revision))


class ReadShard:
    """Stage of `embed_dataset`: the token ids of a shard, and its columns."""

    def __init__(self, job: Job, model: _SharedModel) -> None:
        self._job = job
        self._tokenize = WindowTokenizer(model.here(job.settings))
        self._reader = ShardReader(job.manifest.plan)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Read and tokenise the shard that a row names."""
        shard = int(row["shard"])
        rows, sizes, cut = [], [], 0
        columns: list[Any] = []
        ids: list[list[int]] = []
        for window in self._reader.windows(shard, self._job.settings.batch_tokens):
            tokens = self._tokenize(window.texts)
            ids += tokens.ids
            cut += len(tokens.cut)
            rows.append(window.rows)
            columns += window.columns
            sizes.append(len(window.texts))
        return {
            "shard": shard,
            "ids": np.concatenate([np.array(one, dtype=np.int32) for one in ids]),
            "lengths": np.array([len(one) for one in ids], dtype=np.int32),
            # texts of each window: vectors depend on these, bit for bit
            "windows": np.array(sizes, dtype=np.int32),
            "cut": cut,
            "source_rows": np.concatenate(rows),
            "columns": self._job.pack(columns),
        }


class EmbedShard:
    """Stage of `embed_dataset`: the vectors of a shard's token ids; nothing but forwards."""

    def __init__(self, job: Job, model: _SharedModel) -> None:
        self._embedder = Embedder(model.here(job.settings))

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Put vectors in the place of token ids."""
        ids, lengths = row.pop("ids"), row.pop("lengths")
        texts = [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]
        ends = np.cumsum(row.pop("windows")).tolist()
        parts = (
            Tokens(texts[start:end], []) for start, end in zip([0, *ends[:-1]], ends, strict=True)
        )
        vectors = np.concatenate(list(self._embedder.embed(parts)))
        return row | {"vectors": vectors, "tokens": len(ids)}


class WriteShard:
    """Stage of `embed_dataset`: a shard's file."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def __call__(self, row: dict[str, Any]) -> dict[str, int]:
        """Write a shard, and say what is in it."""
        output = self._job.open_output(int(row["shard"]))
        try:
            columns = self._job.unpack(row["columns"])
            output.add(np.asarray(row["source_rows"]), columns, np.asarray(row["vectors"]))
            output.commit()
        finally:
            output.abort()
        rows = len(row["source_rows"])
        return {name: int(row[name]) for name in ("shard", "tokens", "cut")} | {"rows": rows}


# --- batches in their three kinds ---


def _texts(batch: Any, column: str, on_bad: OnBad) -> tuple[Any, list[str]]:
    """Return a batch's rows that have a text, and the texts.

    Raises:
        ValueError: A row has none, and `on_bad` is "fail".
    """
    values = _column(batch, column)
    bad = [row for row, value in enumerate(values) if not isinstance(value, str)]
    if not bad:
        return batch, values
    if on_bad == "fail":
        found = type(values[bad[0]]).__name__
        raise ValueError(
            f"row {bad[0]} of a batch of {len(values)} has no text in column {column!r}: {found}; "
            "on_bad='skip' drops such rows"
        )
    logger.warning("%d of %d rows of a batch have no text and are dropped", len(bad), len(values))
    kept = np.array([isinstance(value, str) for value in values], dtype=bool)
    if isinstance(batch, dict):
        batch = {name: np.asarray(part)[kept] for name, part in batch.items()}
    else:
        batch = batch[kept] if hasattr(batch, "iloc") else batch.filter(kept)
    return batch, [value for value in values if isinstance(value, str)]


def _column(batch: Any, name: str) -> list[Any]:
    names = list(batch) if isinstance(batch, dict) or hasattr(batch, "iloc") else batch.column_names
    if name not in names:
        raise ValueError(f"the batch has no column {name!r}; it has {', '.join(map(str, names))}")
    column = batch[name]
    return list(column.to_pylist() if hasattr(column, "to_pylist") else column)


def _without_column(batch: Any, name: str) -> Any:
    if isinstance(batch, dict):
        return {one: part for one, part in batch.items() if one != name}
    if hasattr(batch, "iloc"):
        return batch.drop(columns=[name])
    return batch.drop_columns([name])


def _with_column(batch: Any, name: str, values: Sequence[Any] | npt.NDArray[Any]) -> Any:
    if isinstance(batch, dict):
        if not isinstance(values, np.ndarray):
            ragged = np.empty(len(values), dtype=object)
            ragged[:] = values
            values = ragged
        return batch | {name: values}
    if hasattr(batch, "iloc"):
        return batch.assign(**{name: list(values)})
    import pyarrow as pa

    if isinstance(values, np.ndarray):
        flat = pa.array(np.ascontiguousarray(values).reshape(-1))
        array = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    else:
        array = pa.array(values, pa.list_(pa.int32()))
    return batch.append_column(name, array)


def _token_windows(ids: Iterable[Any], batch_tokens: int) -> Iterator[Tokens]:
    """Divide token ids into windows of about four batches."""
    window: list[list[int]] = []
    count = 0
    for one in ids:
        window.append(one if isinstance(one, list) else one.tolist())
        count += len(one)
        if count >= 4 * batch_tokens:
            yield Tokens(window, [])
            window, count = [], 0
    if window:
        yield Tokens(window, [])
