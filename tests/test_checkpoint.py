"""Checkpoints on disk: what is loaded, what it costs in memory, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from nomoe import Encoder, NomicMoEConfig, NomicMoEModel
from nomoe.checkpoint import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
ROUTER = "encoder.layers.1.mlp.router.layer.weight"
BIAS = "encoder.layers.11.mlp.experts.bias"
TABLE = "embeddings.word_embeddings.weight"

linux_only = pytest.mark.skipif(
    sys.platform != "linux", reason="reads memory use from /proc/self/status"
)


@pytest.fixture(scope="module")
def tensors(tiny_folder: Path) -> dict[str, Tensor]:
    """The synthetic checkpoint's tensors; tests must not change them."""
    return load_file(tiny_folder / WEIGHTS_FILE)


@pytest.fixture
def bare_folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A checkpoint without weights."""
    shutil.copy(tiny_folder / CONFIG_FILE, tmp_path)
    return tmp_path


def load(folder: Path, dtype: str = "float32") -> dict[str, Tensor]:
    return NomicMoEModel.from_pretrained(folder, device="cpu", dtype=dtype).state_dict()


def assert_identical(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def write_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write every second tensor into the second shard, and the index."""
    weight_map = {name: SHARDS[place % 2] for place, name in enumerate(sorted(tensors))}
    for shard in SHARDS:
        save_file({n: t for n, t in tensors.items() if weight_map[n] == shard}, folder / shard)
    write_index(folder, weight_map)


def write_index(folder: Path, weight_map: Mapping[str, str]) -> None:
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_names_and_shapes_are_the_files(tiny_folder: Path, tensors: dict[str, Tensor]) -> None:
    found = load(tiny_folder)
    with safe_open(tiny_folder / WEIGHTS_FILE, framework="pt") as file:
        stored = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    assert {name: list(tensor.shape) for name, tensor in found.items()} == stored
    assert_identical(found, tensors)


def test_shards_are_the_single_file(bare_folder: Path, tensors: dict[str, Tensor]) -> None:
    write_shards(bare_folder, tensors)
    assert_identical(load(bare_folder), tensors)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_stored_dtype_is_cast(
    bare_folder: Path, tensors: dict[str, Tensor], stored: torch.dtype, dtype: str
) -> None:
    kept = {name: tensor.to(stored) for name, tensor in tensors.items()}
    save_file(kept, bare_folder / WEIGHTS_FILE)
    expected = {name: tensor.to(getattr(torch, dtype)) for name, tensor in kept.items()}
    assert_identical(load(bare_folder, dtype), expected)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_loaded_model_can_be_saved_and_loaded_again(
    tiny_folder: Path, bare_folder: Path, dtype: str
) -> None:
    first = load(tiny_folder, dtype)
    save_file(first, bare_folder / WEIGHTS_FILE)
    assert_identical(load(bare_folder, dtype), first)


def test_changing_a_weight_leaves_the_file_alone(
    bare_folder: Path, tensors: dict[str, Tensor]
) -> None:
    save_file(tensors, bare_folder / WEIGHTS_FILE)
    before = (bare_folder / WEIGHTS_FILE).read_bytes()
    # the tensors are views of the file, mapped privately
    changed = load(bare_folder)[BIAS]
    changed.fill_(7.0)
    assert (bare_folder / WEIGHTS_FILE).read_bytes() == before
    assert_identical(load(bare_folder), tensors)
    assert (changed == 7.0).all()


def test_every_misfit_is_listed_in_one_error(bare_folder: Path, tensors: dict[str, Tensor]) -> None:
    spoiled = dict(tensors)
    del spoiled["emb_ln.weight"]
    spoiled["pooler.dense.weight"] = torch.zeros(2)
    spoiled[ROUTER] = tensors[ROUTER][:, :-1].contiguous()
    spoiled[BIAS] = tensors[BIAS].to(torch.int8)
    spoiled[TABLE] = tensors[TABLE][:, :-1].to(torch.int32)
    save_file(spoiled, bare_folder / WEIGHTS_FILE)
    with pytest.raises(ValueError, match="does not fit its config") as error:
        load(bare_folder)
    rows, width = tensors[TABLE].shape
    for line in (
        f"emb_ln.weight: missing, expected [{width}]",
        "pooler.dense.weight: unexpected",
        f"{ROUTER}: shape [8, {width - 1}], expected [8, {width}]",
        f"{BIAS}: dtype I8, expected one of F64, F32, F16, BF16",
        f"{TABLE}: shape [{rows}, {width - 1}], expected [{rows}, {width}]",
        f"{TABLE}: dtype I32, expected one of F64, F32, F16, BF16",
    ):
        assert line in str(error.value)
    assert len(str(error.value).splitlines()) == 7


def test_tensor_in_two_shards(bare_folder: Path, tensors: dict[str, Tensor]) -> None:
    write_shards(bare_folder, tensors)
    twice = next(name for place, name in enumerate(sorted(tensors)) if place % 2 == 0)
    second = load_file(bare_folder / SHARDS[1]) | {twice: tensors[twice] + 1}
    save_file(second, bare_folder / SHARDS[1])
    with pytest.raises(ValueError, match="more than one shard") as error:
        load(bare_folder)
    assert twice in str(error.value)


@pytest.mark.parametrize("damage", ["truncated", "empty", "trailing", "header", "pointer"])
def test_damaged_file(tiny_folder: Path, bare_folder: Path, damage: str) -> None:
    whole = (tiny_folder / WEIGHTS_FILE).read_bytes()
    content = {
        "truncated": whole[:-1],
        "empty": b"",
        "trailing": whole + b"\0",
        "header": whole[:8] + b"\xff" * 64 + whole[72:],
        # what `git clone` leaves without Git LFS
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1901187232\n",
    }[damage]
    (bare_folder / WEIGHTS_FILE).write_bytes(content)
    with pytest.raises(ValueError, match="not a whole safetensors file") as error:
        load(bare_folder)
    assert WEIGHTS_FILE in str(error.value)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_values_that_are_not_finite(
    bare_folder: Path, tensors: dict[str, Tensor], value: str, dtype: str
) -> None:
    spoiled = dict(tensors)
    for name in (ROUTER, TABLE):
        spoiled[name] = tensors[name].clone()
        spoiled[name].view(-1)[-1] = float(value)
    save_file(spoiled, bare_folder / WEIGHTS_FILE)
    with pytest.raises(ValueError, match="NaN") as error:
        load(bare_folder, dtype)
    named = [name for name in tensors if name in str(error.value)]
    assert sorted(named) == sorted([ROUTER, TABLE])


@pytest.mark.parametrize("value", [65_520.0, -1e6])
def test_value_too_large_for_float16(
    bare_folder: Path, tensors: dict[str, Tensor], value: float
) -> None:
    spoiled = tensors | {BIAS: tensors[BIAS].clone()}
    spoiled[BIAS][3] = value
    save_file(spoiled, bare_folder / WEIGHTS_FILE)
    with pytest.raises(ValueError, match="float16") as error:
        load(bare_folder, "float16")
    assert BIAS in str(error.value)
    assert load(bare_folder, "bfloat16")[BIAS].isfinite().all()
    assert_identical(load(bare_folder), spoiled)


def test_largest_float16_is_accepted(bare_folder: Path, tensors: dict[str, Tensor]) -> None:
    kept = tensors | {BIAS: tensors[BIAS].clone()}
    # the largest float32 that rounds to a finite float16
    kept[BIAS][3] = 65_519.996
    save_file(kept, bare_folder / WEIGHTS_FILE)
    assert load(bare_folder, "float16")[BIAS][3] == 65_504.0


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_pickled_weights_are_named_and_never_read(bare_folder: Path, name: str) -> None:
    marker = bare_folder / "unpickled"
    content = pickle.dumps(Trap(marker))
    pickle.loads(content)
    assert marker.is_dir(), "the trap works"
    marker.rmdir()

    (bare_folder / name).write_bytes(content)
    with pytest.raises(FileNotFoundError, match="never loaded") as error:
        load(bare_folder)
    assert name in str(error.value)
    # nor where it hides behind the name of a safetensors file
    (bare_folder / name).rename(bare_folder / WEIGHTS_FILE)
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load(bare_folder)
    assert not marker.exists()


@pytest.mark.parametrize("name", [None, 3])
def test_what_is_no_name(name: Any) -> None:
    with pytest.raises(TypeError, match="expected a repository's name or a folder"):
        Encoder.from_pretrained(name)
    with pytest.raises(TypeError, match="expected a repository's name or a folder"):
        NomicMoEModel.from_pretrained(name)


def test_no_weights_at_all(bare_folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load(bare_folder)


def test_index_names_an_absent_shard(bare_folder: Path, tensors: dict[str, Tensor]) -> None:
    write_shards(bare_folder, tensors)
    (bare_folder / SHARDS[1]).unlink()
    with pytest.raises(FileNotFoundError, match="absent") as error:
        load(bare_folder)
    assert SHARDS[1] in str(error.value)
    assert SHARDS[0] not in str(error.value)


@pytest.mark.parametrize(
    "shard", ["../outside.safetensors", "inside/outside.safetensors", "/outside.safetensors", ".."]
)
def test_index_leads_out_of_the_folder(
    tiny_folder: Path, bare_folder: Path, tensors: dict[str, Tensor], shard: str
) -> None:
    folder = bare_folder / "checkpoint"
    (folder / "inside").mkdir(parents=True)
    shutil.copy(tiny_folder / CONFIG_FILE, folder)
    # without the check each of these would load
    for place in (bare_folder, folder / "inside"):
        save_file(tensors, place / "outside.safetensors")
    if shard.startswith("/"):
        shard = str(bare_folder) + shard
    write_index(folder, dict.fromkeys(tensors, shard))
    with pytest.raises(ValueError, match="not a file beside it") as error:
        load(folder)
    assert repr(shard) in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not JSON",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b'{"weight_map": null}',
        b'{"weight_map": []}',
        b'{"weight_map": {}}',
        b'{"weight_map": {"emb_ln.weight": ["model-00001-of-00002.safetensors"]}}',
        b'{"weight_map": {"emb_ln.weight": 1}}',
    ],
)
def test_damaged_index(bare_folder: Path, content: bytes) -> None:
    (bare_folder / INDEX_FILE).write_bytes(content)
    with pytest.raises(ValueError, match=INDEX_FILE):
        load(bare_folder)


# prints the growth of anonymous memory in bytes: at its peak, and after the load
MEASURE = """
import sys, threading, time
from pathlib import Path
from nomoe import NomicMoEModel

def anonymous():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024

warm_up, folder, dtype = sys.argv[1:]
NomicMoEModel.from_pretrained(warm_up, device="cpu", dtype=dtype)
before = peak = anonymous()
done = threading.Event()

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.0005)

watcher = threading.Thread(target=watch)
watcher.start()
model = NomicMoEModel.from_pretrained(folder, device="cpu", dtype=dtype)
done.set()
watcher.join()
print(peak - before, anonymous() - before)
"""


@pytest.fixture(scope="module")
def heavy_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 200 MB, nearly all of it tables and experts."""
    folder = tmp_path_factory.mktemp("heavy")
    values = json.loads((tiny_folder / CONFIG_FILE).read_text())
    values |= {"vocab_size": 250_048, "n_inner": 4096, "n_layer": 4}
    (folder / CONFIG_FILE).write_text(json.dumps(values))
    with torch.device("meta"):
        expected = NomicMoEModel(NomicMoEConfig.from_dict(values)).state_dict()
    torch.manual_seed(0)
    save_file({n: torch.rand(t.shape) for n, t in expected.items()}, folder / WEIGHTS_FILE)
    return folder


@linux_only
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_memory(tiny_folder: Path, heavy_folder: Path, dtype: str) -> None:
    size = (heavy_folder / WEIGHTS_FILE).stat().st_size
    assert size > 150e6, "large enough to tell"
    ran = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tiny_folder), str(heavy_folder), dtype],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    peak, after = (int(number) for number in ran.stdout.split())
    print(f"{dtype}: file {size / 1e6:.0f} MB, peak {peak / 1e6:.1f} MB, then {after / 1e6:.1f} MB")
    if dtype == "float32":
        # memory-mapped: the pages are the file's
        assert peak < 0.05 * size
    else:
        assert 0.9 * size / 2 < max(peak, after) <= 1.1 * size / 2
