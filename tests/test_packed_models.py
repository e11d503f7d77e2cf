"""Models whose matrices are packed for a CPU: what they compute."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nomoe import NomicMoEModel, data
from nomoe.model import NomicMoEOutput
from nomoe.moe import Linear
from nomoe_kernels import cpu, matrices
from tests.conftest import LIBRARIES, VENDORS
from tests.test_cpu_ops import DTYPES, embed, packed

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(not DTYPES, reason="torch has no oneDNN here")


@pytest.fixture
def model(packed_model: NomicMoEModel) -> NomicMoEModel:
    return packed_model


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


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells what is in use")
def test_packed_matrices_take_hardly_more_memory_than_plain_ones() -> None:
    """A process apart, whose memory has no holes yet."""
    code = (
        "import sys, torch; sys.path[:0] = ['.', 'kernels']\n"
        "from nomoe import NomicMoEConfig, data\n"
        "from nomoe.moe import ExpertWeights\n"
        "from nomoe_kernels import matrices\n"
        "matrices._vendor = lambda: ''\n"
        "def in_use():\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return next(int(l.split()[1]) for l in lines if l.startswith('RssAnon')) * 1024\n"
        "config = NomicMoEConfig.from_json(data.FULL_WIDTH / 'config.json')\n"
        "warm = ExpertWeights(NomicMoEConfig.from_json(data.TINY / 'config.json'))\n"
        "warm.eval().pack()\n"
        "before = in_use()\n"
        "layers = [ExpertWeights(config).eval() for _ in range(2)]\n"
        "size = sum(one.detach().zero_().nbytes for l in layers for one in l.parameters())\n"
        "for layer in layers: layer.pack()\n"
        "assert all(layer.packed for layer in layers)\n"
        "print((in_use() - before) / size)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert 0.9 < float(result.stdout) < 1.1


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


def test_autocast_has_its_effect(model: NomicMoEModel) -> None:
    """It is asked for products in 16 bits, and takes the parameters for them."""
    plain = copy.deepcopy(model)
    plain.packs_matrices = False  # type: ignore[misc]
    exact = embed(model)
    with torch.autocast("cpu", torch.bfloat16):
        ours = embed(model)
        assert torch.equal(ours, embed(plain))
    assert not torch.allclose(ours, exact, atol=1e-3, rtol=0)
    assert torch.equal(embed(model), exact)


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
    monkeypatch.setattr(matrices, "_vendor", lambda: VENDORS["mkl"])
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
