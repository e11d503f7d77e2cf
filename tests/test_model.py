"""The model against an independent float64 oracle, its two doors, and what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import peers
from nomoe import NomicMoEConfig, NomicMoEModel, data
from nomoe.arguments import resolve_device, resolve_dtype
from nomoe.backends import Backend, BackendName, Pooling, select_backend
from nomoe.synthetic import random_model
from nomoe.verify import compare_float32, golden_cases
from nomoe_kernels import checks, reference
from tests import oracle

BASE: dict[str, Any] = {
    "n_embd": 48,
    "n_head": 4,
    "n_inner": 80,
    "n_layer": 4,
    "vocab_size": 100,
    "n_positions": 64,
}


def config_of(**changes: Any) -> NomicMoEConfig:
    return NomicMoEConfig.from_dict(data.real_config() | BASE | changes)


def batch_of(lengths: list[int], vocabulary: int = 100) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(0, vocabulary, (length,), generator=generator).tolist() for length in lengths
    ]


def packed(texts: list[list[int]]) -> tuple[Tensor, list[int]]:
    return torch.tensor([one for text in texts for one in text]), [len(text) for text in texts]


def padded(texts: list[list[int]], side: str = "right") -> tuple[Tensor, Tensor]:
    longest = max(len(text) for text in texts)
    ids, mask = [], []
    for text in texts:
        fill = longest - len(text)
        row, real = ([1] * fill, [0] * fill) if fill else ([], [])
        ids.append(text + row if side == "right" else row + text)
        ones = [1] * len(text)
        mask.append(ones + real if side == "right" else real + ones)
    return torch.tensor(ids), torch.tensor(mask)


VARIANTS: dict[str, dict[str, Any]] = {
    "published": {},
    "top 1": {"moe_top_k": 1},
    "top 3 of 5": {"moe_top_k": 3, "num_experts": 5},
    "all experts": {"moe_top_k": 4, "num_experts": 4},
    "renormalised": {"moe_normalize_expert_weights": True},
    "every third layer": {"moe_every_n_layers": 3, "n_layer": 5},
    "rotary base": {"rotary_emb_base": 1000},
    "eps": {"layer_norm_epsilon": 1e-2},
    "one head": {"n_head": 1},
    "default width": {"n_inner": None},
    "odd width": {"n_inner": 33},
}


@pytest.mark.parametrize("variant", list(VARIANTS))
@torch.no_grad()
def test_against_the_oracle(variant: str) -> None:
    config = config_of(**VARIANTS[variant])
    model = random_model(config, seed=3)
    state = model.state_dict()
    # ids 0 to 3 are special; <pad> (1) as a real token, a repeat, and neighbours of equal length
    texts = [[0, 1, 1, 2], *batch_of([1, 9, 9, 23])]
    ids_T, lengths = packed(texts)
    output = model.forward_packed(ids_T, lengths, output_hidden_states=True, output_routing=True)
    answers = [oracle.encode(config, state, text) for text in texts]

    assert output.hidden_states is not None
    assert output.router_experts is not None
    assert output.router_weights is not None
    for layer, hidden_TD in enumerate(output.hidden_states):
        expected = torch.cat([answer.hidden[layer] for answer in answers])
        assert (hidden_TD.double() - expected).abs().max() < 1e-5, layer
    for layer, experts_TK in enumerate(output.router_experts):
        expected = torch.cat([answer.probabilities[layer] for answer in answers])
        assert torch.equal(experts_TK, expected.topk(config.moe_top_k).indices)
        chosen = expected.gather(1, experts_TK)
        if config.moe_normalize_expert_weights:
            chosen = chosen / chosen.sum(1, keepdim=True)
        assert (output.router_weights[layer].double() - chosen).abs().max() < 1e-6
    assert len(output.router_experts) == len(config.moe_layers)


def test_gradients_against_the_oracle() -> None:
    config = config_of()
    model = random_model(config, seed=5)
    texts = batch_of([7, 12])
    weights = torch.randn(19, config.n_embd, generator=torch.Generator().manual_seed(1))
    ids_T, lengths = packed(texts)
    (model.forward_packed(ids_T, lengths).last_hidden_state * weights).sum().backward()

    state = {name: one.detach().double().requires_grad_() for name, one in model.named_parameters()}
    hidden = torch.cat([oracle.encode(config, state, text).hidden[-1] for text in texts])
    (hidden * weights.double()).sum().backward()
    for name, parameter in model.named_parameters():
        expected = state[name].grad
        assert parameter.grad is not None, name
        assert expected is not None
        scale = expected.abs().max().clamp(min=1e-3)
        assert (parameter.grad.double() - expected).abs().max() / scale < 1e-4, name


def test_gradients_flow_through_the_padded_door() -> None:
    model = random_model(config_of(), seed=5)
    ids, mask = padded(batch_of([7, 12]))
    model(ids, mask)[0].square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_padding_changes_nothing(side: str) -> None:
    model = random_model(config_of(), seed=0)
    texts = batch_of([5, 17, 1, 17])
    ids, mask = padded(texts, side)
    output = model(ids, mask, output_hidden_states=True, output_routing=True)
    plain = model.forward_packed(*packed(texts), output_hidden_states=True, output_routing=True)
    real = mask.bool()
    for ours, expected in zip(output.hidden_states, plain.hidden_states, strict=True):
        assert ours.shape == (*ids.shape, 48)
        assert (ours[real] - expected).abs().max() < 1e-5
        assert (ours[~real] == 0).all()
    for ours, expected in zip(output.router_experts, plain.router_experts, strict=True):
        assert torch.equal(ours, expected)
    assert output[0] is output.last_hidden_state
    assert output.last_hidden_state is not None
    # the filler's value is never seen
    other = ids.masked_fill(~real, 99)
    assert torch.equal(model(other, mask)[0], output[0])


@torch.no_grad()
def test_a_gap_in_the_mask_keeps_its_distance() -> None:
    model = random_model(config_of(), seed=0)
    (text,) = batch_of([9])
    mask = torch.ones(1, 9, dtype=torch.int64)
    mask[0, 4] = 0
    with_gap = model(torch.tensor([text]), mask)[0][0, mask[0].bool()]
    closed = model.forward_packed(torch.tensor(text[:4] + text[5:]), [8])[0]
    assert (with_gap - closed).abs().max() > 1e-3


@torch.no_grad()
def test_without_mask_and_with_empty_rows() -> None:
    model = random_model(config_of(), seed=0)
    ids = torch.tensor(batch_of([6, 6]))
    assert torch.equal(model(ids)[0], model(ids, torch.ones_like(ids))[0])
    mask = torch.ones_like(ids)
    mask[0] = 0
    output = model(ids, mask)[0]
    assert (output[0] == 0).all()
    assert (output[1] - model(ids)[0][1]).abs().max() < 1e-6
    assert model(ids, torch.zeros_like(ids))[0].abs().sum() == 0
    assert model(torch.empty(0, 5, dtype=torch.int64))[0].shape == (0, 5, 48)
    assert model.forward_packed(torch.empty(0, dtype=torch.int64), [])[0].shape == (0, 48)


@torch.no_grad()
def test_accepts_what_tokenizers_give() -> None:
    model = random_model(config_of(), seed=0)
    ids, mask = padded(batch_of([4, 8]))
    expected = model(ids, mask)[0]
    for batch in (
        {"input_ids": ids.int(), "attention_mask": mask.int()},
        {"input_ids": ids.to(torch.uint8), "attention_mask": mask.to(torch.int16)},
        {"input_ids": ids, "attention_mask": mask.bool()},
        {"input_ids": ids, "attention_mask": mask.float()},
        {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)},
    ):
        assert torch.equal(model(**batch)[0], expected)
    lengths = torch.tensor([4, 8])
    flat = ids[mask.bool()]
    assert torch.equal(
        model.forward_packed(flat, lengths)[0], model.forward_packed(flat, [4, 8])[0]
    )


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "one dimension": ({"input_ids": torch.tensor([1, 2])}, "expected \\(texts, tokens\\)"),
    "floats": ({"input_ids": torch.rand(1, 3)}, "input_ids has dtype"),
    "mask shape": (
        {"input_ids": torch.ones(1, 3).long(), "attention_mask": torch.ones(1, 4)},
        "attention_mask is \\(1, 4\\)",
    ),
    "mask values": (
        {"input_ids": torch.ones(1, 2).long(), "attention_mask": torch.tensor([[1, 2]])},
        "other than 0 and 1",
    ),
    "types": (
        {"input_ids": torch.ones(1, 2).long(), "token_type_ids": torch.tensor([[0, 1]])},
        "token_type_ids",
    ),
    "beyond the vocabulary": ({"input_ids": torch.tensor([[0, 128]])}, "vocabulary of 128"),
    "negative": ({"input_ids": torch.tensor([[0, -1]])}, "from -1 to 0"),
    "too long": ({"input_ids": torch.ones(1, 65).long()}, "65 tokens, the model takes at most 64"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_refuses_bad_batches(case: str) -> None:
    model = random_model(config_of(), seed=0)
    inputs, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        model(**inputs)


@pytest.mark.parametrize(
    "lengths",
    [
        [2, 2],
        [5],
        [3, 0],
        [4, -1],
        [1.5, 1.5],
        torch.tensor([1.5, 1.5]),
        torch.tensor(3),
        torch.tensor([[3]]),
    ],
)
def test_refuses_bad_lengths(lengths: Any) -> None:
    model = random_model(config_of(), seed=0)
    with pytest.raises(ValueError, match="lengths"):
        model.forward_packed(torch.tensor([1, 2, 3]), lengths)


def test_lengths_may_be_numbers_of_any_kind() -> None:
    model = random_model(config_of(), seed=0)
    ids_T = torch.tensor([1, 2, 3])
    expected_TD = model.forward_packed(ids_T, [1, 2])[0]
    for lengths in (np.array([1, 2]), [np.int64(1), torch.tensor(2)], torch.tensor([1, 2])):
        assert torch.equal(model.forward_packed(ids_T, lengths)[0], expected_TD)


def test_state_dict_is_the_checkpoints() -> None:
    with torch.device("meta"):
        model = NomicMoEModel(NomicMoEConfig.from_dict(data.real_config()))
    state = model.state_dict()
    published = data.published()["checkpoint"]
    assert len(state) == published["tensors"]
    assert sum(one.numel() for one in state.values()) == published["parameters"]
    assert state["embeddings.word_embeddings.weight"].shape == (250_048, 768)
    assert state["encoder.layers.11.mlp.experts.mlp.w2"].shape == (8 * 3072, 768)
    assert state["encoder.layers.1.mlp.router.layer.weight"].shape == (8, 768)
    assert not list(model.buffers()), "transformers 5 fills buffers with uninitialised memory"


@torch.no_grad()
def test_copies_and_pickles() -> None:
    model = random_model(config_of(), seed=0)
    ids = torch.tensor(batch_of([6]))
    expected = model(ids)[0]
    assert torch.equal(copy.deepcopy(model)(ids)[0], expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(ids)[0], expected)


@torch.no_grad()
def test_a_fresh_model_is_finite() -> None:
    torch.manual_seed(0)
    model = NomicMoEModel(config_of())
    assert torch.isfinite(model(torch.tensor(batch_of([6])))[0]).all()
    weights = model.state_dict()
    assert weights["encoder.layers.0.norm1.weight"].eq(1).all()
    assert weights["encoder.layers.1.mlp.experts.bias"].eq(0).all()
    assert 0.015 < weights["encoder.layers.1.mlp.experts.mlp.w1"].std() < 0.025


@pytest.mark.usefixtures("library")
@torch.no_grad()
def test_batch_mates_move_a_text_by_at_most_5e_7(full_width: NomicMoEModel) -> None:
    """Full width, float32: pooled unit vectors alone and inside batches of other texts.

    But for texts with a token so near a tie that rounding decides.
    """
    # laid out for this test's library, and for that of this CPU again
    full_width.train().eval()
    texts = batch_of([3, 16, 90, 16, 7, 128, 33, 5, *range(6, 48, 2)], vocabulary=4096)
    pool, pooling = full_width.backend.ops.pool, Pooling(full_width.config.n_embd, False, True)

    def embed(batch: list[list[int]]) -> Tensor:
        ids_T, lengths = packed(batch)
        hidden_TD = full_width.forward_packed(ids_T, lengths)[0]
        return pool(hidden_TD, lengths, pooling)

    near = peers.Packed(full_width).near_ties(texts, 1e-6)
    assert len(near) <= 1
    clear = [place for place in range(len(texts)) if place not in near]
    alone = torch.cat([embed([text]) for text in texts])
    together, turned = embed(texts), embed(texts[::-1]).flip(0)
    full_width.train().eval()
    for vectors in (together, turned):
        assert (vectors - alone)[clear].abs().max() <= 5e-7


@torch.no_grad()
def test_autocast_leaves_the_router_in_float32() -> None:
    torch.manual_seed(0)
    x_TD, weight_ED = torch.randn(64, 96), torch.randn(8, 96) / 10
    expected = reference.route(x_TD, weight_ED, 2)
    with torch.autocast("cpu", torch.bfloat16):
        weights_TK, experts_TK = reference.route(x_TD, weight_ED, 2)
    assert torch.equal(weights_TK, expected[0])
    assert torch.equal(experts_TK, expected[1])


def test_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(checks, "INTERPRETED", False)
    assert select_backend("auto", cpu) == Backend(
        "torch", "Triton's kernels need CUDA, and this is cpu"
    )
    assert select_backend("torch", cpu).reason == "asked for"
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot run: Triton's kernels need"):
        select_backend("triton", cpu)
    with pytest.raises(RuntimeError, match="batch_invariant=True cannot run"):
        select_backend("torch", cpu, batch_invariant=True)
    with pytest.raises(ValueError, match="expected 'auto', 'torch' or 'triton'"):
        select_backend("cuda", cpu)  # type: ignore[arg-type]

    monkeypatch.setattr(checks, "INTERPRETED", True)
    assert select_backend("triton", cpu).name == "triton"
    assert select_backend("auto", cpu).name == "torch", "the interpreter is for tests"
    with pytest.raises(RuntimeError, match="bfloat16 wrongly"):
        select_backend("triton", cpu, dtype=torch.bfloat16)

    monkeypatch.setattr(checks, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert select_backend("auto", cuda).name == "triton"
    monkeypatch.setattr("nomoe.backends.find_spec", lambda name: None)
    assert select_backend("auto", cuda) == Backend("torch", "triton is not installed")
    with pytest.raises(RuntimeError, match="triton is not installed; use 'auto' or 'torch'"):
        select_backend("triton", cuda)


def test_kernels_follow_loaded_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a module around the model too."""
    monkeypatch.setattr(checks, "INTERPRETED", True)
    state = NomicMoEModel.from_pretrained(data.TINY, device="cpu").state_dict()
    config = NomicMoEConfig.from_json(data.TINY / "config.json")
    with torch.device("meta"):
        model = NomicMoEModel(config, backend="triton")
    assert model.backend == Backend("torch", "its weights are on no device yet")
    around = torch.nn.Sequential(model)
    around.load_state_dict({"0." + name: one for name, one in state.items()}, assign=True)
    assert model.backend == Backend("triton", "asked for")
    with pytest.raises(RuntimeError, match="bfloat16 wrongly"):
        model.load_state_dict({name: one.bfloat16() for name, one in state.items()}, assign=True)
    with pytest.raises(RuntimeError, match="bfloat16 wrongly"):
        model(torch.tensor([[0, 5, 2]]))


def test_weights_put_in_one_by_one_get_the_kernels_that_were_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As accelerate does: no hook of loading, and no move of the module, tells of it."""
    state = NomicMoEModel.from_pretrained(data.TINY, device="cpu").state_dict()
    with torch.device("meta"):
        model = NomicMoEModel(NomicMoEConfig.from_json(data.TINY / "config.json"), backend="triton")
    for name, tensor in state.items():
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, torch.nn.Parameter(tensor))
    ids_BL = torch.tensor([[0, 5, 2]])
    monkeypatch.setattr(checks, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match="need CUDA, and this is cpu"):
        model(ids_BL)
    monkeypatch.setattr(checks, "INTERPRETED", True)
    assert model(ids_BL)[0].isfinite().all()
    assert model.backend == Backend("triton", "asked for")


def test_kernels_do_not_outlast_weights_that_only_pass_through(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checks, "INTERPRETED", True)
    state = NomicMoEModel.from_pretrained(data.TINY, device="cpu").state_dict()
    config = NomicMoEConfig.from_json(data.TINY / "config.json")
    with torch.device("meta"):
        model = NomicMoEModel(config, backend="triton").requires_grad_(False)
    ids_BL = torch.tensor([[0, 5, 2]])
    assert torch.func.functional_call(model, state, (ids_BL,))[0].isfinite().all()
    assert model.backend == Backend("torch", "its weights are on no device yet")
    with pytest.raises(RuntimeError, match="bfloat16 wrongly"):
        torch.func.functional_call(
            model, {name: one.bfloat16() for name, one in state.items()}, (ids_BL,)
        )


def test_a_pickled_model_chooses_its_kernels_where_it_is_loaded() -> None:
    model = NomicMoEModel.from_pretrained(data.TINY, device="cpu")
    expected = model.backend
    model.backend = Backend("triton", "cuda:0 runs Triton kernels")
    assert pickle.loads(pickle.dumps(model)).backend == expected


def test_a_config_the_kernels_cannot_run_is_refused_before_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "INTERPRETED", True)
    raw = json.loads((data.TINY / "config.json").read_text()) | {"n_head": 1}
    # there are no weights to be found
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(RuntimeError, match="heads of 64 features at most"):
        NomicMoEModel.from_pretrained(tmp_path, device="cpu", backend="triton")


@pytest.mark.parametrize(
    ("changes", "dtype", "reason"),
    [
        ({"num_experts": 65}, torch.float16, "has 65 and 2"),
        ({"num_experts": 16, "moe_top_k": 9}, torch.float16, "has 16 and 9"),
        ({"n_inner": 200}, torch.float16, "are 96 and 200"),
        ({"n_head": 1}, torch.float16, "heads of 64 features at most, the model's have 96"),
        ({}, torch.float64, "do not take torch.float64"),
    ],
)
def test_models_the_kernels_cannot_run(
    changes: dict[str, int],
    dtype: torch.dtype,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    config = NomicMoEConfig.from_json(data.TINY / "config.json")
    config = dataclasses.replace(config, **changes)
    cuda = torch.device("cuda")
    backend = select_backend("auto", cuda, dtype=dtype, config=config)
    assert backend.name == "torch"
    assert reason in backend.reason
    with pytest.raises(RuntimeError, match=reason):
        select_backend("triton", cuda, dtype=dtype, config=config)


@pytest.mark.parametrize(
    ("release", "is_wrong"),
    [((3, 6, 0), True), ((3, 7, 0), True), ((3, 7, 1), False), ((3, 8, 0), False)],
)
def test_a_triton_that_is_wrong_on_a_device(
    release: tuple[int, ...], is_wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = pytest.importorskip("nomoe_kernels.checks")
    monkeypatch.setattr(checks, "RELEASE", release)
    cuda = torch.device("cuda")
    for capability in ((9, 0), (10, 0), (10, 3), (12, 0)):
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda device, found=capability: found
        )
        if is_wrong and capability[0] == 10:
            assert select_backend("auto", cuda).name == "torch"
            with pytest.raises(RuntimeError, match=r"before 3\.7\.1 leaves out fences"):
                select_backend("triton", cuda)
        else:
            assert select_backend("auto", cuda).name == "triton"


def test_old_devices_take_the_torch_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    cuda = torch.device("cuda")
    assert select_backend("auto", cuda).name == "torch"
    with pytest.raises(RuntimeError, match=r"compute capability 7.5, below 8.0"):
        select_backend("triton", cuda)


def test_kernels_follow_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("auto")
    assert model.backend.name == "torch"
    # as if it were moved to CUDA: what `auto` picks depends on where the weights are going
    monkeypatch.setattr(
        "nomoe.model.select_backend",
        lambda name, device, **given: Backend("triton" if name == "auto" else "torch", ""),
    )
    assert model.float().backend.name == "triton"
    assert tiny_model("torch").float().backend.name == "torch"


@pytest.mark.slow
def test_triton_backend_under_the_interpreter() -> None:
    model = tiny_model("triton")
    assert model.backend.name == "triton"
    for case in golden_cases(data.TINY):
        missed = [one for one in compare_float32(model, case, "tiny") if one.result != "ok"]
        assert not missed
    with pytest.raises(RuntimeError, match="bfloat16 wrongly"):
        model.bfloat16()
    assert (model.dtype, model.backend.name) == (torch.float32, "triton"), "refused, not half done"


def test_triton_backend_refuses_to_train() -> None:
    model = tiny_model("triton")
    ids_T = torch.tensor([0, 5, 2])
    output = model.forward_packed(ids_T, [3], output_hidden_states=True)
    for hidden_TD in (output[0], output.hidden_states[0], output.hidden_states[3]):
        with pytest.raises(RuntimeError, match="no backward pass: train with backend='torch'"):
            hidden_TD.sum().backward()
    # a head of one's own trains on vectors, and must not hide that the encoder does not
    head = torch.nn.Linear(96, 2)
    hidden_TD = model.forward_packed(ids_T, [3])[0]
    pooled_BD = model.backend.ops.pool(hidden_TD, [3], Pooling(96, True, True))
    with pytest.raises(RuntimeError, match="no backward pass"):
        head(pooled_BD).sum().backward()
    with torch.no_grad():
        assert not model.forward_packed(ids_T, [3])[0].requires_grad


def tiny_model(backend: BackendName) -> NomicMoEModel:
    return NomicMoEModel.from_pretrained(data.TINY, device="cpu", backend=backend)


def test_devices_and_dtypes() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert resolve_dtype(None, cpu) is torch.float32
    assert resolve_dtype(None, cuda) is torch.float16
    assert resolve_dtype("bfloat16", cpu) is torch.bfloat16
    assert resolve_dtype(torch.float16, cpu) is torch.float16
    for wrong in ("int8", "float64", torch.float64):
        with pytest.raises(ValueError, match="expected one of float32, float16, bfloat16"):
            resolve_dtype(wrong, cpu)
    for wrong in ("gpu", ["cpu", "cpu"]):
        with pytest.raises(ValueError, match=f"device is {re.escape(repr(wrong))}"):
            resolve_device(wrong)  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        assert resolve_device(None) == cpu
        with pytest.raises(RuntimeError, match="no CUDA device"):
            resolve_device("cuda")
