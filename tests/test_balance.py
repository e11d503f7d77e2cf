"""The load-balancing loss against its definition, written out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nomoe import NomicMoEModel
from nomoe.balance import load_balancing_loss, router_probabilities
from tests.oracle import encode


def written_out(probabilities: torch.Tensor, top_k: int) -> float:
    tokens, experts = probabilities.shape
    total = 0.0
    for expert in range(experts):
        sent = sum(expert in row.argsort(descending=True)[:top_k] for row in probabilities)
        total += int(sent) / tokens * float(probabilities[:, expert].mean())
    return total * experts / top_k


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_definition(top_k: int) -> None:
    torch.manual_seed(0)
    probabilities = (3 * torch.randn(37, 8)).softmax(dim=-1).requires_grad_()
    loss = load_balancing_loss(probabilities, top_k)
    assert loss.item() == pytest.approx(written_out(probabilities.detach(), top_k), rel=1e-5)
    loss.backward()
    # the gradient is each expert's share of the tokens, spread over them
    chosen = probabilities.topk(top_k, dim=-1).indices.flatten()
    share = torch.bincount(chosen, minlength=8) / 37
    torch.testing.assert_close(probabilities.grad, (8 / top_k * share / 37).expand(37, 8))


def test_ends_of_its_range() -> None:
    even = torch.full((8, 8), 1e-3).fill_diagonal_(1 - 7e-3)
    assert float(load_balancing_loss(even, 1)) == pytest.approx(1)
    same = torch.tensor([[0.5, 0.5, 0, 0, 0, 0, 0, 0]]).expand(9, 8)
    assert float(load_balancing_loss(same, 2)) == pytest.approx(4)
    assert float(load_balancing_loss(same[:0], 2)) == 0


@pytest.mark.usefixtures("library")
def test_probabilities_are_the_oracles(tiny_folder: Path) -> None:
    model = NomicMoEModel.from_pretrained(tiny_folder, device="cpu")
    ids = [0, 17, 900, 1234, 5, 2]
    for grad in (False, True):
        with router_probabilities(model) as collected, torch.set_grad_enabled(grad):
            model(torch.tensor([ids, ids[::-1]]))
            model(torch.tensor([ids]))
        expected = encode(model.config, model.state_dict(), ids).probabilities
        assert len(collected) == len(expected) == 6
        for forwards, probabilities in zip(collected.values(), expected, strict=True):
            assert [tuple(one.shape) for one in forwards] == [(12, 8), (6, 8)]
            for one in (forwards[0][:6], forwards[1]):
                torch.testing.assert_close(one.double(), probabilities, atol=1e-5, rtol=0)
                assert one.requires_grad is grad
    # where matrices are packed, so many tokens would come with rows of none
    with router_probabilities(model) as more, torch.no_grad():
        model.forward_packed(torch.arange(129), [129])
    assert {one.shape for [one] in more.values()} == {(129, 8)}
    model(torch.tensor([ids]))
    # nothing is collected after its end
    assert len(next(iter(collected.values()))) == 2
