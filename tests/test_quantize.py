from __future__ import annotations

import numpy as np
import pytest

from nomoe.quantize import check_precision, quantize


@pytest.fixture
def vectors() -> np.ndarray:
    values = np.random.default_rng(0).standard_normal((200, 64)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def test_int8_is_linear_symmetric_and_clipped(vectors: np.ndarray) -> None:
    limit = 4 / np.sqrt(64)
    vectors[0, :5] = [0, limit, -limit, 0.99, -0.99]
    codes = quantize(vectors, "int8")
    assert codes.dtype == np.int8
    assert codes[0, :5].tolist() == [0, 127, -127, 127, -127]
    inside = np.abs(vectors) <= limit
    restored = codes.astype(np.float64) * limit / 127
    assert np.abs(restored - vectors)[inside].max() <= limit / 127 / 2 + 1e-7
    assert np.array_equal(quantize(vectors, "uint8").astype(int), codes.astype(int) + 128)


def test_a_text_quantises_alike_alone_and_among_many(vectors: np.ndarray) -> None:
    for precision in ("int8", "uint8", "binary", "ubinary"):
        alone = np.concatenate([quantize(row[None], precision) for row in vectors])
        assert np.array_equal(alone, quantize(vectors, precision))


@pytest.mark.parametrize("precision", ["int8", "uint8"])
def test_ranges_give_sentence_transformers_codes(vectors: np.ndarray, precision: str) -> None:
    quantization = pytest.importorskip("sentence_transformers.util.quantization")
    limits = np.stack([vectors.min(0), vectors.max(0)])
    theirs = quantization.quantize_embeddings(vectors, precision=precision, ranges=limits)
    ours = quantize(vectors, precision, limits)
    assert ours.dtype == theirs.dtype
    assert np.array_equal(ours, theirs)


def test_values_outside_the_ranges_are_clipped(vectors: np.ndarray) -> None:
    limits = np.stack([np.full(64, -0.01), np.full(64, 0.01)])
    codes = quantize(vectors, "uint8", limits)
    assert (codes[vectors > 0.01] == 255).all()
    assert (codes[vectors < -0.01] == 0).all()
    codes = quantize(vectors, "int8", limits)
    assert (codes[vectors > 0.01] == 127).all()
    assert (codes[vectors < -0.01] == -128).all()


def test_binary_agrees_with_sentence_transformers(vectors: np.ndarray) -> None:
    quantization = pytest.importorskip("sentence_transformers.util.quantization")
    for precision in ("binary", "ubinary"):
        theirs = quantization.quantize_embeddings(vectors, precision=precision)
        ours = quantize(vectors, precision)
        assert ours.dtype == theirs.dtype
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("precision", ["int8", "uint8", "binary", "ubinary"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_has_no_code(vectors: np.ndarray, precision: str, value: float) -> None:
    vectors[7, 3] = value
    with pytest.raises(ValueError, match="1 of 200 vectors are not finite, first that of row 7"):
        quantize(vectors, precision)
    assert quantize(vectors, "float32") is vectors


def test_bits_by_hand() -> None:
    row = np.array([[1, -1, 1, 1, -1, -1, -1, 0.5]], dtype=np.float32)
    assert quantize(row, "ubinary").tolist() == [[0b10110001]]
    assert quantize(row, "binary").tolist() == [[0b10110001 - 128]]


@pytest.mark.parametrize(("precision", "width"), [("int8", 16), ("ubinary", 2), ("float32", 16)])
def test_no_rows(precision: str, width: int) -> None:
    assert quantize(np.empty((0, 16), np.float32), precision).shape == (0, width)


@pytest.mark.parametrize(
    ("precision", "dim", "ranges", "message"),
    [
        ("int4", 64, None, "expected one of float32, int8, uint8, binary, ubinary"),
        ("binary", 60, None, "60 is no multiple of 8"),
        ("float32", 2, [[0, 0], [1, 1]], "ranges= applies to int8 and uint8"),
        ("int8", 3, [[0, 0], [1, 1]], r"shape \(2, 2\), expected \(2, 3\)"),
        ("int8", 2, [[0, 1], [1, 1]], "ranges of 1 of 2 features .* feature 1 has 1.0 and 1.0"),
        ("int8", 2, [[0, 0], [1, float("inf")]], "feature 1 has 0.0 and inf"),
        ("int8", 2, [[float("nan"), 0], [1, -1]], "ranges of 2 of 2 .* feature 0 has nan and 1.0"),
    ],
)
def test_refusals(precision: str, dim: int, ranges: list[list[float]] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_precision(precision, dim, ranges)
