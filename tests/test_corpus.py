"""Corpora on one machine: what is read, what is written, what is refused, and what is the same."""

from __future__ import annotations

import csv
import inspect
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from nomoe import Encoder, data, embed_corpus
from nomoe.corpus import estimate, estimate_corpus
from nomoe.corpus.embedder import WindowTokenizer, resolve_settings
from nomoe.corpus.manifest import read_manifest, shard_metadata
from nomoe.corpus.plan import make_plan
from nomoe.corpus.request import make_request
from nomoe.corpus.rows import Place, read_blocks
from nomoe.corpus.shards import ShardReader
from nomoe.corpus.sources import find_sources, look_again

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

TEXTS = [text for group in data.sentences().values() for text in group]


@pytest.fixture
def model(shallow_folder: Path) -> dict[str, Any]:
    return {"model": shallow_folder, "device": "cpu"}


@pytest.fixture(scope="session")
def shallow(shallow_folder: Path) -> Encoder:
    return Encoder.from_pretrained(shallow_folder, device="cpu")


def make_texts(count: int) -> list[str]:
    """Texts that all differ, of very different lengths."""
    generator = np.random.default_rng(count)
    words = " ".join(TEXTS).split()
    return [
        " ".join([str(row), *generator.choice(words, generator.integers(0, 30))])
        for row in range(count)
    ]


def make_rows(count: int) -> list[dict[str, Any]]:
    return [
        {"id": f"{row:05d}", "text": text, "score": row / 4, "tags": ["é", str(row)]}
        for row, text in enumerate(make_texts(count))
    ]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write rows in the format of the suffix."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".txt":
        path.write_text("".join(row["text"] + "\n" for row in rows), encoding="utf-8")
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", encoding="utf-8", newline="") as file:
            names = [name for name in rows[0] if name != "tags"]
            delimiter = "\t" if path.suffix == ".tsv" else ","
            writer = csv.DictWriter(file, names, delimiter=delimiter, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=70)
    else:
        table = pa.Table.from_pylist(rows)
        kind = pa.ipc.new_stream if path.suffix == ".arrows" else pa.ipc.new_file
        with kind(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=70)
    return path


def vectors_of(table: Any) -> np.ndarray:
    column = table["embedding"].combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)


def read(folder: Path) -> Any:
    """A folder of shards as others read it."""
    return pq.read_table(folder)


# --- formats, in and out ---


@pytest.mark.parametrize(
    "suffix", [".parquet", ".arrow", ".arrows", ".feather", ".jsonl", ".csv", ".tsv", ".txt"]
)
def test_every_format_gives_the_encoders_vectors_row_for_row(
    tmp_path: Path, suffix: str, model: dict[str, Any], shallow: Encoder
) -> None:
    rows = make_rows(130)
    source = write(tmp_path / f"in{suffix}", rows)
    report = embed_corpus(source, tmp_path / "out", shard_rows=50, **model)
    assert (report.rows, report.shards, report.embedded) == (130, 3, 130)
    names = sorted(path.name for path in (tmp_path / "out").glob("*.parquet"))
    assert names == [f"part-{index:06d}.parquet" for index in range(3)]
    assert [pq.read_metadata(tmp_path / "out" / name).num_rows for name in names] == [50, 50, 30]

    table = read(tmp_path / "out")
    assert table["source_row"].to_pylist() == list(range(130))
    expected = shallow.encode_document([row["text"] for row in rows])
    np.testing.assert_allclose(vectors_of(table), expected, atol=2e-6)
    field = table.schema.field("embedding")
    assert field.type.list_size == 96
    assert field.type.value_type == pa.float32()
    along = table.drop_columns(["source_row", "embedding"]).to_pylist()
    if suffix == ".txt":
        assert along == [{"text": row["text"]} for row in rows]
    elif suffix in (".csv", ".tsv"):
        # values of a CSV file go along as they stand: no id loses its zeros
        kept = ("id", "text", "score")
        assert along == [{name: str(row[name]) for name in kept} for row in rows]
    else:
        assert along == rows


@pytest.mark.parametrize("out", [".parquet", ".jsonl", ".npy"])
@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_one_file_has_the_bits_of_the_folder(
    tmp_path: Path, suffix: str, out: str, model: dict[str, Any]
) -> None:
    rows = make_rows(90)
    source = write(tmp_path / f"in{suffix}", rows)
    options = {"shard_rows": 40, **model}
    embed_corpus(source, tmp_path / "out", **options)
    expected = vectors_of(read(tmp_path / "out"))
    target = tmp_path / f"out{out}"
    assert embed_corpus(source, target, **options).output == target
    if out == ".npy":
        found = np.load(target)
    elif out == ".parquet":
        table = pq.read_table(target)
        assert table.schema.remove_metadata() == read(tmp_path / "out").schema.remove_metadata()
        assert table["id"].to_pylist() == [row["id"] for row in rows]
        found = vectors_of(table)
    else:
        lines = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
        found = np.array([line.pop("embedding") for line in lines], np.float32)
        assert lines == rows
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("precision", ["float16", "int8", "uint8", "binary", "ubinary"])
def test_precisions(
    tmp_path: Path, precision: str, model: dict[str, Any], shallow: Encoder
) -> None:
    source = write(tmp_path / "in.txt", make_rows(40))
    embed_corpus(source, tmp_path / "out", precision=precision, dim=64, **model)
    embed_corpus(source, tmp_path / "out.npy", precision=precision, dim=64, **model)
    found, alone = vectors_of(read(tmp_path / "out")), np.load(tmp_path / "out.npy")
    assert found.dtype == alone.dtype
    assert np.array_equal(found, alone)
    texts = make_texts(40)
    if precision == "float16":
        assert found.dtype == np.float16
        expected = shallow.encode_document(texts, truncate_dim=64)
        np.testing.assert_allclose(found, expected, atol=3e-4)
        return
    expected = shallow.encode_document(texts, truncate_dim=64, precision=precision)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    # a batch-mate may move a number across the edge of a step
    assert np.mean(found == expected) > 0.999


def test_prompt_dim_and_length_reach_the_model(
    tmp_path: Path, model: dict[str, Any], shallow: Encoder
) -> None:
    texts = make_texts(30)
    source = write(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    embed_corpus(source, tmp_path / "q.npy", prompt_name="query", dim=32, **model)
    expected = shallow.encode_query(texts, truncate_dim=32)
    np.testing.assert_allclose(np.load(tmp_path / "q.npy"), expected, atol=2e-6)
    embed_corpus(source, tmp_path / "p.npy", prompt="classification: ", **model)
    expected = shallow.encode(texts, "Classification")
    np.testing.assert_allclose(np.load(tmp_path / "p.npy"), expected, atol=2e-6)
    report = embed_corpus(source, tmp_path / "short.npy", max_seq_length=8, **model)
    short = Encoder.from_pretrained(model["model"], device="cpu", max_seq_length=8)
    expected = short.encode_document(texts)
    np.testing.assert_allclose(np.load(tmp_path / "short.npy"), expected, atol=2e-6)
    lengths = [
        len(ids) for ids in short.tokenizer([f"search_document: {t}" for t in texts], 99).ids
    ]
    assert report.cut == sum(length > 8 for length in lengths) > 0
    assert report.tokens == sum(min(length, 8) for length in lengths)


def test_chosen_columns(tmp_path: Path, model: dict[str, Any]) -> None:
    for suffix in (".jsonl", ".parquet"):
        source = write(tmp_path / f"in{suffix}", make_rows(20))
        out = tmp_path / f"chosen{suffix[1:]}"
        embed_corpus(source, out, columns=["score", "id"], **model)
        table = read(out)
        assert table.column_names == ["source_row", "score", "id", "embedding"]
        assert table["id"].to_pylist() == [row["id"] for row in make_rows(20)]
        out = tmp_path / f"none{suffix[1:]}"
        embed_corpus(source, out, columns=[], **model)
        assert read(out).column_names == ["source_row", "embedding"]
        embed_corpus(source, out.with_suffix(".jsonl"), columns=["id"], **model)
        line = json.loads(out.with_suffix(".jsonl").read_text().splitlines()[3])
        assert set(line) == {"id", "embedding"}


def test_folders_patterns_lists_and_uris(tmp_path: Path, model: dict[str, Any]) -> None:
    rows = make_rows(60)
    folder = tmp_path / "data"
    (folder / "b").mkdir(parents=True)
    (folder / "_private").mkdir()
    write(folder / "b" / "1.parquet", rows[20:40])
    write(folder / "a.parquet", rows[:20])
    write(folder / "c.parquet", rows[40:])
    write(folder / "_private" / "x.parquet", rows)
    write(folder / ".hidden.parquet", rows)
    wanted = [folder / "a.parquet", folder / "b" / "1.parquet", folder / "c.parquet"]
    uri = folder.as_uri()
    for given in (folder, str(folder / "**" / "[abc1]*.parquet"), wanted, uri):
        found = find_sources(given)
        assert [Path(one.path.removeprefix("file://")) for one in found] == wanted, given
    remote = find_sources(f"{uri}/**/*.parquet")
    assert len(remote) == 4
    assert [one.path for one in find_sources(f"{uri}/*.parquet")] == [
        f"{uri}/{name}.parquet" for name in ("a", "c")
    ]
    assert [one.path for one in find_sources(f"{uri}/b/1.parquet")] == [f"{uri}/b/1.parquet"]
    # a shard may hold rows of several files
    embed_corpus(uri, tmp_path / "out", shard_rows=25, **model)
    embed_corpus(folder, tmp_path / "here", shard_rows=25, **model)
    table = read(tmp_path / "out")
    assert table["id"].to_pylist() == [row["id"] for row in rows]
    assert table.equals(read(tmp_path / "here"))


def test_links_are_followed_once(
    tmp_path: Path, warnings_of_nomoe: pytest.LogCaptureFixture
) -> None:
    folder, other = tmp_path / "data", tmp_path / "other"
    (folder / "sub").mkdir(parents=True)
    other.mkdir()
    (folder / "sub" / "a.txt").write_text("a")
    (other / "x.txt").write_text("x")
    (folder / "link").symlink_to(other)
    (folder / "sub" / "loop").symlink_to(folder)
    (folder / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    for given in (folder, f"{folder}/**/*.txt", f"{folder}/*/*.txt"):
        names = [os.path.relpath(one.path, folder) for one in find_sources(given)]
        assert names == ["link/x.txt", "sub/a.txt"], given
    assert warnings_of_nomoe.text.count("gone.txt is a link to nothing") == 2
    (folder / "same.txt").symlink_to(other / "x.txt")
    names = [os.path.relpath(one.path, folder) for one in find_sources(folder)]
    assert names == ["link/x.txt", "sub/a.txt"]
    assert "same.txt is the same file as" in warnings_of_nomoe.text
    for twice in (folder / "same.txt", (other / "x.txt").as_uri(), other / ".." / "other"):
        with pytest.raises(ValueError, match="named twice"):
            find_sources([other / "x.txt", twice])


def test_files_come_in_one_order_however_they_are_named(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("a.txt", "a/x.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    for given in (tmp_path, f"{tmp_path}/**/*.txt", tmp_path.as_uri()):
        paths = [one.path.removeprefix("file://") for one in find_sources(given)]
        assert [os.path.relpath(path, tmp_path) for path in paths] == ["a/x.txt", "a.txt", "b.txt"]


@pytest.mark.parametrize("form", ["file://{}", "file://{}/in.jsonl", "file://{}/*.jsonl"])
def test_options_of_a_uri_are_its_file_systems(
    tmp_path: Path, form: str, model: dict[str, Any]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write(folder / "in.jsonl", make_rows(3))
    uri = form.format(folder)
    (source,) = find_sources(f"{uri}?use_mmap=true")
    assert source.path == f"file://{folder}/in.jsonl?use_mmap=true"
    assert look_again(source) == source
    (block,) = read_blocks(source, "text")
    assert block.texts == make_texts(3)
    with pytest.raises(ValueError, match="named twice"):
        find_sources([folder / "in.jsonl", f"{uri}?use_mmap=true"])
    if not uri.endswith("in.jsonl"):
        with pytest.raises(ValueError, match="inside the input"):
            embed_corpus(f"{uri}?use_mmap=true", folder / "out.jsonl", **model)


def test_a_pattern_may_hold_what_looks_like_an_option(tmp_path: Path) -> None:
    (tmp_path / "shard").mkdir()
    write(tmp_path / "shard" / "in.jsonl", make_rows(3))
    write(tmp_path / "shardXid=3.jsonl", make_rows(3))
    (source,) = find_sources(f"file://{tmp_path}/shard?id=*.jsonl")
    assert source.path == f"file://{tmp_path}/shardXid=3.jsonl"
    with pytest.raises(FileNotFoundError, match="a question mark of a name is %3F"):
        find_sources(f"file://{tmp_path}/q?id=3.jsonl")


@pytest.mark.skipif(sys.platform != "linux", reason="names are Unicode there")
def test_names_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    with open(os.fsencode(tmp_path) + b"/\xff.txt", "wb") as file:
        file.write(b"text\n")
    for given in (tmp_path, f"{tmp_path}/*.txt", f"file://{tmp_path}", f"file://{tmp_path}/*.txt"):
        with pytest.raises(ValueError, match="a name that is not UTF-8; rename the file"):
            find_sources(given)


def test_lines_from_a_uri(tmp_path: Path, model: dict[str, Any]) -> None:
    for suffix in (".jsonl", ".csv"):
        source = write(tmp_path / f"in{suffix}", make_rows(70))
        out = tmp_path / suffix[1:]
        embed_corpus(source.as_uri(), out, shard_rows=30, **model)
        assert read(out)["text"].to_pylist() == make_texts(70)


def test_other_files_of_a_folder_are_named(
    tmp_path: Path, warnings_of_nomoe: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "a.jsonl", make_rows(2))
    (tmp_path / "README.md").write_text("about")
    assert len(find_sources(tmp_path)) == 1
    assert "README.md" in warnings_of_nomoe.text


# --- every row, wherever a shard begins ---


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".jsonl", ".csv", ".txt"])
def test_a_reader_begins_at_any_row(tmp_path: Path, suffix: str) -> None:
    rows = make_rows(200)
    for row in rows[::7]:
        # a value over several lines, where the format has them
        row["text"] += "\r\nnext" if suffix == ".csv" else ""
    source = find_sources(write(tmp_path / f"in{suffix}", rows))[0]
    ends = [0, *(end for block in read_blocks(source, "text") for end in block.ends)]
    for first in (0, 1, 69, 70, 71, 199):
        offset = ends[first] if len(ends) > 1 else 0
        blocks = read_blocks(source, "text", place=Place(first, offset))
        texts = [text for block in blocks for text in block.texts]
        assert texts == [row["text"] for row in rows[first:]], first


@pytest.mark.parametrize("shard_rows", [1, 7, 64, 1000])
@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_shards_hold_every_good_row_once(tmp_path: Path, suffix: str, shard_rows: int) -> None:
    rows = make_rows(220)
    bad = {0, 1, 63, 64, 65, 130, 219}
    for row in bad:
        rows[row]["text"] = None
    write(tmp_path / f"a{suffix}", rows[:100])
    write(tmp_path / f"b{suffix}", rows[100:101])
    write(tmp_path / f"c{suffix}", rows[101:])
    plan = make_plan(find_sources(tmp_path), on_bad="skip", shard_rows=shard_rows, form="parquet")
    good = [row for row in range(220) if row not in bad]
    assert sum(plan.bad.values()) == len(bad)
    assert [shard.rows for shard in plan.shards] == [
        len(good[start : start + shard_rows]) for start in range(0, len(good), shard_rows)
    ]
    order = np.random.default_rng(0).permutation(len(plan.shards)).tolist()
    for shards in (range(len(plan.shards)), order):
        reader = ShardReader(plan)
        found: dict[int, str] = {}
        for shard in shards:
            windows = list(reader.windows(shard, batch_tokens=40))
            assert [window.is_last for window in windows] == [False] * (len(windows) - 1) + [True]
            for window in windows:
                ids = [
                    row["id"]
                    for part in window.columns
                    for row in (part if isinstance(part, list) else part.to_pylist())
                ]
                assert ids == [rows[row]["id"] for row in window.rows.tolist()]
                for row, text in zip(window.rows.tolist(), window.texts, strict=True):
                    assert row not in found
                    found[row] = text
        assert found == {row: rows[row]["text"] for row in good}


def test_limit(tmp_path: Path, model: dict[str, Any]) -> None:
    write(tmp_path / "a.jsonl", make_rows(30))
    write(tmp_path / "b.jsonl", make_rows(30))
    inputs = str(tmp_path / "*.jsonl")
    assert embed_corpus(inputs, tmp_path / "out", limit=41, shard_rows=25, **model).rows == 41
    ids = [row["id"] for row in make_rows(30)]
    assert read(tmp_path / "out")["id"].to_pylist() == ids + ids[:11]


# --- bad rows and broken files ---


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Rows of every kind of trouble."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    rows = make_rows(20)
    rows[3]["text"] = None
    rows[4]["id"] = rows[5]["id"] = "twice"
    rows[6]["text"] = "the tide turns twice a day " * 400_000
    pq.write_table(pa.Table.from_pylist(rows[:10]), folder / "1.parquet")
    table = pa.Table.from_pylist(rows[10:15]).drop_columns(["tags"])
    table = table.append_column("extra", pa.array(range(5)))
    schema = table.schema.set(
        table.schema.get_field_index("text"), pa.field("text", pa.large_string())
    )
    pq.write_table(table.cast(schema), folder / "2.parquet")
    pq.write_table(table.slice(0, 0), folder / "3-empty.parquet")
    pq.write_table(pa.Table.from_pylist(rows[15:]), folder / "4.parquet")
    return folder


def test_mixed_parquet(
    tmp_path: Path, mixed: Path, model: dict[str, Any], shallow: Encoder
) -> None:
    with pytest.raises(ValueError, match=r"1\.parquet, row 3 \(the first is 0\): null; on_bad="):
        embed_corpus(mixed, tmp_path / "out", **model)
    report = embed_corpus(mixed, tmp_path / "out", on_bad="skip", shard_rows=8, **model)
    assert (report.rows, report.bad, report.cut) == (19, {"null": 1}, 1)
    table = read(tmp_path / "out")
    kept = [row for row in range(20) if row != 3]
    assert table["source_row"].to_pylist() == kept
    # a column that a file lacks is null in its rows; equal ids are two rows
    assert table["extra"].to_pylist() == [None] * 9 + list(range(5)) + [None] * 5
    assert [tags is None for tags in table["tags"].to_pylist()] == [
        row in range(10, 15) for row in kept
    ]
    assert table["id"].to_pylist()[3:5] == ["twice", "twice"]
    assert len(table["text"][5].as_py()) == 10_800_000
    expected = shallow.encode_document([text.as_py()[:50_000] for text in table["text"]])
    np.testing.assert_allclose(vectors_of(table), expected, atol=2e-6)
    manifest = json.loads((tmp_path / "out" / "_manifest.json").read_text())
    assert manifest["totals"] == {"rows": 19, "left_out": {"null": 1}, "shards": 3}
    assert "1.parquet, row 3" in manifest["input"]["bad_examples"][0]


def test_bad_rows_of_text_formats(tmp_path: Path, model: dict[str, Any]) -> None:
    (tmp_path / "a.csv").write_bytes(
        b'id,text\n1,fine\n2,\xff\xfe bad\n3,too,many\n4,"two\nlines"\n\n5,\xc3\xa9\n6\n7,end\n'
    )
    report = embed_corpus(tmp_path / "a.csv", tmp_path / "csv", on_bad="skip", **model)
    table = read(tmp_path / "csv")
    assert table["id"].to_pylist() == ["1", "4", "5", "7"]
    assert table["source_row"].to_pylist() == [0, 3, 4, 6]
    assert table["text"].to_pylist() == ["fine", "two\nlines", "é", "end"]
    assert sum(report.bad.values()) == 3
    (tmp_path / "b.jsonl").write_bytes(
        b'{"text": "a"}\n{"text": 5}\n\n[1]\n{"text": "\\ud800"}\n{"body": 1}\n\xff\n'
        b'{"text": "h"}\n{"te'
    )
    report = embed_corpus(tmp_path / "b.jsonl", tmp_path / "o.jsonl", on_bad="skip", **model)
    lines = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [(line["source_row"], line["text"]) for line in lines] == [(0, "a"), (6, "h")]
    assert sum(report.bad.values()) == 6
    assert report.bad["not UTF-8"] == 1
    (tmp_path / "c.txt").write_bytes(b"one\n\xff\nthree\n")
    embed_corpus(tmp_path / "c.txt", tmp_path / "c", on_bad="skip", **model)
    assert read(tmp_path / "c")["source_row"].to_pylist() == [0, 2]


def test_a_number_of_json_without_end_is_a_bad_row(tmp_path: Path) -> None:
    lines = ['{"text": "a"}', '{"text": "b", "n": ' + "1" * 5000 + "}", '{"text": "c"}']
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    sources = find_sources(tmp_path)
    with pytest.raises(ValueError, match=r"in\.jsonl, row 1 .*: not JSON: .*digits"):
        make_plan(sources, shard_rows=10, form="jsonl")
    plan = make_plan(sources, on_bad="skip", shard_rows=10, form="jsonl")
    assert (plan.rows, plan.bad) == (2, {"not JSON": 1})


def test_blank_lines_of_jsonl_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('\n{"text": "a"}\n\n \r\n{"text": "b"}\n{"text": "c"}\n\n')
    plan = make_plan(find_sources(tmp_path), shard_rows=1, form="jsonl")
    reader = ShardReader(plan)
    windows = [window for shard in (2, 0, 1) for window in reader.windows(shard, 40)]
    assert [(window.rows.tolist(), window.texts) for window in windows] == [
        ([2], ["c"]),
        ([0], ["a"]),
        ([1], ["b"]),
    ]


def test_suffixes(tmp_path: Path) -> None:
    (tmp_path / "A.JSONL").write_text('{"text": "a"}')
    assert find_sources(tmp_path)[0].format == "jsonl"
    (tmp_path / "b.jsonl.gz").write_bytes(b"")
    for given in (tmp_path, tmp_path / "b.jsonl.gz", f"{tmp_path}/*", tmp_path.as_uri()):
        with pytest.raises(ValueError, match=r"b\.jsonl\.gz is compressed"):
            find_sources(given)


def test_blocks_of_encoded_parquet_are_small(tmp_path: Path) -> None:
    # one value, which the file has once, and a row group of many rows
    text = pa.array(["word " * 20_000]).cast(pa.string())
    table = pa.table({"text": text.take(pa.array([0] * 600)), "id": list(range(600))})
    pq.write_table(table, tmp_path / "in.parquet")
    blocks = list(read_blocks(find_sources(tmp_path)[0], "text"))
    assert max(len(block.texts) for block in blocks) <= 64
    ids = [row for block in blocks for row in block.columns.column("id").to_pylist()]
    assert ids == list(range(600))


def test_text_that_is_not_utf8_in_parquet(tmp_path: Path, model: dict[str, Any]) -> None:
    array = pa.array([b"fine", b"\xff\xfe", None, b"also"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": array, "id": [1, 2, 3, 4]}), tmp_path / "in.parquet")
    report = embed_corpus(
        tmp_path / "in.parquet", tmp_path / "out", on_bad="skip", columns=["id"], **model
    )
    assert report.bad == {"not UTF-8": 1, "null": 1}
    assert read(tmp_path / "out")["id"].to_pylist() == [1, 4]


def damaged_parquet(path: Path) -> None:
    """A file whose footer is whole and whose pages are not."""
    write(path, make_rows(400))
    content = bytearray(path.read_bytes())
    content[200 : len(content) // 2] = bytes(len(content) // 2 - 200)
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    write(path, make_rows(200))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


BROKEN = {
    "parquet cut short": ("in.parquet", cut_short, "not a whole parquet file"),
    "parquet of no bytes": ("in.parquet", lambda path: path.write_bytes(b""), "not a whole"),
    "parquet with damaged pages": ("in.parquet", damaged_parquet, "not a whole parquet file"),
    "arrow cut short": ("in.arrow", cut_short, "not a whole arrow file"),
    "arrow stream cut short": ("in.arrows", cut_short, "not a whole arrow file"),
    "csv cut in a quote": (
        "in.csv",
        lambda path: path.write_text('id,text\n1,a\n2,"cut he'),
        "ends within a quoted value",
    ),
    "csv without the column": (
        "in.csv",
        lambda path: path.write_text("id,body\n1,a\n"),
        "no column 'text'; its header is id, body",
    ),
    "numbers for text": (
        "in.parquet",
        lambda path: pq.write_table(pa.table({"text": [1, 2]}), path),
        "column 'text' holds int64, expected text",
    ),
    "one column in two types": (
        "in.jsonl",
        lambda path: path.write_text('{"text": "a", "x": 1}\n{"text": "b", "x": "one"}\n'),
        "column 'x' has no one type",
    ),
    "a column the output adds": (
        "in.jsonl",
        lambda path: path.write_text('{"text": "a", "embedding": 1}\n'),
        "already has 'embedding'",
    ),
    "dates for JSON": (
        "in.parquet",
        lambda path: pq.write_table(
            pa.table({"text": ["a"], "when": pa.array([[0]], pa.list_(pa.timestamp("s")))}), path
        ),
        "column 'when' holds list.*timestamp.*, which JSON has no value for",
    ),
    "numbered already": (
        "in.parquet",
        lambda path: pq.write_table(pa.table({"text": ["a"], "source_row": [1]}), path),
        "already has 'source_row'",
    ),
}


@pytest.mark.parametrize("case", list(BROKEN))
def test_broken_files_are_refused_whatever_the_policy(
    tmp_path: Path, case: str, model: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, make, message = BROKEN[case]
    make(tmp_path / name)
    monkeypatch.setattr("nomoe.corpus.run.Embedder", None)
    monkeypatch.setattr("nomoe.corpus.workers.Embedder", None)
    out = tmp_path / ("out.jsonl" if "JSON" in case else "out")
    with pytest.raises(ValueError, match=message):
        embed_corpus(tmp_path / name, out, on_bad="skip", **model)
    assert not list(tmp_path.glob("out/[!.]*"))
    assert not list(tmp_path.glob("*out.jsonl*"))


def test_a_csv_cut_between_quotes_loses_its_last_row_alone(
    tmp_path: Path, model: dict[str, Any]
) -> None:
    (tmp_path / "in.csv").write_text("text,id\na,1\nb,2\nc")
    with pytest.raises(ValueError, match=r"row 2 .*: 1 values, expected 2"):
        embed_corpus(tmp_path / "in.csv", tmp_path / "out", **model)
    assert embed_corpus(tmp_path / "in.csv", tmp_path / "o", on_bad="skip", **model).rows == 2


def test_types_that_change_between_files(tmp_path: Path, model: dict[str, Any]) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    pq.write_table(pa.table({"text": ["a"], "n": pa.array([1], pa.int32())}), folder / "1.parquet")
    pq.write_table(pa.table({"text": ["b"], "n": pa.array([2.5])}), folder / "2.parquet")
    embed_corpus(folder, tmp_path / "out", **model)
    assert read(tmp_path / "out")["n"].to_pylist() == [1, 2.5]
    pq.write_table(pa.table({"text": ["c"], "n": ["three"]}), folder / "3.parquet")
    with pytest.raises(ValueError, match=r"3\.parquet: column 'n' holds string, but double before"):
        embed_corpus(folder, tmp_path / "other", **model)
    embed_corpus(folder, tmp_path / "other", columns=["text"], **model)
    assert read(tmp_path / "other").num_rows == 3


@pytest.mark.parametrize(
    "values",
    [
        pa.array([{}, {}]),
        pa.array([[{}], []]),
        pa.array([(1, 2, 3)] * 2, pa.month_day_nano_interval()),
        pa.UnionArray.from_sparse(
            pa.array([0, 1], pa.int8()), [pa.array([1, 2]), pa.array(["a", "b"])]
        ),
    ],
)
def test_types_that_parquet_has_not_are_refused_when_planning(tmp_path: Path, values: Any) -> None:
    table = pa.table({"text": ["a", "b"], "n": values})
    with pa.ipc.new_file(tmp_path / "in.arrow", table.schema) as writer:
        writer.write_table(table)
    sources = find_sources(tmp_path / "in.arrow")
    with pytest.raises(ValueError, match=r"column 'n' holds .*, which Parquet cannot hold"):
        make_plan(sources, shard_rows=10, form="parquet")
    assert make_plan(sources, columns=[], shard_rows=10, form="parquet").rows == 2


def test_a_type_of_no_value_becomes_text_wherever_it_is(
    tmp_path: Path, model: dict[str, Any]
) -> None:
    rows = [{"text": "a", "n": [], "m": {"k": None}, "o": [{"p": []}], "q": None}]
    embed_corpus(write(tmp_path / "in.jsonl", rows), tmp_path / "out", **model)
    table = pa.table({key: [value] for key, value in rows[0].items()})
    with pa.ipc.new_file(tmp_path / "in.arrow", table.schema) as writer:
        writer.write_table(table)
    embed_corpus(tmp_path / "in.arrow", tmp_path / "arrow", **model)
    for out in ("out", "arrow"):
        table = read(tmp_path / out).drop_columns(["source_row", "embedding"])
        assert table.to_pylist() == rows
        assert "null" not in str([field.type for field in table.schema])


INT, LARGE = 2**53 + 1, 2**63 + 5


def typed_pair(folder: Path, first: Any, second: Any) -> Path:
    folder.mkdir()
    pq.write_table(pa.table({"text": ["a"], "n": first}), folder / "1.parquet")
    pq.write_table(pa.table({"text": ["b"], "n": second}), folder / "2.parquet")
    return folder


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (pa.array([INT]), pa.array([0.5])),
        (pa.array([LARGE], pa.uint64()), pa.array([-5])),
        (pa.array([Decimal("12345678901234567891")]), pa.array([0.5])),
        (pa.array([16777217], pa.int32()), pa.array([0.5], pa.float32())),
        (pa.array([[INT]]), pa.array([[0.5]])),
        (pa.array([{"x": INT}]), pa.array([{"x": 0.5}])),
        (pa.array([10**10], pa.timestamp("s")), pa.array([1], pa.timestamp("ns"))),
        (pa.array(["a"]), pa.array([b"\xff"])),
        (pa.array([True]), pa.array([2])),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_types_that_lose_something_are_refused(
    tmp_path: Path, first: Any, second: Any, turned: bool, model: dict[str, Any]
) -> None:
    pair = (second, first) if turned else (first, second)
    folder = typed_pair(tmp_path / "in", *pair)
    with pytest.raises(ValueError, match=r"2\.parquet: column 'n' holds .*, but .* before"):
        make_plan(find_sources(folder), shard_rows=10, form="parquet")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (pa.array([-(2**31)], pa.int32()), pa.array([2**62])),
        (pa.array([2**32 - 1], pa.uint32()), pa.array([-5])),
        (pa.array([2**32 - 1], pa.uint32()), pa.array([-5], pa.int8())),
        (pa.array([2**31 - 1], pa.int32()), pa.array([0.1])),
        (pa.array([0.1], pa.float32()), pa.array([0.1])),
        (pa.array(["a"]), pa.array(["b"], pa.large_string())),
        (pa.array(["a"]).dictionary_encode(), pa.array(["b"])),
        (
            pa.array(["a"]).dictionary_encode(),
            pa.array(["b"]).cast(pa.dictionary("int8", "string")),
        ),
        (pa.nulls(1), pa.array([[{"x": 1}]])),
        (pa.array([[None]]), pa.array([["b"]])),
        (pa.array([{"x": 1, "y": None}]), pa.array([{"x": INT, "y": "b"}])),
        (pa.array([Decimal("1.25")]), pa.array([Decimal("123456.5")])),
        (
            pa.array([[1, 2]], pa.list_(pa.int32(), 2)),
            pa.array([[1, 2, 3]], pa.list_(pa.int64(), 3)),
        ),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_types_that_widen_lose_nothing(
    tmp_path: Path, first: Any, second: Any, turned: bool, model: dict[str, Any]
) -> None:
    pair = (second, first) if turned else (first, second)
    folder = typed_pair(tmp_path / "in", *pair)
    embed_corpus(folder, tmp_path / "out", **model)
    expected = [one for values in pair for one in values.to_pylist()]
    assert read(tmp_path / "out")["n"].to_pylist() == expected


def test_numbers_of_json_widen_where_they_lose_nothing(
    tmp_path: Path, model: dict[str, Any]
) -> None:
    values = [1, 0.5, [1], [0.5], {"x": 3}, {"x": 0.25}]
    for index in range(0, 6, 2):
        folder = tmp_path / str(index)
        folder.mkdir()
        for name, value in zip("ab", values[index : index + 2], strict=True):
            write(folder / f"{name}.jsonl", [{"text": "t", "n": value}])
        embed_corpus(folder, tmp_path / f"out{index}", **model)
        assert read(tmp_path / f"out{index}")["n"].to_pylist() == values[index : index + 2]
        for large in (INT, [INT], {"x": INT}):
            write(folder / "c.jsonl", [{"text": "t", "n": large}])
            with pytest.raises(ValueError, match=r"c\.jsonl: column 'n' holds"):
                make_plan(find_sources(folder), shard_rows=10, form="parquet")
            (folder / "c.jsonl").unlink()
    write(tmp_path / "a.jsonl", [{"text": "t", "n": INT}])
    write(tmp_path / "b.jsonl", [{"text": "t", "n": 0.5}])
    with pytest.raises(ValueError, match=r"b\.jsonl: column 'n' holds double, but int64 before"):
        make_plan(find_sources(f"{tmp_path}/*.jsonl"), shard_rows=10, form="parquet")


@pytest.mark.parametrize("out", ["out", "o.parquet", "o.jsonl", "o.npy"])
def test_empty_input(tmp_path: Path, out: str, model: dict[str, Any]) -> None:
    pq.write_table(
        pa.table({"text": pa.array([], pa.string()), "n": [1][:0]}), tmp_path / "i.parquet"
    )
    assert embed_corpus(tmp_path / "i.parquet", tmp_path / out, **model).rows == 0
    if out.endswith(".npy"):
        assert np.load(tmp_path / out).shape == (0, 96)
    elif out.endswith(".jsonl"):
        assert (tmp_path / out).read_bytes() == b""
    else:
        table = pq.read_table(tmp_path / out)
        assert table.column_names == ["source_row", "text", "n", "embedding"]
        assert table.num_rows == 0
    for name in ("no.txt", "no.csv", "no.jsonl"):
        (tmp_path / name).write_bytes(b"")
        assert embed_corpus(tmp_path / name, tmp_path / f"{name}.npy", **model).rows == 0


def test_a_huge_text_is_cut_without_a_change(shallow_folder: Path) -> None:
    tokenize = WindowTokenizer(resolve_settings(shallow_folder, device="cpu", max_seq_length=64))
    words = " ".join(make_texts(400))
    mostly_spaces = "a" + " " * 9000 + "b " * 30
    no_spaces = "".join(words.split())
    texts = [words, mostly_spaces, no_spaces, "short", words[:4097], ""]
    found = tokenize(texts)
    prompted = [f"search_document: {text}" for text in texts]
    expected = tokenize._tokenizer(prompted, 64)
    assert found.ids == expected.ids
    assert sorted(position for position, _ in found.cut) == [p for p, _ in expected.cut]


@pytest.mark.parametrize("normalizer", [None, tokenizers.normalizers.NFKC()])
def test_texts_without_spaces_are_cut_without_a_change(
    shallow_folder: Path, normalizer: Any
) -> None:
    """Against the whole text's ids, for a vocabulary in which pieces overlap at random."""
    tokenize = WindowTokenizer(resolve_settings(shallow_folder, device="cpu", max_seq_length=8))
    generator = np.random.default_rng(0)
    han, kana, thai = "的一是不了人我在有他", "あいうえおがぱー", "กขคงจา่"
    others = ["abcXé", "한국어", "。，！", "葛\U000e0100か\u3099", "\u0301\u200d", "\n\t\u3000"]
    pieces = {"".join(generator.choice(list(han), size)) for size in (1, 2, 2, 3, 4, 6) * 4}
    pieces |= {kana[0:2], thai[1:3], "人a", "。的", "い的"}
    special = [(name, 0.0) for name in ("<s>", "<pad>", "</s>", "<unk>", "▁")]
    scored = [(piece, -float(generator.uniform(1, 9))) for piece in sorted(pieces)]
    backend = tokenize._tokenizer.backend
    backend.model = tokenizers.models.Unigram(special + scored, unk_id=3, byte_fallback=False)
    if normalizer is not None:
        backend.normalizer = normalizer
    fewer = 0
    for script in (han, han[:4], han + kana, han + thai, han + "".join(others), kana, thai):
        texts = ["".join(generator.choice(list(script), 1200)) for _ in range(40)]
        prompted = [f"search_document: {text}" for text in texts]
        expected = tokenize._tokenizer(prompted, 8)
        found = tokenize(texts)
        assert found.ids == expected.ids
        assert sorted(p for p, _ in found.cut) == [p for p, _ in expected.cut]
        fewer += sum(dict(found.cut)[p] < length for p, length in expected.cut)
    # and most were indeed cut before they were tokenised
    assert fewer > 100


def test_jsonl_has_null_where_json_has_no_number(tmp_path: Path, model: dict[str, Any]) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(
        '{"text": "a", "x": NaN, "y": [1.5, {"z": -Infinity}], "s": "\\ud800"}\n'
        '{"text": "b", "x": 2.5, "y": [Infinity], "s": "NaN"}\n'
    )

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    embed_corpus(source, tmp_path / "out.jsonl", **model)
    lines = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [(row["x"], row["y"], row["s"]) for row in rows] == [
        (None, [1.5, {"z": None}], "\ud800"),
        (2.5, [None], "NaN"),
    ]


def test_text_files_have_one_column_and_a_mark_is_no_line(
    tmp_path: Path, model: dict[str, Any]
) -> None:
    source = tmp_path / "in.txt"
    source.write_bytes(b"\xef\xbb\xbf")
    assert embed_corpus(source, tmp_path / "out.npy", **model).rows == 0
    source.write_bytes(b"\xef\xbb\xbf\nb\n")
    assert [block.texts for block in read_blocks(find_sources(source)[0], "text")] == [["", "b"]]
    with pytest.raises(ValueError, match=r"no column 'body'; a \.txt file has one, 'text'"):
        embed_corpus(source, tmp_path / "out", column="body", **model)


# --- what decides a run ---


def test_a_rerun_finishes_what_is_missing_and_nothing_else(
    tmp_path: Path, model: dict[str, Any]
) -> None:
    source, out = write(tmp_path / "in.jsonl", make_rows(100)), tmp_path / "out"
    options = {"shard_rows": 30, **model}
    embed_corpus(source, out, **options)
    before = {path.name: path.read_bytes() for path in out.glob("part-*")}
    assert len(before) == 4
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*")}
    (out / "part-000001.parquet").unlink()
    (out / "part-000003.parquet").write_bytes(before["part-000003.parquet"][:-100])
    (out / ".part-000001.parquet.0123abcd").write_bytes(b"left by a killed run")
    # the settings that the first run chose are found in the manifest
    report = embed_corpus(source, out, **model)
    assert (report.found, report.embedded, report.rows) == (2, 40, 100)
    assert {path.name: path.read_bytes() for path in out.glob("part-*")} == before
    assert not list(out.glob(".part*"))
    for name in ("part-000000.parquet", "part-000002.parquet"):
        assert (out / name).stat().st_mtime_ns == times[name]
    report = embed_corpus(source, out, **model)
    assert (report.found, report.embedded) == (4, 0)


CHANGED = {
    "dim": ({"dim": 64}, "dim was 96 and is now 64"),
    "precision": ({"precision": "int8"}, "precision was 'float32' and is now 'int8'"),
    "prompt": ({"prompt_name": "query"}, "prompt was 'search_document: ' and is now 'search_query"),
    "dtype": ({"dtype": "bfloat16"}, "dtype was 'float32' and is now 'bfloat16'"),
    "length": ({"max_seq_length": 100}, "max_seq_length was 512 and is now 100"),
    "batches": ({"batch_tokens": 100}, "batch_tokens was 4096 and is now 100"),
    "columns": ({"columns": ["id"]}, r"columns was None and is now \['id'\]"),
    "text column": ({"column": "id"}, "column was 'text' and is now 'id'"),
    "policy": ({"on_bad": "skip"}, "on_bad was 'fail' and is now 'skip'"),
    "limit": ({"limit": 10}, "limit was None and is now 10"),
    "shards": ({"shard_rows": 31}, "shard_rows was 30 and is now 31"),
}


@pytest.fixture
def begun(tmp_path: Path, model: dict[str, Any]) -> tuple[Path, Path]:
    source, out = write(tmp_path / "in.jsonl", make_rows(60)), tmp_path / "out"
    embed_corpus(source, out, shard_rows=30, **model)
    (out / "part-000001.parquet").unlink()
    return source, out


@pytest.mark.parametrize("case", list(CHANGED))
def test_a_changed_setting_is_refused_by_name(
    begun: tuple[Path, Path], case: str, model: dict[str, Any]
) -> None:
    change, message = CHANGED[case]
    with pytest.raises(ValueError, match=f"begun with other settings.*{message}"):
        embed_corpus(*begun, **(model | change))
    assert not (begun[1] / "part-000001.parquet").exists()


def test_changed_weights_and_versions_are_refused(
    tmp_path: Path, begun: tuple[Path, Path], model: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    copy = shutil.copytree(model["model"], tmp_path / "copy")
    # the same weights elsewhere are the same model
    embed_corpus(*begun, **(model | {"model": copy}))
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-4:] = b"\0\0\0\0"
    weights.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"sha256 of model\.safetensors was '\w+' and is now '\w+'"
    ):
        embed_corpus(*begun, **(model | {"model": copy}))
    monkeypatch.setattr("nomoe.corpus.request.__version__", "9.9")
    with pytest.raises(ValueError, match=r"version was '0\.1\.0' and is now '9\.9'"):
        embed_corpus(*begun, **model)


def test_a_changed_input_is_refused_and_a_moved_one_is_not(
    begun: tuple[Path, Path], model: dict[str, Any]
) -> None:
    source, out = begun
    content = source.read_text()
    changed = content.replace('"00007"', '"00070"')
    assert len(changed) == len(content)
    source.write_text(changed)
    with pytest.raises(ValueError, match=r"begun with another input: .*in\.jsonl has changed"):
        embed_corpus(source, out, **model)
    source.write_text(content)
    extra = write(source.with_name("more.jsonl"), make_rows(1))
    with pytest.raises(ValueError, match="it was 1 files and is now 2"):
        embed_corpus([source, extra], out, **model)
    moved = source.rename(source.with_name("moved.jsonl"))
    assert embed_corpus(moved, out, **model).embedded == 30


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_changed_value_of_a_typed_file_is_seen(
    tmp_path: Path, suffix: str, model: dict[str, Any]
) -> None:
    rows = make_rows(40)
    source, out = write(tmp_path / f"in{suffix}", rows), tmp_path / "out"
    embed_corpus(source, out, **model)
    for column in ("text", "id"):
        changed = [dict(row) for row in rows]
        changed[20][column] = changed[20][column][:-1] + "Z"
        write(source, changed)
        with pytest.raises(ValueError, match="has changed"):
            embed_corpus(source, out, **model)


def test_an_input_that_changes_during_a_run_ends_it(
    begun: tuple[Path, Path], model: dict[str, Any]
) -> None:
    source, _ = begun
    plan = make_plan(find_sources(source), shard_rows=30, form="parquet")
    content, modified = source.read_text(), source.stat().st_mtime_ns
    # as many rows, and as many bytes
    source.write_text(content.replace('"00040"', '"00041"'))
    with pytest.raises(RuntimeError, match=r"in\.jsonl changed after it was read first"):
        list(ShardReader(plan).windows(1, 4096))
    # fewer rows, as they may be found behind the file system's back
    padding = " " * (len(content) - len(content[: content.index('{"id": "00040"')]))
    source.write_text(content[: content.index('{"id": "00040"')] + padding)
    os.utime(source, ns=(modified, modified))
    with pytest.raises(RuntimeError, match=r"in\.jsonl changed after it was read first"):
        list(ShardReader(plan).windows(1, 4096))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_an_input_that_changes_while_a_shard_is_read_ends_it(tmp_path: Path, suffix: str) -> None:
    rows = make_rows(90)
    source = write(tmp_path / f"in{suffix}", rows)
    plan = make_plan(find_sources(source), shard_rows=45, form="parquet")
    windows = ShardReader(plan).windows(0, 40)
    next(windows)
    # in place, so that the open file has the new bytes
    content = source.read_bytes()
    with source.open("r+b") as file:
        file.write(content)
    os.utime(source, (time.time() + 1,) * 2)
    with pytest.raises(RuntimeError, match="changed after it was read first"):
        list(windows)


def test_the_identity_of_a_run_is_hashed_once(
    begun: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read_manifest(begun[1])
    assert manifest is not None
    expected = shard_metadata(manifest, 1)
    monkeypatch.setattr("nomoe.corpus.manifest.hashlib", None)
    assert shard_metadata(manifest, 1) == expected


def test_folders_that_are_not_ours(
    tmp_path: Path, begun: tuple[Path, Path], model: dict[str, Any]
) -> None:
    source, out = begun
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds precious\.txt but no _manifest\.json"):
        embed_corpus(source, other, **model)
    assert os.listdir(other) == ["precious.txt"]
    # a shard of another run under a name of this one
    embed_corpus(source, tmp_path / "more", shard_rows=30, dim=32, **model)
    foreign = (tmp_path / "more" / "part-000001.parquet").read_bytes()
    (out / "part-000001.parquet").write_bytes(foreign)
    with pytest.raises(ValueError, match=r"part-000001\.parquet was made by another run"):
        embed_corpus(source, out, **model)
    own = (out / "part-000000.parquet").read_bytes()
    (out / "part-000001.parquet").write_bytes(own)
    with pytest.raises(ValueError, match=r"part-000001\.parquet was made by another run"):
        embed_corpus(source, out, **model)
    (out / "part-000001.parquet").unlink()
    (out / "part-000002.parquet").write_bytes(own)
    with pytest.raises(ValueError, match=r"part-000002\.parquet is no shard of this run"):
        embed_corpus(source, out, **model)
    manifest = out / "_manifest.json"
    manifest.write_text(manifest.read_text().replace('"dim": 96', '"dim": 64'))
    with pytest.raises(ValueError, match="changed by hand"):
        embed_corpus(source, out, **model)
    manifest.write_text("{}")
    with pytest.raises(ValueError, match="not a manifest of nomoe"):
        embed_corpus(source, out, **model)


def test_bad_calls_are_refused_before_the_input_is_read(
    tmp_path: Path, model: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "in.jsonl", make_rows(3))
    monkeypatch.setattr("nomoe.corpus.request.make_plan", None)
    out = tmp_path / "out"
    for options, error, message in (
        ({"dim": 97}, ValueError, "dim is 97, expected 1 to 96"),
        ({"precision": "int4"}, ValueError, "precision is 'int4'"),
        ({"precision": "binary", "dim": 65}, ValueError, "no multiple of 8"),
        ({"prompt_name": "nope"}, ValueError, "no prompt is named 'nope'; known: "),
        ({"max_seq_length": 2}, ValueError, "max_seq_length is 2"),
        ({"on_bad": "ignore"}, ValueError, "on_bad is 'ignore'"),
        ({"limit": 0}, ValueError, "limit is 0"),
        ({"workers": 0}, ValueError, "workers is 0"),
        ({"batch_tokens": 0}, ValueError, "batch_tokens is 0"),
        ({"columns": "id"}, TypeError, "columns is a str"),
        ({"overwrite": True}, ValueError, "overwrite is for one file"),
        ({"model": tmp_path}, FileNotFoundError, "config.json"),
    ):
        with pytest.raises(error, match=message):
            embed_corpus(source, out, **(model | options))
    for target, options, message in (
        (tmp_path / "o.csv", {}, "suffix '.csv'"),
        (tmp_path / "o.npy", {"on_bad": "skip"}, "no room for row numbers"),
        (tmp_path / "o.jsonl", {"workers": 2}, "one process writes"),
    ):
        with pytest.raises(ValueError, match=message):
            embed_corpus(source, target, **model, **options)
    with pytest.raises(FileNotFoundError, match="no folder"):
        embed_corpus(source, tmp_path / "a" / "b", **model)
    with pytest.raises(ValueError, match="would be input of the next run"):
        embed_corpus(tmp_path, tmp_path / "inside", **model)
    for given, message in (
        (tmp_path / "none.jsonl", "there is no file or folder"),
        (tmp_path / "*.parquet", "no file matches"),
        ((tmp_path / "absent").as_uri(), "there is no file or folder"),
        (tmp_path.as_uri() + "/*.parquet", "no file matches"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            embed_corpus(str(given), out, **model)
    (tmp_path / "x.doc").write_text("")
    (tmp_path / "x.txt").write_text("")
    for inputs, message in (
        (tmp_path / "x.doc", "suffix '.doc'"),
        (tmp_path, "several formats"),
        ([source, source], "named twice"),
        ([], "no input"),
        ("what://is/this", "no URI that pyarrow opens"),
    ):
        with pytest.raises(ValueError, match=message):
            embed_corpus(inputs, tmp_path.parent / "elsewhere", **model)
    assert not out.exists()


def test_keywords_are_the_functions_own(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"embed_corpus\(\) got an unexpected .* 'colums'"):
        embed_corpus(tmp_path, tmp_path / "out", colums=["id"])
    shown = inspect.signature(embed_corpus).parameters
    expected = inspect.signature(make_request).parameters
    assert {name: shown[name].default for name in expected} == {
        name: one.default for name, one in expected.items()
    }
    assert set(shown) - set(expected) == {"overwrite"}


def test_an_output_that_would_be_input_is_refused(
    tmp_path: Path, model: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nomoe.corpus.request.make_plan", None)
    folder = tmp_path / "in"
    folder.mkdir()
    source = write(folder / "a.jsonl", make_rows(3))
    typed = write(tmp_path / "b.parquet", make_rows(3))
    (tmp_path / "link").symlink_to(folder)
    content = source.read_bytes()
    for given, output in (
        (source, source),
        (source, tmp_path / "link" / "a.jsonl"),
        (source.as_uri(), source),
        ([source], folder / ".." / "in" / "a.jsonl"),
    ):
        with pytest.raises(ValueError, match="is an input file"):
            embed_corpus(given, output, overwrite=True, **model)
    for given, output in (
        (folder, folder / "out.jsonl"),
        (folder.as_uri(), folder / "out.jsonl"),
        (folder.as_uri(), folder / "vectors"),
        (tmp_path / "link", folder / "vectors"),
        (f"{tmp_path}/**/*.jsonl", tmp_path / "deep.jsonl"),
        (f"{folder.as_uri()}/*.jsonl", folder / "out.jsonl"),
        (f"{tmp_path}/**/*.parquet", tmp_path / "vectors"),
        (f"{tmp_path.as_uri()}/**/*.parquet", tmp_path / "vectors"),
        (f"{tmp_path}/link/../link/*.jsonl", folder / "out.jsonl"),
    ):
        with pytest.raises(ValueError, match="would be input of the next run"):
            embed_corpus(given, output, overwrite=output.suffix != "", **model)
    assert source.read_bytes() == content
    assert typed.exists()
    # what a pattern does not match may lie beside it
    monkeypatch.undo()
    embed_corpus(f"{folder}/*.jsonl", folder / "out", **model)
    embed_corpus(f"{folder}/*.jsonl", folder / "out.npy", **model)


# --- estimates ---


def test_estimates_say_what_they_rest_on(
    tmp_path: Path, model: dict[str, Any], shallow: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_rows(400)
    rows[7]["text"] = None
    source, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out"
    options = {"shard_rows": 200, "on_bad": "skip", **model}
    whole = estimate_corpus(source, out, **options)
    assert not out.exists()
    report = embed_corpus(source, out, **options)
    assert (whole.rows, whole.shards, whole.bad) == (399, 2, {"no text in column 'text'": 1})
    assert whole.tokens == report.tokens
    assert whole.sampled == 399
    size = sum(path.stat().st_size for path in out.glob("part-*"))
    assert whole.output_bytes == pytest.approx(size, rel=0.15)
    said = "\n".join(whole.lines())
    assert f"{report.tokens:,} (counted)" in said
    assert "tokens/s measured here" in said

    monkeypatch.setattr("nomoe.corpus.estimate._SAMPLE_TEXTS", 80)
    part = estimate_corpus(source, out, **options)
    assert 80 <= part.sampled < 399
    assert part.tokens == pytest.approx(report.tokens, rel=0.2)
    assert f"estimated from {part.sampled:,} texts" in "\n".join(part.lines())


def test_an_estimate_times_whole_batches(
    tmp_path: Path, model: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few texts were drawn: parts of one would say that the device is slow."""
    windows: list[int] = []

    class Watched(estimate.Embedder):
        def embed_texts(self, texts: Any, *rest: Any) -> Any:
            def watch() -> Any:
                for window in texts:
                    windows.append(len(window))
                    yield window

            return super().embed_texts(watch(), *rest)

    monkeypatch.setattr(estimate, "Embedder", Watched)
    source = write(tmp_path / "in.jsonl", make_rows(40))
    estimate_corpus(source, tmp_path / "out", batch_tokens=65_536, **model)
    # all fit into one batch: half of them warm up
    assert windows == [20, 20]


def test_an_estimate_reads_few_long_texts_and_leaves_out_what_is_done(
    tmp_path: Path, model: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_rows(400)
    source, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out"
    options = {"shard_rows": 100, **model}
    monkeypatch.setattr("nomoe.corpus.estimate._SAMPLE_BYTES", 100)
    part = estimate_corpus(source, out, **options)
    size = sum(len(row["text"].encode()) for row in rows)
    assert 0 < part.sampled * size / 400 < size / 2
    assert part.left == 400

    embed_corpus(source, out, **options)
    for index in (0, 2):
        (out / f"part-{index:06d}.parquet").unlink()
    again = estimate_corpus(source, out, **model)
    assert (again.rows, again.left, again.shards) == (400, 200, 4)
    expected = again.tokens / 2 / again.tokens_per_s
    assert again.seconds == pytest.approx(expected)
    assert "for 200 rows that are left" in "\n".join(again.lines())
    embed_corpus(source, out, **model)
    done = estimate_corpus(source, out, **model)
    assert (done.left, done.seconds) == (0, 0)
    assert "an earlier run has embedded every row" in "\n".join(done.lines())
    with pytest.raises(ValueError, match="dim was 96 and is now 64"):
        estimate_corpus(source, out, dim=64, **model)


def test_progress_is_logged_nowhere_and_cuts_once(
    tmp_path: Path, model: dict[str, Any], warnings_of_nomoe: pytest.LogCaptureFixture
) -> None:
    source = write(tmp_path / "in.jsonl", make_rows(50))
    embed_corpus(source, tmp_path / "out", shard_rows=10, max_seq_length=10, **model)
    assert [record.levelno for record in warnings_of_nomoe.records] == [logging.WARNING]
    assert "of 50 texts were longer than max_seq_length=10 tokens and were cut" in (
        warnings_of_nomoe.text
    )


@pytest.mark.parametrize("form", ["file", "folder"])
def test_a_dry_run_refuses_an_output_that_the_run_would(
    tmp_path: Path, shallow_folder: Path, form: str
) -> None:
    source = write(tmp_path / "in.parquet", make_rows(5))
    options: Any = {"model": shallow_folder, "device": "cpu"}
    if form == "file":
        out = tmp_path / "out.npy"
        out.write_bytes(b"mine")
        refused: Any = (FileExistsError, "exists; --overwrite replaces it")
    else:
        out = tmp_path / "out"
        out.mkdir()
        (out / "mine").write_bytes(b"mine")
        refused = (ValueError, r"holds mine but no _manifest\.json")
    before = sorted(tmp_path.rglob("*"))
    for run in (embed_corpus, estimate_corpus):
        with pytest.raises(refused[0], match=refused[1]):
            run(source, out, **options)
    if form == "file":
        assert estimate_corpus(source, out, overwrite=True, **options).rows == 5
    else:
        with pytest.raises(ValueError, match="overwrite is for one file"):
            estimate_corpus(source, tmp_path / "new", overwrite=True, **options)
        assert estimate_corpus(source, tmp_path / "new", **options).rows == 5
    assert sorted(tmp_path.rglob("*")) == before
