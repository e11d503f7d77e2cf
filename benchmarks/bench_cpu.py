"""Time the encoder on a CPU against the other ways to run the same weights there.

    python benchmarks/bench_cpu.py                  the real sizes; a quarter of an hour
    python benchmarks/bench_cpu.py --long           and 512 texts of mixed lengths, once each
    python benchmarks/bench_cpu.py --memory         time to load and memory (Linux), at full size
    python benchmarks/bench_cpu.py --smoke          a toy model, in seconds

nomoe, the padded looping form and llama.cpp (where its bindings are installed, see llama.py) take
turns in one run, on the same random weights in each of their types. The routers are as sure as the
real ones and load the experts about evenly, see workload.py; the experts' bias is zero, since
llama.cpp has none. Vectors are compared with those of the looping form in float64, one text at a
time; where one is too far off no speed is given. Texts that rounding may send to other experts are
drawn anew. Ceilings are the forward's products alone, through `F.linear` and on packed matrices,
and for the query the time to read the matrices it needs once. Results go to benchmarks/results/ as
dated JSON and Markdown.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import harness
import llama
import numpy as np
import peers
import report
import script
import torch
import workload
from harness import Case, Contender, Deviation
from torch import Tensor
from torch.nn.functional import linear
from tqdm.auto import tqdm

from nomoe import NomicMoEConfig, NomicMoEModel, data, synthetic
from nomoe.arguments import DTYPES
from nomoe_kernels import cpu

SEED = 0
NOMOE_TYPES = ("float32", "bfloat16")
# most tokens and texts of a batch, of nomoe as of llama.cpp: nomoe's own budget on a CPU
BATCH_TOKENS = 4096
BATCH_TEXTS = 64
# of pooled vectors against float64: some times what was seen (3.3e-3 in bfloat16, 1.7e-2 in q8_0),
# and in DRIFT what one text of a case may be off beside, since near a tie it takes other experts
BOUNDS = {
    "float32": Deviation(1e-8, 1e-4),
    "bfloat16": Deviation(0.01, 2.0),
    # its GELU is a table in float16
    "f32": Deviation(1e-3, 1.0),
    "bf16": Deviation(0.02, 2.0),
    "q8_0": Deviation(0.04, 3.0),
}
DRIFT = {"float32": 0.0, "bfloat16": 0.1, "f32": 0.02, "bf16": 0.1, "q8_0": 0.1}


def draw_texts(config: NomicMoEConfig, *, long: bool) -> dict[str, list[list[int]]]:
    """Texts of random token ids: a query, a long text, a batch of equals, mixed lengths."""
    generator = np.random.default_rng(SEED)
    draw = drawer(config, generator)
    mixed = generator.integers(16, 256, 16, endpoint=True).tolist()
    shapes = {
        "1 text of 16 tokens": [16],
        "1 text of 512 tokens": [512],
        "8 texts of 128 tokens": [128] * 8,
        "16 texts of 16 to 256 tokens": mixed,
        "512 texts of 16 to 256 tokens": generator.integers(16, 256, 512, endpoint=True).tolist(),
    }
    return {
        title: [draw(length) for length in lengths]
        for title, lengths in shapes.items()
        if long or len(lengths) < 512
    }


def drawer(config: NomicMoEConfig, generator: np.random.Generator) -> Callable[[int], list[int]]:
    """Make what draws a text of random token ids."""
    return lambda length: generator.integers(4, config.vocab_size, length).tolist()


def no_expert_bias(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with the experts' bias put to zero, for which llama.cpp has no slot."""
    return {
        name: torch.zeros_like(one) if name.endswith("experts.bias") else one
        for name, one in state.items()
    }


def read_once(
    state: dict[str, Tensor], routed: list[list[int]]
) -> tuple[Callable[[], Tensor], int]:
    """A run that reads as many bytes as the matrices a forward needs, and that number."""
    used = sum(count > 0 for rows in routed for count in rows) / sum(map(len, routed))
    size = sum(
        one.nbytes * (used if "experts" in name else 1)
        for name, one in state.items()
        if one.dim() == 2 and "embeddings" not in name
    )
    words = torch.ones(int(size) // 4)
    return words.sum, words.nbytes


def packing_once() -> Callable[[Tensor], cpu.Matrix]:
    """Make a `cpu.pack_weight` that gives the same memory, seen alike, the same packed matrix.

    Of a batch, of a case: else every one of them would hold a copy of all weights.
    """
    # beside the matrix it is of, lest another come to lie there
    known: dict[tuple[object, ...], tuple[Tensor, cpu.Matrix]] = {}

    def pack(weight_OI: Tensor) -> cpu.Matrix:
        key = (weight_OI.data_ptr(), weight_OI.shape, weight_OI.stride(), weight_OI.dtype)
        if key not in known:
            known[key] = weight_OI, cpu.pack_weight(weight_OI)
        return known[key][1]

    return pack


def build_case(
    title: str,
    texts: list[list[int]],
    models: dict[str, peers.Packed],
    others: list[tuple[peers.Peer, str]],
    states: dict[str, dict[str, Tensor]],
    oracle: peers.Peer,
    pack: Callable[[Tensor], cpu.Matrix],
) -> Case:
    """Make a case of all contenders and their ceilings."""
    config = models["float32"].model.config
    lengths = [len(ids) for ids in texts]
    flop = harness.forward_flop(config, lengths)
    contenders = []

    def add(name: str, run: Callable[[], Tensor], matrices: str, ceiling: str | None) -> None:
        most = BOUNDS[matrices]
        bound = most._replace(cosine_distance=most.cosine_distance + DRIFT[matrices] / len(texts))
        contenders.append(Contender(name, run, flop, bound, ceiling=ceiling))

    plain = {dtype: f"ceiling: F.linear alone, {dtype}" for dtype in models}
    for dtype, packed in models.items():
        add(f"nomoe, {dtype}", partial(packed, texts), dtype, plain[dtype])
    # llama.cpp multiplies its files' types in the nearest that the ceilings have
    like = {"bf16": "bfloat16", "q8_0": "bfloat16"}
    for peer, matrices in others:
        ceiling = plain.get(like.get(matrices, matrices), plain["float32"])
        add(peer.name, partial(peer, texts), matrices, ceiling)
    for dtype, packed in models.items():
        batches = [
            packed.routed_rows([texts[position] for position in positions])
            for positions in packed.batches(lengths)
        ]
        products = harness.projection_flop(config, sum(lengths))
        for name, options in (
            (plain[dtype], (lambda weight: weight, linear)),
            (
                f"ceiling: packed products alone, {dtype}",
                (pack, partial(cpu.linear, bias_O=None)),
            ),
        ):
            runs = [
                harness.linear_ceiling(config, states[dtype], routed, *options)
                for routed in batches
            ]
            contenders.append(Contender(name, partial(in_turn, runs), products, bound=None))
        if len(texts) == 1 and lengths[0] <= 32:
            run, moved = read_once(states[dtype], batches[0])
            name = f"reading the matrices once, {dtype}"
            contenders.append(Contender(name, run, 0, bound=None, bytes=moved))
    return Case(
        f"{title} ({sum(lengths):,} in all, {max(lengths) * len(lengths):,} when padded)",
        sum(lengths),
        contenders,
        torch.cat([oracle([ids]) for ids in tqdm(texts, desc="float64", leave=False)]).float(),
        baseline="nomoe, float32",
    )


def in_turn(runs: list[Callable[[], Tensor]]) -> Tensor:
    """Run all; what the last returned."""
    for run in runs:
        out = run()
    return out


def model_of(config: NomicMoEConfig, state: dict[str, Tensor]) -> NomicMoEModel:
    """A model that holds these tensors, ready for inference."""
    with torch.device("meta"):
        model = NomicMoEModel(config)
    # copies: what others hold too is not packed
    model.load_state_dict({name: one.clone() for name, one in state.items()}, assign=True)
    return model.eval()


# --- time to load and memory, each in a process of its own


def anonymous_bytes() -> int:
    """Memory of this process that no file backs (Linux)."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status does not tell RssAnon")


class Peak:
    """Watches the anonymous memory of this process in a thread."""

    def __enter__(self) -> Peak:
        self.bytes, self._done = anonymous_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.bytes = max(self.bytes, anonymous_bytes())

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()


def report_memory(folder: Path, matrices: str) -> None:
    """Load, embed a query and a batch of mixed lengths; print what that took as JSON."""
    before = anonymous_bytes()
    config = NomicMoEConfig.from_json(folder / "config.json")
    texts = draw_texts(config, long=False)
    with Peak() as peak:
        start = time.perf_counter()
        peer: Any
        if matrices in NOMOE_TYPES:
            model = NomicMoEModel.from_pretrained(folder, device="cpu", dtype=matrices)
            peer = peers.Packed(model, BATCH_TOKENS)
        else:
            path = folder / f"{matrices}.gguf"
            peer = llama.LlamaCpp(
                path, matrices, BATCH_TOKENS, BATCH_TEXTS, torch.get_num_threads()
            )
        loaded = time.perf_counter()
        peer(texts["1 text of 16 tokens"])
        first = time.perf_counter()
        ready = anonymous_bytes()
        for ids in texts.values():
            peer(ids)
    print(
        json.dumps(
            {
                "load_s": loaded - start,
                "first_query_s": first - loaded,
                "ready_mb": (ready - before) / 1e6,
                "peak_mb": (max(peak.bytes, ready) - before) / 1e6,
            }
        )
    )


def measure_memory(args: argparse.Namespace, command: str, machine: str) -> int:
    """Write a checkpoint, run `report_memory` for each type, and write the results."""
    with tempfile.TemporaryDirectory() as temporary:
        size: synthetic.Size = "tiny" if args.smoke else "full"
        folder = synthetic.write_checkpoint(Path(temporary) / size, size)
        config = NomicMoEConfig.from_json(folder / "config.json")
        types = list(NOMOE_TYPES)
        not_run = {}
        if reason := llama.obstacle():
            not_run["llama.cpp"] = reason
        else:
            state = NomicMoEModel.from_pretrained(folder, device="cpu").state_dict()
            for matrices in llama.TYPES:
                llama.write_gguf(folder / f"{matrices}.gguf", config, state, matrices)
                types.append(matrices)
            del state
        weights = (folder / "model.safetensors").stat().st_size / 1e6
        rows = []
        for matrices in tqdm(types, desc="types"):
            # twice: the first run leaves the files in the page cache
            for _ in range(2):
                child = [sys.executable, __file__, "--report-memory", str(folder), matrices]
                child.append(f"--threads={torch.get_num_threads()}")
                done = subprocess.run(child, capture_output=True, text=True, check=True)
            seen = json.loads(done.stdout.splitlines()[-1])
            name = f"{'nomoe' if matrices in NOMOE_TYPES else 'llama.cpp'}, {matrices}"
            halves = {"bfloat16": 2, "bf16": 2, "q8_0": 32 / 8.5}
            rows.append({"name": name, "weights_mb": weights / halves.get(matrices, 1), **seen})
    record = {
        "benchmark": "bench_cpu: time to load and memory",
        "date": datetime.date.today().isoformat(),
        "command": command,
        "machine": machine,
        "not_run": not_run,
        "rows": rows,
    }
    cells = ["contender,weights MB,load s,first query s,MB when ready,peak MB".split(",")]
    for row in rows:
        name, *figures = row.values()
        cells.append([name, *(f"{one:,.0f}" if one >= 10 else f"{one:.2f}" for one in figures)])
    lines = [
        *report.heading(record),
        "Memory is anonymous, beyond the process's own before loading: mapped files do not count. "
        "The files are in the page cache. The peak is over a query, 512 tokens, and batches of "
        "1,024 and some 2,200 tokens.",
        *(f"Not run: {name}: {reason}." for name, reason in not_run.items()),
        "",
        *report.table(cells),
    ]
    return script.finish(record, args, "bench_cpu-memory", "\n".join(lines) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = script.parser("Time the encoder on a CPU against its peers.", repeats=7, device=False)
    parser.add_argument("--long", action="store_true", help="512 texts too, once each")
    parser.add_argument("--memory", action="store_true", help="time to load and memory instead")
    parser.add_argument("--report-memory", nargs=2, help=argparse.SUPPRESS)
    args = script.parse(parser, arguments)
    if not cpu.supports(torch.float32):
        parser.error("this torch has no oneDNN, without which nomoe packs no matrices on a CPU")
    if args.report_memory:
        report_memory(Path(args.report_memory[0]), args.report_memory[1])
        return 0
    machine, command = report.machine_line(args.device), report.command_line(arguments)
    if args.memory:
        return measure_memory(args, command, machine)

    config = NomicMoEConfig.from_json(
        (data.TINY if args.smoke else data.FULL_WIDTH) / "config.json"
    )
    inputs = draw_texts(config, long=args.long)
    print("drawing random weights ...", file=sys.stderr)
    drawn = list(chain.from_iterable(draw_texts(config, long=False).values()))
    exact = no_expert_bias(workload.draw_model(config, drawn, SEED).state_dict())
    types = [dtype for dtype in NOMOE_TYPES if cpu.supports(DTYPES[dtype])]
    not_run = {
        f"nomoe, {dtype}": "oneDNN has no fast products of it on this CPU"
        for dtype in NOMOE_TYPES
        if dtype not in types
    }
    states = {
        dtype: {name: one.to(DTYPES[dtype]) for name, one in exact.items()} for dtype in types
    }
    models = {dtype: peers.Packed(model_of(config, states[dtype]), BATCH_TOKENS) for dtype in types}
    draw = drawer(config, np.random.default_rng(SEED + 1))
    inputs = {
        title: models["float32"].away_from_ties(texts, draw) for title, texts in inputs.items()
    }
    others: list[tuple[peers.Peer, str]] = []
    for dtype in types:
        loop = peers.PaddedLoop(config, states[dtype])
        loop.name = f"padded loop, {dtype}"
        others.append((loop, dtype))
    oracle = peers.PaddedLoop(config, {name: one.double() for name, one in exact.items()})
    pack = packing_once()

    with tempfile.TemporaryDirectory() as folder:
        if reason := llama.obstacle():
            not_run["llama.cpp"] = reason
        else:
            for matrices in llama.TYPES:
                path = Path(folder) / f"{matrices}.gguf"
                llama.write_gguf(path, config, exact, matrices)
                peer = llama.LlamaCpp(
                    path, matrices, BATCH_TOKENS, BATCH_TEXTS, torch.get_num_threads()
                )
                others.append((peer, matrices))
        run = script.Run(
            args,
            "bench_cpu",
            benchmark="bench_cpu",
            command=command,
            machine=machine,
            settings={
                "others": report.versions("llama-cpp-python"),
                "repeats": args.repeats,
                "warm-up": harness.WARM_UP,
                "tokens in a batch": BATCH_TOKENS,
                "width": config.n_embd,
                "layers": config.n_layer,
            },
            not_run=not_run,
        )
        for title, texts in inputs.items():
            with run.attempt(title):
                case = build_case(title, texts, models, others, states, oracle, pack)
                # minutes for each call: they are warm from the cases before
                once = len(texts) == 512
                repeats, warm_up = (1, 0) if once else (args.repeats, harness.WARM_UP)
                calls = (repeats + warm_up) * len(case.contenders)
                with tqdm(total=calls, unit=" calls", desc=title, disable=None) as bar:
                    run.measure(case, repeats=repeats, warm_up=warm_up, bar=bar)
    return run.finish()


if __name__ == "__main__":
    sys.exit(main())
