"""The example that fills a LanceDB table, run as it is: what it finds is what is nearest."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nomoe import Encoder, data, embed_corpus

EXAMPLE = Path(__file__).parents[2] / "examples" / "lancedb_search.py"
TEXTS = [text for group in data.sentences().values() for text in group]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lancedb_search", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("options", [{}, {"precision": "float16", "dim": 64}])
def test_search_finds_the_nearest(
    tmp_path: Path, tiny_folder: Path, example: ModuleType, options: dict[str, Any]
) -> None:
    source, shards = tmp_path / "in.jsonl", tmp_path / "shards"
    source.write_text("".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(TEXTS)))
    embed_corpus(source, shards, model=tiny_folder, device="cpu", shard_rows=30, **options)
    table = example.fill(shards, tmp_path / "db")
    assert table.count_rows() == len(TEXTS)
    assert table.to_arrow().sort_by("source_row")["text"].to_pylist() == TEXTS

    encoder = Encoder.from_pretrained(tiny_folder, device="cpu", truncate_dim=options.get("dim"))
    column = pq.read_table(shards)["embedding"].combine_chunks()
    vectors = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    vectors = vectors.reshape(len(TEXTS), -1)
    for query in ("When does the tide turn?", "面粉"):
        cosine = encoder.similarity(encoder.encode_query(query), vectors)[0].numpy()
        found = example.search(table, encoder, query, limit=4)
        expected = np.argsort(-cosine)[:4]
        assert [row["source_row"] for row in found] == expected.tolist()
        np.testing.assert_allclose(
            [1 - row["_distance"] for row in found], cosine[expected], atol=1e-3
        )


def test_a_fill_that_was_interrupted_is_done_anew(
    tmp_path: Path, tiny_folder: Path, example: ModuleType
) -> None:
    source, shards, database = tmp_path / "in.txt", tmp_path / "shards", tmp_path / "db"
    source.write_text("\n".join(TEXTS), encoding="utf-8")
    embed_corpus(source, shards, model=tiny_folder, device="cpu")
    # no shard, though its name ends so
    pq.write_table(pa.table({"x": [1]}), shards / "notes.parquet")
    unfinished = database / "corpus.lance" / "data"
    unfinished.mkdir(parents=True)
    (unfinished / "rows.lance").write_bytes(b"half")
    assert example.fill(shards, database).count_rows() == len(TEXTS)
    # a table is left as it is, whatever its owner has done to it
    lancedb.connect(database).open_table("corpus").delete("source_row > 3")
    assert example.fill(shards, database).count_rows() == 4


def test_the_command(
    tmp_path: Path, tiny_folder: Path, example: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    options: dict[str, Any] = {"model": tiny_folder, "device": "cpu"}
    embed_corpus(tmp_path / "in.txt", tmp_path / "shards", **options)
    command = [str(tmp_path / "shards"), str(tmp_path / "db"), TEXTS[0]]
    for _ in range(2):
        assert example.main(command) == 0
        printed = capsys.readouterr().out
        assert f"{len(TEXTS):,} rows" in printed
        # the weights are random: a text is not what is nearest to it as a query
        encoder = Encoder.from_pretrained(tiny_folder, device="cpu")
        cosine = encoder.similarity(encoder.encode_query(TEXTS[0]), encoder.encode_document(TEXTS))
        best = cosine[0].topk(5).indices.tolist()
        assert [line[7:] for line in printed.splitlines()[1:]] == [TEXTS[row][:80] for row in best]
    embed_corpus(tmp_path / "in.txt", tmp_path / "bare", columns=[], **options)
    assert example.main([str(tmp_path / "bare"), str(tmp_path / "db3"), TEXTS[0]]) == 0
    printed = capsys.readouterr().out
    assert [line[7:] for line in printed.splitlines()[1:]] == [f"row {row}" for row in best]
    embed_corpus(tmp_path / "in.txt", tmp_path / "codes", precision="ubinary", **options)
    with pytest.raises(ValueError, match="holds ubinary codes"):
        example.fill(tmp_path / "codes", tmp_path / "db2")
    manifest = tmp_path / "shards" / "_manifest.json"
    manifest.write_text(manifest.read_text().replace('"complete": true', '"complete": false'))
    with pytest.raises(ValueError, match="not complete"):
        example.fill(tmp_path / "shards", tmp_path / "db2")
