"""Fill a LanceDB table from a folder of shards, and search it.

    pip install "nomoe[parquet]" lancedb
    nomoe embed articles.parquet -o vectors
    python examples/lancedb_search.py vectors articles.lancedb "When does the tide turn?"

The table is a folder on this disk, and is filled a batch at a time. The prompt of the documents and
the model are in the shards' manifest; the query is embedded with the same model and its own prompt.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import lancedb
import pyarrow.dataset

import nomoe

TABLE = "corpus"


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a folder of shards.

    Raises:
        ValueError: Shards are missing, or their vectors are not floating-point numbers.
    """
    manifest = json.loads((folder / "_manifest.json").read_text(encoding="utf-8"))
    if not manifest["complete"]:
        raise ValueError(f"{folder} is not complete: run `nomoe embed` again to finish it")
    if manifest["settings"]["precision"] not in ("float32", "float16"):
        raise ValueError(f"{folder} holds {manifest['settings']['precision']} codes, not vectors")
    return manifest


def fill(folder: Path, database: Path) -> Any:
    """Return the table of all shards; if it is not there it is made, in bounded memory."""
    read_manifest(folder)
    connection = lancedb.connect(database)
    # what an interrupted fill left is a folder, but no table
    with contextlib.suppress(ValueError):
        return connection.open_table(TABLE)
    shards = pyarrow.dataset.dataset(sorted(folder.glob("part-*.parquet")), format="parquet")
    reader = pyarrow.RecordBatchReader.from_batches(shards.schema, shards.to_batches())
    return connection.create_table(TABLE, reader)


def search(table: Any, encoder: nomoe.Encoder, query: str, limit: int = 5) -> list[dict[str, Any]]:
    """Return the nearest rows, best first, with their cosine distance as `_distance`."""
    vector = encoder.encode_query(query)
    # exhaustive; for millions of rows first table.create_index(metric="cosine", ...)
    nearest = table.search(vector, vector_column_name="embedding").distance_type("cosine")
    rows: list[dict[str, Any]] = nearest.limit(limit).to_list()
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Fill the table if it is not there, search, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards", type=Path, help="folder that `nomoe embed` wrote")
    parser.add_argument("database", type=Path, help="folder of the LanceDB database")
    parser.add_argument("query")
    parser.add_argument("--model", help="if it is no longer where the shards were made from")
    args = parser.parse_args(arguments)

    settings, notes = (read_manifest(args.shards)[name] for name in ("settings", "notes"))
    encoder = nomoe.Encoder.from_pretrained(
        args.model or notes["model"],
        revision=None if args.model else notes["revision"],
        truncate_dim=settings["dim"],
    )
    table = fill(args.shards, args.database)
    print(f"{table.count_rows():,} rows")
    for row in search(table, encoder, args.query):
        # the text may have been left out of the shards, the row's number is always there
        shown = row.get(settings["column"]) or f"row {row['source_row']:,}"
        print(f"{1 - row['_distance']:.3f}  {shown[:80]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
