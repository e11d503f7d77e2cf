"""A batch's tables, and the kernels that read them: padding may hold anything."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from nomoe_kernels import fused, invariant, launch, reference
from nomoe_kernels.configs import AttentionTile
from nomoe_kernels.layout import Layout
from nomoe_kernels.reference import MoEWeights, Norm, Pooling
from nomoe_kernels.tables import TableOps
from tests.test_attention_ops import stand_in
from tests.test_fused_ops import DEVICE, DTYPES, PLANS, PLANS_AND_DTYPES, Case, make_layer, poisoned

__all__ = ["poisoned"]
CUDA = torch.cuda.is_available()
pytestmark = [pytest.mark.gpu] if CUDA else []


def tile_of(block_m: int) -> AttentionTile:
    return AttentionTile("rotating", block_m, 32, 4, 2)


def filled(layout: Layout, ids: list[int], lengths: list[int]) -> Tensor:
    # whatever the numbers held before is written over
    numbers = torch.full((layout.size,), -7, dtype=torch.int32)
    layout.fill(numbers, ids, lengths)
    return numbers


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("block_m", [16, 128])
def test_tables_say_what_a_loop_would(seed: int, block_m: int) -> None:
    generator = random.Random(seed)
    lengths = [generator.randint(1, 300) for _ in range(generator.randint(1, 9))]
    ids = [generator.randint(0, 99) for _ in range(sum(lengths))]
    blocks_of_texts = sum(-(-length // block_m) for length in lengths)
    room = (len(ids) + 40 * seed, len(lengths) + seed, blocks_of_texts + 2 * seed)
    layout = Layout(*room, max(lengths), tile_of(block_m))
    tables = layout.split(filled(layout, ids, lengths))
    bounds, blocks, positions = [0], [], []
    for length in lengths:
        blocks += [[bounds[-1], length, query] for query in range(0, length, block_m)]
        positions += list(range(length))
        bounds.append(bounds[-1] + length)
    spare = layout.tokens - len(ids)
    assert tables.live.tolist() == [len(ids)]
    assert tables.ids_T.tolist() == ids + [0] * spare
    assert tables.positions_T.tolist() == positions + [0] * spare
    assert tables.bounds.tolist() == bounds + [len(ids)] * seed
    assert tables.blocks.tolist() == blocks + [[0, 0, 0]] * (layout.blocks - len(blocks))
    assert all(one.data_ptr() % 16 == tables.live.data_ptr() % 16 for one in tables)


def test_there_is_room_for_any_division_of_the_tokens() -> None:
    for tokens, texts in [(16, 1), (64, 64), (1000, 7), (7, 20), (4096, 4), (4096, 256)]:
        layout = Layout.room(tokens, texts, tile_of(32))
        assert layout.longest == tokens
        present = min(texts, tokens)
        for lengths in (
            [1] * (present - 1) + [tokens - present + 1],
            [tokens // present + (text < tokens % present) for text in range(present)],
        ):
            filled(layout, [1] * tokens, lengths)
            exact = Layout.of(lengths, tile_of(32))
            assert exact[:2] == (tokens, present)
            assert exact.longest == max(lengths)
            assert exact.split(filled(exact, [1] * tokens, lengths)).blocks[:, 1].all(), (
                "none spare"
            )


@pytest.mark.parametrize(
    ("ids", "lengths"),
    [(17, [17]), (4, [1] * 4), (0, []), (4, [2, 1]), (4, [4, 0]), (4, [5, -1])],
)
def test_batches_that_do_not_fit_are_refused(ids: int, lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="tokens"):
        filled(Layout(16, 3, 4, 16, tile_of(16)), [1] * ids, lengths)


def weights_of(layer_case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, MoEWeights, Norm]:
    layer = make_layer(layer_case, dtype)
    generator = torch.Generator().manual_seed(5)
    y_TD = torch.randn(layer.x_TD.shape, generator=generator).to(DEVICE, dtype)
    scale, shift = torch.rand(2, layer_case.width, generator=generator).to(DEVICE, dtype)
    return layer.x_TD, y_TD, MoEWeights(*layer[1:]), Norm(scale, shift, 1e-5)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("kernel", "dtype"), [pair for pair in PLANS_AND_DTYPES if pair[1] in DTYPES[:2]], ids=str
)
@pytest.mark.parametrize("case", [Case(20), Case(20, experts=5, top_k=1)], ids=str)
def test_padding_is_in_no_experts_group(case: Case, kernel: str, dtype: torch.dtype) -> None:
    live = 13
    x_TD, y_TD, moe, norm = weights_of(case, dtype)
    expected = fused.moe_block(
        x_TD[:live].contiguous(), y_TD[:live].contiguous(), norm, moe, norm, tiles=PLANS[kernel]
    )
    x_TD[live:], y_TD[live:] = math.nan, math.inf
    count = torch.tensor([live], dtype=torch.int32, device=DEVICE)
    padded = fused.moe_block(x_TD, y_TD, norm, moe, norm, live=count, tiles=PLANS[kernel])
    for one, other in zip(padded, expected, strict=True):
        assert torch.equal(one[:live], other)
    assert (padded[2][live:] == len(moe.router_ED)).all(), "expert E, which is none"


def test_ends_count_real_rows_only() -> None:
    x_TD, _, moe, _ = weights_of(Case(37), torch.float32)
    count = torch.tensor([21], dtype=torch.int32, device=DEVICE)
    weights_TK, experts_TK = launch.empty_routing(x_TD, 2)
    launch.route(x_TD, moe.router_ED, weights_TK, experts_TK, normalize=False, live=count)
    counts_PE, chunk = launch.count(experts_TK, len(moe.router_ED))
    order_R, ends_E, _ = launch.permute(experts_TK, counts_PE, chunk, None)
    expected_R, expected_ends_E = reference.permute(
        reference.route(x_TD[:21], moe.router_ED, 2)[1], len(moe.router_ED)
    )
    assert torch.equal(ends_E, expected_ends_E)
    assert torch.equal(order_R[: 2 * 21], expected_R)


@pytest.mark.parametrize("kernels", [fused, invariant], ids=lambda one: one.__name__)
def test_table_ops_know_how_many_tokens_are_real(kernels: Any) -> None:
    x_TD, y_TD, moe, norm = weights_of(Case(12, experts=4, width=32, ffn_width=32), torch.float32)
    layout = Layout(12, 2, 4, 12, tile_of(16))
    numbers = filled(layout, [1] * 7, [5, 2]).to(DEVICE)
    for padded in (True, False):
        ops = TableOps(kernels, layout, numbers, padded=padded)
        out_TD, _, experts_TK = ops.moe_block(x_TD, y_TD, norm, moe, norm)
        assert (experts_TK[7:] == 4).all() == padded
        assert (experts_TK[:7] < 4).all()
        exact_TD = reference.moe_block(x_TD, y_TD, norm, moe, norm)[0]
        torch.testing.assert_close(out_TD[:7], exact_TD[:7], atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the mean of no tokens
@pytest.mark.parametrize("kernel", ["rotating", "rotated", "varlen"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_table_ops_are_those_of_fused(
    dtype: torch.dtype, kernel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel == "varlen" and dtype == torch.float32:
        pytest.skip("it takes 16 bits alone")
    if not CUDA:
        monkeypatch.setattr(fused.varlen, "varlen_attn", stand_in)
    lengths, heads, width = [5, 1, 30], 3, 32
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(50, 3, heads, width, generator=generator).to(DEVICE, dtype)
    hidden_TD = qkv.flatten(1)[:, :96].contiguous()
    positions_T = torch.cat([torch.arange(length) for length in lengths]).to(DEVICE)
    tile = AttentionTile(kernel, 16, 32, 4, 2)
    packing = fused.pack(lengths, positions_T, 64, width, 10000.0, dtype, tile=tile)
    expected = fused.attention(qkv[:36].clone(), packing)

    layout = Layout(50, 6, 12, 50, tile)
    numbers = filled(layout, [1] * 36, lengths).to(DEVICE)
    ops = TableOps(fused, layout, numbers, padded=True)
    qkv[36:], hidden_TD[36:] = math.nan, math.nan
    static = ops.pack([], positions_T, 40, width, 10000.0, dtype)
    assert static.longest == 40, "no text is longer than the span"
    assert torch.equal(ops.attention(qkv, static)[:36], expected)
    pooling = Pooling(64, False, True)
    pooled_BD = ops.pool(hidden_TD, [], pooling)
    assert torch.equal(pooled_BD[:3], fused.pool(hidden_TD[:36], lengths, pooling))
    assert pooled_BD.shape == (6, 64)
    assert pooled_BD[3:].isnan().all()
