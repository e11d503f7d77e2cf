"""What `nomoe info` shows."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch
from torch.nn.utils import skip_init

from .arguments import resolve_device, resolve_dtype
from .backends import cpu_ops, select_backend
from .checkpoint import DEFAULT_REPO, DEFAULT_REVISION, find_weights, locate
from .moe import Linear

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


# matrices of a product in a query and in a batch, and its rows: a query reads more of them than
# caches hold, some 300 MB in float32
_MATRICES = 32
_ROWS = {4: _MATRICES, 512: 4}


@torch.no_grad()
def _bfloat16_gain() -> str:
    """What dtype="bfloat16" would change on this CPU, from a quick measurement.

    Of the up-projections of experts, in each dtype in turn.
    """
    layers = {}
    for dtype in (torch.float32, torch.bfloat16):
        if cpu_ops(dtype) is None:
            return "no fast products on this CPU; float32 is the better dtype"
        layers[dtype] = [
            skip_init(Linear, 768, 3072, bias=False, dtype=dtype) for _ in range(_MATRICES)
        ]
        for layer in layers[dtype]:
            layer.weight.data.fill_(0.01)
            layer.pack()
    gains = []
    for rows, count in _ROWS.items():
        times: dict[torch.dtype, list[float]] = {dtype: [] for dtype in layers}
        for _ in range(10):
            for dtype, some in layers.items():
                x_TD = torch.ones(rows, 768, dtype=dtype)
                start = time.perf_counter()
                for layer in some[:count]:
                    layer(x_TD, cpu_ops(dtype))
                times[dtype].append(time.perf_counter() - start)
        before, after = map(min, times.values())
        gains.append(after / before)
    query, batch = gains
    gain = f"its products take {query:.2f} of float32's time here in a query, "
    gain += f"{batch:.2f} in batches (just measured)"
    return f"{gain}; dtype='bfloat16' asks for it" if min(gains) < 0.9 else gain


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
