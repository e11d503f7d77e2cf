"""Time what lies around a forward: from strings to vectors, in queries, batches and a corpus.

    python benchmarks/bench_engine.py                 on a GPU where there is one, in its dtype
    python benchmarks/bench_engine.py --profile       on a GPU also the time of each kernel
    python benchmarks/bench_engine.py --smoke         a toy model and few texts, in seconds

Each case also times its forward alone: launched kernel by kernel from ids on the device, and on a
GPU replayed as a graph. A case's ratio to "forward, launched" is therefore what the way there and
back costs; of the corpus, it is also the share of the time in which the GPU is busy, as far as a
forward keeps it so. Weights are random, at the real sizes. Each output has to agree with forwards
of one text at a time; a case in which one does not has no speed. Results go to benchmarks/results/.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import harness
import report
import script
import torch
from harness import Case, Contender, Deviation
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from tqdm.auto import tqdm

from nomoe import Encoder, data, synthetic
from nomoe.arguments import DTYPES, resolve_dtype
from nomoe.batching import make_batches
from nomoe.engine import Engine, Pooling, token_budget

SEED = 0
# (texts, tokens of each)
BATCHES = [(32, 128), (256, 128), (128, 512)]
SMOKE_BATCHES = [(3, 8)]
CORPUS_TEXTS, SMOKE_CORPUS_TEXTS = 10_000, 40
# of unit vectors, between forwards of the same weights in the same dtype: in 16 bits a token near a
# tie may go to other experts
BOUNDS = {
    "float32": Deviation(cosine_distance=1e-8, max_abs=1e-3),
    "float16": Deviation(cosine_distance=1e-4, max_abs=0.1),
    "bfloat16": Deviation(cosine_distance=5e-3, max_abs=0.3),
}
LAUNCHED = "forward, launched"


def draw_corpus(encoder: Encoder, count: int) -> list[str]:
    """Draw texts of 8 to 512 tokens, all lengths as likely, from the words of twenty languages."""
    generator = random.Random(SEED)
    words = " ".join(chain.from_iterable(data.sentences().values())).split()
    # every word alone costs two tokens more
    ids = encoder.tokenizer(words, 512).ids
    cost = {word: max(1, len(one) - 2) for word, one in zip(words, ids, strict=True)}
    texts = []
    for _ in range(count):
        room = generator.randint(8, 512) - 2
        text: list[str] = []
        while room > 0:
            text.append(generator.choice(words))
            room -= cost[text[-1]]
        texts.append(" ".join(text))
    return texts


class Forward:
    """Forwards from ids that are on the device already, as batches of a token budget."""

    def __init__(self, runner: Engine, texts: Sequence[list[int]], pooling: Pooling) -> None:
        self.model, self.pooling = runner.model, pooling
        lengths = [len(ids) for ids in texts]
        self.order: list[int] = []
        self.batches: list[tuple[Tensor, list[int]]] = []
        for positions in make_batches(lengths, token_budget(self.model), None):
            ids = list(chain.from_iterable(texts[position] for position in positions))
            self.order += positions
            self.batches.append(
                (torch.tensor(ids, device=self.model.device), [lengths[p] for p in positions])
            )

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Vectors of all texts, (n, D), in the order given."""
        ops, parts = self.model.backend.ops, []
        for ids_T, lengths in self.batches:
            hidden_TD = self.model.forward_packed(ids_T, lengths).last_hidden_state
            parts.append(ops.pool(hidden_TD, lengths, self.pooling))
        rows = torch.cat(parts)
        return torch.empty_like(rows).index_copy_(
            0, torch.tensor(self.order, device=rows.device), rows
        )


def replayed(runner: Engine, ids: list[int], lengths: list[int], pooling: Pooling) -> Any:
    """The forward of a batch as a graph, with room for nothing else and nothing copied."""
    model = runner.model
    layout = runner.layout_of(lengths)
    numbers = torch.zeros(layout.size, dtype=torch.int32)
    layout.fill(numbers, ids, lengths)
    ops = model.backend.table_ops(layout, numbers.to(model.device), padded=False)

    @torch.no_grad()
    def run() -> Tensor:
        return ops.pool(model.forward_tables(ops).last_hidden_state, lengths, pooling)

    return harness.captured(run)


def alone(runner: Engine, texts: Sequence[list[int]], pooling: Pooling) -> Tensor:
    """What to expect: one text at a time, (n, D)."""
    return torch.cat([Forward(runner, [ids], pooling)().cpu() for ids in texts])


def ids_case(
    title: str, runner: Engine, texts: list[list[int]], pooling: Pooling, bound: Deviation
) -> Case:
    """From ids on the host to vectors on the host, and the forward alone."""
    lengths = [len(ids) for ids in texts]
    ids = list(chain.from_iterable(texts))
    flop = harness.forward_flop(runner.model.config, lengths)
    runs: dict[str, Callable[[], Tensor]] = {
        "ids to vectors, both on the host": lambda: runner.embed(
            ids, lengths, pooling, to_host=True
        )(),
        LAUNCHED: Forward(runner, texts, pooling),
    }
    if runner.model.backend.takes_tables and runner.model.device.type == "cuda":
        runs["forward, replayed"] = replayed(runner, ids, lengths, pooling)
    contenders = [Contender(name, run, flop, bound) for name, run in runs.items()]
    return Case(title, sum(lengths), contenders, alone(runner, texts, pooling), LAUNCHED)


def text_case(
    title: str, encoder: Encoder, runner: Engine, texts: list[str], pooling: Pooling,
    bound: Deviation,
) -> Case:  # fmt: skip
    """From strings to vectors on the host, and the forward alone."""
    tokens = encoder.tokenizer([encoder.prompts["query"] + text for text in texts], 512).ids
    lengths = [len(ids) for ids in tokens]
    flop = harness.forward_flop(runner.model.config, lengths)
    contenders = [
        Contender(
            "strings to vectors",
            lambda: torch.from_numpy(encoder.encode_query(texts, show_progress_bar=False)),
            flop,
            bound,
        ),
        Contender(LAUNCHED, Forward(runner, tokens, pooling), flop, bound),
    ]
    return Case(title, sum(lengths), contenders, alone(runner, tokens, pooling), LAUNCHED)


def kernel_times(run: Callable[[], Tensor], calls: int = 3) -> str:
    """The GPU's time by kernel, the longest first: microseconds of a call, launches, and name."""
    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
    spent: dict[str, list[float]] = {}
    for event in profiler.events() or []:
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spent.setdefault(event.name[:60], []).append(event.device_time_total)
    rows = sorted(spent.items(), key=lambda item: -sum(item[1]))
    lines = [f"{sum(map(sum, spent.values())) / calls:10.1f} us in all"]
    return "\n".join(
        lines
        + [f"{sum(took) / calls:10.1f} us {len(took) // calls:4}x {name}" for name, took in rows]
    )


def peak_memory(runner: Engine, pooling: Pooling, tokens: int) -> str:
    """Memory that a batch of texts of 512 tokens takes beside what was allocated before it."""
    if runner.model.device.type != "cuda":
        return "measured on CUDA alone"
    lengths = [512] * (tokens // 512)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    runner.embed([5] * sum(lengths), lengths, pooling, to_host=True)()
    taken = torch.cuda.max_memory_allocated() - before
    return f"{taken / 2**20:,.0f} MiB, {taken / sum(lengths):,.0f} bytes per token"


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = script.parser("Time the way from strings to vectors.", repeats=30)
    parser.add_argument("--dtype", choices=DTYPES, help="by default the device's own")
    parser.add_argument(
        "--profile", action="store_true", help="on a GPU print the time of each kernel as well"
    )
    parser.add_argument("--corpus-repeats", type=int, default=3, help="timed passes of the corpus")
    args = script.parse(parser, arguments, counts=["corpus_repeats"])
    device = args.device
    dtype = resolve_dtype(args.dtype, device)
    dtype_name = next(name for name, one in DTYPES.items() if one == dtype)
    machine = report.machine_line(device)

    print("drawing random weights ...", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        synthetic.write_checkpoint(folder, "tiny" if args.smoke else "full", SEED)
        encoder = Encoder.from_pretrained(folder, device=device, dtype=dtype)
    encoder.warmup()
    runner = Engine(encoder.model)
    pooling = Pooling(encoder.get_embedding_dimension(), False, True)
    bound = BOUNDS[dtype_name]

    generator = random.Random(SEED)
    corpus = draw_corpus(encoder, SMOKE_CORPUS_TEXTS if args.smoke else CORPUS_TEXTS)

    def ids(length: int) -> list[int]:
        return [generator.randrange(4, encoder.model.config.vocab_size) for _ in range(length)]

    batches = [(1, 16), *(SMOKE_BATCHES if args.smoke else BATCHES)]
    of_corpus = f"{len(corpus):,} texts of 8 to 512 tokens"
    query = "how warm is the sea in march"
    common = {"runner": runner, "pooling": pooling, "bound": bound}
    cases: dict[str, Callable[[str], Case]] = {
        "one query": partial(text_case, encoder=encoder, texts=[query], **common),
        **{
            f"{texts} text{'s' if texts > 1 else ''} of {tokens} tokens": partial(
                ids_case, texts=[ids(tokens) for _ in range(texts)], **common
            )
            for texts, tokens in batches
        },
        of_corpus: partial(text_case, encoder=encoder, texts=corpus, **common),
    }
    settings = {
        "dtype": dtype_name,
        "device": str(device),
        "backend": encoder.backend,
        "repeats": args.repeats,
        "corpus repeats": args.corpus_repeats,
        "warm-up": harness.WARM_UP,
        "token budget": token_budget(encoder.model),
    }
    run = script.Run(
        args,
        f"bench_engine-{device.type}-{dtype_name}",
        benchmark="bench_engine",
        command=report.command_line(arguments),
        machine=machine,
        settings=settings,
        not_run={},
    )
    for title, make in tqdm(cases.items(), unit=" cases", disable=None):
        with run.attempt(title):
            case = make(title)
            run.measure(case, repeats=args.corpus_repeats if title == of_corpus else args.repeats)
            graphs = [one.run for one in case.contenders if isinstance(one.run, harness.Replay)]
            if args.profile and graphs:
                print(f"\n{title}, replayed\n{kernel_times(graphs[0])}")
            # they hold what the next would want
            del case, graphs
    with run.attempt("peak memory"):
        settings["peak memory at 65,536 tokens"] = peak_memory(runner, pooling, 65_536)
    return run.finish()


if __name__ == "__main__":
    sys.exit(main())
