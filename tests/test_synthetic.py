from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from nomoe import Encoder, NomicMoEConfig, data, synthetic


def test_has_every_file_of_the_real_repository(tiny_folder: Path) -> None:
    names = {path.relative_to(tiny_folder).as_posix() for path in tiny_folder.rglob("*")}
    assert names == {
        "1_Pooling",
        "1_Pooling/config.json",
        "2_Normalize",
        "config.json",
        "config_sentence_transformers.json",
        "model.safetensors",
        "modules.json",
        "sentence_bert_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    modes = {path.stat().st_mode for path in tiny_folder.iterdir() if path.is_file()}
    assert len(modes) == 1, "all as readable as any new file"
    config = json.loads((tiny_folder / "config.json").read_text())
    real = data.real_config()
    assert config.keys() == real.keys()
    changed = {key for key in real if real[key] != config[key]}
    assert changed == {"n_embd", "n_head", "n_inner", "vocab_size"}


def test_routing_is_as_published_and_uneven(encoder: Encoder) -> None:
    texts = [text for group in data.sentences().values() for text in group]
    published = data.published()["routing_on_real_text"]["mean_top2_weight_sum_by_layer"]
    # texts and prompts that the calibration did not see in this form
    routes = encoder.route([text[::2] + " " + text for text in texts], "Clustering")
    sums = routes.weight_sums()
    assert np.abs(sums - list(published.values())).max() < 0.05
    busiest = routes.shares().max(axis=1)
    assert (busiest > 1.5 / 8).all()
    assert (busiest < 0.5).all()


def test_special_ids_are_the_real_ones(encoder: Encoder) -> None:
    backend = encoder.tokenizer.backend
    ids = [backend.token_to_id(one) for one in ("<s>", "<pad>", "</s>", "<unk>")]
    assert ids == [0, 1, 2, 3]
    assert backend.token_to_id("<mask>") == backend.get_vocab_size() - 1
    assert backend.normalizer is None
    assert backend.encode("").ids == [0, 2]


def test_knows_the_shipped_sentences(encoder: Encoder) -> None:
    groups = data.sentences()
    assert len(groups) >= 20
    for language, texts in groups.items():
        assert len(texts) == 5
        rows = encoder.tokenizer(texts, 512).ids
        assert not any(3 in row for row in rows), f"<unk> in {language}"
        # worth being called pieces: several characters to a token where words are spelt out
        assert sum(map(len, rows)) < 0.6 * sum(map(len, texts)), language


def test_same_seed_same_bytes(tmp_path: Path, tiny_folder: Path) -> None:
    again = synthetic.write_checkpoint(tmp_path / "again")
    other = synthetic.write_checkpoint(tmp_path / "other", seed=1)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (again / name).read_bytes() == (tiny_folder / name).read_bytes()
    assert (other / "model.safetensors").read_bytes() != (again / "model.safetensors").read_bytes()


def test_refusals(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="already holds a checkpoint"):
        synthetic.write_checkpoint(tiny_folder)
    with pytest.raises(ValueError, match="expected 'tiny' or 'full'"):
        synthetic.write_checkpoint(tmp_path, size="huge")  # type: ignore[arg-type]
    for seed in (-1, 1.5):
        with pytest.raises(ValueError, match=f"seed is {seed}"):
            synthetic.write_checkpoint(tmp_path, seed=seed)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "config.json").write_text("mine")
    with pytest.raises(FileExistsError, match=r"already holds a checkpoint: config\.json"):
        synthetic.write_checkpoint(tmp_path)
    assert (tmp_path / "config.json").read_text() == "mine"


@pytest.mark.slow
def test_full_size(tmp_path: Path) -> None:
    """The real dimensions: 475,292,928 parameters in 148 tensors, routed as published."""
    encoder = Encoder.from_pretrained(synthetic.write_checkpoint(tmp_path, "full"), device="cpu")
    config = NomicMoEConfig.from_dict(data.real_config())
    assert encoder.model.config == config
    state = encoder.model.state_dict()
    assert (len(state), sum(one.numel() for one in state.values())) == (148, 475_292_928)
    texts = [group[0] for group in data.sentences().values()]
    vectors = encoder.encode_document(texts)
    assert vectors.shape == (20, 768)
    assert torch.isfinite(torch.from_numpy(vectors)).all()
    published = data.published()["routing_on_real_text"]["mean_top2_weight_sum_by_layer"]
    sums = encoder.route(texts, "passage").weight_sums()
    assert np.abs(sums - list(published.values())).max() < 0.05
