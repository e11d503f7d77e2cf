"""`forward_packed` inside torch.compile(fullgraph=True), on the triton backend."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from nomoe import NomicMoEModel
from nomoe.backends import BackendName
from tests.test_model import batch_of, config_of, packed

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [pytest.mark.gpu] if CUDA else []


def small_model(backend: BackendName = "triton") -> NomicMoEModel:
    torch.manual_seed(0)
    config = config_of(n_layer=2, n_embd=32, n_inner=32, n_head=2)
    with torch.device(DEVICE):
        model = NomicMoEModel(config, backend=backend)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def compiled(function: Any, backend: str = "eager") -> Any:
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend=backend)


@pytest.mark.slow
@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_function_that_calls_the_model_compiles_whole(as_tensor: bool) -> None:
    model = small_model()

    def embed(ids_T: Tensor, lengths: Any) -> Tensor:
        hidden_TD = model.forward_packed(ids_T * 1, lengths).last_hidden_state
        return hidden_TD[:2].float() * 2

    whole = compiled(embed, "aot_eager")
    for sizes in ([3, 2], [1, 3]):
        ids_T, lengths = packed(batch_of(sizes))
        given: Any = torch.tensor(lengths) if as_tensor else lengths
        with torch.no_grad():
            expected = model.forward_packed(ids_T.to(DEVICE), lengths)[0][:2].float() * 2
            assert torch.equal(whole(ids_T.to(DEVICE), given), expected)


def test_a_compiled_padded_forward() -> None:
    """Not whole: what runs the kernels the compiler leaves alone."""
    model = small_model()
    ids_BL = torch.tensor([[1, 2, 3], [4, 5, 0]], device=DEVICE)
    mask_BL = (ids_BL > 0).long()
    torch.compiler.reset()
    partly = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        expected, got = model(ids_BL, mask_BL), partly(ids_BL, mask_BL)
    assert len(got) == len(expected)
    assert torch.equal(got[0], expected[0])


def test_who_compiles_nothing_imports_no_compiler() -> None:
    """It takes more than a second and 150 MB."""
    program = (
        "import sys, torch; from nomoe import NomicMoEModel, data; "
        "model = NomicMoEModel.from_pretrained(data.TINY, device='cpu').requires_grad_(False); "
        "model.forward_packed(torch.tensor([1, 2, 3]), [3]); "
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


@pytest.mark.parametrize("kept", [None, 1])
def test_all_outputs_come_through(kept: int | None) -> None:
    """Also of a model some of whose layers were taken out."""
    model = small_model()
    model.encoder.layers = model.encoder.layers[:kept]
    ids_T, lengths = packed(batch_of([2, 3]))
    ids_T = ids_T.to(DEVICE)
    options = {"output_hidden_states": True, "output_routing": True}
    whole = compiled(lambda ids_T: model.forward_packed(ids_T, lengths, **options))
    with torch.no_grad():
        expected, got = model.forward_packed(ids_T, lengths, **options), whole(ids_T)
    assert torch.equal(got.last_hidden_state, expected.last_hidden_state)
    for name in ("hidden_states", "router_weights", "router_experts"):
        ours, theirs = getattr(got, name), getattr(expected, name)
        assert len(ours) == len(theirs)
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_the_operator_is_well_formed() -> None:
    model = small_model()
    ids_T, lengths = packed(batch_of([2, 3]))
    args = (ids_T.to(DEVICE), torch.tensor(lengths), model.emb_ln.weight.detach())
    with torch.no_grad():
        torch.library.opcheck(
            torch.ops.nomoe.forward_packed, (*args, None, model._number, 3, 1, 2),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )  # fmt: skip


def test_bad_lengths_are_refused_inside_too() -> None:
    model = small_model()
    whole = compiled(lambda ids_T: model.forward_packed(ids_T, [2, 2])[0])
    with torch.no_grad(), pytest.raises(ValueError, match="add up to 3"):
        whole(torch.tensor([1, 2, 3], device=DEVICE))


@pytest.mark.filterwarnings("ignore:Error detected:UserWarning")
def test_a_gradient_raises() -> None:
    model = small_model()
    ids_T = torch.tensor([1, 2, 3], device=DEVICE)
    for parameter in model.emb_ln.parameters():
        # a model with some weights frozen is trained all the same
        parameter.requires_grad_(False)
    whole = compiled(lambda ids_T: model.forward_packed(ids_T, [3])[0].sum(), "aot_eager")
    with pytest.raises(RuntimeError, match="no backward pass: train with backend='torch'"):
        whole(ids_T).backward()


def test_the_torch_backend_stays_differentiable() -> None:
    model = small_model("torch")
    ids_T = torch.tensor([1, 2, 3], device=DEVICE)

    def gradient(run: Any) -> Tensor:
        model.zero_grad()
        run(ids_T, [3])[0].square().sum().backward()
        grad = model.encoder.layers[0].mlp.fc1.weight.grad
        assert grad is not None
        return grad.clone()

    eager = gradient(model.forward_packed)
    torch.compiler.reset()
    partly = gradient(torch.compile(model.forward_packed, backend="aot_eager"))
    torch.testing.assert_close(partly, eager)
    assert eager.abs().max() > 0


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_runs_its_own_weights(duplicate: Any) -> None:
    model = small_model()
    other = duplicate(model)
    with torch.no_grad():
        other.emb_ln.bias += 1
    ids_T = torch.tensor([1, 2, 3], device=DEVICE)
    whole = compiled(lambda ids_T: other.forward_packed(ids_T, [3])[0])
    with torch.no_grad():
        assert torch.equal(whole(ids_T), other.forward_packed(ids_T, [3])[0])
        assert not torch.equal(whole(ids_T), model.forward_packed(ids_T, [3])[0])


def test_the_registry_keeps_no_model_alive() -> None:
    model = small_model()
    number = model._number
    weight = model.emb_ln.weight.detach().clone()
    del model
    gc.collect()
    ids_T = torch.tensor([1, 2, 3], device=DEVICE)
    with pytest.raises(RuntimeError, match="no longer exists"):
        torch.ops.nomoe.forward_packed(ids_T, torch.tensor([3]), weight, None, number, 1, 0, 2)
