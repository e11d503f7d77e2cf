"""Texts from files and vectors into files; an output is either whole or not there."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

INPUT_SUFFIXES = (".txt", ".jsonl")
OUTPUT_SUFFIXES = (".npy", ".jsonl")
VECTOR_COLUMN = "embedding"


class Row(NamedTuple):
    """One text and the columns that travel with it."""

    text: str
    columns: dict[str, Any]


def read_rows(path: Path, column: str) -> Iterator[Row]:
    """Read texts one at a time.

    A .txt file holds one text a line; every line counts, empty ones too, so that row i of the
    output is line i. A .jsonl file holds one object a line.

    Args:
        path: .txt or .jsonl, UTF-8.
        column: Where a .jsonl object has its text.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Another suffix, bytes that are not UTF-8, a line that is not a JSON object, no
            text in the column, or a column that the output would overwrite; with the line number.
    """
    if path.suffix not in INPUT_SUFFIXES:
        raise ValueError(f"{path} has suffix {path.suffix!r}, expected .txt or .jsonl")
    # newline="\n": only a line feed ends a line, so a stray carriage return shifts no row
    with path.open(encoding="utf-8-sig", newline="\n") as lines:
        number = 0
        while True:
            number += 1
            try:
                line = next(lines, None)
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, near line {number}: not UTF-8: {error}") from error
            if line is None:
                return
            line = line.removesuffix("\n").removesuffix("\r")
            if path.suffix == ".txt":
                yield Row(line, {"text": line})
                continue
            try:
                columns = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON: {error}") from error
            text = columns.get(column) if isinstance(columns, dict) else None
            if not isinstance(text, str):
                raise ValueError(f"{path}, line {number}: no text in column {column!r}")
            if VECTOR_COLUMN in columns:
                raise ValueError(
                    f"{path}, line {number}: already has {VECTOR_COLUMN!r}, which the output adds"
                )
            yield Row(text, columns)


def check_output(path: Path, suffixes: Sequence[str], *, overwrite: bool) -> None:
    """Refuse an output that cannot be written, before any work.

    Raises:
        ValueError: Another suffix.
        FileNotFoundError: Its folder is absent.
        FileExistsError: It exists, and `overwrite` is not set.
        OSError: Its folder is not writable.
    """
    if path.suffix not in suffixes:
        raise ValueError(f"{path} has suffix {path.suffix!r}, expected {' or '.join(suffixes)}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} into")
    if path.is_dir():
        raise FileExistsError(f"{path} is a folder")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; --overwrite replaces it")
    trial = _beside(path)
    trial.touch(exist_ok=False)
    trial.unlink()


@contextmanager
def atomic_output(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`, which takes its name only if the block ends well."""
    unfinished = _beside(path)
    try:
        # not tempfile, whose files are private: the result is to be as open as any new file
        with unfinished.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


def write_npy(
    file: BinaryIO, parts: Iterator[npt.NDArray[Any]], dim: int, dtype: npt.DTypeLike
) -> int:
    """Write (m, d) arrays as one .npy of unknown length; returns the number of rows."""
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False}
    # numpy pads the header so that the first axis can grow in place
    np.lib.format.write_array_header_1_0(file, header | {"shape": (0, dim)})
    start = file.tell()
    rows = 0
    for part in parts:
        file.write(np.ascontiguousarray(part).tobytes())
        rows += len(part)
    file.seek(0)
    np.lib.format.write_array_header_1_0(file, header | {"shape": (rows, dim)})
    if file.tell() != start:
        raise RuntimeError("numpy left no room in the .npy header for the number of rows")
    file.seek(0, os.SEEK_END)
    return rows


def write_jsonl(file: BinaryIO, rows: Iterator[Row], parts: Iterator[npt.NDArray[Any]]) -> int:
    """Write each row's columns and its vector as a line of JSON; returns the number of rows."""
    written = 0
    for part in parts:
        for vector in part:
            # str() of a float32 is the shortest text that reads back as the same float32
            numbers = (
                [float(str(value)) for value in vector]
                if vector.dtype == np.float32
                else vector.tolist()
            )
            columns = next(rows).columns | {VECTOR_COLUMN: numbers}
            try:
                line = json.dumps(columns, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                # a lone surrogate in a column that passes through has no UTF-8, only an escape
                line = json.dumps(columns).encode()
            file.write(line + b"\n")
            written += 1
    return written
