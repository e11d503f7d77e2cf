"""Parameters whose numbers are packed: whoever reads or writes them."""

from __future__ import annotations

import copy
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrize, prune

from nomoe import NomicMoEModel, data
from nomoe.packable import Packable
from tests.test_cpu_ops import DTYPES, embed, packed

NAME = "encoder.layers.0.attn.Wqkv.weight"
pytestmark = pytest.mark.skipif(not DTYPES, reason="torch has no oneDNN here")


@pytest.fixture
def model(packed_model: NomicMoEModel) -> NomicMoEModel:
    return packed_model


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
        again.load_state_dict({name: one.clone() for name, one in other.items()}, assign=assign)
        assert torch.equal(embed(again), expected)
    for name, tensor in other.items():
        model.get_parameter(name).data = tensor.clone()
    assert torch.equal(embed(model), expected)
    for one in (model, fresh):
        nn.init.zeros_(one.encoder.layers[0].attn.Wqkv.weight)
    assert torch.equal(embed(model), embed(fresh))
    nn.init.normal_(model.train().encoder.layers[0].attn.Wqkv.weight)


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
    # not the fixture itself, in which torch would note that it is to be assigned from then on
    model.load_state_dict(dict(checkpoint), assign=True)
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
    """Past the module, from it, or from a module around the model."""
    around = nn.Sequential(model)
    layer = model.encoder.layers[0].attn.Wqkv
    for ask in (
        lambda: layer._parameters["weight"],
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


HOLDERS: dict[str, Callable[[NomicMoEModel], Any]] = {
    "all": lambda model: list(model.parameters()),
    "one": lambda model: model.encoder.layers[1].attn.Wqkv.weight,
    "an optimizer": lambda model: torch.optim.AdamW(model.parameters()),
    "a view": lambda model: model.encoder.layers[1].attn.Wqkv.weight[:10],
    "a view of a frozen one": lambda model: frozen(model).encoder.layers[1].mlp.experts.mlp.w2.T,
    "a graph": lambda model: model.encoder.layers[1].attn.out_proj.weight.square().sum(),
    "data": lambda model: model.encoder.layers[1].attn.Wqkv.weight.data,
    "a detached view": lambda model: model.encoder.layers[1].mlp.experts.mlp.w2.detach()[3],
    "an array": lambda model: model.encoder.layers[1].attn.Wqkv.weight.detach().numpy(),
    "a storage": lambda model: model.encoder.layers[1].attn.Wqkv.weight.untyped_storage(),
    "a state": lambda model: model.state_dict(),
    "another module": lambda model: shared(model, nn.Linear(96, 288)),
}


def frozen(model: NomicMoEModel) -> NomicMoEModel:
    return model.requires_grad_(False)


def shared(model: NomicMoEModel, other: nn.Linear) -> nn.Linear:
    other.weight = model.encoder.layers[1].attn.Wqkv.weight
    return other


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=list(HOLDERS))
def test_what_anyone_holds_stays_as_it_is(
    hold: Callable[[NomicMoEModel], Any], model: NomicMoEModel
) -> None:
    before = embed(model)
    held = hold(model)
    torch.testing.assert_close(embed(model), before, atol=1e-5, rtol=0)
    parts = [part for part in model.modules() if isinstance(part, Packable) and not part.packed]
    assert parts
    with torch._C.DisableTorchFunctionSubclass():
        for part in parts:
            assert all(one.isfinite().all() for one in part._parameters.values())
    del held
    assert torch.equal(embed(model), before)
    assert packed(model)


def test_nothing_around_spoils_the_numbers(model: NomicMoEModel) -> None:
    before = embed(model)
    parameters = model.encoder.layers[0].attn.Wqkv._parameters
    with FakeTensorMode(allow_non_fake_inputs=True):
        parameters["weight"] + 1
    assert torch.equal(embed(model), before)
    with FakeTensorMode(allow_non_fake_inputs=True):
        copy.deepcopy(model)
    assert torch.equal(embed(model), before)
    with torch.device("meta"), torch.inference_mode():
        parameters["weight"].sum()
    assert torch.equal(embed(model), before)
    assert packed(model)


def test_a_model_loaded_in_inference_mode(checkpoint: dict[str, Tensor]) -> None:
    """Whose parameters have no count of versions."""
    with torch.inference_mode():
        model = NomicMoEModel.from_pretrained(data.TINY, device="cpu")
        before = embed(model)
        assert packed(model)
        assert same(model.state_dict(), checkpoint)
        assert torch.equal(embed(model), before)
    assert same(model.state_dict(), checkpoint)
    assert torch.equal(embed(model), before)
    assert packed(model)


def test_shared_memory_stays_shared(model: NomicMoEModel) -> None:
    before = embed(model)
    model.share_memory()
    torch.testing.assert_close(embed(model), before, atol=1e-5, rtol=0)
    assert all(one.is_shared() for one in model.parameters())


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


def test_what_is_loaded_in_place_counts(
    model: NomicMoEModel, checkpoint: dict[str, Tensor]
) -> None:
    """As torch.distributed.checkpoint does, into the tensors of a state_dict."""
    for name, tensor in model.state_dict().items():
        tensor.copy_(0.5 * checkpoint[name])
    fresh = NomicMoEModel(model.config).eval()
    fresh.load_state_dict({name: 0.5 * tensor for name, tensor in checkpoint.items()})
    assert torch.equal(embed(model), embed(fresh))
