"""The Triton kernels against float64 and their plain-torch twins.

Without a GPU they run under Triton's interpreter, in float32 and float16; with one they run as they
are, in bfloat16 too. Everything they allocate is poisoned first, so that an element nobody writes
cannot pass.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import interpreter_builder

from nomoe_kernels import configs, fused, launch, products, reference
from nomoe_kernels.configs import Plan, Tile
from nomoe_kernels.reference import MoEWeights, Norm, Pooling
from nomoe_kernels.tune import Layer
from tests.oracle import most_error, rms_of

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
pytestmark = [pytest.mark.gpu] if CUDA else []

DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if CUDA else [])
# largest error over largest value, as for the plain-torch operations
BOUNDS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}

PLANS = {
    "pointer": Plan(Tile("pointer", 16, 32, 32, 4, 2), Tile("pointer", 32, 32, 32, 4, 2)),
    "tma": Plan(Tile("tma", 16, 32, 32, 4, 2), Tile("tma", 32, 32, 32, 4, 2)),
    "small": Plan(Tile("small", 16, 64, 32, 4, 2), Tile("small", 16, 64, 32, 4, 2, 3)),
}
if CUDA:
    # blocks the tensor cores of Hopper take
    PLANS["tma"] = Plan(Tile("tma", 64, 64, 32, 4, 2), Tile("tma", 64, 32, 32, 4, 2))
    PLANS["specialized"] = Plan(
        Tile("specialized", 128, 128, 32, 4, 3), Tile("specialized", 128, 64, 32, 4, 3)
    )


def plans_of(dtype: torch.dtype) -> dict[str, Plan]:
    return {
        kernel: plan
        for kernel, plan in PLANS.items()
        if configs.supports(plan.up, 8, 96, dtype.itemsize)
    }


PLANS_AND_DTYPES = [(kernel, dtype) for dtype in DTYPES for kernel in plans_of(dtype)]


class Case(NamedTuple):
    tokens: int
    experts: int = 8
    top_k: int = 2
    width: int = 96
    ffn_width: int = 96
    choice: str = "spread"


def make_layer(case: Case, dtype: torch.dtype, seed: int = 0) -> Layer:
    """Unit-variance tokens and products; the router's rows decide which experts are used."""
    generator = torch.Generator().manual_seed(seed)
    T, E, K, D, F, choice = case

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x_TD, router_ED = normal(T, D), normal(E, D) / math.sqrt(D)
    # a feature that is the same for all tokens lets the router's first column favour experts
    x_TD[:, 0] = 4.0
    if choice == "one pair":
        router_ED[[E - 3, 1], 0] = 3.0
    elif choice == "empty experts":
        router_ED[: E // 2, 0] = 3.0
    w1, w2 = normal(E, F, D) / math.sqrt(D), normal(E, F, D) / math.sqrt(F)
    x_TD, router_ED, w1, w2, bias_D = (
        t.to(DEVICE, dtype) for t in (x_TD, router_ED, w1, w2, normal(D))
    )
    return Layer(x_TD, router_ED, w1.transpose(1, 2), w2, bias_D, K)


def exact_layer(layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    """The layer in float64, every expert on every token; probabilities of all experts."""
    x, router, w1, w2, bias = (t.double() for t in layer[:5])
    probabilities_TE = (x @ router.T).softmax(-1)
    experts_TK = probabilities_TE.sort(dim=-1, descending=True, stable=True)[1][:, : layer.top_k]
    gate_TE = torch.zeros_like(probabilities_TE).scatter(1, experts_TK, 1.0) * probabilities_TE
    out = bias.expand_as(x)
    for e in range(len(w1)):
        h = x @ w1[e]
        h = 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
        out = out + gate_TE[:, e : e + 1] * (h @ w2[e])
    return out, probabilities_TE, experts_TK


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every new tensor holds NaN, or numbers far outside any index."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def filled(*args: Any, **options: Any) -> Tensor:
            tensor = make(*args, **options)
            if tensor.is_floating_point():
                return tensor.fill_(math.nan)
            # int8 is what Triton keeps the descriptors in that kernels make
            return tensor.fill_(max(-(1 << 30), torch.iinfo(tensor.dtype).min))

        return filled

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", poison(Tensor.new_empty))


CASES = [
    Case(1),
    Case(2, experts=4, top_k=3),
    Case(15, experts=5, top_k=1),
    Case(16, choice="one pair"),
    Case(17, experts=64, top_k=3, ffn_width=64),
    Case(37, choice="empty experts"),
    Case(37, ffn_width=160, choice="one pair"),
    Case(16, width=768, ffn_width=96),
    # widths that no block divides
    Case(16, width=80, ffn_width=48),
    Case(256),
]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("kernel", "dtype"), PLANS_AND_DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_layer(case: Case, kernel: str, dtype: torch.dtype) -> None:
    widths = {case.width, case.ffn_width}
    if kernel in ("tma", "specialized") and (case.experts > 16 or any(w % 32 for w in widths)):
        pytest.skip("this kernel takes 16 experts, and widths that its blocks divide")
    if case.tokens == 256 and not CUDA and (kernel, dtype) != ("pointer", torch.float16):
        pytest.skip("minutes under the interpreter")
    layer = make_layer(case, dtype)
    exact_TD, probabilities_TE, exact_experts_TK = exact_layer(layer)
    out_TD, weights_TK, experts_TK = fused.run_layer(*layer, tiles=PLANS[kernel])

    assert torch.equal(experts_TK, exact_experts_TK)
    chosen_TK = probabilities_TE.gather(1, experts_TK)
    torch.testing.assert_close(weights_TK.double(), chosen_TK, atol=1e-6, rtol=0)
    assert out_TD.dtype == torch.float32
    error = (out_TD - exact_TD).abs().max() / exact_TD.abs().max()
    assert error < BOUNDS[dtype]


def test_one_thread_launches_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton may give another one a kernel that is not loaded yet."""
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    on_gpu: Any = SimpleNamespace(is_cuda=True, device=None)
    launching = []

    def work() -> None:
        with launch.on(on_gpu), launch.on(on_gpu):
            launching.append(True)
            time.sleep(0.01)
            assert launching.pop()
            assert not launching

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work) for _ in range(4)]:
            done.result()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_that_of_plain_torch(dtype: torch.dtype) -> None:
    layer = make_layer(Case(37, ffn_width=192), dtype)
    exact_TD = exact_layer(layer)[0]
    plain_TD = reference.moe_layer(*layer)[0]
    rms = {
        kernel: rms_of(fused.run_layer(*layer, tiles=tiles)[0] - exact_TD)
        for kernel, tiles in plans_of(dtype).items()
    }
    is_float32 = CUDA and dtype == torch.float32
    most = most_error(plain_TD, exact_TD, 192) if is_float32 else 1.5 * rms_of(plain_TD - exact_TD)
    assert all(one <= most for one in rms.values()), (rms, most)


@pytest.mark.usefixtures("poisoned")
def test_tokens_may_be_float32_and_weights_16_bit() -> None:
    layer = make_layer(Case(37), torch.float16)
    # beyond float16: the router must see what the experts do not
    x_TD = layer.x_TD.float() * (1 + 2e-4 * torch.rand_like(layer.x_TD.float()))
    expected = reference.moe_layer(x_TD, *layer[1:])
    for tiles in PLANS.values():
        out_TD, weights_TK, experts_TK = fused.run_layer(x_TD, *layer[1:], tiles=tiles)
        torch.testing.assert_close(weights_TK, expected[1], atol=1e-6, rtol=0)
        assert torch.equal(experts_TK, expected[2])
        torch.testing.assert_close(out_TD, expected[0], atol=4e-3, rtol=0)
    rounded = reference.route(x_TD.half(), layer.router_ED, 2)[0]
    assert (rounded - expected[1]).abs().max() > 1e-5, "the test could not tell"


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("kernel", "dtype"), PLANS_AND_DTYPES, ids=str)
def test_block(kernel: str, dtype: torch.dtype) -> None:
    """The layer with both norms, against float64."""
    layer = make_layer(Case(37), dtype)
    generator = torch.Generator().manual_seed(11)
    y_TD, *rows_D = (
        torch.randn(*shape, generator=generator).to(DEVICE, dtype)
        for shape in ((37, 96), (96,), (96,), (96,), (96,))
    )
    norms = Norm(*rows_D[:2], 1e-5), Norm(*rows_D[2:], 1e-5)
    weights = MoEWeights(*layer[1:], normalize=True)

    def run(module: Any, *dtypes: torch.dtype, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        def cast(parts: tuple[Any, ...]) -> list[Any]:
            return [one.to(*dtypes) if isinstance(one, Tensor) else one for one in parts]

        x_TD, y_of_attention = cast((layer.x_TD, y_TD))
        before, after = (Norm(*cast(one)) for one in norms)
        moe = MoEWeights(*cast(weights))
        return module.moe_block(x_TD, y_of_attention, before, moe, after, **options)

    out_TD, weights_TK, experts_TK = run(fused, tiles=PLANS[kernel])
    plain_TD, plain_TK, plain_experts_TK = run(reference)
    exact_TD = run(reference, torch.float64)[0]
    assert torch.equal(experts_TK, plain_experts_TK)
    torch.testing.assert_close(weights_TK, plain_TK, atol=1e-5, rtol=0)
    assert out_TD.dtype == dtype
    errors = [(one.double() - exact_TD).square().mean().sqrt() for one in (out_TD, plain_TD)]
    assert errors[0] <= 1.1 * errors[1] + 1e-6
    assert run(fused)[0].shape == (37, 96)
    with pytest.raises(ValueError, match=r"y_TD is \(36, 96\)"):
        fused.moe_block(layer.x_TD, y_TD[1:], norms[0], weights, norms[1])


@pytest.mark.parametrize("kernel", list(plans_of(torch.float32)))
def test_normalised_weights(kernel: str) -> None:
    layer = make_layer(Case(9), torch.float32)
    expected = reference.moe_layer(*layer, normalize=True)
    out_TD, weights_TK, _ = fused.run_layer(*layer, normalize=True, tiles=PLANS[kernel])
    torch.testing.assert_close(weights_TK.sum(1), torch.ones(9, device=DEVICE))
    torch.testing.assert_close(out_TD, expected[0], atol=1e-5, rtol=0)
    ones_D = layer.bias_D.new_ones(96)
    arguments = (layer.x_TD, layer.x_TD, Norm(ones_D, ones_D, 1e-5), layer.router_ED, 2)
    weights_TK = fused.add_norm_route(*arguments, normalize=True)[1]
    torch.testing.assert_close(weights_TK.sum(1), torch.ones(9, device=DEVICE))


@pytest.mark.skipif(CUDA, reason="turns the interpreter's own grid around")
@pytest.mark.parametrize("kernel", list(PLANS))
def test_programs_may_run_in_any_order(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that writes rows of another would be mended by the one that follows it."""
    layer = make_layer(Case(37, ffn_width=64), torch.float32)
    expected = fused.run_layer(*layer, tiles=PLANS[kernel])
    device = configs.device_of(DEVICE)
    set_place = interpreter_builder.set_grid_idx

    def set_place_from_the_end(*place: int) -> None:
        last = (size - 1 for size in interpreter_builder.grid_dim)
        set_place(*(end - at for end, at in zip(last, place, strict=True)))

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", set_place_from_the_end)
    # how many programs share the tiles of a persistent grid
    for multiprocessors in (1, 3, 1000):
        many = device._replace(multiprocessors=multiprocessors)
        monkeypatch.setattr(launch, "device", lambda _, many=many: many)
        result = fused.run_layer(*layer, tiles=PLANS[kernel])
        for one, other in zip(result, expected, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("kernel", list(PLANS))
def test_a_bad_token_stays_alone(kernel: str) -> None:
    clean = make_layer(Case(24, choice="empty experts"), torch.float16)
    expected = fused.run_layer(*clean, tiles=PLANS[kernel])
    x_TD = clean.x_TD.clone()
    bad = [3, 11, 23]
    x_TD[3], x_TD[11, 7], x_TD[23, 5] = math.nan, math.inf, -math.inf
    result = fused.run_layer(x_TD, *clean[1:], tiles=PLANS[kernel])
    good = [t for t in range(24) if t not in bad]
    # bit for bit, though the bad rows change which row is computed where
    for one, other in zip(result, expected, strict=True):
        assert torch.equal(one[good], other[good])
    assert result[0][bad].isnan().any(dim=1).all()
    assert result[1][bad].isnan().all()
    assert result[2][bad].tolist() == [[0, 1]] * 3, "NaN takes the first experts, as in a sort"
    assert torch.equal(reference.route(x_TD, clean.router_ED, 2)[1], result[2])


def test_ties_go_to_the_lower_expert() -> None:
    x_TD, router_ED = torch.ones(5, 16, device=DEVICE), torch.zeros(64, 16, device=DEVICE)
    weights_TK, experts_TK = fused.route(x_TD, router_ED, 8)
    assert experts_TK.tolist() == [list(range(8))] * 5
    assert torch.equal(weights_TK, torch.full((5, 8), 1 / 64, device=DEVICE))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "width"),
    [(0, 8, 2, 96), (1, 8, 2, 768), (5, 64, 8, 48), (37, 4, 1, 96), (37, 11, 3, 160)],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_route(tokens: int, experts: int, top_k: int, width: int, dtype: torch.dtype) -> None:
    layer = make_layer(Case(tokens, experts, top_k, width), dtype, seed=1)
    weights_TK, experts_TK = fused.route(layer.x_TD, layer.router_ED, top_k)
    probabilities_TE = (layer.x_TD.double() @ layer.router_ED.double().T).softmax(-1)
    expected = probabilities_TE.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(experts_TK, expected[1][:, :top_k])
    torch.testing.assert_close(weights_TK.double(), expected[0][:, :top_k], atol=1e-6, rtol=0)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("programs", [1, 3, 528])
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts"), [(0, 2, 8), (1, 1, 4), (111, 2, 8), (60, 3, 64)]
)
def test_permute(
    programs: int, tokens: int, top_k: int, experts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "ROUTING_PROGRAMS", programs)
    generator = torch.Generator().manual_seed(tokens)
    # the upper half of the experts stays empty
    experts_TK = torch.randint(experts // 2, (tokens, top_k), generator=generator).to(DEVICE)
    order_R, ends_E = fused.permute(experts_TK, experts)
    expected = reference.permute(experts_TK, experts)
    assert torch.equal(order_R, expected[0])
    assert torch.equal(ends_E, expected[1])
    assert (order_R.dtype, ends_E.dtype) == (torch.int64, torch.int32)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("programs", [1, 3, 528])
def test_layer_shared_among_programs(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "ROUTING_PROGRAMS", programs)
    layer = make_layer(Case(45, ffn_width=32), torch.float32)
    exact_TD = exact_layer(layer)[0]
    for tiles in (PLANS["pointer"], PLANS["tma"]):
        out_TD = fused.run_layer(*layer, tiles=tiles)[0]
        torch.testing.assert_close(out_TD.double(), exact_TD, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kernel", ["pointer", "tma"])
@pytest.mark.parametrize("o_contiguous", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grouped_gemm(kernel: str, o_contiguous: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    counts = [0, 17, 1, 0, 33, 16, 0]
    R, inner, outer = sum(counts), 96, 80
    ends_E = torch.tensor(counts, device=DEVICE).cumsum(0).to(torch.int32)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    weight_EIO = (
        normal(7, inner, outer) if o_contiguous else normal(7, outer, inner).transpose(1, 2)
    )
    rows, weights_R = normal(40, inner), torch.rand(R, generator=generator).to(DEVICE)
    gather_R = torch.randint(40, (R,), generator=generator).to(DEVICE)
    scatter_R = torch.randperm(R, generator=generator).to(DEVICE)
    tile = PLANS[kernel].up
    for options in (
        {"gelu": True},
        {"row_weights_R": weights_R},
        {"gather_R": gather_R, "scatter_R": scatter_R, "row_weights_R": weights_R, "gelu": True},
    ):
        given = rows if "gather_R" in options else rows[gather_R]
        result = fused.grouped_gemm(given, weight_EIO, ends_E, tile=tile, **options)
        expected = reference.grouped_gemm(given.double(), weight_EIO.double(), ends_E, **options)
        assert result.dtype == dtype
        assert (result - expected).abs().max() / expected.abs().max() < BOUNDS[dtype]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("tokens", "width"), [(1, 768), (9, 96), (0, 96)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_and_sums(tokens: int, width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    # a common offset: the variance of one pass, or of 16 bits, would be noise
    x_TD, y_TD, weight_D, bias_D = (
        normal(tokens, width) + 30,
        normal(tokens, width),
        normal(width),
        normal(width),
    )
    norm = Norm(weight_D, bias_D, 1e-5)
    ulps = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 4e-2}[dtype]
    close = {"atol": ulps, "rtol": 0}
    for added in (y_TD, y_TD.new_ones(width)):
        normed_TD = fused.add_layer_norm(x_TD, added, norm)
        torch.testing.assert_close(normed_TD, reference.add_layer_norm(x_TD, added, norm), **close)

    router_ED = normal(8, width) / math.sqrt(width)
    normed_TD, weights_TK, experts_TK = fused.add_norm_route(x_TD, y_TD, norm, router_ED, 2)
    expected = reference.add_norm_route(x_TD, y_TD, norm, router_ED, 2)
    assert torch.equal(experts_TK, expected[2])
    torch.testing.assert_close(weights_TK, expected[1], atol=1e-5, rtol=0)
    assert normed_TD.dtype == dtype
    torch.testing.assert_close(normed_TD, expected[0], **close)

    rows_RD = normal(tokens * 3, width)
    order_R = torch.randperm(tokens * 3, generator=generator).to(DEVICE)
    for order in (None, order_R):
        total_TD = fused.unpermute(rows_RD, order, bias_D, 3)
        expected_TD = reference.unpermute(rows_RD.double(), order, bias_D.double(), 3)
        torch.testing.assert_close(total_TD, expected_TD, atol=2e-6, rtol=1e-6)
        normed = fused.unpermute_add_norm(rows_RD, order, bias_D, 3, x_TD, norm)
        exact = reference.unpermute_add_norm(rows_RD, order, bias_D, 3, x_TD, norm)
        assert normed.dtype == dtype
        torch.testing.assert_close(normed, exact, **close)


def test_norms_of_rows_that_hardly_vary() -> None:
    """Where the variance is a tenth of eps, eps decides."""
    generator = torch.Generator().manual_seed(9)
    x_TD = (1e-3 * torch.randn(4, 96, generator=generator)).to(DEVICE)
    zeros, ones = torch.zeros_like(x_TD), torch.ones(96, device=DEVICE)
    norm = Norm(ones, zeros[0], 1e-5)
    exact = torch.nn.functional.layer_norm(x_TD.double(), (96,), eps=1e-5).float()
    assert exact.abs().max() < 1.5, "without eps it would be 3"
    torch.testing.assert_close(fused.add_layer_norm(x_TD, zeros, norm), exact, atol=1e-5, rtol=0)
    normed = fused.unpermute_add_norm(x_TD, None, zeros[0], 1, zeros, norm)
    torch.testing.assert_close(normed, exact, atol=1e-5, rtol=0)


def test_the_sum_meets_the_residual_unrounded() -> None:
    generator = torch.Generator().manual_seed(10)
    rows_RD, residual_TD, bias_D = (
        torch.randn(*shape, generator=generator).half().to(DEVICE)
        for shape in ((128, 96), (64, 96), (96,))
    )
    norm = Norm(torch.ones_like(bias_D), torch.zeros_like(bias_D), 1e-5)
    out_TD = fused.unpermute_add_norm(rows_RD, None, bias_D, 2, residual_TD, norm)
    total = rows_RD.double().unflatten(0, (-1, 2)).sum(1) + bias_D.double() + residual_TD.double()
    exact = torch.nn.functional.layer_norm(total, (96,), eps=1e-5)
    rms, rounded = ((one - exact).square().mean().sqrt() for one in (out_TD, exact.half()))
    # rounding the sum as well would make it 1.4 times
    assert rms < 1.05 * rounded


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embed(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(8)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    words_VD, vectors = normal(50, 96), (normal(96), Norm(normal(96), normal(96), 1e-5))
    ids_T = torch.tensor([49, 0, 7, 7, 13], device=DEVICE)
    hidden_TD = fused.embed(ids_T, words_VD, *vectors)
    ulps = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 4e-2}[dtype]
    assert hidden_TD.dtype == dtype
    torch.testing.assert_close(
        hidden_TD, reference.embed(ids_T, words_VD, *vectors), atol=ulps, rtol=0
    )
    assert fused.embed(ids_T[:0], words_VD, *vectors).shape == (0, 96)


def exact_pool(hidden_TD: Tensor, lengths: list[int], pooling: Pooling) -> Tensor:
    vectors = torch.stack([part.mean(0) for part in hidden_TD.double().split(lengths)])
    if pooling.normalize_before:
        vectors = vectors / vectors.square().sum(1, keepdim=True).sqrt()
    vectors = vectors[:, : pooling.dim]
    length = vectors.square().sum(1, keepdim=True).sqrt()
    return vectors / length if pooling.normalize_after else vectors


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
# widths of several pieces, of one, and that no piece divides
@pytest.mark.parametrize(
    ("width", "dim"), [(768, 768), (768, 200), (160, 160), (96, 1), (80, 17)], ids=str
)
def test_pool(width: int, dim: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(8)
    # a mean that is not zero, and beside a block of 32 tokens one more and one less
    lengths = [1, 33, 31, 32, 70]
    hidden_TD = torch.randn(167, width, generator=generator) + torch.linspace(-2, 2, width)
    hidden_TD = hidden_TD.to(DEVICE, dtype)
    for before, after in itertools.product([False, True], repeat=2):
        pooling = Pooling(dim, before, after)
        pooled = fused.pool(hidden_TD, lengths, pooling)
        exact = exact_pool(hidden_TD, lengths, pooling)
        assert pooled.dtype == torch.float32
        assert (pooled - exact).abs().max() <= 4e-7 * max(1.0, float(exact.abs().max()))
        # alone the same bits, wherever it starts
        alone = fused.pool(hidden_TD[34:65].contiguous(), [31], pooling)
        assert torch.equal(pooled[2:3], alone)
    assert fused.pool(hidden_TD[:0], [], Pooling(dim, True, True)).shape == (0, dim)


def test_pool_of_nothing_but_zeros() -> None:
    hidden_TD = torch.zeros(3, 32, device=DEVICE)
    for module in (fused, reference):
        assert module.pool(hidden_TD, [2, 1], Pooling(16, True, True)).tolist() == [[0.0] * 16] * 2


def test_pool_at_its_edges() -> None:
    hidden_TD = torch.zeros(0, 32, device=DEVICE)
    for module in (fused, reference):
        assert module.pool(hidden_TD, [], Pooling(16, True, True)).shape == (0, 16)
        with pytest.raises(ValueError, match="33 features were asked for, hidden_TD has 32"):
            module.pool(hidden_TD, [], Pooling(33, True, True))


@triton.jit
def gelu_kernel(x_ptr, out_ptr, EXACT: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, products.gelu(tl.load(x_ptr + offsets), EXACT))


@pytest.mark.parametrize(("exact", "bound"), [(True, 6e-7), (False, 9e-7)])
def test_gelu_is_the_erf_form(exact: bool, bound: float) -> None:
    # the tanh form is 4.7e-4 away
    x = torch.linspace(-12, 12, 1 << 16, device=DEVICE)
    out = torch.full_like(x, math.nan)
    gelu_kernel[(16,)](x, out, EXACT=exact, BLOCK=4096)
    expected = 0.5 * x.double() * torch.special.erfc(-x.double() / math.sqrt(2))
    assert (out - expected).abs().max() < bound
    x = torch.tensor([0.0, 3e4, 3e38, math.nan] * 4, device=DEVICE)
    out = torch.full_like(x, math.nan)
    gelu_kernel[(1,)](x, out, EXACT=exact, BLOCK=16)
    assert out[:3].tolist() == x[:3].tolist()
    assert out[3].isnan()


def test_operator_is_opaque_and_typed() -> None:
    layer = make_layer(Case(9), torch.float32)
    torch.library.opcheck(
        torch.ops.nomoe.moe_layer,
        (*layer, False),
        test_utils=("test_schema", "test_faketensor"),
    )
    compiled = torch.compile(
        lambda x: fused.moe_layer(x, *layer[1:])[0] + 1, fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(layer.x_TD), fused.moe_layer(*layer)[0] + 1)


def test_no_gradient() -> None:
    layer = make_layer(Case(3), torch.float32)
    x_TD = layer.x_TD.requires_grad_()
    out_TD = fused.moe_layer(x_TD, *layer[1:])[0]
    with pytest.raises(RuntimeError, match="no backward pass: train with backend='torch'"):
        out_TD.sum().backward()
    router_ED = layer.router_ED.requires_grad_()
    with pytest.raises(RuntimeError, match="no backward pass"):
        fused.route(x_TD, router_ED, 2)[0].sum().backward()
    with pytest.raises(RuntimeError, match="no backward pass"):
        fused.unpermute(x_TD, None, layer.bias_D, 1).sum().backward()


def test_no_tokens() -> None:
    layer = make_layer(Case(0), torch.float32)
    out_TD, weights_TK, experts_TK = fused.moe_layer(*layer)
    assert (out_TD.shape, weights_TK.shape, experts_TK.shape) == ((0, 96), (0, 2), (0, 2))


@pytest.fixture
def no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("launched before the input was checked")

    for name in ("route", "permute", "grouped_gemm", "small_gemm", "unpermute"):
        monkeypatch.setattr(launch, name, refuse)


def change(**changes: Any) -> Callable[[Layer], Layer]:
    return lambda layer: layer._replace(
        **{name: make(getattr(layer, name)) for name, make in changes.items()}
    )


BAD_LAYERS = {
    "x_TD is .*expected": change(x_TD=lambda x: x[0]),
    "x_TD has dtype torch.float64": change(x_TD=lambda x: x.double()),
    "dtypes are": change(x_TD=lambda x: x.half()),
    "x_TD has strides": change(x_TD=lambda x: x.T.contiguous().T),
    "x_TD is 90 wide, expected a multiple of 16": change(x_TD=lambda x: x[:, :90].contiguous()),
    "router_weight_ED is": change(router_ED=lambda r: r[:, :80].contiguous()),
    "w1_EDF holds 8 experts, the router 7": change(router_ED=lambda r: r[:7]),
    "there are 65 experts": change(router_ED=lambda r: r[:1].repeat(65, 1)),
    "top_k is 9": change(top_k=lambda k: 9),
    "top_k is 0": change(top_k=lambda k: 0),
    "w1_EDF is": change(w1_EDF=lambda w: w[:, :80]),
    "w1_EDF has strides": change(w1_EDF=lambda w: w[:, :, ::2]),
    "w2_EFD is": change(w2_EFD=lambda w: w[:, :64].contiguous()),
    "bias_D is": change(bias_D=lambda b: b[:-1]),
}


@pytest.mark.usefixtures("no_launch")
@pytest.mark.parametrize("message", list(BAD_LAYERS))
def test_bad_layers_are_refused(message: str) -> None:
    layer = BAD_LAYERS[message](make_layer(Case(4), torch.float32))
    with pytest.raises(ValueError, match=message):
        fused.moe_layer(*layer)
    # the operator is public too
    with pytest.raises(ValueError, match=message):
        torch.ops.nomoe.moe_layer(*layer, False)


@pytest.mark.usefixtures("no_launch")
def test_plans_that_do_not_fit_are_refused() -> None:
    layer = make_layer(Case(4), torch.float32)
    small, pointer = PLANS["small"].down, PLANS["pointer"].up
    for plan in (Plan(pointer, small), Plan(small._replace(splits=1), pointer), Plan(small, small)):
        with pytest.raises(ValueError, match="mixes the small kernel with another, or splits"):
            fused.run_layer(*layer, tiles=plan)


def test_tiles_that_do_not_fit_are_refused() -> None:
    rows, weight = torch.ones(4, 48, device=DEVICE), torch.ones(2, 48, 16, device=DEVICE)
    ends_E = torch.tensor([2, 4], dtype=torch.int32, device=DEVICE)
    for tile in (PLANS["small"].up, PLANS["tma"].up):
        with pytest.raises(
            ValueError, match="cannot cut a product of 2 experts and inner width 48"
        ):
            fused.grouped_gemm(rows, weight, ends_E, tile=tile)
    with pytest.raises(ValueError, match=r"rows_RI is torch.float32, weight_EIO torch.float16"):
        fused.grouped_gemm(rows, weight.half(), ends_E)


def test_bad_packed_input_is_refused() -> None:
    positions_T = torch.arange(4, device=DEVICE)
    packing = fused.pack([4], positions_T, 4, 16, 10000.0, torch.float32)
    for wrong in ((5, 3, 2, 16), (4, 2, 2, 16), (4, 3, 2, 32)):
        with pytest.raises(ValueError, match="qkv_T3NH is"):
            fused.attention(torch.zeros(wrong, device=DEVICE), packing)
    words_VD, row = torch.zeros(9, 16, device=DEVICE), torch.zeros(16, device=DEVICE)
    with pytest.raises(ValueError, match=r"ids_T is \(4,\) of torch.int32"):
        fused.embed(positions_T.int(), words_VD, row, Norm(row, row, 1e-5))
    with pytest.raises(ValueError, match="hidden_TD is"):
        fused.pool(words_VD, [4, 4], Pooling(16, True, True))
    for dim in (0, 17):
        with pytest.raises(ValueError, match=f"{dim} features were asked for, hidden_TD has 16"):
            fused.pool(words_VD, [4, 5], Pooling(dim, True, True))


@pytest.mark.usefixtures("no_launch")
def test_bad_routings_are_refused() -> None:
    experts_TK = torch.tensor([[0, 3], [8, 1]], device=DEVICE)
    with pytest.raises(ValueError, match="experts_TK runs from 0 to 8, outside 0 to 7"):
        fused.permute(experts_TK, 8)
    with pytest.raises(ValueError, match="runs from -1 to 7"):
        fused.permute(experts_TK - 1, 8)
    with pytest.raises(ValueError, match=r"536870913 tokens make more than 2\^30 rows"):
        fused.permute(experts_TK[:1, :2].expand((1 << 29) + 1, 2), 8)
    with pytest.raises(ValueError, match=r"torch.int32, expected \(T, K\) of torch.int64"):
        fused.permute(experts_TK.int(), 8)
    rows, weight = torch.ones(4, 16, device=DEVICE), torch.ones(2, 16, 16, device=DEVICE)
    ends_E = torch.tensor([2, 4], dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="ends_E is"):
        fused.grouped_gemm(rows, weight, ends_E.long())
    with pytest.raises(ValueError, match="scatter_R is"):
        fused.grouped_gemm(rows, weight, ends_E, scatter_R=ends_E)
    with pytest.raises(ValueError, match="not a multiple of top_k 3"):
        fused.unpermute(rows, None, torch.ones(16, device=DEVICE), 3)


@pytest.mark.skipif(CUDA, reason="the interpreter's own limit")
def test_interpreter_refuses_bfloat16() -> None:
    with pytest.raises(ValueError, match="interpreter multiplies wrongly"):
        fused.moe_layer(*make_layer(Case(4), torch.bfloat16))
