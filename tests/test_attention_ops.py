"""Attention of packed texts, each way it may run, against float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from nomoe_kernels import configs, fused, launch, reference
from nomoe_kernels.configs import AttentionTile
from tests.test_fused_ops import BOUNDS, CUDA, DEVICE, DTYPES, poisoned

__all__ = ["poisoned"]
pytestmark = [pytest.mark.gpu] if CUDA else []

KERNELS = ["rotating", "rotated"]


def tile_of(kernel: Any, block_m: int = 32, block_n: int = 32) -> AttentionTile:
    return AttentionTile(kernel, block_m, block_n, 4, 2)


def draw(lengths: list[int], heads: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Queries, keys and values; positions with gaps, which start far into the text."""
    generator = torch.Generator().manual_seed(6)
    qkv_T3NH = torch.randn(sum(lengths), 3, *heads, generator=generator).to(DEVICE, dtype)
    positions_T = torch.cat([torch.arange(length) * 3 + 700 for length in lengths]).to(DEVICE)
    return qkv_T3NH, positions_T


def exact_attention(qkv_T3NH: Tensor, positions_T: Tensor, lengths: list[int]) -> Tensor:
    """One text, and one head, at a time in float64."""
    H = qkv_T3NH.shape[-1]
    exponents = torch.arange(0, H, 2, device=DEVICE).double() / H
    angles = positions_T.double()[:, None] / 10000**exponents
    cos, sin = angles.cos()[:, None, None], angles.sin()[:, None, None]
    q_TNH, k_TNH = reference.rotate(qkv_T3NH[:, :2].double(), cos, sin).unbind(1)
    texts = []
    for mine in torch.arange(sum(lengths), device=DEVICE).split(lengths):
        scores = torch.einsum("qnh,knh->nqk", q_TNH[mine], k_TNH[mine]) / math.sqrt(H)
        values = qkv_T3NH[mine, 2].double()
        texts.append(torch.einsum("nqk,knh->qnh", scores.softmax(-1), values).flatten(1))
    return torch.cat(texts)


def off(out_TD: Tensor, exact_TD: Tensor) -> float:
    return float((out_TD - exact_TD).abs().max() / exact_TD.abs().max())


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("heads", [(1, 64), (3, 16), (2, 48)], ids=str)
# beside a block of 32 one more, one less and as many; one token; several blocks
@pytest.mark.parametrize("lengths", [[1], [3, 33, 1, 31, 32], [110]], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention(
    heads: tuple[int, int], lengths: list[int], kernel: str, dtype: torch.dtype
) -> None:
    qkv_T3NH, positions_T = draw(lengths, heads, dtype)
    exact_TD = exact_attention(qkv_T3NH, positions_T, lengths)
    tile = tile_of(kernel)
    packing = fused.pack(lengths, positions_T, 4000, heads[1], 10000.0, dtype, tile=tile)
    assert packing.tile == tile
    out_TD = fused.attention(qkv_T3NH, packing)
    assert out_TD.dtype == dtype
    assert out_TD.shape == (sum(lengths), heads[0] * heads[1])
    assert off(out_TD, exact_TD) < BOUNDS[dtype]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("kernel", "lengths"), [("rotated", [1, 2047]), ("rotating", [2048])])
def test_the_longest_texts(kernel: str, lengths: list[int]) -> None:
    qkv_T3NH = draw(lengths, (1, 16), torch.float32)[0]
    positions_T = torch.cat([torch.arange(length) for length in lengths]).to(DEVICE)
    exact_TD = exact_attention(qkv_T3NH, positions_T, lengths)
    # few blocks, for the interpreter's sake
    tile = tile_of(kernel, 64 if CUDA else 512, 32 if CUDA else 512)
    packing = fused.pack(lengths, positions_T, 2048, 16, 10000.0, torch.float32, tile=tile)
    assert off(fused.attention(qkv_T3NH, packing), exact_TD) < BOUNDS[torch.float32]


@pytest.mark.skipif(CUDA, reason="what a device of another kind would run")
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("capability", [(9, 0), (8, 0)])
@pytest.mark.parametrize("lengths", [[32], [64, 1, 33], [31, 96, 65]], ids=str)
def test_keys_that_do_not_fill_a_block(
    lengths: list[int], capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Hopper they come after those that do, and only they are asked whether they are there."""
    device = configs.Device("a stand-in", capability, 132, 232_448)
    monkeypatch.setattr(launch, "device", lambda _: device)
    qkv_T3NH, positions_T = draw(lengths, (2, 16), torch.float32)
    exact_TD = exact_attention(qkv_T3NH, positions_T, lengths)
    tile = tile_of("rotated")
    packing = fused.pack(lengths, positions_T, 4000, 16, 10000.0, torch.float32, tile=tile)
    assert off(fused.attention(qkv_T3NH, packing), exact_TD) < BOUNDS[torch.float32]


def stand_in(
    q_TNH: Tensor,
    k_TNH: Tensor,
    v_TNH: Tensor,
    bounds_q: Tensor,
    bounds_k: Tensor,
    longest_q: int,
    longest_k: int,
) -> Tensor:
    """What torch's varlen_attn does, which runs on CUDA alone."""
    for bounds, longest in ((bounds_q, longest_q), (bounds_k, longest_k)):
        assert bounds.dtype == torch.int32
        assert bounds.is_contiguous()
        assert max(bounds.diff().tolist()) <= longest
    assert all(one.stride(-1) == 1 and not one.requires_grad for one in (q_TNH, k_TNH, v_TNH))
    out_TNH = torch.empty_like(q_TNH)
    for start, stop in zip(bounds_q.tolist(), bounds_q.tolist()[1:], strict=False):
        q, k, v = (one[start:stop].double() for one in (q_TNH, k_TNH, v_TNH))
        scores = torch.einsum("qnh,knh->nqk", q, k) / math.sqrt(q.shape[-1])
        out_TNH[start:stop] = torch.einsum("nqk,knh->qnh", scores.softmax(-1), v).to(q_TNH.dtype)
    return out_TNH


@pytest.mark.skipif(CUDA, reason="the next test runs the real one")
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("heads", [(1, 64), (3, 16)], ids=str)
def test_what_torchs_attention_is_given(
    heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused.varlen, "varlen_attn", stand_in)
    lengths = [3, 33, 1, 31, 32]
    qkv_T3NH, positions_T = draw(lengths, heads, torch.float16)
    exact_TD = exact_attention(qkv_T3NH, positions_T, lengths)
    packing = fused.pack(
        lengths, positions_T, 4000, heads[1], 1e4, torch.float16, tile=tile_of("varlen")
    )
    assert packing.longest == 33
    out_TD = fused.attention(qkv_T3NH.requires_grad_(), packing)
    assert off(out_TD.detach(), exact_TD) < BOUNDS[torch.float16]
    with pytest.raises(RuntimeError, match="no backward pass"):
        out_TD.sum().backward()


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("heads", [(12, 64), (6, 16)], ids=str)
@pytest.mark.parametrize("lengths", [[1], [3, 33, 1, 31, 32, 512], [2048] * 2], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_torchs_attention(heads: tuple[int, int], lengths: list[int], dtype: torch.dtype) -> None:
    qkv_T3NH, positions_T = draw(lengths, heads, dtype)
    exact_TD = exact_attention(qkv_T3NH, positions_T, lengths)
    options: Any = {"tile": tile_of("varlen")}
    packing = fused.pack(lengths, positions_T, 8000, heads[1], 1e4, dtype, **options)
    kept = qkv_T3NH.clone()
    assert off(fused.attention(qkv_T3NH, packing), exact_TD) < BOUNDS[dtype]
    # recorded, and replayed on other numbers
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_TD = fused.attention(qkv_T3NH, packing)
    qkv_T3NH.copy_(kept.flip(0))
    exact_TD = exact_attention(qkv_T3NH, positions_T, lengths)
    graph.replay()
    assert off(out_TD, exact_TD) < BOUNDS[dtype]


@pytest.mark.parametrize("kernel", KERNELS)
def test_attention_keeps_texts_apart(kernel: str) -> None:
    lengths = [20, 5, 33]
    qkv_T3NH = torch.randn(58, 3, 2, 16, generator=torch.Generator().manual_seed(7)).to(DEVICE)
    positions_T = torch.cat([torch.arange(length) for length in lengths]).to(DEVICE)
    options: Any = {"tile": tile_of(kernel)}
    packing = fused.pack(lengths, positions_T, 33, 16, 10000.0, torch.float32, **options)
    clean = fused.attention(qkv_T3NH.clone(), packing)
    qkv_T3NH[22] = math.nan
    out_TD = fused.attention(qkv_T3NH, packing)
    assert out_TD[20:25].isnan().all()
    others = [*range(20), *range(25, 58)]
    assert torch.equal(out_TD[others], clean[others])


def test_packing() -> None:
    positions_T = torch.zeros(300, dtype=torch.int64, device=DEVICE)
    packing = fused.pack([250, 1, 49], positions_T, 250, 64, 10000.0, torch.float16)
    assert packing.tile.block_m == 128
    assert packing.blocks.tolist() == [[0, 250, 0], [0, 250, 128], [250, 1, 0], [251, 49, 0]]
    assert packing.bounds.tolist() == [0, 250, 251, 300]
    assert packing.longest == 250
    # kernels are compiled for addresses that are multiples of 16
    assert (packing.blocks.data_ptr() - packing.bounds.data_ptr()) % 16 == 0
    empty = fused.pack([], positions_T[:0], 1, 64, 10000.0, torch.float16)
    assert (empty.blocks.shape, empty.bounds.tolist()) == ((0, 3), [0])


def test_a_text_too_long_for_offsets_of_32_bits_is_refused() -> None:
    qkv_T3NH, positions_T = draw([3], (12, 64), torch.float32)
    tile = tile_of("rotated")
    packing = fused.pack([3], positions_T, 4000, 64, 10000.0, torch.float32, tile=tile)
    with pytest.raises(ValueError, match="a text has 932068 tokens, too many"):
        fused.attention(qkv_T3NH, packing._replace(longest=932_068))
    assert fused.attention(qkv_T3NH.clone(), packing._replace(longest=932_067)).isfinite().all()
    # other forms have none
    rotating = packing._replace(longest=932_068, tile=tile_of("rotating"))
    assert fused.attention(qkv_T3NH, rotating).isfinite().all()


def test_torchs_attention_takes_16_bits_alone() -> None:
    qkv_T3NH, positions_T = draw([4], (1, 16), torch.float32)
    packing = fused.pack([4], positions_T, 800, 16, 1e4, torch.float32, tile=tile_of("varlen"))
    with pytest.raises(ValueError, match="varlen_attn takes 16 bits alone"):
        fused.attention(qkv_T3NH, packing)
