"""The operations of one MoE layer in plain PyTorch: the definition of correct.

Everything here is differentiable, runs on any device and in any floating dtype. A layer is

    weights_TK, experts_TK = route(x_TD, router_weight_ED, top_k)
    order_R, ends_E = permute(experts_TK, num_experts)
    h_RF = grouped_gemm(x_TD, w1_EDF, ends_E, gelu=True, gather_R=order_R // top_k)
    y_RD = grouped_gemm(
        h_RF, w2_EFD, ends_E, row_weights_R=weights_TK.flatten(), scatter_R=order_R
    )
    out_TD = unpermute(y_RD, None, bias_D, top_k)

`moe_layer` is those lines with both products of an expert in one go (`expert_mlp`), `moe_block`
the same between the norm before it and the norm after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Norm(NamedTuple):
    """A LayerNorm."""

    weight_D: Tensor
    bias_D: Tensor
    eps: float


class MoEWeights(NamedTuple):
    """What a MoE layer holds."""

    # (E, D), without a bias
    router_ED: Tensor
    # first matrix of each expert, (E, D, F)
    w1_EDF: Tensor
    # second matrix of each expert, (E, F, D)
    w2_EFD: Tensor
    # shared by all experts, (D,)
    bias_D: Tensor
    # experts per token, K
    top_k: int
    # divide each token's K weights by their sum
    normalize: bool = False


class Pooling(NamedTuple):
    """What becomes of the mean of a text's hidden states."""

    # features to keep
    dim: int
    # make it unit norm before the others are dropped, and after
    normalize_before: bool
    normalize_after: bool


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
        weights_TK: Softmax probability (over all E) of each chosen expert, with `normalize`
            divided by their sum; float32, best first.
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
    gather_R: Tensor | None = None,
    scatter_R: Tensor | None = None,
) -> Tensor:
    """Multiply each expert's rows by that expert's matrix.

    out[scatter_R[r]] = row_weights_R[scatter_R[r]] * gelu(rows_RI[gather_R[r]] @ weight_EIO[e])
    for the rows r of expert e, ends_E[e - 1] <= r < ends_E[e].

    Args:
        rows_RI: Rows sorted by expert, (R, I); any rows where gather_R picks among them.
        weight_EIO: One (I, O) matrix per expert, any strides.
        ends_E: Where each expert's rows end, as `permute` gives it.
        gelu: Apply the exact (erf) GELU.
        row_weights_R: float32 factor of each row of the result, applied after the GELU.
        gather_R: The row of rows_RI that each sorted row is, int64; r itself by default.
        scatter_R: The row of the result each sorted row goes to, int64; r itself by default.

    Returns:
        (R, O), in the dtype of the rows.
    """
    if gather_R is not None:
        rows_RI = rows_RI[gather_R]
    products = []
    start = 0
    for expert, end in enumerate(ends_E.tolist()):
        product = rows_RI[start:end] @ weight_EIO[expert]
        products.append(F.gelu(product) if gelu else product)
        start = end
    out_RO = torch.cat(products)
    if scatter_R is not None:
        out_RO = torch.empty_like(out_RO).index_copy(0, scatter_R, out_RO)
    if row_weights_R is not None:
        out_RO = (out_RO.float() * row_weights_R[:, None]).to(out_RO.dtype)
    return out_RO


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


def unpermute(rows_RD: Tensor, order_R: Tensor | None, bias_D: Tensor, top_k: int) -> Tensor:
    """Sum each token's K rows in float32, best expert first, and add the shared bias once.

    Args:
        rows_RD: Weighted rows of the experts, (R, D), any floating dtype.
        order_R: The order the rows are in, as `permute` gives it; None where they are back in
            token order, row t * K + k.
        bias_D: The bias all experts share, (D,).
        top_k: Rows per token, K.

    Returns:
        (T, D), float32.
    """
    if order_R is not None:
        position_R = torch.empty_like(order_R)
        position_R[order_R] = torch.arange(len(order_R), device=order_R.device)
        rows_RD = rows_RD[position_R]
    rows_TKD: Tensor = rows_RD.unflatten(0, (-1, top_k))
    return rows_TKD.float().sum(dim=1) + bias_D.float()


def moe_layer(
    x_TD: Tensor,
    router_weight_ED: Tensor,
    w1_EDF: Tensor,
    w2_EFD: Tensor,
    bias_D: Tensor,
    top_k: int,
    *,
    normalize: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The whole layer: out = sum_k weight_k * (gelu(x @ w1[e_k]) @ w2[e_k]) + bias.

    Args:
        x_TD: Tokens, (T, D), in the dtype of the weights or in float32. The router reads them as
            they are, the experts in the dtype of the weights.
        router_weight_ED: Router weight, (E, D).
        w1_EDF: First matrix of each expert, (E, D, F).
        w2_EFD: Second matrix of each expert, (E, F, D).
        bias_D: The bias all experts share, (D,).
        top_k: Experts per token, K.
        normalize: Divide each token's K weights by their sum.

    Returns:
        out_TD: float32, so that the residual sum that follows rounds only once.
        weights_TK, experts_TK: As `route` returns them.
    """
    weights_TK, experts_TK = route(x_TD, router_weight_ED, top_k, normalize=normalize)
    order_R, ends_E = permute(experts_TK, len(w1_EDF))
    rows_RD = x_TD.to(w1_EDF.dtype)[order_R // top_k]
    y_RD = expert_mlp(rows_RD, w1_EDF, w2_EFD, ends_E, weights_TK.flatten()[order_R])
    return unpermute(y_RD, order_R, bias_D, top_k), weights_TK, experts_TK


def add_norm_route(
    x_TD: Tensor,
    y_TD: Tensor,
    norm: Norm,
    router_weight_ED: Tensor,
    top_k: int,
    *,
    normalize: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm(x + y), and `route` on that before it is rounded.

    Returns:
        normed_TD: LayerNorm(x + y), in the dtype of x.
        weights_TK, experts_TK: As `route` returns them.
    """
    normed_TD = _add_layer_norm(x_TD, y_TD, norm)
    weights_TK, experts_TK = route(normed_TD, router_weight_ED, top_k, normalize=normalize)
    return normed_TD.to(x_TD.dtype), weights_TK, experts_TK


def unpermute_add_norm(
    rows_RD: Tensor,
    order_R: Tensor | None,
    bias_D: Tensor,
    top_k: int,
    residual_TD: Tensor,
    norm: Norm,
) -> Tensor:
    """`unpermute`, then LayerNorm of its sum with the residual, (T, D) in the residual's dtype."""
    return add_layer_norm(residual_TD, unpermute(rows_RD, order_R, bias_D, top_k), norm)


def moe_block(
    x_TD: Tensor, y_TD: Tensor, norm: Norm, moe: MoEWeights, next_norm: Norm
) -> tuple[Tensor, Tensor, Tensor]:
    """A MoE layer between its norms: z = norm(x + y), next_norm(z + moe(z)).

    Args:
        x_TD: The layer's input, (T, D).
        y_TD: What attention made of it, (T, D).
        norm: The norm before the experts. The router reads its result unrounded.
        moe: The layer's weights.
        next_norm: The norm after them.

    Returns:
        out_TD: In the dtype of x.
        weights_TK, experts_TK: As `route` returns them.
    """
    z_TD, weights_TK, experts_TK = add_norm_route(
        x_TD, y_TD, norm, moe.router_ED, moe.top_k, normalize=moe.normalize
    )
    order_R, ends_E = permute(experts_TK, len(moe.w1_EDF))
    y_RD = expert_mlp(
        z_TD[order_R // moe.top_k], moe.w1_EDF, moe.w2_EFD, ends_E, weights_TK.flatten()[order_R]
    )
    out_TD = unpermute_add_norm(y_RD, order_R, moe.bias_D, moe.top_k, z_TD, next_norm)
    return out_TD, weights_TK, experts_TK


def add_layer_norm(x_TD: Tensor, y_TD: Tensor, norm: Norm) -> Tensor:
    """LayerNorm(x + y), computed in float32, (T, D) in the dtype of x."""
    return _add_layer_norm(x_TD, y_TD, norm).to(x_TD.dtype)


def _add_layer_norm(x_TD: Tensor, y_TD: Tensor, norm: Norm) -> Tensor:
    sum_TD = x_TD.float() + y_TD.float()
    weight_D, bias_D = norm.weight_D.float(), norm.bias_D.float()
    return F.layer_norm(sum_TD, weight_D.shape, weight_D, bias_D, norm.eps)


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, *, gelu: bool = False) -> Tensor:
    """Return x @ weight.T + bias, (T, O), with the exact (erf) GELU where asked."""
    out_TO = F.linear(x_TI, weight_OI, bias_O)
    return F.gelu(out_TO) if gelu else out_TO


class Packing(NamedTuple):
    """How the T tokens of a packed batch divide into texts, and where each token stands."""

    # first token, token after the last, and length of neighbouring texts of equal length
    groups: list[tuple[int, int, int]]
    # cosine and sine of each token's rotary angles, (T, 1, 1, H / 2), float32
    cos: Tensor
    sin: Tensor


def rotary_angles(positions_T: Tensor, head_width: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position * base^(-2i / H), i < H / 2, each (T, H / 2) in float32.

    The angles are computed in float64: in float32 those of late tokens would be off by 1e-4. Where
    a device has no float64 the host computes them.
    """
    device = positions_T.device
    home = torch.device("cpu") if device.type == "mps" else device
    exponents = torch.arange(0, head_width, 2, device=home).double()
    angles = positions_T.to(home).double()[:, None] * base ** (-exponents / head_width)
    return angles.cos().float().to(device), angles.sin().float().to(device)


def pack(
    lengths: Sequence[int],
    positions_T: Tensor,
    span: int,
    head_width: int,
    rotary_base: float,
    dtype: torch.dtype,
) -> Packing:
    """Prepare what `attention` needs, the same in every layer of a forward.

    Args:
        lengths: Tokens of each text, at least 1 each, T together.
        positions_T: The place of each token in its text, from 0, integer, on the model's device.
        span: A number that no position reaches, known without asking the device.
        head_width: Width of a head, H.
        rotary_base: Base of the rotary frequencies.
        dtype: Of the tokens.
    """
    groups = []
    start = 0
    # neighbours of equal length share one call
    for length, run in groupby(lengths):
        end = start + length * sum(1 for _ in run)
        groups.append((start, end, length))
        start = end
    cos, sin = rotary_angles(positions_T, head_width, rotary_base)
    return Packing(groups, cos[:, None, None], sin[:, None, None])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary embedding over the whole head, in halves: (a cos - b sin, b cos + a sin).

    Computed in float32 and rounded once, into a result of the dtype of x, (T, ..., H).
    """
    a, b = x.chunk(2, dim=-1)
    rotated = torch.empty_like(x)
    rotated[..., : a.shape[-1]] = a * cos - b * sin
    rotated[..., a.shape[-1] :] = b * cos + a * sin
    return rotated


def attention(qkv_T3NH: Tensor, packing: Packing) -> Tensor:
    """Self-attention within each text, every token to every token, with rotary embedding.

    softmax(rotate(q) @ rotate(k).T / sqrt(H)) @ v

    Args:
        qkv_T3NH: Queries, keys and values of every head, (T, 3, N, H).
        packing: What `pack` returned.

    Returns:
        (T, N * H), heads side by side.
    """
    q_TNH, k_TNH = rotate(qkv_T3NH[:, :2], packing.cos, packing.sin).unbind(dim=1)
    v_TNH = qkv_T3NH[:, 2]
    parts = []
    for start, end, length in packing.groups:
        q_BNLH, k_BNLH, v_BNLH = (
            t_TNH[start:end].unflatten(0, (-1, length)).transpose(1, 2)
            for t_TNH in (q_TNH, k_TNH, v_TNH)
        )
        out_BNLH = F.scaled_dot_product_attention(q_BNLH, k_BNLH, v_BNLH)
        parts.append(out_BNLH.transpose(1, 2).flatten(0, 1).flatten(1))
    return torch.cat(parts) if parts else v_TNH.flatten(1)


def embed(ids_T: Tensor, words_VD: Tensor, type_D: Tensor, norm: Norm) -> Tensor:
    """LayerNorm(words[id] + type), (T, D), computed in float32, in the dtype of the words."""
    return add_layer_norm(F.embedding(ids_T, words_VD), type_D, norm)


def pool(hidden_TD: Tensor, lengths: Sequence[int], pooling: Pooling) -> Tensor:
    """Mean over each text's tokens, normalised and cut as asked, (B, dim) in float32.

    Each text is reduced on its own, so its vector does not depend on its batch.
    """
    if pooling.dim > hidden_TD.shape[1]:
        raise ValueError(
            f"{pooling.dim} features were asked for, hidden_TD has {hidden_TD.shape[1]}"
        )
    if not lengths:
        return hidden_TD.new_empty(0, pooling.dim, dtype=torch.float32)
    vectors = torch.stack([part.float().mean(dim=0) for part in hidden_TD.split(list(lengths))])
    if pooling.normalize_before:
        vectors = F.normalize(vectors, dim=1)
    vectors = vectors[:, : pooling.dim]
    return F.normalize(vectors, dim=1) if pooling.normalize_after else vectors
