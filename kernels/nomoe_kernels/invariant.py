"""The operations of `fused` such that a token's bits do not depend on its batch.

A row's sums are in an order of their own in every kernel; what depends on the batch is which kernel
or tile `configs` picks, and that torch's library picks by the number of rows. Here there is one
kernel and one tile for every product, and one for attention, whatever the batch. Texts alone, in
any company, in any order, with padding behind them or without get the same bits on one device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import configs, fused, launch
from .configs import AttentionTile, Plan
from .fused import Packing, add_layer_norm, attention, embed, pool
from .reference import MoEWeights, Norm

__all__ = [
    "add_layer_norm",
    "attention",
    "attention_tile",
    "embed",
    "linear",
    "moe_block",
    "pack",
    "pool",
]


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, *, gelu: bool = False) -> Tensor:
    """As `fused.linear`."""
    tile = configs.invariant_tile(launch.device(x_TI.device), x_TI.itemsize)
    return fused.linear(x_TI, weight_OI, bias_O, gelu=gelu, tile=tile)


def moe_block(
    x_TD: Tensor,
    y_TD: Tensor,
    norm: Norm,
    moe: MoEWeights,
    next_norm: Norm,
    *,
    live: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `fused.moe_block`."""
    tile = configs.invariant_tile(launch.device(x_TD.device), x_TD.itemsize)
    return fused.moe_block(x_TD, y_TD, norm, moe, next_norm, live=live, tiles=Plan(tile, tile))


def attention_tile(
    tokens: int, longest: int, head_width: int, dtype: torch.dtype, device: torch.device
) -> AttentionTile:
    """As `fused.attention_tile`, by dtype alone."""
    return configs.invariant_attention(dtype.itemsize)


def pack(
    lengths: Sequence[int],
    positions_T: Tensor,
    span: int,
    head_width: int,
    rotary_base: float,
    dtype: torch.dtype,
) -> Packing:
    """As `fused.pack`."""
    tile = configs.invariant_attention(dtype.itemsize)
    return fused.pack(lengths, positions_T, span, head_width, rotary_base, dtype, tile=tile)
