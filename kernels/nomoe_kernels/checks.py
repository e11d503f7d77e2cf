"""What the kernels take: every argument is checked here, before anything is launched.

A check that fails raises ValueError with what was found and what was expected.
"""

from __future__ import annotations

import re

import torch
import triton
from torch import Tensor

from .reference import Norm

MAX_EXPERTS = 64
MAX_TOP_K = 8
# int32 numbers them, and has to number what the last program has room for
MAX_ROWS = 1 << 30
# blocks of keys and values of wider heads may not fit a device's shared memory
MAX_HEAD_WIDTH = 64

RELEASE = tuple(map(int, re.findall(r"\d+", triton.__version__)[:3]))
# since then Triton writes fences between what cp.async brought and a product that reads it
FENCES_COPIES = (3, 7, 1)
INTERPRETED = bool(triton.knobs.runtime.interpret)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def device(name: str, tensor: Tensor) -> None:
    """Check that the kernels run where a tensor is."""
    if not (tensor.is_cuda or (INTERPRETED and tensor.device.type == "cpu")):
        raise ValueError(
            f"{name} is on {tensor.device}; the Triton kernels run on CUDA, or on a CPU under "
            "TRITON_INTERPRET=1"
        )


def tensor(
    name: str,
    tensor: Tensor,
    shape: tuple[int | None, ...] | torch.Size,
    *,
    like: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Check shape (None: any size), dtype, device and that it is contiguous."""
    expected = tuple("any" if size is None else size for size in shape)
    if tensor.dim() != len(shape) or any(
        size not in (None, actual) for size, actual in zip(shape, tensor.shape, strict=True)
    ):
        raise ValueError(f"{name} is {tuple(tensor.shape)}, expected {expected}")
    if tensor.dtype not in DTYPES or (dtype is not None and tensor.dtype != dtype):
        wanted = dtype or "float32, float16 or bfloat16"
        raise ValueError(f"{name} has dtype {tensor.dtype}, expected {wanted}")
    device(name, tensor)
    if INTERPRETED and tensor.dtype == torch.bfloat16:
        raise ValueError(f"{name} is bfloat16, which Triton's interpreter multiplies wrongly")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, the rest on {like.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}, expected a contiguous tensor")
    if tuple(shape) == (None, None) and (tensor.shape[1] % 16 or not tensor.shape[1]):
        raise ValueError(f"{name} is {tensor.shape[1]} wide, expected a multiple of 16")


def norm(name: str, norm: Norm, like: Tensor) -> None:
    """Check a LayerNorm of tokens like these."""
    for part in ("weight_D", "bias_D"):
        tensor(f"{name}.{part}", getattr(norm, part), like.shape[-1:], like=like)


def counts(experts: int, top_k: int) -> None:
    """Check the numbers of experts and of choices."""
    if not 1 <= experts <= MAX_EXPERTS:
        raise ValueError(f"there are {experts} experts, the kernels take 1 to {MAX_EXPERTS}")
    most = min(MAX_TOP_K, experts)
    if not 1 <= top_k <= most:
        raise ValueError(f"top_k is {top_k}, the kernels take 1 to {most} of {experts} experts")


def router(router_weight_ED: Tensor, x_TD: Tensor, top_k: int) -> int:
    """Check a router; return its number of experts."""
    experts = router_weight_ED.shape[0] if router_weight_ED.dim() else 0
    tensor("router_weight_ED", router_weight_ED, (experts, x_TD.shape[1]), like=x_TD)
    counts(experts, top_k)
    rows(len(x_TD), top_k)
    return experts


def rows(tokens: int, top_k: int) -> None:
    """Check the number of rows."""
    if tokens * top_k > MAX_ROWS:
        raise ValueError(f"{tokens} tokens make more than 2^30 rows; split them")


def integers(name: str, tensor: Tensor, length: int, dtype: torch.dtype, like: Tensor) -> None:
    """Check a vector of indices or counts."""
    if tensor.shape != (length,) or tensor.dtype != dtype or not tensor.is_contiguous():
        raise ValueError(
            f"{name} is {tuple(tensor.shape)} of {tensor.dtype} with strides {tensor.stride()}, "
            f"expected a contiguous ({length},) of {dtype}"
        )
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, the rest on {like.device}")


def weight(name: str, weight: Tensor, like: Tensor, inner: int) -> tuple[int, int, int]:
    """Check an (E, I, O) weight whose experts are packed and whose I or O is contiguous."""
    if weight.dim() != 3 or weight.shape[1] != inner:
        raise ValueError(f"{name} is {tuple(weight.shape)}, expected (experts, {inner}, any)")
    experts, _, outer = weight.shape
    layouts = {(inner * outer, outer, 1), (inner * outer, 1, inner)}
    if weight.stride() not in layouts:
        raise ValueError(
            f"{name} has strides {weight.stride()}, expected packed matrices: one of {layouts}"
        )
    tensor(name, weight.flatten() if weight.stride(2) == 1 else weight.transpose(1, 2).flatten(),
           (weight.numel(),), like=like)  # fmt: skip
    counts(experts, 1)
    if outer % 16:
        raise ValueError(f"{name} makes {outer} columns, expected a multiple of 16")
    return experts, inner, outer


def layer(
    x_TD: Tensor,
    router_weight_ED: Tensor,
    w1_EDF: Tensor,
    w2_EFD: Tensor,
    bias_D: Tensor,
    top_k: int,
) -> None:
    """Raise ValueError for what `moe_layer` does not take, before anything is launched."""
    tensor("x_TD", x_TD, (None, None))
    E = router(router_weight_ED, x_TD, top_k)
    experts, D, F = weight("w1_EDF", w1_EDF, x_TD, x_TD.shape[1])
    if experts != E:
        raise ValueError(f"w1_EDF holds {experts} experts, the router {E}")
    down = weight("w2_EFD", w2_EFD, x_TD, F)
    if down != (E, F, D):
        raise ValueError(f"w2_EFD is {down}, expected {(E, F, D)}")
    if w1_EDF.dtype != w2_EFD.dtype or x_TD.dtype not in (torch.float32, w1_EDF.dtype):
        raise ValueError(
            f"dtypes are x_TD {x_TD.dtype}, w1_EDF {w1_EDF.dtype} and w2_EFD {w2_EFD.dtype}; "
            "both weights must have one dtype, and x that one or float32"
        )
    tensor("bias_D", bias_D, (D,), like=x_TD)
