"""Which kernel and which tile runs a product, by device, dtype and number of rows.

Nothing is tuned at run time. `tuned.json` holds what `python -m nomoe_kernels.tune` measured (none
ships yet); where it has no entry for a device and shape, a formula picks from a short menu that
respects the device's shared memory.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import torch

# Rows up to which the weights' bytes, not the arithmetic, bound a product so far that the kernel
# which finds its rows by itself, one launch less, should win.
SMALL_ROWS = 256
# and those up to which it is worth a trial
MOST_SMALL_ROWS = 2048

# Rows from which on the formula takes tiles that read rows in expert order. On an H200 these were
# faster at 2,048 rows and more, and few of them were timed at fewer; the copying of rows that comes
# before was not timed with them, so where it pays is an estimate.
SORTED_ROWS = 2048

# the same as SMALL_ROWS for a product with one matrix
DENSE_SMALL_ROWS = 64
# and where no GELU follows, in 16 bits on Hopper, up to some inner width: a query
DENSE_FEW_ROWS, DENSE_FEW_INNER = 32, 1024
# Compute capabilities at which three passes of tf32 outrun float32 arithmetic: by the datasheets
# tf32 has 8 times its rate on A100, 7 on H100 and 14 on B200, and at most twice on the others.
TF32_PAYS = ((8, 0), (9, 0), (10, 0), (10, 3))

TUNED = Path(__file__).with_name("tuned.json")

Kernel = Literal["pointer", "tma", "specialized", "small"]


class Tile(NamedTuple):
    """How one product is cut: a program computes (block_m, block_n) in steps of block_k."""

    kernel: Kernel
    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    # copies of the output that each sum a part of the inner width; small kernel only
    splits: int = 1

    def shared_memory(self, itemsize: int) -> int:
        """Bytes of the operand buffers, the bulk of what a program allocates."""
        return self.stages * (self.block_m + self.block_n) * self.block_k * itemsize


class Plan(NamedTuple):
    """The tiles of a layer's two products; either both are small or neither is."""

    up: Tile
    down: Tile


class Device(NamedTuple):
    """What a choice depends on."""

    # as its driver gives it, for the table; "interpreter" where there is none
    name: str
    # (major, minor) of CUDA; (0, 0) elsewhere
    capability: tuple[int, int]
    multiprocessors: int
    # bytes one program may use
    shared_memory: int


class Shape(NamedTuple):
    """The sizes of a layer, the bytes of an element, and the routed rows R."""

    experts: int
    width: int
    ffn_width: int
    itemsize: int
    rows: int


class DenseShape(NamedTuple):
    """The sizes of a product with one matrix, and whether a GELU follows."""

    inner: int
    outer: int
    itemsize: int
    rows: int
    gelu: bool


class AttentionTile(NamedTuple):
    """How attention runs.

    "rotating": one kernel that rotates queries and keys as it loads them. "rotated": a kernel that
    rotates the keys once, in place, before one that rotates its queries and attends. "varlen": one
    that rotates both before torch's `varlen_attn`, 16 bits alone.
    """

    kernel: Literal["rotating", "rotated", "varlen"]
    # queries and keys of a block; varlen has its own
    block_m: int
    block_n: int
    warps: int
    stages: int


class AttentionShape(NamedTuple):
    """The sizes of a batch's attention."""

    head_width: int
    itemsize: int
    # tokens of the longest text, and of all
    longest: int
    tokens: int


# Tiles by falling efficiency: what a multiprocessor does per second on each, next to the first.
# For Hopper in 16 bits measured on an H200 (benchmarks/results/2026-11-29-h200-tiles.md), the other
# menus are estimates. An entry of tuned.json overrides them.
WGMMA_16 = {
    Tile("specialized", 128, 256, 64, 4, 3): 1.0,
    Tile("specialized", 128, 128, 128, 4, 3): 0.9,
    Tile("pointer", 128, 128, 64, 8, 3): 0.76,
    Tile("pointer", 64, 128, 64, 4, 4): 0.62,
    Tile("pointer", 32, 128, 64, 4, 4): 0.36,
}
MMA_16 = {
    Tile("pointer", 128, 128, 32, 8, 4): 1.0,
    Tile("pointer", 64, 128, 32, 4, 4): 0.85,
    Tile("pointer", 32, 64, 32, 4, 4): 0.5,
}
WGMMA_32 = {
    Tile("pointer", 128, 128, 32, 8, 3): 1.0,
    Tile("pointer", 64, 128, 32, 4, 3): 0.85,
    Tile("pointer", 32, 64, 32, 4, 3): 0.5,
}
# three passes of tf32 keep both halves of every operand in registers: larger tiles spill
MMA_32 = {
    Tile("pointer", 128, 64, 32, 8, 3): 1.0,
    Tile("pointer", 64, 64, 32, 4, 3): 0.9,
    Tile("pointer", 32, 64, 32, 4, 3): 0.5,
}
# block_m and block_n the tuner tries
BLOCKS = ((128, 256), (128, 128), (64, 256), (64, 128), (32, 128), (32, 64))
# the least shared memory of all, and the last resort
MINIMAL = Tile("pointer", 32, 32, 32, 4, 2)


def device_of(device: torch.device) -> Device:
    """Read a device's properties; the interpreter's is one that no kernel was tuned for."""
    if device.type != "cuda":
        return Device("interpreter", (0, 0), 1, 64 * 1024)
    from triton.runtime import driver

    index = torch.cuda.current_device() if device.index is None else device.index
    limits = driver.active.utils.get_device_properties(index)
    is_nvidia = torch.version.hip is None
    return Device(
        torch.cuda.get_device_name(device),
        torch.cuda.get_device_capability(device) if is_nvidia else (0, 0),
        limits["multiprocessor_count"],
        limits["max_shared_mem"],
    )


def size_class(rows: int) -> int:
    """The power of two that rows are rounded up to, from 16 to 2^20: plans are made per class."""
    return min(max(16, 1 << max(rows - 1, 0).bit_length()), 1 << 20)


def plan(device: Device, shape: Shape) -> Plan:
    """The tiles for a layer: measured where there is an entry, by formula elsewhere."""
    return _plan(device, shape._replace(rows=size_class(shape.rows)))


@lru_cache(maxsize=1024)
def _plan(device: Device, shape: Shape) -> Plan:
    return tuned_plan(device, shape) or formula(device, shape)


def dense(device: Device, shape: DenseShape) -> Tile | Literal["library"]:
    """How a product with one matrix is cut, or that torch's library (cuBLAS) computes it."""
    return _dense(device, shape._replace(rows=size_class(shape.rows)))


@lru_cache(maxsize=1024)
def _dense(device: Device, shape: DenseShape) -> Tile | Literal["library"]:
    return tuned_entries().dense.get((device.name, shape)) or dense_formula(device, shape)


def attention(device: Device, shape: AttentionShape) -> AttentionTile:
    """How attention over such a batch runs."""
    longest, tokens = size_class(shape.longest), size_class(shape.tokens)
    return _attention(device, shape._replace(longest=longest, tokens=tokens))


@lru_cache(maxsize=1024)
def _attention(device: Device, shape: AttentionShape) -> AttentionTile:
    return tuned_entries().attention.get((device.name, shape)) or attention_formula(device, shape)


def attention_formula(device: Device, shape: AttentionShape) -> AttentionTile:
    """Blocks by the longest text; in 16 bits on Hopper from times on an H200, else estimates.

    Every block of queries rotates all keys again: with more than two to a text, rotating them once,
    at the cost of a launch and of reading and writing them, gains. Torch's attention was slower
    at all lengths. Keys that are rotated while others are fetched have Hopper's products wait for
    each other; there they come one block at a time.
    """
    is_measured = device.capability == (9, 0) and shape.itemsize == 2
    # three passes of tf32 leave registers for less
    most = 64 if is_measured or shape.itemsize == 4 else 128
    block_m = min(max(16, 1 << max(shape.longest - 1, 0).bit_length()), most)
    kernel: Literal["rotating", "rotated"] = (
        "rotating" if shape.longest <= 2 * block_m else "rotated"
    )
    if is_measured:
        if kernel == "rotated":
            return AttentionTile(kernel, 64, 64, 4, 3)
        return AttentionTile(kernel, block_m, block_m, 4, 1 if block_m == 64 else 2)
    block_n = 16 if shape.itemsize == 4 else 32 if block_m == 32 else 64
    return AttentionTile(kernel, block_m, block_n, 8 if block_m == 128 else 4, 2)


class Tuned(NamedTuple):
    """What tuned.json holds, by device and shape."""

    plans: dict[tuple[str, Shape], Plan]
    dense: dict[tuple[str, DenseShape], Tile | Literal["library"]]
    attention: dict[tuple[str, AttentionShape], AttentionTile]


@lru_cache(maxsize=1)
def tuned_entries() -> Tuned:
    """Read tuned.json, which need not be there."""
    tuned = Tuned({}, {}, {})
    entries = json.loads(TUNED.read_text(encoding="utf-8")) if TUNED.exists() else []
    for entry in entries:
        name = entry["device"]
        if entry["kind"] == "layer":
            tiles = Plan(Tile(**entry["up"]), Tile(**entry["down"]))
            tuned.plans[name, Shape(**entry["shape"])] = tiles
        elif entry["kind"] == "dense":
            tile = entry["tile"]
            tuned.dense[name, DenseShape(**entry["shape"])] = (
                "library" if tile == "library" else Tile(**tile)
            )
        elif entry["kind"] == "attention":
            shape = AttentionShape(**entry["shape"])
            tuned.attention[name, shape] = AttentionTile(**entry["tile"])
    return tuned


def tuned_plan(device: Device, shape: Shape) -> Plan | None:
    """The plan measured on such a device for exactly these sizes."""
    return tuned_entries().plans.get((device.name, shape))


def formula(device: Device, shape: Shape) -> Plan:
    """A plan from the shape alone: the fewest waves of programs, weighted by the tile's speed."""
    if shape.rows <= SMALL_ROWS:
        return Plan(_small(device, shape, splits=1), _small(device, shape, splits=4))
    return Plan(
        largest(device, shape, shape.width, shape.ffn_width),
        largest(device, shape, shape.ffn_width, shape.width),
    )


def dense_formula(device: Device, shape: DenseShape) -> Tile | Literal["library"]:
    """Own kernels where they should gain, the library elsewhere; on Hopper from times on an H200.

    In 16 bits the library multiplies faster than any kernel here, by 1.1 to 2.1 times, most where
    rows are few and the sum is long. But a GELU of its own reads and writes the result once more,
    and its kernels begin only when the one before is done, which counts where all of them are
    short. In float32 the library does not use tensor cores.
    """
    is_few = shape.rows <= SMALL_ROWS
    if shape.itemsize == 4 and device.capability not in (*TF32_PAYS, (0, 0)):
        return "library"
    is_hopper = device.capability == (9, 0) and shape.itemsize == 2
    if is_hopper and shape.rows <= DENSE_FEW_ROWS and shape.inner <= DENSE_FEW_INNER:
        return _dense_small(device, shape)
    # with few rows only a split inner width keeps a device busy
    if not shape.gelu and (is_few or shape.itemsize == 2 or device.capability not in TF32_PAYS):
        return "library"
    if shape.rows <= DENSE_SMALL_ROWS:
        return _dense_small(device, shape)
    one = Shape(1, shape.inner, shape.outer, shape.itemsize, shape.rows)
    return largest(device, one, shape.inner, shape.outer)


def _dense_small(device: Device, shape: DenseShape) -> Tile:
    """Columns so few that most multiprocessors have some; on Hopper, deep blocks instead."""
    block_m = 16 if shape.rows <= 16 else 32
    if device.capability == (9, 0) and shape.itemsize == 2:
        if shape.rows > DENSE_FEW_ROWS:
            return Tile("small", 64, 64, 128, 4, 4)
        return Tile("small", block_m, 64, 256, 4, 3)
    block_k, stages = (32, 3) if shape.itemsize == 4 else (128, 4)
    tile = Tile("small", block_m, 32, block_k, 4, stages)
    if tile.shared_memory(shape.itemsize) > device.shared_memory:
        return Tile("small", block_m, 32, 64, 4, 3)
    return tile


def invariant_tile(device: Device, itemsize: int) -> Tile:
    """The tile of every product where a row's bits may not depend on how many rows there are.

    A compromise: larger ones are faster on many rows, smaller ones on few.
    """
    wide = Tile("pointer", 64, 64 if itemsize == 4 else 128, 32, 4, 3)
    if device.capability == (9, 0) and itemsize == 2:
        wide = wide._replace(block_k=64, stages=4)
    return wide if wide.shared_memory(itemsize) <= device.shared_memory else MINIMAL


def invariant_attention(itemsize: int) -> AttentionTile:
    """The same for attention."""
    return AttentionTile("rotating", 64, 16 if itemsize == 4 else 64, 4, 2)


def menu(device: Device, itemsize: int) -> dict[Tile, float]:
    """The tiles worth considering on a device."""
    if device.capability == (9, 0):
        return WGMMA_16 if itemsize == 2 else WGMMA_32
    return MMA_16 if itemsize == 2 else MMA_32


def candidates(device: Device, itemsize: int, experts: int, inner: int) -> Iterator[Tile]:
    """The tiles for sorted or gathered rows that are worth measuring on a device."""
    kernels: list[Kernel] = ["pointer"]
    if device.capability >= (9, 0) and itemsize == 2:
        kernels.append("tma")
    if device.capability == (9, 0) and itemsize == 2:
        kernels.append("specialized")
    block_k = 64 if itemsize == 2 and device.capability >= (9, 0) else 32
    for kernel, (block_m, block_n), stages in itertools.product(kernels, BLOCKS, (3, 4)):
        warps = 8 if block_m * block_n > 64 * 128 and kernel != "specialized" else 4
        tile = Tile(kernel, block_m, block_n, block_k, warps, stages)
        fits = tile.shared_memory(itemsize) <= device.shared_memory
        # three passes of tf32 leave no registers for the largest block
        is_too_large = block_n == 256 and itemsize == 4
        # fewer rows than 128 give both groups of multiplying warps the same half
        is_wasteful = kernel == "specialized" and block_m < 128
        if fits and supports(tile, experts, inner, itemsize) and not (is_too_large or is_wasteful):
            yield tile


def small_candidates(device: Device, itemsize: int, *, splits: tuple[int, ...]) -> Iterator[Tile]:
    """The tiles for few rows that are worth measuring on a device."""
    for block_m, block_n, (block_k, stages), split in itertools.product(
        (16, 32, 64), (64, 128), ((64, 4), (128, 3), (128, 4)), splits
    ):
        tile = Tile("small", block_m, block_n, block_k, 4, stages, split)
        if tile.shared_memory(itemsize) <= device.shared_memory:
            yield tile


def dense_candidates(device: Device, shape: DenseShape) -> Iterator[Tile]:
    """The tiles for a product with one matrix that are worth measuring, beside the library."""
    yield from candidates(device, shape.itemsize, 1, shape.inner)
    if shape.rows > MOST_SMALL_ROWS:
        return
    for block_m, block_n, (block_k, stages) in itertools.product(
        (16, 32, 64), (16, 32, 64), ((128, 4), (256, 3), (256, 4))
    ):
        tile = Tile("small", block_m, block_n, block_k, 4, stages)
        if tile.shared_memory(shape.itemsize) <= device.shared_memory:
            yield tile


def attention_candidates(device: Device, shape: AttentionShape) -> Iterator[AttentionTile]:
    """The forms and blocks of attention that are worth measuring."""
    formula = attention_formula(device, shape)
    kernels: tuple[Literal["rotating", "rotated"], ...] = ("rotating", "rotated")
    blocks = [block for block in (16, 32, 64, 128) if block < 2 * shape.longest or block == 16]
    for kernel, block_m, block_n in itertools.product(kernels, blocks, blocks):
        # three passes of tf32 leave registers for less
        if shape.itemsize == 2 or block_m * block_n <= 64 * 32:
            tile = AttentionTile(kernel, block_m, block_n, 8 if block_m == 128 else 4, 2)
            yield tile
            # keys that are rotated while others are fetched have Hopper's products wait for each
            # other; without, they do not
            yield tile._replace(stages=1 if kernel == "rotating" else 3)
    if shape.itemsize == 2:
        yield formula._replace(kernel="varlen")


def largest(device: Device, shape: Shape, inner: int, outer: int) -> Tile:
    """The tile for one product of many rows, by formula."""

    def seconds(tile: Tile, efficiency: float) -> float:
        per_expert = -(-shape.rows // (shape.experts * tile.block_m))
        tiles = shape.experts * per_expert * -(-outer // tile.block_n)
        waves = -(-tiles // device.multiprocessors)
        return waves * tile.block_m * tile.block_n / efficiency

    fitting = {
        tile: seconds(tile, efficiency)
        for tile, efficiency in menu(device, shape.itemsize).items()
        if tile.shared_memory(shape.itemsize) <= device.shared_memory
        and supports(tile, shape.experts, inner, shape.itemsize)
        and (tile.kernel == "pointer" or shape.rows >= SORTED_ROWS)
    }
    return min(fitting, key=lambda tile: fitting[tile], default=MINIMAL)


def supports(tile: Tile, experts: int, inner: int, itemsize: int) -> bool:
    """Whether a kernel can compute a product of this inner width over so many experts."""
    if tile.kernel == "specialized" and itemsize != 2:
        # Triton up to 3.8 does not compile three passes of tf32 in a specialised loop
        return False
    if tile.kernel in ("tma", "specialized"):
        # its blocks must not run into the next expert's matrix, and it decodes tiles by scalars
        return inner % tile.block_k == 0 and experts <= 16
    return True


def small_block(shape: Shape) -> int:
    """How many rows at once: all where they are few, else what few experts have more of."""
    return 16 if shape.rows <= 16 or 32 < shape.rows <= 8 * shape.experts else 32


def _small(device: Device, shape: Shape, splits: int) -> Tile:
    """Narrow tiles that keep enough bytes in flight."""
    block_m = small_block(shape)
    if shape.itemsize == 4:
        return Tile("small", block_m, 64, 32, 4, 3, splits)
    # with 3 stages a multiprocessor of Hopper holds three of them, so that on the 132 of an H200
    # all 384 programs of the published model's products run at once; with 4 it holds two, and 120
    # wait. As much is in flight either way
    stages = 3 if device.capability == (9, 0) else 4
    tile = Tile("small", block_m, 64, 128, 4, stages, splits)
    if tile.shared_memory(shape.itemsize) > device.shared_memory:
        return Tile("small", block_m, 64, 64, 4, 3, splits)
    return tile
