"""Tiles: what the formula picks, what the table overrides, and the tuner that writes the table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources, PTXASError

from nomoe_kernels import configs, tune
from nomoe_kernels.configs import (
    AttentionShape,
    AttentionTile,
    DenseShape,
    Device,
    Plan,
    Shape,
    Tile,
)
from tests.compile_kernels import DEVICES

LAYER = Shape(experts=8, width=768, ffn_width=3072, itemsize=2, rows=0)
H200 = DEVICES["cuda:90"]


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A table of our own in place of the one that ships."""
    path = tmp_path / "tuned.json"
    monkeypatch.setattr(configs, "TUNED", path)
    forget()
    yield path
    forget()


def forget() -> None:
    configs.tuned_entries.cache_clear()
    configs._plan.cache_clear()
    configs._dense.cache_clear()
    configs._attention.cache_clear()


def test_size_classes() -> None:
    sizes = {0: 16, 1: 16, 16: 16, 17: 32, 32: 32, 33: 64, 131_072: 131_072, 131_073: 262_144}
    assert {rows: configs.size_class(rows) for rows in sizes} == sizes
    assert configs.size_class(1 << 30) == 1 << 20


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_the_formula_respects_the_device(device: Device, itemsize: int) -> None:
    for power in range(4, 21):
        shape = LAYER._replace(itemsize=itemsize, rows=1 << power)
        tiles = configs.formula(device, shape)
        is_small = shape.rows <= configs.SMALL_ROWS
        assert [tile.kernel == "small" for tile in tiles] == [is_small, is_small]
        for tile in tiles:
            assert tile.shared_memory(itemsize) <= device.shared_memory
            # what these gain was measured on Hopper
            assert tile.kernel not in ("tma", "specialized") or device.capability == (9, 0)
            assert tile.kernel != "specialized" or itemsize == 2


def test_the_formula_fills_the_device() -> None:
    def up(rows: int) -> Tile:
        return configs.formula(H200, LAYER._replace(rows=rows)).up

    # 512 rows: 64 of each expert, so larger blocks would be half empty
    assert (up(512).block_m, up(512).block_n) == (64, 128)
    assert {up(1 << power)[:3] for power in range(13, 19)} == {("specialized", 128, 256)}


def test_layers_the_tma_kernel_cannot_take() -> None:
    many = configs.formula(H200, LAYER._replace(experts=64, rows=1 << 18))
    assert {tile.kernel for tile in many} == {"pointer"}
    odd = configs.formula(H200, LAYER._replace(ffn_width=3072 + 16, rows=1 << 18))
    assert odd.down.kernel == "pointer"
    nothing_fits = Device("none", (8, 0), 1, 1024)
    assert configs.formula(nothing_fits, LAYER._replace(rows=4096)).up == configs.MINIMAL


def test_the_table_overrides_the_formula(table: Path) -> None:
    measured = Plan(Tile("tma", 64, 256, 64, 4, 4), Tile("pointer", 64, 64, 64, 4, 4))
    shape = LAYER._replace(rows=4096)
    choice = {"up": measured.up._asdict(), "down": measured.down._asdict()}
    table.write_text(json.dumps([tune.record_of("layer", H200, shape, choice, 1e-3)]))
    # every number of rows of the class, and no other class, size or device
    assert configs.plan(H200, LAYER._replace(rows=2049)) == measured
    for other in (
        LAYER._replace(rows=4097),
        LAYER._replace(rows=2048),
        shape._replace(width=1024),
        shape._replace(itemsize=4),
    ):
        assert configs.plan(H200, other) != measured
    # a device of the same capability may have fewer multiprocessors or less memory
    assert configs.plan(H200._replace(name="H800"), shape) != measured


FC1 = DenseShape(inner=768, outer=3072, itemsize=2, rows=0, gelu=True)
FC2 = DenseShape(inner=3072, outer=768, itemsize=2, rows=0, gelu=False)


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_the_formula_of_dense_products(device: Device, itemsize: int) -> None:
    for power in range(4, 21):
        up, down = (
            configs.dense_formula(device, shape._replace(itemsize=itemsize, rows=1 << power))
            for shape in (FC1, FC2)
        )
        for tile in (up, down):
            if tile != "library":
                assert tile.shared_memory(itemsize) <= device.shared_memory
                assert (tile.kernel == "small") == (1 << power <= configs.DENSE_SMALL_ROWS)
                # nobody sums the parts
                assert tile.splits == 1
        # three passes of tf32 against plain float32: on these they gain nothing
        is_slow = itemsize == 4 and device.capability in ((8, 6), (8, 9), (12, 0))
        assert (up == "library") == is_slow
        gains = itemsize == 4 and device.capability in configs.TF32_PAYS
        assert (down == "library") == (not gains or 1 << power <= configs.SMALL_ROWS)


def test_products_of_a_query_run_in_own_kernels_on_hopper() -> None:
    """Where a library's would wait for the kernel before to end; deep sums are faster there."""
    qkv = DenseShape(inner=768, outer=2304, itemsize=2, rows=16, gelu=False)
    for shape, device, is_own in (
        (qkv, H200, True),
        (qkv._replace(rows=32), H200, True),
        (qkv._replace(rows=64), H200, False),
        (qkv._replace(inner=3072), H200, False),
        (qkv, DEVICES["cuda:80"], False),
    ):
        assert (configs.dense_formula(device, shape) != "library") == is_own, (shape, device)


def test_the_table_overrides_the_formula_of_dense_products(table: Path) -> None:
    tile = Tile("pointer", 64, 64, 64, 4, 4)
    measured = ((256, tile._asdict()), (512, "library"))
    entries = [
        {"kind": "dense", "device": "H200", "shape": FC1._replace(rows=R)._asdict(), "tile": one}
        for R, one in measured
    ]
    table.write_text(json.dumps(entries))
    assert configs.dense(H200, FC1._replace(rows=129)) == tile
    assert configs.dense(H200, FC1._replace(rows=257)) == "library"
    for other in (FC1._replace(rows=128), FC1._replace(rows=200, gelu=False)):
        assert configs.dense(H200, other) == configs.dense_formula(H200, other)


def test_blocks_of_attention_follow_the_longest_text() -> None:
    def tile(longest: int, itemsize: int = 2, tokens: int = 4096) -> AttentionTile:
        return configs.attention(H200, AttentionShape(64, itemsize, longest, tokens))

    sizes = [tile(length).block_m for length in (1, 16, 17, 64, 65, 128, 512, 2048)]
    assert sizes == [16, 16, 32, 64, 64, 64, 64, 64]
    assert tile(512, itemsize=4).block_m == 64
    # rotated once where more than two blocks of queries would each rotate all keys
    kernels = [tile(length).kernel for length in (1, 64, 128, 129, 2048)]
    assert kernels == ["rotating", "rotating", "rotating", "rotated", "rotated"]


def test_the_table_overrides_the_formula_of_attention(table: Path) -> None:
    measured = AttentionTile("varlen", 128, 64, 4, 2)
    shape = AttentionShape(head_width=64, itemsize=2, longest=512, tokens=65_536)
    entry = {"kind": "attention", "device": "H200", "shape": shape._asdict()}
    table.write_text(json.dumps([entry | {"tile": measured._asdict()}]))
    assert configs.attention(H200, shape._replace(longest=400, tokens=40_000)) == measured
    for other in (
        shape._replace(longest=513),
        shape._replace(tokens=16),
        shape._replace(itemsize=4),
    ):
        assert configs.attention(H200, other) == configs.attention_formula(H200, other)


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_the_invariant_tile_fits(device: Device, itemsize: int) -> None:
    tile = configs.invariant_tile(device, itemsize)
    assert tile.kernel == "pointer"
    assert tile.shared_memory(itemsize) <= device.shared_memory
    # no sum is split
    assert tile.splits == 1


def test_bytes_of_a_tile() -> None:
    # four stages of (128, 64) and (64, 256) of two bytes: 16 and 32 KB each
    assert Tile("tma", 128, 256, 64, 8, 4).shared_memory(2) == 4 * 48 * 1024
    # three stages of (64, 32) and (32, 128) of four
    assert Tile("pointer", 64, 128, 32, 8, 3).shared_memory(4) == 3 * 24 * 1024


def test_what_triton_cannot_compile_is_no_choice() -> None:
    tile = Tile("specialized", 128, 128, 32, 4, 3)
    assert configs.supports(tile, 8, 768, 2)
    assert not configs.supports(tile, 8, 768, 4)


def test_candidates_fit() -> None:
    for device in DEVICES.values():
        for itemsize in (2, 4):
            tiles = list(configs.candidates(device, itemsize, 8, 768))
            assert len(set(tiles)) == len(tiles) > 2
            assert all(tile.shared_memory(itemsize) <= device.shared_memory for tile in tiles)
    kernels = {tile.kernel for tile in configs.candidates(H200, 2, 8, 768)}
    assert kernels == {"pointer", "tma", "specialized"}


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="expects the interpreter")
def test_the_tuner(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good, other = Tile("pointer", 16, 32, 32, 4, 2), Tile("pointer", 32, 32, 32, 4, 2)
    monkeypatch.setattr(configs, "candidates", lambda *given: iter([good, other]))
    monkeypatch.setattr(configs, "small_candidates", lambda *given, splits: iter([]))
    run_layer, spoiled = tune.fused.run_layer, Plan(other, good)

    def run(*layer: object, tiles: Plan) -> tuple[torch.Tensor, ...]:
        out, *rest = run_layer(*layer, tiles=tiles)
        # the fastest and wrong
        return (out * (2 if tiles.up == spoiled.up else 1), *rest)

    monkeypatch.setattr(tune.fused, "run_layer", run)
    fastest = "pointer"

    def time_plan(layers: object, tiles: Plan, repeats: int) -> float:
        return tiles.down.block_m + (0 if tiles.up.kernel == fastest else 100)

    monkeypatch.setattr(tune, "time_plan", time_plan)
    sizes = ["--width=32", "--ffn-width=32", "--experts=4", "--dtype=float32", "--only=layer"]
    with pytest.raises(SystemExit):
        tune.main(sizes)
    assert "under Triton's interpreter give --output" in capsys.readouterr().err
    mine = table.with_name("mine.json")
    sizes.append(f"--output={mine}")
    assert tune.main([*sizes, "--rows", "16", "20"]) == 0
    assert "left out, its result is wrong: Plan(up=Tile(kernel='pointer', block_m=32" in (
        capsys.readouterr().err
    )
    assert not table.exists()
    monkeypatch.setattr(configs, "TUNED", mine)
    forget()
    device = configs.device_of(torch.device("cpu"))
    for rows in (16, 32):
        shape = Shape(4, 32, 32, 4, rows)
        assert configs.tuned_plan(device, shape) == Plan(good, good)
    # what the formula says is tried though no menu has it
    formula = configs.formula(device, shape)
    fastest = formula.up.kernel
    assert fastest != "pointer"
    theirs = table.with_name("theirs.json")
    assert tune.main([*sizes[:-1], f"--output={theirs}", "--rows", "32"]) == 0
    monkeypatch.setattr(configs, "TUNED", theirs)
    forget()
    assert configs.tuned_plan(device, shape) == formula

    # what the table has is kept as it is, unless asked
    monkeypatch.setattr(configs, "TUNED", table)
    before = mine.read_text()
    monkeypatch.setattr(tune, "tune", lambda *given: 1 / 0)
    assert tune.main([*sizes, "--rows", "16", "20"]) == 0
    assert mine.read_text() == before
    with pytest.raises(ZeroDivisionError):
        tune.main([*sizes, "--rows", "16", "--again"])
    assert mine.read_text() == before


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="expects the interpreter")
def test_the_tuner_of_dense_products_and_attention(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good, wrong = (Tile("pointer", 16, block_n, 32, 4, 2) for block_n in (32, 16))
    forms = [AttentionTile(kernel, 16, 16, 4, 2) for kernel in ("rotated", "rotating")]
    monkeypatch.setattr(configs, "dense_candidates", lambda *given: iter([wrong, good]))
    monkeypatch.setattr(configs, "attention_candidates", lambda *given: iter(forms))
    linear, rotate = tune.fused.linear, tune.fused.launch.rotate
    spoiled = [True]

    def run(*given: torch.Tensor, tile: Tile, gelu: bool) -> torch.Tensor:
        return linear(*given, tile=tile, gelu=gelu) * (2 if tile == wrong else 1)

    def rotate_unless_spoiled(*given: torch.Tensor) -> None:
        if not spoiled[0]:
            rotate(*given)

    monkeypatch.setattr(tune.fused, "linear", run)
    monkeypatch.setattr(tune.fused.launch, "rotate", rotate_unless_spoiled)
    # of those that are right the fastest wins
    seconds = {"library": 2.0, wrong: 0.5, good: 1.0, forms[0]: 0.5, forms[1]: 1.0, "formula": 2.0}

    def pretend(calls: list[Any], repeats: int) -> float:
        # (tile, layer) of a product, (qkv, packing) of attention
        first, second = calls[0].args
        choice = second.tile if isinstance(second, tune.fused.Packing) else first
        # what no menu has is the formula's
        return seconds.get(choice, seconds["formula"])

    monkeypatch.setattr(tune, "time_calls", pretend)
    output = table.with_name("mine.json")
    sizes = ["--width=32", "--ffn-width=48", "--head-width=16", "--dtype=float32", "--rows=16"]
    device = configs.device_of(torch.device("cpu"))

    def tuned(*more: str) -> tuple[Tile | str, AttentionTile]:
        monkeypatch.setattr(configs, "TUNED", table)
        arguments = [*sizes, f"--output={output}", "--only", "dense", "attention", *more]
        assert tune.main(arguments) == 0
        monkeypatch.setattr(configs, "TUNED", output)
        forget()
        return (
            configs.dense(device, DenseShape(32, 48, 4, 16, gelu=True)),
            configs.attention(device, AttentionShape(16, 4, 16, 16)),
        )

    assert tuned() == (good, forms[1])
    assert "left out, its result is wrong" in capsys.readouterr().err
    spoiled[0] = False
    assert tuned() == (good, forms[1]), "in the table already"
    assert tuned("--again") == (good, forms[0])
    seconds["library"] = 0.1
    assert tuned("--again") == ("library", forms[0])
    seconds["formula"] = 0.05
    dense = configs.dense_formula(device, DenseShape(32, 48, 4, 16, gelu=True))
    assert tuned("--again") == (dense, forms[0])


def test_a_tile_that_fails_is_left_out_unless_the_device_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a lost device every tile fails, and those left over would look like the best."""

    def fails(error: Exception) -> float:
        def take_time() -> float:
            raise error

        return tune.seconds_of("a tile", lambda: True, take_time, None)

    def lost() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    for error in (PTXASError("no"), OutOfResources(2, 1, "shared"), RuntimeError("no")):
        assert fails(error) == float("inf")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert fails(RuntimeError("no")) == float("inf")
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(RuntimeError, match="illegal"):
        fails(RuntimeError("no"))
