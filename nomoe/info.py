"""What `nomoe info` shows."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

from .arguments import resolve_device, resolve_dtype
from .checkpoint import DEFAULT_REPO, DEFAULT_REVISION, find_weights, locate
from .moe import Linear, cpu_ops, select_backend

_PACKAGES = (
    "nomoe",
    "torch",
    "triton",
    "safetensors",
    "tokenizers",
    "huggingface-hub",
    "numpy",
    "transformers",
    "sentence-transformers",
)


def _bfloat16_gain() -> str:
    """What dtype="bfloat16" would change on this CPU, from a quick measurement."""
    seconds = {dtype: _product_seconds(dtype) for dtype in (torch.float32, torch.bfloat16)}
    before, after = seconds.values()
    if before is None or after is None:
        return "no fast products on this CPU; float32 is the better dtype"
    gain = f"its products take {after / before:.2f} of float32's time here (just measured)"
    return f"{gain}; dtype='bfloat16' asks for it" if after < 0.9 * before else gain


@torch.no_grad()
def _product_seconds(dtype: torch.dtype) -> float | None:
    """Time of one product of the dense feed-forward at 512 tokens; None where it is not fast."""
    ops = cpu_ops(dtype)
    if ops is None:
        return None
    layer = Linear(768, 3072).to(dtype)
    layer.pack()
    x_TD = torch.ones(512, 768, dtype=dtype)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        layer(x_TD, ops)
        times.append(time.perf_counter() - start)
    return min(times)


def describe(device: str | None = None) -> Iterator[tuple[str, str]]:
    """Yield a name and a value for each fact about this installation.

    Raises:
        RuntimeError: The device is not available.
    """
    resolved = resolve_device(device)
    yield "python", platform.python_version()
    for package in _PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            yield package, "not installed"
    if resolved.type == "cuda":
        properties = torch.cuda.get_device_properties(resolved)
        memory = properties.total_memory / 2**30
        capability = f"compute capability {properties.major}.{properties.minor}"
        yield "device", f"{resolved} ({properties.name}, {capability}, {memory:.0f} GiB)"
    else:
        yield "device", f"{resolved} ({platform.processor() or platform.machine()})"
        yield "cpu capability", torch.backends.cpu.get_cpu_capability()
        yield "threads", str(torch.get_num_threads())
        yield "bfloat16", _bfloat16_gain()
    yield "default dtype", str(resolve_dtype(None, resolved)).removeprefix("torch.")
    backend = select_backend("auto", resolved)
    yield "backend", f"{backend.name} ({backend.reason})"
    try:
        find_weights(locate(DEFAULT_REPO, local_files_only=True))
    except FileNotFoundError:
        cached = "not in the local cache"
    else:
        cached = "in the local cache"
    yield "published weights", f"{DEFAULT_REPO}@{DEFAULT_REVISION[:8]}, {cached}"
