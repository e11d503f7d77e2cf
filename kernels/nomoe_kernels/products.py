"""Triton kernels for products: the two of a mixture-of-experts layer, and those of dense layers.

Three kernels, one per regime; `configs` says which runs when. Without a routing they multiply all
rows by one matrix.

    pointer_kernel  any device; gathers its rows, so nothing need be copied into expert order
    tma_kernel      Hopper and later, many rows: sorted rows and weights through the tensor memory
                    accelerator, a persistent grid, loads on warps of their own where asked
    small_kernel    few rows: the weights are read once at memory speed, and each program finds
                    its expert's rows by itself

Every program owns its output tile, so the results repeat bit for bit. A tile may read past its
expert's last row (rows are independent), but never writes there. Row offsets are int64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .routing import wait_for_previous


@triton.jit
def gelu(x, EXACT: tl.constexpr):
    """The erf GELU of a float32 tile.

    Unless EXACT it is max(x, 0) - |x| * Phi(-|x|) with Phi(-a), the normal distribution's tail, as
    2 to a polynomial: about 6e-7 from the exact GELU at most, where the textbook formula in float32
    is 5e-7 from it, for one exponential and five multiply-adds. The coefficients are a
    minimax fit over 0 <= a <= 6.5 of the GELU's absolute error; beyond, the tail is zero.
    """
    if EXACT:
        return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    a = tl.abs(x)
    exponent = -0.00047200193512253463 * a + 0.00707679707556963
    exponent = exponent * a - 0.05181170627474785
    exponent = exponent * a - 0.4600049555301666
    exponent = exponent * a - 1.1507846117019653
    exponent = exponent * a - 1.000037670135498
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) - a * tl.exp2(exponent)


@triton.jit
def find_tile(tile, ends_ptr, E: tl.constexpr, BLOCK_M: tl.constexpr):
    """The expert and the rows [start, stop) of the tile-th block of BLOCK_M rows, expert by expert.

    A chain of scalars: a reduction over a tensor would keep warp specialisation from compiling.
    Past the last tile, start equals stop.
    """
    expert = 0
    start = 0
    stop = 0
    tiles = 0
    expert_start = 0
    for e in tl.static_range(E):
        expert_stop = tl.load(ends_ptr + e)
        mine = (expert_stop - expert_start + BLOCK_M - 1) // BLOCK_M
        found = (tile >= tiles) & (tile < tiles + mine)
        expert = tl.where(found, e, expert)
        start = tl.where(found, expert_start + (tile - tiles) * BLOCK_M, start)
        stop = tl.where(found, expert_stop, stop)
        tiles += mine
        expert_start = expert_stop
    return expert, start, stop


@triton.jit
def find_tile_vector(tile, ends_ptr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """As `find_tile`, for any number of experts."""
    experts_E = tl.arange(0, BLOCK_E)
    inside_E = experts_E < E
    stops_E = tl.load(ends_ptr + experts_E, mask=inside_E, other=0)
    starts_E = tl.load(ends_ptr + experts_E - 1, mask=inside_E & (experts_E > 0), other=0)
    mine_E = tl.where(inside_E, (stops_E - starts_E + BLOCK_M - 1) // BLOCK_M, 0)
    tiles_E = tl.cumsum(mine_E, axis=0)
    found_E = (tile < tiles_E) & (tile >= tiles_E - mine_E)
    expert = tl.sum(tl.where(found_E, experts_E, 0), axis=0)
    start_E = starts_E + (tile - tiles_E + mine_E) * BLOCK_M
    start = tl.sum(tl.where(found_E, start_E, 0), axis=0)
    stop = tl.sum(tl.where(found_E, stops_E, 0), axis=0)
    return expert, start, stop


@triton.jit
def finish_tile(
    acc_MN,
    rows_M,
    is_row_M,
    columns_N,
    bias_ptr,
    scatter_ptr,
    row_weights_ptr,
    out_ptr,
    O: tl.constexpr,
    GELU: tl.constexpr,
    EXACT_GELU: tl.constexpr,
):
    """Bias, GELU, the row's weight, one rounding, and the store to the row it belongs to."""
    if scatter_ptr is not None:
        rows_M = tl.load(scatter_ptr + rows_M, mask=is_row_M, other=0)
    if bias_ptr is not None:
        bias_N = tl.load(bias_ptr + columns_N, mask=columns_N < O, other=0.0)
        acc_MN += bias_N.to(tl.float32)[None, :]
    if GELU:
        acc_MN = gelu(acc_MN, EXACT_GELU)
    if row_weights_ptr is not None:
        weights_M = tl.load(row_weights_ptr + rows_M, mask=is_row_M, other=0.0)
        acc_MN *= weights_M[:, None]
    offsets_MN = rows_M.to(tl.int64)[:, None] * O + columns_N[None, :]
    inside_MN = is_row_M[:, None] & (columns_N < O)[None, :]
    tl.store(out_ptr + offsets_MN, acc_MN.to(out_ptr.dtype.element_ty), mask=inside_MN)


@triton.jit(do_not_specialize=["R"])
def pointer_kernel(
    rows_ptr,  # (rows, I)
    weight_ptr,  # (E, I, O), or (E, O, I) where O_CONTIGUOUS is false
    bias_ptr,  # (O,) or None
    ends_ptr,  # (E,) int32, or None where one matrix serves all rows
    gather_ptr,  # (R,) int64 or None: routed row r reads rows[gather[r] // GATHER_DIVISOR]
    scatter_ptr,  # (R,) int64 or None: routed row r is written to out[scatter[r]]
    row_weights_ptr,  # (R,) float32 or None: a factor of each row of out
    out_ptr,  # (R, O)
    R,
    GATHER_DIVISOR: tl.constexpr,
    I: tl.constexpr,
    O: tl.constexpr,
    E: tl.constexpr,
    O_CONTIGUOUS: tl.constexpr,
    GELU: tl.constexpr,
    EXACT_GELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """out[scatter[r]] = row_weight * gelu(rows[gather[r]] @ weight[expert of r] + bias).

    One program per tile; the grid is the most tiles R rows can make, and those to spare leave at
    once. Column tiles of one block of rows are neighbours, so that its rows stay in the L2 cache.
    """
    wait_for_previous(OVERLAP)
    tiles_n: tl.constexpr = (O + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    if ends_ptr is None:
        start, stop = program // tiles_n * BLOCK_M, R
    else:
        expert, start, stop = find_tile_vector(program // tiles_n, ends_ptr, E, BLOCK_E, BLOCK_M)
        weight_ptr += expert.to(tl.int64) * (I * O)
    if start >= stop:
        return
    rows_M = start + tl.arange(0, BLOCK_M)
    is_row_M = rows_M < stop
    columns_N = (program % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner_K = tl.arange(0, BLOCK_K)
    from_M = rows_M
    if gather_ptr is not None:
        from_M = tl.load(gather_ptr + rows_M, mask=is_row_M, other=0) // GATHER_DIVISOR
    row_ptrs_MK = rows_ptr + from_M.to(tl.int64)[:, None] * I + inner_K[None, :]
    stride_i: tl.constexpr = O if O_CONTIGUOUS else 1
    stride_o: tl.constexpr = 1 if O_CONTIGUOUS else I
    weight_ptrs_KN = weight_ptr + inner_K[:, None] * stride_i + columns_N[None, :] * stride_o
    acc_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, I, BLOCK_K):
        # beyond I zeros keep the sum; rows and columns beyond theirs are masked for the sake of the
        # reads alone, since nobody stores what they make
        inside_K = inner_K < I - k
        a_MK = tl.load(row_ptrs_MK, mask=is_row_M[:, None] & inside_K[None, :], other=0.0)
        b_KN = tl.load(weight_ptrs_KN, mask=inside_K[:, None] & (columns_N < O)[None, :], other=0.0)
        acc_MN = tl.dot(a_MK, b_KN, acc_MN, input_precision=PRECISION)
        row_ptrs_MK += BLOCK_K
        weight_ptrs_KN += BLOCK_K * stride_i
    finish_tile(
        acc_MN, rows_M, is_row_M, columns_N, bias_ptr, scatter_ptr, row_weights_ptr, out_ptr,
        O, GELU, EXACT_GELU,
    )  # fmt: skip


@triton.jit(do_not_specialize=["R"])
def tma_kernel(
    rows_ptr,  # (R, I)
    weight_ptr,  # (E, I, O), or (E, O, I) where O_CONTIGUOUS is false
    bias_ptr,  # (O,) or None
    ends_ptr,  # (E,) int32, or None where one matrix serves all rows
    scatter_ptr,  # (R,) int64 or None: routed row r is written to out[scatter[r]]
    row_weights_ptr,  # (R,) float32 or None: a factor of each row of out
    out_ptr,  # (R, O)
    R,
    I: tl.constexpr,
    O: tl.constexpr,
    E: tl.constexpr,
    O_CONTIGUOUS: tl.constexpr,
    GELU: tl.constexpr,
    EXACT_GELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):
    """out[scatter[r]] = row_weight * gelu(rows[r] @ weight[expert of r] + bias), for sorted rows.

    A persistent grid: program p takes tiles p, p + programs, ... Column tiles of one block of rows
    are neighbours, so that its rows and its expert's matrix stay in the L2 cache. I must be a
    multiple of BLOCK_K where O is contiguous, or a block would run into the next expert's matrix.

    With SPECIALIZE one group of warps does the loads and two the products, each of half the rows.
    Triton 3.6 and 3.7 grant that to four warps with an unflattened loop, a scalar `find_tile`,
    plain stores, and descriptors made here: those made by the host still copy all BLOCK_M rows
    into room for half (triton-lang/triton#11587).
    """
    rows_desc = tl.make_tensor_descriptor(rows_ptr, [R, I], [I, 1], [BLOCK_M, BLOCK_K])
    if O_CONTIGUOUS:
        weight_desc = tl.make_tensor_descriptor(weight_ptr, [E * I, O], [O, 1], [BLOCK_K, BLOCK_N])
    else:
        weight_desc = tl.make_tensor_descriptor(weight_ptr, [E * O, I], [I, 1], [BLOCK_N, BLOCK_K])
    tiles_n: tl.constexpr = (O + BLOCK_N - 1) // BLOCK_N
    tiles = (R + BLOCK_M - 1) // BLOCK_M
    if ends_ptr is not None:
        tiles = 0
        expert_start = 0
        for e in tl.static_range(E):
            expert_stop = tl.load(ends_ptr + e)
            tiles += (expert_stop - expert_start + BLOCK_M - 1) // BLOCK_M
            expert_start = expert_stop
    for tile in tl.range(
        tl.program_id(0),
        tiles * tiles_n,
        tl.num_programs(0),
        flatten=False,
        warp_specialize=SPECIALIZE,
    ):
        if ends_ptr is None:
            expert, start, stop = 0, tile // tiles_n * BLOCK_M, R
        else:
            expert, start, stop = find_tile(tile // tiles_n, ends_ptr, E, BLOCK_M)
        column = (tile % tiles_n) * BLOCK_N
        # a value of its own: to the row that a load starts at Triton 3.6 to 3.8 add 64 for the
        # second group of warps, wherever else that value stands
        first_row = tl.maximum(start, 0)
        columns_N = column + tl.arange(0, BLOCK_N)
        acc_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if bias_ptr is not None:
            bias_N = tl.load(bias_ptr + columns_N, mask=columns_N < O, other=0.0)
            acc_MN += bias_N.to(tl.float32)[None, :]
        for k in range(0, I, BLOCK_K):
            a_MK = rows_desc.load([first_row, k])
            if O_CONTIGUOUS:
                b_KN = weight_desc.load([expert * I + k, column])
            else:
                b_KN = weight_desc.load([expert * O + column, k]).T
            acc_MN = tl.dot(a_MK, b_KN, acc_MN, input_precision=PRECISION)
        rows_M = start + tl.arange(0, BLOCK_M)
        finish_tile(
            acc_MN, rows_M, rows_M < stop, columns_N, None, scatter_ptr, row_weights_ptr,
            out_ptr, O, GELU, EXACT_GELU,
        )  # fmt: skip


@triton.jit(do_not_specialize=["R"])
def small_kernel(
    rows_ptr,  # (rows, I)
    weight_ptr,  # (E, I, O), or (E, O, I) where O_CONTIGUOUS is false
    bias_ptr,  # (O,) or None; not with splits
    experts_ptr,  # (R,) int64: the expert of each routed row; None where one matrix serves all
    row_weights_ptr,  # (R,) float32 or None: a factor of each row of out
    out_ptr,  # (SPLITS, R, O)
    R,
    GATHER_DIVISOR: tl.constexpr,
    I: tl.constexpr,
    O: tl.constexpr,
    O_CONTIGUOUS: tl.constexpr,
    GELU: tl.constexpr,
    EXACT_GELU: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLITS: tl.constexpr,
    HOLDS_ALL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """out[split, r] = row_weight * gelu(rows[r // GATHER_DIVISOR] @ weight[expert of r] + bias).

    Rows stay in token order: each program searches the R choices for its expert. With HOLDS_ALL, R
    at most BLOCK_M, it does not: it multiplies all rows and stores those of its expert, since the
    search would keep its weights waiting. Grid (column tiles * SPLITS, E). The product is
    transposed, weights on the side of the tensor core that is 64 wide, rows on the one that can be
    16 narrow. Each split sums a part of I into its own copy of out; whoever reads them adds the
    copies.
    """
    wait_for_previous(OVERLAP)
    tiles_n: tl.constexpr = (O + BLOCK_N - 1) // BLOCK_N
    blocks_k: tl.constexpr = (I + BLOCK_K - 1) // BLOCK_K
    split_width: tl.constexpr = (blocks_k + SPLITS - 1) // SPLITS * BLOCK_K
    expert = tl.program_id(1)
    split = tl.program_id(0) // tiles_n
    columns_N = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_row_N = columns_N < O
    inner_K = split * split_width + tl.arange(0, BLOCK_K)
    stride_i: tl.constexpr = O if O_CONTIGUOUS else 1
    stride_o: tl.constexpr = 1 if O_CONTIGUOUS else I
    weight_ptrs_NK = (
        weight_ptr
        + expert.to(tl.int64) * (I * O)
        + columns_N[:, None] * stride_o
        + inner_K[None, :] * stride_i
    )
    slots_M = tl.arange(0, BLOCK_M)
    chosen_R = tl.arange(0, BLOCK_R)
    rows = 1
    first_slot = 0
    # one turn, unless more than BLOCK_M rows chose this expert
    while first_slot < rows:
        row_M = first_slot + slots_M
        rows = R
        is_read_M = row_M < R
        is_mine_M = is_read_M
        if experts_ptr is not None:
            if HOLDS_ALL:
                is_mine_M = tl.load(experts_ptr + row_M, mask=is_read_M, other=-1) == expert
                # 0 or 1, whether there is one
                rows = tl.max(is_mine_M.to(tl.int32), axis=0)
            else:
                # slot m takes the (first_slot + m)-th row that chose this expert
                row_M = tl.zeros((BLOCK_M,), tl.int32)
                rows = 0
                for first in range(0, R, BLOCK_R):
                    r_R = first + chosen_R
                    hit_R = tl.load(experts_ptr + r_R, mask=r_R < R, other=-1) == expert
                    rank_R = rows + tl.cumsum(hit_R.to(tl.int32), axis=0) - 1
                    match_RM = hit_R[:, None] & (rank_R[:, None] == (first_slot + slots_M)[None, :])
                    row_M += tl.sum(tl.where(match_RM, r_R[:, None], 0), axis=0)
                    rows += tl.sum(hit_R.to(tl.int32), axis=0)
                is_mine_M = first_slot + slots_M < rows
                is_read_M = is_mine_M
        from_M = (row_M // GATHER_DIVISOR).to(tl.int64)
        row_ptrs_KM = rows_ptr + from_M[None, :] * I + inner_K[:, None]
        acc_NM = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        if rows > 0:
            for k in range(0, split_width, BLOCK_K):
                inside_K = inner_K < I - k
                w_NK = tl.load(
                    weight_ptrs_NK + k * stride_i,
                    mask=in_row_N[:, None] & inside_K[None, :],
                    other=0.0,
                )
                a_KM = tl.load(
                    row_ptrs_KM + k, mask=inside_K[:, None] & is_read_M[None, :], other=0.0
                )
                acc_NM = tl.dot(w_NK, a_KM, acc_NM, input_precision=PRECISION)
        out_rows_M = split.to(tl.int64) * R + row_M
        if bias_ptr is not None:
            bias_N = tl.load(bias_ptr + columns_N, mask=in_row_N, other=0.0)
            acc_NM += bias_N.to(tl.float32)[:, None]
        if GELU:
            acc_NM = gelu(acc_NM, EXACT_GELU)
        if row_weights_ptr is not None:
            acc_NM *= tl.load(row_weights_ptr + row_M, mask=is_mine_M, other=0.0)[None, :]
        tl.store(
            out_ptr + out_rows_M[:, None] * O + columns_N[None, :],
            tl.trans(acc_NM).to(out_ptr.dtype.element_ty),
            mask=is_mine_M[:, None] & in_row_N[None, :],
        )
        first_slot += BLOCK_M
