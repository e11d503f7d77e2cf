"""The README is run: its snippets on a synthetic checkpoint, its commands by CI."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nomoe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
REPO = "nomic-ai/nomic-embed-text-v2-moe"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def after(diff: str) -> str:
    """A diff block as the code it results in."""
    return "".join(line[1:] + "\n" for line in diff.splitlines() if not line.startswith("-"))


def before(diff: str) -> str:
    return "".join(line[1:] + "\n" for line in diff.splitlines() if not line.startswith("+"))


def execute(code: str, folder: Path) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(code.replace(REPO, str(folder)), "README.md", "exec"), names)
    return names


def test_first_screen(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load = nomoe.Encoder.from_pretrained
    monkeypatch.setattr(nomoe.Encoder, "from_pretrained", lambda: load(tiny_folder))
    names = execute(blocks("python")[0], tiny_folder)
    assert names["documents"].shape == (2, 96)
    assert capsys.readouterr().out.startswith("tensor([[")


def test_the_cards_snippets(tiny_folder: Path, encoder: nomoe.Encoder) -> None:
    with_model, with_sentences = blocks("diff")
    for diff in (with_model, with_sentences):
        # as the card has it, and one line before
        assert diff.splitlines()[0] == "+import nomoe; nomoe.register()"
        assert after(diff) == "import nomoe; nomoe.register()\n" + before(diff)
        assert before(diff).count("trust_remote_code=True") == 1
    try:
        first = execute(after(with_model), tiny_folder)
        second = execute(after(with_sentences), tiny_folder)
    finally:
        nomoe.unregister()
    nomoe.check(first["model"])
    nomoe.check(second["model"])
    expected = encoder.encode_document(["Hello!", "¡Hola!"])
    np.testing.assert_allclose(first["embeddings"].numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(second["embeddings"], expected, atol=1e-5)
    assert isinstance(second["similarity"], torch.Tensor)
    torch.testing.assert_close(
        second["similarity"].squeeze(), first["similarity"], atol=1e-5, rtol=0
    )


def test_every_name_of_the_table_exists() -> None:
    table = README[README.index("| You use | Write |") :].partition("\n\n")[0]
    names = set(re.findall(r"nomoe\.(\w+)", table)) - {"integrations"}
    assert len(names) == 5
    assert names <= set(nomoe.__all__)
    members = re.findall(r"`(\w+)\([^`]*\)` of `nomoe\.integrations\.(\w+)`", table)
    assert len(members) == 3
    for member, module in members:
        source = (ROOT / "nomoe" / "integrations" / f"{module}.py").read_text(encoding="utf-8")
        assert f"class {member}(" in source
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = {row.split("|")[3].strip(" `") for row in table.splitlines()[2:]} - {""}
    for extra in extras:
        assert f"\n{extra} = [" in pyproject


def test_two_set_up_commands_of_which_ci_runs_the_second() -> None:
    commands = [line for block in blocks("sh") for line in block.splitlines() if "-m venv" in line]
    assert len(commands) == 2
    assert commands[0].endswith("nomoe demo")
    assert commands[1].endswith("python -m pytest -n 2")
    assert commands[1] in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def test_every_command_shown_parses(capsys: pytest.CaptureFixture[str]) -> None:
    from nomoe.cli import _parser

    shown = [
        line.split("#")[0].split()
        for block in blocks("sh")
        for line in block.splitlines()
        if line.startswith("nomoe ")
    ]
    assert len(shown) >= 6
    for _, *arguments in shown:
        _parser().parse_args(arguments)


def test_the_corpus_page_runs(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nomoe.cli import _parser, main

    pa, pq = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    page = (ROOT / "docs" / "corpus.md").read_text(encoding="utf-8")
    shown = re.findall(r"^nomoe (.*?)(?:#.*)?$", page, flags=re.MULTILINE)
    assert len(shown) == 3
    monkeypatch.chdir(tmp_path)
    table = pa.table({"text": ["one", "two"], "body": ["a", "b"], "id": [1, 2], "url": ["x", "y"]})
    pq.write_table(table, "articles.parquet")
    for command in shown:
        _parser().parse_args(command.split())
        assert main([*command.split(), "--model", str(tiny_folder)]) == 0
    assert pq.read_table("vectors").num_rows == 2
    (tmp_path / "articles").mkdir()
    (tmp_path / "articles.parquet").rename("articles/1.parquet")
    first, *others = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    code = first.replace('"vectors"', f'"again", model={str(tiny_folder)!r}')
    exec(compile(code, "corpus.md", "exec"), {"__name__": "__main__"})
    assert pq.read_table("again").column_names == ["source_row", "id", "url", "embedding"]
    # those need a cluster
    for code in others:
        compile(code, "corpus.md", "exec")


def test_version_is_one() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{nomoe.__version__}"' in pyproject
    assert f"## {nomoe.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_constraints_pin_exactly() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert "torch==2.13.0" in pins
    for pin in pins:
        assert re.fullmatch(r"[a-z-]+==[\d.]+", pin), pin
