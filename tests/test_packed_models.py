"""Models whose matrices are packed for a CPU: their weights, training, threads, and outputs."""

from __future__ import annotations

import copy
import io
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.utils import parametrize, prune
from torch.optim.swa_utils import AveragedModel

from nomoe import NomicMoEModel, data
from nomoe.model import NomicMoEOutput
from nomoe.moe import Linear, MoE
from nomoe.packable import LAYING_OUT
from nomoe_kernels import cpu, matrices
from tests.conftest import LIBRARIES
from tests.test_cpu_ops import DTYPES, embed, packed

ROOT = Path(__file__).parent.parent
NAME = "encoder.layers.0.attn.Wqkv.weight"
pytestmark = pytest.mark.skipif(not DTYPES, reason="torch has no oneDNN here")


@pytest.fixture
def model(library: str) -> NomicMoEModel:
    """The golden data's tiny model, its matrices packed."""
    model = NomicMoEModel.from_pretrained(data.TINY, device="cpu")
    embed(model)
    assert packed(model)
    return model


@pytest.fixture(scope="module")
def checkpoint() -> dict[str, Tensor]:
    return NomicMoEModel.from_pretrained(data.TINY, device="cpu").state_dict()


def same(state: dict[str, Tensor], checkpoint: dict[str, Tensor]) -> bool:
    assert list(state) == list(checkpoint)
    return all(torch.equal(state[name], one) for name, one in checkpoint.items())


def test_state_dict_is_the_checkpoints(model: NomicMoEModel, checkpoint: dict[str, Tensor]) -> None:
    assert same(model.state_dict(), checkpoint)
    embed(model)
    assert same({**model.state_dict(keep_vars=True)}, checkpoint)
    assert isinstance(model.state_dict(keep_vars=True)["emb_ln.weight"], nn.Parameter)


def test_a_parameter_asked_for_by_name_has_its_numbers(
    model: NomicMoEModel, checkpoint: dict[str, Tensor]
) -> None:
    for name in ("encoder.layers.1.mlp.experts.mlp.w1", "encoder.layers.0.attn.Wqkv.weight"):
        embed(model)
        assert torch.equal(model.get_parameter(name), checkpoint[name])
    assert torch.equal(model.get_parameter("emb_ln.weight"), checkpoint["emb_ln.weight"])
    with pytest.raises(AttributeError):
        model.get_parameter("encoder.layers.0.attn.nothing")


def test_originals_are_freed(model: NomicMoEModel) -> None:
    weight = model.encoder.layers[1].mlp.experts.mlp._parameters["w1"]
    assert weight.shape == (8 * 192, 96)
    assert weight.dtype == torch.float32
    assert weight.requires_grad
    assert weight.is_leaf
    assert weight.grad is None
    assert isinstance(weight, nn.Parameter)
    assert packed(model)
    with torch._C.DisableTorchFunctionSubclass():
        assert weight.untyped_storage().nbytes() == 4
        assert weight.isnan().all()
        with pytest.raises(RuntimeError, match="single memory location"):
            weight.data.mul_(2)


@pytest.mark.parametrize(
    "ask",
    [
        lambda model: dict(model.named_parameters()),
        lambda model: model.train().state_dict(),
        lambda model: copy.deepcopy(model).state_dict(),
        lambda model: pickle.loads(pickle.dumps(model)).state_dict(),
        lambda model: model.to(torch.float64).float().state_dict(),
        lambda model: nn.Sequential(model).eval().to("cpu")[0].state_dict(),
    ],
    ids=["parameters", "train", "deepcopy", "pickle", "to", "to of a parent"],
)
def test_whoever_asks_gets_the_weights(
    ask: Callable[[NomicMoEModel], dict[str, Tensor]],
    model: NomicMoEModel,
    checkpoint: dict[str, Tensor],
) -> None:
    before = embed(model)
    assert same(ask(model), checkpoint)
    assert torch.equal(embed(model.eval()), before)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies_keep_which_parameter_is_which(
    again: Callable[[Any], Any], model: NomicMoEModel
) -> None:
    """An optimizer's, that is copied with it."""
    embed(model)
    copied, parameters = again((model, list(model.parameters())))
    assert set(map(id, copied.parameters())) == set(map(id, parameters))


def test_a_pruned_layer_runs_on_what_is_left() -> None:
    model = NomicMoEModel.from_pretrained(data.TINY, device="cpu")
    plain = copy.deepcopy(model)
    mask = torch.rand(plain.encoder.layers[0].attn.Wqkv.weight.shape) < 0.5
    with torch.no_grad():
        plain.encoder.layers[0].attn.Wqkv.weight.mul_(mask)
    prune.custom_from_mask(model.encoder.layers[0].attn.Wqkv, "weight", mask)
    assert torch.allclose(embed(model), embed(plain), atol=1e-5, rtol=0)
    names = dict(model.named_parameters())
    assert "encoder.layers.0.attn.Wqkv.weight_orig" in names
    assert not names["encoder.layers.0.attn.Wqkv.weight_orig"].isnan().any()


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("removed", [False, True])
@pytest.mark.parametrize("kind", ["prune", "parametrize"])
def test_a_layer_changed_while_it_is_packed(
    kind: str, removed: bool, model: NomicMoEModel, checkpoint: dict[str, Tensor]
) -> None:
    """The change is computed from its weight's numbers, and so is what it runs on."""
    layer = model.encoder.layers[0].attn.Wqkv
    expected = 2 * checkpoint[NAME]
    if kind == "prune":
        prune.l1_unstructured(layer, "weight", 0.5)
        small = checkpoint[NAME].abs() <= checkpoint[NAME].abs().median()
        expected = checkpoint[NAME].masked_fill(small, 0)
    else:
        parametrize.register_parametrization(layer, "weight", Doubled())
    fresh = NomicMoEModel(model.config).eval()
    fresh.load_state_dict(checkpoint | {NAME: expected})
    torch.testing.assert_close(embed(model), embed(fresh), atol=1e-5, rtol=0)
    if removed and kind == "prune":
        prune.remove(layer, "weight")
    elif removed:
        parametrize.remove_parametrizations(layer, "weight")
    torch.testing.assert_close(embed(model), embed(fresh), atol=1e-5, rtol=0)
    assert layer.weight.equal(expected)


def test_asking_for_the_first_parameter_unpacks_nothing(model: NomicMoEModel) -> None:
    assert next(model.parameters()).device.type == "cpu"
    assert packed(model)


def test_new_weights_count(model: NomicMoEModel, checkpoint: dict[str, Tensor]) -> None:
    """However they come in; expected is a model that never was packed."""
    other = {name: 0.5 * tensor for name, tensor in checkpoint.items()}
    fresh = NomicMoEModel(model.config).eval()
    fresh.load_state_dict(other)
    expected = embed(fresh)
    assert not torch.equal(embed(model), expected)
    for assign in (False, True):
        again = copy.deepcopy(model)
        embed(again)
        again.load_state_dict(other, assign=assign)
        assert torch.equal(embed(again), expected)
    for name, tensor in other.items():
        model.get_parameter(name).data = tensor.clone()
    assert torch.equal(embed(model), expected)
    for one in (model, fresh):
        nn.init.zeros_(one.encoder.layers[0].attn.Wqkv.weight)
    assert torch.equal(embed(model), embed(fresh))
    nn.init.normal_(model.train().encoder.layers[0].attn.Wqkv.weight)


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
    assert packed(model)
    assert (after - before).abs().max() > 1e-4


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
        # the graph reads them
        assert not packed(model)
    loss.backward()
    if not before_backward:
        embed(model)
        assert packed(model)
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
    assert packed(model)
    torch.testing.assert_close(after, embed(copy.deepcopy(model)), atol=1e-5, rtol=0)


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
    assert same(model.state_dict(), checkpoint)


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
    del gradients
    assert torch.equal(embed(model), before)
    assert packed(model)


def test_weights_put_in_past_the_module(
    model: NomicMoEModel, checkpoint: dict[str, Tensor]
) -> None:
    """As sharding does, which wants the old ones gone."""
    layer = model.encoder.layers[0].attn.Wqkv
    model.train().eval()
    old = weakref.ref(layer.weight)
    layer._parameters["weight"] = nn.Parameter(2 * layer.weight.detach())
    assert old() is None
    fresh = NomicMoEModel(model.config).eval()
    fresh.load_state_dict(checkpoint | {NAME: 2 * checkpoint[NAME]})
    assert torch.equal(embed(model), embed(fresh))
    assert packed(model)
    assert layer.weight.equal(2 * checkpoint[NAME])


def loss_of(run: Callable[..., Any]) -> Tensor:
    return run(torch.arange(4, 34)[None])[0].pow(3).sum()  # type: ignore[no-any-return]


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


def test_modules_may_share_a_parameter(checkpoint: dict[str, Tensor], model: NomicMoEModel) -> None:
    """Of one model or two, before and while it is packed."""
    fresh = NomicMoEModel(model.config).eval()
    other = NAME.replace("0", "1")
    fresh.load_state_dict({**checkpoint, other: checkpoint[NAME]})
    expected, before = embed(fresh), embed(model)
    second = copy.deepcopy(model)
    nn.init.zeros_(second.encoder.layers[0].attn.Wqkv.weight)
    embed(second)
    weight = model.encoder.layers[0].attn.Wqkv.weight
    second.encoder.layers[0].attn.Wqkv.weight = weight
    for one in (second, model, second):
        torch.testing.assert_close(embed(one), before, atol=1e-5, rtol=0)
    model.encoder.layers[1].attn.Wqkv.weight = weight
    for _ in range(2):
        torch.testing.assert_close(embed(model), expected, atol=1e-5, rtol=0)
    fresh.encoder.layers[0].attn.Wqkv = copy.copy(fresh.encoder.layers[0].attn.Wqkv)
    torch.testing.assert_close(embed(fresh), expected, atol=1e-5, rtol=0)


def test_a_parameter_outlives_its_module(
    checkpoint: dict[str, Tensor], model: NomicMoEModel
) -> None:
    before = embed(model)
    fresh = NomicMoEModel(model.config).eval()
    fresh.load_state_dict(checkpoint)
    kept = list(fresh.parameters())
    embed(fresh)
    layer = weakref.ref(fresh.encoder.layers[0].attn.Wqkv)
    model.encoder.layers[0].attn.Wqkv.weight = layer()._parameters["weight"]  # type: ignore[union-attr]
    del fresh
    assert layer() is None
    assert torch.equal(embed(model), before)
    for one, other in zip(kept, checkpoint.values(), strict=True):
        assert one.equal(other)


def test_what_is_replaced_is_freed(model: NomicMoEModel, checkpoint: dict[str, Tensor]) -> None:
    old = weakref.ref(model.encoder.layers[0].attn.Wqkv.packed["weight"][0].packed)  # type: ignore[index]
    model.load_state_dict(checkpoint, assign=True)
    assert old() is None


def test_a_weight_computed_from_a_packed_one(
    model: NomicMoEModel, checkpoint: dict[str, Tensor]
) -> None:
    weight = model.encoder.layers[0].attn.Wqkv.weight
    weight.data = 2 * weight.data
    fresh = NomicMoEModel(model.config).eval()
    fresh.load_state_dict(checkpoint | {NAME: 2 * checkpoint[NAME]})
    torch.testing.assert_close(embed(model), embed(fresh), atol=1e-5, rtol=0)


USES: dict[str, Callable[[Tensor], Tensor]] = {
    "detach": lambda one: one.detach(),
    "data": lambda one: one.data,
    "numpy": lambda one: torch.from_numpy(one.detach().numpy()),
    "a list": lambda one: torch.cat([one]),
    "a keyword": lambda one: torch.add(input=one, other=0),
    "in place of another": lambda one: torch.zeros_like(one, requires_grad=False).copy_(one),
    "foreach": lambda one: torch._foreach_mul([one], 1)[0],
    "vector": lambda one: nn.utils.parameters_to_vector([one]).view_as(one),
    "deepcopy": copy.deepcopy,
    "pickle": lambda one: pickle.loads(pickle.dumps(one)),
    "save": lambda one: saved(one),
    "text": lambda one: one if "nan" not in repr(one) else one * torch.nan,
    "a view": lambda one: one.view(-1).view_as(one),
    "another of its type": lambda one: type(one)(one.detach()),
}


def saved(one: Tensor) -> Tensor:
    buffer = io.BytesIO()
    torch.save([one], buffer)
    buffer.seek(0)
    [again] = torch.load(buffer)
    return again  # type: ignore[no-any-return]


@pytest.mark.parametrize("use", USES.values(), ids=list(USES))
def test_whoever_uses_a_parameter_gets_its_numbers(
    use: Callable[[Tensor], Tensor], model: NomicMoEModel, checkpoint: dict[str, Tensor]
) -> None:
    """Kept from before, taken from a layer, or from a module around the model."""
    around = nn.Sequential(model)
    layer = model.encoder.layers[0].attn.Wqkv
    kept = list(model.parameters())
    for ask in (
        lambda: next(one for one in kept if one is layer._parameters["weight"]),
        lambda: layer.weight,
        lambda: dict(layer.named_parameters())["weight"],
        lambda: dict(around.named_parameters())["0." + NAME],
    ):
        before = embed(model)
        assert packed(model)
        with torch.no_grad():
            used = use(ask())
        assert used.equal(checkpoint[NAME])
        assert type(used) in (Tensor, nn.Parameter)
        assert layer.packed is None
        del used
        assert torch.equal(embed(model), before)


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
def test_a_layers_attribute_is_open(model: NomicMoEModel, checkpoint: dict[str, Tensor]) -> None:
    """To what looks at no function of torch's."""
    for ask in (
        lambda: model.encoder.layers[0].attn.Wqkv.weight,
        lambda: model.get_parameter(NAME),
        lambda: dict(model.named_parameters())[NAME],
    ):
        for use in (
            torch.tensor,
            nn.Parameter,
            lambda one: nn.Embedding.from_pretrained(one).weight,
            lambda one: torch.func.grad(lambda weight: weight.square().sum() / 2)(one),
        ):
            embed(model)
            assert packed(model)
            assert use(ask()).equal(checkpoint[NAME])  # type: ignore[operator]


def test_nothing_around_spoils_the_numbers(model: NomicMoEModel) -> None:
    before = embed(model)
    weight = model.encoder.layers[0].attn.Wqkv._parameters["weight"]
    with FakeTensorMode(allow_non_fake_inputs=True):
        weight + 1
    assert torch.equal(embed(model), before)
    with FakeTensorMode(allow_non_fake_inputs=True):
        copy.deepcopy(model)
    assert torch.equal(embed(model), before)
    with torch.device("meta"), torch.inference_mode():
        weight.sum()
    assert torch.equal(embed(model), before)


def test_shared_memory_stays_shared(model: NomicMoEModel) -> None:
    before = embed(model)
    model.share_memory()
    torch.testing.assert_close(embed(model), before, atol=1e-5, rtol=0)
    assert all(one.is_shared() for one in model.parameters())


def test_a_thread_may_use_a_parameter_while_another_embeds(library: str) -> None:
    """Torch has a lock of its own, for which it may wait while it holds Python's."""
    code = (
        "import sys, threading, time, torch; sys.path[:0] = ['.', 'kernels']\n"
        "from nomoe import NomicMoEModel, data\n"
        "from nomoe_kernels import matrices\n"
        f"matrices._is_intel = lambda: {library == 'mkl'}\n"
        "torch.set_num_threads(1); sys.setswitchinterval(1e-5)\n"
        "model = NomicMoEModel.from_pretrained(data.TINY, device='cpu')\n"
        "weight = model.encoder.layers[0].attn.Wqkv.weight\n"
        "end = time.time() + 3\n"
        "def use():\n"
        "    while time.time() < end: weight.sum()\n"
        "thread = threading.Thread(target=use); thread.start()\n"
        "with torch.no_grad():\n"
        "    while time.time() < end: model.forward_packed(torch.arange(4, 34), [20, 10])\n"
        "thread.join()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_what_says_something_about_a_parameter_leaves_it_packed(model: NomicMoEModel) -> None:
    weight = model.encoder.layers[0].attn.Wqkv._parameters["weight"]
    assert weight.device == torch.device("cpu")
    assert (weight.ndim, weight.dim(), len(weight)) == (2, 2, 288)
    assert weight.size() == weight.shape == (288, 96)
    assert weight.numel() * weight.element_size() == weight.nbytes == 4 * 288 * 96
    assert not weight.is_cuda
    model.encoder.requires_grad_(False).requires_grad_(True)
    model.encoder.zero_grad()
    assert packed(model)


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


def test_numbers_written_into_parameters_kept_from_before(
    model: NomicMoEModel, checkpoint: dict[str, Tensor]
) -> None:
    fresh = NomicMoEModel(model.config).eval()
    fresh.load_state_dict({name: 0.5 * one for name, one in checkpoint.items()})
    kept = list(model.parameters())
    embed(model)
    with torch.no_grad():
        for one, other in zip(kept, fresh.parameters(), strict=True):
            one.copy_(other)
    torch.testing.assert_close(embed(model), embed(fresh), atol=1e-5, rtol=0)
    embed(model)
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(mine(checkpoint, kept)), kept)
    assert same(model.state_dict(), checkpoint)


def mine(checkpoint: dict[str, Tensor], kept: list[nn.Parameter]) -> list[Tensor]:
    assert len(kept) == len(checkpoint)
    return list(checkpoint.values())


def test_an_optimizer_is_copied_with_numbers(model: NomicMoEModel) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    embed(model)
    [group] = copy.deepcopy(optimizer).param_groups
    for one, other in zip(group["params"], model.parameters(), strict=True):
        assert type(one) is nn.Parameter
        assert one.equal(other)


def test_layers_may_be_taken_out_and_exchanged(model: NomicMoEModel) -> None:
    """What is gone is neither packed nor pickled."""
    layers = model.encoder.layers
    gone, layers[0].mlp = layers[1], copy.deepcopy(layers[0].mlp)
    model.encoder.layers = layers[:1]
    plain = copy.deepcopy(model)
    plain.packs_matrices = False  # type: ignore[misc]
    torch.testing.assert_close(embed(model), embed(plain), atol=1e-5, rtol=0)
    assert all(part.packed for part in model.modules() if isinstance(part, Linear))
    gone.train()
    embed(model)
    assert not any(part.packed for part in gone.modules() if isinstance(part, Linear))
    size = sum(one.nbytes for one in model.state_dict().values())
    assert len(pickle.dumps(model)) < size + 200_000


def test_parameters_may_be_swapped(monkeypatch: pytest.MonkeyPatch, model: NomicMoEModel) -> None:
    """As torch does in moves of tensors of other kinds, and in all where it is told to."""
    before = embed(model)
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
    fresh = NomicMoEModel.from_pretrained(data.TINY, device="cpu")
    assert torch.equal(embed(fresh.double().float()), before)
    assert torch.equal(embed(model.double().float()), before)
    assert packed(model)
    weight = model.encoder.layers[0].attn.Wqkv.weight
    torch.utils.swap_tensors(weight, nn.Parameter(fresh.state_dict()[NAME].clone() * 2))
    fresh.get_parameter(NAME).data.mul_(2)
    torch.testing.assert_close(embed(model), embed(fresh), atol=1e-5, rtol=0)
    parts = [one.encoder.layers[0].mlp for one in (model, fresh)]
    for mine, other in [parts, parts[:1] * 2]:
        # both packed
        pair = (mine.fc1._parameters["weight"], other.fc2._parameters["weight"])
        numbers = [one.detach().clone() for one in pair]
        embed(model)
        embed(fresh)
        torch.utils.swap_tensors(*pair)
        assert [one.equal(two) for one, two in zip(pair, numbers[::-1], strict=True)] == [True] * 2
        torch.utils.swap_tensors(*pair)


def test_a_move_to_where_it_is_in_every_way_of_torchs(
    monkeypatch: pytest.MonkeyPatch, model: NomicMoEModel
) -> None:
    before = embed(model)
    for name in ("swap_module_params", "overwrite_module_params"):
        with monkeypatch.context() as patch:
            patch.setattr(torch.__future__, f"_{name}_on_conversion", True)
            nn.Sequential(model).to("cpu")
            assert packed(model)
            assert torch.equal(embed(model), before)


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


@pytest.mark.parametrize("by_layer", [False, True])
def test_a_compiled_forward(by_layer: bool, model: NomicMoEModel) -> None:
    """Compiled in one or layer by layer, the packed products are none of the compiler's.

    Inductor would take them for its own, whose matrices are constants, and fail.
    """
    compiled_ops = []

    def record(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        compiled_ops.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    ids_BL = torch.arange(4, 34)[None]
    with torch.no_grad():
        expected = model(ids_BL)
    torch.compiler.reset()
    if by_layer:
        for layer in model.encoder.layers:
            layer.compile(backend=record)
        compiled = model
    else:
        compiled = torch.compile(model, backend=record)
    with torch.no_grad():
        output = compiled(ids_BL)
    assert type(output) is type(expected)
    assert len(output) == len(expected)
    assert torch.equal(output[0], expected[0])
    assert packed(model)
    assert not [name for name in compiled_ops if "mkl" in name]


def test_what_is_loaded_in_place_counts(
    model: NomicMoEModel, checkpoint: dict[str, Tensor]
) -> None:
    """As torch.distributed.checkpoint does, into the tensors of a state_dict."""
    for name, tensor in model.state_dict().items():
        tensor.copy_(0.5 * checkpoint[name])
    fresh = NomicMoEModel(model.config).eval()
    fresh.load_state_dict({name: 0.5 * tensor for name, tensor in checkpoint.items()})
    assert torch.equal(embed(model), embed(fresh))


def test_parameters_asked_for_in_inference_mode_still_train(model: NomicMoEModel) -> None:
    with torch.inference_mode():
        embed(model)
        assert not any(one.isnan().any() for one in model.parameters())
    model.train().forward_packed(torch.arange(4, 34), [20, 10])[0].sum().backward()


@pytest.mark.parametrize("again", [False, True])
def test_weights_given_back_in_the_middle_of_a_forward(
    again: bool, model: NomicMoEModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another thread that counts parameters, say, and laid out once more by a third."""
    before = embed(model)
    calls = iter(range(100))
    attention = cpu.attention

    def interrupted(*inputs: object) -> Tensor:
        call = next(calls)
        if call == 1:
            assert not any(one.isnan().any() for one in model.parameters())
        if call == 2 and again:
            model._lay_out()
        return attention(*inputs)  # type: ignore[arg-type]

    monkeypatch.setattr(cpu, "attention", interrupted)
    torch.testing.assert_close(embed(model), before, atol=1e-5, rtol=0)
    monkeypatch.setattr(cpu, "attention", attention)
    assert torch.equal(embed(model), before)


def test_a_thread_may_ask_while_another_embeds(model: NomicMoEModel) -> None:
    before = embed(model)
    done = threading.Event()

    def count() -> None:
        while not done.is_set():
            assert all(one.isfinite().all() for one in model.state_dict().values())
            sum(one.numel() for one in model.parameters())
            copy.deepcopy(model)

    with ThreadPoolExecutor(2) as pool:
        counting = pool.submit(count)
        try:
            for _ in range(100):
                torch.testing.assert_close(embed(model), before, atol=1e-5, rtol=0)
        finally:
            done.set()
        counting.result()
    assert torch.equal(embed(model), before)


def test_a_thread_may_ask_for_gradients_while_another_embeds(model: NomicMoEModel) -> None:
    """Of a model in eval mode, which the other packs at every turn."""
    ids_T = torch.arange(5, 12)

    def run() -> tuple[Tensor, Tensor]:
        model.zero_grad()
        out_TD = model.forward_packed(ids_T, [7]).last_hidden_state
        out_TD.pow(3).sum().backward()
        gradients = [one.grad for one in model.parameters() if one.grad is not None]
        return out_TD.detach(), torch.cat([one.flatten() for one in gradients])

    expected = run()
    done = threading.Event()

    def work() -> None:
        while not done.is_set():
            embed(model)

    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(work)
        try:
            for _ in range(30):
                torch.testing.assert_close(run(), expected, atol=1e-5, rtol=1e-5)
        finally:
            done.set()
        working.result()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_fork_waits_for_the_lock() -> None:
    """Or its child would wait for a thread that it does not have."""
    held = threading.Event()

    def hold() -> None:
        with LAYING_OUT:
            held.set()
            time.sleep(0.2)

    with ThreadPoolExecutor(1) as pool:
        holding = pool.submit(hold)
        held.wait()
        child = multiprocessing.get_context("fork").Process(target=LAYING_OUT.acquire)
        child.start()
        child.join(10)
        ended = child.exitcode
        child.kill()
        holding.result()
    assert ended == 0


def test_threads_may_share_a_model(checkpoint: dict[str, Tensor], model: NomicMoEModel) -> None:
    expected = embed(model)
    for _ in range(5):
        fresh = NomicMoEModel(model.config).eval()
        fresh.load_state_dict(checkpoint)
        with ThreadPoolExecutor(4) as pool:
            for result in pool.map(embed, [fresh] * 8):
                assert torch.equal(result, expected)


def test_hidden_states_are_not_overwritten(model: NomicMoEModel) -> None:
    """Operations may overwrite what nobody reads again, and only that."""
    ids_T = torch.arange(4, 34)
    with torch.no_grad():
        output = model.forward_packed(ids_T, [20, 10], output_hidden_states=True)
        model.train()
        expected = model.forward_packed(ids_T, [20, 10], output_hidden_states=True)
    assert output.hidden_states is not None
    assert expected.hidden_states is not None
    for ours, theirs in zip(output.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("library")
def test_dtypes_it_lacks_run_as_they_did() -> None:
    model = NomicMoEModel.from_pretrained(data.TINY, device="cpu").double()
    assert embed(model).dtype == torch.float64
    assert not packed(model)
    exact = embed(model)
    torch.testing.assert_close(embed(model.float()).double(), exact, atol=1e-5, rtol=0)
    assert packed(model)


@pytest.mark.parametrize("library", ["onednn"], indirect=True)
def test_a_batch_shows_onednn_few_numbers_of_rows(model: NomicMoEModel, shown: list[int]) -> None:
    """And what it is rounded up by is in no output."""
    plain = NomicMoEModel.from_pretrained(data.TINY, device="cpu")
    plain.packs_matrices = False  # type: ignore[misc]
    for lengths in ([100, 29], [3], [130, 127, 1]):
        ids_T = torch.arange(sum(lengths)) % 500
        options = {"output_hidden_states": True, "output_routing": True}
        with torch.no_grad():
            ours, theirs = (one.forward_packed(ids_T, lengths, **options) for one in (model, plain))
        assert torch.equal(ours.last_hidden_state, ours.hidden_states[-1])
        for mine, other in zip(ours.hidden_states, theirs.hidden_states, strict=True):
            torch.testing.assert_close(mine, other, atol=1e-5, rtol=0)
        for mine, other in zip(ours.router_weights, theirs.router_weights, strict=True):
            torch.testing.assert_close(mine, other, atol=1e-5, rtol=0)
        for mine, other in zip(ours.router_experts, theirs.router_experts, strict=True):
            assert torch.equal(mine, other)
    # 258 takes 264, and 129 takes 132
    assert {132, 3, 264} <= set(shown)
    assert not {129, 258} & set(shown)


class Adapter(nn.Module):
    """A part that stands in for a Linear and adds a low rank to it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.down = nn.Linear(96, 4, bias=False)
        self.up = nn.Linear(4, 192, bias=False)

    def forward(self, x_TI: Tensor, *rest: Any) -> Tensor:
        return self.inner(x_TI, *rest) + self.up(self.down(x_TI))  # type: ignore[no-any-return]


@pytest.fixture
def widened(monkeypatch: pytest.MonkeyPatch) -> NomicMoEModel:
    """The tiny model in bfloat16, many rows of which a CPU multiplies in float32."""
    if len(DTYPES) < 2 or "mkl" not in LIBRARIES:
        pytest.skip("torch has no MKL or no bfloat16 here")
    monkeypatch.setattr(matrices, "_is_intel", lambda: True)
    monkeypatch.setattr(matrices, "_has_amx", lambda: False)
    return NomicMoEModel.from_pretrained(data.TINY, device="cpu", dtype="bfloat16")


def many(model: NomicMoEModel) -> NomicMoEOutput:
    with torch.no_grad():
        return model.forward_packed(torch.arange(4, 204), [90, 110], output_hidden_states=True)


def test_many_rows_in_bfloat16_are_rounded_at_the_end(
    widened: NomicMoEModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    attention = cpu.attention

    def watched(qkv_T3NH: Tensor, packing: Any) -> Tensor:
        seen.append(qkv_T3NH.dtype)
        return attention(qkv_T3NH, packing)

    monkeypatch.setattr(cpu, "attention", watched)
    embed(widened)
    ours = many(widened)
    layers = widened.config.n_layer
    assert seen == [torch.bfloat16] * layers + [torch.float32] * layers
    assert ours.hidden_states is not None
    assert {one.dtype for one in ours.hidden_states} == {torch.bfloat16}
    assert torch.equal(ours.last_hidden_state, ours.hidden_states[-1])

    exact = many(copy.deepcopy(widened).double()).last_hidden_state
    plain = copy.deepcopy(widened)
    plain.packs_matrices = False  # type: ignore[misc]
    theirs = many(plain).last_hidden_state
    # of a token in the middle, since some go to other experts
    errors = [float((one - exact).abs().amax(1).median()) for one in (ours[0], theirs)]
    assert errors[0] < 0.7 * errors[1]


def test_what_stands_in_for_a_linear_gets_the_models_dtype(widened: NomicMoEModel) -> None:
    plain = copy.deepcopy(widened)
    plain.packs_matrices = False  # type: ignore[misc]
    layer = widened.encoder.layers[0].mlp
    layer.fc1 = Adapter(layer.fc1).bfloat16()
    plain.encoder.layers[0].mlp.fc1 = copy.deepcopy(layer.fc1)
    ours, theirs = (many(one).last_hidden_state for one in (widened, plain))
    assert float((ours.float() - theirs.float()).abs().median()) < 0.02


def test_hooks_get_the_models_dtype_to_keep(widened: NomicMoEModel) -> None:
    square = torch.eye(96, dtype=torch.bfloat16)
    kept = []

    def hook(part: nn.Module, inputs: object, out: Tensor) -> Tensor:
        kept.append((out, out.clone()))
        return out @ square

    widened.encoder.layers[0].attn.register_forward_hook(hook)
    many(widened)
    [(one, copied)] = kept
    assert torch.equal(one, copied)


def test_weights_given_back_in_the_middle_of_a_forward_in_bfloat16(
    widened: NomicMoEModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = many(widened).last_hidden_state
    calls = iter(range(100))
    attention = cpu.attention

    def interrupted(*inputs: object) -> Tensor:
        if next(calls) == 1:
            assert not any(one.isnan().any() for one in widened.parameters())
        return attention(*inputs)  # type: ignore[arg-type]

    monkeypatch.setattr(cpu, "attention", interrupted)
    after = many(widened).last_hidden_state
    assert float((after.float() - before.float()).abs().median()) < 0.02
