"""The mixture-of-experts feed-forward layer, and the one place that knows there are backends."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from nomoe_kernels import reference

from .config import NomicMoEConfig

BackendName = Literal["auto", "torch", "triton"]


class Ops(Protocol):
    """What a kernel module offers; `nomoe_kernels.reference` documents and defines each."""

    def route(
        self, x_TD: Tensor, router_weight_ED: Tensor, top_k: int, *, normalize: bool = False
    ) -> tuple[Tensor, Tensor]: ...

    def permute(self, experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]: ...

    def grouped_gemm(
        self,
        rows_RI: Tensor,
        weight_EIO: Tensor,
        ends_E: Tensor,
        *,
        gelu: bool = False,
        row_weights_R: Tensor | None = None,
    ) -> Tensor: ...

    def expert_mlp(
        self,
        rows_RD: Tensor,
        w1_EDF: Tensor,
        w2_EFD: Tensor,
        ends_E: Tensor,
        row_weights_R: Tensor,
    ) -> Tensor: ...

    def unpermute(self, rows_RD: Tensor, order_R: Tensor, bias_D: Tensor, top_k: int) -> Tensor: ...

    def add_layer_norm(
        self, x_TD: Tensor, y_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float
    ) -> Tensor: ...

    def mean_pool(self, hidden_TD: Tensor, lengths: list[int]) -> Tensor: ...


class Backend(NamedTuple):
    """The kernels a model runs on and why they were chosen."""

    name: Literal["torch", "triton"]
    reason: str

    @property
    def ops(self) -> Ops:
        """The kernel module; looked up by name, so that a model stays picklable."""
        return reference


def select_backend(
    name: BackendName, device: torch.device, *, batch_invariant: bool = False
) -> Backend:
    """Choose the kernels for a device.

    Args:
        name: "torch" runs anywhere, "triton" needs its kernels, "auto" takes the fastest that runs.
        device: Where the model will be.
        batch_invariant: Ask for results whose bits do not depend on the batch.

    Raises:
        ValueError: An unknown name.
        RuntimeError: What was asked for cannot run here; the message says why.
    """
    if name not in ("auto", "torch", "triton"):
        raise ValueError(f"backend is {name!r}, expected 'auto', 'torch' or 'triton'")
    no_triton = "this version of nomoe has no Triton kernels yet"
    if name == "triton":
        raise RuntimeError(f"backend='triton' cannot run: {no_triton}; use 'auto' or 'torch'")
    if batch_invariant:
        raise RuntimeError(
            f"batch_invariant=True needs the triton backend, and {no_triton}; the torch backend "
            "keeps a text's vector within its dtype's bounds whatever the batch"
        )
    reason = "asked for" if name == "torch" else no_triton
    return Backend("torch", reason)


class Router(nn.Module):
    """The router's weight, under the name the checkpoint gives it."""

    def __init__(self, config: NomicMoEConfig) -> None:
        super().__init__()
        self.layer = nn.Linear(config.n_embd, config.num_experts, bias=False)


class ExpertWeights(nn.Module):
    """Both matrices of all experts, stored (E * F, D) each."""

    def __init__(self, config: NomicMoEConfig) -> None:
        super().__init__()
        shape = (config.num_experts * config.ffn_width, config.n_embd)
        self.w1 = nn.Parameter(torch.empty(shape))
        self.w2 = nn.Parameter(torch.empty(shape))


class Experts(nn.Module):
    """The experts' matrices and the one bias they share."""

    def __init__(self, config: NomicMoEConfig) -> None:
        super().__init__()
        self.mlp = ExpertWeights(config)
        self.bias = nn.Parameter(torch.empty(config.n_embd))


class MoE(nn.Module):
    """out = sum_k weight_k * expert_k(x) + bias, with the top K of a softmax over all E experts."""

    def __init__(self, config: NomicMoEConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.top_k = config.moe_top_k
        self.normalize = config.moe_normalize_expert_weights
        self.router = Router(config)
        self.experts = Experts(config)

    def forward(self, normed_TD: Tensor, ops: Ops) -> tuple[Tensor, Tensor, Tensor]:
        """Apply the layer.

        Args:
            normed_TD: The preceding norm's output in float32. The router reads it unrounded, the
                experts in their weights' dtype.
            ops: The kernels.

        Returns:
            out_TD: float32, so that the residual sum that follows rounds only once.
            weights_TK: float32 router weights, best expert first.
            experts_TK: The experts they belong to.
        """
        mlp = self.experts.mlp
        # applied as x @ w1[e].T and h @ w2[e]: w1 is viewed transposed, w2 as stored
        w1_EDF = mlp.w1.unflatten(0, (self.num_experts, -1)).transpose(1, 2)
        w2_EFD = mlp.w2.unflatten(0, (self.num_experts, -1))

        weights_TK, experts_TK = ops.route(
            normed_TD, self.router.layer.weight, self.top_k, normalize=self.normalize
        )
        order_R, ends_E = ops.permute(experts_TK, self.num_experts)
        row_weights_R = weights_TK.flatten()[order_R]
        x_TD = normed_TD.to(mlp.w1.dtype)
        rows_RD = x_TD[order_R // self.top_k]
        y_RD = ops.expert_mlp(rows_RD, w1_EDF, w2_EFD, ends_E, row_weights_R)
        out_TD = ops.unpermute(y_RD, order_R, self.experts.bias, self.top_k)
        return out_TD, weights_TK, experts_TK
