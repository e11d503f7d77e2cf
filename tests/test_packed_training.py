"""Training, and functions of the weights, with inference on packed matrices in between."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel

from nomoe import NomicMoEModel
from nomoe.moe import Linear, MoE
from tests.test_cpu_ops import DTYPES, embed, packed

pytestmark = pytest.mark.skipif(not DTYPES, reason="torch has no oneDNN here")


@pytest.fixture
def model(packed_model: NomicMoEModel) -> NomicMoEModel:
    return packed_model


def loss_of(run: Callable[..., Any]) -> Tensor:
    return run(torch.arange(4, 34)[None])[0].pow(3).sum()  # type: ignore[no-any-return]


def test_training_after_inference(model: NomicMoEModel) -> None:
    """An optimizer made while the matrices are packed holds the parameters that are trained."""
    before = embed(model)
    optimizer = torch.optim.SGD(nn.Sequential(model).parameters(), lr=0.1)
    model.train()
    assert not packed(model)
    loss = model.forward_packed(torch.arange(4, 34), [20, 10])[0].square().mean()
    loss.backward()
    for part in model.modules():
        if isinstance(part, Linear):
            assert part.weight.grad.abs().sum() > 0
        elif isinstance(part, MoE):
            assert part.experts.mlp.w2.grad.abs().sum() > 0
    optimizer.step()
    optimizer.zero_grad()
    after = embed(model.eval())
    assert not packed(model)
    assert (after - before).abs().max() > 1e-4
    del optimizer, loss
    torch.testing.assert_close(embed(model), after, atol=1e-5, rtol=0)
    assert packed(model)


@pytest.mark.parametrize("before_backward", [True, False])
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_inference_before_an_optimizers_step(
    kind: type[torch.optim.Optimizer],
    options: dict[str, bool],
    before_backward: bool,
    model: NomicMoEModel,
) -> None:
    """The step finds the parameters' numbers, though the model was never told to train."""
    assert not model.training
    optimizer = kind(model.parameters(), **options)  # type: ignore[call-arg]
    before = {name: one.clone() for name, one in model.state_dict().items()}
    again = copy.deepcopy(model)
    ids_T = torch.arange(4, 34)
    loss = model.forward_packed(ids_T, [20, 10])[0].square().mean()
    if before_backward:
        embed(model)
    loss.backward()
    if not before_backward:
        embed(model)
    again.forward_packed(ids_T, [20, 10])[0].square().mean().backward()
    optimizer.step()
    kind(again.parameters(), **options).step()  # type: ignore[call-arg]
    for (name, one), other in zip(model.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
        torch.testing.assert_close(one, other)
        if one.grad is not None and one.grad.any():
            assert not one.equal(before[name]), name
    optimizer.zero_grad()
    after = embed(model)
    del optimizer, loss, one
    torch.testing.assert_close(embed(model), after, atol=1e-5, rtol=0)
    assert packed(model)


@pytest.mark.parametrize("kind", [nn.Parameter, Tensor.clone])
@pytest.mark.parametrize("is_packed", [True, False])
def test_weights_that_stand_in_for_one_call(
    is_packed: bool,
    kind: Callable[[Tensor], Tensor],
    model: NomicMoEModel,
    checkpoint: dict[str, Tensor],
) -> None:
    """They are used, and are left as they are, and so are the model's own."""
    before = embed(model)
    others = {name: kind(0.5 * one.detach()) for name, one in model.named_parameters()}
    fresh = NomicMoEModel(model.config).eval()
    fresh.load_state_dict(others)
    if is_packed:
        embed(model)
    else:
        model.train().eval()
    ids_BL = torch.arange(4, 34)[None]
    with torch.no_grad():
        ours = functional_call(model, others, (ids_BL,))[0]
        torch.testing.assert_close(ours, fresh(ids_BL)[0], atol=1e-5, rtol=0)
    for name, one in others.items():
        assert one.equal(0.5 * checkpoint[name])
    assert torch.equal(embed(model), before)
    assert packed(model)
    assert all(one.equal(checkpoint[name]) for name, one in model.named_parameters())


@pytest.mark.parametrize("ask", [dict, lambda named: {name: one.detach() for name, one in named}])
def test_gradients_of_a_function_of_the_weights(
    ask: Callable[[Any], dict[str, Tensor]], model: NomicMoEModel
) -> None:
    ids_BL = torch.arange(4, 34)[None]
    before = embed(model)
    again = copy.deepcopy(model)
    again(ids_BL)[0].square().mean().backward()
    parameters = ask(model.named_parameters())
    embed(model)

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return functional_call(model, weights, (ids_BL,))[0].square().mean()

    gradients = torch.func.grad(loss)(parameters)
    for name, one in again.named_parameters():
        torch.testing.assert_close(
            gradients[name], torch.zeros(()) if one.grad is None else one.grad
        )
    # they have a graph of their own
    torch.testing.assert_close(embed(model), before, atol=1e-5, rtol=0)
    del gradients, parameters
    assert torch.equal(embed(model), before)
    assert packed(model)


@pytest.mark.parametrize("by_layer", [False, True])
def test_inference_before_a_compiled_models_step(by_layer: bool, model: NomicMoEModel) -> None:
    """Whose backward reads the parameters themselves."""
    again = copy.deepcopy(model)
    loss_of(again).backward()
    compiled: Callable[..., Any] = model
    torch.compiler.reset()
    if by_layer:
        for layer in model.encoder.layers:
            layer.compile(backend="aot_eager")
    else:
        compiled = torch.compile(model, backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loss = loss_of(compiled)
    embed(model)
    loss.backward()
    embed(model)
    optimizer.step()
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one.grad, other.grad)


def test_another_thread_trained_before(model: NomicMoEModel) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: loss_of(model).backward()).result()
    model.zero_grad()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loss_of(model).backward()
    embed(model)
    optimizer.step()
    assert all(one.isfinite().all() for one in model.parameters())


@pytest.mark.parametrize("kind", ["distance", "square", "norm"])
@pytest.mark.parametrize("compiled", [False, True])
def test_inference_before_a_penalty(kind: str, compiled: bool, model: NomicMoEModel) -> None:
    """Over parameters kept from before, as L2-SP and EWC have it; some keep them for backward."""
    again = copy.deepcopy(model)
    torch.compiler.reset()

    def penalty(kept: list[Tensor], starts: list[Tensor]) -> Tensor:
        pairs = zip(kept, starts, strict=True)
        if kind == "distance":
            return sum((one - start).square().sum() for one, start in pairs)  # type: ignore[return-value]
        if kind == "square":
            return sum((one * one * start).sum() for one, start in pairs)  # type: ignore[return-value]
        return sum(one.norm() for one in kept)  # type: ignore[return-value]

    run = torch.compile(penalty, backend="aot_eager") if compiled else penalty
    for one, embeds in ((model, True), (again, False)):
        kept = list(one.parameters())
        starts = [0.5 * part.detach() for part in kept]
        if embeds:
            embed(one)
        first = run(kept, starts)
        if embeds:
            embed(one)
        loss = first + loss_of(one)
        if embeds:
            embed(one)
        loss = loss + run(kept, starts)
        if embeds:
            embed(one)
        loss.backward()
        if embeds:
            embed(one)
        torch.optim.SGD(kept, lr=0.01).step()
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["embeddings", "layers.0.attn", "layers.3.attn.out_proj"])
def test_gradients_of_what_a_hook_adds_to_a_frozen_model(name: str, model: NomicMoEModel) -> None:
    """As adapters that live outside it do."""
    model.requires_grad_(False)
    plain = copy.deepcopy(model)
    plain.packs_matrices = False  # type: ignore[misc]
    gradients = []
    for one in (model, plain):
        added = torch.zeros(96, requires_grad=True)
        part = one.embeddings if name == "embeddings" else one.encoder.get_submodule(name)
        part.register_forward_hook(lambda part, inputs, out, added=added: out + added)
        embed(one)
        loss_of(one).backward()
        gradients.append(added.grad)
    assert gradients[0].any()
    torch.testing.assert_close(gradients[0], gradients[1])


def test_inference_before_an_average(model: NomicMoEModel, checkpoint: dict[str, Tensor]) -> None:
    """By torch's `AveragedModel`, or by hand over lists kept from before."""
    averaged = AveragedModel(model, avg_fn=lambda mean, one, count: 0.5 * mean + 0.5 * one)
    kept, mine = list(model.parameters()), list(copy.deepcopy(model).parameters())
    averaged.update_parameters(model)
    with torch.no_grad():
        for one in model.parameters():
            one.mul_(3)
    embed(model)
    embed(averaged.module)
    averaged.update_parameters(model)
    embed(model)
    for own, one in zip(mine, kept, strict=True):
        own.data.lerp_(one.data, 0.5)
    for own, (name, other) in zip(mine, averaged.module.named_parameters(), strict=True):
        torch.testing.assert_close(own.data, 2 * checkpoint[name])
        torch.testing.assert_close(other.data, 2 * checkpoint[name])


def test_an_optimizer_is_copied_with_numbers(model: NomicMoEModel) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    embed(model)
    [group] = copy.deepcopy(optimizer).param_groups
    for one, other in zip(group["params"], model.parameters(), strict=True):
        assert type(one) is nn.Parameter
        assert one.equal(other)


def test_a_forward_that_needs_gradients_unpacks(model: NomicMoEModel) -> None:
    output = model.forward_packed(torch.arange(4, 34), [20, 10])[0]
    assert output.requires_grad
    assert not packed(model)
    torch.testing.assert_close(output, embed(model), atol=1e-5, rtol=0)
    assert not packed(model)
    del output
    embed(model)
    assert packed(model)
    frozen = model.requires_grad_(False)
    assert not frozen.forward_packed(torch.arange(4, 34), [20, 10])[0].requires_grad
    assert packed(model)


def test_parameters_asked_for_in_inference_mode_still_train(model: NomicMoEModel) -> None:
    with torch.inference_mode():
        embed(model)
        assert not any(one.isnan().any() for one in model.parameters())
    model.train().forward_packed(torch.arange(4, 34), [20, 10])[0].sum().backward()
