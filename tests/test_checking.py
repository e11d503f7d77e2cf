"""`nomoe.check`, and what it is for: the native class, which loads this checkpoint in silence."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModel

import nomoe
from nomoe import Encoder
from nomoe.integrations.transformers import HFNomicMoEModel
from tests.hf import batch, native_can_load


def test_the_native_class_and_what_check_says_of_it(tiny_folder: Path, tmp_path: Path) -> None:
    """Without `register` this checkpoint loads silently, as another model with random weights."""
    folder = native_can_load(tiny_folder, tmp_path / "native")
    inputs = batch(folder)
    first, second = (AutoModel.from_pretrained(folder) for _ in range(2))
    assert type(first) is transformers.NomicBertModel
    assert not [name for name in first.state_dict() if "expert" in name or "router" in name]
    with torch.no_grad():
        states = [model(**inputs)[0] for model in (first, second)]
    assert all(one.isfinite().all() and one.shape[-1] == 96 for one in states)
    # the same files, and not even the same vectors twice
    assert (states[0] - states[1]).abs().max() > 0.1
    with pytest.raises(ValueError, match=r"8 experts: they were thrown away.*nomoe\.register\(\)"):
        nomoe.check(first)
    with pytest.raises(ValueError, match="thrown away"):
        nomoe.check(nn.Sequential(nn.Linear(2, 2), second))
    nomoe.register()
    try:
        nomoe.check(AutoModel.from_pretrained(folder))
    finally:
        nomoe.unregister()


def test_check_takes_what_is_right(tiny_folder: Path, encoder: Encoder) -> None:
    encoder.encode("search_query: packs the matrices")
    layer = encoder.model.encoder.layers[0].attn.Wqkv
    assert layer.packed is not None
    [matrix] = layer.packed["weight"]
    holder = SimpleNamespace(model=encoder)
    for model in (encoder, encoder.model, holder, HFNomicMoEModel.from_pretrained(tiny_folder)):
        nomoe.check(model)
    # without unpacking anything
    assert layer.packed["weight"][0] is matrix


def test_check_finds_what_is_missing(tiny_folder: Path) -> None:
    model = HFNomicMoEModel.from_pretrained(tiny_folder)
    experts = model.encoder.layers[3].mlp.experts.mlp
    w2 = experts.w2
    experts.w2 = None
    with pytest.raises(
        ValueError, match=r"lacks 1 of .* 148 tensors: encoder\.layers\.3.*w2: miss"
    ):
        nomoe.check(model)
    experts.w2 = nn.Parameter(w2[:-1])
    with pytest.raises(ValueError, match=r"w2: shape \[1535, 96\], expected \[1536, 96\]"):
        nomoe.check(model)


def test_check_sees_through_adapters(tiny_folder: Path) -> None:
    """PEFT's `modules_to_save` keeps a module beside its copy, and LoRA keeps it as base_layer."""
    model = HFNomicMoEModel.from_pretrained(tiny_folder)
    moe = model.encoder.layers[3].mlp
    attention = model.encoder.layers[3].attn
    original, copied = moe.router, nn.ModuleDict({"default": copy.deepcopy(moe.router)})
    moe.router = nn.ModuleDict({"original_module": original, "modules_to_save": copied})
    attention.Wqkv = nn.ModuleDict({"base_layer": attention.Wqkv})
    nomoe.check(model)
    original.layer.weight = None
    with pytest.raises(
        ValueError, match=r"lacks 1 of .*layers\.3\.mlp\.router\.layer\.weight: miss"
    ):
        nomoe.check(model)


@pytest.mark.parametrize("bad_is_first", [True, False])
def test_check_looks_at_every_model(bad_is_first: bool, tiny_folder: Path) -> None:
    good, bad = (HFNomicMoEModel.from_pretrained(tiny_folder) for _ in range(2))
    nomoe.check(nn.ModuleDict({"query": good, "document": bad}))
    bad.encoder.layers[3].mlp.experts.mlp.w2 = None
    with pytest.raises(ValueError, match="lacks 1 of"):
        nomoe.check(nn.ModuleList([bad, good] if bad_is_first else [good, bad]))


@pytest.mark.parametrize(("model", "error"), [("text", TypeError), (nn.Linear(2, 2), ValueError)])
def test_check_refuses_what_is_no_model(model: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"is str, expected a torch module|holds no nomic_bert"):
        nomoe.check(model)
