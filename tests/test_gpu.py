"""What only a CUDA device can show."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from nomoe import Encoder, data
from nomoe.verify import verify_golden
from nomoe_kernels import reference
from nomoe_kernels.reference import Pooling
from tests.oracle import most_error, rms_of
from tests.test_attention_ops import draw, exact_attention, off
from tests.test_fused_ops import BOUNDS, Layer, exact_layer

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_golden_data(dtype: torch.dtype) -> None:
    checks = verify_golden(torch.device("cuda"), dtype, "auto")
    assert checks
    assert not [check for check in checks if check.result != "ok"]


def test_encoder_defaults(tiny_folder: Path) -> None:
    on_gpu = Encoder.from_pretrained(tiny_folder)
    assert on_gpu.device.type == "cuda"
    assert on_gpu.dtype == torch.float16
    on_cpu = Encoder.from_pretrained(tiny_folder, device="cpu")
    texts = [text for group in data.sentences().values() for text in group]
    vectors = on_gpu.encode_query(texts)
    assert vectors.dtype == np.float32
    cosines = (vectors * on_cpu.encode_query(texts)).sum(1)
    assert np.median(1 - cosines) < 1e-5
    tensor = on_gpu.encode_query(texts, convert_to_tensor=True)
    assert tensor.is_cuda
    assert tensor.dtype == torch.float32


def test_float32_vectors_agree_with_the_cpu(tiny_folder: Path) -> None:
    texts = [text for group in data.sentences().values() for text in group]
    cuda = Encoder.from_pretrained(tiny_folder, device="cuda", dtype="float32")
    cpu = Encoder.from_pretrained(tiny_folder, device="cpu", dtype="float32")
    assert np.abs(cuda.encode_query(texts) - cpu.encode_query(texts)).max() < 1e-5


def test_moving_an_encoder(tiny_folder: Path) -> None:
    encoder = Encoder.from_pretrained(tiny_folder, device="cpu")
    before = encoder.encode_query("a")
    after = encoder.encode("a", prompt_name="query", device="cuda")
    assert encoder.device.type == "cuda"
    assert np.abs(after - before).max() < 1e-5


# --- the kernels at the real sizes, with the configured tiles ---

E, K, D, F = 8, 2, 768, 3072
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def real_layer(dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, device="cuda") * scale).to(dtype)

    return (
        normal(E, D, scale=D**-0.5),
        normal(E, F, D, scale=D**-0.5).transpose(1, 2),
        normal(E, F, D, scale=F**-0.5),
        normal(D),
    )


def tokens_of(count: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(count, D, generator=generator, device="cuda").to(dtype)


def moe_layer(x_TD: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from nomoe_kernels import fused

    return fused.moe_layer(x_TD, *weights, K)


@pytest.mark.parametrize("count", [1, 7, 64, 129, 500, 1000, 3000, 20_000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_at_every_size(count: int, dtype: torch.dtype) -> None:
    x_TD, weights = tokens_of(count, dtype), real_layer(dtype)
    out_TD, weights_TK, experts_TK = moe_layer(x_TD, *weights)
    plain = reference.moe_layer(x_TD, *weights, K)
    exact_TD, probabilities_TE, exact_experts_TK = exact_layer(Layer(x_TD, *weights, K))
    # plain torch's own are up to 1.4e-6 off at 20,000 tokens
    assert (weights_TK - probabilities_TE.gather(1, experts_TK)).abs().max() < 1e-6
    # a token near a tie may go either way, against plain torch as against float64
    ranked_TK1 = probabilities_TE.sort(dim=1, descending=True)[0][:, : K + 1]
    is_clear_T = (-ranked_TK1.diff(dim=1)).amin(dim=1) > 1e-6
    assert torch.equal(experts_TK[is_clear_T], plain[2][is_clear_T])
    assert is_clear_T.float().mean() > 0.999
    same = (experts_TK == exact_experts_TK).all(dim=1)
    assert same.float().mean() > 0.999
    assert rms_of((out_TD - exact_TD)[same]) <= most_error(plain[0][same], exact_TD[same], F)
    assert out_TD.isfinite().all()


@pytest.mark.parametrize("count", [16, 300, 4096, 40_000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_hundred_repeats_are_the_same_bits(count: int, dtype: torch.dtype) -> None:
    x_TD, weights = tokens_of(count, dtype), real_layer(dtype)
    first = moe_layer(x_TD, *weights)
    for _ in range(100):
        again = moe_layer(x_TD, *weights)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_a_text_alone_takes_the_same_route() -> None:
    x_TD, weights = tokens_of(2000, torch.float16), real_layer(torch.float16)
    together = moe_layer(x_TD, *weights)
    alone = moe_layer(x_TD[100:116], *weights)
    assert torch.equal(alone[2], together[2][100:116])
    assert torch.equal(alone[1], together[1][100:116])


@pytest.mark.parametrize("count", [16, 300, 5000])
def test_no_synchronisation_and_graph_replay(count: int) -> None:
    weights = real_layer(torch.float16)
    x_TD = tokens_of(count, torch.float16)
    moe_layer(x_TD, *weights)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        moe_layer(x_TD, *weights)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = moe_layer(x_TD, *weights)
    for seed in (2, 3):
        x_TD.copy_(tokens_of(count, torch.float16, seed))
        graph.replay()
        expected = moe_layer(x_TD.clone(), *weights)
        for one, other in zip(captured, expected, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("kernel", ["configured", "pointer"])
def test_rows_past_the_reach_of_int32(kernel: str) -> None:
    from nomoe_kernels import configs, fused, launch

    # 2 * 400,000 rows of 3072 numbers: offsets pass 2^31 at token 349,525
    weights = real_layer(torch.float16)
    few_TD = tokens_of(4000, torch.float16)
    tiles = None
    if kernel == "pointer":
        tile = configs.invariant_tile(launch.device(few_TD.device), 2)
        assert tile.kernel == "pointer"
        tiles = configs.Plan(tile, tile)
    out_TD = fused.run_layer(few_TD.repeat(100, 1), *weights, K, tiles=tiles)[0]
    expected_TD = moe_layer(few_TD, *weights)[0]
    off = (out_TD.view(100, 4000, D) - expected_TD).abs().amax() / expected_TD.abs().max()
    assert off < 2e-3


def test_attention_past_the_reach_of_int32() -> None:
    from nomoe_kernels import configs, fused

    # a million tokens of 3 * 768 numbers
    lengths = [512, 300, 212] * 10
    few = torch.randn(sum(lengths), 3, 12, 64, device="cuda", dtype=torch.float16)
    positions_T = torch.cat([torch.arange(length) for length in lengths]).cuda()
    expected = fused.attention(
        few.clone(), fused.pack(lengths, positions_T, 512, 64, 1e4, torch.float16)
    )
    for kernel in ("rotating", "rotated"):
        tile = configs.invariant_attention(2)._replace(kernel=kernel)
        packing = fused.pack(
            lengths * 100, positions_T.repeat(100), 512, 64, 1e4, torch.float16, tile=tile
        )
        out_TD = fused.attention(few.repeat(100, 1, 1, 1), packing)
        off = (out_TD.view(100, *expected.shape) - expected).abs().amax()
        assert off < 2e-3 * expected.abs().max(), kernel


def test_rows_of_norms_and_pooling_past_the_reach_of_int32() -> None:
    from nomoe_kernels import fused

    # three million tokens of 768 numbers
    few_TD = tokens_of(3000, torch.float16)
    weight_D, bias_D = torch.ones_like(few_TD[0]), torch.zeros_like(few_TD[0])
    norm = reference.Norm(weight_D, bias_D, 1e-5)
    many_TD = few_TD.repeat(1000, 1)
    out_TD = fused.add_layer_norm(many_TD, many_TD, norm)
    expected_TD = fused.add_layer_norm(few_TD, few_TD, norm)
    assert torch.equal(out_TD.view(1000, 3000, D), expected_TD.expand(1000, -1, -1))
    pooling = Pooling(D, False, True)
    vectors = fused.pool(many_TD, [3000] * 1000, pooling)
    assert torch.equal(vectors, fused.pool(few_TD, [3000], pooling).expand(1000, -1))


@pytest.mark.parametrize("count", [24, 700, 6000])
def test_a_bad_token_stays_alone_at_real_size(count: int) -> None:
    weights = real_layer(torch.float16)
    x_TD = tokens_of(count, torch.float16)
    clean = moe_layer(x_TD, *weights)[0]
    x_TD[3], x_TD[count - 1, 5] = math.nan, math.inf
    out_TD = moe_layer(x_TD, *weights)[0]
    good = [t for t in range(count) if t not in (3, count - 1)]
    assert torch.equal(out_TD[good], clean[good])
    assert out_TD[3].isnan().any()


@pytest.mark.parametrize("count", [1, 64, 300, 4096, 20_000])
@pytest.mark.parametrize(
    ("inner", "outer", "gelu"), [(D, F, True), (F, D, False), (D, 3 * D, False), (D, D, False)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_products_at_every_size(
    count: int, inner: int, outer: int, gelu: bool, dtype: torch.dtype
) -> None:
    """As configured, and by the one tile of batch_invariant=True."""
    from nomoe_kernels import fused, invariant

    generator = torch.Generator("cuda").manual_seed(count)
    x_TI, weight_OI, bias_O = (
        torch.randn(*shape, generator=generator, device="cuda")
        for shape in ((count, inner), (outer, inner), (outer,))
    )
    given = x_TI.to(dtype), (weight_OI / inner**0.5).to(dtype), bias_O.to(dtype)
    exact_TO = reference.linear(*(one.double() for one in given), gelu=gelu)
    most = most_error(reference.linear(*given, gelu=gelu), exact_TO, inner)
    for module in (fused, invariant):
        first = module.linear(*given, gelu=gelu)
        assert rms_of(first - exact_TO) <= most
        assert all(torch.equal(module.linear(*given, gelu=gelu), first) for _ in range(10))
    # any rows of them alone: the same bits
    some = invariant.linear(
        given[0][count // 3 : count // 3 + 7].contiguous(), *given[1:], gelu=gelu
    )
    assert torch.equal(some, first[count // 3 : count // 3 + 7])


@pytest.mark.parametrize("lengths", [[16] * 64, [512] * 8, [2048, 1, 300], [128, 77, 3]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_and_pooling_at_the_real_sizes(lengths: list[int], dtype: torch.dtype) -> None:
    from nomoe_kernels import fused, invariant

    qkv_T3NH, positions_T = draw(lengths, (12, 64), dtype)
    exact_TD = exact_attention(qkv_T3NH, positions_T, lengths)
    for module in (fused, invariant):
        packing = module.pack(lengths, positions_T, 8192, 64, 1e4, dtype)
        out_TD = module.attention(qkv_T3NH.clone(), packing)
        assert off(out_TD, exact_TD) < BOUNDS[dtype]
        again = [module.attention(qkv_T3NH.clone(), packing) for _ in range(10)]
        assert all(torch.equal(one, out_TD) for one in again)
    pooling = Pooling(256, True, True)
    vectors = fused.pool(out_TD, lengths, pooling)
    exact = reference.pool(out_TD.double(), lengths, pooling)
    assert (vectors - exact).abs().max() < 4e-7


def test_compiled_whole() -> None:
    weights = real_layer(torch.float16)
    x_TD = tokens_of(300, torch.float16)
    compiled = torch.compile(lambda x: moe_layer(x, *weights)[0] * 2, fullgraph=True)
    assert torch.equal(compiled(x_TD), moe_layer(x_TD, *weights)[0] * 2)
