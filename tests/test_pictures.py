"""Pictures of results, and the benchmark that is one."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from nomoe import data

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def pictures(monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("pictures")


def rows(**milliseconds):
    made = [
        {
            "name": name.replace("_", " "),
            "tokens_per_s": 1e6 / median,
            "median_ms": median,
            "p20_ms": 0.9 * median,
            "p80_ms": 1.1 * median,
            "tflop_per_s": 1 / median,
            "flop": 10**9,
            "gb_per_s": 10.0,
            "deviation": {"cosine_distance": 0.0, "max_abs": 0.0},
        }
        for name, median in milliseconds.items()
    ]
    product = made[0] | {"name": "ceiling: product", "tflop_per_s": 9.0, "gb_per_s": 999.0}
    copy = made[0] | {"name": "ceiling: copy", "tflop_per_s": 0.0, "flop": 0, "gb_per_s": 99.0}
    for ceiling in (product, copy):
        del ceiling["deviation"]
    return [*made, product, copy]


def result(benchmark, *cases):
    return {"benchmark": benchmark, "date": "2026-01-02", "machine": "one < two", "cases": cases}


@pytest.mark.parametrize(
    ("record", "names", "words"),
    [
        (
            result(
                "bench_encoder",
                {"title": "8 texts (9 tokens, 10 when padded), from ids", "tokens": 9,
                 "contenders": rows(peer=8.0, nomoe=4.0)},
                {"title": "1 query (9 tokens, 10 when padded), from ids", "tokens": 9,
                 "contenders": rows(peer=2.5, nomoe=1.25)},
            ),
            ["latency-from-ids", "speed-from-ids"],
            [("250,000", "125,000", "8 texts"), ("1.25 ms", "2.5 ms", "1 query")],
        ),
        (
            result("bench_scaling", *(
                {"title": "x", "sweep": sweep, "x": x, "tokens": 9, "contenders": rows(nomoe=x)}
                for sweep in ("length", "experts") for x in (16, 32)
            )),
            ["experts", "length"],
            [("tokens of each text, as many in all", "16", "32"), ("experts",)],
        ),
        (
            result("bench_moe", *(
                {"title": f"{kernel}, 9 tokens", "tokens": 9, "contenders": made}
                for kernel, made in (("up", rows(nomoe_x=3, torch=4)), ("down", rows(torch=2)))
            )),
            ["roofline"],
            [("9 TFLOP/s, 99 GB/s", "up, nomoe", "up, others", "down, others")],
        ),
        (
            {
                "benchmark": "bench_corpus", "date": "2026-01-02", "machine": "one < two",
                "one_process": {"curve": [
                    {"seconds": row / 400, "rows": row, "resident": 7_000_000}
                    for row in (400, 1200, 2000)
                ]},
            },
            ["growth"],
            [("rows per second", "400", "memory in RAM, MB", "10", "2,000")],
        ),
    ],
    ids=["encoder", "scaling", "moe", "corpus"],
)  # fmt: skip
def test_pictures(pictures, record, names, words, tmp_path):
    path = tmp_path / "2026-01-02-it.json"
    path.write_text(json.dumps(record))
    assert pictures.main([str(path), f"--output={tmp_path / 'drawn'}"]) == 0
    written = sorted(one.name for one in (tmp_path / "drawn").iterdir())
    assert written == sorted(
        f"it-{name}-{theme}.svg" for name in names for theme in ("dark", "light")
    )
    texts = {}
    for name in written:
        tree = ElementTree.parse(tmp_path / "drawn" / name)
        texts[name] = " ".join("".join(one.itertext()) for one in tree.iter() if "text" in one.tag)
        assert "2026-01-02. one < two." in texts[name]
    for group in words:
        assert any(all(word in text for word in group) for text in texts.values()), group
    dark, light = ((tmp_path / "drawn" / name).read_text() for name in written[:2])
    assert "#e6edf3" in dark
    assert "#e6edf3" not in light


def test_expert_use_and_its_picture(pictures, tiny_folder, encoder, tmp_path):
    expert_use = importlib.import_module("expert_use")
    assert expert_use.main([f"--model={tiny_folder}", "--device=cpu", f"--output={tmp_path}"]) == 0
    [path] = tmp_path.glob("*-expert_use.json")
    record = json.loads(path.read_text())
    assert list(record["shares"]) == list(data.sentences())
    texts = data.sentences()["Thai"]
    counts = sum(encoder.route(texts, prompt_name=one).counts for one in ("query", "document"))
    assert record["shares"]["Thai"] == (counts / counts.sum(axis=1, keepdims=True)).tolist()
    assert pictures.main([str(path), f"--output={tmp_path}"]) == 0
    drawn = (tmp_path / "expert_use-languages-dark.svg").read_text()
    for word in ("Thai", "layer 11", "even: 12.5%"):
        assert word in drawn


def test_what_is_no_result_is_refused(pictures, tmp_path, capsys):
    path = tmp_path / "other.json"
    for content in ("[]", "{}", "no"):
        path.write_text(content)
        with pytest.raises(SystemExit):
            pictures.main([str(path)])
        assert "other.json" in capsys.readouterr().err
