"""`NomicMoEModel.forward_packed` as one operator, `torch.ops.nomoe.forward_packed`.

torch.compile takes an operator as it is and traces nothing inside, so a whole function that calls
the model compiles with fullgraph=True. An operator takes tensors and numbers only: the model goes
by a number.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Protocol

import torch
from torch import Tensor


class PackedModel(Protocol):
    """What the operator runs."""

    def forward_flat(
        self, ids_T: Tensor, lengths: Tensor, hidden_states: bool, routing: bool
    ) -> list[Tensor]:
        """All tensors of `forward_packed` in a row; no two share memory."""
        ...


# numbers are never used twice, so that one kept by compiled code cannot come to mean another model
_numbers = itertools.count()
_models: weakref.WeakValueDictionary[int, PackedModel] = weakref.WeakValueDictionary()


def register(model: PackedModel) -> int:
    """Give a model a number of its own, for as long as it lives."""
    number = next(_numbers)
    _models[number] = model
    return number


@torch.library.custom_op("nomoe::forward_packed", mutates_args=())
def forward_packed(
    ids_T: Tensor,
    lengths: Tensor,
    like_D: Tensor,
    trained: Tensor | None,
    model: int,
    hidden_states: int,
    routings: int,
    top_k: int,
) -> list[Tensor]:
    """Run a registered model.

    Args:
        ids_T: As `NomicMoEModel.forward_packed`.
        lengths: As there, an integer CPU tensor.
        like_D: A tensor of the model's width, dtype and device.
        trained: A parameter that wants a gradient, which raises in the backward pass.
        model: The number `register` gave.
        hidden_states: How many to return: the last alone, or all.
        routings: MoE layers of which to return weights and experts, all or none.
        top_k: Experts per token.

    Returns:
        Hidden states, then router weights, then router experts.

    Raises:
        RuntimeError: The model is gone.
    """
    found = _models.get(model)
    if found is None:
        raise RuntimeError("the model that this code was compiled for no longer exists")
    with torch.no_grad():
        return found.forward_flat(ids_T, lengths, hidden_states > 1, routings > 0)


@forward_packed.register_fake
def _(
    ids_T: Tensor,
    lengths: Tensor,
    like_D: Tensor,
    trained: Tensor | None,
    model: int,
    hidden_states: int,
    routings: int,
    top_k: int,
) -> list[Tensor]:
    T = ids_T.shape[0]
    return [
        *(like_D.new_empty(T, like_D.shape[0]) for _ in range(hidden_states)),
        *(like_D.new_empty(T, top_k, dtype=torch.float32) for _ in range(routings)),
        *(like_D.new_empty(T, top_k, dtype=torch.int64) for _ in range(routings)),
    ]


def _no_backward(ctx: object, *gradients: object) -> None:
    raise RuntimeError(
        "nomoe's Triton kernels have no backward pass: train with backend='torch', "
        "or run inference under torch.no_grad()"
    )


forward_packed.register_autograd(_no_backward)
