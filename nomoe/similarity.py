"""Cosine similarity of vectors, whatever they are held in."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def cosine(embeddings1: Any, embeddings2: Any) -> Tensor:
    """Cosine similarity of all pairs.

    Args:
        embeddings1: (n, d) or (d,), an array, a tensor, or a list or tuple of vectors or numbers:
            floating-point numbers or int8 codes. uint8 codes are the same plus 128 and have no
            cosine of use; nor have binary ones of eight features a byte, though as int8 they are
            not told from others.
        embeddings2: (m, d) or (d,).

    Returns:
        (n, m), float32; a single vector counts as one row.

    Raises:
        ValueError: Other shapes, or codes in uint8.
    """
    first, second = _unit_rows(embeddings1, embeddings2)
    return first @ second.T


def cosine_pairwise(embeddings1: Any, embeddings2: Any) -> Tensor:
    """Cosine similarity of row i of the one with row i of the other.

    Args:
        embeddings1: As for `cosine`.
        embeddings2: As many rows.

    Returns:
        (n,), float32.

    Raises:
        ValueError: Other shapes, or codes in uint8.
    """
    first, second = _unit_rows(embeddings1, embeddings2)
    if len(first) != len(second):
        raise ValueError(f"{len(first)} rows cannot be paired with {len(second)}")
    return (first * second).sum(dim=1)


def _unit_rows(embeddings1: Any, embeddings2: Any) -> tuple[Tensor, Tensor]:
    rows = []
    for given in (embeddings1, embeddings2):
        tensor = _tensor(given)
        if tensor.dtype == torch.uint8:
            raise ValueError("codes in uint8 have no cosine of use: take float32 or int8")
        tensor = tensor.float()
        if tensor.dim() == 1:
            tensor = tensor[None]
        if tensor.dim() != 2:
            raise ValueError(f"embeddings are {tuple(tensor.shape)}, expected (d,) or (n, d)")
        rows.append(F.normalize(tensor, dim=1))
    first, second = rows
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"embeddings have {first.shape[1]} and {second.shape[1]} features")
    return first, second.to(first.device)


def _tensor(given: Any) -> Tensor:
    """One tensor of an array, a tensor, or a list or tuple of numbers, rows or vectors."""
    if isinstance(given, list | tuple):
        if any(isinstance(one, Tensor) for one in given):
            device = next(one.device for one in given if isinstance(one, Tensor))
            parts = [
                one if isinstance(one, Tensor) else _tensor(np.asarray(one)).to(device)
                for one in given
            ]
            if len({one.shape for one in parts}) > 1:
                shapes = [tuple(one.shape) for one in parts[:8]]
                raise ValueError(f"embeddings are {shapes}, not alike")
            return torch.stack(parts)
        if any(isinstance(one, np.ndarray) for one in given):
            # of which torch takes one at a time
            given = np.stack(given)
    if isinstance(given, np.ndarray):
        # copied only where torch warns of it or cannot view it
        given = np.require(given, given.dtype.newbyteorder("="), ["C", "W"])
    # wherever torch's default device is
    return given if isinstance(given, Tensor) else torch.as_tensor(given, device="cpu")
