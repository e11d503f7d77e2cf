"""A real cluster of Ray on this machine, begun and ended here: the same shards, whoever dies."""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import ray.data

import nomoe
import nomoe.ray
from nomoe import Encoder, embed_corpus
from nomoe.corpus.embedder import resolve_settings
from nomoe.ray.dataset import _SharedModel

ROWS, SHARD_ROWS = 480, 40


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(
        num_cpus=6,
        num_gpus=0,
        include_dashboard=False,
        object_store_memory=200 << 20,
        log_to_driver=False,
    )
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    generator = np.random.default_rng(0)
    words = "the tide turns twice a day bread needs flour water salt and time".split()
    rows = [
        {"id": row, "text": " ".join(generator.choice(words, generator.integers(1, 12)))}
        for row in range(ROWS)
    ]
    pq.write_table(pa.Table.from_pylist(rows[:301]), folder / "1.parquet", row_group_size=150)
    pq.write_table(pa.Table.from_pylist(rows[301:]), folder / "2.parquet")
    return folder


@pytest.fixture(scope="module")
def options(shallow_folder: Path) -> dict[str, Any]:
    return {"model": shallow_folder, "device": "cpu", "shard_rows": SHARD_ROWS}


@pytest.fixture(scope="module")
def whole(corpus: Path, options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The rows of a run without Ray."""
    out = tmp_path_factory.mktemp("whole") / "out"
    embed_corpus(corpus, out, **options)
    return pq.read_table(out)


def descendants() -> dict[int, str]:
    """Command lines of the processes that this one has begun, and those have."""
    parents, commands = {}, {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            stat = (folder / "stat").read_text()
            commands[int(folder.name)] = (folder / "cmdline").read_bytes().decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])

    def is_ours(pid: int) -> bool:
        while pid in parents:
            if pid == os.getpid():
                return True
            pid = parents[pid]
        return False

    return {pid: command for pid, command in commands.items() if is_ours(pid)}


@pytest.mark.slow
@pytest.mark.parametrize("actors", [2, 4])
def test_the_same_rows_as_without_ray(
    tmp_path: Path, cluster: None, corpus: Path, options: dict[str, Any], whole: Any, actors: int
) -> None:
    out = tmp_path / "out"
    report = nomoe.ray.embed_dataset(corpus, out, actors=actors, **options)
    assert (report.rows, report.embedded, report.shards) == (ROWS, ROWS, ROWS // SHARD_ROWS)
    table = pq.read_table(out)
    # row for row, and bit for bit
    assert table.equals(whole)
    (out / "part-000003.parquet").unlink()
    assert embed_corpus(corpus, out, **options).embedded == SHARD_ROWS
    assert pq.read_table(out).equals(whole)


@pytest.mark.slow
def test_an_actor_is_killed_and_the_job_is_whole(
    tmp_path: Path, cluster: None, corpus: Path, options: dict[str, Any]
) -> None:
    out = tmp_path / "out"
    # so many shards that an actor is still at work when one is seen
    options = options | {"shard_rows": 4}
    # Ray goes on where a run without it stopped
    embed_corpus(corpus, out, **options)
    whole = pq.read_table(out)
    found = {"part-000002.parquet", "part-000007.parquet"}
    for path in out.glob("part-*"):
        if path.name not in found:
            path.unlink()
    killed: list[int] = []

    def kill() -> None:
        while not killed:
            time.sleep(0.002)
            if len(list(out.glob("part-*"))) > len(found):
                actors = [pid for pid, name in descendants().items() if "EmbedShard" in name]
                if actors:
                    os.kill(actors[0], signal.SIGKILL)
                    killed.append(actors[0])

    killer = Thread(target=kill, daemon=True)
    killer.start()
    report = nomoe.ray.embed_dataset(corpus, out, actors=2, **options)
    killer.join(5)
    assert killed
    assert (report.found, report.embedded) == (2, ROWS - 2 * 4)
    assert pq.read_table(out).equals(whole)


def test_errors_come_as_they_are_and_before_any_work(
    tmp_path: Path, cluster: None, corpus: Path, options: dict[str, Any]
) -> None:
    out = tmp_path / "out"
    for change, error, message in (
        ({"dim": 97}, ValueError, "dim is 97"),
        ({"column": "body"}, ValueError, "no column 'body'"),
        ({"workers": 2}, TypeError, "actors="),
        ({"actors": 0}, ValueError, "actors is 0"),
        ({"actors": 6}, ValueError, "6 actors and 1 readers need 7 CPUs and 0 GPUs, and the"),
        ({"num_gpus": 1}, ValueError, "need 1 CPUs and 1 GPUs"),
        ({"model": tmp_path / "none"}, FileNotFoundError, "none"),
    ):
        with pytest.raises(error, match=message):
            nomoe.ray.embed_dataset(corpus, out, **(options | change))
    with pytest.raises(TypeError, match=r"for a Dataset, map_batches\(EmbedBatch"):
        nomoe.ray.embed_dataset(ray.data.range(3), out, **options)
    nomoe.ray.embed_dataset(corpus, out, limit=40, **options)
    with pytest.raises(ValueError, match="limit was 40 and is now None"):
        nomoe.ray.embed_dataset(corpus, out, **options)


# --- EmbedBatch in pipelines of one's own ---


def test_batches_of_every_kind(shallow_folder: Path) -> None:
    encoder = Encoder.from_pretrained(shallow_folder, device="cpu")
    texts = ["The tide turns.", "Bread", "", "a b c d e f g h"]
    expected = encoder.encode_query(texts, truncate_dim=64)
    embed = nomoe.ray.EmbedBatch(shallow_folder, device="cpu", prompt_name="query", dim=64)
    assert len(pickle.dumps(embed)) < 3000
    table = pa.table({"text": texts, "id": range(4)})
    batches = {
        "numpy": {"text": np.array(texts, dtype=object), "id": np.arange(4)},
        "arrow": table,
        "pandas": table.to_pandas(),
    }
    for kind, batch in batches.items():
        out = embed(batch)
        assert type(out) is type(batch)
        if kind == "arrow":
            assert out.schema.field("embedding").type == pa.list_(pa.float32(), 64)
            vectors = out["embedding"].combine_chunks().flatten().to_numpy().reshape(4, 64)
        else:
            vectors = np.stack(list(out["embedding"]))
        np.testing.assert_allclose(vectors, expected, atol=2e-6)
        assert list(out["id"].to_pylist() if kind == "arrow" else out["id"]) == [0, 1, 2, 3]
        assert "embedding" not in (batch.column_names if kind == "arrow" else batch)
    # one that has loaded a model is as small, and works elsewhere
    assert len(pickle.dumps(embed)) < 3000
    again = pickle.loads(pickle.dumps(embed))(batches["numpy"])
    assert np.array_equal(again["embedding"], embed(batches["numpy"])["embedding"])
    assert embed({"text": np.array([], dtype=object)})["embedding"].shape == (0, 64)


@pytest.mark.parametrize("kind", ["numpy", "arrow", "pandas"])
def test_a_column_is_not_overwritten(tmp_path: Path, kind: str) -> None:
    table = pa.table({"text": ["a"], "embedding": [1], "input_ids": [2]})
    batch: Any = {
        "numpy": {name: np.array(table[name].to_pylist()) for name in table.column_names},
        "arrow": table,
        "pandas": table.to_pandas(),
    }[kind]
    # before any work: there is no model
    with pytest.raises(ValueError, match="a column 'embedding' already"):
        nomoe.ray.EmbedBatch(tmp_path)(batch)
    with pytest.raises(ValueError, match="a column 'input_ids' already"):
        nomoe.ray.TokenizeBatch(tmp_path)(batch)


@pytest.mark.parametrize("kind", ["numpy", "arrow", "pandas"])
def test_tokens_and_forwards_apart_give_the_same(shallow_folder: Path, kind: str) -> None:
    texts = ["The tide turns.", "Bread", "a b c d e f g h" * 300]
    table = pa.table({"text": texts, "id": range(3)})
    batch: Any = {"numpy": {"text": np.array(texts)}, "arrow": table, "pandas": table.to_pandas()}[
        kind
    ]
    tokenize = nomoe.ray.TokenizeBatch(shallow_folder, prompt_name="query")
    embed = nomoe.ray.EmbedBatch(shallow_folder, device="cpu", tokens_column="input_ids")
    whole = nomoe.ray.EmbedBatch(shallow_folder, device="cpu", prompt_name="query")(batch)
    apart = embed(tokenize(batch))
    assert type(apart) is type(whole)
    names = [one.column_names if kind == "arrow" else list(one) for one in (apart, whole)]
    assert names[0] == names[1]
    for one, other in zip(list(apart["embedding"]), list(whole["embedding"]), strict=True):
        vectors = [np.asarray(v.as_py() if kind == "arrow" else v) for v in (one, other)]
        assert np.array_equal(*vectors)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ([0, -1, 2], "has ids from -1 to 2, outside the vocabulary of"),
        ([0, 2**31 - 1], "has ids from 0 to 2147483647, outside the vocabulary of"),
        ([5] * 2049, "has 2049 tokens, the model takes at most"),
        ([], r"holds \[\], expected a list of token ids"),
        (None, "holds None, expected a list of token ids"),
        ([0.5], r"holds \[[0.5, 2]*\], expected a list of token ids"),
    ],
)
@pytest.mark.parametrize("kind", ["numpy", "arrow", "pandas"])
def test_ids_that_are_not_the_models_are_refused(
    shallow_folder: Path, kind: str, value: list[int] | None, problem: str
) -> None:
    """As they would be of another tokenizer; a GPU would read beyond the table."""
    ids = [[0, 5, 2], value]
    table = pa.table({"input_ids": ids})
    batch: Any = {
        "numpy": {"input_ids": np.array(ids, dtype=object)},
        "arrow": table,
        "pandas": table.to_pandas(),
    }[kind]
    embed = nomoe.ray.EmbedBatch(shallow_folder, device="cpu", tokens_column="input_ids")
    with pytest.raises(
        ValueError, match=f"row [01] of a batch of 2 in column 'input_ids' {problem}"
    ):
        embed(batch)


@pytest.mark.parametrize("kind", ["numpy", "arrow", "pandas"])
def test_rows_without_a_text(
    shallow_folder: Path, kind: str, warnings_of_nomoe: pytest.LogCaptureFixture
) -> None:
    texts = ["one", None, "three"]
    table = pa.table({"text": texts, "id": [1, 2, 3]})
    batch: Any = {
        "numpy": {"text": np.array(texts, dtype=object), "id": np.array([1, 2, 3])},
        "arrow": table,
        "pandas": table.to_pandas(),
    }[kind]
    # pandas makes NaN of None
    found = {"pandas": "float, expected str", "arrow": "null"}.get(kind, "NoneType, expected str")
    message = f"row 1 of a batch of 3 has no text in column 'text': it is {found}; on"
    with pytest.raises(ValueError, match=message):
        nomoe.ray.EmbedBatch(shallow_folder, device="cpu")(batch)
    with pytest.raises(ValueError, match="no column 'body'; it has text, id"):
        nomoe.ray.EmbedBatch(shallow_folder, device="cpu", column="body")(batch)
    out = nomoe.ray.EmbedBatch(shallow_folder, device="cpu", on_bad="skip")(batch)
    assert list(out["id"].to_pylist() if kind == "arrow" else out["id"]) == [1, 3]
    assert "1 of 3 rows of a batch have no text and are dropped" in warnings_of_nomoe.text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt_name", "query"),
        # what TokenizeBatch takes where nothing is said, and yet it may have been told otherwise
        ("prompt_name", "document"),
        ("prompt_name", None),
        ("prompt", ""),
        ("max_seq_length", 8),
        ("column", "body"),
        ("on_bad", "skip"),
    ],
)
def test_ready_tokens_refuse_options_of_texts(name: str, value: Any) -> None:
    # the name alone: there is no model
    given: dict[str, Any] = {"model": "none", name: value}
    with pytest.raises(TypeError, match=f"^{name} would do nothing .* TokenizeBatch"):
        nomoe.ray.EmbedBatch(**given, tokens_column="input_ids")
    nomoe.ray.EmbedBatch(**given)
    nomoe.ray.TokenizeBatch(**given)


@pytest.mark.parametrize(
    "name", ["device", "dtype", "backend", "dim", "precision", "batch_tokens", "output_column"]
)
def test_tokenizing_refuses_options_of_forwards(name: str) -> None:
    with pytest.raises(TypeError, match=f"argument '{name}'"):
        nomoe.ray.TokenizeBatch("none", **{name: None})


def test_bytes_that_are_not_utf8_are_no_text(shallow_folder: Path) -> None:
    offsets, data = np.array([0, 1, 2, 3], np.int32), np.frombuffer(b"a\xffb", np.uint8)
    column = pa.Array.from_buffers(pa.string(), 3, [None, *map(pa.py_buffer, (offsets, data))])
    batch = pa.table({"text": column, "id": [1, 2, 3]})
    with pytest.raises(ValueError, match=r"row 1 of a batch of 3 .*: it is not UTF-8"):
        nomoe.ray.TokenizeBatch(shallow_folder)(batch)
    out = nomoe.ray.TokenizeBatch(shallow_folder, on_bad="skip")(batch)
    assert out["id"].to_pylist() == [1, 3]


def test_an_unknown_way_with_bad_rows_is_refused() -> None:
    for stage in (nomoe.ray.TokenizeBatch, nomoe.ray.EmbedBatch):
        with pytest.raises(ValueError, match="on_bad is 'Fail'"):
            stage("none", on_bad="Fail")


def test_each_stage_acts_on_its_options(shallow_folder: Path) -> None:
    batch = {"body": np.array(["The tide turns.", None, "a b c d e f g h"], dtype=object)}
    checkpoint: dict[str, Any] = {
        "model": shallow_folder,
        "revision": None,
        "local_files_only": True,
    }
    texts: dict[str, Any] = {"prompt": "tide: ", "max_seq_length": 6} | {
        "column": "body",
        "on_bad": "skip",
    }
    forwards: dict[str, Any] = {"device": "cpu", "dtype": "float32", "backend": "torch"} | {
        "dim": 64,
        "precision": "float16",
        "batch_tokens": 100,
    }
    tokens = nomoe.ray.TokenizeBatch(**checkpoint, **texts)(batch)
    assert [len(ids) for ids in tokens["input_ids"]] == [6, 6]
    embed = nomoe.ray.EmbedBatch(**checkpoint, **forwards, tokens_column="input_ids")
    whole = nomoe.ray.EmbedBatch(**checkpoint, **forwards, **texts)(batch)
    assert np.array_equal(embed(tokens)["embedding"], whole["embedding"])
    assert (whole["embedding"].shape, whole["embedding"].dtype) == ((2, 64), np.float16)


@pytest.mark.parametrize("stage", ["TokenizeBatch", "EmbedBatch"])
@pytest.mark.parametrize("kind", ["numpy", "numpy U", "pandas"])
def test_a_lone_surrogate_is_no_text(
    shallow_folder: Path, kind: str, stage: str, warnings_of_nomoe: pytest.LogCaptureFixture
) -> None:
    columns = {"text": ["a", "x\ud83d", "é"], "id": [1, 2, 3]}
    batch: Any = {
        "numpy": {name: np.array(values, dtype=object) for name, values in columns.items()},
        "numpy U": {name: np.array(values) for name, values in columns.items()},
        "pandas": pd.DataFrame({name: pd.Series(v, dtype=object) for name, v in columns.items()}),
    }[kind]
    device = {"device": "cpu"} if stage == "EmbedBatch" else {}
    make = partial(getattr(nomoe.ray, stage), shallow_folder, **device)
    message = (
        r"row 1 of a batch of 3 has no text in column 'text': it holds a lone surrogate \(U\+D83D "
        r"at character 1\).*; on_bad='skip' drops such rows"
    )
    with pytest.raises(ValueError, match=message):
        make()(batch)
    skip = make(on_bad="skip")
    out = skip(batch)
    assert list(out["id"]) == [1, 3]
    assert list(out["text"]) == ["a", "é"]
    assert "1 of 3 rows of a batch have no text and are dropped" in warnings_of_nomoe.text
    # those that stay are what they would be by themselves
    name = "embedding" if stage == "EmbedBatch" else "input_ids"
    for one, other in zip(out[name], skip({"text": np.array(["a", "é"])})[name], strict=True):
        assert np.array_equal(one, other)
    none = skip({"text": np.array(["\udfff"], dtype=object)})
    assert [len(none[one]) for one in ("text", name)] == [0, 0]


@pytest.mark.slow
def test_a_pipeline_with_rays_own_checkpoint(
    tmp_path: Path, cluster: None, corpus: Path, shallow_folder: Path, whole: Any
) -> None:
    from ray.data.checkpoint import CheckpointConfig

    context = ray.data.DataContext.get_current()
    context.checkpoint_config = CheckpointConfig(
        id_column="id", checkpoint_path=str(tmp_path / "ids"), delete_checkpoint_on_success=False
    )
    model = {"model": str(shallow_folder), "device": "cpu"}
    pool = ray.data.ActorPoolStrategy(size=1)

    def run() -> None:
        dataset = ray.data.read_parquet(str(corpus)).map_batches(
            nomoe.ray.TokenizeBatch,
            fn_constructor_kwargs={"model": str(shallow_folder)},
            compute=ray.data.ActorPoolStrategy(size=1),
            batch_format="pyarrow",
        )
        dataset.map_batches(
            nomoe.ray.EmbedBatch,
            fn_constructor_kwargs=model | {"tokens_column": "input_ids"},
            compute=pool,
            batch_size=64,
            batch_format="pyarrow",
        ).write_parquet(str(tmp_path / "out"))

    try:
        run()
        table = pq.read_table(tmp_path / "out").sort_by("id")
        assert table["id"].to_pylist() == list(range(ROWS))
        assert table["text"].to_pylist() == whole["text"].to_pylist()
        vectors, expected = (
            one["embedding"].combine_chunks().flatten().to_numpy() for one in (table, whole)
        )
        np.testing.assert_allclose(vectors, expected, atol=2e-6)
        files = set((tmp_path / "out").iterdir())
        # what has a checkpoint is not done again
        run()
        assert set((tmp_path / "out").iterdir()) == files
    finally:
        context.checkpoint_config = None


def test_no_node_asks_the_hub_when_told_not_to(
    shallow_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}

    def locate(name: str, **options: Any) -> Path:
        asked[name] = options
        return shallow_folder

    monkeypatch.setattr("nomoe.ray.dataset.locate", locate)
    settings = resolve_settings(shallow_folder, device="cpu")
    model = _SharedModel("owner/name", "abc", "cpu", local_files_only=True)
    assert model.here(settings).folder == shallow_folder
    assert asked == {"owner/name": {"revision": "abc", "local_files_only": True}}
