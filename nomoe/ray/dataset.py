"""Files to a folder of shards on a cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from ..checkpoint import DEFAULT_REPO, locate
from ..corpus.embedder import Embedder, ModelSettings, WindowTokenizer
from ..corpus.request import Options, Request, make_request
from ..corpus.run import CorpusReport, write_folder
from ..corpus.shards import Progress, ShardReader
from ..corpus.workers import Job
from ..tokenizer import Tokens

if TYPE_CHECKING:
    import ray.data

# writing 32,768 rows of 768 numbers takes 0.4 s of a CPU's time
_ACTORS_PER_WRITER = 4


def embed_dataset(
    inputs: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    actors: int | None = None,
    num_gpus: float | None = None,
    num_cpus: float | None = None,
    readers: int | None = None,
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
        readers: Actors that read and tokenise, with a CPU each; None takes one for each model, as
            far as the cluster has CPUs.
        **options: As for `nomoe.embed_corpus`, but no `workers`.

    Raises:
        ValueError, ...: As `nomoe.embed_corpus`; or the cluster is too small, where Ray would
            wait for ever.
        TypeError: `inputs` is a Ray Dataset, whose rows have no place of their own.
        ray.exceptions.RayError: The cluster failed; finished shards stay.
    """
    import ray.data

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
    resources = ray.cluster_resources()
    cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    num_gpus = min(1.0, gpus) if num_gpus is None else num_gpus
    num_cpus = (0.0 if num_gpus else 1.0) if num_cpus is None else num_cpus
    actors = actors or max(1, int(gpus / num_gpus) if num_gpus else 1)
    readers = readers or max(1, min(actors, int(cpus - actors * num_cpus)))
    needed = (actors * num_cpus + readers, actors * num_gpus)
    if needed[0] > cpus or needed[1] > gpus:
        raise ValueError(
            f"{actors} actors and {readers} readers need {needed[0]:g} CPUs and {needed[1]:g} "
            f"GPUs, and the cluster has {cpus:g} and {gpus:g}: lower actors=, readers=, num_cpus= "
            "or num_gpus="
        )

    # on another node a relative path would be another's
    given = [inputs] if isinstance(inputs, str | Path) else list(inputs)
    given = [one if "://" in str(one) else Path(one).expanduser().absolute() for one in given]
    output = Path(output).expanduser().absolute()
    local = Path(options.get("model", DEFAULT_REPO)).expanduser()
    if local.is_dir():
        options["model"] = local.absolute()
    # device, dtype and backend are settled where an actor would run, which may not be here
    settle = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus)(_settle)
    settled = ray.get(settle.remote(given, output, options))
    if isinstance(settled, Exception):
        raise settled
    request: Request = settled
    model = _SharedModel(
        request.model,
        options.get("revision"),
        # of the devices that an actor has, the first
        request.devices[0].partition(":")[0],
        local_files_only=options.get("local_files_only", False),
    )
    request = replace(request, settings=model.here(request.settings))

    def embed(
        request: Request, job: Job, todo: list[int], report: Callable[[Progress], None]
    ) -> None:
        pools = {"actors": min(actors, len(todo)), "readers": min(readers, len(todo))}
        dataset = _stages(job, model, todo, num_gpus=num_gpus, num_cpus=num_cpus, **pools)
        for row in dataset.iter_rows():
            report(Progress(row["rows"], row["tokens"], row["cut"], row["shard"]))

    return write_folder(request, embed)


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
        .map(
            WriteShard,
            fn_constructor_args=(job,),
            compute=ActorPoolStrategy(size=-(-actors // _ACTORS_PER_WRITER)),
            # mostly it waits for the disk, and it must never wait for a CPU
            num_cpus=0,
        )
    )


class _SharedModel:
    """A checkpoint, found anew on every node."""

    def __init__(
        self, name: str, revision: str | None, device: str, *, local_files_only: bool
    ) -> None:
        self._name, self._revision, self.device = name, revision, device
        self._local_files_only = local_files_only

    def here(self, settings: ModelSettings) -> ModelSettings:
        """Return settings with the folder that this node has it in."""
        folder = locate(
            self._name, revision=self._revision, local_files_only=self._local_files_only
        )
        return replace(settings, folder=folder)


class ReadShard:
    """Stage of `embed_dataset`: the token ids of a shard, and its columns."""

    def __init__(self, job: Job, model: _SharedModel) -> None:
        self._job = job
        # the tokenizer would take every core of the node, and the actor has one
        os.environ.setdefault("RAYON_NUM_THREADS", "1")
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
        self._embedder = Embedder(model.here(job.settings), model.device)

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
