"""The contenders of the benchmarks compute what the model does."""

from __future__ import annotations

import dataclasses
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks import harness, peers, stock
from benchmarks.harness import Deviation, DisagreementError
from nomoe import NomicMoEConfig, NomicMoEModel, data
from nomoe.synthetic import random_model
from nomoe.verify import golden_cases

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
BOUND = Deviation(cosine_distance=1e-8, max_abs=1e-4)


def draw_texts(lengths):
    generator = np.random.default_rng(1)
    return [generator.integers(0, 512, size=length).tolist() for length in lengths]


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


def test_adapters_keep_the_order_of_the_texts(golden_tiny):
    texts = draw_texts([7, 50, 20])
    loop = peers.PaddedLoop(golden_tiny.config, golden_tiny.state_dict(), batch_size=2)
    for peer in (peers.Packed(golden_tiny), loop):
        alone = torch.cat([peer([ids]) for ids in texts])
        assert (peer(texts) - alone).abs().max() < 1e-5
        assert (alone[0] - alone[1]).abs().max() > 0.1


def test_texts_near_a_tie_are_found(monkeypatch):
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
    assert some == peers.Packed(model, batch_tokens=12).near_ties(texts, 0.004)
    # texts of the same lengths take their place
    monkeypatch.setattr(peers, "NEAR_TIE", 0.004)
    generator = np.random.default_rng(2)
    others = packed.away_from_ties(
        texts[:-1], lambda length: generator.integers(0, 512, size=length).tolist()
    )
    assert packed.near_ties(others, 0.004) == []
    assert [len(ids) for ids in others] == [5, 1, 9, 4, 2, 3]
    kept = [place for place in range(6) if place not in some]
    assert [others[place] for place in kept] == [texts[place] for place in kept]
    # experts that a router cannot tell apart
    tied = model.state_dict()
    name = next(name for name in tied if name.endswith("router.layer.weight"))
    tied[name] = tied[name][:1].expand(config.num_experts, -1).clone()
    model.load_state_dict(tied)
    assert packed.near_ties(texts, 1e-6) == list(range(7))


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
        record = json.loads(next(tmp_path.glob("*.json")).read_text())
        assert len(record["left_out"]) == 5
        assert all(case["title"].endswith("from ids") for case in record["cases"])
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


@pytest.mark.parametrize("matrices", ["f32", "bf16", "q8_0"])
def test_llama_cpp_computes_the_same(bench_cpu, matrices, golden_tiny, tmp_path):
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    state = bench_cpu.no_expert_bias(golden_tiny.state_dict())
    path = tmp_path / "model.gguf"
    bench_cpu.llama.write_gguf(path, golden_tiny.config, state, matrices)
    # two texts to a batch
    peer = bench_cpu.llama.LlamaCpp(path, matrices, 64, 2, threads=1)
    texts = draw_texts([40, 3, 9, 25, 1])
    expected = peers.PaddedLoop(golden_tiny.config, state)(texts)
    bound = {"f32": 1e-6, "bf16": 1e-4, "q8_0": 1e-3}[matrices]
    harness.check_agreement(matrices, peer(texts), expected, Deviation(bound, 0.2))
    biased = peers.PaddedLoop(golden_tiny.config, golden_tiny.state_dict())(texts)
    with pytest.raises(DisagreementError):
        harness.check_agreement(matrices, peer(texts), biased, Deviation(bound, 0.2))
    peer.close()
