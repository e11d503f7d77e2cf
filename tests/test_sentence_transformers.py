"""nomoe's model inside SentenceTransformer: values, prompts, workers, saving."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentence_transformers
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from torch.optim.swa_utils import AveragedModel

import nomoe
from nomoe import Encoder, data
from nomoe.integrations.transformers import HFNomicMoEModel, is_registered
from nomoe.repository import TRAINED_PROMPTS
from tests.hf import native_can_load

MODULE = "nomoe.integrations.sentence_transformers"
TEXTS = [text for group in data.sentences().values() for text in group][:40]


@pytest.fixture(autouse=True)
def unregistered_afterwards() -> Iterator[None]:
    yield
    nomoe.unregister()


@pytest.fixture
def model(tiny_folder: Path) -> SentenceTransformer:
    return nomoe.sentence_transformer(tiny_folder, device="cpu")


def test_equals_the_encoder_for_every_prompt(model: SentenceTransformer, encoder: Encoder) -> None:
    assert type(model) is SentenceTransformer
    assert isinstance(model[0].auto_model, HFNomicMoEModel)
    assert model.prompts.items() >= (TRAINED_PROMPTS | {"document": "search_document: "}).items()
    for name in model.prompts:
        np.testing.assert_allclose(
            model.encode(TEXTS, prompt_name=name),
            encoder.encode(TEXTS, prompt_name=name),
            atol=1e-5,
        )
    for method in ("encode_query", "encode_document"):
        expected = getattr(encoder, method)(TEXTS)
        np.testing.assert_allclose(getattr(model, method)(TEXTS), expected, atol=1e-5)
    nomoe.check(model)


def test_encode_document_is_not_encode(model: SentenceTransformer) -> None:
    """On a bare SentenceTransformer both are the same: the document prompt is empty."""
    assert np.abs(model.encode_document(TEXTS) - model.encode(TEXTS)).max() > 0.01


def test_options(tiny_folder: Path) -> None:
    options = {"max_seq_length": 9, "truncate_dim": 24}
    model = nomoe.sentence_transformer(tiny_folder, device="cpu", dtype="bfloat16", **options)
    assert model.max_seq_length == 9
    assert model[0].auto_model.dtype == torch.bfloat16
    encoder = Encoder.from_pretrained(tiny_folder, device="cpu", dtype="bfloat16", **options)
    for text in TEXTS:
        expected = encoder.encode_query(text, normalize_embeddings=False)
        assert expected.shape == (24,)
        np.testing.assert_allclose(model.encode_query(text), expected, atol=5e-3)
    triton = nomoe.sentence_transformer(tiny_folder, device="cpu", backend="triton")
    assert triton[0].auto_model.backend.name == "triton"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_seq_length": 4096}, "max_seq_length is 4096, expected 3 to 2048"),
        ({"max_seq_length": 2}, "max_seq_length is 2, expected 3 to 2048"),
        ({"truncate_dim": 97}, "truncate_dim is 97, expected 1 to 96"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"backend": "cuda"}, "backend is 'cuda'"),
        ({"revision": "main"}, "local folder, which has no revision"),
    ],
)
def test_bad_options(options: dict[str, object], message: str, tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        nomoe.sentence_transformer(tiny_folder, device="cpu", **options)


def test_a_tokenizer_of_another_kind_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    """Without tokenizer_config.json transformers chooses by model type, and chooses wrongly."""
    folder = tmp_path / "copy"
    shutil.copytree(tiny_folder, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "BertTokenizer"}))
    for registered in (False, True):
        if registered:
            nomoe.register()
        with pytest.raises(ValueError, match=r"gives other ids than its tokenizer\.json"):
            nomoe.sentence_transformer(folder, device="cpu")
        # as it was before
        assert is_registered() is registered


def test_a_repositorys_name_is_kept(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In what it saves, and in PEFT's adapters; not the folder in somebody's cache."""
    commit = "1" * 40
    snapshot = Path(shutil.copytree(tiny_folder, tmp_path / "snapshots" / commit))
    monkeypatch.setattr(f"{MODULE}.locate", lambda *arguments, **options: snapshot)
    model = nomoe.sentence_transformer("someone/moe", device="cpu")
    transformer = model[0].auto_model
    assert (transformer.name_or_path, transformer.config._name_or_path) == ("someone/moe",) * 2
    model.save_pretrained(str(tmp_path / "saved"))
    card = (tmp_path / "saved" / "README.md").read_text(encoding="utf-8")
    assert "\nbase_model: someone/moe\n" in card
    assert str(tmp_path) not in card


def test_saved_and_loaded_by_every_road(
    model: SentenceTransformer, encoder: Encoder, tmp_path: Path
) -> None:
    expected = encoder.encode_document(TEXTS)
    model.encode(TEXTS)
    folder = tmp_path / "saved"
    model.save_pretrained(str(folder))
    kinds = [module["type"] for module in json.loads((folder / "modules.json").read_text())]
    assert all(kind.startswith("sentence_transformers.") for kind in kinds)
    for trust in (False, True):
        loaded = SentenceTransformer(str(folder), device="cpu", trust_remote_code=trust)
        nomoe.check(loaded)
        np.testing.assert_allclose(loaded.encode_document(TEXTS), expected, atol=1e-5)
    loaded = nomoe.sentence_transformer(folder, device="cpu")
    np.testing.assert_allclose(loaded.encode_document(TEXTS), expected, atol=1e-5)
    ours = Encoder.from_pretrained(folder, device="cpu")
    np.testing.assert_allclose(ours.encode_document(TEXTS), expected, atol=1e-5)
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_allclose(again.encode_document(TEXTS), expected, atol=1e-5)


def test_saved_length_and_dimension_hold_for_the_encoder(
    tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"max_seq_length": 16, "truncate_dim": 24}
    model = nomoe.sentence_transformer(tiny_folder, device="cpu", **options)
    model.save_pretrained(str(tmp_path))
    path = tmp_path / "config_sentence_transformers.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    if "truncate_dim" not in saved:
        # newer ones save it, and read it
        assert sentence_transformers.__version__.startswith("5.3.")
        path.write_text(json.dumps(saved | {"truncate_dim": 24}), encoding="utf-8")
    text = " ".join(TEXTS)
    caplog.clear()
    loaded = nomoe.sentence_transformer(tmp_path, device="cpu")
    assert "longer than" not in caplog.text
    expected = loaded.encode_document([text])
    ours = Encoder.from_pretrained(tmp_path, device="cpu")
    assert (ours.max_seq_length, ours.truncate_dim) == (16, 24)
    vectors = ours.encode_document([text], normalize_embeddings=False)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    # the text is long enough to tell
    longer = Encoder.from_pretrained(tmp_path, device="cpu", max_seq_length=512)
    whole = longer.encode_document([text], normalize_embeddings=False)
    assert np.abs(whole - expected).max() > 1e-3


@pytest.mark.slow
def test_workers_are_right(model: SentenceTransformer, encoder: Encoder) -> None:
    """Each is a fresh process (spawn) that has imported nothing."""
    expected = encoder.encode_document(TEXTS)
    pool = model.start_multi_process_pool(["cpu", "cpu"])
    try:
        vectors = model.encode(TEXTS, prompt_name="document", pool=pool, chunk_size=10)
        queries = model.encode_query(TEXTS[:4], pool=pool, chunk_size=2)
    finally:
        model.stop_multi_process_pool(pool)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    np.testing.assert_allclose(queries, encoder.encode_query(TEXTS[:4]), atol=1e-5)


def test_weights_stay_what_they_are(model: SentenceTransformer) -> None:
    """Others average, count and copy the parameters of a SentenceTransformer between calls."""
    average = AveragedModel(model)
    for _ in range(2):
        before = model.encode(TEXTS[:3])
        average.update_parameters(model)
    assert all(one.isfinite().all() for one in model.parameters())
    np.testing.assert_allclose(average.module.encode(TEXTS[:3]), before, atol=1e-6)


def test_bare_class_with_and_without_register(
    tiny_folder: Path, encoder: Encoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = native_can_load(tiny_folder, tmp_path / "native")
    texts = TEXTS[:8]
    native = SentenceTransformer(str(folder), device="cpu")
    with pytest.raises(ValueError, match=r"thrown away.*nomoe\.register\(\)"):
        nomoe.check(native)
    vectors = native.encode(texts, prompt_name="passage")
    # nothing about them looks wrong
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    expected = encoder.encode_document(texts)
    assert (vectors * expected).sum(axis=1).max() < 0.9

    nomoe.register()
    model = SentenceTransformer(str(folder), device="cpu")
    np.testing.assert_allclose(model.encode(texts, prompt_name="passage"), expected, atol=1e-5)
    caplog.set_level(logging.WARNING, logger="nomoe")
    nomoe.check(model)
    assert "encode_document of this SentenceTransformer adds no prefix" in caplog.text


def test_embedding_lays_matrices_out(tiny_folder: Path, tmp_path: Path) -> None:
    """And whoever reads, trains, saves or sends the parameters afterwards has their numbers."""
    model = nomoe.sentence_transformer(tiny_folder, device="cpu")
    checkpoint = load_file(tiny_folder / "model.safetensors")
    inner = model[0].auto_model
    layer = inner.encoder.layers[1].mlp.experts.mlp

    def embedded() -> Any:
        vectors = model.encode_query(TEXTS)
        assert layer.packed is not None
        return vectors

    before = embedded()
    kept = dict(model.named_parameters())
    prefix = next(iter(kept)).removesuffix("embeddings.word_embeddings.weight")
    for name, one in checkpoint.items():
        assert kept[prefix + name].equal(one), name
    # who holds them may write into them
    model.encode_query(TEXTS)
    with torch.no_grad():
        kept[prefix + "encoder.layers.1.mlp.experts.mlp.w1"].mul_(2)
    del kept, one
    assert not np.array_equal(embedded(), before)
    # as accelerate puts a tensor in its place
    old = layer._parameters["w1"]
    layer._parameters["w1"] = type(old)(0.5 * old, requires_grad=True)
    assert np.array_equal(embedded(), before)
    model.save(str(tmp_path / "saved"))
    for name, one in load_file(tmp_path / "saved" / "model.safetensors").items():
        assert one.equal(checkpoint[name]), name
    embedded()
    assert np.array_equal(pickle.loads(pickle.dumps(model)).encode_query(TEXTS), before)
    embedded()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    # its older name
    features = getattr(model, "preprocess", model.tokenize)(TEXTS)
    model(features)["sentence_embedding"].pow(3).sum().backward()
    model.encode_query(TEXTS)
    optimizer.step()
    assert not layer.w1.equal(checkpoint["encoder.layers.1.mlp.experts.mlp.w1"])
    assert all(one.isfinite().all() for one in model.parameters())
    del optimizer, features
    assert not np.array_equal(embedded(), before)
