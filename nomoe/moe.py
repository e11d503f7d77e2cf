"""The layers with large matrices: Linear, and the mixture-of-experts feed-forward layer."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from nomoe_kernels import cpu, reference
from nomoe_kernels.reference import MoEWeights, Norm

from .backends import Ops
from .config import NomicMoEConfig
from .packable import Packable, Stack


class Router(nn.Module):
    """The router's weight, under the name the checkpoint gives it."""

    def __init__(self, config: NomicMoEConfig) -> None:
        super().__init__()
        self.layer = nn.Linear(config.n_embd, config.num_experts, bias=False)


class ExpertWeights(Packable):
    """Both matrices of all experts, stored (E * F, D) each."""

    def __init__(self, config: NomicMoEConfig) -> None:
        super().__init__()
        shape = (config.num_experts * config.ffn_width, config.n_embd)
        self.w1 = nn.Parameter(torch.empty(shape))
        self.w2 = nn.Parameter(torch.empty(shape))
        # applied as x @ w1[e].T and h @ w2[e]
        experts = config.num_experts
        self.stacks = {"w1": Stack(experts), "w2": Stack(experts, transposed=True)}


class Experts(nn.Module):
    """The experts' matrices and the one bias they share."""

    def __init__(self, config: NomicMoEConfig) -> None:
        super().__init__()
        self.mlp = ExpertWeights(config)
        self.bias = nn.Parameter(torch.empty(config.n_embd))


class Linear(nn.Linear, Packable):
    """x @ weight.T + bias by the kernels, with the exact (erf) GELU where asked."""

    stacks = MappingProxyType({"weight": Stack()})

    def forward(  # type: ignore[override]
        self, x_TI: Tensor, ops: Ops, *, gelu: bool = False
    ) -> Tensor:
        """Apply the layer, (T, O)."""
        weight_OI: Any
        if ops is cpu:
            packed, plain = self.snapshot()
            if packed is None:
                ops, weight_OI = reference, plain["weight"]
                x_TI = x_TI.to(weight_OI.dtype)
            else:
                [weight_OI] = packed["weight"]
        else:
            weight_OI = self.parameters_now()["weight"]
        return ops.linear(x_TI, weight_OI, self.bias, gelu=gelu)


class LayerNorm(nn.LayerNorm):
    """A LayerNorm whose parameters the kernels take; it is never called itself."""

    @property
    def parts(self) -> Norm:
        """Weight, bias and eps."""
        return Norm(self.weight, self.bias, self.eps)


class MoE(nn.Module):
    """out = sum_k weight_k * expert_k(x) + bias, with the top K of a softmax over all E experts."""

    def __init__(self, config: NomicMoEConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.top_k = config.moe_top_k
        self.normalize = config.moe_normalize_expert_weights
        self.router = Router(config)
        self.experts = Experts(config)

    def forward(
        self, x_TD: Tensor, y_TD: Tensor, norm: LayerNorm, next_norm: LayerNorm, ops: Ops
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Apply the layer between its norms: z = norm(x + y), next_norm(z + moe(z)).

        Args:
            x_TD: The layer's input.
            y_TD: What attention made of it.
            norm: The norm before the experts.
            next_norm: The norm after them.
            ops: The kernels.

        Returns:
            out_TD: In the dtype of x.
            weights_TK: float32 router weights, best expert first.
            experts_TK: The experts they belong to.
        """
        mlp = self.experts.mlp
        w1: Any
        w2: Any
        if ops is cpu:
            packed, plain = mlp.snapshot()
            if packed is None:
                ops = reference
                x_TD, y_TD = x_TD.to(plain["w1"].dtype), y_TD.to(plain["w1"].dtype)
        else:
            packed, plain = None, mlp.parameters_now()
        if packed is not None:
            w1, w2 = packed["w1"], packed["w2"]
        else:
            w1, w2 = plain["w1"], plain["w2"]
            # applied as x @ w1[e].T and h @ w2[e]: w1 is viewed transposed, w2 as stored
            w1 = w1.unflatten(0, (self.num_experts, -1)).transpose(1, 2)
            w2 = w2.unflatten(0, (self.num_experts, -1))
        weights = MoEWeights(
            self.router.layer.weight, w1, w2, self.experts.bias, self.top_k, self.normalize
        )
        return ops.moe_block(x_TD, y_TD, norm.parts, weights, next_norm.parts)


def router_input(inputs: tuple[Any, ...]) -> Tensor:
    """What the router reads, (T, D), from the inputs of `MoE.forward` that a hook is given."""
    x_TD, y_TD, norm = inputs[:3]
    return reference.add_layer_norm(x_TD.float(), y_TD, norm.parts)


class Followed:
    """The kernels of one MoE layer in plain torch, on experts that another model chose.

    Args:
        experts_TK: They.
    """

    def __init__(self, experts_TK: Tensor) -> None:
        self._experts_TK = experts_TK

    def moe_block(
        self, x_TD: Tensor, y_TD: Tensor, norm: Norm, moe: MoEWeights, next_norm: Norm
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `reference.moe_block`, with this model's own weights of those experts."""
        z_TD = reference.add_layer_norm(x_TD, y_TD, norm)
        every_TE, experts_TE = reference.route(z_TD, moe.router_ED, len(moe.w1_EDF))
        probabilities_TE = torch.zeros_like(every_TE).scatter(1, experts_TE, every_TE)
        weights_TK = probabilities_TE.gather(1, self._experts_TK)
        if moe.normalize:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        order_R, ends_E = reference.permute(self._experts_TK, len(moe.w1_EDF))
        rows_RD = reference.expert_mlp(
            z_TD[order_R // moe.top_k],
            moe.w1_EDF,
            moe.w2_EFD,
            ends_E,
            weights_TK.flatten()[order_R],
        )
        out_TD = reference.unpermute_add_norm(
            rows_RD, order_R, moe.bias_D, moe.top_k, z_TD, next_norm
        )
        return out_TD, weights_TK, self._experts_TK
