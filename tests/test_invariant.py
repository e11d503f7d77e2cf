"""batch_invariant=True: a text's bits do not depend on its batch.

Under the interpreter a product is summed one column after the other here, since numpy's depends on
where in a block a row stands, which a tensor core's does not. What a GPU could make of another tile
does not show in such sums: so every launch is noted, and no batch may launch another form of a
kernel than the next.
"""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

from nomoe import Encoder, NomicMoEModel
from nomoe.backends import Backend, Ops, select_backend
from nomoe.engine import Engine, Pooling
from nomoe_kernels import fused, invariant
from tests.test_engine import Rerun
from tests.test_model import batch_of, config_of, packed

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="tests/test_gpu_engine.py does it at the real sizes"
)

Form = tuple[Any, ...]
# short ones, and one of more than a block of 64
LENGTHS = [1, 3, 65, 17, 2, 9]
POOLING = Pooling(24, True, True)


@pytest.fixture
def forms(monkeypatch: pytest.MonkeyPatch) -> set[Form]:
    """Every form in which a kernel is launched: its constants, and which arguments are left out."""
    seen: set[Form] = set()
    run = InterpretedFunction.run

    def noted(self: Any, *args: Any, **options: Any) -> None:
        constants = {k: v for k, v in options.items() if k.isupper() or k.startswith("num_")}
        seen.add((self.__name__, *sorted(constants.items()), *(one is None for one in args)))
        run(self, *args, **options)

    monkeypatch.setattr(InterpretedFunction, "run", noted)
    return seen


@pytest.fixture(autouse=True)
def ordered_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    def dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> TensorHandle:
        a_MK, b_KN = a.data.astype(np.float32), b.data.astype(np.float32)
        product_MN = np.zeros_like(d.data)
        for k in range(len(b_KN)):
            product_MN += a_MK[:, k, None] * b_KN[k]
        return TensorHandle(product_MN + d.data, d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)


def model_of(dtype: torch.dtype, *, batch_invariant: bool = True) -> NomicMoEModel:
    """One dense layer and one with experts."""
    torch.manual_seed(0)
    config = config_of(n_layer=2, n_embd=32, n_inner=48, n_head=2, num_experts=4, n_positions=128)
    model = NomicMoEModel(config, backend="triton", batch_invariant=batch_invariant)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval()


@torch.no_grad()
def embed(model: NomicMoEModel, texts: list[list[int]]) -> list[Tensor]:
    """Hidden states, and the vector, of each text."""
    ids_T, lengths = packed(texts)
    hidden_TD = model.forward_packed(ids_T, lengths)[0]
    vectors = model.backend.ops.pool(hidden_TD, lengths, POOLING)
    return [*hidden_TD.split(lengths), *vectors]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_batch_mates_order_and_size_change_no_bit(dtype: torch.dtype, forms: set[Form]) -> None:
    model = model_of(dtype)
    texts = batch_of(LENGTHS)
    alone = [embed(model, [text]) for text in texts]
    of_one = set(forms)
    generator = random.Random(0)
    for size in (6, 2, 3) if dtype == torch.float32 else (4,):
        chosen = generator.sample(range(len(texts)), size)
        forms.clear()
        together = embed(model, [texts[place] for place in chosen])
        assert forms == of_one
        for place, hidden, vector in zip(chosen, together, together[size:], strict=False):
            assert torch.equal(hidden, alone[place][0])
            assert torch.equal(vector, alone[place][1])


def test_without_it_a_batch_launches_what_suits_its_size(forms: set[Form]) -> None:
    """What the test above could not miss."""
    model = model_of(torch.float16, batch_invariant=False)
    of_batches = []
    for lengths in ([3], [40]):
        forms.clear()
        embed(model, batch_of(lengths))
        of_batches.append(set(forms))
    assert of_batches[0] != of_batches[1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the mean of no tokens
def test_recordings_change_no_bit(forms: set[Form]) -> None:
    """A replay in a bucket, a batch as it is, and a forward by itself: all the same bits."""
    model = model_of(torch.float32)
    texts = batch_of(LENGTHS)
    alone = torch.stack([embed(model, [text])[1] for text in texts])
    forms.clear()
    recorder = Rerun()
    runner = Engine(model, make_recorder=lambda _: recorder)
    of_one: set[Form] = set()
    for turn, chosen in enumerate([[0], [0], [4, 1, 0], [1, 4], [5, 3]]):
        ids, lengths = packed([texts[place] for place in chosen])
        vectors = runner.embed(ids.tolist(), lengths, POOLING, to_host=True)()
        assert torch.equal(vectors, alone[chosen])
        of_one = of_one or set(forms)
        assert forms == of_one, f"turn {turn}"
        forms.clear()
    assert recorder.replays == 2


def test_the_result_is_that_of_the_plain_backend() -> None:
    model = model_of(torch.float32)
    texts = batch_of([7, 12])
    plain = copy.deepcopy(model)
    plain.backend = Backend("torch", "for comparison")
    for got, expected in zip(embed(model, texts), embed(plain, texts), strict=True):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)


def test_every_operation_is_there() -> None:
    operations = {name for name in vars(Ops) if not name.startswith("_")}
    assert "moe_block" in operations
    assert operations <= set(invariant.__all__)
    # what chooses by the batch in `fused`
    for name in ("linear", "moe_block", "pack", "attention_tile"):
        assert getattr(invariant, name) is not getattr(fused, name), name


def test_asking_for_it(tiny_folder: Path) -> None:
    encoder = Encoder.from_pretrained(
        tiny_folder, device="cpu", backend="triton", batch_invariant=True
    )
    assert encoder.model.backend.batch_invariant
    assert encoder.model.backend.ops is invariant
    # casts and copies keep it
    model = copy.deepcopy(encoder.model).half()
    assert model.backend == Backend("triton", "asked for", batch_invariant=True)
    plain = Encoder.from_pretrained(tiny_folder, device="cpu", backend="triton")
    assert plain.model.backend.ops is fused


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_what_cannot_do_it_says_why(backend: Any, tiny_folder: Path) -> None:
    reason = {"torch": "asked for", "auto": "Triton's kernels need CUDA, and this is cpu"}[backend]
    message = (
        "batch_invariant=True cannot run on backend 'torch', whose products round differently by "
        rf"the number of rows; it needs 'triton' \(torch: {reason}\)"
    )
    with pytest.raises(RuntimeError, match=message):
        select_backend(backend, torch.device("cpu"), batch_invariant=True)
    with pytest.raises(RuntimeError, match=message):
        Encoder.from_pretrained(tiny_folder, device="cpu", backend=backend, batch_invariant=True)
