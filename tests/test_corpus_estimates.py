"""Estimates of a corpus's run, and what a run says and refuses before it begins."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from nomoe import Encoder, embed_corpus
from nomoe.corpus import estimate, estimate_corpus
from tests.corpora import make_rows, write


def test_estimates_say_what_they_rest_on(
    tmp_path: Path, shallow_model: dict[str, Any], shallow: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_rows(400)
    rows[7]["text"] = None
    source, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out"
    options = {"shard_rows": 200, "on_bad": "skip", **shallow_model}
    whole = estimate_corpus(source, out, **options)
    assert not out.exists()
    report = embed_corpus(source, out, **options)
    assert (whole.rows, whole.shards, whole.bad) == (399, 2, {"no text in column 'text'": 1})
    assert whole.tokens == report.tokens
    assert whole.sampled == 399
    size = sum(path.stat().st_size for path in out.glob("part-*"))
    assert whole.output_bytes == pytest.approx(size, rel=0.15)
    said = "\n".join(whole.lines())
    assert f"{report.tokens:,} (counted)" in said
    assert "tokens/s measured here" in said

    monkeypatch.setattr("nomoe.corpus.estimate._SAMPLE_TEXTS", 80)
    part = estimate_corpus(source, out, **options)
    assert 80 <= part.sampled < 399
    assert part.tokens == pytest.approx(report.tokens, rel=0.2)
    assert f"estimated from {part.sampled:,} texts" in "\n".join(part.lines())


def test_an_estimate_times_whole_batches(
    tmp_path: Path, shallow_model: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few texts were drawn: parts of one would say that the device is slow."""
    windows: list[int] = []

    class Watched(estimate.Embedder):
        def embed_texts(self, texts: Any, *rest: Any) -> Any:
            def watch() -> Any:
                for window in texts:
                    windows.append(len(window))
                    yield window

            return super().embed_texts(watch(), *rest)

    monkeypatch.setattr(estimate, "Embedder", Watched)
    source = write(tmp_path / "in.jsonl", make_rows(40))
    estimate_corpus(source, tmp_path / "out", batch_tokens=65_536, **shallow_model)
    # all fit into one batch: half of them warm up
    assert windows == [20, 20]


def test_an_estimate_reads_few_long_texts_and_leaves_out_what_is_done(
    tmp_path: Path, shallow_model: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_rows(400)
    source, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out"
    options = {"shard_rows": 100, **shallow_model}
    monkeypatch.setattr("nomoe.corpus.estimate._SAMPLE_BYTES", 100)
    part = estimate_corpus(source, out, **options)
    size = sum(len(row["text"].encode()) for row in rows)
    assert 0 < part.sampled * size / 400 < size / 2
    assert part.left == 400

    embed_corpus(source, out, **options)
    for index in (0, 2):
        (out / f"part-{index:06d}.parquet").unlink()
    again = estimate_corpus(source, out, **shallow_model)
    assert (again.rows, again.left, again.shards) == (400, 200, 4)
    expected = again.tokens / 2 / again.tokens_per_s
    assert again.seconds == pytest.approx(expected)
    assert "for 200 rows that are left" in "\n".join(again.lines())
    embed_corpus(source, out, **shallow_model)
    done = estimate_corpus(source, out, **shallow_model)
    assert (done.left, done.seconds) == (0, 0)
    assert "an earlier run has embedded every row" in "\n".join(done.lines())
    with pytest.raises(ValueError, match="dim was 96 and is now 64"):
        estimate_corpus(source, out, dim=64, **shallow_model)


def test_an_estimate_counts_the_processes_that_would_run(
    tmp_path: Path, shallow_model: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = write(tmp_path / "in.jsonl", make_rows(100)), tmp_path / "out"
    options = {"shard_rows": 25, **shallow_model}
    assert estimate_corpus(source, out, workers=3, **options).workers == 3
    assert estimate_corpus(source, out, workers=9, **options).workers == 4
    embed_corpus(source, out, **options)
    (out / "part-000002.parquet").unlink()
    assert estimate_corpus(source, out, workers=3, **options).workers == 1
    # as three GPUs: one file is written by one
    monkeypatch.setattr("nomoe.corpus.request.choose_devices", lambda *_: ["cpu"] * 3)
    assert estimate_corpus(source, tmp_path / "out.npy", **options).workers == 1


def test_progress_is_logged_nowhere_and_cuts_once(
    tmp_path: Path, shallow_model: dict[str, Any], warnings_of_nomoe: pytest.LogCaptureFixture
) -> None:
    source = write(tmp_path / "in.jsonl", make_rows(50))
    embed_corpus(source, tmp_path / "out", shard_rows=10, max_seq_length=10, **shallow_model)
    assert [record.levelno for record in warnings_of_nomoe.records] == [logging.WARNING]
    assert "of 50 texts were longer than max_seq_length=10 tokens and were cut" in (
        warnings_of_nomoe.text
    )


@pytest.mark.parametrize("form", ["file", "folder"])
def test_a_dry_run_refuses_an_output_that_the_run_would(
    tmp_path: Path, shallow_folder: Path, form: str
) -> None:
    source = write(tmp_path / "in.parquet", make_rows(5))
    options: Any = {"model": shallow_folder, "device": "cpu"}
    if form == "file":
        out = tmp_path / "out.npy"
        out.write_bytes(b"mine")
        refused: Any = (FileExistsError, "exists; --overwrite replaces it")
    else:
        out = tmp_path / "out"
        out.mkdir()
        (out / "mine").write_bytes(b"mine")
        refused = (ValueError, r"holds mine but no _manifest\.json")
    before = sorted(tmp_path.rglob("*"))
    for run in (embed_corpus, estimate_corpus):
        with pytest.raises(refused[0], match=refused[1]):
            run(source, out, **options)
    if form == "file":
        assert estimate_corpus(source, out, overwrite=True, **options).rows == 5
    else:
        with pytest.raises(ValueError, match="overwrite is for one file"):
            estimate_corpus(source, tmp_path / "new", overwrite=True, **options)
        assert estimate_corpus(source, tmp_path / "new", **options).rows == 5
    assert sorted(tmp_path.rglob("*")) == before
