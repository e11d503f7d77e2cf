"""The operations of `nomoe_kernels.reference` as Triton kernels: same names, same results.

(All but `expert_mlp`, the reference's own way through a layer.)

They run on CUDA devices of compute capability 8.0 and up, and on a CPU under Triton's interpreter
(TRITON_INTERPRET=1 in the environment before the first import), which is for tests. float32 sums
use three tensor-core passes (tf32x3), so that float32 stays float32.

There is no host synchronisation and no autotuning at run time, except that `permute` reads back
the range of a routing it is handed. There is no backward pass: a gradient raises RuntimeError.
Kernels that make descriptors for the tensor memory accelerator need device memory, for which
`triton.set_allocator` is given torch's allocator.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import packed, products, reference, routing
from .configs import Device, Plan, Shape, Tile, device_of, largest, plan, supports
from .layout import query_block
from .reference import MoEWeights, Norm, rotary_angles

MAX_EXPERTS = 64
MAX_TOP_K = 8
# programs that share the routing of a batch: four to a multiprocessor of an H200
ROUTING_PROGRAMS = 528

INTERPRETED = bool(triton.knobs.runtime.interpret)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def route(
    x_TD: Tensor, router_weight_ED: Tensor, top_k: int, *, normalize: bool = False
) -> tuple[Tensor, Tensor]:
    """As `reference.route`. A token with a NaN or an infinity gets experts 0 to K - 1, weight NaN.

    Raises:
        ValueError: Shapes, dtypes, devices or strides that no kernel takes.
    """
    _check("x_TD", x_TD, (None, None))
    _check_router(router_weight_ED, x_TD, top_k)
    weights_TK, experts_TK = _empty_routing(x_TD, top_k)
    _route(x_TD, router_weight_ED, weights_TK, experts_TK, normalize=normalize)
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
    _check("x_TD", x_TD, (None, None))
    T, D = x_TD.shape
    _check("y_TD", y_TD, (T, D), like=x_TD)
    _check_norm("norm", norm, x_TD)
    _check_router(router_weight_ED, x_TD, top_k)
    weights_TK, experts_TK = _empty_routing(x_TD, top_k)
    normed_TD = torch.empty_like(x_TD)
    _route(
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
    _check_device("experts_TK", experts_TK)
    _check_counts(num_experts, experts_TK.shape[1])
    experts_TK = experts_TK.contiguous()
    R = experts_TK.numel()
    if R == 0:
        ends_E = torch.zeros(num_experts, dtype=torch.int32, device=experts_TK.device)
        return experts_TK.flatten(), ends_E
    low, high = (int(value) for value in experts_TK.aminmax())
    if low < 0 or high >= num_experts:
        raise ValueError(f"experts_TK runs from {low} to {high}, outside 0 to {num_experts - 1}")
    programs, chunk = _share(R, 16)
    counts_PE = experts_TK.new_empty(programs, num_experts, dtype=torch.int32)
    with _on(experts_TK):
        routing.count_kernel[(programs,)](
            experts_TK, counts_PE, R, chunk,
            E=num_experts, BLOCK_R=16, BLOCK_E=_power_of_two(num_experts),
        )  # fmt: skip
    order_R, ends_E, _ = _permute(experts_TK, counts_PE, chunk, None)
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
    _check("rows_RI", rows_RI, (None, None))
    E, inner, outer = _check_weight("weight_EIO", weight_EIO, rows_RI, rows_RI.shape[1])
    R = len(rows_RI) if gather_R is None else len(gather_R)
    _check_integers("ends_E", ends_E, E, torch.int32, rows_RI)
    for name, index_R in (("gather_R", gather_R), ("scatter_R", scatter_R)):
        if index_R is not None:
            _check_integers(name, index_R, R, torch.int64, rows_RI)
    if row_weights_R is not None:
        _check("row_weights_R", row_weights_R, (R,), like=rows_RI, dtype=torch.float32)
    if weight_EIO.dtype != rows_RI.dtype:
        raise ValueError(f"rows_RI is {rows_RI.dtype}, weight_EIO {weight_EIO.dtype}")
    if tile is None:
        shape = Shape(E, inner, outer, rows_RI.itemsize, R)
        tile = largest(_device(rows_RI.device), shape, inner, outer)
    if tile.kernel in ("tma", "specialized") and gather_R is not None:
        rows_RI, gather_R = rows_RI[gather_R], None
    out_RO = rows_RI.new_empty(R, outer)
    _grouped_gemm(
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
    _check("bias_D", bias_D, rows_RD.shape[1:], like=rows_RD)
    out_TD = rows_RD.new_empty(len(rows_RD) // top_k, rows_RD.shape[1], dtype=torch.float32)
    _unpermute(rows_RD[None], bias_D, out_TD, top_k)
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
    _check("bias_D", bias_D, (D,), like=rows_RD)
    _check("residual_TD", residual_TD, (R // top_k, D), like=rows_RD)
    _check_norm("norm", norm, residual_TD)
    out_TD = torch.empty_like(residual_TD)
    _unpermute(rows_RD[None], bias_D, out_TD, top_k, added=(residual_TD, norm))
    return _made_from(out_TD, rows_RD, bias_D, residual_TD, norm.weight_D, norm.bias_D)


def add_layer_norm(x_TD: Tensor, y_TD: Tensor, norm: Norm) -> Tensor:
    """As `reference.add_layer_norm`; y may be one row (D,) for all tokens.

    Raises:
        ValueError: Shapes, dtypes, devices or strides that no kernel takes.
    """
    _check("x_TD", x_TD, (None, None))
    T, D = x_TD.shape
    _check("y_TD", y_TD, (D,) if y_TD.dim() == 1 else (T, D), like=x_TD)
    _check_norm("norm", norm, x_TD)
    out_TD = torch.empty_like(x_TD)
    if T:
        with _on(x_TD):
            routing.add_layer_norm_kernel[(triton.cdiv(T, 4),)](
                x_TD, y_TD, norm.weight_D, norm.bias_D, out_TD, T, norm.eps,
                D=D, Y_STRIDE=0 if y_TD.dim() == 1 else D, BLOCK_T=4, PIECE=_piece(x_TD),
            )  # fmt: skip
    return _made_from(out_TD, x_TD, y_TD, norm.weight_D, norm.bias_D)


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, *, gelu: bool = False) -> Tensor:
    """As `reference.linear`; the product is torch's."""
    return reference.linear(x_TI, weight_OI, bias_O, gelu=gelu)


class Packing(NamedTuple):
    """What the attention kernel asks of a batch; made by `pack`."""

    # place of each token in its text, (T,) int32
    positions_T: Tensor
    # of every position, (positions, H / 2) float32
    cos: Tensor
    sin: Tensor
    # one row for each block of queries: the text's first token, its tokens, the first query; int32
    blocks: Tensor
    # queries in a block
    block_m: int


def pack(
    lengths: Sequence[int],
    positions_T: Tensor,
    span: int,
    head_width: int,
    rotary_base: float,
    dtype: torch.dtype,
) -> Packing:
    """As `reference.pack`."""
    block_m = query_block(max(lengths, default=1), dtype)
    blocks = []
    start = 0
    for length in lengths:
        blocks += [(start, length, query) for query in range(0, length, block_m)]
        start += length
    cos, sin = rotary_table(span, head_width, rotary_base, positions_T.device)
    blocks_on_device = _copy(blocks, (len(blocks), 3), positions_T.device)
    return Packing(positions_T.to(torch.int32), cos, sin, blocks_on_device, block_m)


def attention(qkv_T3NH: Tensor, packing: Packing) -> Tensor:
    """As `reference.attention`.

    Raises:
        ValueError: Shapes, dtypes, devices or strides that no kernel takes.
    """
    _check("qkv_T3NH", qkv_T3NH, (len(packing.positions_T), 3, None, 2 * packing.cos.shape[1]))
    T, _, N, H = qkv_T3NH.shape
    out_TNH = qkv_T3NH.new_empty(T, N, H)
    is_float32 = qkv_T3NH.dtype == torch.float32
    if T:
        with _on(qkv_T3NH):
            packed.attention_kernel[(len(packing.blocks), N)](
                qkv_T3NH, packing.positions_T, packing.cos, packing.sin, packing.blocks, out_TNH,
                N=N, H=H, PRECISION=_precision(qkv_T3NH), BLOCK_M=packing.block_m,
                BLOCK_N=16 if is_float32 else 64, BLOCK_HALF=max(16, _power_of_two(H // 2)),
                BLOCK_H=max(16, _power_of_two(H)), num_warps=8 if packing.block_m == 128 else 4,
                num_stages=2,
            )  # fmt: skip
    return _made_from(out_TNH.flatten(1), qkv_T3NH)


def embed(ids_T: Tensor, words_VD: Tensor, type_D: Tensor, norm: Norm) -> Tensor:
    """As `reference.embed`; ids are not checked against V.

    Raises:
        ValueError: Shapes, dtypes, devices or strides that no kernel takes.
    """
    _check("words_VD", words_VD, (None, None))
    D = words_VD.shape[1]
    _check_integers("ids_T", ids_T, len(ids_T), torch.int64, words_VD)
    _check("type_D", type_D, (D,), like=words_VD)
    _check_norm("norm", norm, words_VD)
    out_TD = words_VD.new_empty(len(ids_T), D)
    if len(ids_T):
        with _on(words_VD):
            packed.embed_kernel[(triton.cdiv(len(ids_T), 4),)](
                ids_T, words_VD, type_D, norm.weight_D, norm.bias_D, out_TD, len(ids_T), norm.eps,
                D=D, BLOCK_T=4, PIECE=_piece(words_VD),
            )  # fmt: skip
    return _made_from(out_TD, words_VD, type_D, norm.weight_D, norm.bias_D)


def mean_pool(hidden_TD: Tensor, lengths: Sequence[int]) -> Tensor:
    """As `reference.mean_pool`.

    Raises:
        ValueError: Shapes, dtypes, devices or strides that no kernel takes.
    """
    _check("hidden_TD", hidden_TD, (sum(lengths), None))
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    return mean_pool_between(hidden_TD, _copy(bounds, (len(bounds),), hidden_TD.device))


def mean_pool_between(hidden_TD: Tensor, bounds: Tensor) -> Tensor:
    """`mean_pool` of texts that start at bounds[:-1], int32 on the device; NaN for an empty one."""
    D = hidden_TD.shape[1]
    out_BD = torch.empty(len(bounds) - 1, D, dtype=torch.float32, device=hidden_TD.device)
    if len(out_BD):
        with _on(hidden_TD):
            packed.mean_pool_kernel[(len(out_BD), triton.cdiv(D, 128))](
                hidden_TD, bounds, out_BD, D=D, BLOCK_T=32, BLOCK_D=128
            )
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


def check_layer(
    x_TD: Tensor,
    router_weight_ED: Tensor,
    w1_EDF: Tensor,
    w2_EFD: Tensor,
    bias_D: Tensor,
    top_k: int,
) -> None:
    """Raise ValueError for what `moe_layer` does not take, before anything is launched."""
    _check("x_TD", x_TD, (None, None))
    E = _check_router(router_weight_ED, x_TD, top_k)
    experts, D, F = _check_weight("w1_EDF", w1_EDF, x_TD, x_TD.shape[1])
    if experts != E:
        raise ValueError(f"w1_EDF holds {experts} experts, the router {E}")
    down = _check_weight("w2_EFD", w2_EFD, x_TD, F)
    if down != (E, F, D):
        raise ValueError(f"w2_EFD is {down}, expected {(E, F, D)}")
    if w1_EDF.dtype != w2_EFD.dtype or x_TD.dtype not in (torch.float32, w1_EDF.dtype):
        raise ValueError(
            f"dtypes are x_TD {x_TD.dtype}, w1_EDF {w1_EDF.dtype} and w2_EFD {w2_EFD.dtype}; "
            "both weights must have one dtype, and x that one or float32"
        )
    _check("bias_D", bias_D, (D,), like=x_TD)
    # rows are numbered in int32
    if len(x_TD) * top_k >= 1 << 31:
        raise ValueError(f"{len(x_TD)} tokens make more than 2^31 rows; split them")


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
    check_layer(x_TD, router_weight_ED, w1_EDF, w2_EFD, bias_D, top_k)
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
    weights_TK, experts_TK = _empty_routing(x_TD, top_k)
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
    check_layer(x_TD, *moe[:5])
    if x_TD.dtype != moe.w1_EDF.dtype:
        raise ValueError(f"x_TD is {x_TD.dtype}, the weights {moe.w1_EDF.dtype}")
    _check("y_TD", y_TD, x_TD.shape, like=x_TD)
    _check_norm("norm", norm, x_TD)
    _check_norm("next_norm", next_norm, x_TD)
    if live is not None:
        _check_integers("live", live, 1, torch.int32, x_TD)
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
    weights_TK, experts_TK = _empty_routing(x_TD, K)
    rows_TD = x_TD if rounded_TD is None else rounded_TD
    # the residual sum rounds once: where no norm follows, that is for the caller to do
    out_TD = torch.empty_like(x_TD, dtype=rows_TD.dtype if after else torch.float32)
    if T == 0:
        return out_TD, weights_TK, experts_TK
    if tiles is None:
        tiles = plan(_device(x_TD.device), Shape(E, D, F, w1_EDF.itemsize, R))
    is_small = tiles.up.kernel == "small"
    row_weights_R = weights_TK.flatten()
    h_RF = rows_TD.new_empty(R, F)
    counts_PE, chunk = _route(
        x_TD, moe.router_ED, weights_TK, experts_TK,
        normalize=moe.normalize, rounded_TD=rounded_TD, added=before, counts=not is_small,
        live=live,
    )  # fmt: skip

    if is_small:
        # rows stay in token order throughout
        y_SRD = torch.empty(tiles.down.splits, R, D, dtype=torch.float32, device=x_TD.device)
        _small_gemm(rows_TD, w1_EDF, experts_TK, h_RF[None], tiles.up, gelu=True, divisor=K)
        _small_gemm(h_RF, w2_EFD, experts_TK, y_SRD, tiles.down, row_weights_R=row_weights_R)
    else:
        assert counts_PE is not None
        # the tensor memory accelerator of Hopper cannot gather rows
        is_sorted = tiles.up.kernel != "pointer"
        order_R, ends_E, sorted_RD = _permute(
            experts_TK, counts_PE, chunk * K, rows_TD if is_sorted else None
        )
        _grouped_gemm(
            rows_TD if sorted_RD is None else sorted_RD, w1_EDF, ends_E, h_RF, tiles.up,
            gelu=True, gather_R=order_R if sorted_RD is None else None, divisor=K,
        )  # fmt: skip
        y_SRD = rows_TD.new_empty(1, R, D)
        # each row goes back beside its token's others, so that the sum reads straight through
        _grouped_gemm(
            h_RF, w2_EFD, ends_E, y_SRD[0], tiles.down,
            row_weights_R=row_weights_R, scatter_R=order_R,
        )  # fmt: skip
    _unpermute(y_SRD, moe.bias_D, out_TD, K, added=(rows_TD, after) if after else None)
    return out_TD, weights_TK, experts_TK


def _route(
    x_TD: Tensor,
    router_weight_ED: Tensor,
    weights_TK: Tensor,
    experts_TK: Tensor,
    *,
    normalize: bool,
    rounded_TD: Tensor | None = None,
    added: tuple[Tensor, Norm] | None = None,
    counts: bool = False,
    live: Tensor | None = None,
) -> tuple[Tensor | None, int]:
    """Fill the weights and experts; the counts of each program if asked, and its tokens."""
    (T, D), E, K = x_TD.shape, len(router_weight_ED), weights_TK.shape[1]
    if T == 0:
        return None, 0
    if counts:
        # who orders the rows reads all counts, so their number is bounded. Two rows to a warp: with
        # one, and the counts, the compiler runs out of registers
        (programs, chunk), block_t, warps = _share(T, 16), 16, 8
        counts_PE = experts_TK.new_empty(programs, E, dtype=torch.int32)
    else:
        programs, chunk, block_t, warps, counts_PE = triton.cdiv(T, 4), 4, 4, 4, None
    y_TD, norm = added or (None, _NO_NORM)
    with _on(x_TD):
        routing.route_kernel[(programs,)](
            x_TD, y_TD, norm.weight_D, norm.bias_D, router_weight_ED, rounded_TD,
            weights_TK, experts_TK, counts_PE, live, T, chunk, norm.eps,
            D=D, E=E, K=K, NORMALIZE=normalize, BLOCK_T=block_t, PIECE=_piece(x_TD),
            BLOCK_E=_power_of_two(E), BLOCK_K=_power_of_two(K), num_warps=warps,
        )  # fmt: skip
    return counts_PE, chunk


def _permute(
    experts_TK: Tensor, counts_PE: Tensor, chunk: int, x_TD: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The order, the ends, and x in that order where it is given."""
    (programs, E), K, R = counts_PE.shape, experts_TK.shape[1], experts_TK.numel()
    order_R = experts_TK.new_empty(R)
    ends_E = counts_PE.new_empty(E)
    sorted_RD = None if x_TD is None else x_TD.new_empty(R, x_TD.shape[1])
    D = 1 if x_TD is None else x_TD.shape[1]
    with _on(experts_TK):
        routing.permute_kernel[(programs,)](
            experts_TK, counts_PE, x_TD, order_R, ends_E, sorted_RD, R, chunk,
            D=D, E=E, K=K, BLOCK_R=16, BLOCK_D=_power_of_two(D), BLOCK_E=_power_of_two(E),
            BLOCK_P=max(1, 512 // _power_of_two(E)),
        )  # fmt: skip
    return order_R, ends_E, sorted_RD


def _grouped_gemm(
    rows_RI: Tensor,
    weight_EIO: Tensor,
    ends_E: Tensor,
    out_RO: Tensor,
    tile: Tile,
    *,
    gelu: bool = False,
    row_weights_R: Tensor | None = None,
    gather_R: Tensor | None = None,
    scatter_R: Tensor | None = None,
    divisor: int = 1,
) -> None:
    (E, inner, outer), R = weight_EIO.shape, len(out_RO)
    if tile.kernel == "small" or not supports(tile, E, inner):
        raise ValueError(f"{tile} cannot cut a product of {E} experts and inner width {inner}")
    if R == 0:
        return
    is_o_contiguous = weight_EIO.stride(2) == 1
    # most tiles that R rows of at most E experts can make
    tiles = (R + min(E, R) * (tile.block_m - 1)) // tile.block_m * triton.cdiv(outer, tile.block_n)
    with _on(rows_RI):
        if tile.kernel == "pointer":
            products.pointer_kernel[(tiles,)](
                rows_RI, weight_EIO, ends_E, gather_R, scatter_R, row_weights_R, out_RO,
                GATHER_DIVISOR=divisor, I=inner, O=outer, E=E, O_CONTIGUOUS=is_o_contiguous,
                GELU=gelu, EXACT_GELU=rows_RI.dtype == torch.float32,
                PRECISION=_precision(rows_RI), BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
                BLOCK_K=tile.block_k, BLOCK_E=_power_of_two(E),
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
            return
        for name, tensor in (("rows", rows_RI), ("weight", weight_EIO)):
            if tensor.is_cuda and tensor.data_ptr() % 16:
                raise ValueError(f"the {name} start at an address that is not a multiple of 16")
        programs = min(tiles, _device(rows_RI.device).multiprocessors)
        # where the descriptors are kept that the programs make for themselves
        triton.set_allocator(_allocate)
        products.tma_kernel[(programs,)](
            rows_RI, weight_EIO, ends_E, scatter_R, row_weights_R, out_RO, R,
            I=inner, O=outer, E=E, O_CONTIGUOUS=is_o_contiguous, GELU=gelu,
            EXACT_GELU=rows_RI.dtype == torch.float32, PRECISION=_precision(rows_RI),
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
            SPECIALIZE=tile.kernel == "specialized", num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    """Device memory for Triton; torch aligns to 512 bytes, more than it asks for."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _small_gemm(
    rows_RI: Tensor,
    weight_EIO: Tensor,
    experts_TK: Tensor,
    out_SRO: Tensor,
    tile: Tile,
    *,
    gelu: bool = False,
    row_weights_R: Tensor | None = None,
    divisor: int = 1,
) -> None:
    (E, inner, outer), R = weight_EIO.shape, experts_TK.numel()
    with _on(rows_RI):
        products.small_kernel[(triton.cdiv(outer, tile.block_n) * tile.splits, E)](
            rows_RI, weight_EIO, experts_TK, row_weights_R, out_SRO, R,
            GATHER_DIVISOR=divisor, I=inner, O=outer, O_CONTIGUOUS=weight_EIO.stride(2) == 1,
            GELU=gelu, EXACT_GELU=rows_RI.dtype == torch.float32, PRECISION=_precision(rows_RI),
            SPLITS=tile.splits, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
            BLOCK_R=64, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


def _unpermute(
    rows_SRD: Tensor,
    bias_D: Tensor,
    out_TD: Tensor,
    top_k: int,
    added: tuple[Tensor, Norm] | None = None,
) -> None:
    T, D = out_TD.shape
    if T == 0:
        return
    residual_TD, norm = added or (None, _NO_NORM)
    with _on(out_TD):
        routing.unpermute_kernel[(triton.cdiv(T, 4),)](
            rows_SRD, bias_D, residual_TD, norm.weight_D, norm.bias_D, out_TD, T, norm.eps,
            D=D, K=top_k, PARTS=len(rows_SRD), BLOCK_T=4, PIECE=_piece(rows_SRD),
        )  # fmt: skip


def _in_token_order(rows_RD: Tensor, order_R: Tensor | None, top_k: int) -> Tensor:
    _check("rows_RD", rows_RD, (None, None))
    if top_k < 1 or len(rows_RD) % top_k:
        raise ValueError(f"rows_RD has {len(rows_RD)} rows, not a multiple of top_k {top_k}")
    if order_R is None:
        return rows_RD
    _check_integers("order_R", order_R, len(rows_RD), torch.int64, rows_RD)
    position_R = torch.empty_like(order_R)
    position_R[order_R] = torch.arange(len(order_R), device=order_R.device)
    return rows_RD[position_R]


# what a kernel is given where it adds and normalises nothing
_NO_NORM: Any = Norm(None, None, 0.0)  # type: ignore[arg-type]


def _empty_routing(x_TD: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    shape = (x_TD.shape[0], top_k)
    return (
        torch.empty(shape, dtype=torch.float32, device=x_TD.device),
        torch.empty(shape, dtype=torch.int64, device=x_TD.device),
    )


def _share(count: int, block: int) -> tuple[int, int]:
    """Programs, and how many of `count` items each owns: a multiple of `block`."""
    chunk = triton.cdiv(triton.cdiv(count, ROUTING_PROGRAMS), block) * block
    return triton.cdiv(count, chunk), chunk


def _power_of_two(size: int) -> int:
    power: int = triton.next_power_of_2(size)
    return power


def _copy(numbers: Sequence[Any], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 numbers on a device, from pinned memory, so that nobody waits."""
    on_host = torch.tensor(numbers, dtype=torch.int32, pin_memory=device.type == "cuda")
    return on_host.view(shape).to(device, non_blocking=True)


def rotary_table(
    span: int, head_width: int, base: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of all positions below `span` and more; made once, then kept."""
    # few sizes, since each is kept
    return _rotary_table(max(2048, _power_of_two(span)), head_width, base, device)


@lru_cache(maxsize=16)
def _rotary_table(
    rows: int, head_width: int, base: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    cos, sin = rotary_angles(torch.arange(rows), head_width, base)
    return cos.to(device), sin.to(device)


def _piece(x_TD: Tensor) -> int:
    """How much of a row one warp loads at 16 bytes per thread, less where rows are shorter."""
    return min(512 // x_TD.itemsize, _power_of_two(x_TD.shape[-1]))


def _precision(rows: Tensor) -> str:
    """How tl.dot multiplies float32; on AMD and under the interpreter plain float32."""
    return "tf32x3" if _is_nvidia(rows) and rows.dtype == torch.float32 else "ieee"


def _is_nvidia(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.version.hip is None


@lru_cache(maxsize=64)
def _device(device: torch.device) -> Device:
    return device_of(device)


def _on(tensor: Tensor) -> AbstractContextManager[object]:
    """Launch on the tensor's device, which need not be the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _check_device(name: str, tensor: Tensor) -> None:
    if not (tensor.is_cuda or (INTERPRETED and tensor.device.type == "cpu")):
        raise ValueError(
            f"{name} is on {tensor.device}; the Triton kernels run on CUDA, or on a CPU under "
            "TRITON_INTERPRET=1"
        )


def _check(
    name: str,
    tensor: Tensor,
    shape: tuple[int | None, ...] | torch.Size,
    *,
    like: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    expected = tuple("any" if size is None else size for size in shape)
    if tensor.dim() != len(shape) or any(
        size not in (None, actual) for size, actual in zip(shape, tensor.shape, strict=True)
    ):
        raise ValueError(f"{name} is {tuple(tensor.shape)}, expected {expected}")
    if tensor.dtype not in DTYPES or (dtype is not None and tensor.dtype != dtype):
        wanted = dtype or "float32, float16 or bfloat16"
        raise ValueError(f"{name} has dtype {tensor.dtype}, expected {wanted}")
    _check_device(name, tensor)
    if INTERPRETED and tensor.dtype == torch.bfloat16:
        raise ValueError(f"{name} is bfloat16, which Triton's interpreter multiplies wrongly")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, the rest on {like.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}, expected a contiguous tensor")
    if tuple(shape) == (None, None) and (tensor.shape[1] % 16 or not tensor.shape[1]):
        raise ValueError(f"{name} is {tensor.shape[1]} wide, expected a multiple of 16")


def _check_norm(name: str, norm: Norm, like: Tensor) -> None:
    for part in ("weight_D", "bias_D"):
        _check(f"{name}.{part}", getattr(norm, part), like.shape[-1:], like=like)


def _check_counts(experts: int, top_k: int) -> None:
    if not 1 <= experts <= MAX_EXPERTS:
        raise ValueError(f"there are {experts} experts, the kernels take 1 to {MAX_EXPERTS}")
    most = min(MAX_TOP_K, experts)
    if not 1 <= top_k <= most:
        raise ValueError(f"top_k is {top_k}, the kernels take 1 to {most} of {experts} experts")


def _check_router(router_weight_ED: Tensor, x_TD: Tensor, top_k: int) -> int:
    experts = router_weight_ED.shape[0] if router_weight_ED.dim() else 0
    _check("router_weight_ED", router_weight_ED, (experts, x_TD.shape[1]), like=x_TD)
    _check_counts(experts, top_k)
    return experts


def _check_integers(
    name: str, tensor: Tensor, length: int, dtype: torch.dtype, like: Tensor
) -> None:
    if tensor.shape != (length,) or tensor.dtype != dtype or not tensor.is_contiguous():
        raise ValueError(
            f"{name} is {tuple(tensor.shape)} of {tensor.dtype} with strides {tensor.stride()}, "
            f"expected a contiguous ({length},) of {dtype}"
        )
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, the rest on {like.device}")


def _check_weight(name: str, weight: Tensor, like: Tensor, inner: int) -> tuple[int, int, int]:
    """Check an (E, I, O) weight whose experts are packed and whose I or O is contiguous."""
    if weight.dim() != 3 or weight.shape[1] != inner:
        raise ValueError(f"{name} is {tuple(weight.shape)}, expected (experts, {inner}, any)")
    experts, _, outer = weight.shape
    layouts = {(inner * outer, outer, 1), (inner * outer, 1, inner)}
    if weight.stride() not in layouts:
        raise ValueError(
            f"{name} has strides {weight.stride()}, expected packed matrices: one of {layouts}"
        )
    _check(name, weight.flatten() if weight.stride(2) == 1 else weight.transpose(1, 2).flatten(),
           (weight.numel(),), like=like)  # fmt: skip
    _check_counts(experts, 1)
    if outer % 16:
        raise ValueError(f"{name} makes {outer} columns, expected a multiple of 16")
    return experts, inner, outer
