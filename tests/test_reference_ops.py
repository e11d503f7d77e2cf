"""The plain-torch operations of a MoE layer: invariants, then values against literal loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nomoe_kernels import reference
from nomoe_kernels.reference import Pooling


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"), [(0, 8, 2), (1, 8, 2), (37, 4, 1), (256, 64, 3), (15, 8, 8)]
)
def test_routing_invariants(tokens: int, experts: int, top_k: int) -> None:
    torch.manual_seed(tokens)
    x_TD, weight_ED = torch.randn(tokens, 96), torch.randn(experts, 96) / math.sqrt(96)
    weights_TK, experts_TK = reference.route(x_TD, weight_ED, top_k)
    exact_TE = (x_TD.double() @ weight_ED.double().T).softmax(-1)

    assert weights_TK.dtype == torch.float32
    assert weights_TK.shape == experts_TK.shape == (tokens, top_k)
    torch.testing.assert_close(
        weights_TK.double(), exact_TE.gather(1, experts_TK), atol=1e-6, rtol=0
    )
    assert (weights_TK.diff(dim=1) <= 0).all(), "best first"
    for row in experts_TK.tolist():
        assert len(set(row)) == top_k, "an expert is chosen once"

    order_R, ends_E = reference.permute(experts_TK, experts)
    assert sorted(order_R.tolist()) == list(range(tokens * top_k))
    assert ends_E.dtype == torch.int32
    assert ends_E.shape == (experts,)
    sorted_R = experts_TK.flatten()[order_R].tolist()
    assert sorted_R == sorted(sorted_R), "rows of an expert are contiguous"
    expected = [sum(one <= e for one in sorted_R) for e in range(experts)]
    assert ends_E.tolist() == expected
    for a, b, first, second in zip(
        sorted_R, sorted_R[1:], order_R.tolist(), order_R.tolist()[1:], strict=False
    ):
        assert a != b or first < second, "stable"


def test_ties_go_to_the_lower_expert() -> None:
    weights_TK, experts_TK = reference.route(torch.ones(5, 4), torch.zeros(64, 4), 3)
    assert experts_TK.tolist() == [[0, 1, 2]] * 5
    assert torch.equal(weights_TK, torch.full((5, 3), 1 / 64))


def test_weights_are_renormalised_only_where_asked() -> None:
    torch.manual_seed(0)
    x_TD, weight_ED = torch.randn(50, 16), torch.randn(8, 16) / 4
    plain, experts = reference.route(x_TD, weight_ED, 2)
    normal, same = reference.route(x_TD, weight_ED, 2, normalize=True)
    assert torch.equal(experts, same)
    assert (plain.sum(1) < 0.999).all()
    torch.testing.assert_close(normal.sum(1), torch.ones(50))
    torch.testing.assert_close(normal[:, 0] / normal[:, 1], plain[:, 0] / plain[:, 1])


def layer_by_hand(
    x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, w1: Tensor, w2: Tensor, bias_D: Tensor
) -> Tensor:
    """One MoE layer, token by token and expert by expert, in float64; w1 and w2 are (E, F, D)."""
    rows = []
    for x, weights, experts in zip(
        x_TD.double(), weights_TK.double(), experts_TK.tolist(), strict=True
    ):
        out = bias_D.double().clone()
        for weight, e in zip(weights, experts, strict=True):
            h = w1[e].double() @ x
            h = 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
            out += weight * (h @ w2[e].double())
        rows.append(out)
    return torch.stack(rows) if rows else torch.empty_like(x_TD, dtype=torch.float64)


CHOICES = {
    "spread": lambda tokens: torch.stack([torch.randperm(8)[:2] for _ in range(tokens)]),
    "one pair": lambda tokens: torch.tensor([[5, 2]]).repeat(tokens, 1),
    "empty experts": lambda tokens: torch.stack([torch.randperm(3)[:2] + 4 for _ in range(tokens)]),
}


@pytest.mark.parametrize("choice", list(CHOICES))
@pytest.mark.parametrize("tokens", [1, 16, 37])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 2e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)]
)
def test_layer_against_loops(choice: str, tokens: int, dtype: torch.dtype, bound: float) -> None:
    torch.manual_seed(1)
    D, F, E, K = 96, 192, 8, 2
    x_TD = torch.randn(tokens, D).to(dtype)
    w1, w2 = (torch.randn(E, F, D) / math.sqrt(width) for width in (D, F))
    w1, w2, bias_D = w1.to(dtype), w2.to(dtype), torch.randn(D).to(dtype)
    experts_TK, weights_TK = CHOICES[choice](tokens), torch.rand(tokens, K)

    order_R, ends_E = reference.permute(experts_TK, E)
    h_RF = reference.grouped_gemm(x_TD[order_R // K], w1.transpose(1, 2), ends_E, gelu=True)
    y_RD = reference.grouped_gemm(h_RF, w2, ends_E, row_weights_R=weights_TK.flatten()[order_R])
    out_TD = reference.unpermute(y_RD, order_R, bias_D, K)

    assert h_RF.dtype == dtype
    assert out_TD.dtype == torch.float32
    expected = layer_by_hand(x_TD, weights_TK, experts_TK, w1, w2, bias_D)
    error = (out_TD.double() - expected).abs().max() / expected.abs().max()
    assert error < bound

    # both products at once: the same sums, so within rounding of the same numbers
    joint_RD = reference.expert_mlp(
        x_TD[order_R // K], w1.transpose(1, 2), w2, ends_E, weights_TK.flatten()[order_R]
    )
    assert joint_RD.dtype == torch.float32
    out_TD = reference.unpermute(joint_RD, order_R, bias_D, K)
    assert (out_TD.double() - expected).abs().max() / expected.abs().max() < bound


def test_no_tokens() -> None:
    experts_TK = torch.empty(0, 2, dtype=torch.int64)
    order_R, ends_E = reference.permute(experts_TK, 8)
    rows = reference.grouped_gemm(torch.empty(0, 4), torch.randn(8, 4, 6), ends_E, gelu=True)
    assert rows.shape == (0, 6)
    assert reference.unpermute(rows, order_R, torch.zeros(6), 2).shape == (0, 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_add_layer_norm(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    # a large common offset: the variance of one pass in 16 bits would be noise
    x_TD, y_TD = (torch.randn(7, 96) + 30).to(dtype), torch.randn(7, 96).to(dtype)
    weight_D, bias_D = torch.randn(96).to(dtype), torch.randn(96).to(dtype)
    total = x_TD.double() + y_TD.double()
    deviation = total - total.mean(-1, keepdim=True)
    normed = deviation / torch.sqrt((deviation**2).mean(-1, keepdim=True) + 1e-5)
    expected = normed * weight_D.double() + bias_D.double()
    result = reference.add_layer_norm(x_TD, y_TD, reference.Norm(weight_D, bias_D, 1e-5))
    assert result.dtype == dtype
    ulp = torch.finfo(dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(result.double(), expected, atol=max(1e-4, ulp / 2), rtol=0)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("after", [False, True])
def test_pool_is_in_float32_and_per_text(before: bool, after: bool) -> None:
    torch.manual_seed(3)
    hidden_TD = torch.randn(700, 32).half()
    lengths = [1, 512, 187]
    pooling = Pooling(20, before, after)
    pooled = reference.pool(hidden_TD, lengths, pooling)
    start = 0
    for row, length in zip(pooled, lengths, strict=True):
        expected = hidden_TD[start : start + length].double().mean(0)
        if before:
            expected /= expected.square().sum().sqrt()
        expected = expected[:20]
        if after:
            expected /= expected.square().sum().sqrt()
        torch.testing.assert_close(row.double(), expected, atol=1e-6, rtol=0)
        alone = reference.pool(hidden_TD[start : start + length], [length], pooling)
        assert torch.equal(row, alone[0])
        start += length
