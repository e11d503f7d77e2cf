"""`device_map` and `dtype` together, which need accelerate."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

import nomoe
from nomoe import NomicMoEModel

IDS = torch.tensor([[0, 17, 900, 1234, 5, 77, 2], [0, 9, 2, 1, 1, 1, 1]])
MASK = (IDS != 1).long()


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    nomoe.register()
    yield
    nomoe.unregister()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, {"": torch.device("cpu")}])
@torch.no_grad()
def test_same_bits(device_map: Any, dtype: str, tiny_folder: Path) -> None:
    model = AutoModel.from_pretrained(tiny_folder, device_map=device_map, dtype=dtype)
    ours = NomicMoEModel.from_pretrained(tiny_folder, device="cpu", dtype=dtype)
    assert not list(model.buffers())
    expected = ours(IDS, MASK, output_hidden_states=True).hidden_states
    found = model(IDS, MASK, output_hidden_states=True).hidden_states
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_meta_holds_nothing(tiny_folder: Path) -> None:
    model = AutoModel.from_pretrained(tiny_folder, device_map="meta")
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("device_map", ["cuda", "auto", {"": 0}])
@torch.no_grad()
def test_cuda_gets_its_kernels(device_map: Any, tiny_folder: Path) -> None:
    model = AutoModel.from_pretrained(tiny_folder, device_map=device_map, dtype="float16")
    assert model.device.type == "cuda"
    ours = NomicMoEModel.from_pretrained(tiny_folder, device="cuda", dtype="float16")
    assert model.backend.name == ours.backend.name
    assert torch.equal(model(IDS.cuda(), MASK.cuda())[0], ours(IDS.cuda(), MASK.cuda())[0])


def test_several_devices_are_refused(tiny_folder: Path) -> None:
    spread = {"embeddings": "cpu", "emb_ln": "cpu", "encoder": "disk"}
    with pytest.raises(ValueError, match="spreads the model over cpu, disk"):
        AutoModel.from_pretrained(tiny_folder, device_map=spread)
