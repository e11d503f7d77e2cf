"""Columns of data frames and data sets go straight into `encode`, as into SentenceTransformer."""

from __future__ import annotations

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from nomoe import Encoder, data

TEXTS = [text for group in data.sentences().values() for text in group][:12]


@pytest.fixture
def expected(encoder: Encoder) -> np.ndarray:
    return encoder.encode_document(TEXTS)


def test_pandas(encoder: Encoder, expected: np.ndarray) -> None:
    frame = pd.DataFrame({"text": TEXTS}, index=range(100, 112))
    np.testing.assert_array_equal(encoder.encode_document(frame["text"]), expected)
    with pytest.raises(TypeError, match="inputs is DataFrame"):
        encoder.encode_document(frame)
    frame.loc[105, "text"] = None
    with pytest.raises(TypeError, match="text 5 is"):
        encoder.encode_document(frame["text"])


def test_datasets(encoder: Encoder, expected: np.ndarray) -> None:
    dataset = datasets.Dataset.from_dict({"text": TEXTS})
    np.testing.assert_array_equal(encoder.encode_document(dataset["text"]), expected)
    embedded = dataset.map(
        lambda batch: {"vector": encoder.encode_document(batch["text"])},
        batched=True,
        batch_size=12,
        keep_in_memory=True,
        new_fingerprint="embedded",
    )
    np.testing.assert_array_equal(np.array(embedded["vector"], np.float32), expected)


def test_arrow(encoder: Encoder, expected: np.ndarray) -> None:
    column = pa.table({"text": TEXTS})["text"]
    np.testing.assert_array_equal(encoder.encode_document(column.to_pylist()), expected)
    with pytest.raises(TypeError, match="text 0 is StringScalar"):
        encoder.encode_document(column)
