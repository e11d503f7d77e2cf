"""Triton kernels that choose experts, order rows by expert and sum them again.

None of them uses an atomic or a sort: which program writes what depends on the shapes alone, so
results repeat bit for bit. Row offsets are int64; row numbers fit int32 (R at most 2^30).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def wait_for_previous(OVERLAP: tl.constexpr):
    """Let the next kernel begin, and wait until the one before this is done.

    What has to stand before anything that it wrote is read, and anything that it reads is written:
    programs that are launched with overlap begin while the last of the kernel before still run.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def mask_piece(is_row_T, piece: tl.constexpr, D: tl.constexpr, PIECE: tl.constexpr):
    """Where a piece lies in a row; a piece that cannot reach beyond D needs no look at columns."""
    columns = piece * PIECE + tl.arange(0, PIECE)
    inside = is_row_T[:, None]
    if (piece + 1) * PIECE > D:
        inside = inside & (columns < D)[None, :]
    return columns, inside


@triton.jit
def load_pieces(ptr, offsets_T, is_row_T, D: tl.constexpr, PIECE: tl.constexpr):
    """Rows of D as a tuple of float32 (T, PIECE); zero beyond D and where is_row_T is false."""
    pieces = ()
    for piece in tl.static_range((D + PIECE - 1) // PIECE):
        columns, inside = mask_piece(is_row_T, piece, D, PIECE)
        x = tl.load(ptr + offsets_T[:, None] + columns[None, :], mask=inside, other=0.0)
        pieces = pieces + (x.to(tl.float32),)
    return pieces


@triton.jit
def store_pieces(ptr, offsets_T, is_row_T, pieces, D: tl.constexpr, PIECE: tl.constexpr):
    """Write what `load_pieces` reads, rounded to the pointer's dtype."""
    for piece in tl.static_range((D + PIECE - 1) // PIECE):
        columns, inside = mask_piece(is_row_T, piece, D, PIECE)
        x = pieces[piece].to(ptr.dtype.element_ty)
        tl.store(ptr + offsets_T[:, None] + columns[None, :], x, mask=inside)


@triton.jit
def add_pieces(a, b, PIECES: tl.constexpr):
    """Element by element."""
    total = ()
    for piece in tl.static_range(PIECES):
        total = total + (a[piece] + b[piece],)
    return total


@triton.jit
def layer_norm(pieces, is_row_T, weight_ptr, bias_ptr, eps, D: tl.constexpr, PIECE: tl.constexpr):
    """LayerNorm of the rows that a tuple of pieces makes up."""
    PIECES: tl.constexpr = (D + PIECE - 1) // PIECE
    total = pieces[0]
    for piece in tl.static_range(1, PIECES):
        total += pieces[piece]
    mean_T = tl.sum(total, axis=1) / D
    squares = tl.zeros_like(pieces[0])
    centred = ()
    for piece in tl.static_range(PIECES):
        columns = piece * PIECE + tl.arange(0, PIECE)
        deviation = tl.where((columns < D)[None, :], pieces[piece] - mean_T[:, None], 0.0)
        squares += deviation * deviation
        centred = centred + (deviation,)
    scale_T = 1.0 / tl.sqrt(tl.sum(squares, axis=1) / D + eps)
    # every row reads them for itself: the cache has them, and one row shared by all would have to
    # pass through shared memory to reach the threads that need it
    weight = load_pieces(weight_ptr, tl.zeros_like(is_row_T).to(tl.int32), is_row_T, D, PIECE)
    bias = load_pieces(bias_ptr, tl.zeros_like(is_row_T).to(tl.int32), is_row_T, D, PIECE)
    normed = ()
    for piece in tl.static_range(PIECES):
        x = centred[piece] * scale_T[:, None] * weight[piece] + bias[piece]
        normed = normed + (x,)
    return normed


@triton.jit
def add_to_logits(
    logits_TE,
    pieces,
    is_row_T,
    router_ptr,
    expert,
    experts_E,
    D: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Put one expert's logits into its column of (T, E)."""
    row_T = tl.zeros_like(is_row_T).to(tl.int32) + expert * D
    weight = load_pieces(router_ptr, row_T, is_row_T, D, PIECE)
    products = pieces[0] * weight[0]
    for piece in tl.static_range(1, (D + PIECE - 1) // PIECE):
        products += pieces[piece] * weight[piece]
    logit_T = tl.sum(products, axis=1)
    return tl.where(experts_E[None, :] == expert, logit_T[:, None], logits_TE)


@triton.jit(do_not_specialize=["T"])
def route_kernel(
    x_ptr,  # (T, D)
    y_ptr,  # (T, D) or None: LayerNorm(x + y) takes the place of x
    norm_weight_ptr,  # (D,) or None
    norm_bias_ptr,  # (D,) or None
    router_ptr,  # (E, D)
    rounded_ptr,  # (T, D) or None: what the router reads, in the dtype of the experts
    weights_ptr,  # (T, K) float32
    experts_ptr,  # (T, K) int64
    live_ptr,  # (1,) int32 or None: tokens from this one on are padding
    T,
    eps,
    D: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Residual sum and LayerNorm, router product, softmax over all E, top K.

    Program p owns tokens [p * BLOCK_T, (p + 1) * BLOCK_T). Everything is computed in float32. A row
    is held in pieces as wide as one warp loads, so that its sums stay within the warp. A token of
    padding is not read: it gets expert E, which is none.
    """
    wait_for_previous(OVERLAP)
    experts_E = tl.arange(0, BLOCK_E)
    choices_K = tl.arange(0, BLOCK_K)
    tokens_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    is_token_T = tokens_T < T
    is_live_T = is_token_T
    if live_ptr is not None:
        is_live_T = is_token_T & (tokens_T < tl.load(live_ptr))
    offsets_T = tokens_T.to(tl.int64) * D
    x = load_pieces(x_ptr, offsets_T, is_live_T, D, PIECE)
    if y_ptr is not None:
        y = load_pieces(y_ptr, offsets_T, is_live_T, D, PIECE)
        x = add_pieces(x, y, (D + PIECE - 1) // PIECE)
        x = layer_norm(x, is_token_T, norm_weight_ptr, norm_bias_ptr, eps, D, PIECE)
    if rounded_ptr is not None:
        store_pieces(rounded_ptr, offsets_T, is_token_T, x, D, PIECE)

    logits_TE = tl.full((BLOCK_T, BLOCK_E), float("-inf"), tl.float32)
    # unrolled, the loads of all experts are in flight together; many experts would only make
    # the program long
    if E <= 16:
        for expert in tl.static_range(E):
            logits_TE = add_to_logits(
                logits_TE, x, is_token_T, router_ptr, expert, experts_E, D, PIECE
            )
    else:
        for expert in range(E):
            logits_TE = add_to_logits(
                logits_TE, x, is_token_T, router_ptr, expert, experts_E, D, PIECE
            )
    exponentials_TE = tl.exp(logits_TE - tl.max(logits_TE, axis=1)[:, None])
    probabilities_TE = exponentials_TE / tl.sum(exponentials_TE, axis=1)[:, None]

    # NaN outranks every probability, so that the choice stays inside the E; columns beyond E
    # rank below all
    NAN_RANK: tl.constexpr = 2.0
    is_nan_TE = probabilities_TE != probabilities_TE
    ranks_TE = tl.where(is_nan_TE, NAN_RANK, probabilities_TE)
    ranks_TE = tl.where((experts_E < E)[None, :], ranks_TE, -1.0)
    weights_TK = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    experts_TK = tl.zeros((BLOCK_T, BLOCK_K), tl.int32)
    for choice in tl.static_range(K):
        best_T = tl.max(ranks_TE, axis=1)
        is_best_TE = ranks_TE == best_T[:, None]
        expert_T = tl.min(tl.where(is_best_TE, experts_E[None, :], BLOCK_E), axis=1)
        ranks_TE = tl.where(experts_E[None, :] == expert_T[:, None], -1.0, ranks_TE)
        weight_T = tl.where(best_T == NAN_RANK, float("nan"), best_T)
        is_choice_K = (choices_K == choice)[None, :]
        weights_TK = tl.where(is_choice_K, weight_T[:, None], weights_TK)
        experts_TK = tl.where(is_choice_K, expert_T[:, None], experts_TK)
    if NORMALIZE:
        weights_TK /= tl.sum(weights_TK, axis=1)[:, None]
    if live_ptr is not None:
        experts_TK = tl.where(is_live_T[:, None], experts_TK, E)
    inside_TK = is_token_T[:, None] & (choices_K < K)[None, :]
    offsets_TK = tokens_T[:, None] * K + choices_K[None, :]
    tl.store(weights_ptr + offsets_TK, weights_TK, mask=inside_TK)
    tl.store(experts_ptr + offsets_TK, experts_TK.to(tl.int64), mask=inside_TK)


@triton.jit(do_not_specialize=["R", "chunk"])
def count_kernel(
    experts_ptr,  # (R,) int64
    counts_ptr,  # (programs, E) int32
    R,
    chunk,  # rows of one program
    E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Rows of each expert among a program's [p * chunk, (p + 1) * chunk)."""
    wait_for_previous(OVERLAP)
    program = tl.program_id(0)
    experts_E = tl.arange(0, BLOCK_E)
    counts_E = tl.zeros((BLOCK_E,), tl.int32)
    start = program * chunk
    stop = min(start + chunk, R)
    for first in range(start, stop, BLOCK_R):
        rows_R = first + tl.arange(0, BLOCK_R)
        chosen_R = tl.load(experts_ptr + rows_R, mask=rows_R < stop, other=BLOCK_E)
        counts_E += tl.sum((chosen_R[:, None] == experts_E[None, :]).to(tl.int32), axis=0)
    tl.store(counts_ptr + program * E + experts_E, counts_E, mask=experts_E < E)


@triton.jit(do_not_specialize=["R", "chunk"])
def permute_kernel(
    experts_ptr,  # (R,) int64
    counts_ptr,  # (programs, E) int32
    x_ptr,  # (T, D) or None
    order_ptr,  # (R,) int64
    ends_ptr,  # (E,) int32
    sorted_ptr,  # (R, D) or None: x of each row, in order
    R,
    chunk,  # rows of one program
    D: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A stable counting sort by expert; also copies the rows of x into that order.

    Program p places rows [p * chunk, (p + 1) * chunk), whose counts are row p of `counts`. Where an
    expert's rows of this program start is summed from the whole table, small enough for every
    program to read.
    """
    wait_for_previous(OVERLAP)
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    experts_E = tl.arange(0, BLOCK_E)
    total_E = tl.zeros((BLOCK_E,), tl.int32)
    before_E = tl.zeros((BLOCK_E,), tl.int32)
    for first in range(0, programs, BLOCK_P):
        others_P = first + tl.arange(0, BLOCK_P)
        inside_PE = (others_P < programs)[:, None] & (experts_E < E)[None, :]
        counts_PE = tl.load(
            counts_ptr + others_P[:, None] * E + experts_E[None, :], mask=inside_PE, other=0
        )
        total_E += tl.sum(counts_PE, axis=0)
        before_E += tl.sum(tl.where((others_P < program)[:, None], counts_PE, 0), axis=0)
    ends_E = tl.cumsum(total_E, axis=0)
    if program == 0:
        tl.store(ends_ptr + experts_E, ends_E, mask=experts_E < E)

    next_E = ends_E - total_E + before_E
    start = program * chunk
    stop = min(start + chunk, R)
    for first in range(start, stop, BLOCK_R):
        rows_R = first + tl.arange(0, BLOCK_R)
        is_row_R = rows_R < stop
        chosen_R = tl.load(experts_ptr + rows_R, mask=is_row_R, other=BLOCK_E)
        # a row of padding has no expert, and no place
        is_row_R = is_row_R & (chosen_R < E)
        hits_RE = (chosen_R[:, None] == experts_E[None, :]).to(tl.int32)
        # rows of the same expert up to and including this one
        rank_RE = tl.cumsum(hits_RE, axis=0)
        position_R = tl.sum(hits_RE * (next_E[None, :] + rank_RE - 1), axis=1)
        tl.store(order_ptr + position_R, rows_R.to(tl.int64), mask=is_row_R)
        next_E += tl.sum(hits_RE, axis=0)
        if sorted_ptr is not None:
            from_R = (rows_R // K).to(tl.int64) * D
            to_R = position_R.to(tl.int64) * D
            for piece in tl.static_range((D + PIECE - 1) // PIECE):
                columns, inside = mask_piece(is_row_R, piece, D, PIECE)
                x = tl.load(x_ptr + from_R[:, None] + columns[None, :], mask=inside)
                tl.store(sorted_ptr + to_R[:, None] + columns[None, :], x, mask=inside)


@triton.jit(do_not_specialize=["T"])
def unpermute_kernel(
    rows_ptr,  # (PARTS, T * K, D): a token's K rows side by side
    bias_ptr,  # (D,)
    residual_ptr,  # (T, D) or None: the result is LayerNorm(residual + sum)
    norm_weight_ptr,  # (D,) or None
    norm_bias_ptr,  # (D,) or None
    out_ptr,  # (T, D)
    T,
    eps,
    D: tl.constexpr,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PIECE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Sum over each token's K rows, best expert first, plus the bias; residual and LayerNorm.

    Program p owns tokens [p * BLOCK_T, (p + 1) * BLOCK_T). Sums are float32, in a fixed order.
    """
    wait_for_previous(OVERLAP)
    PIECES: tl.constexpr = (D + PIECE - 1) // PIECE
    tokens_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    is_token_T = tokens_T < T
    rows_T = tokens_T.to(tl.int64) * K
    total = load_pieces(rows_ptr, rows_T * D, is_token_T, D, PIECE)
    for term in tl.static_range(1, K * PARTS):
        part_rows = tl.cast(T, tl.int64) * (K * (term % PARTS))
        offsets_T = (part_rows + rows_T + term // PARTS) * D
        row = load_pieces(rows_ptr, offsets_T, is_token_T, D, PIECE)
        total = add_pieces(total, row, PIECES)
    bias = load_pieces(bias_ptr, tl.zeros_like(tokens_T), is_token_T, D, PIECE)
    total = add_pieces(total, bias, PIECES)
    offsets_T = tokens_T.to(tl.int64) * D
    if residual_ptr is not None:
        residual = load_pieces(residual_ptr, offsets_T, is_token_T, D, PIECE)
        total = add_pieces(total, residual, PIECES)
        total = layer_norm(total, is_token_T, norm_weight_ptr, norm_bias_ptr, eps, D, PIECE)
    store_pieces(out_ptr, offsets_T, is_token_T, total, D, PIECE)


@triton.jit(do_not_specialize=["T"])
def add_layer_norm_kernel(
    x_ptr,  # (T, D)
    y_ptr,  # (T, D), or (D,) where Y_STRIDE is 0
    weight_ptr,  # (D,)
    bias_ptr,  # (D,)
    out_ptr,  # (T, D)
    T,
    eps,
    D: tl.constexpr,
    Y_STRIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PIECE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """LayerNorm(x + y) in float32; program p owns tokens [p * BLOCK_T, (p + 1) * BLOCK_T)."""
    wait_for_previous(OVERLAP)
    tokens_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    is_token_T = tokens_T < T
    rows_T = tokens_T.to(tl.int64)
    x = load_pieces(x_ptr, rows_T * D, is_token_T, D, PIECE)
    y = load_pieces(y_ptr, rows_T * Y_STRIDE, is_token_T, D, PIECE)
    x = add_pieces(x, y, (D + PIECE - 1) // PIECE)
    x = layer_norm(x, is_token_T, weight_ptr, bias_ptr, eps, D, PIECE)
    store_pieces(out_ptr, rows_T * D, is_token_T, x, D, PIECE)
