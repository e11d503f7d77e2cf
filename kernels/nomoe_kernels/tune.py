"""Measure which tiles are fastest on this device, and keep them for `nomoe_kernels.configs`.

    python -m nomoe_kernels.tune                              the published model's sizes, float16
    python -m nomoe_kernels.tune --dtype float32 --rows 4096
    python -m nomoe_kernels.tune --only attention
    python -m nomoe_kernels.tune --output my.json             elsewhere than the table that ships

For every size class a whole mixture-of-experts layer is timed as a CUDA graph over several layers'
weights, first with each tile for the first product, then with each for the second, then with those
for few rows; so are the products with one matrix, the library's among them, and each form of
attention, over texts of one length. What does not give plain torch's result is left out, and named.
The table is written after every size class, and size classes it has are not measured again without
--again. float16 and bfloat16 share entries: their tiles cost the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm
from triton.errors import TritonError

from . import checks, configs, fused, reference
from .configs import AttentionShape, AttentionTile, DenseShape, Device, Plan, Shape, Tile

# what no L2 cache holds: five layers of 75 MB each, or of smaller matrices as many bytes
LAYERS = 5
COLD_BYTES = 256 << 20
SPLITS = (1, 2, 4, 8)
# largest difference from plain torch, of its largest value
TOLERANCE = {4: 1e-5, 2: 2e-2}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in checks.DTYPES}


KINDS = ("layer", "dense", "attention")

Choice = TypeVar("Choice")


class Layer(NamedTuple):
    """One layer's arguments to `fused.run_layer`."""

    x_TD: Tensor
    router_ED: Tensor
    w1_EDF: Tensor
    w2_EFD: Tensor
    bias_D: Tensor
    top_k: int


def draw_layers(shape: Shape, top_k: int, dtype: torch.dtype, device: torch.device) -> list[Layer]:
    """Layers with weights of their own, and tokens that a random router spreads evenly."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=generator, device=device) * scale).to(dtype)

    E, D, F, _, R = shape
    x_TD = normal(max(R // top_k, 1), D)
    return [
        Layer(
            x_TD,
            normal(E, D, scale=D**-0.5),
            normal(E, F, D, scale=D**-0.5).transpose(1, 2),
            normal(E, F, D, scale=F**-0.5),
            normal(D),
            top_k,
        )
        for _ in range(LAYERS)
    ]


def time_plan(layers: Sequence[Layer], tiles: Plan, repeats: int) -> float:
    """Median seconds of one layer."""
    return time_calls([partial(fused.run_layer, *layer, tiles=tiles) for layer in layers], repeats)


def time_calls(calls: Sequence[Callable[[], object]], repeats: int) -> float:
    """Median seconds of one of several calls; on CUDA from replays of a graph of them all."""

    def run() -> None:
        for call in calls:
            call()

    run()
    if not torch.cuda.is_available():
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds) / len(calls)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    graph.replay()
    for mark in marks[:-1]:
        mark.record()
        graph.replay()
    marks[-1].record()
    torch.cuda.synchronize()
    times = [float(start.elapsed_time(end)) for start, end in pairwise(marks)]
    return statistics.median(times) / 1000 / len(calls)


def seconds_of(
    choice: Any, is_right: Callable[[], bool], take_time: Callable[[], float], bar: tqdm[Any] | None
) -> float:
    """What a choice takes; infinity, and a line that says why, where it is of no use.

    Raises:
        RuntimeError: The device computes nothing any more.
    """
    if bar is not None:
        bar.set_postfix_str(" ".join(str(choice).split()))
    try:
        if is_right():
            return take_time()
        problem = "its result is wrong"
    # a tile that does not fit, or that this version of Triton cannot compile
    except (TritonError, RuntimeError) as error:
        problem = str(error).partition("\n")[0]
        if torch.cuda.is_available():
            # after a launch that failed every other does, and raises here
            torch.cuda.synchronize()
    print(f"left out, {problem}: {choice}", file=sys.stderr)
    return float("inf")


def is_close(out: Tensor, expected: Tensor, itemsize: int) -> bool:
    """Whether a result is plain torch's, but for rounding."""
    off = (out - expected).abs().max()
    return bool(off <= TOLERANCE[itemsize] * expected.abs().max())


def is_right(layer: Layer, tiles: Plan, expected_TD: Tensor, experts_TK: Tensor) -> bool:
    """Whether a plan gives what plain torch gives, where both choose the same experts.

    Of many thousand random tokens one may be so near a tie that float32 decides it either way.
    """
    out_TD, _, chosen_TK = fused.run_layer(*layer, tiles=tiles)
    same_T = (chosen_TK == experts_TK).all(dim=1)
    if not same_T.float().mean() > 0.999:
        return False
    return is_close(out_TD[same_T], expected_TD[same_T], layer.w1_EDF.itemsize)


def rounds(device: Device, shape: Shape) -> Iterator[Callable[[Plan], list[Plan]]]:
    """What to try one after the other, each given the best plan so far."""
    E, D, F, item, R = shape
    up = list(configs.candidates(device, item, E, D))
    down = list(configs.candidates(device, item, E, F))
    # the pair starts from the formula's choice for many rows, which is never the small kernel
    start = configs.formula(device, shape._replace(rows=max(R, configs.SMALL_ROWS + 1)))
    yield lambda best: [Plan(tile, start.down) for tile in up]
    yield lambda best: [Plan(best.up, tile) for tile in down]
    if R <= configs.MOST_SMALL_ROWS:
        small_up = list(configs.small_candidates(device, item, splits=(1,)))
        small_down = list(configs.small_candidates(device, item, splits=SPLITS))
        middle = Tile("small", configs.small_block(shape), 64, 64, 4, 4, 4)
        yield lambda best: [best, *(Plan(tile, middle) for tile in small_up)]
        yield lambda best: [
            best,
            *(Plan(best.up, tile) for tile in small_down if best.up.kernel == "small"),
        ]
    # no menu need have what the table takes the place of
    formula = configs.formula(device, shape)
    yield lambda best: [formula]


def tune(
    device: Device, shape: Shape, layers: Sequence[Layer], repeats: int, bar: tqdm[Any] | None
) -> tuple[Plan, float]:
    """The fastest plan that is right, and its seconds.

    Raises:
        RuntimeError: No plan gives the right result.
    """
    expected_TD, _, experts_TK = reference.moe_layer(*layers[0])
    timed: dict[Plan, float] = {}
    best = configs.formula(device, shape)
    for candidates in rounds(device, shape):
        for tiles in candidates(best):
            if tiles not in timed:
                timed[tiles] = seconds_of(
                    tiles,
                    partial(is_right, layers[0], tiles, expected_TD, experts_TK),
                    partial(time_plan, layers, tiles, repeats),
                    bar,
                )
        best = min(timed, key=lambda tiles: timed[tiles])
    return _usable(best, timed[best])


def _usable(best: Choice, seconds: float) -> tuple[Choice, float]:
    if seconds == float("inf"):
        raise RuntimeError("no tile gives the right result on this device")
    return best, seconds


def tune_dense(
    device: Device,
    shape: DenseShape,
    dtype: torch.dtype,
    where: torch.device,
    repeats: int,
    bar: tqdm[Any] | None,
) -> tuple[Tile | Literal["library"], float]:
    """The fastest way to a product with one matrix, bias and GELU, and its seconds.

    Raises:
        RuntimeError: No way gives the right result.
    """
    generator = torch.Generator(where).manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=generator, device=where) * scale).to(dtype)

    x_TI = normal(shape.rows, shape.inner)
    matrix = shape.outer * shape.inner * shape.itemsize
    count = COLD_BYTES // matrix if where.type == "cuda" else 0
    layers = [
        (normal(shape.outer, shape.inner, scale=shape.inner**-0.5), normal(shape.outer))
        for _ in range(max(LAYERS, count))
    ]
    weight_OI, bias_O = (one.float() for one in layers[0])
    expected = reference.linear(x_TI.float(), weight_OI, bias_O, gelu=shape.gelu)

    def call(tile: Tile | Literal["library"], layer: tuple[Tensor, Tensor]) -> Tensor:
        return fused.linear(x_TI, *layer, gelu=shape.gelu, tile=tile)

    def check(tile: Tile | Literal["library"]) -> bool:
        return is_close(call(tile, layers[0]), expected, shape.itemsize)

    def take_time(tile: Tile | Literal["library"]) -> float:
        return time_calls([partial(call, tile, layer) for layer in layers], repeats)

    # what the table would take the place of is among them
    menu = [
        "library",
        configs.dense_formula(device, shape),
        *configs.dense_candidates(device, shape),
    ]
    tiles: list[Tile | Literal["library"]] = list(dict.fromkeys(menu))
    timed = {
        tile: seconds_of(tile, partial(check, tile), partial(take_time, tile), bar)
        for tile in tiles
    }
    best = min(tiles, key=lambda tile: timed[tile])
    return _usable(best, timed[best])


def tune_attention(
    device: Device,
    shape: AttentionShape,
    heads: int,
    dtype: torch.dtype,
    where: torch.device,
    repeats: int,
    bar: tqdm[Any] | None,
) -> tuple[AttentionTile, float]:
    """The fastest form of attention over texts of one length, and its seconds.

    A form that rotates in place would rotate once more at every call: it is compared with plain
    torch once, and timed with angles of 0 in the place of the true ones, which cost as much.

    Raises:
        RuntimeError: No form gives the right result.
    """
    generator = torch.Generator(where).manual_seed(0)
    qkv = torch.randn(
        *(LAYERS, shape.tokens, 3, heads, shape.head_width), generator=generator, device=where
    ).to(dtype)
    lengths = [shape.longest] * (shape.tokens // shape.longest)
    positions_T = torch.arange(shape.longest, device=where).repeat(len(lengths))
    sizes = (shape.longest, shape.head_width, 10_000.0)
    exact = reference.pack(lengths, positions_T, *sizes, torch.float32)
    expected = reference.attention(qkv[0].float(), exact)

    def packed(tile: AttentionTile, positions_T: Tensor) -> fused.Packing:
        return fused.pack(lengths, positions_T, *sizes, dtype, tile=tile)

    def check(tile: AttentionTile) -> bool:
        out = fused.attention(qkv[0].clone(), packed(tile, positions_T))
        return is_close(out, expected, shape.itemsize)

    def take_time(tile: AttentionTile) -> float:
        packing = unturned(packed(tile, positions_T))
        return time_calls([partial(fused.attention, one, packing) for one in qkv], repeats)

    timed = {
        tile: seconds_of(tile, partial(check, tile), partial(take_time, tile), bar)
        for tile in dict.fromkeys(configs.attention_candidates(device, shape))
    }
    best = min(timed, key=lambda tile: timed[tile])
    return _usable(best, timed[best])


def unturned(packing: fused.Packing) -> fused.Packing:
    """The same with angles of 0: a rotation reads as much, and changes nothing."""
    return packing._replace(cos=torch.ones_like(packing.cos), sin=torch.zeros_like(packing.sin))


def record_of(
    kind: str, device: Device, shape: Any, choice: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """A record of tuned.json."""
    return {
        "kind": kind,
        "device": device.name,
        "shape": shape._asdict(),
        **choice,
        "microseconds": round(1e6 * seconds, 2),
    }


class Work(NamedTuple):
    """A size class to measure."""

    kind: str
    shape: Any
    # returns the choice as the table holds it, and its seconds
    measure: Callable[[], tuple[dict[str, Any], float]]


def main(arguments: list[str] | None = None) -> int:
    """Run the tuner; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m nomoe_kernels.tune", description="Measure the fastest tiles on this device."
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--ffn-width", type=int, default=3072)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument(
        "--rows",
        type=int,
        nargs="+",
        help="rows of a product, tokens of attention; by default 16 to 2^18",
    )
    parser.add_argument("--repeats", type=int, default=10, help="timed runs of each plan")
    parser.add_argument(
        "--output", type=Path, default=configs.TUNED, help="table to write or add to"
    )
    parser.add_argument("--head-width", type=int, default=64)
    parser.add_argument(
        "--only", nargs="+", choices=KINDS, default=list(KINDS), help="what to measure"
    )
    parser.add_argument("--again", action="store_true", help="measure what the table has, too")
    args = parser.parse_args(arguments)
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if where.type == "cpu" and not checks.INTERPRETED:
        parser.error("there is no CUDA device to tune for")
    if checks.INTERPRETED and args.output == configs.TUNED:
        parser.error("under Triton's interpreter give --output: its times are not a device's")
    dtype = DTYPES[args.dtype]
    device = configs.device_of(where)
    rows = [configs.size_class(R) for R in args.rows or (1 << power for power in range(4, 19))]

    entries: list[dict[str, Any]] = []
    if args.output.exists():
        entries = json.loads(args.output.read_text(encoding="utf-8"))

    def key(record: dict[str, Any]) -> str:
        return json.dumps([record[name] for name in ("kind", "device", "shape")], sort_keys=True)

    known = {key(record): record for record in entries}

    def write() -> None:
        # a whole file at every moment: the table is read by whoever imports the kernels
        part = args.output.with_name(args.output.name + ".part")
        part.write_text(json.dumps(list(known.values()), indent=1) + "\n", encoding="utf-8")
        part.replace(args.output)

    # before anything is measured, lest it cannot be kept
    write()
    bar: tqdm[Any] | None = None
    D, F, item = args.width, args.ffn_width, dtype.itemsize

    def tune_layer(shape: Shape) -> tuple[dict[str, Any], float]:
        layers = draw_layers(shape, args.top_k, dtype, where)
        tiles, seconds = tune(device, shape, layers, args.repeats, bar)
        return {"up": tiles.up._asdict(), "down": tiles.down._asdict()}, seconds

    def dense(shape: DenseShape) -> tuple[dict[str, Any], float]:
        tile, seconds = tune_dense(device, shape, dtype, where, args.repeats, bar)
        return {"tile": tile if tile == "library" else tile._asdict()}, seconds

    def attention(shape: AttentionShape) -> tuple[dict[str, Any], float]:
        heads = D // args.head_width
        tile, seconds = tune_attention(device, shape, heads, dtype, where, args.repeats, bar)
        return {"tile": tile._asdict()}, seconds

    works = []
    for R in sorted(set(rows)):
        layer = Shape(args.experts, D, F, item, R)
        works.append(Work("layer", layer, partial(tune_layer, layer)))
        for inner, outer, gelu in ((D, F, True), (F, D, False), (D, 3 * D, False), (D, D, False)):
            product = DenseShape(inner, outer, item, R, gelu)
            works.append(Work("dense", product, partial(dense, product)))
        for longest in (16, 32, 64, 128, 256, 512, 1024, 2048):
            if longest <= R:
                texts = AttentionShape(args.head_width, item, longest, R)
                works.append(Work("attention", texts, partial(attention, texts)))
    works = [work for work in works if work.kind in args.only]
    bar = tqdm(works, unit=" sizes", disable=None)
    with torch.no_grad():
        for work in bar:
            sizes = " ".join(f"{name} {size}" for name, size in work.shape._asdict().items())
            name = key(record_of(work.kind, device, work.shape, {}, 0.0))
            if name in known and not args.again:
                tqdm.write(f"{work.kind}, {sizes}: in the table already; --again measures it")
                continue
            choice, seconds = work.measure()
            known[name] = record_of(work.kind, device, work.shape, choice, seconds)
            write()
            tqdm.write(f"{work.kind}, {sizes}: {1e6 * seconds:.1f} us  {choice}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
