"""Fine-tuning through SentenceTransformerTrainer on shipped text, and every road back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.losses import (
    CachedMultipleNegativesRankingLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from transformers import AutoModel, AutoTokenizer

import nomoe
from nomoe import Encoder, NomicMoEModel, data
from nomoe.integrations.training import LoadBalancingLoss

SENTENCES = data.sentences()
LANGUAGES = list(SENTENCES)
PROMPTS = {"anchor": "search_query: ", "positive": "search_document: "}
HELD_OUT = [text for language in LANGUAGES[15:] for text in SENTENCES[language]]


@pytest.fixture(autouse=True)
def unregistered_afterwards() -> Iterator[None]:
    yield
    nomoe.unregister()


def pairs(languages: list[str]) -> Dataset:
    """English sentences and their translations."""
    rows = [
        (english, other)
        for language in languages
        for english, other in zip(SENTENCES["English"], SENTENCES[language], strict=True)
    ]
    return Dataset.from_dict(
        {"anchor": [one for one, _ in rows], "positive": [other for _, other in rows]}
    )


def matryoshka(model: SentenceTransformer) -> MatryoshkaLoss:
    return MatryoshkaLoss(model, MultipleNegativesRankingLoss(model), [96, 48, 24])


def arguments(folder: Path, **options: Any) -> SentenceTransformerTrainingArguments:
    return SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=10,
        learning_rate=2e-3,
        prompts=PROMPTS,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
        **options,
    )


def features(model: SentenceTransformer, texts: dict[str, list[str]]) -> list[dict[str, Any]]:
    def tokenize(prompt: str, column: list[str]) -> dict[str, Any]:
        prompted = [prompt + text for text in column]
        return dict(model.tokenizer(prompted, padding=True, return_tensors="pt"))

    return [tokenize(PROMPTS[name], column) for name, column in texts.items()]


def batch(model: SentenceTransformer) -> list[dict[str, Any]]:
    return features(model, {"anchor": SENTENCES["English"], "positive": SENTENCES["Spanish"]})


def test_trains_and_every_road_leads_back(
    tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = nomoe.sentence_transformer(tiny_folder, device="cpu")
    before = model.encode_document(HELD_OUT)
    loss = LoadBalancingLoss(model, matryoshka(model))
    assert loss.coefficient == data.real_config()["router_aux_loss_coef"] == 0.1
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments(
            tmp_path / "run",
            eval_strategy="steps",
            eval_steps=3,
            save_strategy="steps",
            save_steps=3,
            load_best_model_at_end=True,
        ),
        train_dataset=pairs(LANGUAGES[1:6]),
        eval_dataset=pairs(LANGUAGES[1:3]),
        loss=loss,
    )
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    last = trainer.evaluate()["eval_loss"]
    assert last < 0.9 * first
    # the trainer's own checkpoint was read back, in nomoe's class; where that fails it only logs
    assert trainer.state.best_model_checkpoint is not None
    assert "Could not load the best model" not in caplog.text
    nomoe.check(SentenceTransformer(trainer.state.best_model_checkpoint, device="cpu"))

    trained = model.encode_document(HELD_OUT)
    assert np.abs(trained - before).max() > 1e-3
    folder = tmp_path / "trained"
    model.save_pretrained(str(folder))
    original, saved = (load_file(one / "model.safetensors") for one in (tiny_folder, folder))
    assert original.keys() == saved.keys()
    for name in original:
        assert not torch.equal(original[name], saved[name]), f"{name} has not been trained"

    reloaded = {
        "Encoder": Encoder.from_pretrained(folder, device="cpu"),
        "nomoe.sentence_transformer": nomoe.sentence_transformer(folder, device="cpu"),
        "SentenceTransformer": SentenceTransformer(str(folder), device="cpu"),
    }
    for road, one in reloaded.items():
        vectors = one.encode_document(HELD_OUT)
        np.testing.assert_allclose(vectors, trained, atol=1e-5, err_msg=road)
    inputs = AutoTokenizer.from_pretrained(folder)(
        ["search_document: " + text for text in HELD_OUT], padding=True, return_tensors="pt"
    )
    weights = inputs["attention_mask"][..., None]
    for load in (AutoModel.from_pretrained, NomicMoEModel.from_pretrained):
        with torch.no_grad():
            hidden = load(folder)(**inputs)[0]
        vectors = torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1))
        np.testing.assert_allclose(vectors.numpy(), trained, atol=1e-5)


def test_router_and_experts_receive_gradients(tiny_folder: Path) -> None:
    model = nomoe.sentence_transformer(tiny_folder, device="cpu").train()
    matryoshka(model)(batch(model), None).backward()
    parts = dict(model[0].auto_model.named_parameters())
    for kind in ("router.layer.weight", "mlp.w1", "mlp.w2", "experts.bias", "Wqkv.weight"):
        found = [one.grad for name, one in parts.items() if name.endswith(kind)]
        assert len(found) == (12 if kind == "Wqkv.weight" else 6)
        assert all(grad.isfinite().all() and grad.abs().max() > 0 for grad in found), kind


def test_the_balance_is_added(tiny_folder: Path) -> None:
    model = nomoe.sentence_transformer(tiny_folder, device="cpu").train()
    inputs = batch(model)
    alone = matryoshka(model)(inputs, None)
    none, tenth, whole = (
        LoadBalancingLoss(model, matryoshka(model), coefficient)(inputs, None)
        for coefficient in (0.0, 0.1, 1.0)
    )
    torch.testing.assert_close(none, alone)
    # uneven, so above 1; and no more than E / K
    assert 1.01 < float((whole - none).detach()) < 4
    torch.testing.assert_close(tenth - none, 0.1 * (whole - none), atol=1e-5, rtol=0)


def test_losses_that_give_the_router_nothing_are_refused(tiny_folder: Path) -> None:
    model = nomoe.sentence_transformer(tiny_folder, device="cpu").train()
    loss = LoadBalancingLoss(model, CachedMultipleNegativesRankingLoss(model, mini_batch_size=4))
    with pytest.raises(RuntimeError, match=r"CachedMultipleNegatives.*without gradients"):
        loss(batch(model), None)
    with pytest.raises(ValueError, match=r"Linear holds no model of nomoe's"):
        LoadBalancingLoss(torch.nn.Linear(2, 2), loss)


def test_triton_refuses_to_train(tiny_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    model = nomoe.sentence_transformer(tiny_folder, device="cpu", backend="triton")
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments(tmp_path / "run"),
        train_dataset=pairs(LANGUAGES[1:3]),
        loss=matryoshka(model),
    )
    with pytest.raises(RuntimeError, match=r"no backward pass.*backend='torch'"):
        trainer.train()
