"""Vectors and columns into files: one output holds the rows of a shard, or of the whole input."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from ..files import NpyWriter, atomic_output
from .plan import ROW_COLUMN, VECTOR_COLUMN
from .rows import Columns, as_dicts

if TYPE_CHECKING:
    import pyarrow as pa

# Rows are written once they are so many, or so many bytes, which bounds memory. A write is divided
# into groups of equal length, each of no more rows than that, and of as many bytes on the average.
_GROUP_ROWS = 8192
_GROUP_BYTES = 32 << 20

Vectors = npt.NDArray[Any]
Rows = npt.NDArray[np.int64]


class Output(Protocol):
    """An output that is either whole or not there."""

    def add(self, rows: Rows, columns: Sequence[Columns], vectors: Vectors) -> None:
        """Append rows: their numbers in the input, their columns in parts, their vectors."""
        ...

    def commit(self) -> None:
        """Give the file its name; all rows are in."""
        ...

    def abort(self) -> None:
        """Remove what was written."""
        ...


class _File:
    """A temporary file, written through and renamed by `commit`, removed by `abort`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stack = ExitStack()
        self.file = self._stack.enter_context(atomic_output(path))

    def commit(self) -> None:
        """As `Output.commit`."""
        with _naming(self.path):
            self._stack.close()

    def abort(self) -> None:
        """As `Output.abort`."""
        stop = _AbortedError()
        # closing writes what is buffered, and on a full disk fails once more
        with suppress(OSError, _AbortedError):
            self._stack.__exit__(type(stop), stop, None)


class _AbortedError(Exception):
    """Ends the block of an output that is not to be."""


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the file in an error of the file system, which otherwise says only what went wrong."""
    try:
        yield
    except OSError as error:
        if error.filename or error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


class ParquetOutput(_File):
    """A Parquet file: number of the row in the input, the columns that go along, the vector.

    Args:
        path: Where it is to be.
        columns: What goes along.
        dim: Numbers of a vector, as stored.
        dtype: Their type.
        metadata: What the file says of itself.

    Raises:
        OSError: It cannot be written.
    """

    def __init__(
        self,
        path: Path,
        columns: pa.Schema,
        dim: int,
        dtype: npt.DTypeLike,
        metadata: Mapping[bytes, bytes],
    ) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        super().__init__(path)
        self._columns = columns
        self._vectors = pa.list_(pa.field("element", pa.from_numpy_dtype(dtype), False), dim)
        self._schema = pa.schema(
            [
                pa.field(ROW_COLUMN, pa.int64(), nullable=False),
                *columns,
                pa.field(VECTOR_COLUMN, self._vectors, nullable=False),
            ],
            metadata=dict(metadata),
        )
        self._writer = parquet.ParquetWriter(
            self.file,
            self._schema,
            compression="zstd",
            # texts and vectors hardly repeat, and nobody looks for a vector by its extremes
            use_dictionary=False,
            write_statistics=[ROW_COLUMN, *columns.names],
        )
        self._clear()

    def _clear(self) -> None:
        self._parts: list[pa.Table] = []
        self._rows = self._bytes = 0

    def add(self, rows: Rows, columns: Sequence[Columns], vectors: Vectors) -> None:
        """As `Output.add`."""
        import pyarrow as pa

        along = [as_arrays(part, self._columns) for part in columns]
        flat = pa.array(np.ascontiguousarray(vectors).reshape(-1))
        # in chunks: one array of text holds 2 GiB, and one of categories only so many of them
        table = pa.Table.from_arrays(
            [
                pa.array(rows),
                *(pa.chunked_array(parts) for parts in zip(*along, strict=True)),
                pa.FixedSizeListArray.from_arrays(flat, type=self._vectors),
            ],
            schema=self._schema,
        )
        self._parts.append(table)
        self._rows += len(rows)
        self._bytes += sum(map(_bytes_of, table.columns))
        if self._rows >= _GROUP_ROWS or self._bytes >= _GROUP_BYTES:
            self._write()

    def _write(self) -> None:
        import pyarrow as pa

        if self._parts:
            groups = max(-(-self._rows // _GROUP_ROWS), -(-self._bytes // _GROUP_BYTES))
            with _naming(self.path):
                self._writer.write_table(pa.concat_tables(self._parts), -(-self._rows // groups))
            self._clear()

    def commit(self) -> None:
        """As `Output.commit`."""
        self._write()
        with _naming(self.path):
            self._writer.close()
        super().commit()

    def abort(self) -> None:
        """As `Output.abort`."""
        # pyarrow would write a footer when the writer is collected, into a file that is closed
        self._writer.is_open = False
        super().abort()


def _bytes_of(column: pa.ChunkedArray) -> int:
    """Bytes of a column, without the categories, which parts may share."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        return sum(part.indices.nbytes for part in column.chunks)
    return int(column.nbytes)


class NpyOutput(_File):
    """A .npy file of vectors alone; row i is the input's row i."""

    def __init__(self, path: Path, dim: int, dtype: npt.DTypeLike) -> None:
        super().__init__(path)
        self._writer = NpyWriter(self.file, dim, dtype)

    def add(self, rows: Rows, columns: Sequence[Columns], vectors: Vectors) -> None:
        """As `Output.add`."""
        with _naming(self.path):
            self._writer.write(vectors)

    def commit(self) -> None:
        """As `Output.commit`."""
        self._writer.finish()
        super().commit()


class JsonlOutput(_File):
    """A .jsonl file: the columns of a row and its vector in an object a line.

    Args:
        path: Where it is to be.
        numbered: Also write the number of the row in the input, where lines may be left out.
    """

    def __init__(self, path: Path, *, numbered: bool) -> None:
        super().__init__(path)
        self._numbered = numbered

    def add(self, rows: Rows, columns: Sequence[Columns], vectors: Vectors) -> None:
        """As `Output.add`."""
        with _naming(self.path):
            for row, along, vector in zip(rows, as_dicts(columns), vectors, strict=True):
                number = {ROW_COLUMN: int(row)} if self._numbered else {}
                self.file.write(_json_line(number | along | {VECTOR_COLUMN: _numbers(vector)}))


def _numbers(vector: Vectors) -> list[Any]:
    if vector.dtype.kind != "f":
        return list(vector.tolist())
    # str() of a float32 is the shortest text that reads back as the same float32
    return [float(str(value)) for value in vector]


def _json_line(columns: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(columns, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except UnicodeEncodeError:
        # a lone surrogate in a column that passes through has no UTF-8, only an escape
        return json.dumps(_finite(columns)).encode() + b"\n"
    except ValueError:
        return _json_line(_finite(columns))


def _finite(value: Any) -> Any:
    """Put null in the place of NaN and infinities, which JSON has not."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value


def as_arrays(part: Columns, schema: pa.Schema) -> list[pa.Array]:
    """Give rows the output's columns: null where they have none, types widened but never cut."""
    import pyarrow as pa

    if isinstance(part, list):
        return [pa.array([row.get(one.name) for row in part], one.type) for one in schema]
    names = set(part.schema.names)
    return [
        part.column(one.name).cast(one.type)
        if one.name in names
        else pa.nulls(part.num_rows, one.type)
        for one in schema
    ]
