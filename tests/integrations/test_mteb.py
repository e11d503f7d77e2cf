"""Real MTEB task objects on small local data, from `mteb.evaluate` to the score."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from mteb.abstasks.classification import AbsTaskClassification
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.sts import AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.cache import ResultCache
from mteb.types import PromptType
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression

import nomoe
from nomoe import Encoder, data
from nomoe import encoder as encoder_module
from nomoe.checkpoint import DEFAULT_REPO, DEFAULT_REVISION
from nomoe.integrations.mteb import NomicMoEForMTEB, describe
from nomoe.repository import TRAINED_PROMPTS

ROOT = Path(__file__).parent.parent.parent
SENTENCES = data.sentences()
LANGUAGES = list(SENTENCES)
# each text of the one is that of the other in another language
FIRST = [text for language in LANGUAGES[:10] for text in SENTENCES[language]]
SECOND = [text for language in LANGUAGES[10:] for text in SENTENCES[language]]
SCORES = [(7 * i) % 11 / 2 for i in range(50)]


def metadata(kind: str, main_score: str) -> TaskMetadata:
    return TaskMetadata(
        name=f"Local{kind}",
        description="Sentences that nomoe ships.",
        reference=None,
        type=kind,
        category="t2c" if kind == "Classification" else "t2t",
        modalities=["text"],
        dataset={"path": "local", "revision": "1"},
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score=main_score,
    )


class LocalRetrieval(AbsTaskRetrieval):
    """The same sentence in another language is the relevant one."""

    metadata = metadata("Retrieval", "ndcg_at_10")

    def load_data(self, num_proc: int | None = None, **options: Any) -> None:
        relevant = {
            f"q{i}": {f"d{j}": 1 for j in range(len(SECOND)) if j % 5 == i % 5}
            for i in range(len(FIRST))
        }
        split = {
            "corpus": Dataset.from_list(
                [{"id": f"d{i}", "text": one, "title": ""} for i, one in enumerate(SECOND)]
            ),
            "queries": Dataset.from_list(
                [{"id": f"q{i}", "text": one} for i, one in enumerate(FIRST)]
            ),
            "relevant_docs": relevant,
            "top_ranked": None,
        }
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


class LocalSTS(AbsTaskSTS):
    metadata = metadata("STS", "cosine_spearman")

    def load_data(self, num_proc: int | None = None, **options: Any) -> None:
        columns = {"sentence1": FIRST, "sentence2": SECOND, "score": SCORES}
        self.dataset = DatasetDict({"test": Dataset.from_dict(columns)})
        self.data_loaded = True

    @property
    def metadata_dict(self) -> dict[str, Any]:
        return {**super().metadata_dict, "min_score": 0, "max_score": 5}


class LocalClassification(AbsTaskClassification):
    """Which of the five sentences it is."""

    metadata = metadata("Classification", "accuracy")
    n_experiments = 2
    # all of the training split, so that no sampling decides the score
    samples_per_label = 12

    def load_data(self, num_proc: int | None = None, **options: Any) -> None:
        def split(languages: list[str]) -> Dataset:
            texts = [text for language in languages for text in SENTENCES[language]]
            return Dataset.from_dict({"text": texts, "label": [i % 5 for i in range(len(texts))]})

        self.dataset = DatasetDict({"train": split(LANGUAGES[:12]), "test": split(LANGUAGES[12:])})
        self.data_loaded = True


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = nomoe.synthetic.write_checkpoint(tmp_path_factory.mktemp("mteb") / "tiny")
    return nomoe.mteb_model(folder, device="cpu")


@pytest.fixture
def prefixes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts of all calls, in turn, as the encoder itself understands them."""
    seen: list[str] = []
    choose = encoder_module.choose_prompt

    def record(*arguments: Any) -> str:
        seen.append(choose(*arguments))
        return seen[-1]

    monkeypatch.setattr(encoder_module, "choose_prompt", record)
    return seen


def evaluate(model: Any, task: Any) -> float:
    result = mteb.evaluate(model, task, cache=None, show_progress_bar=False)
    assert (result.model_name, result.model_revision) == (
        model.mteb_model_meta.name,
        model.mteb_model_meta.revision,
    )
    (found,) = result.task_results
    return float(found.get_score())


def ndcg_at_10(queries: np.ndarray, documents: np.ndarray) -> float:
    scores = queries @ documents.T
    gains = 1 / np.log2(np.arange(10) + 2)
    values = []
    for i, row in enumerate(scores):
        best = np.argsort(-row, kind="stable")[:10]
        relevant = sum(j % 5 == i % 5 for j in range(len(documents)))
        values.append(((best % 5 == i % 5) * gains).sum() / gains[: min(10, relevant)].sum())
    return float(np.mean(values))


def test_retrieval(model: Any, prefixes: list[str]) -> None:
    score = evaluate(model, LocalRetrieval())
    assert set(prefixes) == {"search_query: ", "search_document: "}
    encoder = model.model
    queries = encoder.encode_query(FIRST)
    expected = ndcg_at_10(queries, encoder.encode_document(SECOND))
    assert score == pytest.approx(expected, abs=1e-4)
    # the score would show a wrong prefix
    wrong = ndcg_at_10(queries, encoder.encode_query(SECOND))
    assert abs(wrong - expected) > 1e-3


def test_sts(model: Any, prefixes: list[str]) -> None:
    score = evaluate(model, LocalSTS())
    assert set(prefixes) == {"classification: "}

    def spearman(name: str) -> float:
        first, second = (model.model.encode(texts, prompt_name=name) for texts in (FIRST, SECOND))
        return float(spearmanr((first * second).sum(axis=1), SCORES).statistic)

    assert score == pytest.approx(spearman("STS"), abs=1e-4)
    assert abs(spearman("query") - spearman("STS")) > 1e-3


def test_classification(model: Any, prefixes: list[str]) -> None:
    score = evaluate(model, LocalClassification())
    assert set(prefixes) == {"classification: "}

    def accuracy(name: str) -> float:
        train, test = (
            model.model.encode([one for group in groups for one in group], prompt_name=name)
            for groups in (list(SENTENCES.values())[:12], list(SENTENCES.values())[12:])
        )
        labels = [i % 5 for i in range(60)]
        fitted = LogisticRegression(max_iter=100).fit(train, labels)
        return float(fitted.score(test, labels[:40]))

    assert score == pytest.approx(accuracy("Classification"), abs=1e-6)
    # the score would show a wrong prefix
    assert accuracy("Clustering") != accuracy("Classification")


@pytest.mark.parametrize(
    ("kind", "role", "prompt"),
    [
        ("Retrieval", PromptType.query, "search_query: "),
        ("Retrieval", PromptType.document, "search_document: "),
        ("Reranking", PromptType.query, "search_query: "),
        ("Clustering", None, "clustering: "),
        ("PairClassification", None, "classification: "),
        ("MultilabelClassification", None, "classification: "),
        ("Summarization", None, "classification: "),
        ("BitextMining", None, "search_document: "),
    ],
)
def test_prompt_of_each_kind_of_task(
    kind: str, role: PromptType | None, prompt: str, model: Any
) -> None:
    text = "The tide turns."
    vectors = model.encode(
        [{"text": [text]}, {"text": [text]}],
        task_metadata=LocalSTS.metadata.model_copy(update={"type": kind, "name": f"Local{kind}"}),
        hf_split="test",
        hf_subset="default",
        prompt_type=role,
        batch_size=32,
    )
    assert vectors.shape == (2, 96)
    np.testing.assert_allclose(vectors[1], model.model.encode(text, prompt=prompt), atol=1e-6)


def test_images_are_refused(model: Any) -> None:
    with pytest.raises(ValueError, match=r"gives \['image'\]; this model embeds text only"):
        model.encode([{"image": [0]}], task_metadata=LocalSTS.metadata, hf_split="", hf_subset="")


def test_its_prompts_are_the_published_ones(model: Any) -> None:
    prompts = {name: one for name, one in TRAINED_PROMPTS.items() if name != "passage"}
    assert model.model_prompts.items() >= (prompts | {"document": "search_document: "}).items()


def test_metadata_is_true(model: Any, tmp_path: Path) -> None:
    meta = model.mteb_model_meta
    assert meta.name == "local/tiny"
    assert (meta.n_parameters, meta.n_embedding_parameters) == (2_646_048, 2048 * 96)
    # of eight experts a token reads two
    experts = 6 * 8 * 2 * 192 * 96
    assert meta.n_active_parameters == 2_646_048 - 2048 * 96 - experts * 6 // 8
    assert (meta.max_tokens, meta.embed_dim, meta.memory_usage_mb) == (512, 96, 10)
    ours = {"implementation": f"nomoe {nomoe.__version__}"}
    assert meta.experiment_kwargs == ours
    # other weights in a folder of the same name are another model to MTEB's cache
    other = nomoe.synthetic.write_checkpoint(tmp_path / "tiny", seed=1)
    changed = nomoe.mteb_model(other, device="cpu", dtype="bfloat16", truncate_dim=32)
    assert changed.mteb_model_meta.name == meta.name
    assert changed.mteb_model_meta.revision != meta.revision
    assert changed.mteb_model_meta.experiment_kwargs == ours | {
        "dtype": "bfloat16",
        "truncate_dim": 32,
    }
    assert changed.mteb_model_meta.embed_dim == 32


@pytest.mark.parametrize(
    "file", ["config.json", "config_sentence_transformers.json", "tokenizer.json"]
)
def test_other_settings_are_another_model(
    file: str, model: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "tiny"))
    path = folder / file
    same = nomoe.mteb_model(folder, device="cpu").mteb_model_meta.revision
    assert same == model.mteb_model_meta.revision
    path.write_text(path.read_text() + "\n")
    assert nomoe.mteb_model(folder, device="cpu").mteb_model_meta.revision != same


def test_scores_of_another_implementation_are_not_ours(encoder: Encoder, tmp_path: Path) -> None:
    """MTEB's own entry for the published model has the same name and revision."""
    ours = NomicMoEForMTEB(encoder, describe(encoder, DEFAULT_REPO, DEFAULT_REVISION))
    theirs = NomicMoEForMTEB(encoder, mteb.get_model_meta(DEFAULT_REPO))
    cache = ResultCache(tmp_path)

    class Half(LocalSTS):
        def load_data(self, num_proc: int | None = None, **options: Any) -> None:
            super().load_data()
            columns = {"sentence1": FIRST, "sentence2": FIRST[::-1], "score": SCORES}
            self.dataset = DatasetDict({"test": Dataset.from_dict(columns)})

    def score(model: Any, task: Any) -> float:
        result = mteb.evaluate(model, task, cache=cache, show_progress_bar=False)
        return float(result.task_results[0].get_score())

    # a score that only the cache could give
    cached = score(theirs, Half())
    found = score(ours, LocalSTS())
    assert found == pytest.approx(evaluate(ours, LocalSTS()), abs=1e-6)
    assert found != cached
    # and its own is taken from there
    assert score(ours, Half()) == pytest.approx(found, abs=1e-5)


def test_metadata_of_the_published_model(encoder: Encoder) -> None:
    meta = describe(encoder, DEFAULT_REPO, DEFAULT_REVISION)
    known = mteb.get_model_meta(DEFAULT_REPO)
    assert (meta.name, meta.revision) == (known.name, known.revision)
    for field in ("languages", "license", "release_date", "reference", "training_datasets"):
        assert getattr(meta, field) == getattr(known, field)
    # no code from the Hub, whoever runs it
    assert "trust_remote_code" not in meta.loader_kwargs


def test_the_benchmark_runs_offline() -> None:
    command = [sys.executable, ROOT / "benchmarks" / "mteb.py", "smoke"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[-3:-1]] == ["ToyRetrieval", "mean"]
    assert 0 < float(lines[-2].split()[1]) < 100
    assert lines[-1].startswith("local/tiny at ")


@pytest.mark.parametrize("benchmark", ["BEIR", "MIRACLRetrieval"])
def test_the_benchmarks_are_there(benchmark: str) -> None:
    tasks = (
        list(mteb.get_benchmark(benchmark).tasks)
        if benchmark == "BEIR"
        else list(mteb.get_tasks(tasks=[benchmark]))
    )
    assert len(tasks) == (15 if benchmark == "BEIR" else 1)
    assert all(task.metadata.main_score == "ndcg_at_10" for task in tasks)
    if benchmark != "BEIR":
        assert len(tasks[0].hf_subsets) == 18
