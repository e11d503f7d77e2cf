"""The operations of `fused` for a batch whose tables are on the device already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import fused
from .fused import Packing
from .layout import Layout
from .reference import MoEWeights, Norm, Pooling


class TableOps:
    """A kernel module, as a model takes one, bound to one batch.

    Nothing here asks the host for a length, so that a CUDA graph can record a forward and be
    replayed on another batch: the tables are read from where they lie. Rows of padding are in no
    expert's group and belong to no text; what they hold reaches no other row.

    Args:
        kernels: `fused` or `invariant`.
        layout: The room, with a tile for attention of these kernels.
        numbers: Its tables, (layout.size,) int32 on the device.
        padded: The batch may be smaller than the room. If it never is, the kernels need not ask.
    """

    def __init__(self, kernels: Any, layout: Layout, numbers: Tensor, *, padded: bool) -> None:
        self.tables = layout.split(numbers)
        self._kernels = kernels
        self._layout = layout
        self._live = self.tables.live if padded else None
        self.add_layer_norm = kernels.add_layer_norm
        self.linear = kernels.linear
        self.attention = kernels.attention
        self.embed = kernels.embed

    def moe_block(
        self, x_TD: Tensor, y_TD: Tensor, norm: Norm, moe: MoEWeights, next_norm: Norm
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As the kernels', with the live count."""
        out: tuple[Tensor, Tensor, Tensor] = self._kernels.moe_block(
            x_TD, y_TD, norm, moe, next_norm, live=self._live
        )
        return out

    def pack(
        self,
        lengths: Sequence[int],
        positions_T: Tensor,
        span: int,
        head_width: int,
        rotary_base: float,
        dtype: torch.dtype,
    ) -> Packing:
        """As `fused.pack`, of the tables: lengths and positions are not looked at."""
        tables = self.tables
        cos, sin = fused.rotary_table(span, head_width, rotary_base, tables.live.device)
        # kept, for a recording reads them where they are
        self._packing = Packing(
            tables.positions_T,
            cos,
            sin,
            tables.blocks,
            tables.bounds,
            min(self._layout.longest, span),
            self._layout.tile,
        )
        return self._packing

    def pool(self, hidden_TD: Tensor, lengths: Sequence[int], pooling: Pooling) -> Tensor:
        """As `fused.pool`, (texts of the layout, dim); NaN where a text is absent."""
        return fused.pool_between(hidden_TD, self.tables.bounds, pooling)
