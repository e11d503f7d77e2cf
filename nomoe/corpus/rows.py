"""Rows of input files, a block at a time: the text of each, its other columns, and what is wrong.

Every reader can begin at any row, so that a shard is read without those before it. Memory is
bounded by the size of a block and that of the largest row.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypeAlias

from ..tokenizer import check_texts
from .sources import ARROW_FORMATS, Source, open_source

if TYPE_CHECKING:
    import pyarrow as pa

# most rows and about the most bytes of a block
_BLOCK_ROWS = 1024
_BLOCK_BYTES = 4 << 20
# rows of a Parquet group that tell how large its rows are
_SAMPLE_ROWS = 16
# longest row of a text format: beyond it a file is taken for another kind of data
_LONGEST_ROW = 256 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")

# the columns of a block: one dict a row from text formats, a batch from Arrow's
Columns: TypeAlias = "list[dict[str, Any]] | pa.RecordBatch"


class Block(NamedTuple):
    """Some rows of a file, in its order."""

    # the text of each row, None where the row is bad
    texts: list[str | None]
    # what is wrong with a bad row, by its position
    problems: dict[int, str]
    columns: Columns
    # where each row ends in the file, in bytes; empty for formats that are not found by offset
    ends: list[int]


class Place(NamedTuple):
    """Where to begin in a file."""

    row: int
    # where that row begins, in bytes; 0 for formats that are not found by offset
    offset: int


START = Place(0, 0)


def read_blocks(
    source: Source,
    column: str,
    columns: Sequence[str] | None = None,
    place: Place = START,
    digest: Callable[[bytes], None] | None = None,
) -> Iterator[Block]:
    """Read a file from a row on.

    Args:
        source: The file.
        column: Where the text is; a .txt file has one column, "text".
        columns: Columns to bring along; None brings all.
        place: The row to begin with.
        digest: Given every byte that is read of a text format.

    Raises:
        ValueError: The file is not what its suffix says, is broken so that rows cannot be told
            apart, or has no such column.
        OSError: It cannot be read.
        MemoryError: A batch of its rows finds no room.
    """
    if source.format in ARROW_FORMATS:
        return _arrow_blocks(source, column, columns, place.row)
    if source.format == "text" and column != "text":
        raise ValueError(f"{source.path} has no column {column!r}; a .txt file has one, 'text'")
    return _line_blocks(source, column, columns, place, digest)


# --- text formats ---


class _Lines:
    """Lines of a file, without their ends; a stray carriage return ends none.

    Attributes:
        end: Where the last line ends, in bytes.
        is_utf8: Whether all lines since the attribute was set have been.
        exhausted: Whether the file has no more.
    """

    def __init__(
        self, file: BinaryIO, path: str, offset: int, digest: Callable[[bytes], None] | None
    ) -> None:
        self._file = file
        self._path = path
        self._digest = digest
        self.end = offset
        self.row_start = offset
        self.is_utf8 = True
        self.exhausted = False
        file.seek(offset)

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._file.readline(_LONGEST_ROW + 1)
        if not line:
            self.exhausted = True
            raise StopIteration
        if self._digest is not None:
            self._digest(line)
        if self.end == 0:
            if _is_utf16(line):
                raise ValueError(
                    f"{self._path} is UTF-16 or UTF-32, expected UTF-8; convert it, for example "
                    "with `iconv -f UTF-16 -t UTF-8`"
                )
            line, skipped = line.removeprefix(_BYTE_ORDER_MARK), len(line)
            self.end = skipped
            if not line:
                # a mark alone is no line
                return next(self)
        else:
            self.end += len(line)
        if self.end - self.row_start > _LONGEST_ROW:
            raise ValueError(
                f"{self._path}: a row from byte {self.row_start} on is longer than "
                f"{_LONGEST_ROW >> 20} MiB; is a quote or a line never closed?"
            )
        try:
            return line.decode()
        except UnicodeDecodeError:
            self.is_utf8 = False
            return line.decode(errors="surrogateescape")

    def begin_row(self) -> None:
        """Forget the lines so far."""
        self.row_start = self.end
        self.is_utf8 = True


class _Row(NamedTuple):
    text: str | None
    columns: dict[str, Any]
    problem: str | None


def _line_blocks(
    source: Source,
    column: str,
    columns: Sequence[str] | None,
    place: Place,
    digest: Callable[[bytes], None] | None,
) -> Iterator[Block]:
    with closing(open_source(source.path)) as file:
        if source.format in ("csv", "tsv"):
            rows, lines = _csv_rows(file, source, column, place.offset, digest)
        else:
            lines = _Lines(file, source.path, place.offset, digest)
            parse = _text_row if source.format == "text" else _json_row
            rows = _parsed(lines, parse, column)
        kept = None if columns is None else frozenset(columns)
        block = Block([], {}, [], [])
        start = lines.end
        for row in rows:
            text, problem = row.text, row.problem
            if text is not None and problem is None:
                problem = _unicode_problem(text)
            if problem is not None:
                block.problems[len(block.texts)] = problem
                text = None
            block.texts.append(text)
            block.columns.append(
                row.columns
                if kept is None
                else {name: value for name, value in row.columns.items() if name in kept}
            )
            block.ends.append(lines.end)
            if len(block.texts) >= _BLOCK_ROWS or lines.end - start >= _BLOCK_BYTES:
                yield block
                block, start = Block([], {}, [], []), lines.end
        if block.texts:
            yield block


def _is_utf16(line: bytes) -> bool:
    """Whether a file's first line is UTF-16 or UTF-32, by its mark or, in ASCII, its zeros."""
    start = line[:1024]
    return start.startswith(_UTF16_MARKS) or 3 * start.count(0) > len(start)


def _unicode_problem(text: str) -> str | None:
    try:
        check_texts([text])
    except ValueError as error:
        return str(error).removeprefix("text 0 ")
    return None


def _parsed(lines: _Lines, parse: Callable[[str, str], _Row], column: str) -> Iterator[_Row]:
    for line in lines:
        line = line.removesuffix("\n").removesuffix("\r")
        if parse is _text_row or line.strip():
            yield parse(line, column) if lines.is_utf8 else _Row(None, {}, "not UTF-8")
        lines.begin_row()


def _text_row(line: str, column: str) -> _Row:
    return _Row(line, {"text": line}, None)


def _json_row(line: str, column: str) -> _Row:
    try:
        columns = json.loads(line)
    # a ValueError that is no JSONDecodeError: more digits than Python makes a number of
    except (ValueError, RecursionError) as error:
        return _Row(None, {}, f"not JSON: {error}")
    if not isinstance(columns, dict):
        return _Row(None, {}, f"a JSON {type(columns).__name__}, expected an object")
    text = columns.get(column)
    if not isinstance(text, str):
        found = type(text).__name__ if column in columns else "absent"
        return _Row(None, columns, f"no text in column {column!r}: {found}")
    return _Row(text, columns, None)


def _csv_rows(
    file: BinaryIO,
    source: Source,
    column: str,
    offset: int,
    digest: Callable[[bytes], None] | None,
) -> tuple[Iterator[_Row], _Lines]:
    """Read CSV records; the first is the header, and every value is text as it stands."""
    # a limit of the whole process, which a column of long documents exceeds
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_ROW))
    delimiter = "\t" if source.format == "tsv" else ","

    def records(lines: _Lines) -> Iterator[list[str] | str]:
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        while True:
            try:
                record: list[str] | str = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if lines.exhausted:
                    raise ValueError(
                        f"{source.path} ends within a quoted value that begins after byte "
                        f"{lines.row_start}: it is cut short, or a quote is never closed"
                    ) from error
                record = f"not CSV: {error}"
            # an empty line is no record
            if record:
                yield record
            lines.begin_row()

    head = _Lines(file, source.path, 0, digest)
    header = next(records(head), [])
    if isinstance(header, str) or not head.is_utf8:
        raise ValueError(f"{source.path} has a damaged header: {header}")
    if header and column not in header:
        raise ValueError(
            f"{source.path} has no column {column!r}; its header is {', '.join(header)}"
        )
    if len(set(header)) < len(header):
        raise ValueError(f"{source.path} has two columns of one name: {', '.join(header)}")
    lines = _Lines(file, source.path, max(offset, head.end), digest)

    def rows() -> Iterator[_Row]:
        for record in records(lines):
            if isinstance(record, str):
                yield _Row(None, {}, record)
            elif len(record) != len(header):
                yield _Row(None, {}, f"{len(record)} values, expected {len(header)}")
            elif not lines.is_utf8:
                yield _Row(None, {}, "not UTF-8")
            else:
                columns = dict(zip(header, record, strict=True))
                yield _Row(columns[column], columns, None)

    return rows(), lines


# --- Arrow's formats ---


def arrow_schema(source: Source) -> pa.Schema:
    """Return the columns of a Parquet or Arrow file.

    Raises:
        ValueError: The file is not whole.
        OSError, MemoryError: As `read_blocks`.
    """
    with closing(open_source(source.path)) as file, _decoding(source):
        if source.format == "parquet":
            return _parquet_file(file).schema_arrow
        return _open_arrow(file).schema


@contextmanager
def _decoding(source: Source) -> Iterator[None]:
    """Name the file in what pyarrow raises, and tell damage from a read that failed."""
    import pyarrow as pa

    try:
        yield
    except MemoryError as error:
        # damage may promise sizes that no machine has
        raise type(error)(
            f"no memory to read {source.path}, unless it is damaged: {error!r}"
        ) from error
    except (pa.ArrowException, OSError) as error:
        # some damage is an OSError too, but only one of `open_source` names the file
        if isinstance(error, OSError) and error.filename:
            raise
        raise ValueError(
            f"{source.path} is not a whole {source.format} file (cut short, or of another "
            f"format?): {error}"
        ) from error


def _parquet_file(file: BinaryIO) -> Any:
    from pyarrow import parquet

    # buffered: else a whole column of a row group is held, however few rows are asked for
    return parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)


def _open_arrow(file: BinaryIO) -> Any:
    from pyarrow import ipc

    file.seek(0)
    is_file = file.read(6) == b"ARROW1"
    file.seek(0)
    return ipc.open_file(file) if is_file else ipc.open_stream(file)


def _arrow_blocks(
    source: Source,
    column: str,
    columns: Sequence[str] | None,
    first: int,
) -> Iterator[Block]:
    schema = arrow_schema(source)
    _check_text_column(schema, column, source.path)
    wanted = schema.names if columns is None else [name for name in schema.names if name in columns]
    read = _parquet_batches if source.format == "parquet" else _ipc_batches
    with closing(open_source(source.path)) as file, _decoding(source):
        for batch in read(file, list(dict.fromkeys([column, *wanted])), first):
            texts, problems = arrow_texts(batch.column(column))
            yield Block(texts, problems, batch.select(wanted), [])


def _check_text_column(schema: pa.Schema, column: str, path: str) -> None:
    import pyarrow as pa

    if len(set(schema.names)) < len(schema.names):
        raise ValueError(f"{path} has two columns of one name: {', '.join(schema.names)}")
    if column not in schema.names:
        raise ValueError(f"{path} has no column {column!r}; it has {', '.join(schema.names)}")
    kind = schema.field(column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    is_text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    if not any(is_kind(kind) for is_kind in (*is_text, pa.types.is_null)):
        raise ValueError(f"{path}: column {column!r} holds {kind}, expected text")


def _parquet_batches(file: BinaryIO, columns: list[str], first: int) -> Iterator[pa.RecordBatch]:
    parquet = _parquet_file(file)
    groups = [parquet.metadata.row_group(i) for i in range(parquet.metadata.num_row_groups)]
    ends = list(accumulate(group.num_rows for group in groups))
    for index, (group, end) in enumerate(zip(groups, ends, strict=True)):
        if end <= first or not group.num_rows:
            continue
        options = {"row_groups": [index], "columns": columns, "use_threads": False}
        bytes_per_row = max(1, group.total_byte_size // group.num_rows)
        size = min(_SAMPLE_ROWS, max(1, _BLOCK_BYTES // bytes_per_row))
        # a value that a group holds once may be in each of its rows
        sample = next(parquet.iter_batches(size, **options), None)
        if sample is None:
            raise OSError(f"row group {index} has no rows, though {group.num_rows} are promised")
        bytes_per_row = max(bytes_per_row, sample.nbytes // sample.num_rows)
        size = min(_BLOCK_ROWS, max(1, _BLOCK_BYTES // bytes_per_row))
        skip = max(0, first - (end - group.num_rows))
        for batch in parquet.iter_batches(size, **options):
            if skip < batch.num_rows:
                yield batch.slice(skip)
            skip = max(0, skip - batch.num_rows)


def _ipc_batches(file: BinaryIO, columns: list[str], first: int) -> Iterator[pa.RecordBatch]:
    reader = _open_arrow(file)
    batches = (
        (reader.get_batch(index) for index in range(reader.num_record_batches))
        if hasattr(reader, "num_record_batches")
        else iter(reader)
    )
    skip = first
    for batch in batches:
        here = min(skip, batch.num_rows)
        skip -= here
        rest = batch.select(columns).slice(here)
        if rest.num_rows:
            size = max(1, _BLOCK_BYTES * rest.num_rows // max(1, rest.nbytes))
            for start in range(0, rest.num_rows, min(size, _BLOCK_ROWS)):
                yield rest.slice(start, min(size, _BLOCK_ROWS))


def arrow_texts(array: Any) -> tuple[list[str | None], dict[int, str]]:
    """Texts of a column of Arrow's, None where there is none, and why, by row."""
    try:
        texts = array.to_pylist()
    except UnicodeDecodeError:
        return _some_texts(array)
    return texts, {row: "null" for row, text in enumerate(texts) if text is None}


def _some_texts(array: Any) -> tuple[list[str | None], dict[int, str]]:
    """Read texts one by one, where some are not UTF-8: Arrow does not check."""
    texts: list[str | None] = []
    problems = {}
    for row, value in enumerate(array):
        try:
            texts.append(value.as_py())
            if texts[-1] is None:
                problems[row] = "null"
        except UnicodeDecodeError:
            texts.append(None)
            problems[row] = "not UTF-8"
    return texts, problems


# --- columns ---


def good_columns(block: Block) -> Columns:
    """Return the columns of the rows that are not bad."""
    if not block.problems:
        return block.columns
    kept = [row for row in range(len(block.texts)) if row not in block.problems]
    if isinstance(block.columns, list):
        return [block.columns[row] for row in kept]
    import pyarrow as pa

    return block.columns.take(pa.array(kept, pa.int64()))


def slice_columns(columns: Columns, start: int, stop: int) -> Columns:
    """Return some rows."""
    return columns[start:stop] if isinstance(columns, list) else columns.slice(start, stop - start)


def as_dicts(parts: Sequence[Columns]) -> Iterator[dict[str, Any]]:
    """Yield each row as a dict."""
    return chain.from_iterable(
        part if isinstance(part, list) else part.to_pylist() for part in parts
    )
