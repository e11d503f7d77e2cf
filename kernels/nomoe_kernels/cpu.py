"""What a model asks of `nomoe_kernels.reference`, for inference on a CPU: same names and results.

Products run in oneDNN or MKL on matrices laid out for it in advance, see `matrices`. Nothing here
has a gradient, and an operation may overwrite the activations it is given.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .matrices import Matrix, WideMatrix, fewest_rows, in_mkl, pack_weight, widens
from .reference import MoEWeights, Norm, Packing, embed, pack, pool, route

__all__ = [
    "add_layer_norm",
    "attention",
    "embed",
    "linear",
    "moe_block",
    "pack",
    "pack_weight",
    "pool",
    "round_up",
    "rows_wanted",
    "supports",
    "widens",
]

# rows of one expert that go through both of its products before the next ones do
_ROWS_AT_ONCE = 512


def supports(dtype: torch.dtype) -> bool:
    """Whether this torch and this CPU multiply packed matrices of a dtype at speed."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def linear(
    x_TI: Tensor, weight_OI: Matrix | WideMatrix, bias_O: Tensor | None, *, gelu: bool = False
) -> Tensor:
    """As `reference.linear`, with a packed matrix; x is in its dtype or in float32."""
    return weight_OI.for_rows(len(x_TI)).linear(x_TI, bias_O, gelu=gelu)


def add_layer_norm(x_TD: Tensor, y_TD: Tensor, norm: Norm) -> Tensor:
    """As `reference.add_layer_norm`; may overwrite y."""
    return _add_layer_norm(x_TD, y_TD, norm).to(x_TD.dtype)


def _add_layer_norm(x_TD: Tensor, y_TD: Tensor, norm: Norm) -> Tensor:
    sum_TD = y_TD.float().add_(x_TD)
    weight_D, bias_D = norm.weight_D.float(), norm.bias_D.float()
    return F.layer_norm(sum_TD, weight_D.shape, weight_D, bias_D, norm.eps)


def attention(qkv_T3NH: Tensor, packing: Packing) -> Tensor:
    """As `reference.attention`; may overwrite qkv.

    In float32 whatever the dtype: for 16 bits the attention of torch takes 1.4 times as long.
    """
    qkv = qkv_T3NH.float()
    _rotate_(qkv[:, :2], packing.cos, packing.sin)
    parts = []
    for start, end, length in packing.groups:
        # texts and heads first, then tokens
        q, k, v = qkv[start:end].unflatten(0, (-1, length)).permute(2, 0, 3, 1, 4)
        out_BNLH = F.scaled_dot_product_attention(q, k, v)
        parts.append(out_BNLH.transpose(1, 2).reshape(end - start, -1))
    out_TD = parts[0] if len(parts) == 1 else torch.cat([*parts, qkv[:0, 2].flatten(1)])
    return out_TD.to(qkv_T3NH.dtype)


def _rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """As `reference.rotate`, in place."""
    a, b = x.chunk(2, dim=-1)
    a_sin = a * sin
    a.mul_(cos).addcmul_(b, sin, value=-1)
    b.mul_(cos).add_(a_sin)


def round_up(rows: int, sizes: int = 32) -> int:
    """Round a number of rows up to one of so many in an octave; up to twice that it stays.

    oneDNN compiles a product for every number it meets, which takes a millisecond and about 0.6 MB
    (as much for small matrices as for large), and keeps the last 1,024. Batches of long texts run
    1.5 % more rows than they have with 16 sizes, 0.8 % with 32, 0.4 % with 64.

    Args:
        rows: How many there are.
        sizes: How many an octave has, a power of two.
    """
    step = 1 << max(0, rows.bit_length() - sizes.bit_length())
    return -(-rows // step) * step


def rows_wanted(rows: int, dtype: torch.dtype, sizes: int = 32) -> int:
    """How many rows a product of so many should have: `round_up`, or as many where MKL runs it."""
    return rows if in_mkl(dtype) or widens(rows, dtype) else round_up(rows, sizes)


def moe_block(
    x_TD: Tensor, y_TD: Tensor, norm: Norm, moe: MoEWeights, next_norm: Norm
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.moe_block`; may overwrite y.

    w1_EDF and w2_EFD of the weights are sequences of packed matrices, (F, D) and (D, F), one of
    each for an expert; x is in their dtype or in float32.
    """
    w1_E: Any = moe.w1_EDF
    w2_E: Any = moe.w2_EFD
    normed_TD = _add_layer_norm(x_TD, y_TD, norm)
    weights_TK, experts_TK = route(normed_TD, moe.router_ED, moe.top_k, normalize=moe.normalize)
    z_TD = normed_TD.to(x_TD.dtype)
    T, K = len(z_TD), moe.top_k
    R = T * K

    experts_R = experts_TK.flatten()
    order_R = experts_R.argsort(stable=True)
    counts = experts_R.bincount(minlength=len(moe.w1_EDF)).tolist()
    fewest = fewest_rows()
    # a few rows more for the last expert to round up into
    more = max(fewest - 1, min(R, _ROWS_AT_ONCE) // 16) if R else 0
    rows_RD = z_TD[F.pad(order_R // K, (0, more))]
    # one expert at a time, some rows at a time: the (rows, F) between its products stays in the
    # cache, and oneDNN meets few numbers of rows
    products = []
    starts = accumulate(counts[:-1], initial=0)
    for start, count, w1_FD, w2_DF in zip(starts, counts, w1_E, w2_E, strict=True):
        up_FD, down_DF = w1_FD.for_rows(count), w2_DF.for_rows(count)
        for done in range(0, count, _ROWS_AT_ONCE):
            some = min(count - done, _ROWS_AT_ONCE)
            first = start + done
            wanted = max(fewest, rows_wanted(some, w1_FD.packed.dtype, 16))
            rows = rows_RD[first : first + wanted]
            products.append(linear(linear(rows, up_FD, None, gelu=True), down_DF, None)[:some])
    # one row more for the bias, which every token adds to its own; float32 makes all float32
    products_RD = torch.cat([*products, moe.bias_D.float()[None]])

    # where the rows of each token are now, best expert first, and the bias
    position_R = torch.empty_like(order_R)
    position_R[order_R] = torch.arange(R, device=order_R.device)
    terms = F.pad(position_R.view(T, K), (0, 1), value=R)
    factors = F.pad(weights_TK, (0, 1), value=1.0)
    sum_TD = F.embedding_bag(terms, products_RD, mode="sum", per_sample_weights=factors)
    return add_layer_norm(z_TD, sum_TD, next_norm), weights_TK, experts_TK
