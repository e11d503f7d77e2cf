"""The tables of a packed batch as one run of int32 numbers, made on the host and copied at once.

They may be laid out for more tokens and texts than the batch has, so that what reads them, a
recorded CUDA graph say, can be given another batch in the same place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from .configs import AttentionTile

# every table starts at a multiple of 16 bytes, for which kernels are compiled
_ALIGNMENT = 4


class Tables(NamedTuple):
    """Views of one run of numbers; int32."""

    # tokens that are real, (1,)
    live: Tensor
    # where each text starts, and the last one ends, (texts + 1,); absent texts are empty
    bounds: Tensor
    # first token of the text, its tokens, first query, for each block of queries, (blocks, 3);
    # rows to spare are zero
    blocks: Tensor
    # place of each token in its text, (tokens,); zero for padding
    positions_T: Tensor
    # token ids, (tokens,); zero for padding
    ids_T: Tensor


class Layout(NamedTuple):
    """Room for a batch of at most so many tokens, texts and blocks of queries."""

    tokens: int
    texts: int
    blocks: int
    # tokens of a text at most
    longest: int
    # how attention cuts the batch
    tile: AttentionTile

    @classmethod
    def of(cls, lengths: Sequence[int], tile: AttentionTile) -> Layout:
        """Room for texts of these lengths and nothing else."""
        blocks = sum(-(-length // tile.block_m) for length in lengths)
        return cls(sum(lengths), len(lengths), blocks, max(lengths, default=1), tile)

    @classmethod
    def room(cls, tokens: int, texts: int, tile: AttentionTile) -> Layout:
        """Room for any division of so many tokens, or fewer, into so many texts, or fewer."""
        blocks = (tokens + min(texts, tokens) * (tile.block_m - 1)) // tile.block_m
        return cls(tokens, texts, blocks, tokens, tile)

    @property
    def size(self) -> int:
        """Numbers in all tables together."""
        return sum(map(_aligned, self._sizes))

    @property
    def _sizes(self) -> tuple[int, ...]:
        return (1, self.texts + 1, 3 * self.blocks, self.tokens, self.tokens)

    def split(self, numbers: Tensor) -> Tables:
        """The tables in a run of `size` numbers, as views."""
        views, start = [], 0
        for size in self._sizes:
            views.append(numbers[start : start + size])
            start += _aligned(size)
        live, bounds, blocks, positions_T, ids_T = views
        return Tables(live, bounds, blocks.view(-1, 3), positions_T, ids_T)

    def fill(self, numbers: Tensor, ids: Sequence[int], lengths: Sequence[int]) -> None:
        """Write a batch's tables into `size` numbers on the host, over whatever they held.

        Raises:
            ValueError: The batch is larger than the layout, has no token, or its lengths are wrong.
        """
        lengths_B = np.array(lengths, dtype=np.int64)
        if not 1 <= len(ids) <= self.tokens or len(lengths) > self.texts:
            raise ValueError(
                f"{len(lengths)} texts of {len(ids)} tokens do not go into {self}, "
                "which needs at least one"
            )
        if lengths_B.min() < 1 or lengths_B.sum() != len(ids):
            raise ValueError(f"lengths must be at least 1 and add up to {len(ids)} tokens")
        numbers.zero_()
        live, bounds, blocks, positions_T, ids_T = (one.numpy() for one in self.split(numbers))
        live[0] = len(ids)
        ends_B = lengths_B.cumsum()
        starts_B = ends_B - lengths_B
        bounds[1 : len(lengths) + 1] = ends_B
        bounds[len(lengths) + 1 :] = len(ids)
        positions_T[: len(ids)] = np.arange(len(ids)) - starts_B.repeat(lengths_B)
        ids_T[: len(ids)] = ids
        blocks_B = -(-lengths_B // self.tile.block_m)
        text_of = np.arange(len(lengths)).repeat(blocks_B)
        block_of = np.arange(len(text_of)) - (blocks_B.cumsum() - blocks_B)[text_of]
        rows = blocks[: len(text_of)]
        rows[:, 0], rows[:, 1] = starts_B[text_of], lengths_B[text_of]
        rows[:, 2] = block_of * self.tile.block_m


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
