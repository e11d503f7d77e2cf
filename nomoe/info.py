"""What `nomoe info` shows."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

from .checkpoint import DEFAULT_REPO, DEFAULT_REVISION, find_weights, locate
from .model import resolve_device, resolve_dtype
from .moe import select_backend

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
