"""Time a forward of the encoder against the other ways to run the same model.

    python benchmarks/bench_encoder.py                      float32; on a GPU where there is one
    python benchmarks/bench_encoder.py --dtype bfloat16 --device cpu --repeats 5
    python benchmarks/bench_encoder.py --threads 1          fairer where others use the machine
    python benchmarks/bench_encoder.py --smoke              a toy model, in seconds

Weights are random, at the real model's sizes but for the vocabulary, which costs no time, and route
as the real ones do; see workload.py. Each output has to agree with that of the looping form in
float32, one text at a time; otherwise the run ends with no speed. Results go to benchmarks/results/
as dated JSON and Markdown.
"""

from __future__ import annotations

import sys
from functools import partial
from itertools import chain

import harness
import peers
import report
import script
import torch
import workload
from harness import Case, Contender, Deviation
from tqdm.auto import tqdm

from nomoe import NomicMoEConfig, NomicMoEModel, data
from nomoe.model import DTYPES, resolve_device

SEED = 0
# of pooled vectors, whose numbers reach 3. In 16 bits twice what was seen of either contender, and
# DRIFT beside it; router weights divided by their sum are off by 0.2
BOUNDS = {
    "float32": Deviation(cosine_distance=1e-8, max_abs=1e-4),
    "float16": Deviation(cosine_distance=2e-3, max_abs=1.5),
    "bfloat16": Deviation(cosine_distance=0.01, max_abs=2.0),
}
# in 16 bits a token near a tie is sent to other experts, which moves its text: one text of a case
# may be this far off
DRIFT = {"float32": 0.0, "float16": 0.1, "bfloat16": 0.1}


def build_case(
    title: str,
    texts: list[list[int]],
    contenders: list[peers.Peer],
    packed: peers.Packed,
    oracle: peers.Peer,
    dtype: str,
) -> Case:
    """Make a case of the contenders and the ceiling."""
    config, tensors = packed.model.config, packed.model.state_dict()
    lengths = [len(ids) for ids in texts]
    tokens, padded = sum(lengths), max(lengths) * len(lengths)
    flop = harness.forward_flop(config, lengths)
    most = BOUNDS[dtype]
    bound = most._replace(cosine_distance=most.cosine_distance + DRIFT[dtype] / len(texts))
    ceiling = Contender(
        "ceiling: projections alone",
        harness.linear_ceiling(config, tensors, packed.routed_rows(texts)),
        harness.projection_flop(config, tokens),
        bound=None,
    )
    return Case(
        f"{title} ({tokens:,} in all, {padded:,} when padded)",
        tokens,
        [*(Contender(one.name, partial(one, texts), flop, bound) for one in contenders), ceiling],
        torch.cat([oracle([ids]) for ids in texts]),
        baseline=peers.PaddedLoop.name,
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = script.parser("Time a forward of the encoder against its peers.", repeats=10)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    args = script.parse(parser, arguments)
    device = resolve_device(args.device)
    machine = report.machine_line(device)

    folder = data.TINY if args.smoke else data.FULL_WIDTH
    config = NomicMoEConfig.from_json(folder / "config.json")
    print("drawing random weights ...", file=sys.stderr)
    inputs = workload.draw_texts(config, SEED)
    exact = workload.draw_model(config, list(chain.from_iterable(inputs.values())), SEED)
    oracle = peers.PaddedLoop(config, exact.state_dict())
    with torch.device("meta"):
        model = NomicMoEModel(config, device=device)
    # the oracle's own tensors where they are as asked for
    state = {name: one.to(device, DTYPES[args.dtype]) for name, one in exact.state_dict().items()}
    model.load_state_dict(state, assign=True)
    model.eval()

    packed = peers.Packed(model)
    everyone: list[peers.Peer] = [packed, peers.PaddedLoop(config, model.state_dict())]
    not_run = {peer.name: reason for peer in everyone if (reason := peer.available())}
    contenders = [peer for peer in everyone if peer.name not in not_run]

    print("computing what to expect ...", file=sys.stderr)
    cases = [
        build_case(title, texts, contenders, packed, oracle, args.dtype)
        for title, texts in inputs.items()
    ]
    calls = (harness.WARM_UP + args.repeats) * sum(len(case.contenders) for case in cases)
    try:
        with tqdm(total=calls, unit=" calls", desc="timing", disable=None) as bar:
            results = [
                (case, harness.measure(case, repeats=args.repeats, device=device, bar=bar))
                for case in cases
            ]
    except harness.DisagreementError as error:
        return script.refuse(error)

    record = report.make_record(
        "bench_encoder",
        results,
        command=report.command_line(arguments),
        machine=machine,
        settings={
            "dtype": args.dtype,
            "device": str(device),
            "backend": model.backend.name,
            "repeats": args.repeats,
            "warm-up": harness.WARM_UP,
            "width": config.n_embd,
            "layers": config.n_layer,
        },
        not_run=not_run,
    )
    return script.finish(record, args, f"bench_encoder-{device.type}-{args.dtype}")


if __name__ == "__main__":
    sys.exit(main())
