"""Triton kernels over packed texts: tokens of all texts end to end, no padding.

Which tokens belong together comes as a short table made on the host, so that the grid is known
without asking the device. Every program owns what it writes; row offsets are int64, or int32 from
the first row of a text or a block on.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .routing import add_pieces, layer_norm, load_pieces, store_pieces, wait_for_previous


@triton.jit
def load_angles(
    tokens_M, is_token_M, positions_ptr, cos_ptr, sin_ptr, HALF: tl.constexpr, BLOCK: tl.constexpr
):
    """Cosine and sine of each token's angles, (M, H / 2) float32."""
    half = tl.arange(0, BLOCK)
    inside = is_token_M[:, None] & (half < HALF)[None, :]
    positions_M = tl.load(positions_ptr + tokens_M, mask=is_token_M, other=0)
    angles = positions_M[:, None] * HALF + half[None, :]
    cos = tl.load(cos_ptr + angles, mask=inside, other=0.0)
    return cos, tl.load(sin_ptr + angles, mask=inside, other=0.0)


@triton.jit
def load_rotated(
    ptr,
    tokens_M,
    is_token_M,
    cos,
    sin,
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
    first = a.to(tl.float32) * cos - b.to(tl.float32) * sin
    second = b.to(tl.float32) * cos + a.to(tl.float32) * sin
    return first.to(a.dtype), second.to(a.dtype)


@triton.jit
def load_rotated_head(
    ptr,
    tokens_M,
    is_token_M,
    positions_ptr,
    cos_ptr,
    sin_ptr,
    STRIDE: tl.constexpr,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A head's rows, (M, H), rotated as in `load_rotated`; each number's partner is read again."""
    HALF: tl.constexpr = H // 2
    columns = tl.arange(0, BLOCK)
    is_first = (columns < HALF)[None, :]
    inside = is_token_M[:, None] & (columns < H)[None, :]
    offsets = tokens_M[:, None] * STRIDE
    partners = tl.where(columns < HALF, columns + HALF, columns - HALF)
    x = tl.load(ptr + offsets + columns[None, :], mask=inside, other=0.0)
    y = tl.load(ptr + offsets + partners[None, :], mask=inside, other=0.0).to(tl.float32)
    positions_M = tl.load(positions_ptr + tokens_M, mask=is_token_M, other=0)
    angles = positions_M[:, None] * HALF + tl.where(columns < HALF, columns, partners)[None, :]
    cos = tl.load(cos_ptr + angles, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + angles, mask=inside, other=0.0)
    return (x.to(tl.float32) * cos + tl.where(is_first, -y, y) * sin).to(x.dtype)


@triton.jit(do_not_specialize=["T"])
def rotate_kernel(
    heads_ptr,  # some heads of (T, 3, N, H)
    positions_ptr,  # (T,) int32: place of each token in its text
    cos_ptr,  # (positions, H / 2) float32
    sin_ptr,  # (positions, H / 2) float32
    T,
    N: tl.constexpr,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Rotate heads in place; program (b, h) owns HEADS of them, and loads angles once."""
    wait_for_previous(OVERLAP)
    HALF: tl.constexpr = H // 2
    STRIDE: tl.constexpr = 3 * N * H
    tokens_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    is_token_T = tokens_T < T
    cos, sin = load_angles(tokens_T, is_token_T, positions_ptr, cos_ptr, sin_ptr, HALF, BLOCK_HALF)
    half = tl.arange(0, BLOCK_HALF)
    inside = is_token_T[:, None] & (half < HALF)[None, :]
    offsets = tokens_T.to(tl.int64)[:, None] * STRIDE + half[None, :]
    for head in tl.static_range(HEADS):
        head_ptr = heads_ptr + (tl.program_id(1) * HEADS + head) * H
        first, second = load_rotated(
            head_ptr, tokens_T, is_token_T, cos, sin, STRIDE, HALF, BLOCK_HALF
        )
        tl.store(head_ptr + offsets, first, mask=inside)
        tl.store(head_ptr + offsets + HALF, second, mask=inside)


@triton.jit
def load_head(
    ptr,
    tokens_M,
    is_token_M,
    STRIDE: tl.constexpr,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    ALL: tl.constexpr,
):
    """A head's rows, (M, H), zero where there is none; with ALL there is none that is not."""
    columns = tl.arange(0, BLOCK)
    ptrs = ptr + (tokens_M[:, None] * STRIDE + columns[None, :])
    if ALL and BLOCK == H:
        return tl.load(ptrs)
    return tl.load(ptrs, mask=is_token_M[:, None] & (columns < H)[None, :], other=0.0)


@triton.jit
def attend(
    state,
    q,
    k_ptr,
    positions_ptr,
    cos_ptr,
    sin_ptr,
    start,
    length,
    first_key,
    scale,
    N: tl.constexpr,
    H: tl.constexpr,
    ROTATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    ALL: tl.constexpr,
):
    """Take BLOCK_N keys more into the running maximum, sum and product; all are there with ALL."""
    HALF: tl.constexpr = H // 2
    STRIDE: tl.constexpr = 3 * N * H
    maximum_M, sum_M, acc_MH = state
    keys_N = first_key + tl.arange(0, BLOCK_N)
    is_key_N = keys_N < length
    if ROTATE:
        rows_N = (start + keys_N).to(tl.int64)
        cos, sin = load_angles(
            start + keys_N, is_key_N, positions_ptr, cos_ptr, sin_ptr, HALF, BLOCK_HALF
        )
        ka_NH, kb_NH = load_rotated(k_ptr, rows_N, is_key_N, cos, sin, STRIDE, HALF, BLOCK_HALF)
        scores_MN = tl.dot(q[0], tl.trans(ka_NH), input_precision=PRECISION)
        scores_MN = tl.dot(q[1], tl.trans(kb_NH), scores_MN, input_precision=PRECISION)
    else:
        # offsets of 32 bits within a text, which take fewer registers
        k_ptr += first_key * STRIDE
        rows_N = tl.arange(0, BLOCK_N)
        k_NH = load_head(k_ptr, rows_N, is_key_N, STRIDE, H, BLOCK_H, ALL)
        scores_MN = tl.dot(q[0], tl.trans(k_NH), input_precision=PRECISION)
    if not ALL:
        scores_MN = tl.where(is_key_N[None, :], scores_MN, float("-inf"))
    new_maximum_M = tl.maximum(maximum_M, tl.max(scores_MN, axis=1) * scale)
    shrink_M = tl.exp2(maximum_M - new_maximum_M)
    weights_MN = tl.exp2(scores_MN * scale - new_maximum_M[:, None])
    sum_M = sum_M * shrink_M + tl.sum(weights_MN, axis=1)
    v_NH = load_head(k_ptr + N * H, rows_N, is_key_N, STRIDE, H, BLOCK_H, ALL)
    acc_MH = tl.dot(
        weights_MN.to(v_NH.dtype), v_NH, acc_MH * shrink_M[:, None], input_precision=PRECISION
    )
    return new_maximum_M, sum_M, acc_MH


@triton.jit
def attention_kernel(
    qkv_ptr,  # (T, 3, N, H)
    positions_ptr,  # (T,) int32: place of each token in its text
    cos_ptr,  # (positions, H / 2) float32
    sin_ptr,  # (positions, H / 2) float32
    blocks_ptr,  # (blocks, 3) int32: first token of the text, its tokens, first query of the block
    out_ptr,  # (T, N, H)
    N: tl.constexpr,
    H: tl.constexpr,
    ROTATE: tl.constexpr,
    TAIL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """softmax(rotate(q) @ rotate(k).T / sqrt(H)) @ v within each text, every key for every query.

    Grid (blocks, N): program (b, n) owns BLOCK_M queries of one text and head, which are rotated as
    they are loaded, (a cos - b sin, b cos + a sin) for halves a and b. With ROTATE the keys are as
    well, all in halves whose products are summed, so they never need be joined; without it
    `rotate_kernel` has rotated them. One pass over the keys, with a running maximum. With TAIL only
    the last keys, which do not fill a block, are asked whether they are of the text.
    """
    wait_for_previous(OVERLAP)
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
    out_ptr += head * H
    if ROTATE:
        rows_M = (start + queries_M).to(tl.int64)
        cos, sin = load_angles(
            start + queries_M, is_query_M, positions_ptr, cos_ptr, sin_ptr, HALF, BLOCK_HALF
        )
        q = load_rotated(q_ptr, rows_M, is_query_M, cos, sin, STRIDE, HALF, BLOCK_HALF)
    else:
        rows_M = tl.arange(0, BLOCK_M)
        first = start + first_query
        out_ptr += first.to(tl.int64) * (N * H)
        q_ptr += start.to(tl.int64) * STRIDE
        q = (
            load_rotated_head(
                q_ptr + first_query * STRIDE, rows_M, is_query_M, positions_ptr + first, cos_ptr,
                sin_ptr, STRIDE, H, BLOCK_H,
            ),
        )  # fmt: skip
    k_ptr = q_ptr + N * H
    # exponentials to base 2
    scale = 1.4426950408889634 / tl.sqrt(H * 1.0)
    state = (
        tl.full((BLOCK_M,), float("-inf"), tl.float32),
        tl.zeros((BLOCK_M,), tl.float32),
        tl.zeros((BLOCK_M, BLOCK_H), tl.float32),
    )
    if not TAIL:
        for first_key in range(0, length, BLOCK_N):
            state = attend(
                state, q, k_ptr, positions_ptr, cos_ptr, sin_ptr, start, length, first_key, scale,
                N, H, ROTATE, PRECISION, BLOCK_N, BLOCK_HALF, BLOCK_H, False,
            )  # fmt: skip
    else:
        whole = length // BLOCK_N * BLOCK_N
        for first_key in range(0, whole, BLOCK_N):
            state = attend(
                state, q, k_ptr, positions_ptr, cos_ptr, sin_ptr, start, length, first_key, scale,
                N, H, ROTATE, PRECISION, BLOCK_N, BLOCK_HALF, BLOCK_H, True,
            )  # fmt: skip
        # a loop of one turn or none: before a branch Triton 3.7 copies sums that are in flight
        for first_key in tl.range(whole, length, BLOCK_N, num_stages=1):
            state = attend(
                state, q, k_ptr, positions_ptr, cos_ptr, sin_ptr, start, length, first_key, scale,
                N, H, ROTATE, PRECISION, BLOCK_N, BLOCK_HALF, BLOCK_H, False,
            )  # fmt: skip
    _, sum_M, acc_MH = state
    columns_H = tl.arange(0, BLOCK_H)
    tl.store(
        out_ptr + rows_M[:, None] * (N * H) + columns_H[None, :],
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
    OVERLAP: tl.constexpr,
):
    """LayerNorm(words[id] + type) in float32; program p owns BLOCK_T tokens."""
    wait_for_previous(OVERLAP)
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
    OVERLAP: tl.constexpr,
):
    """Mean over a text's tokens, L2 norm, the first `dim` features, L2 norm; all in float32.

    Program b owns text b. Its warps share the features where a row is wide enough, so that a sum
    over tokens stays within a thread: in shared memory the lanes of a warp would all meet in one
    bank. The order of every sum depends on the text's own length alone. A text without tokens gives
    NaN.
    """
    wait_for_previous(OVERLAP)
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
