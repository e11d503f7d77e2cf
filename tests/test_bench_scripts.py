"""The scripts of the benchmarks: each runs small, and a wrong output leaves no speed."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from benchmarks import harness
from benchmarks.harness import Deviation
from nomoe import embed_corpus
from nomoe_kernels import cpu

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
BOUND = Deviation(cosine_distance=1e-8, max_abs=1e-4)


def run_small(script, output, *options, interpreted=True):
    """Run a script's smoke test in a process of its own; what it printed."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    if not interpreted:
        environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, f"benchmarks/{script}.py", "--smoke", *options, f"--output={output}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- bench_encoder


def test_smoke_run_writes_its_results(tmp_path):
    # two threads on a busy machine spend their time waiting for each other
    options = ["--device=cpu", "--repeats=2", "--threads=1"]
    printed = run_small("bench_encoder", tmp_path, *options)
    markdown, record = sorted(tmp_path.iterdir(), key=lambda path: path.suffix, reverse=True)
    assert record.name == markdown.with_suffix(".json").name
    assert record.name.endswith("-bench_encoder-cpu-float32-smoke.json")
    assert printed.strip() == markdown.read_text(encoding="utf-8").strip()

    content = json.loads(record.read_text(encoding="utf-8"))
    assert record.name.startswith(content["date"])
    command = f"benchmarks/bench_encoder.py --smoke {' '.join(options)} --output={tmp_path}"
    assert content["command"] == f"python {command}"
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


def test_a_wrong_contender_leaves_no_speed_of_its_inputs(
    bench_encoder, monkeypatch, tmp_path, capsys
):
    right = bench_encoder.peers.Packed.__call__
    monkeypatch.setattr(
        bench_encoder.peers.Packed, "__call__", lambda *arguments: 1.01 * right(*arguments)
    )
    command = ["--smoke", "--device=cpu", "--repeats=1", "--threads=1", f"--output={tmp_path}"]
    assert bench_encoder.main(command) == 1
    assert "no speed is reported" in capsys.readouterr().err
    record = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert len(record["left_out"]) == 5
    for title, why in record["left_out"].items():
        assert title.endswith("from ids")
        assert f"{title}, nomoe (torch): output is off" in why
    # through the Encoder it is right
    assert len(record["cases"]) == 5
    assert all(case["title"].endswith("from strings") for case in record["cases"])


def test_texts_near_a_tie_are_left_out(bench_encoder, monkeypatch, tmp_path):
    near = {16: [3, 5], 8: [0], 2: [0, 1]}
    monkeypatch.setattr(
        bench_encoder.peers.Packed, "near_ties", lambda _, texts, gap: near.get(len(texts), [])
    )
    seen = []
    make = bench_encoder.build_cases
    monkeypatch.setattr(
        bench_encoder,
        "build_cases",
        lambda title, texts, ids, *rest: (
            seen.append((title, len(texts), len(ids))) or make(title, texts, ids, *rest)
        ),
    )
    command = ["--smoke", "--device=cpu", "--repeats=1", f"--output={tmp_path}"]
    assert bench_encoder.main(command) == 0
    assert seen == [
        ("1 query", 1, 1),
        ("16 queries, 2 near a tie left out", 14, 14),
        ("8 passages, 1 near a tie left out", 7, 7),
        # nothing is left of the documents
        ("a mixture of 13", 13, 13),
    ]


def test_16_bits_agree_within_their_bounds(bench_encoder, tmp_path, capsys):
    command = ["--smoke", "--device=cpu", "--dtype=bfloat16", "--repeats=1"]
    assert bench_encoder.main([*command, f"--output={tmp_path}"]) == 0
    assert "dtype bfloat16" in capsys.readouterr().out
    assert len(list(tmp_path.glob("*-bench_encoder-cpu-bfloat16-smoke.*"))) == 2


def test_an_unknown_device_is_named(bench_encoder, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench_encoder.main(["--smoke", "--device=abacus"])
    assert "device is 'abacus'" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--repeats", "--threads"])
def test_counts_below_one_are_refused(option, bench_encoder, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench_encoder.main(["--smoke", f"{option}=0"])
    assert stopped.value.code == 2
    assert f"{option} is 0" in capsys.readouterr().err


# --- bench_moe


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


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_layer_that_is_too_large_is_refused(dtype, bench_moe):
    layers = bench_moe.draw_layers(bench_moe.SMOKE, getattr(torch, dtype), CPU)
    work = bench_moe.layer_work(40, "balanced", layers, ["nomoe (torch)"])
    right = work.runs["nomoe (torch)"]
    bench_moe.build_case(work, layers, dtype, CPU)
    work.runs["nomoe (torch)"] = lambda one: right(one) * 1.02
    with pytest.raises(RuntimeError, match="in length"):
        bench_moe.build_case(work, layers, dtype, CPU)


def test_smoke_run_of_a_layer(tmp_path):
    options = ["--device=cpu", "--repeats=1", "--tokens=9"]
    run_small("bench_moe", tmp_path, *options, interpreted=False)
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
        per_s = 6 * 9 / (torch_loop["median_ms"] / 1000)
        assert torch_loop["tokens_per_s"] == pytest.approx(per_s)
        slowest = max(products["median_ms"], copy["median_ms"])
        assert stock["of_ceiling"] == pytest.approx(slowest / stock["median_ms"])


# --- bench_kernels


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
    assert names[1:5] == [
        "nomoe rotating-16-16-4-2 (configured)",
        "nomoe rotated-16-16-4-2",
        "nomoe rotating-16-16-4-1",
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
    assert json.loads(next(tmp_path.glob("*.json")).read_text())["cases"] == []


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
    assert json.loads(next(tmp_path.glob("*.json")).read_text())["cases"] == []


def test_attention_is_compared_where_it_rotates(bench_kernels, tmp_path, monkeypatch, capsys):
    """Positions are 0 while time is taken: a form that rotates nothing would pass there."""
    monkeypatch.setattr(bench_kernels.harness, "measure", lambda *_, **__: pytest.fail("timed"))
    monkeypatch.setattr("nomoe_kernels.launch.rotate", lambda *given: None)
    arguments = [*SMOKE_OF_KERNELS, "--only=attention", f"--output={tmp_path}"]
    assert bench_kernels.main(arguments) == 1
    assert "kernel='rotated'" in capsys.readouterr().err


# --- bench_cpu


def test_smoke_run_on_a_cpu(bench_cpu, tmp_path, monkeypatch):
    packed, pack_weight = [], cpu.pack_weight
    monkeypatch.setattr(cpu, "pack_weight", lambda one: packed.append(one) or pack_weight(one))
    assert bench_cpu.main(["--smoke", "--repeats=1", "--threads=1", f"--output={tmp_path}"]) == 0
    record = json.loads(next(tmp_path.glob("*-bench_cpu-smoke.json")).read_text())
    if find_spec("llama_cpp") is None:
        assert "llama_cpp" in record["not_run"]["llama.cpp"]
    else:
        assert record["settings"]["others"].startswith("llama-cpp-python ")
    assert len(record["cases"]) == 4
    # a model and a ceiling of each dtype, of whatever cases: 4 layers, 2 of them with 8 experts
    matrices = 4 * 2 + 2 * 2 + 2 * (8 * 2 + 1)
    assert len(packed) <= 2 * 2 * matrices
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
    assert json.loads(next(tmp_path.glob("*.json")).read_text())["cases"] == []


# --- bench_scaling


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


# --- bench_engine


def test_smoke_run_of_the_engine(tmp_path):
    options = ["--device=cpu", "--repeats=2", "--corpus-repeats=1", "--threads=1"]
    run_small("bench_engine", tmp_path, *options, interpreted=False)
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


# --- bench_corpus


@pytest.mark.slow
def test_smoke_run_of_a_corpus(tmp_path):
    printed = run_small("bench_corpus", tmp_path, "--rows=900")
    content = json.loads(next(tmp_path.glob("*-bench_corpus-smoke.json")).read_text())
    one = content["one_process"]
    assert one["rows"] == content["checked"] == 900
    assert 0 < one["forward_s"] < one["seconds"]
    assert 0 < one["reading_s"] < one["seconds"]
    assert content["max_abs"] <= 2e-6
    assert one["curve"][-1]["rows"] == 900
    assert one["curve"][-1]["resident"] <= one["resident_peak"]
    overhead = (one["seconds"] - one["forward_s"]) / one["seconds"]
    assert f"Overhead {overhead:.1%} (at most 15%)" in printed


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
