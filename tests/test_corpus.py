"""Corpora on one machine: which files are read, what is written, and every row of them once."""

from __future__ import annotations

import glob
import json
import os
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest

from nomoe import Encoder, embed_corpus
from nomoe.corpus.plan import make_plan
from nomoe.corpus.rows import Place, read_blocks
from nomoe.corpus.shards import ShardReader
from nomoe.corpus.sources import find_sources, look_again
from tests.corpora import make_rows, make_texts, read, vectors_of, write

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


# --- formats, in and out ---


@pytest.mark.parametrize(
    "suffix", [".parquet", ".arrow", ".arrows", ".feather", ".jsonl", ".csv", ".tsv", ".txt"]
)
def test_every_format_gives_the_encoders_vectors_row_for_row(
    tmp_path: Path, suffix: str, shallow_model: dict[str, Any], shallow: Encoder
) -> None:
    rows = make_rows(130)
    source = write(tmp_path / f"in{suffix}", rows)
    report = embed_corpus(source, tmp_path / "out", shard_rows=50, **shallow_model)
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
    tmp_path: Path, suffix: str, out: str, shallow_model: dict[str, Any]
) -> None:
    rows = make_rows(90)
    source = write(tmp_path / f"in{suffix}", rows)
    options = {"shard_rows": 40, **shallow_model}
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
    tmp_path: Path, precision: str, shallow_model: dict[str, Any], shallow: Encoder
) -> None:
    source = write(tmp_path / "in.txt", make_rows(40))
    embed_corpus(source, tmp_path / "out", precision=precision, dim=64, **shallow_model)
    embed_corpus(source, tmp_path / "out.npy", precision=precision, dim=64, **shallow_model)
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
    tmp_path: Path, shallow_model: dict[str, Any], shallow: Encoder
) -> None:
    texts = make_texts(30)
    source = write(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    embed_corpus(source, tmp_path / "q.npy", prompt_name="query", dim=32, **shallow_model)
    expected = shallow.encode_query(texts, truncate_dim=32)
    np.testing.assert_allclose(np.load(tmp_path / "q.npy"), expected, atol=2e-6)
    embed_corpus(source, tmp_path / "p.npy", prompt="classification: ", **shallow_model)
    expected = shallow.encode(texts, "Classification")
    np.testing.assert_allclose(np.load(tmp_path / "p.npy"), expected, atol=2e-6)
    report = embed_corpus(source, tmp_path / "short.npy", max_seq_length=8, **shallow_model)
    short = Encoder.from_pretrained(shallow_model["model"], device="cpu", max_seq_length=8)
    expected = short.encode_document(texts)
    np.testing.assert_allclose(np.load(tmp_path / "short.npy"), expected, atol=2e-6)
    lengths = [
        len(ids) for ids in short.tokenizer([f"search_document: {t}" for t in texts], 99).ids
    ]
    assert report.cut == sum(length > 8 for length in lengths) > 0
    assert report.tokens == sum(min(length, 8) for length in lengths)


def test_chosen_columns(tmp_path: Path, shallow_model: dict[str, Any]) -> None:
    for suffix in (".jsonl", ".parquet"):
        source = write(tmp_path / f"in{suffix}", make_rows(20))
        out = tmp_path / f"chosen{suffix[1:]}"
        embed_corpus(source, out, columns=["score", "id"], **shallow_model)
        table = read(out)
        assert table.column_names == ["source_row", "score", "id", "embedding"]
        assert table["id"].to_pylist() == [row["id"] for row in make_rows(20)]
        out = tmp_path / f"none{suffix[1:]}"
        embed_corpus(source, out, columns=[], **shallow_model)
        assert read(out).column_names == ["source_row", "embedding"]
        embed_corpus(source, out.with_suffix(".jsonl"), columns=["id"], **shallow_model)
        line = json.loads(out.with_suffix(".jsonl").read_text().splitlines()[3])
        assert set(line) == {"id", "embedding"}


def test_folders_patterns_lists_and_uris(tmp_path: Path, shallow_model: dict[str, Any]) -> None:
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
    texts = {"text": ["a"]}
    for wrong in (pa.table(texts), pa.array(["a"]), texts, [3], b"x.txt", None, 3):
        with pytest.raises(TypeError, match=r"the input is \w+, expected names .*Encoder\.encode"):
            find_sources(wrong)  # type: ignore[arg-type]
    # a shard may hold rows of several files
    embed_corpus(uri, tmp_path / "out", shard_rows=25, **shallow_model)
    embed_corpus(folder, tmp_path / "here", shard_rows=25, **shallow_model)
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
    tmp_path: Path, form: str, shallow_model: dict[str, Any]
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
            embed_corpus(f"{uri}?use_mmap=true", folder / "out.jsonl", **shallow_model)


def test_a_pattern_may_hold_what_looks_like_an_option(tmp_path: Path) -> None:
    (tmp_path / "shard").mkdir()
    write(tmp_path / "shard" / "in.jsonl", make_rows(3))
    write(tmp_path / "shardXid=3.jsonl", make_rows(3))
    (source,) = find_sources(f"file://{tmp_path}/shard?id=*.jsonl")
    assert source.path == f"file://{tmp_path}/shardXid=3.jsonl"
    with pytest.raises(FileNotFoundError, match="a question mark of a name is %3F"):
        find_sources(f"file://{tmp_path}/q?id=3.jsonl")


def found_by(pattern: str) -> list[str]:
    try:
        return sorted(unquote(one.path).removeprefix("file://") for one in find_sources(pattern))
    except FileNotFoundError:
        return []


@pytest.mark.parametrize(
    "pattern",
    [
        *("[a9].txt", "[a-z].txt", "[!a].txt", "[^a].txt", "[9-0].txt", "[z-a9].txt", "[!9-0].txt"),
        *(
            "[]].txt",
            "[!]].txt",
            "[!].txt",
            "[].txt",
            "[a.txt",
            "[[]a.txt",
            "[a&&b].txt",
            "[-a].txt",
        ),
        *("[.]a.txt", "[!b]a.txt", ".[a].txt", "d[/]e.txt", "*/[d]/e.txt", "**/d[!a]e.txt"),
    ],
)
def test_a_class_in_a_pattern_means_what_it_means_to_glob(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "d" / "d").mkdir(parents=True)
    names = [
        "a",
        "z",
        "9",
        "^",
        "]",
        "-",
        "&",
        "[a",
        "[]",
        "[!]",
        ".a",
        "xa",
        "d/e",
        "d/d/e",
        "d-e",
    ]
    for name in names:
        (tmp_path / f"{name}.txt").write_text(name)
    wanted = sorted(glob.glob(f"{tmp_path}/{pattern}", recursive=True))
    assert found_by(f"{tmp_path}/{pattern}") == wanted
    assert found_by(f"file://{tmp_path}/{pattern}") == wanted


@pytest.mark.skipif(sys.platform != "linux", reason="names are Unicode there")
def test_names_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    with open(os.fsencode(tmp_path) + b"/\xff.txt", "wb") as file:
        file.write(b"text\n")
    for given in (tmp_path, f"{tmp_path}/*.txt", f"file://{tmp_path}", f"file://{tmp_path}/*.txt"):
        with pytest.raises(ValueError, match="a name that is not UTF-8; rename the file"):
            find_sources(given)


def test_lines_from_a_uri(tmp_path: Path, shallow_model: dict[str, Any]) -> None:
    for suffix in (".jsonl", ".csv"):
        source = write(tmp_path / f"in{suffix}", make_rows(70))
        out = tmp_path / suffix[1:]
        embed_corpus(source.as_uri(), out, shard_rows=30, **shallow_model)
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


def test_limit(tmp_path: Path, shallow_model: dict[str, Any]) -> None:
    write(tmp_path / "a.jsonl", make_rows(30))
    write(tmp_path / "b.jsonl", make_rows(30))
    inputs = str(tmp_path / "*.jsonl")
    assert (
        embed_corpus(inputs, tmp_path / "out", limit=41, shard_rows=25, **shallow_model).rows == 41
    )
    ids = [row["id"] for row in make_rows(30)]
    assert read(tmp_path / "out")["id"].to_pylist() == ids + ids[:11]
