"""docs/integrations.md is run, block by block, on a synthetic checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nomoe
from nomoe import Encoder, data

ROOT = Path(__file__).parent.parent.parent
DOCS = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
REPO = "nomic-ai/nomic-embed-text-v2-moe"


def blocks() -> list[tuple[str, str]]:
    """Each block with the heading it stands under, less the extra named in it."""
    return [
        (section.splitlines()[0].partition(" (")[0], code)
        for section in DOCS.split("\n## ")[1:]
        for code in re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    ]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    nomoe.unregister()


def execute(code: str, folder: Path) -> dict[str, Any]:
    for call in ("Encoder.from_pretrained(", "sentence_transformer("):
        code = code.replace(f"nomoe.{call})", f'nomoe.{call}"{folder}", device="cpu")')
        code = code.replace(f"nomoe.{call}dtype", f'nomoe.{call}"{folder}", device="cpu", dtype')
    code = code.replace(REPO, str(folder)).replace("[768, 256]", "[96, 48]")
    code = code.replace('report_to="none",', 'report_to="none", use_cpu=True,')
    names: dict[str, Any] = {"__name__": "docs"}
    exec(compile(code, "integrations.md", "exec", dont_inherit=True), names)
    return names


def run(heading: str, folder: Path, position: int = 0) -> dict[str, Any]:
    mine = [code for title, code in blocks() if title == heading]
    return execute(mine[position], folder)


def test_every_block_is_run_below() -> None:
    assert [heading for heading, _ in blocks()] == [
        "transformers",
        "sentence-transformers",
        "Fine-tuning",
        "LangChain",
        "LlamaIndex",
        "LanceDB",
        "LanceDB",
    ]


def test_transformers(tiny_folder: Path) -> None:
    assert type(run("transformers", tiny_folder)["model"]).__module__.startswith("nomoe.")


def test_sentence_transformers(tiny_folder: Path, encoder: Encoder) -> None:
    names = run("sentence-transformers", tiny_folder)
    expected = encoder.encode_document(["The tide turns twice a day.", "Bread needs flour."])
    np.testing.assert_allclose(names["documents"], expected, atol=1e-5)


def test_fine_tuning(tiny_folder: Path, encoder: Encoder) -> None:
    names = run("Fine-tuning", tiny_folder)
    trained = names["encoder"].encode_query("tide")
    np.testing.assert_allclose(trained, names["model"].encode_query("tide"), atol=1e-5)
    assert np.abs(trained - encoder.encode_query("tide")).max() > 1e-6


@pytest.mark.parametrize("heading", ["LangChain", "LlamaIndex"])
def test_adapters(
    heading: str, tiny_folder: Path, encoder: Encoder, capsys: pytest.CaptureFixture[str]
) -> None:
    run(heading, tiny_folder)
    texts = ["The tide turns twice a day.", "Bread needs flour, water, salt and time."]
    if heading == "LlamaIndex":
        texts[1] = "Bread needs flour."
    scores = encoder.encode_document(texts) @ encoder.encode_query("¿Cuándo cambia la marea?")
    found, other = texts[scores.argmax()], texts[scores.argmin()]
    printed = capsys.readouterr().out
    assert found in printed
    assert other not in printed


def test_lancedb_finds_planted_duplicates(tiny_folder: Path, encoder: Encoder) -> None:
    names = run("LanceDB", tiny_folder)
    texts, vectors, table = names["texts"], names["vectors"], names["table"]
    # the query's neighbours are those of a search by hand
    best = np.argsort(-(vectors @ names["query"]), kind="stable")[:5]
    assert [row["text"] for row in names["found"]] == [texts[i] for i in best]
    np.testing.assert_allclose(
        [1 - row["_distance"] for row in names["found"]],
        (vectors @ names["query"])[best],
        atol=1e-5,
    )
    # a sentence of each language once more, among a hundred in twenty
    planted = [group[2] for group in data.sentences().values()]
    rows = zip(planted, encoder.encode_document(planted), strict=True)
    table.add([{"text": text, "vector": vector} for text, vector in rows])
    for text in planted:
        vector = encoder.encode_document(text)
        found = table.search(vector).distance_type("cosine").limit(3).to_list()
        assert [row["text"] == text for row in found] == [True, True, False]
        assert found[1]["_distance"] < 1e-5 < found[2]["_distance"]


def test_lancedbs_registry(tiny_folder: Path, encoder: Encoder) -> None:
    names = run("LanceDB", tiny_folder, 1)
    (match,) = names["match"]
    expected = encoder.encode_document("The tide turns twice a day.")
    np.testing.assert_allclose(match["vector"], expected, atol=1e-5)
    distance = np.square(expected - encoder.encode_query("¿Cuándo cambia la marea?")).sum()
    assert match["_distance"] == pytest.approx(distance, abs=1e-4)
