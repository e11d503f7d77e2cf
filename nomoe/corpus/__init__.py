"""Corpora: files of texts in, files of vectors out, in bounded memory and at will interrupted.

`sources` finds files, `rows` reads them, `types` says what has room for their columns, `plan`
divides them into shards, `manifest` says what a folder of shards was made of, `embedder` makes
vectors, `outputs` writes them, `shards` is the work of one process, `workers` that of several;
`request` checks a call, and `run` puts it together.
"""

from __future__ import annotations

from .embedder import PRECISIONS, Precision
from .estimate import Estimate, estimate_corpus
from .request import OUTPUT_SUFFIXES
from .run import CorpusReport, embed_corpus

__all__ = [
    "OUTPUT_SUFFIXES",
    "PRECISIONS",
    "CorpusReport",
    "Estimate",
    "Precision",
    "embed_corpus",
    "estimate_corpus",
]
