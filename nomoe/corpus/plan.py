"""What is to be done, known before the model is loaded: good rows, bad rows, shards, columns.

The input is read for this. Its rows are counted and checked, its bytes hashed, and the rows divided
into shards, which are then embedded each by itself, in any order and on any machine, with one and
the same result.
"""

from __future__ import annotations

import base64
import hashlib
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

from .rows import START, Block, arrow_schema, good_columns, read_blocks
from .sources import ARROW_FORMATS, Source, hash_file, require_pyarrow
from .types import check_parquet, wider, with_floats, with_room, without_nulls

if TYPE_CHECKING:
    import pyarrow as pa

OnBad = Literal["fail", "skip"]
# what an output needs of the columns that go along: types, values that JSON has, or nothing
OutputForm = Literal["parquet", "jsonl", "npy"]

# columns that the output adds
VECTOR_COLUMN = "embedding"
ROW_COLUMN = "source_row"

# most bytes of text in a shard: one is held whole by nobody, but redone whole after an interruption
_SHARD_BYTES = 256 << 20
# of bad rows that are left out, how many are named
_EXAMPLES = 20


@dataclass(frozen=True)
class File:
    """An input file as it was when the plan was made."""

    path: str
    format: str
    size: int
    modified: int
    # rows read of it, bad ones included
    rows: int
    # SHA-256 of its bytes: all of them, but of a text format those that were read, and of a typed
    # file that a limit leaves out the schema
    sha256: str

    @property
    def source(self) -> Source:
        """The file to open."""
        return Source(self.path, self.format, self.size, self.modified)


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of one file."""

    # its position in the plan
    file: int
    # the first, and where it begins in bytes if the format is read by offset
    row: int
    offset: int
    # how many, bad ones included
    count: int


@dataclass(frozen=True)
class Shard:
    """Consecutive rows of the input, which are written as one file."""

    # number of its first row in the whole input
    first: int
    # good ones
    rows: int
    # bytes of their texts
    bytes: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Plan:
    """An input, divided."""

    files: tuple[File, ...]
    # where the text is, and which columns go along
    column: str
    columns: tuple[str, ...] | None
    shards: tuple[Shard, ...]
    # rows that are left out, by reason; the first of them by name
    bad: dict[str, int]
    bad_examples: tuple[str, ...]
    # the columns that go along, where the output is to be Parquet
    schema: pa.Schema | None

    @property
    def rows(self) -> int:
        """Rows to embed."""
        return sum(shard.rows for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Bytes of the texts to embed."""
        return sum(shard.bytes for shard in self.shards)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON has it."""
        schema = self.schema
        values = asdict(replace(self, schema=None))
        if schema is not None:
            values["schema"] = base64.b64encode(schema.serialize().to_pybytes()).decode()
            # for the reader
            values["types"] = {one.name: str(one.type) for one in schema}
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Plan:
        """Return the plan that `to_json` made."""
        schema = None
        if values["schema"] is not None:
            import pyarrow as pa

            schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(values["schema"])))
        return cls(
            files=tuple(File(**one) for one in values["files"]),
            column=values["column"],
            columns=None if values["columns"] is None else tuple(values["columns"]),
            shards=tuple(
                Shard(**(one | {"pieces": tuple(Piece(**piece) for piece in one["pieces"])}))
                for one in values["shards"]
            ),
            bad=values["bad"],
            bad_examples=tuple(values["bad_examples"]),
            schema=schema,
        )


def check_on_bad(on_bad: str) -> None:
    """Refuse a word that names no way with bad rows.

    Raises:
        ValueError: It does not.
    """
    if on_bad not in ("fail", "skip"):
        raise ValueError(f"on_bad is {on_bad!r}, expected 'fail' or 'skip'")


def is_numbered(form: OutputForm, on_bad: OnBad) -> bool:
    """Whether each row's number is written: where no row is left out, a .jsonl file needs none."""
    return form == "parquet" or (form == "jsonl" and on_bad == "skip")


def make_plan(
    sources: Sequence[Source],
    column: str = "text",
    *,
    columns: Sequence[str] | None = None,
    on_bad: OnBad = "fail",
    limit: int | None = None,
    shard_rows: int,
    form: OutputForm,
    seen: Callable[[int], object] = lambda rows: None,
) -> Plan:
    """Read the input once, check every row and divide it.

    Args:
        sources: The files.
        column: Where the text is.
        columns: Columns that go along; None means all.
        on_bad: "fail" refuses an input with a bad row, "skip" leaves such rows out and counts them.
        limit: Read only so many rows.
        shard_rows: Good rows of a shard.
        form: What is to be written.
        seen: Told how many rows were read since it was last called.

    Raises:
        ValueError: A bad row under "fail", a broken file, a column that is in no file or that has
            types in two files which do not go together, or one that the output adds.
        OSError: A file cannot be read.
    """
    planner = _Planner(columns, on_bad, shard_rows, form)
    left = limit
    files: list[File] = []
    for source in sources:
        digest = hashlib.sha256()
        rows = 0
        needed = columns
        if source.format in ARROW_FORMATS:
            schema = arrow_schema(source)
            planner.add_schema(schema, source.path, column)
            if left != 0:
                # columns that go along are not looked at here, and yet must stay the same
                hash_file(source.path, digest.update)
            else:
                digest.update(schema.serialize().to_pybytes())
            # the types are known: only the texts have to be looked at
            needed = ()
        if left != 0:
            for block in read_blocks(source, column, needed, START, digest.update):
                taken = len(block.texts) if left is None else min(left, len(block.texts))
                planner.add(source, len(files), rows, block, taken)
                rows += taken
                seen(taken)
                if left is not None:
                    left -= taken
                    if not left:
                        break
        files.append(
            File(source.path, source.format, source.size, source.modified, rows, digest.hexdigest())
        )
    return planner.plan(files, column)


class _Planner:
    def __init__(
        self,
        columns: Sequence[str] | None,
        on_bad: OnBad,
        shard_rows: int,
        form: OutputForm,
    ) -> None:
        numbered = is_numbered(form, on_bad)
        self._added = {VECTOR_COLUMN, ROW_COLUMN} if numbered else {VECTOR_COLUMN}
        self._columns = None if columns is None else tuple(columns)
        self._on_bad = on_bad
        self._shard_rows = shard_rows
        self._form = form
        self._types: _Types | None = _Types() if form == "parquet" else None
        self._names: set[str] = set()
        self._bad: Counter[str] = Counter()
        self._examples: list[str] = []
        self._shards: list[Shard] = []
        self._rows_before = 0
        self._offset = 0
        self._open()

    def _open(self) -> None:
        self._pieces: list[Piece] = []
        self._first = self._good = self._bytes = 0

    def add_schema(self, schema: pa.Schema, path: str, column: str) -> None:
        """Take in the columns of a typed file; whether `column` holds text its reader sees to."""
        self._note_names(schema.names, path)
        for field in schema:
            if self._columns is not None and field.name not in self._columns:
                continue
            if self._types is not None:
                self._types.merge(field.name, field.type, path)
            elif self._form == "jsonl" and field.name != column and not _is_json(field.type):
                raise ValueError(
                    f"{path}: column {field.name!r} holds {field.type}, which JSON has no value "
                    "for; leave it out with columns= (--columns), or write Parquet"
                )

    def add(self, source: Source, file: int, first: int, block: Block, taken: int) -> None:
        """Take in the first rows of a block, of which the first is row `first` of its file."""
        # where the block's rows begin, and at last where the next block does
        offsets = [self._offset if first else 0, *block.ends]
        start = 0
        for index, text in enumerate(block.texts[:taken]):
            if text is None:
                self._add_bad(source, first + index, block.problems[index])
                continue
            self._good += 1
            self._bytes += len(text) if text.isascii() else len(text.encode())
            if self._good == self._shard_rows or self._bytes >= _SHARD_BYTES:
                self._extend(file, first, start, index + 1, offsets)
                self._close()
                start = index + 1
        if start < taken:
            self._extend(file, first, start, taken, offsets)
        self._offset = offsets[-1]
        if isinstance(block.columns, list):
            self._add_columns(block, taken, source, first)

    def _extend(self, file: int, first: int, start: int, stop: int, offsets: list[int]) -> None:
        """Put rows of a block into the open shard."""
        if not self._pieces:
            self._first = self._rows_before
        if self._pieces and self._pieces[-1].file == file:
            last = self._pieces.pop()
            self._pieces.append(replace(last, count=last.count + stop - start))
        else:
            offset = offsets[start] if len(offsets) > 1 else 0
            self._pieces.append(Piece(file, first + start, offset, stop - start))
        self._rows_before += stop - start

    def _add_bad(self, source: Source, row: int, problem: str) -> None:
        place = f"line {row + 1}" if source.format == "text" else f"row {row} (the first is 0)"
        where = f"{source.path}, {place}: {problem}"
        if self._on_bad == "fail":
            raise ValueError(
                f"{where}; on_bad='skip' (--on-bad skip) leaves such rows out and counts them"
            )
        # without what differs from row to row
        self._bad[problem.partition(":")[0].partition(" (")[0]] += 1
        if len(self._examples) < _EXAMPLES:
            self._examples.append(where)

    def _add_columns(self, block: Block, taken: int, source: Source, first: int) -> None:
        head = block._replace(
            texts=block.texts[:taken],
            columns=block.columns[:taken],
            problems={row: one for row, one in block.problems.items() if row < taken},
        )
        dicts = good_columns(head)
        assert isinstance(dicts, list)
        names = dict.fromkeys(chain.from_iterable(dicts))
        self._note_names(names, source.path)
        if self._types is None:
            return
        rows = [first + row for row in range(taken) if row not in head.problems]
        for name in names:
            values = [one.get(name) for one in dicts]
            self._types.infer(name, values, rows, source)

    def _note_names(self, names: Iterable[str], path: str) -> None:
        for name in names:
            if name in self._names or (self._columns is not None and name not in self._columns):
                continue
            self._names.add(name)
            if name in self._added:
                raise ValueError(
                    f"{path} already has {name!r}, which the output adds; choose with columns= "
                    "(--columns) what goes along"
                )

    def _close(self) -> None:
        self._shards.append(Shard(self._first, self._good, self._bytes, tuple(self._pieces)))
        self._open()

    def plan(self, files: list[File], column: str) -> Plan:
        """Return the whole, once all rows are in."""
        # rows behind the last good one belong to no shard, but an output has at least one
        if self._good or not self._shards:
            self._close()
        absent = [] if self._columns is None else sorted(set(self._columns) - self._names)
        if absent and any(file.rows for file in files):
            raise ValueError(
                f"no file has a column {absent[0]!r}; of those asked for there "
                + ("is " + ", ".join(sorted(self._names)) if self._names else "is none")
            )
        return Plan(
            files=tuple(files),
            column=column,
            columns=self._columns,
            shards=tuple(self._shards),
            bad=dict(self._bad),
            bad_examples=tuple(self._examples),
            schema=None if self._types is None else self._types.schema(self._columns),
        )


class _Types:
    """The types that columns need so that every row of every file has room in them."""

    def __init__(self) -> None:
        require_pyarrow("writing Parquet")
        self._fields: dict[str, pa.DataType] = {}
        # columns of JSON whose whole numbers so far are floats without loss
        self._exact: set[str] = set()

    def merge(self, name: str, kind: pa.DataType, place: str) -> None:
        """Widen a column's type by that of another file or block.

        Raises:
            ValueError: No type has room for both.
        """
        known = self._fields.get(name)
        if known is None or known == kind:
            self._fields[name] = kind
            return
        merged = wider(known, kind)
        if merged is None and name in self._exact:
            merged = wider(with_floats(known), with_floats(kind))
        if merged is None:
            raise ValueError(
                f"{place}: column {name!r} holds {kind}, but {known} before it, and no type has "
                "room for both without loss; leave it out with columns= (--columns), or give it "
                "one type"
            )
        self._fields[name] = merged

    def infer(self, name: str, values: list[Any], rows: list[int], source: Source) -> None:
        """Widen a column's type by values of rows of a text format.

        Raises:
            ValueError: The values have no one type.
        """
        import pyarrow as pa

        if source.format != "jsonl":
            self.merge(name, pa.string(), source.path)
            return
        try:
            array = pa.array(values)
        except (pa.ArrowException, OverflowError, UnicodeEncodeError) as error:
            heads = range(1, len(values) + 1)
            first = bisect_left(heads, True, key=lambda end: _has_no_type(values[:end]))
            raise ValueError(
                f"{source.path}, row {rows[first]} (the first is 0): column {name!r} has no one "
                f"type that Parquet could hold; leave it out with columns= (--columns): {error}"
            ) from error
        self._note_exact(name, array)
        self.merge(name, array.type, f"{source.path}, rows {rows[0]} to {rows[-1]}")

    def _note_exact(self, name: str, array: pa.Array) -> None:
        """Note whether all whole numbers of a column so far could be floats."""
        import pyarrow as pa

        if name not in self._fields:
            self._exact.add(name)
        if name in self._exact and with_floats(array.type) != array.type:
            try:
                array.cast(with_floats(array.type))
            except pa.ArrowException:
                self._exact.remove(name)

    def schema(self, columns: Sequence[str] | None) -> pa.Schema:
        """Return the columns, in the order asked for or else met.

        Raises:
            ValueError: Parquet cannot hold one.
        """
        import pyarrow as pa

        names: Iterator[str] = iter(self._fields if columns is None else columns)
        # a column without a value anywhere has no type of its own
        kinds = ((name, self._fields.get(name, pa.null())) for name in names)
        schema = pa.schema([(name, with_room(without_nulls(kind))) for name, kind in kinds])
        check_parquet(schema)
        return schema


def _has_no_type(values: list[Any]) -> bool:
    """Whether no one type of Arrow's holds values."""
    import pyarrow as pa

    try:
        pa.array(values)
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        return True
    return False


def _is_json(kind: pa.DataType) -> bool:
    """Whether JSON has a value for every value of a type."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        return _is_json(kind.value_type)
    if pa.types.is_struct(kind):
        return all(_is_json(field.type) for field in kind)
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if any(is_list(kind) for is_list in lists):
        return _is_json(kind.value_type)
    simple = (
        pa.types.is_null,
        pa.types.is_boolean,
        pa.types.is_integer,
        pa.types.is_floating,
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_string_view,
    )
    return any(is_kind(kind) for is_kind in simple)
