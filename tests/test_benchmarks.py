"""The benchmarks: correct before fast, and figures that mean what they say."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

import nomoe
from benchmarks import harness, peers, report, stock, workload
from benchmarks.harness import Case, Contender, Deviation, DisagreementError
from nomoe import NomicMoEConfig, NomicMoEModel, data, embed_corpus
from nomoe.synthetic import random_model, write_checkpoint
from nomoe.tokenizer import Tokenizer
from nomoe.verify import golden_cases
from nomoe_kernels import cpu

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
BOUND = Deviation(cosine_distance=1e-8, max_abs=1e-4)


@pytest.fixture
def bench_encoder(monkeypatch):
    """The script as a module; it finds its siblings beside it, as when it is run."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    yield importlib.import_module("bench_encoder")
    # one of its contenders registers
    nomoe.unregister()


@pytest.fixture(scope="module")
def tiny():
    # without gradients, which the counter of operations stumbles over
    return NomicMoEModel.from_pretrained(data.TINY, device="cpu").requires_grad_(False)


def draw_texts(lengths):
    generator = np.random.default_rng(1)
    return [generator.integers(0, 512, size=length).tolist() for length in lengths]


# --- the looping form ---


@pytest.mark.parametrize("batch_size", [2, 32])
def test_padded_loop_gives_the_golden_vectors(batch_size):
    config = NomicMoEConfig.from_json(data.TINY / "config.json")
    loop = peers.PaddedLoop(config, load_file(data.TINY / "model.safetensors"), batch_size)
    cases = list(golden_cases(data.TINY))
    assert len(cases) > 1
    for case in cases:
        texts = [
            ids[mask.bool()].tolist()
            for ids, mask in zip(case.input_ids, case.attention_mask, strict=True)
        ]
        difference = (loop(texts).double() - case.pooled).abs().max()
        assert difference <= 1e-5, case.name


def test_stock_torch_gives_the_golden_vectors():
    config = NomicMoEConfig.from_json(data.TINY / "config.json")
    peer = stock.Stock(config, load_file(data.TINY / "model.safetensors"))
    for case in golden_cases(data.TINY):
        texts = [
            ids[mask.bool()].tolist()
            for ids, mask in zip(case.input_ids, case.attention_mask, strict=True)
        ]
        assert (peer(texts).double() - case.pooled).abs().max() <= 1e-5, case.name


@pytest.mark.gpu
def test_stock_torch_compiled():
    config = NomicMoEConfig.from_json(data.FULL_WIDTH / "config.json")
    model = random_model(config, seed=0).to("cuda", torch.bfloat16)
    peer = stock.Stock(config, model.state_dict())
    loop = peers.PaddedLoop(config, model.state_dict())
    for lengths in ([16], [100, 7, 512], [100, 7, 512]):
        texts = draw_texts(lengths)
        harness.check_agreement("stock", peer(texts), loop(texts), Deviation(0.05, 2.0))


@pytest.mark.parametrize("normalize", [False, True])
def test_padded_loop_agrees_with_nomoe(normalize):
    config = NomicMoEConfig.from_json(data.TINY / "config.json")
    config = dataclasses.replace(config, moe_normalize_expert_weights=normalize)
    model = random_model(config, seed=3)
    texts = draw_texts([5, 90, 1, 33, 33, 64])
    ours, theirs = peers.Packed(model)(texts), peers.PaddedLoop(config, model.state_dict())(texts)
    assert ours.dtype == theirs.dtype == torch.float32
    assert ours.shape == (6, config.n_embd)
    harness.check_agreement("padded loop", theirs, ours, Deviation(1e-10, 1e-5))


def test_adapters_keep_the_order_of_the_texts(tiny):
    texts = draw_texts([7, 50, 20])
    loop = peers.PaddedLoop(tiny.config, tiny.state_dict(), batch_size=2)
    for peer in (peers.Packed(tiny), loop):
        alone = torch.cat([peer([ids]) for ids in texts])
        assert (peer(texts) - alone).abs().max() < 1e-5
        assert (alone[0] - alone[1]).abs().max() > 0.1


# --- the work ---


def test_every_expert_has_work_in_every_text():
    config = NomicMoEConfig.from_json(data.TINY / "config.json")
    inputs = workload.draw_texts(config, seed=0)
    [mixed] = [texts for title, texts in inputs.items() if "16 to 256" in title]
    assert len(mixed) == 16
    assert all(16 <= len(ids) <= 256 for ids in mixed)
    texts = list(chain.from_iterable(inputs.values()))
    packed = peers.Packed(workload.draw_model(config, texts, seed=0))
    for ids in texts:
        for rows in packed.routed_rows([ids]):
            assert min(rows) > 0
            assert max(rows) < 3 * sum(rows) / len(rows)


def test_texts_follow_from_the_seed():
    config = NomicMoEConfig.from_json(data.TINY / "config.json")
    first, same, other = (workload.draw_texts(config, seed) for seed in (0, 0, 1))
    assert first == same != other


def test_written_texts_have_the_lengths_and_languages_they_should(tmp_path):
    folder = write_checkpoint(tmp_path / "tiny", "tiny")
    tokenizer = Tokenizer(folder / "tokenizer.json", 2048)
    inputs = workload.Writer(tokenizer, seed=0).inputs(scale=2)
    assert [len(texts) for texts in inputs.values()] == [1, 32, 16, 4, 26]
    assert list(inputs)[1:4] == ["32 queries", "16 passages", "4 documents"]
    for (kind, (prompt, shortest, longest)), texts in zip(
        workload.KINDS.items(), list(inputs.values())[1:4], strict=True
    ):
        assert all(text.startswith(prompt) for text in texts), kind
        lengths = [len(ids) for ids in tokenizer(texts, 512).ids]
        # the last word is whole
        assert shortest <= min(lengths)
        assert max(lengths) <= min(512, longest + 12)
        assert len(set(texts)) == len(texts)
    words = {
        language: set(" ".join(sentences).split())
        for language, sentences in data.sentences().items()
    }
    spoken = [
        next(language for language, known in words.items() if set(text.split()[1:]) <= known)
        for text in inputs["16 passages"]
    ]
    assert len(set(spoken)) >= 15
    assert workload.Writer(tokenizer, seed=0).inputs(scale=2) == inputs
    assert workload.Writer(tokenizer, seed=1).inputs(scale=2) != inputs


# --- correctness before speed ---


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: 1.01 * x, "at the worst place"),
        (lambda x: x.index_fill(1, torch.tensor([3]), float("nan")), "nan"),
        (lambda x: x.flip(0), "mean 1 - cosine"),
        (lambda x: 1.1 * x, "in length"),
        (lambda x: x[:, :-1], r"\(3, 95\), expected \(3, 96\)"),
    ],
    ids=["one per cent", "nan", "order", "length", "shape"],
)
def test_a_wrong_output_is_refused(spoil, message):
    expected = torch.randn(3, 96, generator=torch.Generator().manual_seed(0))
    with pytest.raises(DisagreementError, match=f"^wrong: .*{message}"):
        harness.check_agreement("wrong", spoil(expected), expected, BOUND)


def test_the_deviation_is_measured():
    expected = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    output = torch.tensor([[3.0, 4.0], [1.0, 1.0]])
    found = harness.check_agreement("one", output, expected, Deviation(1.0, 1.0, 1.0))
    assert found.cosine_distance == pytest.approx((0 + 1 - 0.5**0.5) / 2)
    assert found.max_abs == 1.0
    assert found.length == pytest.approx((0 + 2**0.5 - 1) / 2)


def test_an_output_that_goes_wrong_late_is_refused():
    expected = torch.ones(2, 4)
    calls = iter(range(100))

    def run():
        # right in the warm-up and in the first timed call
        return expected * (1.01 if next(calls) > harness.WARM_UP else 1.0)

    case = Case("late", 1, [Contender("late", run, 1, BOUND)], expected, "late")
    with pytest.raises(DisagreementError, match="late"):
        harness.measure(case, repeats=3, device=CPU)


@pytest.mark.parametrize("baseline", ["same", "other"])
def test_a_case_names_its_contenders(baseline):
    same = Contender("same", torch.ones, 1, BOUND)
    contenders = [same, same] if baseline == "same" else [same]
    with pytest.raises(ValueError, match=f"{baseline!r} be one of them"):
        Case("some", 1, contenders, torch.ones(1), baseline)


def test_a_wrong_contender_leaves_no_speed_anywhere(bench_encoder, monkeypatch, tmp_path, capsys):
    right = bench_encoder.peers.Packed.__call__
    monkeypatch.setattr(
        bench_encoder.peers.Packed, "__call__", lambda *arguments: 1.01 * right(*arguments)
    )
    output = tmp_path / "results"
    assert bench_encoder.main(["--smoke", "--device=cpu", f"--output={output}"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "no speed is reported" in printed.err
    assert "nomoe (torch)" in printed.err
    assert not output.exists()


def test_16_bits_agree_within_their_bounds(bench_encoder, tmp_path, capsys):
    command = ["--smoke", "--device=cpu", "--dtype=bfloat16", "--repeats=1"]
    assert bench_encoder.main([*command, f"--output={tmp_path}"]) == 0
    assert "dtype bfloat16" in capsys.readouterr().out
    assert len(list(tmp_path.glob("*-bench_encoder-cpu-bfloat16-smoke.*"))) == 2


# --- timing ---


def test_interleave_times_every_run_once_a_round(monkeypatch):
    now = 0.0
    calls, inspected = [], []

    def runner(name, taken):
        def run():
            nonlocal now
            # the warm-up is far slower, and must not show
            now += taken if len(calls) >= 2 * 3 else 1000.0
            calls.append(name)
            return name

        return run

    def inspect(name, output):
        nonlocal now
        now += 50.0
        inspected.append((name, output))

    monkeypatch.setattr(harness.time, "perf_counter", lambda: now)
    runs = {name: runner(name, taken) for name, taken in (("a", 1.0), ("b", 2.0), ("c", 4.0))}
    seconds = harness.interleave(runs, repeats=10, device=CPU, inspect=inspect, warm_up=2)

    assert seconds == {"a": [1.0] * 10, "b": [2.0] * 10, "c": [4.0] * 10}
    rounds = [calls[start : start + 3] for start in range(0, len(calls), 3)]
    every_order = sorted(map(list, itertools.permutations("abc")))
    assert sorted(rounds[:6]) == sorted(rounds[6:]) == every_order
    assert inspected == [(name, name) for name in calls]


def test_derived_figures():
    # 10, 20, 30, 40, 50 ms out of order: percentiles interpolate between neighbours
    fast = harness.Result(
        Contender("fast", torch.ones, 6 * 10**9, BOUND),
        Deviation(1e-12, 1e-6),
        [0.05, 0.01, 0.04, 0.02, 0.03],
    )
    slow = harness.Result(Contender("slow", torch.ones, 10**9, None), None, [0.06] * 5)
    case = Case("some", 300, [fast.contender, slow.contender], torch.ones(1), "slow")
    record = report.make_record(
        "bench",
        [(case, [fast, slow])],
        command="python it",
        machine="this one",
        settings={},
        not_run={"other": "not installed"},
    )
    first, second = record["cases"][0]["contenders"]
    figures = ("median_ms", "p20_ms", "p80_ms", "tokens_per_s", "tflop_per_s", "ratio")
    assert [first[name] for name in figures] == pytest.approx([30, 18, 42, 10_000, 0.2, 2.0])
    assert [second[name] for name in figures] == pytest.approx([60, 60, 60, 5000, 1 / 60, 1.0])
    assert first["times_ms"] == pytest.approx([50, 10, 40, 20, 30])
    assert first["deviation"] == {"cosine_distance": 1e-12, "max_abs": 1e-6, "length": 0.05}
    assert "deviation" not in second

    [row] = [line for line in report.render(record).splitlines() if line.startswith("| fast")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    # no bytes are counted; the other one, without a bound, is the ceiling
    assert cells == ["fast", "10,000", "30.0", "18.0", "42.0", "0.2", "", "2.00", "200%", "1.0e-12"]
    assert "Not run: other: not installed." in report.render(record)


def test_share_of_the_slowest_ceiling():
    one = Contender("one", lambda: torch.ones(1), flop=1, bound=BOUND, bytes=8 * 10**9)
    ceilings = [Contender(name, one.run, flop=1, bound=None) for name in ("math", "memory")]
    case = Case("case", 1, [one, *ceilings], torch.ones(1), baseline="one")
    results = [
        harness.Result(contender, None, [seconds])
        for contender, seconds in zip(case.contenders, (4.0, 1.0, 3.0), strict=True)
    ]
    record = report.make_record(
        "it", [(case, results)], command="", machine="", settings={}, not_run={}
    )
    first = record["cases"][0]["contenders"][0]
    assert (first["gb_per_s"], first["of_ceiling"]) == (2.0, 0.75)
    [row] = [line for line in report.render(record).splitlines() if line.startswith("| one")]
    assert [cell.strip() for cell in row.strip("|").split("|")][-4:] == ["2", "1.00", "75%", ""]


def test_flop_of_the_real_model():
    config = NomicMoEConfig.from_dict(data.real_config())
    # MODEL.md: 226.6 MFLOP of projections per token and 36,864 for each token attended to
    assert harness.projection_flop(config, 1) == pytest.approx(226.6e6, rel=2e-4)
    extra = harness.forward_flop(config, [100, 7]) - harness.projection_flop(config, 107)
    assert extra == 36_864 * (100**2 + 7**2)


def test_ceiling_runs_the_products_of_the_forward(tiny, monkeypatch):
    texts = draw_texts([30, 3])
    packed = peers.Packed(tiny)
    routed = packed.routed_rows(texts)
    assert [sum(rows) for rows in routed] == [2 * 33] * len(tiny.config.moe_layers)
    ceiling = harness.linear_ceiling(tiny.config, tiny.state_dict(), routed)
    # the counter knows no packed products
    monkeypatch.setattr(cpu, "supports", lambda dtype: False)
    expected = harness.projection_flop(tiny.config, 33)
    for run in (ceiling, lambda: packed(texts)):
        with FlopCounterMode(display=False) as counter:
            run()
        products = counter.get_flop_counts()["Global"]
        names = ("mm", "addmm")
        found = sum(flop for op, flop in products.items() if op.__name__ in names)
        assert found == expected


# --- one MoE layer ---


@pytest.fixture
def bench_moe(monkeypatch):
    """The script as a module, as `bench_encoder`."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("bench_moe")


def test_routings(bench_moe):
    tokens = 7 * 8 * 50
    for routing in bench_moe.ROUTINGS:
        choices = bench_moe.draw_choices(tokens, 8, routing)
        assert (choices[:, 0] != choices[:, 1]).all()
        shares = choices.flatten().bincount(minlength=8) / choices.numel()
        if routing == "balanced":
            assert torch.equal(shares, torch.full((8,), 1 / 8))
        elif routing == "skewed":
            assert shares[0] == 0.5
            assert (shares[1:] > 0.05).all()
        else:
            assert (shares.diff() < 0).all()
            assert shares[0] < 0.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_go_where_they_should(bench_moe, dtype):
    layers = bench_moe.draw_layers(bench_moe.SMOKE, dtype, CPU)
    assert len({layer.w1_EDF.sum().item() for layer in layers}) == bench_moe.LAYERS
    choices = bench_moe.draw_choices(500, 8, "uneven")
    tokens = bench_moe.draw_tokens(choices, layers[0])
    weights, experts = bench_moe.reference.route(tokens, layers[0].router_ED, 2)
    assert torch.equal(experts, choices)
    assert weights.sum(1).mean() == pytest.approx(0.70, abs=0.02)


def test_stock_layer(bench_moe):
    layer = bench_moe.draw_layers(bench_moe.SMOKE, torch.float32, CPU)[0]
    tokens = bench_moe.draw_tokens(bench_moe.draw_choices(50, 8, "uneven"), layer)
    expected = bench_moe.reference.moe_layer(tokens, *layer, 2)[0]
    harness.check_agreement("stock", bench_moe.stock_layer(tokens, layer), expected, BOUND)


def test_a_layer_that_is_wrong_only_in_the_middle_is_refused(bench_moe):
    layers = bench_moe.draw_layers(bench_moe.SMOKE, torch.float32, CPU)
    work = bench_moe.layer_work(5, "balanced", layers, ["nomoe (torch)"])
    right = work.runs["nomoe (torch)"]
    bench_moe.build_case(work, layers, "float32", CPU)
    work.runs["nomoe (torch)"] = lambda one: right(one) * (1.01 if one is layers[2] else 1)
    with pytest.raises(RuntimeError, match="layer, 5 tokens, balanced, nomoe"):
        bench_moe.build_case(work, layers, "float32", CPU)


# --- on a CPU ---


@pytest.fixture
def bench_cpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("bench_cpu")


def test_smoke_run_on_a_cpu(bench_cpu, tmp_path, capsys):
    assert bench_cpu.main(["--smoke", "--repeats=1", "--threads=1", f"--output={tmp_path}"]) == 0
    record = json.loads(next(tmp_path.glob("*-bench_cpu-smoke.json")).read_text())
    if find_spec("llama_cpp") is None:
        assert "llama_cpp" in record["not_run"]["llama.cpp"]
    assert len(record["cases"]) == 4
    for case in record["cases"]:
        rows = {row["name"]: row for row in case["contenders"]}
        for dtype in ("float32", "bfloat16") if cpu.supports(torch.bfloat16) else ("float32",):
            nomoe, loop = rows[f"nomoe, {dtype}"], rows[f"padded loop, {dtype}"]
            ceiling = rows[f"ceiling: F.linear alone, {dtype}"]
            assert nomoe["of_ceiling"] == pytest.approx(ceiling["median_ms"] / nomoe["median_ms"])
            assert loop["of_ceiling"] == pytest.approx(ceiling["median_ms"] / loop["median_ms"])
            assert ceiling["flop"] == rows[f"ceiling: packed products alone, {dtype}"]["flop"]
            assert nomoe["deviation"]["cosine_distance"] < (1e-12 if dtype == "float32" else 1e-3)
    reading = [row for row in record["cases"][0]["contenders"] if "reading" in row["name"]]
    width, ffn_width = 96, 192
    matrices = 4 * 4 * width**2 + 2 * 2 * width * ffn_width + 2 * (8 + 16 * ffn_width) * width
    # all of them at most, and at least those of two experts of eight
    words = round(reading[0]["gb_per_s"] * reading[0]["median_ms"] * 1e6 / 4)
    assert matrices - 2 * 6 * 2 * ffn_width * width < words <= matrices
    assert bench_cpu.main(["--smoke", "--memory", f"--output={tmp_path}"]) == 0
    rows = json.loads(next(tmp_path.glob("*-memory-smoke.json")).read_text())["rows"]
    assert [row["name"] for row in rows[:2]] == ["nomoe, float32", "nomoe, bfloat16"]
    assert all(row["peak_mb"] >= row["ready_mb"] > 1 and row["load_s"] > 0 for row in rows)


def test_a_wrong_packed_product_leaves_no_speed(bench_cpu, tmp_path, monkeypatch, capsys):
    right = cpu.linear
    monkeypatch.setattr(cpu, "linear", lambda *inputs, **options: 1.01 * right(*inputs, **options))
    assert bench_cpu.main(["--smoke", "--repeats=1", "--threads=1", f"--output={tmp_path}"]) == 1
    assert "no speed is reported" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("matrices", ["f32", "bf16", "q8_0"])
def test_llama_cpp_computes_the_same(bench_cpu, matrices, tiny, tmp_path):
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    state = bench_cpu.no_expert_bias(tiny.state_dict())
    path = tmp_path / "model.gguf"
    bench_cpu.llama.write_gguf(path, tiny.config, state, matrices)
    # two texts to a batch
    peer = bench_cpu.llama.LlamaCpp(path, matrices, 64, 2, threads=1)
    texts = draw_texts([40, 3, 9, 25, 1])
    expected = peers.PaddedLoop(tiny.config, state)(texts)
    bound = {"f32": 1e-6, "bf16": 1e-4, "q8_0": 1e-3}[matrices]
    harness.check_agreement(matrices, peer(texts), expected, Deviation(bound, 0.2))
    biased = peers.PaddedLoop(tiny.config, tiny.state_dict())(texts)
    with pytest.raises(DisagreementError):
        harness.check_agreement(matrices, peer(texts), biased, Deviation(bound, 0.2))
    peer.close()


# --- results ---


def test_smoke_run_writes_its_results(tmp_path):
    command = ["benchmarks/bench_encoder.py", "--smoke", "--device=cpu", "--repeats=2"]
    # two threads on a busy machine spend their time waiting for each other
    command.append("--threads=1")
    search = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, *command, "--output", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": search},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    markdown, record = sorted(tmp_path.iterdir(), key=lambda path: path.suffix, reverse=True)
    assert record.name == markdown.with_suffix(".json").name
    assert record.name.endswith("-bench_encoder-cpu-float32-smoke.json")
    assert done.stdout.strip() == markdown.read_text(encoding="utf-8").strip()

    content = json.loads(record.read_text(encoding="utf-8"))
    assert record.name.startswith(content["date"])
    assert content["command"] == f"python {' '.join(command)} --output {tmp_path}"
    for part in ("threads used: 1)", "Python 3.", f"torch {torch.__version__}", "nomoe "):
        assert part in content["machine"]
    assert content["settings"]["dtype"] == "float32"
    for name in ("the published code", "vLLM", "text-embeddings-inference", "fastembed"):
        assert name in content["not_run"]
    assert len(content["cases"]) == 2 * 5
    cases = content["cases"]
    for case, strings in zip(cases[::2], cases[1::2], strict=True):
        assert case["title"].removesuffix("ids") == strings["title"].removesuffix("strings")
        nomoe, loop, stock_torch, ceiling = case["contenders"]
        names = ["nomoe (torch)", "padded loop", "stock torch"]
        assert [one["name"] for one in case["contenders"][:3]] == names
        assert case["baseline"] == "padded loop"
        assert loop["ratio"] == 1
        assert nomoe["ratio"] == pytest.approx(loop["median_ms"] / nomoe["median_ms"])
        assert nomoe["flop"] == loop["flop"] == stock_torch["flop"] > ceiling["flop"]
        encoder, through, _ = strings["contenders"]
        assert strings["baseline"] == encoder["name"] == "nomoe, Encoder"
        assert through["name"] == "sentence-transformers over nomoe"
        for one in case["contenders"]:
            assert len(one["times_ms"]) == 2
            assert 0 < one["p20_ms"] <= one["median_ms"] <= one["p80_ms"]
            assert one["tokens_per_s"] == pytest.approx(1e3 * case["tokens"] / one["median_ms"])
        assert all(one["deviation"]["max_abs"] <= 1e-4 for one in (nomoe, loop, stock_torch))
        assert all(one["deviation"]["max_abs"] <= 5e-6 for one in (encoder, through))


class Server(ThreadingHTTPServer):
    """Answers as text-embeddings-inference does, with an Encoder's vectors times a factor."""

    def __init__(self, encoder, factor):
        super().__init__(("127.0.0.1", 0), Answer)
        self.encoder, self.factor, self.sizes = encoder, factor, []
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        self._send(
            {"max_client_batch_size": 4, "model_dtype": "float32"} if self.path == "/info" else None
        )

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/embed"
        assert asked["normalize"]
        assert asked["truncate"]
        self.server.sizes.append(len(asked["inputs"]))
        vectors = self.server.encoder.encode(asked["inputs"], prompt="")
        self._send((self.server.factor * vectors).tolist())

    def _send(self, content):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.mark.parametrize("factor", [1.0, 1.01])
def test_a_server_is_a_peer_and_refused_when_it_is_wrong(
    factor, bench_encoder, tiny_folder, encoder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(
        bench_encoder.text_peers,
        "PEERS",
        bench_encoder.text_peers.PEERS[:1]
        + tuple(
            one for one in bench_encoder.text_peers.PEERS if one.name == "text-embeddings-inference"
        ),
    )
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server(encoder, factor)
    address = f"http://127.0.0.1:{server.server_port}"
    command = ["--smoke", "--device=cpu", "--repeats=1", f"--tei={address}"]
    status = bench_encoder.main([*command, f"--model={tiny_folder}", f"--output={tmp_path}"])
    server.shutdown()
    server.server_close()
    if factor != 1:
        assert status == 1
        assert "text-embeddings-inference: output is off" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())
        return
    assert status == 0
    # no request is larger than the server allows
    assert max(server.sizes) == 4
    record = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert record["settings"]["weights"] == str(tiny_folder)
    strings = [case for case in record["cases"] if case["title"].endswith("from strings")]
    assert len(strings) == 5
    for case in strings:
        assert case["contenders"][1]["name"] == "text-embeddings-inference"


def test_a_server_that_is_not_there_is_reported(bench_encoder, tmp_path):
    setting = bench_encoder.text_peers.Setting(tmp_path, "float32", CPU, "http://127.0.0.1:9")
    [tei] = [
        one for one in bench_encoder.text_peers.PEERS if one.name == "text-embeddings-inference"
    ]
    assert "does not answer" in tei.obstacle(setting)


def test_smoke_run_of_a_layer(tmp_path):
    command = ["benchmarks/bench_moe.py", "--smoke", "--device=cpu", "--repeats=1", "--tokens=9"]
    search = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *command, "--output", str(tmp_path)],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": search},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(
        next(tmp_path.glob("*-bench_moe-layer-cpu-bfloat16-smoke.json")).read_text()
    )
    titles = [f"layer, 9 tokens, {one}" for one in ("balanced", "skewed", "uneven")]
    assert [case["title"] for case in record["cases"]] == titles
    assert "Triton's kernels need CUDA" in record["not_run"]["nomoe (triton)"]
    width, ffn_width = 96, 192
    for case in record["cases"]:
        torch_loop, stock, products, copy = case["contenders"]
        assert [torch_loop["name"], stock["name"]] == ["nomoe (torch)", "torch, F.grouped_mm"]
        # six layers, two rows for each token, two products, two operations each
        assert torch_loop["flop"] == 6 * 9 * 2 * 2 * 2 * width * ffn_width
        slowest = max(products["median_ms"], copy["median_ms"])
        assert stock["of_ceiling"] == pytest.approx(slowest / stock["median_ms"])


@pytest.fixture
def bench_kernels(monkeypatch):
    """The script as a module, with two calls in a run."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module = importlib.import_module("bench_kernels")
    monkeypatch.setattr(module, "LAYERS", 2)
    monkeypatch.setattr(module.bench_moe, "LAYERS", 2)
    monkeypatch.setattr(module, "SMOKE_TEXTS", ((2, 6),))
    return module


SMOKE_OF_KERNELS = ["--smoke", "--device=cpu", "--dtype=float32", "--repeats=1", "--tokens=5"]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="expects the interpreter")
def test_smoke_run_of_the_kernels(bench_kernels, tmp_path):
    assert bench_kernels.main([*SMOKE_OF_KERNELS, f"--output={tmp_path}"]) == 0
    record = json.loads(next(tmp_path.glob("*-bench_kernels-cpu-float32-smoke.json")).read_text())
    cases = {case["title"]: case["contenders"] for case in record["cases"]}
    assert list(cases) == [
        "attention, 2 x 6 tokens",
        *(f"{name}, 5 tokens" for name in ("fc1 with GELU", "fc2", "Wqkv", "out_proj")),
        "embedding and LayerNorm, 5 tokens",
        "residual and LayerNorm, 5 tokens",
        "residual, LayerNorm and route, 5 tokens",
        "pooling, 2 x 6 tokens",
    ]
    names = [row["name"] for row in cases["attention, 2 x 6 tokens"]]
    assert names[1:4] == [
        "nomoe rotating-16-16-4-2 (configured)",
        "nomoe rotated-16-16-4-2",
        "nomoe rotating-64-16-4-2",
    ]
    # two calls; scores and values, two operations for each pair of tokens and number
    assert cases["attention, 2 x 6 tokens"][0]["flop"] == 2 * 2 * 2 * 2 * 6**2 * 64
    fc1 = cases["fc1 with GELU, 5 tokens"]
    assert [row["name"] for row in fc1[:2]] == ["torch", "nomoe small-16-32-32-4-3 (configured)"]
    assert fc1[0]["flop"] == 2 * 2 * 5 * 64 * 96
    for rows in cases.values():
        own = [row for row in rows if row["name"].startswith("nomoe")]
        assert own
        assert all(row["deviation"]["max_abs"] < 1e-5 for row in own)
        assert rows[-1]["name"] == "ceiling: moving the bytes"


def test_a_wrong_kernel_leaves_no_speed(bench_kernels, tmp_path, monkeypatch, capsys):
    right = bench_kernels.own_linear
    monkeypatch.setattr(bench_kernels, "own_linear", lambda *given: 1.001 * right(*given))
    arguments = [*SMOKE_OF_KERNELS, "--only=dense", f"--output={tmp_path}"]
    assert bench_kernels.main(arguments) == 1
    assert "fc1 with GELU, 5 tokens, nomoe" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_wrong_experts_leave_no_speed(bench_kernels, tmp_path, monkeypatch, capsys):
    """The timed output is the norm's, which they do not change."""
    from nomoe_kernels import fused

    right = fused.add_norm_route

    def swapped(*given):
        normed_TD, weights_TK, experts_TK = right(*given)
        return normed_TD, weights_TK, experts_TK.flip(1)

    monkeypatch.setattr(fused, "add_norm_route", swapped)
    arguments = [*SMOKE_OF_KERNELS, "--only=route", f"--output={tmp_path}"]
    assert bench_kernels.main(arguments) == 1
    assert "100.00% of the tokens take other experts" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_unknown_device_is_named(bench_encoder, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench_encoder.main(["--smoke", "--device=abacus"])
    assert "device is 'abacus'" in capsys.readouterr().err


def test_attention_is_compared_where_it_rotates(bench_kernels, tmp_path, monkeypatch, capsys):
    """Positions are 0 while time is taken: a form that rotates nothing would pass there."""
    monkeypatch.setattr(bench_kernels.harness, "measure", lambda *_, **__: pytest.fail("timed"))
    monkeypatch.setattr("nomoe_kernels.launch.rotate", lambda *given: None)
    arguments = [*SMOKE_OF_KERNELS, "--only=attention", f"--output={tmp_path}"]
    assert bench_kernels.main(arguments) == 1
    assert "kernel='rotated'" in capsys.readouterr().err


def test_texts_near_a_tie_are_found():
    config = NomicMoEConfig.from_json(data.TINY / "config.json")
    model = NomicMoEModel.from_pretrained(data.TINY, device="cpu").eval()
    packed = peers.Packed(model)
    # with the last one the CPU's kernels get more rows than there are tokens
    texts = draw_texts([5, 1, 9, 4, 2, 3, 150])
    assert packed.near_ties(texts, 0.0) == []
    assert packed.near_ties(texts, 1.0) == list(range(7))
    some = packed.near_ties(texts, 0.004)
    assert 0 < len(some) < 7
    assert some == [place for place, ids in enumerate(texts) if packed.near_ties([ids], 0.004)]
    # experts that a router cannot tell apart
    tied = model.state_dict()
    name = next(name for name in tied if name.endswith("router.layer.weight"))
    tied[name] = tied[name][:1].expand(config.num_experts, -1).clone()
    model.load_state_dict(tied)
    assert packed.near_ties(texts, 1e-6) == list(range(7))


def test_smoke_run_of_scaling(bench_encoder, tmp_path):
    bench_scaling = importlib.import_module("bench_scaling")
    command = ["--smoke", "--device=cpu", "--repeats=1", "--threads=1", f"--output={tmp_path}"]
    assert bench_scaling.main(command) == 0
    record = json.loads(next(tmp_path.glob("*-bench_scaling-cpu-float32-smoke.json")).read_text())
    grown = {
        sweep: [case["x"] for case in record["cases"] if case["sweep"] == sweep]
        for sweep in bench_scaling.SWEEPS
    }
    assert grown["length"] == [16, 32, 64]
    assert grown["batch"] == [128]
    assert grown["experts"] == [2, 4, 8, 16, 32, 64]
    # of eight experts, two to a token: from nearly even to as uneven as it can be
    shares = grown["routing"]
    assert shares == sorted(shares)
    assert 1 / 8 <= shares[0] < 0.25
    assert shares[-1] == pytest.approx(0.5)
    for case in record["cases"]:
        names = [row["name"] for row in case["contenders"]]
        assert names[:3] == ["nomoe (torch)", "padded loop", "stock torch"]


def test_results_are_never_replaced(tmp_path):
    record = report.make_record("b", [], command="c", machine="m", settings={}, not_run={})
    first = report.write_results(record, tmp_path / "new", "b-cpu", "text")
    before = [path.read_bytes() for path in first]
    second = report.write_results(record, tmp_path / "new", "b-cpu", "text")
    date = record["date"]
    assert [path.name for path in first] == [f"{date}-b-cpu.json", f"{date}-b-cpu.md"]
    assert [path.name for path in second] == [f"{date}-b-cpu-2.json", f"{date}-b-cpu-2.md"]
    assert [path.read_bytes() for path in first] == before


def test_the_command_line_names_the_script_from_the_root(monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(ROOT / "benchmarks" / "bench_encoder.py"), "--smoke"])
    found = report.command_line(["--output", "two words"])
    assert found == "python benchmarks/bench_encoder.py --output 'two words'"


@pytest.mark.parametrize("option", ["--repeats", "--threads"])
def test_counts_below_one_are_refused(option, bench_encoder, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench_encoder.main(["--smoke", f"{option}=0"])
    assert stopped.value.code == 2
    assert f"{option} is 0" in capsys.readouterr().err


def test_smoke_run_of_the_engine(tmp_path):
    command = ["benchmarks/bench_engine.py", "--smoke", "--device=cpu", "--repeats=2"]
    search = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *command, "--corpus-repeats=1", "--output", str(tmp_path)],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": search, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(next(tmp_path.glob("*-bench_engine-cpu-float32-smoke.json")).read_text())
    titles = ["one query", "1 text of 16 tokens", "3 texts of 8 tokens"]
    assert [case["title"] for case in record["cases"]] == [
        *titles,
        "40 texts of 8 to 512 tokens",
    ]
    for case in record["cases"]:
        around, launched = case["contenders"]
        assert launched["name"] == case["baseline"] == "forward, launched"
        assert around["deviation"]["max_abs"] <= 1e-3
    # every length from 8 to 512 is as likely, and the prompt adds a few
    assert 40 * 180 < record["cases"][-1]["tokens"] < 40 * 360
    assert record["settings"]["token budget"] == 4096


# --- bench_corpus ---


@pytest.mark.slow
def test_smoke_run_of_a_corpus(tmp_path):
    command = ["benchmarks/bench_corpus.py", "--smoke", "--rows=900"]
    search = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, *command, "--output", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": search},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    content = json.loads(next(tmp_path.glob("*-bench_corpus-smoke.json")).read_text())
    one = content["one_process"]
    assert one["rows"] == content["checked"] == 900
    assert 0 < one["forward_s"] < one["seconds"]
    assert 0 < one["reading_s"] < one["seconds"]
    assert content["max_abs"] <= 2e-6
    assert one["curve"][-1]["rows"] == 900
    assert one["curve"][-1]["resident"] <= one["resident_peak"]
    overhead = (one["seconds"] - one["forward_s"]) / one["seconds"]
    assert f"Overhead {overhead:.1%} (at most 15%)" in done.stdout


def test_memory_is_sampled_after_the_end_of_a_block(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    meter = importlib.import_module("bench_corpus").Meter()
    with meter.running():
        end = time.perf_counter()
    when, _, size = meter.samples[-1]
    assert when >= end
    assert size > 0


@pytest.mark.parametrize("mistake", ["vector", "row"])
def test_a_corpus_that_is_off_leaves_no_figure(monkeypatch, tmp_path, tiny_folder, mistake):
    pa, pq = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    bench = importlib.import_module("bench_corpus")
    bench.write_corpus(tmp_path / "in", 50)
    embed_corpus(tmp_path / "in", tmp_path / "out.parquet", model=tiny_folder, device="cpu")
    assert bench.check(tmp_path / "in", tmp_path / "out.parquet", tiny_folder, 50).max_abs <= 2e-6
    table = pq.read_table(tmp_path / "out.parquet")
    if mistake == "row":
        table = pa.concat_tables([table.slice(0, 20), table.slice(19, 1), table.slice(21)])
    else:
        order = [1, 0, *range(2, 50)]
        table = table.set_column(3, table.schema.field(3), table["embedding"].take(order))
    pq.write_table(table, tmp_path / "out.parquet")
    # the script's own harness
    with pytest.raises(bench.harness.DisagreementError):
        bench.check(tmp_path / "in", tmp_path / "out.parquet", tiny_folder, 50)
