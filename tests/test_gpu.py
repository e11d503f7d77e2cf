"""What only a CUDA device can show."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from nomoe import Encoder, data
from nomoe.verify import verify_golden

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_golden_data(dtype: torch.dtype) -> None:
    checks = verify_golden(torch.device("cuda"), dtype, "auto")
    assert checks
    assert not [check for check in checks if check.result != "ok"]


def test_encoder_defaults(tiny_folder: Path) -> None:
    on_gpu = Encoder.from_pretrained(tiny_folder)
    assert on_gpu.device.type == "cuda"
    assert on_gpu.dtype == torch.float16
    on_cpu = Encoder.from_pretrained(tiny_folder, device="cpu")
    texts = [text for group in data.sentences().values() for text in group]
    vectors = on_gpu.encode_query(texts)
    assert vectors.dtype == np.float32
    cosines = (vectors * on_cpu.encode_query(texts)).sum(1)
    assert np.median(1 - cosines) < 1e-5
    tensor = on_gpu.encode_query(texts, convert_to_tensor=True)
    assert tensor.is_cuda
    assert tensor.dtype == torch.float32


def test_float32_vectors_agree_with_the_cpu(tiny_folder: Path) -> None:
    texts = [text for group in data.sentences().values() for text in group]
    cuda = Encoder.from_pretrained(tiny_folder, device="cuda", dtype="float32")
    cpu = Encoder.from_pretrained(tiny_folder, device="cpu", dtype="float32")
    assert np.abs(cuda.encode_query(texts) - cpu.encode_query(texts)).max() < 1e-5


def test_moving_an_encoder(tiny_folder: Path) -> None:
    encoder = Encoder.from_pretrained(tiny_folder, device="cpu")
    before = encoder.encode_query("a")
    after = encoder.encode("a", prompt_name="query", device="cuda")
    assert encoder.device.type == "cuda"
    assert np.abs(after - before).max() < 1e-5
