"""How `nomoe_kernels.fused` launches its kernels: grids, blocks and warps.

Callers check the arguments; tiles, splits and the alignment of addresses are checked here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from threading import RLock
from typing import Any

import torch
import triton
from torch import Tensor

from . import packed, products, routing
from .configs import AttentionTile, Device, Tile, device_of, supports
from .reference import Norm, Pooling

# Triton shows a kernel to other threads before the driver has loaded it
# (https://github.com/triton-lang/triton/pull/11518)
LAUNCHING = RLock()
# tokens, or rows of their experts, up to which kernels are so short that beginning one before the
# last is done pays
OVERLAPPED_ROWS = 256
# programs that share the ordering of a batch's rows: four to a multiprocessor of an H200
ROUTING_PROGRAMS = 528


def route(
    x_TD: Tensor,
    router_weight_ED: Tensor,
    weights_TK: Tensor,
    experts_TK: Tensor,
    *,
    normalize: bool,
    rounded_TD: Tensor | None = None,
    added: tuple[Tensor, Norm] | None = None,
    live: Tensor | None = None,
) -> None:
    """Fill the weights and experts; one warp a token."""
    (T, D), E, K = x_TD.shape, len(router_weight_ED), weights_TK.shape[1]
    if T == 0:
        return
    y_TD, norm = added or (None, NO_NORM)
    with on(x_TD):
        routing.route_kernel[(triton.cdiv(T, 4),)](
            x_TD, y_TD, norm.weight_D, norm.bias_D, router_weight_ED, rounded_TD,
            weights_TK, experts_TK, live, T, norm.eps,
            D=D, E=E, K=K, NORMALIZE=normalize, BLOCK_T=4, PIECE=piece(x_TD),
            BLOCK_E=power_of_two(E), BLOCK_K=power_of_two(K), **overlap(x_TD),
        )  # fmt: skip


def count(experts_TK: Tensor, experts: int) -> tuple[Tensor, int]:
    """Rows of each expert among each program's of `permute`, and how many those are."""
    programs, chunk = share(experts_TK.numel(), 16)
    counts_PE = experts_TK.new_empty(programs, experts, dtype=torch.int32)
    with on(experts_TK):
        routing.count_kernel[(programs,)](
            experts_TK, counts_PE, experts_TK.numel(), chunk,
            E=experts, BLOCK_R=16, BLOCK_E=power_of_two(experts), **overlap(experts_TK),
        )  # fmt: skip
    return counts_PE, chunk


def permute(
    experts_TK: Tensor, counts_PE: Tensor, chunk: int, x_TD: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The order, the ends, and x in that order where it is given."""
    (programs, E), K, R = counts_PE.shape, experts_TK.shape[1], experts_TK.numel()
    order_R = experts_TK.new_empty(R)
    ends_E = counts_PE.new_empty(E)
    sorted_RD = None if x_TD is None else x_TD.new_empty(R, x_TD.shape[1])
    D = 1 if x_TD is None else x_TD.shape[1]
    with on(experts_TK):
        routing.permute_kernel[(programs,)](
            experts_TK, counts_PE, x_TD, order_R, ends_E, sorted_RD, R, chunk,
            D=D, E=E, K=K, BLOCK_R=16, PIECE=1 if x_TD is None else piece(x_TD),
            BLOCK_E=power_of_two(E), BLOCK_P=max(1, 512 // power_of_two(E)), **overlap(experts_TK),
        )  # fmt: skip
    return order_R, ends_E, sorted_RD


def grouped_gemm(
    rows_RI: Tensor,
    weight_EIO: Tensor,
    ends_E: Tensor | None,
    out_RO: Tensor,
    tile: Tile,
    *,
    bias_O: Tensor | None = None,
    gelu: bool = False,
    row_weights_R: Tensor | None = None,
    gather_R: Tensor | None = None,
    scatter_R: Tensor | None = None,
    divisor: int = 1,
) -> None:
    """Run the kernel that the tile names; without ends the first matrix multiplies all rows."""
    (E, inner, outer), R = weight_EIO.shape, len(out_RO)
    if tile.kernel == "small" or not supports(tile, E, inner, rows_RI.itemsize):
        raise ValueError(
            f"{tile} cannot cut a product of {E} experts and inner width {inner} in {rows_RI.dtype}"
        )
    if R == 0:
        return
    is_o_contiguous = weight_EIO.stride(2) == 1
    # most tiles that R rows of at most E experts can make
    tiles = (R + min(E, R) * (tile.block_m - 1)) // tile.block_m * triton.cdiv(outer, tile.block_n)
    with on(rows_RI):
        if tile.kernel == "pointer":
            products.pointer_kernel[(tiles,)](
                rows_RI, weight_EIO, bias_O, ends_E, gather_R, scatter_R, row_weights_R, out_RO, R,
                GATHER_DIVISOR=divisor, I=inner, O=outer, E=E, O_CONTIGUOUS=is_o_contiguous,
                GELU=gelu, EXACT_GELU=rows_RI.dtype == torch.float32,
                PRECISION=precision(rows_RI), BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
                BLOCK_K=tile.block_k, BLOCK_E=power_of_two(E),
                num_warps=tile.warps, num_stages=tile.stages, **overlap(rows_RI),
            )  # fmt: skip
            return
        for name, tensor in (("rows", rows_RI), ("weight", weight_EIO)):
            if tensor.is_cuda and tensor.data_ptr() % 16:
                raise ValueError(f"the {name} start at an address that is not a multiple of 16")
        programs = min(tiles, device(rows_RI.device).multiprocessors)
        # where the descriptors are kept that the programs make for themselves
        triton.set_allocator(allocate)
        products.tma_kernel[(programs,)](
            rows_RI, weight_EIO, bias_O, ends_E, scatter_R, row_weights_R, out_RO, R,
            I=inner, O=outer, E=E, O_CONTIGUOUS=is_o_contiguous, GELU=gelu,
            EXACT_GELU=rows_RI.dtype == torch.float32, PRECISION=precision(rows_RI),
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
            SPECIALIZE=tile.kernel == "specialized", num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


def small_gemm(
    rows_RI: Tensor,
    weight_EIO: Tensor,
    experts_TK: Tensor | None,
    out_SRO: Tensor,
    tile: Tile,
    *,
    bias_O: Tensor | None = None,
    gelu: bool = False,
    row_weights_R: Tensor | None = None,
    divisor: int = 1,
) -> None:
    """Run the kernel for few rows, which finds each expert's by itself."""
    (E, inner, outer), R = weight_EIO.shape, out_SRO.shape[1]
    holds_all = experts_TK is not None and tile.block_m >= R
    block_r = 64
    if device(rows_RI.device).capability == (9, 0) and not holds_all:
        # as many choices at once as registers allow: 64 of (BLOCK_R, BLOCK_M) to a thread; on some
        # other devices that spills
        block_r = max(64, min(power_of_two(R), 8192 // tile.block_m))
    with on(rows_RI):
        products.small_kernel[(triton.cdiv(outer, tile.block_n) * tile.splits, E)](
            rows_RI, weight_EIO, bias_O, experts_TK, row_weights_R, out_SRO, R,
            GATHER_DIVISOR=divisor, I=inner, O=outer, O_CONTIGUOUS=weight_EIO.stride(2) == 1,
            GELU=gelu, EXACT_GELU=rows_RI.dtype == torch.float32, PRECISION=precision(rows_RI),
            SPLITS=tile.splits, HOLDS_ALL=holds_all, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k, BLOCK_R=block_r, num_warps=tile.warps, num_stages=tile.stages,
            **overlap(rows_RI),
        )  # fmt: skip


def linear(
    x_TI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    out_TO: Tensor,
    tile: Tile,
    *,
    gelu: bool,
) -> None:
    """Run the product kernel that the tile names on one matrix."""
    weight_EIO = weight_OI.T[None]
    if tile.splits > 1:
        raise ValueError(f"{tile} splits a product whose parts nobody sums")
    if tile.kernel != "small":
        grouped_gemm(x_TI, weight_EIO, None, out_TO, tile, bias_O=bias_O, gelu=gelu)
    elif len(out_TO):
        small_gemm(x_TI, weight_EIO, None, out_TO[None], tile, bias_O=bias_O, gelu=gelu)


def unpermute(
    rows_SRD: Tensor,
    bias_D: Tensor,
    out_TD: Tensor,
    top_k: int,
    added: tuple[Tensor, Norm] | None = None,
) -> None:
    """Sum each token's rows; with `added`, residual sum and LayerNorm after it."""
    T, D = out_TD.shape
    if T == 0:
        return
    residual_TD, norm = added or (None, NO_NORM)
    with on(out_TD):
        routing.unpermute_kernel[(triton.cdiv(T, 4),)](
            rows_SRD, bias_D, residual_TD, norm.weight_D, norm.bias_D, out_TD, T, norm.eps,
            D=D, K=top_k, PARTS=len(rows_SRD), BLOCK_T=4, PIECE=piece(rows_SRD),
            **overlap(out_TD),
        )  # fmt: skip


def add_layer_norm(x_TD: Tensor, y_TD: Tensor, norm: Norm, out_TD: Tensor) -> None:
    """One warp a row; y may be one row for all."""
    T, D = x_TD.shape
    if T:
        with on(x_TD):
            routing.add_layer_norm_kernel[(triton.cdiv(T, 4),)](
                x_TD, y_TD, norm.weight_D, norm.bias_D, out_TD, T, norm.eps,
                D=D, Y_STRIDE=0 if y_TD.dim() == 1 else D, BLOCK_T=4, PIECE=piece(x_TD),
                **overlap(x_TD),
            )  # fmt: skip


def embed(ids_T: Tensor, words_VD: Tensor, type_D: Tensor, norm: Norm, out_TD: Tensor) -> None:
    """One warp a token."""
    T, D = out_TD.shape
    if T:
        with on(words_VD):
            packed.embed_kernel[(triton.cdiv(T, 4),)](
                ids_T, words_VD, type_D, norm.weight_D, norm.bias_D, out_TD, T, norm.eps,
                D=D, BLOCK_T=4, PIECE=piece(words_VD), **overlap(out_TD),
            )  # fmt: skip


def rotate(heads_TPNH: Tensor, positions_T: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate heads in place: neighbouring parts, of N heads each, of (T, 3, N, H)."""
    T, parts, N, H = heads_TPNH.shape
    # heads that share the loads of their angles
    heads = max(count for count in (1, 2, 3, 4, 6) if parts * N % count == 0)
    with on(heads_TPNH):
        packed.rotate_kernel[(triton.cdiv(T, 32), parts * N // heads)](
            heads_TPNH, positions_T, cos, sin, T,
            N=N, H=H, HEADS=heads, BLOCK_T=32, BLOCK_HALF=power_of_two(H // 2),
            **overlap(heads_TPNH),
        )  # fmt: skip


def attention(
    qkv_T3NH: Tensor,
    positions_T: Tensor,
    cos: Tensor,
    sin: Tensor,
    blocks: Tensor,
    out_TNH: Tensor,
    tile: AttentionTile,
) -> None:
    """One program for each block of queries and head."""
    _, _, N, H = qkv_T3NH.shape
    rotates = tile.kernel == "rotating"
    # short texts are hardly more than a tail, and elsewhere two loops take more registers than are
    # at hand
    has_tail = not rotates and device(qkv_T3NH.device).capability == (9, 0)
    # registers, so that a multiprocessor holds four programs of the formula's tile: for bfloat16
    # Triton 3.8 would take seven more
    fits = (tile.block_m, tile.block_n, tile.warps, H) == (64, 64, 4, 64)
    limit = {"maxnreg": 128} if has_tail and fits and qkv_T3NH.itemsize == 2 else {}
    with on(qkv_T3NH):
        packed.attention_kernel[(len(blocks), N)](
            qkv_T3NH, positions_T, cos, sin, blocks, out_TNH,
            N=N, H=H, ROTATE=rotates, TAIL=has_tail, PRECISION=precision(qkv_T3NH),
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_HALF=max(16, power_of_two(H // 2)),
            BLOCK_H=max(16, power_of_two(H)), num_warps=tile.warps, num_stages=tile.stages,
            **limit, **overlap(qkv_T3NH),
        )  # fmt: skip


def pool(hidden_TD: Tensor, bounds: Tensor, out_BD: Tensor, pooling: Pooling) -> None:
    """One program a text: its whole row is needed for the norm."""
    D = hidden_TD.shape[1]
    if len(out_BD):
        with on(hidden_TD):
            # many loads in flight, as far as registers go: a thread has 128 of the sums at most
            packed.pool_kernel[(len(out_BD),)](
                hidden_TD, bounds, out_BD, pooling.dim, D=D,
                NORMALIZE_BEFORE=pooling.normalize_before, NORMALIZE_AFTER=pooling.normalize_after,
                BLOCK_T=max(1, min(16, 16_384 // power_of_two(D))), BLOCK_D=power_of_two(D),
                **overlap(hidden_TD),
            )  # fmt: skip


# what a kernel is given where it adds and normalises nothing
NO_NORM: Any = Norm(None, None, 0.0)  # type: ignore[arg-type]


def empty_routing(x_TD: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Room for the weights and experts of tokens."""
    shape = (x_TD.shape[0], top_k)
    return (
        torch.empty(shape, dtype=torch.float32, device=x_TD.device),
        torch.empty(shape, dtype=torch.int64, device=x_TD.device),
    )


def share(count: int, block: int) -> tuple[int, int]:
    """Programs, and how many of `count` items each owns: a multiple of `block`."""
    chunk = triton.cdiv(triton.cdiv(count, ROUTING_PROGRAMS), block) * block
    return triton.cdiv(count, chunk), chunk


def power_of_two(size: int) -> int:
    """The least that is no smaller."""
    power: int = triton.next_power_of_2(size)
    return power


def allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    """Device memory for Triton; torch aligns to 512 bytes, more than it asks for."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def piece(x_TD: Tensor) -> int:
    """How much of a row one warp loads at 16 bytes per thread, less where rows are shorter."""
    return min(512 // x_TD.itemsize, power_of_two(x_TD.shape[-1]))


def precision(rows: Tensor) -> str:
    """How tl.dot multiplies float32; on AMD and under the interpreter plain float32."""
    return "tf32x3" if is_nvidia(rows) and rows.dtype == torch.float32 else "ieee"


def overlap(tensor: Tensor) -> dict[str, bool]:
    """How a kernel is launched: over few rows it may begin before the one ahead of it is done.

    Programmatic dependent launch, from Hopper on. On an H200 it took 12 % off a query of 16 tokens
    in float16, added 2 % to a text of 512, and changed nothing for 4,096 and more.
    """
    if len(tensor) > OVERLAPPED_ROWS or not is_nvidia(tensor):
        return {"OVERLAP": False}
    if device(tensor.device).capability < (9, 0):
        return {"OVERLAP": False}
    return {"OVERLAP": True, "launch_pdl": True}


def is_nvidia(tensor: Tensor) -> bool:
    """Whether a tensor is on a CUDA device, which an AMD one is not."""
    return tensor.is_cuda and torch.version.hip is None


@lru_cache(maxsize=64)
def device(device: torch.device) -> Device:
    """What configurations depend on, asked of a device once."""
    return device_of(device)


@contextmanager
def on(tensor: Tensor) -> Iterator[None]:
    """Launch on the tensor's device, which need not be the current one; one thread at a time."""
    if tensor.is_cuda:
        with LAUNCHING, torch.cuda.device(tensor.device):
            yield
    else:
        yield
