"""Measure which tiles are fastest on this device, and keep them for `nomoe_kernels.configs`.

    python -m nomoe_kernels.tune                              the published model's sizes, float16
    python -m nomoe_kernels.tune --dtype float32 --rows 4096
    python -m nomoe_kernels.tune --output my.json             elsewhere than the table that ships

For every size class the whole layer is timed as a CUDA graph over several layers' weights, first
with each tile for the first product, then with each for the second, then with those for few rows;
a tile whose result is not that of plain torch is left out, and named. The table is written after
every size class, and size classes it has are not measured again without --again. float16 and
bfloat16 share entries: their tiles cost the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from . import checks, configs, fused, reference
from .configs import Device, Plan, Shape, Tile

# weights that no L2 cache holds: five layers of 75 MB each
LAYERS = 5
# rows up to which the kernel for few rows is tried
SMALL_ROWS = 2048
SPLITS = (1, 2, 4, 8)
# largest difference from plain torch, of its largest value
TOLERANCE = {4: 1e-5, 2: 2e-2}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in checks.DTYPES}


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
    """Median seconds of one layer; on CUDA from replays of a graph over all layers."""

    def run() -> None:
        for layer in layers:
            fused.run_layer(*layer, tiles=tiles)

    device = layers[0].x_TD.device
    run()
    if device.type != "cuda":
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds) / len(layers)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    graph.replay()
    for mark in marks[:-1]:
        mark.record()
        graph.replay()
    marks[-1].record()
    torch.cuda.synchronize(device)
    times = [float(start.elapsed_time(end)) for start, end in pairwise(marks)]
    return statistics.median(times) / 1000 / len(layers)


def is_right(layer: Layer, tiles: Plan, expected_TD: Tensor, experts_TK: Tensor) -> bool:
    """Whether a plan gives what plain torch gives, where both choose the same experts.

    Of many thousand random tokens one may be so near a tie that float32 decides it either way.
    """
    out_TD, _, chosen_TK = fused.run_layer(*layer, tiles=tiles)
    same_T = (chosen_TK == experts_TK).all(dim=1)
    off_TD = (out_TD - expected_TD)[same_T].abs()
    is_close = bool(off_TD.max() <= TOLERANCE[layer.w1_EDF.itemsize] * expected_TD.abs().max())
    return is_close and bool(same_T.float().mean() > 0.999)


def rounds(device: Device, shape: Shape) -> Iterator[Callable[[Plan], list[Plan]]]:
    """What to try one after the other, each given the best plan so far."""
    E, D, F, item, R = shape
    up = list(configs.candidates(device, item, E, D))
    down = list(configs.candidates(device, item, E, F))
    # the pair starts from the formula's choice for many rows, which is never the small kernel
    start = configs.formula(device, shape._replace(rows=max(R, configs.SMALL_ROWS + 1)))
    yield lambda best: [Plan(tile, start.down) for tile in up]
    yield lambda best: [Plan(best.up, tile) for tile in down]
    if R <= SMALL_ROWS:
        small_up = list(configs.small_candidates(device, item, splits=(1,)))
        small_down = list(configs.small_candidates(device, item, splits=SPLITS))
        middle = Tile("small", 16 if R <= 16 * E else 32, 64, 64, 4, 4, 4)
        yield lambda best: [best, *(Plan(tile, middle) for tile in small_up)]
        yield lambda best: [
            best,
            *(Plan(best.up, tile) for tile in small_down if best.up.kernel == "small"),
        ]


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
                if bar is not None:
                    bar.set_postfix_str(" ".join(f"{tiles.up[:6]} {tiles.down}".split()))
                try:
                    if is_right(layers[0], tiles, expected_TD, experts_TK):
                        timed[tiles] = time_plan(layers, tiles, repeats)
                        continue
                    problem = "its result is wrong"
                # a tile that does not fit, or that this version of Triton cannot compile
                except (OutOfResources, CompilationError, RuntimeError) as error:
                    problem = str(error).partition("\n")[0]
                print(f"left out, {problem}: {tiles}", file=sys.stderr)
                timed[tiles] = float("inf")
        best = min(timed, key=lambda tiles: timed[tiles])
    if timed[best] == float("inf"):
        raise RuntimeError("no tile gives the right result on this device")
    return best, timed[best]


def entry(device: Device, shape: Shape, tiles: Plan, seconds: float) -> dict[str, Any]:
    """A record of tuned.json."""
    return {
        "kind": "layer",
        "device": device.name,
        "shape": shape._asdict(),
        "up": tiles.up._asdict(),
        "down": tiles.down._asdict(),
        "microseconds": round(1e6 * seconds, 2),
    }


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
    parser.add_argument("--rows", type=int, nargs="+", help="routed rows; by default 16 to 2^18")
    parser.add_argument("--repeats", type=int, default=10, help="timed runs of each plan")
    parser.add_argument(
        "--output", type=Path, default=configs.TUNED, help="table to write or add to"
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
        return json.dumps([record["device"], record["shape"]], sort_keys=True)

    known = {key(record): record for record in entries}

    def write() -> None:
        # a whole file at every moment: the table is read by whoever imports the kernels
        part = args.output.with_name(args.output.name + ".part")
        part.write_text(json.dumps(list(known.values()), indent=1) + "\n", encoding="utf-8")
        part.replace(args.output)

    # before anything is measured, lest it cannot be kept
    write()
    bar = tqdm(sorted(set(rows)), unit=" sizes", disable=None)
    with torch.no_grad():
        for R in bar:
            shape = Shape(args.experts, args.width, args.ffn_width, dtype.itemsize, R)
            # of the formula's plan, for the key alone
            empty = entry(device, shape, configs.formula(device, shape), 0.0)
            if key(empty) in known and not args.again:
                tqdm.write(f"{R:>7} rows: in the table already; --again measures them")
                continue
            layers = draw_layers(shape, args.top_k, dtype, where)
            tiles, seconds = tune(device, shape, layers, args.repeats, bar)
            known[key(empty)] = entry(device, shape, tiles, seconds)
            write()
            tqdm.write(f"{R:>7} rows: {1e6 * seconds:9.1f} us  up {tiles.up}  down {tiles.down}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
