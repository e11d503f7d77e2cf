"""Triton kernels over packed texts: tokens of all texts end to end, no padding.

Which tokens belong together comes as a short table made on the host, so that the grid is known
without asking the device. Every program owns what it writes; row offsets are int64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .routing import add_pieces, layer_norm, load_pieces, store_pieces


@triton.jit
def load_rotated(
    ptr,
    tokens_M,
    is_token_M,
    positions_ptr,
    cos_ptr,
    sin_ptr,
    STRIDE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """Both halves of a head's rows, (M, H / 2) each, rotated in float32 and rounded once."""
    half = tl.arange(0, BLOCK_HALF)
    inside = is_token_M[:, None] & (half < HALF)[None, :]
    offsets = tokens_M.to(tl.int64)[:, None] * STRIDE + half[None, :]
    a = tl.load(ptr + offsets, mask=inside, other=0.0)
    b = tl.load(ptr + offsets + HALF, mask=inside, other=0.0)
    positions_M = tl.load(positions_ptr + tokens_M, mask=is_token_M, other=0)
    angles = positions_M[:, None] * HALF + half[None, :]
    cos = tl.load(cos_ptr + angles, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + angles, mask=inside, other=0.0)
    first = a.to(tl.float32) * cos - b.to(tl.float32) * sin
    second = b.to(tl.float32) * cos + a.to(tl.float32) * sin
    return first.to(a.dtype), second.to(a.dtype)


@triton.jit(do_not_specialize=["T"])
def rotate_kernel(
    qkv_ptr,  # (T, 3, N, H)
    positions_ptr,  # (T,) int32: place of each token in its text
    cos_ptr,  # (positions, H / 2) float32
    sin_ptr,  # (positions, H / 2) float32
    T,
    N: tl.constexpr,
    H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """Rotate q and k in place. Grid (blocks of tokens, 2 * N): a program owns one head of some."""
    HALF: tl.constexpr = H // 2
    STRIDE: tl.constexpr = 3 * N * H
    tokens_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    is_token_T = tokens_T < T
    head_ptr = qkv_ptr + tl.program_id(1) * H
    first, second = load_rotated(
        head_ptr, tokens_T, is_token_T, positions_ptr, cos_ptr, sin_ptr, STRIDE, HALF, BLOCK_HALF
    )
    half = tl.arange(0, BLOCK_HALF)
    inside = is_token_T[:, None] & (half < HALF)[None, :]
    offsets = tokens_T.to(tl.int64)[:, None] * STRIDE + half[None, :]
    tl.store(head_ptr + offsets, first, mask=inside)
    tl.store(head_ptr + offsets + HALF, second, mask=inside)


@triton.jit
def load_head(
    ptr, tokens_M, is_token_M, STRIDE: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr
):
    """A head's rows, (M, H), zero where there is none."""
    columns = tl.arange(0, BLOCK)
    offsets = tokens_M.to(tl.int64)[:, None] * STRIDE + columns[None, :]
    return tl.load(ptr + offsets, mask=is_token_M[:, None] & (columns < H)[None, :], other=0.0)


@triton.jit
def attention_kernel(
    qkv_ptr,  # (T, 3, N, H)
    positions_ptr,  # (T,) int32: place of each token in its text; not read unless ROTATE
    cos_ptr,  # (positions, H / 2) float32; the same
    sin_ptr,  # (positions, H / 2) float32; the same
    blocks_ptr,  # (blocks, 3) int32: first token of the text, its tokens, first query of the block
    out_ptr,  # (T, N, H)
    N: tl.constexpr,
    H: tl.constexpr,
    ROTATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """softmax(rotate(q) @ rotate(k).T / sqrt(H)) @ v within each text, every key for every query.

    Grid (blocks, N): program (b, n) owns BLOCK_M queries of one text and head. With ROTATE queries
    and keys are rotated as they are loaded, in halves (a cos - b sin, b cos + a sin), and the
    products of the halves are summed, so they never need be joined; without it `rotate_kernel` has
    done so. One pass over the keys, with a running maximum.
    """
    HALF: tl.constexpr = H // 2
    STRIDE: tl.constexpr = 3 * N * H
    head = tl.program_id(1)
    row = blocks_ptr + tl.program_id(0) * 3
    start, length, first_query = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    if first_query >= length:
        return
    queries_M = first_query + tl.arange(0, BLOCK_M)
    is_query_M = queries_M < length
    q_ptr = qkv_ptr + head * H
    k_ptr = q_ptr + N * H
    if ROTATE:
        qa_MH, qb_MH = load_rotated(
            q_ptr, start + queries_M, is_query_M, positions_ptr, cos_ptr, sin_ptr,
            STRIDE, HALF, BLOCK_HALF,
        )  # fmt: skip
    else:
        q_MH = load_head(q_ptr, start + queries_M, is_query_M, STRIDE, H, BLOCK_H)
    # exponentials to base 2
    scale = 1.4426950408889634 / tl.sqrt(H * 1.0)
    maximum_M = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    sum_M = tl.zeros((BLOCK_M,), tl.float32)
    acc_MH = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    for first_key in range(0, length, BLOCK_N):
        keys_N = first_key + tl.arange(0, BLOCK_N)
        is_key_N = keys_N < length
        if ROTATE:
            ka_NH, kb_NH = load_rotated(
                k_ptr, start + keys_N, is_key_N, positions_ptr, cos_ptr, sin_ptr,
                STRIDE, HALF, BLOCK_HALF,
            )  # fmt: skip
            scores_MN = tl.dot(qa_MH, tl.trans(ka_NH), input_precision=PRECISION)
            scores_MN = tl.dot(qb_MH, tl.trans(kb_NH), scores_MN, input_precision=PRECISION)
        else:
            k_NH = load_head(k_ptr, start + keys_N, is_key_N, STRIDE, H, BLOCK_H)
            scores_MN = tl.dot(q_MH, tl.trans(k_NH), input_precision=PRECISION)
        scores_MN = tl.where(is_key_N[None, :], scores_MN * scale, float("-inf"))
        new_maximum_M = tl.maximum(maximum_M, tl.max(scores_MN, axis=1))
        shrink_M = tl.exp2(maximum_M - new_maximum_M)
        weights_MN = tl.exp2(scores_MN - new_maximum_M[:, None])
        sum_M = sum_M * shrink_M + tl.sum(weights_MN, axis=1)
        v_NH = load_head(k_ptr + N * H, start + keys_N, is_key_N, STRIDE, H, BLOCK_H)
        acc_MH = tl.dot(
            weights_MN.to(v_NH.dtype), v_NH, acc_MH * shrink_M[:, None], input_precision=PRECISION
        )
        maximum_M = new_maximum_M
    columns_H = tl.arange(0, BLOCK_H)
    out_offsets = (start + queries_M).to(tl.int64)[:, None] * (N * H) + columns_H[None, :]
    tl.store(
        out_ptr + head * H + out_offsets,
        (acc_MH / sum_M[:, None]).to(out_ptr.dtype.element_ty),
        mask=is_query_M[:, None] & (columns_H < H)[None, :],
    )


@triton.jit(do_not_specialize=["T"])
def embed_kernel(
    ids_ptr,  # (T,) int64
    words_ptr,  # (V, D)
    type_ptr,  # (D,)
    weight_ptr,  # (D,)
    bias_ptr,  # (D,)
    out_ptr,  # (T, D)
    T,
    eps,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PIECE: tl.constexpr,
):
    """LayerNorm(words[id] + type) in float32; program p owns BLOCK_T tokens."""
    tokens_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    is_token_T = tokens_T < T
    ids_T = tl.load(ids_ptr + tokens_T, mask=is_token_T, other=0).to(tl.int64)
    x = load_pieces(words_ptr, ids_T * D, is_token_T, D, PIECE)
    kind = load_pieces(type_ptr, tl.zeros_like(tokens_T), is_token_T, D, PIECE)
    x = add_pieces(x, kind, (D + PIECE - 1) // PIECE)
    x = layer_norm(x, is_token_T, weight_ptr, bias_ptr, eps, D, PIECE)
    store_pieces(out_ptr, tokens_T.to(tl.int64) * D, is_token_T, x, D, PIECE)


@triton.jit(do_not_specialize=["dim"])
def pool_kernel(
    hidden_ptr,  # (T, D)
    bounds_ptr,  # (B + 1,) int32: where each text starts, and the last one ends
    out_ptr,  # (B, dim) float32
    dim,  # features to keep
    D: tl.constexpr,
    NORMALIZE_BEFORE: tl.constexpr,
    NORMALIZE_AFTER: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Mean over a text's tokens, L2 norm, the first `dim` features, L2 norm; all in float32.

    Program b owns text b. Its warps share the features where a row is wide enough, so that a sum
    over tokens stays within a thread: in shared memory the lanes of a warp would all meet in one
    bank. The order of every sum depends on the text's own length alone. A text without tokens gives
    NaN.
    """
    text = tl.program_id(0)
    start, stop = tl.load(bounds_ptr + text), tl.load(bounds_ptr + text + 1)
    columns_D = tl.arange(0, BLOCK_D)
    in_row_D = columns_D < D
    total_TD = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for first in range(start, stop, BLOCK_T):
        tokens_T = first + tl.arange(0, BLOCK_T)
        offsets_TD = tokens_T.to(tl.int64)[:, None] * D + columns_D[None, :]
        inside_TD = (tokens_T < stop)[:, None] & in_row_D[None, :]
        total_TD += tl.load(hidden_ptr + offsets_TD, mask=inside_TD, other=0.0).to(tl.float32)
    mean_D = tl.sum(total_TD, axis=0) / (stop - start)
    is_kept_D = columns_D < dim
    squares = tl.sum(mean_D * mean_D, axis=0)
    squares_kept = tl.sum(tl.where(is_kept_D, mean_D * mean_D, 0.0), axis=0)
    scale = 1.0
    # as torch.nn.functional.normalize: a vector shorter than this is not made longer than 1
    SHORTEST: tl.constexpr = 1e-12
    if NORMALIZE_BEFORE:
        length = tl.maximum(tl.sqrt(squares), SHORTEST)
        scale /= length
        squares_kept /= length * length
    if NORMALIZE_AFTER:
        scale /= tl.maximum(tl.sqrt(squares_kept), SHORTEST)
    out_ptr += text.to(tl.int64) * dim
    tl.store(out_ptr + columns_D, mean_D * scale, mask=is_kept_D)
