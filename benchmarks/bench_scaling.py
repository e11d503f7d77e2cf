"""Measure how the cost of a forward grows: with length, batch, uneven routing and experts.

    python benchmarks/bench_scaling.py                     a quarter of an hour on two cores
    python benchmarks/bench_scaling.py --sweep length      one of length, batch, routing, experts
    python benchmarks/bench_scaling.py --smoke             a toy model, in seconds

`length`: as many tokens in texts of growing length. `batch`: more and more texts of 128 tokens, so
tokens in flight. `routing`: a model of one dense and one MoE layer, whose busiest expert takes a
growing share of the rows. `experts`: the same model with more experts, two to a token as ever.

Contenders are nomoe, the padded looping form and stock torch (stock.py), on random weights. Each
vector has to agree with that of the looping form in float32; a point where one does not has no
speed. In float32 a text of which the last bit of a sum might send a token to another expert is
drawn anew. Results go to benchmarks/results/ as dated JSON and Markdown; pictures.py draws them.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import bench_encoder
import harness
import peers
import report
import script
import stock
import torch
import workload
from harness import Case, Contender
from tqdm.auto import tqdm

from nomoe import NomicMoEConfig, NomicMoEModel, data
from nomoe.arguments import DTYPES

SEED = 0
SWEEPS = ("length", "batch", "routing", "experts")
# tokens in all texts of a point, by device
TOKENS = {"cpu": 2048, "cuda": 65_536}
SMOKE_TOKENS = 64
BATCH_LENGTH = 128
# texts that a model is drawn from
MOST_DRAWN_FROM = 32
# calls before those that count, on a CPU and on CUDA, where the second records a graph
WARM_UP = (1, 3)
UNEVENNESS = (0.0, 0.5, 1.0, 2.0, 4.0)
EXPERTS = (2, 4, 8, 16, 32, 64)


class Point(NamedTuple):
    """One size of a sweep."""

    sweep: str
    # what grows; of `routing` it is known once the model has run
    x: float
    config: NomicMoEConfig
    lengths: list[int]
    unevenness: float = 0.0


def points(config: NomicMoEConfig, tokens: int, sweeps: Sequence[str]) -> Iterator[Point]:
    """Every point of the sweeps, those that share a model next to each other."""
    lengths = [2**power for power in range(4, 12) if 2**power <= tokens]
    if "length" in sweeps:
        for length in lengths:
            yield Point("length", length, config, [length] * (tokens // length))
    if "batch" in sweeps:
        most = max(1, 2 * tokens // BATCH_LENGTH)
        for texts in (2**power for power in range(most.bit_length())):
            yield Point("batch", texts * BATCH_LENGTH, config, [BATCH_LENGTH] * texts)
    # a dense layer and a MoE layer
    short = dataclasses.replace(config, n_layer=2)
    texts_of_128 = [min(BATCH_LENGTH, tokens)] * max(1, tokens // BATCH_LENGTH)
    if "routing" in sweeps:
        for unevenness in UNEVENNESS:
            yield Point("routing", 0.0, short, texts_of_128, unevenness)
    if "experts" in sweeps:
        for experts in EXPERTS:
            several = dataclasses.replace(short, num_experts=experts)
            yield Point("experts", experts, several, texts_of_128)


def build_case(point: Point, dtype: str, device: torch.device) -> tuple[Case, float]:
    """Make a point's case; also return what grows, the busiest expert's share of rows measured."""
    generator = torch.Generator().manual_seed(SEED)
    config, lengths = point.config, point.lengths

    def draw(length: int) -> list[int]:
        return torch.randint(4, config.vocab_size, (length,), generator=generator).tolist()

    texts = [draw(length) for length in lengths]
    # some of them are enough to draw from, and one width has room for no more
    some = texts[: min(MOST_DRAWN_FROM, config.n_embd // 4)]
    exact = workload.draw_model(config, some, SEED, point.unevenness).to(device)
    oracle = peers.PaddedLoop(config, exact.state_dict())
    with torch.device("meta"):
        model = NomicMoEModel(config)
    state = {name: one.to(DTYPES[dtype]) for name, one in exact.state_dict().items()}
    # copies: what others hold too is not packed
    model.load_state_dict({name: one.clone() for name, one in state.items()}, assign=True)
    packed = peers.Packed(model.eval())
    if dtype == "float32":
        # in 16 bits there are too many, and the bound has room for them
        texts = packed.away_from_ties(texts, draw)
    flop = harness.forward_flop(config, lengths)
    most = bench_encoder.BOUNDS[dtype]
    drift = bench_encoder.DRIFT[dtype] / len(texts)
    bound = most._replace(cosine_distance=most.cosine_distance + drift)
    everyone: list[peers.Peer] = [
        packed,
        # one batch too: texts of a point are as long as each other, and nothing is padded
        peers.PaddedLoop(config, state, batch_size=len(texts)),
        stock.Stock(config, state),
    ]
    contenders = [
        Contender(peer.name, partial(peer, texts), flop, bound)
        for peer in everyone
        if peer.available() is None
    ]
    routed = packed.routed_rows(texts)
    ceiling = harness.linear_ceiling(config, state, routed)
    if device.type == "cuda":
        ceiling = harness.captured(ceiling)
    products = harness.projection_flop(config, sum(lengths))
    contenders.append(Contender("ceiling: projections alone", ceiling, products, bound=None))
    x = point.x
    if point.sweep == "routing":
        x = max(max(rows) / sum(rows) for rows in routed)
    expected_BD = oracle(texts)
    title = f"{point.sweep} {x:.3g}: {len(texts):,} texts, {sum(lengths):,} tokens"
    return Case(title, sum(lengths), contenders, expected_BD, peers.PaddedLoop.name), x


def measure_point(
    run: script.Run, point: Point, dtype: str, device: torch.device, warm_up: int
) -> None:
    """Build a point's case, which holds its models, measure it, and let go of it."""
    case, x = build_case(point, dtype, device)
    run.measure(case, warm_up=warm_up, sweep=point.sweep, x=x)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = script.parser("Time how a forward's cost grows.", repeats=3)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--sweep", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    parser.add_argument("--tokens", type=int, help="tokens of a point; by default by device")
    args = script.parse(parser, arguments, counts=["tokens"])
    device = args.device
    machine = report.machine_line(device)
    config = NomicMoEConfig.from_json(
        (data.TINY if args.smoke else data.FULL_WIDTH) / "config.json"
    )
    tokens = args.tokens or (SMOKE_TOKENS if args.smoke else TOKENS.get(device.type, 2048))
    every = list(points(config, tokens, args.sweep))
    not_run = {"stock torch": reason} if (reason := stock.obstacle()) else {}
    warm_up = WARM_UP[device.type == "cuda"]
    run = script.Run(
        args,
        f"bench_scaling-{device.type}-{args.dtype}",
        benchmark="bench_scaling",
        command=report.command_line(arguments),
        machine=machine,
        settings={
            "dtype": args.dtype,
            "device": str(device),
            "repeats": args.repeats,
            "warm-up": warm_up,
            "width": config.n_embd,
            "layers": config.n_layer,
        },
        not_run=not_run,
    )
    for point in tqdm(every, unit=" sizes", disable=None):
        with run.attempt(f"{point.sweep} {point.x or point.unevenness:.3g}"):
            measure_point(run, point, args.dtype, device, warm_up)
    return run.finish()


if __name__ == "__main__":
    sys.exit(main())
