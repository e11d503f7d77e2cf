"""The operations of `nomoe_kernels.reference` as Triton kernels: same names, same results.

(All but `expert_mlp` and `rotate`, the reference's own steps.)

They run on CUDA devices of compute capability 8.0 and up, and on a CPU under Triton's interpreter
(TRITON_INTERPRET=1 in the environment before the first import), which is for tests. float32 sums
use three tensor-core passes (tf32x3), so that float32 stays float32.

There is no host synchronisation and no autotuning at run time, except that `permute` reads back
the range of a routing it is handed, and that a table of rotary angles is copied at its first use.
There is no backward pass: a gradient raises RuntimeError.
Kernels that make descriptors for the tensor memory accelerator need device memory, for which
`triton.set_allocator` is given torch's allocator.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, chain
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import varlen

from . import checks, configs, launch, reference
from .configs import AttentionShape, AttentionTile, DenseShape, Plan, Shape, Tile
from .reference import MoEWeights, Norm, Pooling, rotary_angles


def route(
    x_TD: Tensor, router_weight_ED: Tensor, top_k: int, *, normalize: bool = False
) -> tuple[Tensor, Tensor]:
    """As `reference.route`. A token with a NaN or an infinity gets experts 0 to K - 1, weight NaN.

    Raises:
        ValueError: Shapes, dtypes, devices or strides that no kernel takes.
    """
    checks.tensor("x_TD", x_TD, (None, None))
    checks.router(router_weight_ED, x_TD, top_k)
    weights_TK, experts_TK = launch.empty_routing(x_TD, top_k)
    launch.route(x_TD, router_weight_ED, weights_TK, experts_TK, normalize=normalize)
    return _made_from(weights_TK, x_TD, router_weight_ED), experts_TK


def add_norm_route(
    x_TD: Tensor,
    y_TD: Tensor,
    norm: Norm,
    router_weight_ED: Tensor,
    top_k: int,
    *,
    normalize: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.add_norm_route`: residual sum, LayerNorm and `route` in one kernel.

    Raises:
        ValueError: As `route`.
    """
    checks.tensor("x_TD", x_TD, (None, None))
    T, D = x_TD.shape
    checks.tensor("y_TD", y_TD, (T, D), like=x_TD)
    checks.norm("norm", norm, x_TD)
    checks.router(router_weight_ED, x_TD, top_k)
    weights_TK, experts_TK = launch.empty_routing(x_TD, top_k)
    normed_TD = torch.empty_like(x_TD)
    launch.route(
        x_TD, router_weight_ED, weights_TK, experts_TK,
        normalize=normalize, rounded_TD=normed_TD, added=(y_TD, norm),
    )  # fmt: skip
    inputs = (x_TD, y_TD, norm.weight_D, norm.bias_D)
    weights_TK = _made_from(weights_TK, *inputs, router_weight_ED)
    return _made_from(normed_TD, *inputs), weights_TK, experts_TK


def permute(experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """As `reference.permute`. Reads the range of the indices back: on CUDA this synchronises.

    Raises:
        ValueError: Not an int64 (T, K), more experts or choices than the kernels take, or an
            expert index outside 0 to E - 1.
    """
    if experts_TK.dim() != 2 or experts_TK.dtype != torch.int64:
        raise ValueError(
            f"experts_TK is {tuple(experts_TK.shape)} of {experts_TK.dtype}, "
            "expected (T, K) of torch.int64"
        )
    checks.device("experts_TK", experts_TK)
    checks.counts(num_experts, experts_TK.shape[1])
    checks.rows(*experts_TK.shape)
    experts_TK = experts_TK.contiguous()
    R = experts_TK.numel()
    if R == 0:
        ends_E = torch.zeros(num_experts, dtype=torch.int32, device=experts_TK.device)
        return experts_TK.flatten(), ends_E
    low, high = (int(value) for value in experts_TK.aminmax())
    if low < 0 or high >= num_experts:
        raise ValueError(f"experts_TK runs from {low} to {high}, outside 0 to {num_experts - 1}")
    counts_PE, chunk = launch.count(experts_TK, num_experts)
    order_R, ends_E, _ = launch.permute(experts_TK, counts_PE, chunk, None)
    return order_R, ends_E


def grouped_gemm(
    rows_RI: Tensor,
    weight_EIO: Tensor,
    ends_E: Tensor,
    *,
    gelu: bool = False,
    row_weights_R: Tensor | None = None,
    gather_R: Tensor | None = None,
    scatter_R: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """As `reference.grouped_gemm`, with one rounding after the GELU and the row weights.

    Args:
        rows_RI: As the reference.
        weight_EIO: As the reference, with I or O contiguous and the experts packed.
        ends_E: As the reference; on a device its values are not checked.
        gelu: As the reference.
        row_weights_R: As the reference.
        gather_R: As the reference; indices are not checked.
        scatter_R: As the reference; indices are not checked.
        tile: How to cut the product, instead of what the formula of `configs` picks.

    Raises:
        ValueError: Shapes, dtypes, devices or strides that no kernel takes.
    """
    checks.tensor("rows_RI", rows_RI, (None, None))
    E, inner, outer = checks.weight("weight_EIO", weight_EIO, rows_RI, rows_RI.shape[1])
    R = len(rows_RI) if gather_R is None else len(gather_R)
    checks.integers("ends_E", ends_E, E, torch.int32, rows_RI)
    for name, index_R in (("gather_R", gather_R), ("scatter_R", scatter_R)):
        if index_R is not None:
            checks.integers(name, index_R, R, torch.int64, rows_RI)
    if row_weights_R is not None:
        checks.tensor("row_weights_R", row_weights_R, (R,), like=rows_RI, dtype=torch.float32)
    if weight_EIO.dtype != rows_RI.dtype:
        raise ValueError(f"rows_RI is {rows_RI.dtype}, weight_EIO {weight_EIO.dtype}")
    if tile is None:
        shape = Shape(E, inner, outer, rows_RI.itemsize, R)
        tile = configs.largest(launch.device(rows_RI.device), shape, inner, outer)
    if tile.kernel in ("tma", "specialized") and gather_R is not None:
        rows_RI, gather_R = rows_RI[gather_R], None
    out_RO = rows_RI.new_empty(R, outer)
    launch.grouped_gemm(
        rows_RI, weight_EIO, ends_E, out_RO, tile,
        gelu=gelu, row_weights_R=row_weights_R, gather_R=gather_R, scatter_R=scatter_R,
    )  # fmt: skip
    return _made_from(
        out_RO, rows_RI, weight_EIO, *([] if row_weights_R is None else [row_weights_R])
    )


def unpermute(rows_RD: Tensor, order_R: Tensor | None, bias_D: Tensor, top_k: int) -> Tensor:
    """As `reference.unpermute`; that order_R is a permutation is not checked.

    Raises:
        ValueError: Shapes, dtypes, devices or strides that no kernel takes.
    """
    rows_RD = _in_token_order(rows_RD, order_R, top_k)
    checks.tensor("bias_D", bias_D, rows_RD.shape[1:], like=rows_RD)
    out_TD = rows_RD.new_empty(len(rows_RD) // top_k, rows_RD.shape[1], dtype=torch.float32)
    launch.unpermute(rows_RD[None], bias_D, out_TD, top_k)
    return _made_from(out_TD, rows_RD, bias_D)


def unpermute_add_norm(
    rows_RD: Tensor,
    order_R: Tensor | None,
    bias_D: Tensor,
    top_k: int,
    residual_TD: Tensor,
    norm: Norm,
) -> Tensor:
    """As `reference.unpermute_add_norm`: `unpermute`, residual sum and LayerNorm in one kernel.

    Raises:
        ValueError: As `unpermute`.
    """
    rows_RD = _in_token_order(rows_RD, order_R, top_k)
    R, D = rows_RD.shape
    checks.tensor("bias_D", bias_D, (D,), like=rows_RD)
    checks.tensor("residual_TD", residual_TD, (R // top_k, D), like=rows_RD)
    checks.norm("norm", norm, residual_TD)
    out_TD = torch.empty_like(residual_TD)
    launch.unpermute(rows_RD[None], bias_D, out_TD, top_k, added=(residual_TD, norm))
    return _made_from(out_TD, rows_RD, bias_D, residual_TD, norm.weight_D, norm.bias_D)


def add_layer_norm(x_TD: Tensor, y_TD: Tensor, norm: Norm) -> Tensor:
    """As `reference.add_layer_norm`; y may be one row (D,) for all tokens.

    Raises:
        ValueError: Shapes, dtypes, devices or strides that no kernel takes.
    """
    checks.tensor("x_TD", x_TD, (None, None))
    T, D = x_TD.shape
    checks.tensor("y_TD", y_TD, (D,) if y_TD.dim() == 1 else (T, D), like=x_TD)
    checks.norm("norm", norm, x_TD)
    out_TD = torch.empty_like(x_TD)
    launch.add_layer_norm(x_TD, y_TD, norm, out_TD)
    return _made_from(out_TD, x_TD, y_TD, norm.weight_D, norm.bias_D)


def linear(
    x_TI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    *,
    gelu: bool = False,
    tile: Tile | Literal["library"] | None = None,
) -> Tensor:
    """As `reference.linear`, with one rounding after the GELU, in a kernel or by torch's library.

    Args:
        x_TI: As the reference.
        weight_OI: As the reference.
        bias_O: As the reference.
        gelu: As the reference.
        tile: How to cut the product, or "library", instead of what `configs.dense` picks, or under
            autocast the library, unless there is nothing to cast. The library takes whatever torch
            takes, and its GELU reads a rounded product.

    Raises:
        ValueError: Shapes, dtypes, devices or strides that no kernel takes.
    """
    kind = x_TI.device.type
    if tile is None and torch.is_autocast_enabled(kind):
        # which casts the operands of torch's products alone
        wanted = torch.get_autocast_dtype(kind)
        tile = None if x_TI.dtype == weight_OI.dtype == wanted else "library"
    if tile is None:
        outer, inner = weight_OI.shape
        shape = DenseShape(inner, outer, x_TI.itemsize, len(x_TI), gelu)
        tile = configs.dense(launch.device(x_TI.device), shape)
    if tile == "library":
        return reference.linear(x_TI, weight_OI, bias_O, gelu=gelu)
    checks.tensor("x_TI", x_TI, (None, None))
    checks.tensor("weight_OI", weight_OI, (None, x_TI.shape[1]), like=x_TI, dtype=x_TI.dtype)
    outer = len(weight_OI)
    if outer % 16:
        raise ValueError(f"weight_OI makes {outer} columns, expected a multiple of 16")
    inputs = [x_TI, weight_OI]
    if bias_O is not None:
        checks.tensor("bias_O", bias_O, (outer,), like=x_TI, dtype=x_TI.dtype)
        inputs.append(bias_O)
    out_TO = x_TI.new_empty(len(x_TI), outer)
    launch.linear(x_TI, weight_OI, bias_O, out_TO, tile, gelu=gelu)
    return _made_from(out_TO, *inputs)


class Packing(NamedTuple):
    """What attention asks of a batch; made by `pack`."""

    # place of each token in its text, (T,) int32
    positions_T: Tensor
    # of every position, (positions, H / 2) float32
    cos: Tensor
    sin: Tensor
    # one row for each block of queries: the text's first token, its tokens, the first query; int32
    blocks: Tensor
    # where each text starts, and the last one ends, (texts + 1,) int32
    bounds: Tensor
    # tokens of a text at most
    longest: int
    tile: AttentionTile


def attention_tile(
    tokens: int, longest: int, head_width: int, dtype: torch.dtype, device: torch.device
) -> AttentionTile:
    """How attention runs over so many tokens in texts of at most `longest`."""
    shape = AttentionShape(head_width, dtype.itemsize, longest, tokens)
    return configs.attention(launch.device(device), shape)


def pack(
    lengths: Sequence[int],
    positions_T: Tensor,
    span: int,
    head_width: int,
    rotary_base: float,
    dtype: torch.dtype,
    *,
    tile: AttentionTile | None = None,
) -> Packing:
    """As `reference.pack`; `tile` is how attention runs, instead of what `configs` picks."""
    device, longest = positions_T.device, max(lengths, default=1)
    if tile is None:
        tile = attention_tile(sum(lengths), longest, head_width, dtype, device)
    bounds = [0, *accumulate(lengths)]
    blocks = [
        (start, length, query)
        for start, length in zip(bounds, lengths, strict=False)
        for query in range(0, length, tile.block_m)
    ]
    # one copy for both; the blocks start at a multiple of 16 bytes, for which kernels are compiled
    gap = [0] * (-len(bounds) % 4)
    numbers = _copy([*bounds, *gap, *chain.from_iterable(blocks)], (-1,), device)
    cos, sin = rotary_table(span, head_width, rotary_base, device)
    return Packing(
        positions_T.to(torch.int32),
        cos,
        sin,
        numbers[len(bounds) + len(gap) :].view(len(blocks), 3),
        numbers[: len(bounds)],
        longest,
        tile,
    )


def attention(qkv_T3NH: Tensor, packing: Packing) -> Tensor:
    """As `reference.attention`, as the packing's tile says; may overwrite qkv.

    Raises:
        ValueError: Shapes, dtypes, devices or strides that no kernel takes.
    """
    head_width = 2 * packing.cos.shape[1]
    checks.tensor("qkv_T3NH", qkv_T3NH, (len(packing.positions_T), 3, None, head_width))
    T, _, N, H = qkv_T3NH.shape
    if packing.tile.kernel == "varlen" and qkv_T3NH.dtype == torch.float32:
        raise ValueError("qkv_T3NH is torch.float32, torch's varlen_attn takes 16 bits alone")
    if packing.tile.kernel == "rotated" and packing.longest * 3 * N * H >= 1 << 31:
        raise ValueError(
            f"a text has {packing.longest} tokens, too many for offsets of 32 bits within its qkv"
        )
    out_TNH = qkv_T3NH.new_empty(T, N, H)
    if T:
        if packing.tile.kernel != "rotating":
            # our kernel rotates its queries itself
            parts = slice(0, 2) if packing.tile.kernel == "varlen" else slice(1, 2)
            launch.rotate(qkv_T3NH[:, parts], packing.positions_T, packing.cos, packing.sin)
        if packing.tile.kernel == "varlen":
            q_TNH, k_TNH, v_TNH = qkv_T3NH.detach().unbind(dim=1)
            bounds, longest = packing.bounds, packing.longest
            # for queries, then for keys
            out_TNH = varlen.varlen_attn(  # type: ignore[assignment]
                q_TNH, k_TNH, v_TNH, bounds, bounds, longest, longest
            )
        else:
            launch.attention(
                qkv_T3NH, packing.positions_T, packing.cos, packing.sin, packing.blocks, out_TNH,
                packing.tile,
            )  # fmt: skip
    return _made_from(out_TNH.flatten(1), qkv_T3NH)


def embed(ids_T: Tensor, words_VD: Tensor, type_D: Tensor, norm: Norm) -> Tensor:
    """As `reference.embed`; ids are not checked against V.

    Raises:
        ValueError: Shapes, dtypes, devices or strides that no kernel takes.
    """
    checks.tensor("words_VD", words_VD, (None, None))
    D = words_VD.shape[1]
    checks.integers("ids_T", ids_T, len(ids_T), torch.int64, words_VD)
    checks.tensor("type_D", type_D, (D,), like=words_VD)
    checks.norm("norm", norm, words_VD)
    out_TD = words_VD.new_empty(len(ids_T), D)
    launch.embed(ids_T, words_VD, type_D, norm, out_TD)
    return _made_from(out_TD, words_VD, type_D, norm.weight_D, norm.bias_D)


def pool(hidden_TD: Tensor, lengths: Sequence[int], pooling: Pooling) -> Tensor:
    """As `reference.pool`, in one kernel.

    Raises:
        ValueError: Shapes, dtypes, devices or strides that no kernel takes.
    """
    checks.tensor("hidden_TD", hidden_TD, (sum(lengths), None))
    bounds = [0, *accumulate(lengths)]
    return pool_between(hidden_TD, _copy(bounds, (len(bounds),), hidden_TD.device), pooling)


def pool_between(hidden_TD: Tensor, bounds: Tensor, pooling: Pooling) -> Tensor:
    """`pool` of texts that start at bounds[:-1], int32 on the device; NaN for an empty one."""
    D = hidden_TD.shape[1]
    if not 1 <= pooling.dim <= D:
        raise ValueError(f"{pooling.dim} features were asked for, hidden_TD has {D}")
    out_BD = hidden_TD.new_empty(len(bounds) - 1, pooling.dim, dtype=torch.float32)
    launch.pool(hidden_TD, bounds, out_BD, pooling)
    return _made_from(out_BD, hidden_TD)


def moe_layer(
    x_TD: Tensor,
    router_weight_ED: Tensor,
    w1_EDF: Tensor,
    w2_EFD: Tensor,
    bias_D: Tensor,
    top_k: int,
    *,
    normalize: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.moe_layer`: the whole layer as one operator, `torch.ops.nomoe.moe_layer`.

    Opaque to torch.compile. Nothing in it waits for the device, so that a CUDA graph can record it.
    A gradient through it raises RuntimeError.

    Raises:
        ValueError: Shapes, dtypes, devices or strides that no kernel takes.
    """
    out: tuple[Tensor, Tensor, Tensor] = torch.ops.nomoe.moe_layer(
        x_TD, router_weight_ED, w1_EDF, w2_EFD, bias_D, top_k, normalize
    )
    return out


@torch.library.custom_op("nomoe::moe_layer", mutates_args=())
def _moe_layer(
    x_TD: Tensor,
    router_weight_ED: Tensor,
    w1_EDF: Tensor,
    w2_EFD: Tensor,
    bias_D: Tensor,
    top_k: int,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    checks.layer(x_TD, router_weight_ED, w1_EDF, w2_EFD, bias_D, top_k)
    return run_layer(x_TD, router_weight_ED, w1_EDF, w2_EFD, bias_D, top_k, normalize=normalize)


@_moe_layer.register_fake
def _(
    x_TD: Tensor,
    router_weight_ED: Tensor,
    w1_EDF: Tensor,
    w2_EFD: Tensor,
    bias_D: Tensor,
    top_k: int,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    weights_TK, experts_TK = launch.empty_routing(x_TD, top_k)
    return torch.empty_like(x_TD, dtype=torch.float32), weights_TK, experts_TK


def _no_backward(ctx: object, *gradients: Tensor | None) -> None:
    raise RuntimeError(
        "nomoe's Triton kernels have no backward pass: train with backend='torch', "
        "or run inference under torch.no_grad()"
    )


_moe_layer.register_autograd(_no_backward)


class _Inference(torch.autograd.Function):
    """The identity in its first argument, whose gradient is a clear error."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *inputs: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        _no_backward(ctx)


def _made_from(x: Tensor, *inputs: Tensor) -> Tensor:
    """Tie a kernel's result to what it was made from.

    Autograd knows nothing of the kernels and would take x for a constant: a gradient through it has
    to raise instead.
    """
    if torch.is_grad_enabled() and any(one.requires_grad for one in inputs):
        out: Tensor = _Inference.apply(x, *inputs)  # type: ignore[no-untyped-call]
        return out
    return x


def run_layer(
    x_TD: Tensor,
    router_weight_ED: Tensor,
    w1_EDF: Tensor,
    w2_EFD: Tensor,
    bias_D: Tensor,
    top_k: int,
    *,
    normalize: bool = False,
    tiles: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `moe_layer` runs, without its checks; `tiles` replaces the configured plan."""
    moe = MoEWeights(router_weight_ED, w1_EDF, w2_EFD, bias_D, top_k, normalize)
    rounded_TD = None if x_TD.dtype == w1_EDF.dtype else torch.empty_like(x_TD, dtype=w1_EDF.dtype)
    return _run(x_TD, moe, rounded_TD, tiles=tiles)


def moe_block(
    x_TD: Tensor,
    y_TD: Tensor,
    norm: Norm,
    moe: MoEWeights,
    next_norm: Norm,
    *,
    live: Tensor | None = None,
    tiles: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.moe_block`: both norms are part of the kernels beside them.

    Args:
        x_TD: As the reference, in the dtype of the weights.
        y_TD: As the reference.
        norm: As the reference.
        moe: As the reference.
        next_norm: As the reference.
        live: Tokens that are real, (1,) int32 on the device; None for all. The others are sent to
            expert E, which is none, and their rows of the result hold anything.
        tiles: How to cut the products, instead of the configured plan.

    Raises:
        ValueError: Shapes, dtypes, devices or strides that no kernel takes.
    """
    checks.layer(x_TD, *moe[:5])
    if x_TD.dtype != moe.w1_EDF.dtype:
        raise ValueError(f"x_TD is {x_TD.dtype}, the weights {moe.w1_EDF.dtype}")
    checks.tensor("y_TD", y_TD, x_TD.shape, like=x_TD)
    checks.norm("norm", norm, x_TD)
    checks.norm("next_norm", next_norm, x_TD)
    if live is not None:
        checks.integers("live", live, 1, torch.int32, x_TD)
    out_TD, weights_TK, experts_TK = _run(
        x_TD, moe, torch.empty_like(x_TD),
        before=(y_TD, norm), after=next_norm, live=live, tiles=tiles,
    )  # fmt: skip
    inputs = (x_TD, y_TD, *norm[:2], *moe[:4], *next_norm[:2])
    return _made_from(out_TD, *inputs), _made_from(weights_TK, *inputs), experts_TK


def _run(
    x_TD: Tensor,
    moe: MoEWeights,
    rounded_TD: Tensor | None,
    *,
    before: tuple[Tensor, Norm] | None = None,
    after: Norm | None = None,
    live: Tensor | None = None,
    tiles: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A layer's kernels, between the norms given.

    `rounded_TD` takes what the experts read; None where that is x as it is.
    """
    w1_EDF, w2_EFD, K = moe.w1_EDF, moe.w2_EFD, moe.top_k
    (T, D), (E, _, F) = x_TD.shape, w1_EDF.shape
    R = T * K
    if tiles and (tiles.up.splits > 1 or len({tile.kernel == "small" for tile in tiles}) > 1):
        raise ValueError(
            f"{tiles} mixes the small kernel with another, or splits the first product"
        )
    weights_TK, experts_TK = launch.empty_routing(x_TD, K)
    rows_TD = x_TD if rounded_TD is None else rounded_TD
    # the residual sum rounds once: where no norm follows, that is for the caller to do
    out_TD = torch.empty_like(x_TD, dtype=rows_TD.dtype if after else torch.float32)
    if T == 0:
        return out_TD, weights_TK, experts_TK
    if tiles is None:
        tiles = configs.plan(launch.device(x_TD.device), Shape(E, D, F, w1_EDF.itemsize, R))
    is_small = tiles.up.kernel == "small"
    row_weights_R = weights_TK.flatten()
    h_RF = rows_TD.new_empty(R, F)
    launch.route(
        x_TD, moe.router_ED, weights_TK, experts_TK,
        normalize=moe.normalize, rounded_TD=rounded_TD, added=before, live=live,
    )  # fmt: skip

    if is_small:
        # rows stay in token order throughout
        y_SRD = torch.empty(tiles.down.splits, R, D, dtype=torch.float32, device=x_TD.device)
        launch.small_gemm(rows_TD, w1_EDF, experts_TK, h_RF[None], tiles.up, gelu=True, divisor=K)
        launch.small_gemm(h_RF, w2_EFD, experts_TK, y_SRD, tiles.down, row_weights_R=row_weights_R)
    else:
        counts_PE, chunk = launch.count(experts_TK, E)
        # the tensor memory accelerator of Hopper cannot gather rows
        is_sorted = tiles.up.kernel != "pointer"
        order_R, ends_E, sorted_RD = launch.permute(
            experts_TK, counts_PE, chunk, rows_TD if is_sorted else None
        )
        launch.grouped_gemm(
            rows_TD if sorted_RD is None else sorted_RD, w1_EDF, ends_E, h_RF, tiles.up,
            gelu=True, gather_R=order_R if sorted_RD is None else None, divisor=K,
        )  # fmt: skip
        # what was copied into expert order is read no more, and has as many numbers as the result
        y_RD = rows_TD.new_empty(R, D) if sorted_RD is None else sorted_RD
        # each row goes back beside its token's others, so that the sum reads straight through
        launch.grouped_gemm(
            h_RF, w2_EFD, ends_E, y_RD, tiles.down,
            row_weights_R=row_weights_R, scatter_R=order_R,
        )  # fmt: skip
        y_SRD = y_RD[None]
    launch.unpermute(y_SRD, moe.bias_D, out_TD, K, added=(rows_TD, after) if after else None)
    return out_TD, weights_TK, experts_TK


def _in_token_order(rows_RD: Tensor, order_R: Tensor | None, top_k: int) -> Tensor:
    checks.tensor("rows_RD", rows_RD, (None, None))
    if top_k < 1 or len(rows_RD) % top_k:
        raise ValueError(f"rows_RD has {len(rows_RD)} rows, not a multiple of top_k {top_k}")
    if order_R is None:
        return rows_RD
    checks.integers("order_R", order_R, len(rows_RD), torch.int64, rows_RD)
    position_R = torch.empty_like(order_R)
    position_R[order_R] = torch.arange(len(order_R), device=order_R.device)
    return rows_RD[position_R]


def _copy(numbers: Sequence[Any], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 numbers on a device, from pinned memory, so that nobody waits."""
    is_cuda = device.type == "cuda"
    on_host = torch.tensor(numbers, dtype=torch.int32, device="cpu", pin_memory=is_cuda)
    return on_host.view(shape).to(device, non_blocking=True)


def rotary_table(
    span: int, head_width: int, base: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of all positions below `span` and more; made once, then kept."""
    # few sizes, since each is kept
    return _rotary_table(max(2048, launch.power_of_two(span)), head_width, base, device)


@lru_cache(maxsize=16)
def _rotary_table(
    rows: int, head_width: int, base: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    cos, sin = rotary_angles(torch.arange(rows, device="cpu"), head_width, base)
    # waits for the copy, since the next to use it may be on another stream
    return cos.to(device), sin.to(device)
