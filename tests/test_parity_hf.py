"""Parity with Hugging Face code: ours in a small custom-code repository, and the published one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from nomoe import Encoder, data, reference_hf
from nomoe.verify import (
    Check,
    compare_reference,
    reference_texts,
    verify_published,
    verify_reference,
)
from tests.custom_code import modeling_naive
from tests.custom_code.configuration_naive import NaiveNomicConfig
from tests.custom_code.modeling_naive import NaiveNomicModel
from tests.hub_server import HubServer

CUSTOM_CODE = Path(__file__).parent / "custom_code"
AUTO_MAP = {
    "AutoConfig": "configuration_naive.NaiveNomicConfig",
    "AutoModel": "modeling_naive.NaiveNomicModel",
}


@pytest.fixture(autouse=True)
def quiet_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process of the reference inherits these; its products are too small for two cores."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@pytest.fixture
def custom_repo(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The synthetic checkpoint with code of its own, as the published repository has."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "custom_repo"
    shutil.copytree(tiny_folder, folder)
    for file in CUSTOM_CODE.glob("*.py"):
        shutil.copy(file, folder)
    change_config(folder, auto_map=AUTO_MAP)
    return folder


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: v for key, v in values.items() if v is not None}))


def naive_model(folder: Path, **changes: Any) -> NaiveNomicModel:
    """The custom code's model in this process, with random weights."""
    values = json.loads((folder / "config.json").read_text(encoding="utf-8")) | changes
    return NaiveNomicModel(NaiveNomicConfig(**values))


def answers_of(model: NaiveNomicModel, folder: Path) -> dict[str, Tensor]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return reference_hf.run(model, tokenizer, reference_texts(), 512)


def missed(checks: list[Check]) -> list[str]:
    return [check.name for check in checks if check.result != "ok"]


def test_agrees_with_custom_code(custom_repo: Path) -> None:
    # at 128 tokens the long ones of its texts are cut
    encoder = Encoder.from_pretrained(custom_repo, device="cpu", max_seq_length=128)
    before = sorted(custom_repo.rglob("*"))
    checks = verify_reference(encoder, str(custom_repo), None, None)
    assert not missed(checks)
    names = [check.name for check in checks]
    assert sum("hidden state" in name for name in names) == 13
    assert sum("experts that differ" in name for name in names) == 1
    assert sum("pooled" in name for name in names) == 1
    assert {check.bound for check in checks if "hidden" in check.name} == {"<= 0.0001"}
    assert checks[-1].bound == "<= 1e-09"
    assert sorted(custom_repo.rglob("*")) == before


def test_takes_weights_and_code_from_the_hub_at_their_pins(
    custom_repo: Path, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published layout: weights in one repository, the code that runs them in another."""
    pinned = data.published()["checkpoint"]
    weights, code = pinned["repo"], pinned["remote_code_repo"]
    revision, code_revision = pinned["revision"], pinned["remote_code_revision"]
    there = {auto: f"{code}--{name}" for auto, name in AUTO_MAP.items()}
    change_config(custom_repo, auto_map=there)
    for name in list(os.environ):
        if name.startswith("HF_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    # one folder under both names: what comes from which shows in the requests
    server = HubServer(custom_repo, {weights: revision, code: code_revision})
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    assert not missed(verify_reference(encoder, weights, revision, code_revision))
    server.stop()
    asked = {request.path for request in server.requests if "/resolve/" in request.path}
    assert f"/{weights}/resolve/{revision}/model.safetensors" in asked
    assert f"/{code}/resolve/{code_revision}/modeling_naive.py" in asked
    assert all(f"/resolve/{revision}/" in one or f"/{code_revision}/" in one for one in asked)
    assert not (tmp_path / "home" / "modules").exists()


def without_code(folder: Path) -> None:
    # the trap: with no code of its own, "nomic_bert" is transformers' dense model; small under the
    # names by which that knows sizes, it is soon built
    change_config(folder, auto_map=None, hidden_size=96, num_hidden_layers=1)


def with_code_out_of_reach(folder: Path) -> None:
    change_config(folder, auto_map=data.real_config()["auto_map"])


def with_code_that_raises(folder: Path) -> None:
    path = folder / "modeling_naive.py"
    code = path.read_text(encoding="utf-8")
    assert code.count("self.post_init()") == 1
    path.write_text(code.replace("self.post_init()", 'raise KeyError("planted")'))


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no code": (without_code, r"transformers\.models\.nomic_bert.*not the repository's own code"),
    "code out of reach": (with_code_out_of_reach, "couldn't connect"),
    "raises": (with_code_that_raises, "KeyError: 'planted'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_reference_that_does_not_run_is_an_error(
    case: str, custom_repo: Path, encoder: Encoder
) -> None:
    breaks, message = BROKEN[case]
    breaks(custom_repo)
    with pytest.raises(RuntimeError, match=f"(?s)the reference code did not run:.*{message}"):
        verify_reference(encoder, str(custom_repo), None, None)


def test_a_reference_without_numbers_is_an_error(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = modeling_naive.Experts.forward
    monkeypatch.setattr(
        modeling_naive.Experts, "forward", lambda self, *inputs: forward(self, *inputs) * torch.nan
    )
    model = naive_model(tiny_folder)
    reference_hf.fill(model, tiny_folder)
    with pytest.raises(SystemExit, match=r"not finite in \['hidden\.2'"):
        answers_of(model, tiny_folder)


@pytest.mark.parametrize(
    ("layers", "message"), [(14, r"lacks \['encoder\.layers\.12"), (11, r"no place for \['encoder")]
)
def test_a_reference_with_other_tensors_is_an_error(
    layers: int, message: str, tiny_folder: Path
) -> None:
    with pytest.raises(SystemExit, match=message):
        reference_hf.fill(naive_model(tiny_folder, n_layer=layers), tiny_folder)


def test_a_reference_that_hides_its_routing_is_an_error(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self: Any, x_TD: Tensor) -> Any:
        return F.linear(x_TD, self.layer.weight).softmax(dim=-1).topk(self.top_k, dim=-1)

    monkeypatch.setattr(modeling_naive.Router, "forward", forward)
    with pytest.raises(SystemExit, match=r"not call .*'probabilities\.1'"):
        answers_of(naive_model(tiny_folder), tiny_folder)


def test_takes_its_mask_from_older_transformers_or_from_us(tiny_folder: Path) -> None:
    """The published code calls a method of transformers that 5.23 no longer has."""
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    ours = reference_hf.extended_mask(naive_model(tiny_folder), mask, mask.shape)
    lowest = torch.finfo(torch.float32).min
    assert torch.equal(ours, torch.tensor([[[[0, 0, lowest]]], [[[0, 0, 0.0]]]]))


def renormalised(model: NaiveNomicModel, patch: pytest.MonkeyPatch) -> None:
    for part in model.modules():
        if isinstance(part, modeling_naive.Router):
            part.normalize = True


def tanh_gelu(model: NaiveNomicModel, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(F, "gelu", partial(F.gelu, approximate="tanh"))


def bias_in_the_loop(model: NaiveNomicModel, patch: pytest.MonkeyPatch) -> None:
    original = modeling_naive.Experts.forward

    def forward(self: Any, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor) -> Tensor:
        out_TD: Tensor = original(self, x_TD, weights_TK, experts_TK)
        return out_TD - (1 - weights_TK.sum(dim=-1, keepdim=True)) * self.bias

    patch.setattr(modeling_naive.Experts, "forward", forward)


def other_experts(model: NaiveNomicModel, patch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        router = model.encoder.layers[-1].mlp.router.layer
        router.weight.copy_(router.weight.roll(1, dims=0))


PLANTS: dict[str, tuple[Callable[[NaiveNomicModel, pytest.MonkeyPatch], None], str]] = {
    "renormalised weights": (renormalised, "hidden state 2 of 12"),
    "tanh GELU": (tanh_gelu, "hidden state 1 of 12"),
    "bias in the loop": (bias_in_the_loop, "hidden state 2 of 12"),
    "other experts": (other_experts, "experts that differ"),
}


@pytest.mark.parametrize("plant", PLANTS)
def test_a_mistake_on_one_side_is_a_miss(plant: str, tiny_folder: Path, encoder: Encoder) -> None:
    change, expected = PLANTS[plant]
    model = naive_model(tiny_folder)
    reference_hf.fill(model, tiny_folder)
    with pytest.MonkeyPatch.context() as patch:
        change(model, patch)
        answers = answers_of(model, tiny_folder)
    misses = missed(compare_reference(encoder, answers))
    assert any(expected in name for name in misses), misses
    assert any("pooled" in name for name in misses), misses


@pytest.mark.hub
@pytest.mark.slow
def test_published_weights_give_the_published_figures() -> None:
    checks = verify_published(Encoder.from_pretrained(device="cpu"))
    assert len(checks) == 5
    assert not missed(checks)


@pytest.mark.hub
@pytest.mark.slow
def test_published_weights_agree_with_the_published_code() -> None:
    """Needs `einops`, which that code imports."""
    pinned = data.published()["checkpoint"]
    checks = verify_reference(
        Encoder.from_pretrained(device="cpu"),
        pinned["repo"],
        pinned["revision"],
        pinned["remote_code_revision"],
    )
    assert len(checks) == 16
    assert not missed(checks)
