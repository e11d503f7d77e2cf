"""Fixtures that several test files share."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    # decides at the import of a kernel how it runs
    os.environ["TRITON_INTERPRET"] = "1"

import nomoe
from benchmarks.workload import write_shallow
from nomoe import Encoder, NomicMoEModel, data, synthetic
from nomoe.corpus import workers
from nomoe.packable import Packable
from nomoe.verify import full_width_model
from nomoe_kernels import cpu, matrices

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
# that multiply packed matrices on a CPU
LIBRARIES = ["onednn", *(["mkl"] if torch.backends.mkl.is_available() else [])]
# whose CPUs run products in float32 there: an unknown one's, Intel's
VENDORS = {"onednn": "", "mkl": "GenuineIntel"}

# the models here are tiny: threads gain nothing, and on a busy machine they wait for each other
torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    no_hub = pytest.mark.skip(reason="downloads 1.9 GB; run with -m hub")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if "hub" in item.keywords and "hub" not in config.option.markexpr:
            item.add_marker(no_hub)


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """End the process where a kernel has made the device unusable, and with it every later test."""
    if "gpu" in item.keywords and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            if "PYTEST_XDIST_WORKER" in os.environ:
                # its controller says during which test, and starts another
                os._exit(1)
            pytest.exit(f"{item.nodeid} broke the device: {error}", returncode=1)


@pytest.fixture(scope="session", autouse=True)
def two_cores() -> Iterator[None]:
    """Of a corpus, on any machine: one process, or two of one thread each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "cores", lambda: 2)
        yield


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic checkpoint: twelve layers, width 96. Tests must not write into it."""
    return synthetic.write_checkpoint(tmp_path_factory.mktemp("synthetic") / "tiny")


@pytest.fixture(scope="session")
def shallow_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with two layers, for tests of what is around a model. Tests must not write there."""
    return write_shallow(tiny_folder, tmp_path_factory.mktemp("shallow") / "shallow")


@pytest.fixture(scope="session")
def shallow(shallow_folder: Path) -> Encoder:
    return Encoder.from_pretrained(shallow_folder, device="cpu")


@pytest.fixture
def shallow_model(shallow_folder: Path) -> dict[str, Any]:
    """For a corpus: the arguments that say which model embeds it, and where."""
    return {"model": shallow_folder, "device": "cpu"}


@pytest.fixture
def encoder(tiny_folder: Path) -> Encoder:
    return Encoder.from_pretrained(tiny_folder, device="cpu")


@pytest.fixture(scope="session")
def full_width() -> NomicMoEModel:
    """The golden data's model at the real sizes, float32: 1.1 GB, drawn once."""
    return full_width_model()


@pytest.fixture
def warnings_of_nomoe(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING, logger="nomoe")
    return caplog


@pytest.fixture
def bench_encoder(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script as a module; it finds its siblings beside it, as when it is run."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module("bench_encoder")
    # one of its contenders registers
    nomoe.unregister()


@pytest.fixture
def bench_cpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """As `bench_encoder`."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("bench_cpu")


@pytest.fixture(scope="session")
def golden_tiny() -> NomicMoEModel:
    """The golden data's tiny model, without gradients. Tests must not change it."""
    return NomicMoEModel.from_pretrained(data.TINY, device="cpu").requires_grad_(False)


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where a CPU's products in float32 run: both can, whatever this CPU is."""
    # of its own, since a test may undo what it has patched
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matrices, "_vendor", lambda: VENDORS[request.param])
        yield request.param


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every product of packed matrices."""
    rows: list[int] = []
    linear = cpu.linear

    def watched(x_TI: Tensor, *rest: Any, **options: Any) -> Tensor:
        rows.append(len(x_TI))
        return linear(x_TI, *rest, **options)

    monkeypatch.setattr(cpu, "linear", watched)
    return rows


@pytest.fixture
def packed_model(library: str) -> NomicMoEModel:
    """The golden data's tiny model, its matrices packed."""
    model = NomicMoEModel.from_pretrained(data.TINY, device="cpu")
    with torch.no_grad():
        model.forward_packed(torch.arange(4, 34), [20, 10])
    assert all(part.packed for part in model.modules() if isinstance(part, Packable))
    return model


@pytest.fixture(scope="session")
def checkpoint() -> dict[str, Tensor]:
    """The tensors of that model."""
    return NomicMoEModel.from_pretrained(data.TINY, device="cpu").state_dict()
