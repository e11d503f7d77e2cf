"""Smaller vectors: int8 with a fixed range, and one bit per feature."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

Precision = Literal["float32", "int8", "uint8", "binary", "ubinary"]
PRECISIONS: tuple[Precision, ...] = ("float32", "int8", "uint8", "binary", "ubinary")


def check_precision(precision: str, dim: int, ranges: npt.ArrayLike | None) -> None:
    """Refuse a precision that cannot be had.

    Raises:
        ValueError: An unknown precision, a dimension that does not fill whole bytes for the binary
            ones, or ranges that are not (2, dim) and finite with minimum below maximum.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}, expected one of {', '.join(PRECISIONS)}")
    if precision.endswith("binary") and dim % 8:
        raise ValueError(
            f"precision {precision!r} packs 8 features a byte; {dim} is no multiple of 8"
        )
    if ranges is None:
        return
    if precision not in ("int8", "uint8"):
        raise ValueError(f"ranges= applies to int8 and uint8, not to {precision!r}")
    given = np.asarray(ranges, dtype=np.float32)
    if given.shape != (2, dim):
        raise ValueError(
            f"ranges has shape {given.shape}, expected (2, {dim}): the minimum of each feature, "
            "then its maximum"
        )
    # written so that NaN is none
    wrong = ~(np.isfinite(given).all(axis=0) & (given[0] < given[1]))
    if wrong.any():
        first = int(wrong.argmax())
        raise ValueError(
            f"ranges of {int(wrong.sum())} of {dim} features are no finite minimum below a finite "
            f"maximum; feature {first} has {given[0, first]} and {given[1, first]}"
        )


def quantize(
    vectors: npt.NDArray[np.float32], precision: Precision, ranges: npt.ArrayLike | None = None
) -> npt.NDArray[np.generic]:
    """Quantise unit vectors.

    int8 maps [-4/sqrt(d), 4/sqrt(d)], four standard deviations of a random unit vector's feature,
    linearly to [-127, 127], rounds to nearest and clips, so zero stays zero and dot products keep
    their order. The range is fixed: a text quantises alike alone and among a million. uint8 is the
    same plus 128. With `ranges` both give the codes of sentence-transformers 6.2 for those ranges.
    binary and ubinary keep the signs, 8 to a byte, first feature highest.

    Args:
        vectors: (n, d), unit norm.
        precision: What to make.
        ranges: (2, d), minimum and maximum of each feature, in place of the fixed range.

    Returns:
        (n, d) float32, int8 or uint8; (n, d / 8) int8 for binary, uint8 for ubinary.

    Raises:
        ValueError: Vectors that are not finite, for which only float32 has room.
    """
    if precision == "float32":
        return vectors
    if not (is_finite := np.isfinite(vectors).all(axis=1)).all():
        raise ValueError(
            f"{int((~is_finite).sum())} of {len(vectors)} vectors are not finite, first that of "
            f"row {int(is_finite.argmin())}; precision {precision!r} has no code for them, float32 "
            "gives them as they are"
        )
    if precision in ("binary", "ubinary"):
        packed: npt.NDArray[np.uint8] = np.packbits(vectors > 0, axis=1)
        # sentence-transformers' convention: the signed form is the unsigned one less 128
        if precision == "ubinary":
            return packed
        signed: npt.NDArray[np.int8] = (packed.astype(np.int16) - 128).astype(np.int8)
        return signed
    if ranges is None:
        limit = np.float32(4 / np.sqrt(max(vectors.shape[1], 1)))
        codes = np.clip(np.rint(vectors / limit * 127), -127, 127)
        return np.asarray(codes if precision == "int8" else codes + 128, dtype=precision)
    low, high = np.asarray(ranges, dtype=np.float32)
    codes = np.clip(np.floor((vectors - low) / ((high - low) / 255)), 0, 255)
    return np.asarray(codes - 128 if precision == "int8" else codes, dtype=precision)
