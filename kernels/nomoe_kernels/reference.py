"""The operations of one MoE layer in plain PyTorch: the definition of correct.

Everything here is differentiable, runs on any device and in any floating dtype. A layer is

    weights_TK, experts_TK = route(x_TD, router_weight_ED, top_k)
    order_R, ends_E = permute(experts_TK, num_experts)
    h_RF = grouped_gemm(x_TD[order_R // K], w1_EDF, ends_E, gelu=True)
    y_RD = grouped_gemm(h_RF, w2_EFD, ends_E, row_weights_R=weights_TK.flatten()[order_R])
    # or both at once: expert_mlp(x_TD[order_R // K], w1_EDF, w2_EFD, ends_E, row_weights_R)
    out_TD = unpermute(y_RD, order_R, bias_D, top_k)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def route(
    x_TD: Tensor, router_weight_ED: Tensor, top_k: int, *, normalize: bool = False
) -> tuple[Tensor, Tensor]:
    """Choose the experts of every token.

    Args:
        x_TD: Tokens, (T, D), any floating dtype; float32 where they are at hand unrounded, which
            spares float16 and bfloat16 some wrong choices near ties.
        router_weight_ED: Router weight, (E, D). There is no bias.
        top_k: Experts per token, K.
        normalize: Divide each token's K weights by their sum.

    Returns:
        weights_TK: Softmax probability (over all E) of each chosen expert, float32, best first.
        experts_TK: Its index, int64. Of equal probabilities the lower index comes first.
    """
    # autocast would round both operands again
    with torch.autocast(x_TD.device.type, enabled=False):
        logits_TE = F.linear(x_TD.float(), router_weight_ED.float())
    probabilities_TE = logits_TE.softmax(dim=-1)
    # a stable sort settles ties by index; topk leaves their order open
    sorted_TE, experts_TE = probabilities_TE.sort(dim=-1, descending=True, stable=True)
    weights_TK, experts_TK = sorted_TE[:, :top_k], experts_TE[:, :top_k]
    if normalize:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    return weights_TK, experts_TK


def permute(experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Order the T * K routed rows by expert.

    Returns:
        order_R: order_R[r] = t * K + k, sorted by expert, stable; int64.
        ends_E: ends_E[e] = number of rows of experts 0..e (cumsum of the counts); int32.
    """
    experts_R = experts_TK.flatten()
    order_R = experts_R.argsort(stable=True)
    counts_E = torch.bincount(experts_R, minlength=num_experts)
    return order_R, counts_E.cumsum(0).to(torch.int32)


def grouped_gemm(
    rows_RI: Tensor,
    weight_EIO: Tensor,
    ends_E: Tensor,
    *,
    gelu: bool = False,
    row_weights_R: Tensor | None = None,
) -> Tensor:
    """Multiply each expert's contiguous rows by that expert's matrix.

    Args:
        rows_RI: Rows sorted by expert, (R, I).
        weight_EIO: One (I, O) matrix per expert, any strides.
        ends_E: Where each expert's rows end, as `permute` gives it.
        gelu: Apply the exact (erf) GELU.
        row_weights_R: float32 factor of each row, applied after the GELU.

    Returns:
        (R, O), in the dtype of the rows; float32 if row weights are given, so that the sum that
        follows rounds only once.
    """
    products = []
    start = 0
    for expert, end in enumerate(ends_E.tolist()):
        product = rows_RI[start:end] @ weight_EIO[expert]
        products.append(F.gelu(product) if gelu else product)
        start = end
    out_RO = torch.cat(products)
    return out_RO if row_weights_R is None else out_RO.float() * row_weights_R[:, None]


def expert_mlp(
    rows_RD: Tensor, w1_EDF: Tensor, w2_EFD: Tensor, ends_E: Tensor, row_weights_R: Tensor
) -> Tensor:
    """Both products of every expert: `grouped_gemm` with the GELU, then with the row weights.

    One expert at a time, so that the (R, F) between them is never whole: on a CPU the page faults
    of that buffer alone cost several percent of the layer.

    Returns:
        (R, D), float32.
    """
    products = []
    start = 0
    for end, w1_DF, w2_FD in zip(ends_E.tolist(), w1_EDF, w2_EFD, strict=True):
        products.append(F.gelu(rows_RD[start:end] @ w1_DF) @ w2_FD)
        start = end
    return torch.cat(products).float() * row_weights_R[:, None]


def unpermute(rows_RD: Tensor, order_R: Tensor, bias_D: Tensor, top_k: int) -> Tensor:
    """Sum each token's K rows in float32, best expert first, and add the shared bias once.

    Returns:
        (T, D), float32.
    """
    position_R = torch.empty_like(order_R)
    position_R[order_R] = torch.arange(len(order_R), device=order_R.device)
    rows_TKD: Tensor = rows_RD[position_R].unflatten(0, (-1, top_k))
    return rows_TKD.float().sum(dim=1) + bias_D.float()


def add_layer_norm(
    x_TD: Tensor, y_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float
) -> Tensor:
    """LayerNorm(x + y), (T, D), computed and returned in float32: the router wants it unrounded."""
    sum_TD = x_TD.float() + y_TD.float()
    return F.layer_norm(sum_TD, weight_D.shape, weight_D.float(), bias_D.float(), eps)


def mean_pool(hidden_TD: Tensor, lengths: list[int]) -> Tensor:
    """Mean over each text's tokens, (B, D) in float32.

    Each text is reduced on its own, so its mean does not depend on its batch.
    """
    return torch.stack([part.float().mean(dim=0) for part in hidden_TD.split(lengths)])
