"""Rows and files for tests of corpora; without pyarrow, importing this skips the test file."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nomoe import data

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

TEXTS = [text for group in data.sentences().values() for text in group]


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
