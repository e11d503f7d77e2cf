"""Time the encoder against the other ways to run the same checkpoint.

    python benchmarks/bench_encoder.py                      float32; on a GPU where there is one
    python benchmarks/bench_encoder.py --dtype bfloat16 --device cuda
    python benchmarks/bench_encoder.py --model FOLDER       a checkpoint of your own
    python benchmarks/bench_encoder.py --threads 1          fairer where others use the machine
    python benchmarks/bench_encoder.py --smoke              a toy model, in seconds

Inputs are one query, queries of 8 to 30 tokens, passages of 60 to 250, documents of 512, and a
mixture, of words of twenty languages. Each is run twice: from token ids, where a contender takes
those, and from strings, where tokenising counts. Contenders that are not installed are named in the
report, with the reason; text-embeddings-inference is asked where `--tei` says it serves the same
checkpoint, and the published code runs where `--trust-remote-code` allows it.

Without --model the checkpoint is random at the real sizes and routes as the real one does. Every
vector has to agree with that of the looping form in float32, one text at a time; an input for which
one does not has no speed. In float32, texts that rounding may send to other experts are left out.
Results go to benchmarks/results/ as dated JSON and Markdown.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import harness
import peers
import report
import script
import stock
import text_peers
import torch
import torch.nn.functional as F
import workload
from harness import Case, Contender, Deviation
from text_peers import EmbedTexts
from torch import Tensor
from tqdm.auto import tqdm

from nomoe import NomicMoEModel, synthetic
from nomoe.arguments import DTYPES
from nomoe.checkpoint import TOKENIZER_FILE, load_tensors, locate
from nomoe.engine import token_budget
from nomoe.tokenizer import Tokenizer

SEED = 0
MOST_TOKENS = 512
# times the inputs of `workload.Writer.inputs`
SCALES = {"cpu": 1, "cuda": 64}
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
# numbers of unit vectors are some 27 times smaller
UNIT = 1 / 20


def build_cases(
    title: str,
    texts: list[str],
    ids: list[list[int]],
    from_ids: Sequence[peers.Peer],
    from_strings: dict[str, EmbedTexts],
    packed: peers.Packed,
    tensors: dict[str, Tensor],
    oracle: peers.Peer,
    dtype: str,
) -> list[Case]:
    """Make the case that begins with ids, and the one that begins with strings."""
    config = packed.model.config
    lengths = [len(one) for one in ids]
    tokens, padded = sum(lengths), max(lengths) * len(lengths)
    flop = harness.forward_flop(config, lengths)
    most = BOUNDS[dtype]
    bound = most._replace(cosine_distance=most.cosine_distance + DRIFT[dtype] / len(texts))
    products = harness.linear_ceiling(config, tensors, packed.routed_rows(ids))
    if packed.model.device.type == "cuda":
        products = harness.captured(products)
    ceiling = Contender(
        "ceiling: projections alone", products, harness.projection_flop(config, tokens), bound=None
    )

    def contender(name: str, run: Callable[[], Tensor], scale: float) -> Contender:
        return Contender(name, run, flop, bound._replace(max_abs=scale * bound.max_abs))

    expected_BD = torch.cat([oracle([one]) for one in ids])
    title = f"{title} ({tokens:,} tokens, {padded:,} when padded)"
    forwards = [contender(one.name, partial(one, ids), 1.0) for one in from_ids]
    wholes = [contender(name, partial(embed, texts), UNIT) for name, embed in from_strings.items()]
    return [
        Case(
            f"{title}, from ids", tokens, [*forwards, ceiling], expected_BD,
            baseline=peers.PaddedLoop.name,
        ),
        Case(
            f"{title}, from strings", tokens, [*wholes, ceiling], F.normalize(expected_BD, dim=1),
            baseline=text_peers.NOMOE.name,
        ),
    ]  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = script.parser("Time the encoder against its peers.", repeats=10)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--model", help="a folder or repository; by default random weights")
    parser.add_argument("--scale", type=int, help="times the texts; by default 1, on a GPU 64")
    parser.add_argument("--tei", help="address of text-embeddings-inference, http://host:port")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="time the code the checkpoint names too"
    )
    args = script.parse(parser, arguments, counts=["scale"])
    device = args.device
    machine = report.machine_line(device)
    scale = args.scale or (1 if args.smoke else SCALES.get(device.type, 1))

    with tempfile.TemporaryDirectory() as temporary:
        if args.model is not None:
            folder = locate(args.model)
        else:
            print("drawing random weights ...", file=sys.stderr)
            size: synthetic.Size = "tiny" if args.smoke else "full"
            folder = synthetic.write_checkpoint(Path(temporary) / size, size, SEED)
        return compare(args, arguments, folder, device, machine, scale)


def compare(
    args: argparse.Namespace,
    arguments: Sequence[str],
    folder: Path,
    device: torch.device,
    machine: str,
    scale: int,
) -> int:
    """Time every contender on a checkpoint; return the exit status."""
    dtype = DTYPES[args.dtype]
    setting = text_peers.Setting(folder, args.dtype, device, args.tei, args.trust_remote_code)
    not_run = {one.name: reason for one in text_peers.PEERS if (reason := one.obstacle(setting))}
    not_run["fastembed"] = text_peers.why_not_fastembed()
    model = NomicMoEModel.from_pretrained(folder, device=device, dtype=dtype)
    config = model.config
    shapes = {name: tuple(one.shape) for name, one in model.state_dict().items()}
    tensors = load_tensors(folder, shapes, dtype=dtype, device=device)
    exact = tensors
    if dtype != torch.float32:
        exact = load_tensors(folder, shapes, dtype=torch.float32, device=device)

    packed = peers.Packed(model, token_budget(model))
    everyone: list[peers.Peer] = [
        packed, peers.PaddedLoop(config, tensors), stock.Stock(config, tensors)
    ]  # fmt: skip
    not_run |= {peer.name: reason for peer in everyone if (reason := peer.available())}
    from_ids = [peer for peer in everyone if peer.name not in not_run]

    tokenizer = Tokenizer(folder / TOKENIZER_FILE, config.embedding_rows)
    oracle = peers.PaddedLoop(config, exact)
    inputs = workload.Writer(tokenizer, SEED).inputs(scale)
    first_texts = next(iter(inputs.values()))
    first_ids = tokenizer(first_texts, MOST_TOKENS).ids
    # whatever one of them raises must not take the others' figures along
    from_strings = {}
    for one in text_peers.PEERS:
        if one.name not in not_run:
            try:
                encode = one.load(setting)
                encode(first_texts)
            except (Exception, SystemExit) as error:
                if one is text_peers.NOMOE:
                    raise
                not_run[one.name] = f"it fails: {type(error).__name__}: {error}"
            else:
                from_strings[one.name] = encode
    for peer in list(from_ids):
        try:
            peer(first_ids)
        except Exception as error:
            if peer is packed:
                raise
            not_run[peer.name] = f"it fails: {type(error).__name__}: {error}"
            from_ids.remove(peer)
    run = script.Run(
        args,
        f"bench_encoder-{device.type}-{args.dtype}",
        benchmark="bench_encoder",
        command=report.command_line(arguments),
        machine=machine,
        settings={
            "weights": args.model or "random",
            "dtype": args.dtype,
            "device": str(device),
            "backend": model.backend.name,
            "others": report.versions(*text_peers.PACKAGES),
            "repeats": args.repeats,
            "warm-up": harness.WARM_UP,
            "width": config.n_embd,
            "layers": config.n_layer,
        },
        not_run=not_run,
    )
    for title, texts in tqdm(inputs.items(), unit=" inputs", disable=None):
        ids = tokenizer(texts, MOST_TOKENS).ids
        # in 16 bits there are too many, and DRIFT has room for them
        if args.dtype == "float32" and (near := packed.near_ties(ids, peers.NEAR_TIE)):
            kept = sorted(set(range(len(texts))).difference(near))
            title = f"{title}, {len(near)} near a tie left out"
            texts, ids = [texts[place] for place in kept], [ids[place] for place in kept]
            if not kept:
                continue
        with run.attempt(title):
            cases = build_cases(
                title, texts, ids, from_ids, from_strings, packed, tensors, oracle, args.dtype
            )
            for case in cases:
                with run.attempt(case.title):
                    run.measure(case)
    return run.finish()


if __name__ == "__main__":
    sys.exit(main())
