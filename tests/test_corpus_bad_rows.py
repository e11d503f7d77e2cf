"""Corpora with rows, files, types and texts that need care: refused, left out, widened or cut."""

from __future__ import annotations

import errno
import io
import json
import re
from collections.abc import Callable
from decimal import Decimal
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tokenizers

from nomoe import Encoder, embed_corpus
from nomoe.corpus.embedder import WindowTokenizer, resolve_settings
from nomoe.corpus.outputs import ParquetOutput
from nomoe.corpus.plan import make_plan
from nomoe.corpus.rows import read_blocks
from nomoe.corpus.shards import ShardReader
from nomoe.corpus.sources import Source, find_sources
from tests.corpora import make_rows, make_texts, read, vectors_of, write

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
feather = pytest.importorskip("pyarrow.feather")


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
    tmp_path: Path, mixed: Path, shallow_model: dict[str, Any], shallow: Encoder
) -> None:
    with pytest.raises(ValueError, match=r"1\.parquet, row 3 \(the first is 0\): null; on_bad="):
        embed_corpus(mixed, tmp_path / "out", **shallow_model)
    report = embed_corpus(mixed, tmp_path / "out", on_bad="skip", shard_rows=8, **shallow_model)
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


def test_bad_rows_of_text_formats(tmp_path: Path, shallow_model: dict[str, Any]) -> None:
    (tmp_path / "a.csv").write_bytes(
        b'id,text\n1,fine\n2,\xff\xfe bad\n3,too,many\n4,"two\nlines"\n\n5,\xc3\xa9\n6\n7,end\n'
    )
    report = embed_corpus(tmp_path / "a.csv", tmp_path / "csv", on_bad="skip", **shallow_model)
    table = read(tmp_path / "csv")
    assert table["id"].to_pylist() == ["1", "4", "5", "7"]
    assert table["source_row"].to_pylist() == [0, 3, 4, 6]
    assert table["text"].to_pylist() == ["fine", "two\nlines", "é", "end"]
    assert sum(report.bad.values()) == 3
    (tmp_path / "b.jsonl").write_bytes(
        b'{"text": "a"}\n{"text": 5}\n\n[1]\n{"text": "\\ud800"}\n{"body": 1}\n\xff\n'
        b'{"text": "h"}\n{"te'
    )
    report = embed_corpus(
        tmp_path / "b.jsonl", tmp_path / "o.jsonl", on_bad="skip", **shallow_model
    )
    lines = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [(line["source_row"], line["text"]) for line in lines] == [(0, "a"), (6, "h")]
    assert sum(report.bad.values()) == 6
    assert report.bad["not UTF-8"] == 1
    (tmp_path / "c.txt").write_bytes(b"one\n\xff\nthree\n")
    embed_corpus(tmp_path / "c.txt", tmp_path / "c", on_bad="skip", **shallow_model)
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


def test_text_that_is_not_utf8_in_parquet(tmp_path: Path, shallow_model: dict[str, Any]) -> None:
    array = pa.array([b"fine", b"\xff\xfe", None, b"also"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": array, "id": [1, 2, 3, 4]}), tmp_path / "in.parquet")
    report = embed_corpus(
        tmp_path / "in.parquet", tmp_path / "out", on_bad="skip", columns=["id"], **shallow_model
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


def utf16(encoding: str) -> Callable[[Path], object]:
    return lambda path: path.write_text("text,id\n" + "面粉,1\nhello,2\n" * 9, encoding=encoding)


BROKEN = {
    **{
        f"{encoding} in {name}": (name, utf16(encoding), "is UTF-16 or UTF-32, expected UTF-8")
        for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be")
        for name in ("in.txt", "in.csv", "in.jsonl")
    },
    "UTF-16 with a mark": (
        "in.txt",
        lambda path: path.write_bytes("\ufeff面粉".encode("utf-16-be")),
        "is UTF-16 or UTF-32",
    ),
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
        r"in.jsonl, row 1 \(the first is 0\): column 'x' has no one type",
    ),
    "one column in two types, far apart": (
        "in.jsonl",
        lambda path: path.write_text(
            '{"text": "a", "x": 1}\n' * 1024 + '{"text": "b", "x": "one"}\n' * 2
        ),
        "in.jsonl, rows 1024 to 1025: column 'x' holds string, but int64 before it",
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
    "bytes for texts, into JSON": (
        "in.parquet",
        lambda path: pq.write_table(pa.table({"text": [b"a"]}), path),
        "column 'text' holds binary, expected text",
    ),
    "numbered already": (
        "in.parquet",
        lambda path: pq.write_table(pa.table({"text": ["a"], "source_row": [1]}), path),
        "already has 'source_row'",
    ),
}


@pytest.mark.parametrize("case", list(BROKEN))
def test_broken_files_are_refused_whatever_the_policy(
    tmp_path: Path, case: str, shallow_model: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, make, message = BROKEN[case]
    make(tmp_path / name)
    monkeypatch.setattr("nomoe.corpus.run.Embedder", None)
    monkeypatch.setattr("nomoe.corpus.workers.Embedder", None)
    out = tmp_path / ("out.jsonl" if "JSON" in case else "out")
    with pytest.raises(ValueError, match=message):
        embed_corpus(tmp_path / name, out, on_bad="skip", **shallow_model)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_rows_that_a_file_only_promises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What some damage comes to."""
    pq.write_table(pa.table({"text": ["some words"]}), tmp_path / "a.parquet")
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda *_, **__: iter(()))
    with pytest.raises(ValueError, match=r"a\.parquet is not a whole .*row group 0 has no rows"):
        make_plan(find_sources(tmp_path), shard_rows=10, form="parquet")


class FailingFile(io.FileIO):
    """A file of which a few reads succeed."""

    def __init__(self, path: str, reads: int, error: Exception) -> None:
        super().__init__(path)
        self._reads = reads
        self._error = error

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END and not self._reads:
            raise self._error
        return super().seek(offset, whence)

    def readinto(self, buffer: Any) -> int | None:
        if not self._reads:
            raise self._error
        self._reads -= 1
        return super().readinto(buffer)


@pytest.fixture(params=[0, 1, 2, 3])
def fail(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, Exception], Source]:
    """Makes a file of a suffix whose reads fail, after none, one, two or three."""

    def make(suffix: str, error: Exception) -> Source:
        path = write(tmp_path / f"in{suffix}", make_rows(300))
        opened = partial(FailingFile, reads=request.param, error=error)
        system = SimpleNamespace(open_input_file=opened)
        monkeypatch.setattr("nomoe.corpus.sources._file_system", lambda uri: (system, str(path)))
        monkeypatch.setattr("nomoe.corpus.sources._BUFFER", 1 << 12)
        return Source(f"s3://bucket/in{suffix}", find_sources(path)[0].format, 0, 0)

    return make


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".arrows", ".jsonl"])
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "Input/output error"),
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
        # pyarrow's file systems give no number
        OSError("AWS Error NETWORK_CONNECTION"),
    ],
)
def test_a_read_that_fails_is_no_damage(
    fail: Callable[[str, Exception], Source], suffix: str, error: OSError
) -> None:
    source = fail(suffix, error)
    with pytest.raises(type(error), match=error.strerror or str(error)) as found:
        list(read_blocks(source, "text"))
    assert found.value.errno == (error.errno or errno.EIO)
    assert found.value.filename == source.path


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".arrows"])
@pytest.mark.parametrize("error", [pa.ArrowMemoryError("malloc of size 64 failed"), MemoryError()])
def test_lack_of_memory_is_no_damage(
    fail: Callable[[str, Exception], Source], suffix: str, error: MemoryError
) -> None:
    source = fail(suffix, error)
    message = re.escape(f"no memory to read {source.path}, unless it is damaged: {error!r}")
    with pytest.raises(type(error), match=message):
        list(read_blocks(source, "text"))


def test_a_csv_cut_between_quotes_loses_its_last_row_alone(
    tmp_path: Path, shallow_model: dict[str, Any]
) -> None:
    (tmp_path / "in.csv").write_text("text,id\na,1\nb,2\nc")
    with pytest.raises(ValueError, match=r"row 2 .*: 1 values, expected 2"):
        embed_corpus(tmp_path / "in.csv", tmp_path / "out", **shallow_model)
    assert (
        embed_corpus(tmp_path / "in.csv", tmp_path / "o", on_bad="skip", **shallow_model).rows == 2
    )


def test_types_that_change_between_files(tmp_path: Path, shallow_model: dict[str, Any]) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    pq.write_table(pa.table({"text": ["a"], "n": pa.array([1], pa.int32())}), folder / "1.parquet")
    pq.write_table(pa.table({"text": ["b"], "n": pa.array([2.5])}), folder / "2.parquet")
    embed_corpus(folder, tmp_path / "out", **shallow_model)
    assert read(tmp_path / "out")["n"].to_pylist() == [1, 2.5]
    pq.write_table(pa.table({"text": ["c"], "n": ["three"]}), folder / "3.parquet")
    with pytest.raises(ValueError, match=r"3\.parquet: column 'n' holds string, but double before"):
        embed_corpus(folder, tmp_path / "other", **shallow_model)
    embed_corpus(folder, tmp_path / "other", columns=["text"], **shallow_model)
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
    tmp_path: Path, shallow_model: dict[str, Any]
) -> None:
    rows = [{"text": "a", "n": [], "m": {"k": None}, "o": [{"p": []}], "q": None}]
    embed_corpus(write(tmp_path / "in.jsonl", rows), tmp_path / "out", **shallow_model)
    table = pa.table({key: [value] for key, value in rows[0].items()})
    with pa.ipc.new_file(tmp_path / "in.arrow", table.schema) as writer:
        writer.write_table(table)
    embed_corpus(tmp_path / "in.arrow", tmp_path / "arrow", **shallow_model)
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
        (pa.array([[INT]]), pa.array([[0.5]])),
        (pa.array([{"x": INT}]), pa.array([{"x": 0.5}])),
        (pa.array([10**10], pa.timestamp("s")), pa.array([1], pa.timestamp("ns"))),
        (pa.array(["a"]), pa.array([b"\xff"])),
        (pa.array([True]), pa.array([2])),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_types_that_lose_something_are_refused(
    tmp_path: Path, first: Any, second: Any, turned: bool, shallow_model: dict[str, Any]
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
        (pa.array([16777217], pa.int32()), pa.array([0.1], pa.float32())),
        (pa.array([2**15 - 1], pa.int16()), pa.array([np.float16(0.1)], pa.float16())),
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
    tmp_path: Path, first: Any, second: Any, turned: bool, shallow_model: dict[str, Any]
) -> None:
    pair = (second, first) if turned else (first, second)
    folder = typed_pair(tmp_path / "in", *pair)
    embed_corpus(folder, tmp_path / "out", **shallow_model)
    expected = [one for values in pair for one in values.to_pylist()]
    assert read(tmp_path / "out")["n"].to_pylist() == expected


@pytest.mark.parametrize("inside", [None, "list", "struct"])
def test_categories_of_all_files_have_room(
    tmp_path: Path, inside: str | None, shallow_model: dict[str, Any]
) -> None:
    """One byte counts the categories of a file, but not those of both."""
    (tmp_path / "in").mkdir()
    expected = []
    for file in "ab":
        names = [f"{file}{index}" for index in range(100)]
        kinds = pa.DictionaryArray.from_arrays(pa.array(range(100), pa.int8()), names)
        if inside == "list":
            kinds = pa.ListArray.from_arrays(pa.array(range(101), pa.int32()), kinds)
        elif inside == "struct":
            kinds = pa.StructArray.from_arrays([kinds], ["one"])
        table = pa.table({"text": ["some words"] * 100, "kind": kinds})
        feather.write_feather(table, str(tmp_path / "in" / f"{file}.feather"))
        expected += kinds.to_pylist()
    embed_corpus(tmp_path / "in", tmp_path / "out", **shallow_model)
    found = read(tmp_path / "out")["kind"]
    assert "dictionary<values=string, indices=int32" in str(found.type)
    assert found.to_pylist() == expected
    if inside is None:
        # as pandas has them
        assert found.combine_chunks().to_pylist() == expected


def test_columns_that_go_along_may_be_larger_than_an_array_of_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # memory that nobody touches
    text, size = pa.py_buffer(np.zeros(700 << 20, np.uint8)), 700 << 20
    page = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(np.int32([0, size])), text])
    part = pa.RecordBatch.from_arrays([page], ["page"])
    output = ParquetOutput(tmp_path / "a.parquet", part.schema, 1, np.float32, {})
    written: list[tuple[pa.Table, int]] = []
    monkeypatch.setattr(output._writer, "write_table", lambda *given: written.append(given))
    output.add(np.arange(4), [part] * 4, np.zeros((4, 1), np.float32))
    output.abort()
    [(table, rows)] = written
    assert (table.num_rows, table["page"].num_chunks) == (4, 4)
    assert rows == 1, "a group holds as little as it can of what is over the bound"


def test_row_groups_are_bounded(tmp_path: Path) -> None:
    along = pa.schema([])
    output = ParquetOutput(tmp_path / "a.parquet", along, 1, np.float32, {})
    part = pa.RecordBatch.from_arrays([], schema=along)
    output.add(np.arange(20_000), [part], np.zeros((20_000, 1), np.float32))
    output.add(np.arange(20_000, 20_010), [part], np.zeros((10, 1), np.float32))
    output.commit()
    groups = pq.read_metadata(tmp_path / "a.parquet")
    sizes = [groups.row_group(index).num_rows for index in range(groups.num_row_groups)]
    assert sizes == [6667, 6667, 6666, 10]


def test_numbers_of_json_widen_where_they_lose_nothing(
    tmp_path: Path, shallow_model: dict[str, Any]
) -> None:
    values = [1, 0.5, [1], [0.5], {"x": 3}, {"x": 0.25}]
    for index in range(0, 6, 2):
        folder = tmp_path / str(index)
        folder.mkdir()
        for name, value in zip("ab", values[index : index + 2], strict=True):
            write(folder / f"{name}.jsonl", [{"text": "t", "n": value}])
        embed_corpus(folder, tmp_path / f"out{index}", **shallow_model)
        assert read(tmp_path / f"out{index}")["n"].to_pylist() == values[index : index + 2]
        for large in (INT, [INT], {"x": INT}):
            write(folder / "c.jsonl", [{"text": "t", "n": large}])
            with pytest.raises(ValueError, match=r"c\.jsonl, rows 0 to 0: column 'n' holds"):
                make_plan(find_sources(folder), shard_rows=10, form="parquet")
            (folder / "c.jsonl").unlink()
    write(tmp_path / "a.jsonl", [{"text": "t", "n": INT}])
    write(tmp_path / "b.jsonl", [{"text": "t", "n": 0.5}])
    with pytest.raises(
        ValueError, match=r"b\.jsonl, rows 0 to 0: column 'n' holds double, but int64 before"
    ):
        make_plan(find_sources(f"{tmp_path}/*.jsonl"), shard_rows=10, form="parquet")


def test_columns_that_are_not_written_are_not_in_the_way(
    tmp_path: Path, shallow_model: dict[str, Any]
) -> None:
    rows = [
        {"text": "a", "embedding": [1.0], "source_row": 7, "mixed": 1},
        {"text": "b", "mixed": "x"},
    ]
    source = write(tmp_path / "in.jsonl", rows)
    embed_corpus(source, tmp_path / "out.npy", **shallow_model)
    assert np.load(tmp_path / "out.npy").shape == (2, 96)
    with pytest.raises(ValueError, match="no file has a column 'nope'"):
        embed_corpus(source, tmp_path / "o.npy", columns=["nope"], **shallow_model)
    keep: Any = {"columns": ["source_row"], **shallow_model}
    embed_corpus(source, tmp_path / "out.jsonl", **keep)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line.get("source_row") for line in lines] == [7, None]
    for out, options in (("o.jsonl", {"on_bad": "skip"}), ("folder", {}), ("o.parquet", {})):
        with pytest.raises(ValueError, match="already has 'source_row', which the output adds"):
            embed_corpus(source, tmp_path / out, **keep, **options)


@pytest.mark.parametrize("out", ["out", "o.parquet", "o.jsonl", "o.npy"])
def test_empty_input(tmp_path: Path, out: str, shallow_model: dict[str, Any]) -> None:
    pq.write_table(
        pa.table({"text": pa.array([], pa.string()), "n": [1][:0]}), tmp_path / "i.parquet"
    )
    assert embed_corpus(tmp_path / "i.parquet", tmp_path / out, **shallow_model).rows == 0
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
        assert embed_corpus(tmp_path / name, tmp_path / f"{name}.npy", **shallow_model).rows == 0


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


def test_jsonl_has_null_where_json_has_no_number(
    tmp_path: Path, shallow_model: dict[str, Any]
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(
        '{"text": "a", "x": NaN, "y": [1.5, {"z": -Infinity}], "s": "\\ud800"}\n'
        '{"text": "b", "x": 2.5, "y": [Infinity], "s": "NaN"}\n'
    )

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    embed_corpus(source, tmp_path / "out.jsonl", **shallow_model)
    lines = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [(row["x"], row["y"], row["s"]) for row in rows] == [
        (None, [1.5, {"z": None}], "\ud800"),
        (2.5, [None], "NaN"),
    ]


def test_text_files_have_one_column_and_a_mark_is_no_line(
    tmp_path: Path, shallow_model: dict[str, Any]
) -> None:
    source = tmp_path / "in.txt"
    source.write_bytes(b"\xef\xbb\xbf")
    assert embed_corpus(source, tmp_path / "out.npy", **shallow_model).rows == 0
    source.write_bytes(b"\xef\xbb\xbf\nb\n")
    assert [block.texts for block in read_blocks(find_sources(source)[0], "text")] == [["", "b"]]
    with pytest.raises(ValueError, match=r"no column 'body'; a \.txt file has one, 'text'"):
        embed_corpus(source, tmp_path / "out", column="body", **shallow_model)
