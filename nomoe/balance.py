"""The load-balancing loss: what keeps training from sending all tokens to the same experts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .model import NomicMoEModel
from .moe import MoE, router_input


@contextmanager
def router_probabilities(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Within it, collect what the routers of a model make of every token.

    Forwards on a CPU run on the parameters meanwhile, not on matrices packed for inference.

    Args:
        model: A `NomicMoEModel`, or any module that holds one.

    Yields:
        By name of the MoE layer, the softmax over all experts of each forward, (T, E) float32, with
        gradients where there are any.
    """
    collected: dict[str, list[Tensor]] = {}

    def hook_of(name: str) -> Any:
        def hook(moe: MoE, inputs: tuple[Any, ...]) -> None:
            logits_TE = F.linear(router_input(inputs), moe.router.layer.weight.float())
            collected.setdefault(name, []).append(logits_TE.softmax(dim=-1))

        return hook

    # on packed matrices a batch gets rows of no token
    packing = [
        part for part in model.modules() if isinstance(part, NomicMoEModel) and part.packs_matrices
    ]
    handles = [
        part.register_forward_pre_hook(hook_of(name))
        for name, part in model.named_modules()
        if isinstance(part, MoE)
    ]
    try:
        for part in packing:
            part.packs_matrices = False
        yield collected
    finally:
        for part in packing:
            part.packs_matrices = True
        for handle in handles:
            handle.remove()


def load_balancing_loss(probabilities_TE: Tensor, top_k: int) -> Tensor:
    """Tell how unevenly a MoE layer spreads its tokens: E / K * sum_e(share_e * probability_e).

    `share_e` is the share of the T tokens sent to expert e, `probability_e` the mean of its router
    probability; only the second has a gradient. It is 1 where all experts are used alike and E / K
    where the same K take everything. Equation 4 of the Switch Transformer (arXiv:2101.03961), over
    the top K as megablocks has it, which the published model was trained with.

    Args:
        probabilities_TE: Softmax over all experts, (T, E).
        top_k: Experts per token.

    Returns:
        A scalar; 0 where there are no tokens.
    """
    if not len(probabilities_TE):
        return probabilities_TE.sum()
    experts = probabilities_TE.shape[1]
    chosen_TK = probabilities_TE.detach().topk(top_k, dim=-1).indices
    counts_E = torch.bincount(chosen_TK.flatten(), minlength=experts)
    share_E = counts_E.to(probabilities_TE.dtype) / len(probabilities_TE)
    return experts / top_k * (share_E * probabilities_TE.mean(dim=0)).sum()
