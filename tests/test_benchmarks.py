"""The benchmarks: correct before fast, and figures that mean what they say."""

from __future__ import annotations

import contextlib
import gc
import importlib
import itertools
import json
import sys
import weakref
from itertools import chain
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import harness, peers, report, workload
from benchmarks.harness import Case, Contender, Deviation, DisagreementError
from nomoe import NomicMoEConfig, data
from nomoe.synthetic import write_checkpoint
from nomoe.tokenizer import Tokenizer
from nomoe_kernels import cpu

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
BOUND = Deviation(cosine_distance=1e-8, max_abs=1e-4)


# --- the work


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


# --- correctness before speed


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


# --- timing


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
        "2026-01-02",
        [report.case_record(case, [fast, slow]) | {"calls": 7}],
        command="python it",
        machine="this one",
        settings={},
        not_run={"other": "not installed"},
        left_out={"another": "another failed: ValueError: no.\nmore"},
        complete=False,
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
    text = report.render(record)
    assert "Not run: other: not installed." in text
    assert "**Left out**: another failed: ValueError: no.\n" in text
    assert "**Unfinished**" in text
    assert "\n## some, 7 calls in a run\n" in text


def test_share_of_the_slowest_ceiling():
    one = Contender("one", lambda: torch.ones(1), flop=1, bound=BOUND, bytes=8 * 10**9)
    ceilings = [Contender(name, one.run, flop=1, bound=None) for name in ("math", "memory")]
    case = Case("case", 1, [one, *ceilings], torch.ones(1), baseline="one")
    results = [
        harness.Result(contender, None, [seconds])
        for contender, seconds in zip(case.contenders, (4.0, 1.0, 3.0), strict=True)
    ]
    record = report.make_record(
        "it",
        "2026-01-02",
        [report.case_record(case, results)],
        command="",
        machine="",
        settings={},
        not_run={},
        left_out={},
    )
    first = record["cases"][0]["contenders"][0]
    assert (first["gb_per_s"], first["of_ceiling"]) == (2.0, 0.75)
    assert "**" not in report.render(record)
    [row] = [line for line in report.render(record).splitlines() if line.startswith("| one")]
    assert [cell.strip() for cell in row.strip("|").split("|")][-4:] == ["2", "1.00", "75%", ""]


def test_flop_of_the_real_model():
    config = NomicMoEConfig.from_dict(data.real_config())
    # MODEL.md: 226.6 MFLOP of projections per token and 36,864 for each token attended to
    assert harness.projection_flop(config, 1) == pytest.approx(226.6e6, rel=2e-4)
    extra = harness.forward_flop(config, [100, 7]) - harness.projection_flop(config, 107)
    assert extra == 36_864 * (100**2 + 7**2)


def test_ceiling_runs_the_products_of_the_forward(golden_tiny, monkeypatch):
    texts = [list(range(30)), [7, 8, 9]]
    packed = peers.Packed(golden_tiny)
    routed = packed.routed_rows(texts)
    assert [sum(rows) for rows in routed] == [2 * 33] * len(golden_tiny.config.moe_layers)
    ceiling = harness.linear_ceiling(golden_tiny.config, golden_tiny.state_dict(), routed)
    # the counter knows no packed products
    monkeypatch.setattr(cpu, "supports", lambda dtype: False)
    expected = harness.projection_flop(golden_tiny.config, 33)
    for run in (ceiling, lambda: packed(texts)):
        with FlopCounterMode(display=False) as counter:
            run()
        products = counter.get_flop_counts()["Global"]
        names = ("mm", "addmm")
        found = sum(flop for op, flop in products.items() if op.__name__ in names)
        assert found == expected


def test_a_replay_keeps_what_its_run_reads(monkeypatch):
    """A graph does not: its inputs' memory would go to others."""

    class Graph:
        def replay(self):
            pass

    around = lambda *args: contextlib.nullcontext(MagicMock())  # noqa: E731
    fake = {"Stream": MagicMock, "current_stream": MagicMock, "CUDAGraph": Graph}
    for name, one in {**fake, "stream": around, "graph": around}.items():
        monkeypatch.setattr(torch.cuda, name, one)
    x = torch.ones(3)
    held = weakref.ref(x)
    replay = harness.captured(lambda x=x: x.sum())
    assert isinstance(replay, harness.Replay)
    del x
    gc.collect()
    assert held() is not None
    assert replay() == 3
    del replay
    gc.collect()
    assert held() is None


# --- results


def test_results_are_never_replaced(tmp_path):
    date = "2026-01-02"
    first = report.result_paths(tmp_path / "new", date, "b-cpu")
    report.write_results({}, first, "text")
    before = [path.read_bytes() for path in first]
    second = report.result_paths(tmp_path / "new", date, "b-cpu")
    report.write_results({}, second, "other text")
    assert [path.name for path in first] == [f"{date}-b-cpu.json", f"{date}-b-cpu.md"]
    assert [path.name for path in second] == [f"{date}-b-cpu-2.json", f"{date}-b-cpu-2.md"]
    assert [path.read_bytes() for path in first] == before
    assert len(list((tmp_path / "new").iterdir())) == 4


@pytest.fixture
def script(monkeypatch):
    """What the scripts share, as they import it."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("script")


def one_case(script, title, run):
    contender = script.harness.Contender(title, run, 1, script.harness.Deviation(1e-9, 1e-6))
    return script.harness.Case(title, 1, [contender], torch.ones(1, 2), title)


def run_cases(script, output, *works):
    """Measure a case of each work, titled by its place; the exit status."""
    arguments = ["--device=cpu", "--repeats=1", f"--output={output}"]
    args = script.parse(script.parser("", repeats=1), arguments)
    about = {"benchmark": "b", "command": "c", "machine": "m", "settings": {}, "not_run": {}}
    run = script.Run(args, "b", **about)
    for place, work in enumerate(works):
        with run.attempt(f"case {place}"):
            run.measure(one_case(script, f"case {place}", work), more=place)
    return run.finish()


def right():
    return torch.ones(1, 2)


def fails(error):
    raise error


def test_a_case_that_disagrees_or_fails_is_left_out(script, tmp_path, capsys):
    works = [right, lambda: 2 * right(), lambda: fails(MemoryError("full")), right]
    assert run_cases(script, tmp_path, *works) == 1
    printed = capsys.readouterr()
    for text in (printed.err, printed.out):
        assert "outputs disagree, so that no speed is reported: case 1, case 1: output is" in text
        assert "case 2 failed: MemoryError: full" in text
    assert "Traceback" in printed.err
    record = json.loads(next(tmp_path.glob("*.json")).read_text())
    found = [(case["title"], case["more"]) for case in record["cases"]]
    assert found == [("case 0", 0), ("case 3", 3)]
    assert list(record["left_out"]) == ["case 1", "case 2"]
    assert record["complete"] is True
    assert run_cases(script, tmp_path / "other", right) == 0


def test_a_disk_that_is_full_ends_a_run(script, tmp_path, monkeypatch):
    write, written = script.report.write_results, []

    def fill(*given):
        if len(written) == 1:
            raise OSError("full")
        written.append(write(*given))

    monkeypatch.setattr(script.report, "write_results", fill)
    with pytest.raises(OSError, match="full"):
        run_cases(script, tmp_path, right, right, right)
    record = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert [case["title"] for case in record["cases"]] == ["case 0"]


def test_what_ends_a_run_early_leaves_what_was_measured(script, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_cases(script, tmp_path, right, lambda: 2 * right(), lambda: fails(KeyboardInterrupt()))
    record = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert [case["title"] for case in record["cases"]] == ["case 0"]
    assert list(record["left_out"]) == ["case 1"]
    assert record["complete"] is False
    assert "**Unfinished**" in next(tmp_path.glob("*.md")).read_text()


def test_the_command_line_names_the_script_from_the_root(monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(ROOT / "benchmarks" / "bench_encoder.py"), "--smoke"])
    found = report.command_line(["--output", "two words"])
    assert found == "python benchmarks/bench_encoder.py --output 'two words'"
