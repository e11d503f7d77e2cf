"""Threads, forks and handlers of signals that share a packed model."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pkgutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nomoe import NomicMoEModel, packable
from nomoe.packable import LAYING_OUT, Packable
from nomoe_kernels import cpu
from tests.conftest import VENDORS
from tests.test_cpu_ops import DTYPES, embed, packed

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not DTYPES, reason="torch has no oneDNN here")


@pytest.fixture
def model(packed_model: NomicMoEModel) -> NomicMoEModel:
    return packed_model


@pytest.mark.parametrize(
    "way", ["layer.weight", "layer.weight.data", "layer._parameters['weight']", "kept"]
)
def test_a_thread_may_write_while_another_embeds(way: str, library: str) -> None:
    """All that it writes stays, no memory is freed under it, and nobody waits for ever.

    Torch has a lock of its own, for which it may wait while it holds Python's. A process apart,
    since a mistake here ends one.
    """
    code = (
        "import sys, threading, time, torch; sys.path[:0] = ['.', 'kernels']\n"
        "from nomoe import NomicMoEModel, data\n"
        "from nomoe_kernels import matrices\n"
        f"matrices._vendor = lambda: '{VENDORS[library]}'\n"
        "torch.set_num_threads(1); sys.setswitchinterval(1e-5); torch.set_grad_enabled(False)\n"
        "model = NomicMoEModel.from_pretrained(data.TINY, device='cpu')\n"
        "layer = model.encoder.layers[0].attn.Wqkv\n"
        "layer.weight.zero_()\n"
        "end, writes, packings = time.time() + 3, 0, 0\n"
        "def write():\n"
        "    global writes\n"
        "    torch.set_grad_enabled(False)\n"
        "    while time.time() < end:\n"
        f"        {'kept = layer.weight' if way == 'kept' else ''}\n"
        f"        for _ in range(300): {way}.add_(1); writes += 1\n"
        "        kept = None\n"
        "        time.sleep(0.01)\n"
        "thread = threading.Thread(target=write); thread.start()\n"
        "while time.time() < end:\n"
        "    model.forward_packed(torch.arange(4, 34), [20, 10])\n"
        "    packings += layer.packed is not None\n"
        "thread.join()\n"
        "assert layer.weight.eq(writes).all(), (writes, layer.weight)\n"
        "assert writes > 100 and packings > 10, (writes, packings)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize(
    "where", ["encoder.layers.0.attn.Wqkv", "encoder.layers.1.mlp.experts.mlp"]
)
def test_whoever_comes_while_a_layer_is_packed_keeps_it(
    where: str, model: NomicMoEModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread, between a first look at who holds the parameters and the last."""
    before = embed(model)
    model.train().eval()
    layer = model.get_submodule(where)
    looked = Packable._to_seal
    kept = []

    def look(part: Packable) -> dict[str, nn.Parameter]:
        found = looked(part)
        if part is layer:
            kept.append(part._parameters[next(iter(part.stacks))])
        return found

    monkeypatch.setattr(Packable, "_to_seal", look)
    torch.testing.assert_close(embed(model), before, atol=1e-5, rtol=0)
    assert layer.packed is None
    with torch.no_grad():
        kept[0].mul_(2)
    after = embed(model)
    assert not torch.allclose(after, before, atol=1e-3)
    monkeypatch.undo()
    kept.clear()
    torch.testing.assert_close(embed(model), after, atol=1e-5, rtol=0)
    assert layer.packed is not None


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("function", ["nomoe_kernels.cpu.pack_weight", "torch.full"])
def test_what_breaks_packing_off_leaves_the_weights(
    function: str,
    error: type[BaseException],
    model: NomicMoEModel,
    checkpoint: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = embed(model)
    model.train().eval()
    function_itself = pkgutil.resolve_name(function)
    calls = iter(range(1000))

    def broken(*arguments: Any, **options: Any) -> Any:
        # in the second of a layer's two parameters
        if next(calls) == (14 if "pack_weight" in function else 7):
            raise error
        return function_itself(*arguments, **options)

    monkeypatch.setattr(function, broken)
    with pytest.raises(error):
        embed(model)
    monkeypatch.undo()
    for part in model.modules():
        for raw in part._parameters.values():
            assert type(raw) is nn.Parameter or raw is None or raw.seal
    for name, one in model.state_dict().items():
        assert one.equal(checkpoint[name]), name
    assert torch.equal(embed(model), before)
    assert packed(model)


@pytest.mark.parametrize("asks", ["for a state", "for vectors"])
def test_a_handler_may_ask_while_its_thread_packs(
    asks: str,
    model: NomicMoEModel,
    checkpoint: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One of a signal that saves the model, say, or of the garbage collector."""
    before = embed(model)
    model.train().eval()
    pack_weight = cpu.pack_weight
    calls = iter(range(1000))

    def interrupted(weight_OI: Tensor) -> Any:
        if next(calls) == 14:
            if asks == "for a state":
                for name, one in model.state_dict().items():
                    assert one.equal(checkpoint[name]), name
            else:
                torch.testing.assert_close(embed(model), before, atol=1e-5, rtol=0)
        return pack_weight(weight_OI)

    monkeypatch.setattr(cpu, "pack_weight", interrupted)
    torch.testing.assert_close(embed(model), before, atol=1e-5, rtol=0)
    assert next(calls) > 15
    assert torch.equal(embed(model), before)
    assert packed(model)


@pytest.mark.parametrize("late", [False, True])
def test_a_handler_may_ask_while_memory_is_freed(
    late: bool,
    model: NomicMoEModel,
    checkpoint: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = embed(model)
    model.train().eval()
    layer = model.encoder.layers[1].mlp.experts.mlp
    point = packable._point
    asked = []

    def interrupted(parameter: nn.Parameter, tensor: Tensor) -> None:
        if late:
            point(parameter, tensor)
        if not asked and parameter is layer._parameters["w2"]:
            asked.append(True)
            assert all(one.equal(checkpoint[name]) for name, one in model.state_dict().items())
        if not late:
            point(parameter, tensor)

    monkeypatch.setattr(packable, "_point", interrupted)
    torch.testing.assert_close(embed(model), before, atol=1e-5, rtol=0)
    assert asked
    monkeypatch.undo()
    assert all(one.equal(checkpoint[name]) for name, one in model.state_dict().items())
    assert torch.equal(embed(model), before)
    assert packed(model)


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
