"""The tables of a packed batch as one run of int32 numbers, made on the host and copied at once.

They may be laid out for more tokens and texts than the batch has, so that what reads them, a
recorded CUDA graph say, can be given another batch in the same place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from .configs import AttentionTile

_Numbers = npt.NDArray[np.int64]

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
        return Tables(*self._views(numbers))

    def _views(self, numbers: Any) -> list[Any]:
        """The tables in a tensor or an array, in the order of `Tables`."""
        views, start = [], 0
        for size in self._sizes:
            views.append(numbers[start : start + size])
            start += _aligned(size)
        views[2] = views[2].reshape(-1, 3)
        return views

    def fill(self, numbers: Tensor, ids: Sequence[int], lengths: Sequence[int]) -> None:
        """Write a batch's tables into `size` numbers on the host, over whatever they held.

        Args:
            numbers: Where to, (size,) int32.
            ids: Token ids of all texts, end to end; where there are many, an array
                is read faster than a list.
            lengths: Tokens of each text.

        Raises:
            ValueError: The batch is larger than the layout, has no token, or its lengths are wrong.
        """
        tokens, texts = len(ids), len(lengths)
        if not 1 <= tokens <= self.tokens or texts > self.texts:
            raise ValueError(
                f"{texts} texts of {tokens} tokens do not go into {self}, which needs at least one"
            )
        if min(lengths, default=0) < 1 or sum(lengths) != tokens:
            raise ValueError(f"lengths must be at least 1 and add up to {tokens} tokens")
        numbers_of_all = numbers.numpy()
        numbers_of_all.fill(0)
        live, bounds, blocks, positions_T, ids_T = self._views(numbers_of_all)
        lengths_B = np.array(lengths, dtype=np.int64)
        ends_B = lengths_B.cumsum()
        starts_B = ends_B - lengths_B
        live[0] = tokens
        bounds[1 : texts + 1] = ends_B
        bounds[texts + 1 :] = tokens
        ids_T[:tokens] = ids
        positions_T[:tokens] = _counted(starts_B, lengths_B, tokens)
        block_m = self.tile.block_m
        blocks_B = -(-lengths_B // block_m)
        block_ends_B = blocks_B.cumsum()
        count = int(block_ends_B[-1])
        rows = blocks[:count]
        rows[:, 0] = starts_B.repeat(blocks_B)
        rows[:, 1] = lengths_B.repeat(blocks_B)
        rows[:, 2] = _counted(block_ends_B - blocks_B, blocks_B, count) * block_m


def _counted(starts: _Numbers, counts: _Numbers, total: int) -> _Numbers:
    """0 to count - 1 for each count, from each start on."""
    return np.arange(total) - starts.repeat(counts)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
