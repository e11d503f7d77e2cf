"""The operations for inference on a CPU, and models whose matrices are packed for them."""

from __future__ import annotations

import copy
import importlib
import multiprocessing
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nomoe_kernels
from nomoe import NomicMoEModel, data
from nomoe.moe import LAYING_OUT, Linear, MoE, Packable
from nomoe_kernels import cpu, matrices, reference
from nomoe_kernels.reference import MoEWeights, Norm

DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if cpu.supports(dtype)]
LIBRARIES = ["onednn", *(["mkl"] if torch.backends.mkl.is_available() else [])]
KINDS = [("onednn", dtype) for dtype in DTYPES] + [(name, torch.float32) for name in LIBRARIES[1:]]
# of the largest number of a product: some roundings of its operands' dtype
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 1e-2}

pytestmark = pytest.mark.skipif(not DTYPES, reason="torch has no oneDNN here")


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where products in float32 run: both can, whatever this CPU is."""
    monkeypatch.setattr(matrices, "_is_intel", lambda: request.param == "mkl")
    return str(request.param)


@pytest.fixture(params=KINDS, ids=lambda kind: f"{kind[0]}-{kind[1]}")
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """One with products at speed, in each library that has them."""
    library, dtype = request.param
    monkeypatch.setattr(matrices, "_is_intel", lambda: library == "mkl")
    return dtype  # type: ignore[no-any-return]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def off(result: Tensor, exact: Tensor) -> float:
    """Largest difference relative to the largest number; infinite where it is not a number."""
    assert result.shape == exact.shape
    worst = (result.double() - exact).abs().max() / exact.abs().max()
    return float(worst.nan_to_num(torch.inf))


# --- operations


@pytest.mark.parametrize("rows", [1, 5, 33])
def test_linear(rows: int, dtype: torch.dtype) -> None:
    x_TI, weight_OI, bias_O = (
        normal(*shape, seed=seed, dtype=dtype)
        for seed, shape in enumerate(((rows, 96), (80, 96), (80,)))
    )
    packed = cpu.pack_weight(weight_OI)
    assert isinstance(packed, matrices.MklMatrix) == matrices.in_mkl(dtype)
    exact = F.linear(x_TI.double(), weight_OI.double(), bias_O.double())
    for gelu in (False, True):
        result = cpu.linear(x_TI, packed, bias_O, gelu=gelu)
        assert result.dtype == dtype
        assert off(result, F.gelu(exact) if gelu else exact) < BOUNDS[dtype]
    assert off(cpu.linear(x_TI, packed, None), exact - bias_O.double()) < BOUNDS[dtype]
    assert cpu.linear(x_TI[:0], packed, bias_O, gelu=True).shape == (0, 80)


@pytest.mark.usefixtures("library")
def test_the_gelu_is_the_exact_one() -> None:
    x_TI = torch.linspace(-6, 6, 4096)[:, None].expand(-1, 16).contiguous()
    result = cpu.linear(x_TI, cpu.pack_weight(torch.eye(16)), None, gelu=True)
    exact = F.gelu(x_TI.double())
    assert (result - exact).abs().max() < 1e-6
    tanh = F.gelu(x_TI.double(), approximate="tanh")
    assert (tanh - exact).abs().max() > 1e-4, "the test could not tell"


def test_packing_loses_nothing(dtype: torch.dtype) -> None:
    weight_OI = normal(80, 96, dtype=dtype)
    # a subnormal number, which arithmetic may take for zero, and the largest
    weight_OI[0, :2] = torch.tensor([2.0**-133, torch.finfo(dtype).max])
    for matrix in (weight_OI, weight_OI.T):
        assert torch.equal(cpu.pack_weight(matrix).unpack(), matrix)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("number", [torch.inf, torch.nan])
def test_packing_loses_no_infinity(number: float) -> None:
    weight_OI = normal(80, 96)
    weight_OI[3, 5] = number
    packed = cpu.pack_weight(weight_OI)
    assert isinstance(packed, matrices.OneDnnMatrix)
    torch.testing.assert_close(packed.unpack(), weight_OI, atol=0, rtol=0, equal_nan=True)
    good = torch.arange(80) != 3
    assert cpu.linear(normal(4, 96), packed, None)[:, good].isfinite().all()


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_unpacking_under_another_default(default: torch.dtype) -> None:
    weight_OI = normal(80, 96)
    packed = cpu.pack_weight(weight_OI)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        with torch.device("meta"):
            back = packed.unpack()
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(back, weight_OI)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    ("x_shape", "bias_shape"), [((4, 48), (80,)), ((4, 200), (80,)), ((4, 96), (3,))]
)
def test_shapes_that_do_not_fit_are_refused(
    x_shape: tuple[int, ...], bias_shape: tuple[int, ...]
) -> None:
    packed = cpu.pack_weight(normal(80, 96))
    with pytest.raises((ValueError, RuntimeError)):
        cpu.linear(normal(*x_shape), packed, normal(*bias_shape))


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("processor\t: 0\nvendor_id\t: GenuineIntel\nmodel\t: 207\n", True),
        ("processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel\t: 17\n", False),
        ("processor\t: 0\nBogoMIPS\t: 243.75\nCPU implementer\t: 0x41\n", False),
        (None, True),
    ],
    ids=["Intel", "AMD", "ARM", "Windows"],
)
def test_intel_is_told_by_its_name(
    cpuinfo: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if cpuinfo is not None:
        (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(matrices, "_CPUINFO", tmp_path / "cpuinfo")
    name = "Intel64 Family 6 Model 85 Stepping 7, GenuineIntel"
    monkeypatch.setattr(matrices.platform, "processor", lambda: name)
    assert matrices._is_intel.__wrapped__() == expected


@pytest.mark.skipif("mkl" not in LIBRARIES, reason="torch has no MKL here")
def test_mkl_takes_what_was_packed_for_other_threads(threads: Callable[[int], None]) -> None:
    weight_OI, x_TI = normal(192, 96), normal(33, 96, seed=1)
    exact = F.linear(x_TI.double(), weight_OI.double())
    for packing in (1, 2, 5):
        threads(packing)
        packed = matrices.MklMatrix.pack(weight_OI)
        for running in (1, 2, 5):
            threads(running)
            assert off(cpu.linear(x_TI, packed, None), exact) < BOUNDS[torch.float32]
            assert torch.equal(packed.unpack(), weight_OI)


@pytest.mark.parametrize("lengths", [[], [1], [7, 7, 7], [40, 40, 3, 1, 1], [5, 9, 5]])
def test_attention(lengths: list[int], dtype: torch.dtype) -> None:
    T = sum(lengths)
    qkv_T3NH = normal(T, 3, 6, 16, dtype=dtype)
    positions_T = torch.tensor([*chain.from_iterable(map(range, lengths))], dtype=torch.int64)
    packings = [
        module.pack(lengths, positions_T, 40, 16, 1e4, dtype) for module in (cpu, reference)
    ]
    exact = reference.attention(qkv_T3NH.double(), packings[1])
    result = cpu.attention(qkv_T3NH.clone(), packings[0])
    assert result.dtype == dtype
    if T:
        assert off(result, exact) < BOUNDS[dtype]
    else:
        assert result.shape == (0, 96)


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "normalize"),
    # of the third, two experts have more rows than oneDNN is shown exactly, and one has none
    [(37, 8, 2, False), (1, 4, 3, True), (700, 3, 2, False), (0, 8, 1, False)],
)
def test_moe_block(
    tokens: int, experts: int, top_k: int, normalize: bool, dtype: torch.dtype
) -> None:
    D, ffn_width = 96, 64
    x_TD, y_TD = (normal(tokens, D, seed=seed, dtype=dtype) for seed in (1, 2))
    x_TD[:, 0] = 4
    norms = [Norm(*normal(2, D, seed=seed, dtype=dtype).unbind(), 1e-5) for seed in (3, 4)]
    norms[0].weight_D[0] = 1
    router_ED, bias_D = normal(experts, D, seed=5, dtype=dtype) / 10, normal(D, seed=6, dtype=dtype)
    # an expert that nobody asks for
    router_ED[1, 0] = -9
    w1_EFD, w2_EFD = (normal(experts, ffn_width, D, seed=seed, dtype=dtype) / 8 for seed in (7, 8))
    rest = (bias_D, top_k, normalize)
    plain = MoEWeights(router_ED, w1_EFD.transpose(1, 2), w2_EFD, *rest)
    packed = MoEWeights(
        router_ED,
        [cpu.pack_weight(one) for one in w1_EFD],
        [cpu.pack_weight(one.T) for one in w2_EFD],
        *rest,
    )

    exact_weights = MoEWeights(*(one.double() for one in plain[:4]), *rest[1:])
    exact_norms = [Norm(one.weight_D.double(), one.bias_D.double(), one.eps) for one in norms]
    exact_TD = reference.moe_block(
        x_TD.double(), y_TD.double(), exact_norms[0], exact_weights, exact_norms[1]
    )[0]
    expected = reference.moe_block(x_TD, y_TD, norms[0], plain, norms[1])
    out_TD, weights_TK, experts_TK = cpu.moe_block(x_TD, y_TD.clone(), norms[0], packed, norms[1])
    assert out_TD.dtype == dtype
    assert out_TD.shape == (tokens, D)
    assert torch.equal(experts_TK, expected[2])
    torch.testing.assert_close(weights_TK, expected[1], atol=1e-5, rtol=0)
    if tokens:
        assert not (experts_TK == 1).any()
        assert off(out_TD, exact_TD) < max(1.2 * off(expected[0], exact_TD), BOUNDS[dtype])


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Set torch's number of threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every product."""
    rows: list[int] = []
    linear = cpu.linear

    def watched(x_TI: Tensor, *rest: Any, **options: Any) -> Tensor:
        rows.append(len(x_TI))
        return linear(x_TI, *rest, **options)

    monkeypatch.setattr(cpu, "linear", watched)
    return rows


@pytest.mark.parametrize("library", ["onednn"], indirect=True)
@pytest.mark.usefixtures("library")
def test_experts_show_onednn_few_numbers_of_rows(shown: list[int]) -> None:
    """It compiles a product for each."""
    D, every = 32, set()
    norm = Norm(torch.ones(D), torch.zeros(D), 1e-5)
    matrix = cpu.pack_weight(torch.eye(D))
    moe = MoEWeights(torch.zeros(1, D), [matrix], [matrix], torch.zeros(D), 1, False)
    for tokens in range(1, 1025):
        x_TD = torch.zeros(tokens, D)
        shown.clear()
        assert len(cpu.moe_block(x_TD, x_TD.clone(), norm, moe, norm)[0]) == tokens
        assert shown[::2] == shown[1::2]
        assert tokens <= sum(shown[::2]) <= tokens * 17 / 16
        every.update(shown)
    # all up to 32, and 16 in each octave up to 512
    assert len(every) == 32 + 4 * 16


@pytest.mark.skipif("mkl" not in LIBRARIES, reason="torch has no MKL here")
def test_mkl_multiplies_no_rows_in_vain(shown: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrices, "_is_intel", lambda: True)
    model = NomicMoEModel.from_pretrained(data.TINY, device="cpu")
    with torch.no_grad():
        model.forward_packed(torch.arange(129), [100, 29])
    dense = [rows for rows in shown if rows == 129]
    layers, moe = model.config.n_layer, len(model.config.moe_layers)
    assert len(dense) == 2 * layers + 2 * (layers - moe)
    # both products of each expert
    assert sum(shown) - sum(dense) == moe * 2 * 2 * 129


def test_a_torch_without_onednn_imports_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for library in (torch.backends.mkldnn, torch.backends.mkl):
        monkeypatch.setattr(library, "is_available", lambda: False)
    for name in ("mkldnn", "mkl"):
        monkeypatch.setattr(torch.ops, name, object())
    with pytest.MonkeyPatch.context() as patch:
        # imported as for the first time, and gone again
        patch.setattr(nomoe_kernels, "matrices", matrices)
        patch.delitem(sys.modules, "nomoe_kernels.matrices")
        importlib.import_module("nomoe_kernels.matrices")
    reloaded = importlib.reload(cpu)
    assert not reloaded.supports(torch.float32)
    model = NomicMoEModel.from_pretrained(data.TINY, device="cpu")
    assert embed(model).isfinite().all()
    assert not packed(model)


# --- models


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


def packed(model: nn.Module) -> bool:
    found = {part.packed is not None for part in model.modules() if isinstance(part, Packable)}
    assert len(found) == 1
    return found.pop()


def embed(model: NomicMoEModel) -> Tensor:
    with torch.no_grad():
        return model.forward_packed(torch.arange(4, 34), [20, 10])[0]


def same(state: dict[str, Tensor], checkpoint: dict[str, Tensor]) -> bool:
    assert list(state) == list(checkpoint)
    return all(torch.equal(state[name], one) for name, one in checkpoint.items())


def test_state_dict_is_the_checkpoints(model: NomicMoEModel, checkpoint: dict[str, Tensor]) -> None:
    assert same(model.state_dict(), checkpoint)
    embed(model)
    assert same({**model.state_dict(keep_vars=True)}, checkpoint)
    assert isinstance(model.state_dict(keep_vars=True)["emb_ln.weight"], nn.Parameter)


def test_originals_are_freed(model: NomicMoEModel) -> None:
    weight = model.encoder.layers[1].mlp.experts.mlp.w1
    assert weight.shape == (8 * 192, 96)
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
    after = embed(model.eval())
    assert packed(model)
    assert (after - before).abs().max() > 1e-4


def test_a_forward_that_needs_gradients_unpacks(model: NomicMoEModel) -> None:
    output = model.forward_packed(torch.arange(4, 34), [20, 10])[0]
    assert output.requires_grad
    assert not packed(model)
    torch.testing.assert_close(output, embed(model), atol=1e-5, rtol=0)
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
