"""Fine-tuning through SentenceTransformerTrainer: a loss around any other loss."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..balance import load_balancing_loss, router_probabilities
from .transformers import HFNomicMoEModel


class LoadBalancingLoss(nn.Module):
    """Add the router's load-balancing loss to a loss of sentence-transformers.

        loss = MatryoshkaLoss(model, MultipleNegativesRankingLoss(model), [768, 256])
        trainer = SentenceTransformerTrainer(..., loss=LoadBalancingLoss(model, loss))

    It is the mean over MoE layers, over all tokens that the other loss ran the model on.

    Args:
        model: A SentenceTransformer around nomoe's model.
        loss: The loss to add it to. One that runs the model without gradients first, as the cached
            ones do, gives the router nothing to learn from and raises.
        coefficient: Its weight; None takes `router_aux_loss_coef` of the model's config (0.1).

    Raises:
        ValueError: The model is not nomoe's.
    """

    def __init__(self, model: nn.Module, loss: nn.Module, coefficient: float | None = None) -> None:
        super().__init__()
        found = next((one for one in model.modules() if isinstance(one, HFNomicMoEModel)), None)
        if found is None:
            raise ValueError(
                f"{type(model).__name__} holds no model of nomoe's; load it with "
                "nomoe.sentence_transformer(), or call nomoe.register() first"
            )
        self.model = model
        self.loss = loss
        self.coefficient = (
            getattr(found.config, "router_aux_loss_coef", 0.1)
            if coefficient is None
            else coefficient
        )
        self.top_k = found.config.moe_top_k

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """Compute loss + coefficient * balance, a scalar.

        Raises:
            RuntimeError: The other loss ran the model without gradients.
        """
        with router_probabilities(self.model) as collected:
            loss: Tensor = self.loss(sentence_features, labels)
        layers = [torch.cat(forwards) for forwards in collected.values()]
        if torch.is_grad_enabled() and not any(layer.requires_grad for layer in layers):
            raise RuntimeError(
                f"{type(self.loss).__name__} runs the model without gradients, so the routers "
                "would learn no balance; use a loss that is not cached"
            )
        balance = torch.stack([load_balancing_loss(layer, self.top_k) for layer in layers]).mean()
        return loss + self.coefficient * balance

    def get_config_dict(self) -> dict[str, Any]:
        """What a model card says of it."""
        return {"loss": type(self.loss).__name__, "coefficient": self.coefficient}
