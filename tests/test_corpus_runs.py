"""What decides a corpus's run: settings, weights, input and output, and which are refused."""

from __future__ import annotations

import inspect
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from nomoe import embed_corpus
from nomoe.corpus import workers
from nomoe.corpus.manifest import read_manifest, shard_metadata
from nomoe.corpus.plan import make_plan
from nomoe.corpus.request import make_request
from nomoe.corpus.shards import ShardReader
from nomoe.corpus.sources import find_sources
from nomoe.corpus.workers import cores as count_cores
from tests.corpora import make_rows, write


def test_a_rerun_finishes_what_is_missing_and_nothing_else(
    tmp_path: Path, shallow_model: dict[str, Any]
) -> None:
    source, out = write(tmp_path / "in.jsonl", make_rows(100)), tmp_path / "out"
    options = {"shard_rows": 30, **shallow_model}
    embed_corpus(source, out, **options)
    before = {path.name: path.read_bytes() for path in out.glob("part-*")}
    assert len(before) == 4
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*")}
    (out / "part-000001.parquet").unlink()
    (out / "part-000003.parquet").write_bytes(before["part-000003.parquet"][:-100])
    (out / ".part-000001.parquet.0123abcd").write_bytes(b"left by a killed run")
    # the settings that the first run chose are found in the manifest
    report = embed_corpus(source, out, **shallow_model)
    assert (report.found, report.embedded, report.rows) == (2, 40, 100)
    assert {path.name: path.read_bytes() for path in out.glob("part-*")} == before
    assert not list(out.glob(".part*"))
    for name in ("part-000000.parquet", "part-000002.parquet"):
        assert (out / name).stat().st_mtime_ns == times[name]
    report = embed_corpus(source, out, **shallow_model)
    assert (report.found, report.embedded) == (4, 0)


CHANGED = {
    "dim": ({"dim": 64}, "dim was 96 and is now 64"),
    "precision": ({"precision": "int8"}, "precision was 'float32' and is now 'int8'"),
    "prompt": ({"prompt_name": "query"}, "prompt was 'search_document: ' and is now 'search_query"),
    "dtype": ({"dtype": "bfloat16"}, "dtype was 'float32' and is now 'bfloat16'"),
    "length": ({"max_seq_length": 100}, "max_seq_length was 512 and is now 100"),
    "batches": ({"batch_tokens": 100}, "batch_tokens was 4096 and is now 100"),
    "columns": ({"columns": ["id"]}, r"columns was None and is now \['id'\]"),
    "text column": ({"column": "id"}, "column was 'text' and is now 'id'"),
    "policy": ({"on_bad": "skip"}, "on_bad was 'fail' and is now 'skip'"),
    "limit": ({"limit": 10}, "limit was None and is now 10"),
    "shards": ({"shard_rows": 31}, "shard_rows was 30 and is now 31"),
}


@pytest.fixture
def begun(tmp_path: Path, shallow_model: dict[str, Any]) -> tuple[Path, Path]:
    source, out = write(tmp_path / "in.jsonl", make_rows(60)), tmp_path / "out"
    embed_corpus(source, out, shard_rows=30, **shallow_model)
    (out / "part-000001.parquet").unlink()
    return source, out


@pytest.mark.parametrize("case", list(CHANGED))
def test_a_changed_setting_is_refused_by_name(
    begun: tuple[Path, Path], case: str, shallow_model: dict[str, Any]
) -> None:
    change, message = CHANGED[case]
    with pytest.raises(ValueError, match=f"begun with other settings.*{message}"):
        embed_corpus(*begun, **(shallow_model | change))
    assert not (begun[1] / "part-000001.parquet").exists()


def test_changed_weights_and_versions_are_refused(
    tmp_path: Path,
    begun: tuple[Path, Path],
    shallow_model: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import shutil

    copy = shutil.copytree(shallow_model["model"], tmp_path / "copy")
    # the same weights elsewhere are the same model
    embed_corpus(*begun, **(shallow_model | {"model": copy}))
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-4:] = b"\0\0\0\0"
    weights.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"sha256 of model\.safetensors was '\w+' and is now '\w+'"
    ):
        embed_corpus(*begun, **(shallow_model | {"model": copy}))
    monkeypatch.setattr("nomoe.corpus.request.__version__", "9.9")
    with pytest.raises(ValueError, match=r"version was '0\.1\.0' and is now '9\.9'"):
        embed_corpus(*begun, **shallow_model)


def test_a_changed_input_is_refused_and_a_moved_one_is_not(
    begun: tuple[Path, Path], shallow_model: dict[str, Any]
) -> None:
    source, out = begun
    content = source.read_text()
    changed = content.replace('"00007"', '"00070"')
    assert len(changed) == len(content)
    source.write_text(changed)
    with pytest.raises(ValueError, match=r"begun with another input: .*in\.jsonl has changed"):
        embed_corpus(source, out, **shallow_model)
    source.write_text(content)
    extra = write(source.with_name("more.jsonl"), make_rows(1))
    with pytest.raises(ValueError, match="it was 1 files and is now 2"):
        embed_corpus([source, extra], out, **shallow_model)
    moved = source.rename(source.with_name("moved.jsonl"))
    assert embed_corpus(moved, out, **shallow_model).embedded == 30


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_changed_value_of_a_typed_file_is_seen(
    tmp_path: Path, suffix: str, shallow_model: dict[str, Any]
) -> None:
    rows = make_rows(40)
    source, out = write(tmp_path / f"in{suffix}", rows), tmp_path / "out"
    embed_corpus(source, out, **shallow_model)
    for column in ("text", "id"):
        changed = [dict(row) for row in rows]
        changed[20][column] = changed[20][column][:-1] + "Z"
        write(source, changed)
        with pytest.raises(ValueError, match="has changed"):
            embed_corpus(source, out, **shallow_model)


def test_an_input_that_changes_during_a_run_ends_it(
    begun: tuple[Path, Path], shallow_model: dict[str, Any]
) -> None:
    source, _ = begun
    plan = make_plan(find_sources(source), shard_rows=30, form="parquet")
    content, modified = source.read_text(), source.stat().st_mtime_ns
    # as many rows, and as many bytes
    source.write_text(content.replace('"00040"', '"00041"'))
    with pytest.raises(RuntimeError, match=r"in\.jsonl changed after it was read first"):
        list(ShardReader(plan).windows(1, 4096))
    # fewer rows, as they may be found behind the file system's back
    padding = " " * (len(content) - len(content[: content.index('{"id": "00040"')]))
    source.write_text(content[: content.index('{"id": "00040"')] + padding)
    os.utime(source, ns=(modified, modified))
    with pytest.raises(RuntimeError, match=r"in\.jsonl changed after it was read first"):
        list(ShardReader(plan).windows(1, 4096))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_an_input_that_changes_while_a_shard_is_read_ends_it(tmp_path: Path, suffix: str) -> None:
    rows = make_rows(90)
    source = write(tmp_path / f"in{suffix}", rows)
    plan = make_plan(find_sources(source), shard_rows=45, form="parquet")
    windows = ShardReader(plan).windows(0, 40)
    next(windows)
    # in place, so that the open file has the new bytes
    content = source.read_bytes()
    with source.open("r+b") as file:
        file.write(content)
    os.utime(source, (time.time() + 1,) * 2)
    with pytest.raises(RuntimeError, match="changed after it was read first"):
        list(windows)


def test_the_identity_of_a_run_is_hashed_once(
    begun: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read_manifest(begun[1])
    assert manifest is not None
    expected = shard_metadata(manifest, 1)
    monkeypatch.setattr("nomoe.corpus.manifest.hashlib", None)
    assert shard_metadata(manifest, 1) == expected


def test_folders_that_are_not_ours(
    tmp_path: Path, begun: tuple[Path, Path], shallow_model: dict[str, Any]
) -> None:
    source, out = begun
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds precious\.txt but no _manifest\.json"):
        embed_corpus(source, other, **shallow_model)
    assert os.listdir(other) == ["precious.txt"]
    # a shard of another run under a name of this one
    embed_corpus(source, tmp_path / "more", shard_rows=30, dim=32, **shallow_model)
    foreign = (tmp_path / "more" / "part-000001.parquet").read_bytes()
    (out / "part-000001.parquet").write_bytes(foreign)
    with pytest.raises(ValueError, match=r"part-000001\.parquet was made by another run"):
        embed_corpus(source, out, **shallow_model)
    own = (out / "part-000000.parquet").read_bytes()
    (out / "part-000001.parquet").write_bytes(own)
    with pytest.raises(ValueError, match=r"part-000001\.parquet was made by another run"):
        embed_corpus(source, out, **shallow_model)
    (out / "part-000001.parquet").unlink()
    (out / "part-000002.parquet").write_bytes(own)
    with pytest.raises(ValueError, match=r"part-000002\.parquet is no shard of this run"):
        embed_corpus(source, out, **shallow_model)
    manifest = out / "_manifest.json"
    manifest.write_text(manifest.read_text().replace('"dim": 96', '"dim": 64'))
    with pytest.raises(ValueError, match="changed by hand"):
        embed_corpus(source, out, **shallow_model)
    manifest.write_text("{}")
    with pytest.raises(ValueError, match="not a manifest of nomoe"):
        embed_corpus(source, out, **shallow_model)


def test_bad_calls_are_refused_before_the_input_is_read(
    tmp_path: Path, shallow_model: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "in.jsonl", make_rows(3))
    monkeypatch.setattr("nomoe.corpus.request.make_plan", None)
    out = tmp_path / "out"
    for options, error, message in (
        ({"dim": 97}, ValueError, "dim is 97, expected 1 to 96"),
        ({"precision": "int4"}, ValueError, "precision is 'int4'"),
        ({"precision": "binary", "dim": 65}, ValueError, "no multiple of 8"),
        ({"prompt_name": "nope"}, ValueError, "no prompt is named 'nope'; known: "),
        ({"max_seq_length": 2}, ValueError, "max_seq_length is 2"),
        ({"on_bad": "ignore"}, ValueError, "on_bad is 'ignore'"),
        ({"limit": 0}, ValueError, "limit is 0"),
        ({"workers": 0}, ValueError, "workers is 0"),
        ({"batch_tokens": 0}, ValueError, "batch_tokens is 0"),
        # one that is not whole would end the run late
        ({"limit": 1e6}, ValueError, r"limit is 1000000\.0, expected a whole number"),
        ({"dim": 64.0}, ValueError, r"dim is 64\.0"),
        ({"shard_rows": 2.5}, ValueError, r"shard_rows is 2\.5"),
        ({"batch_tokens": "8"}, ValueError, "batch_tokens is '8'"),
        ({"max_seq_length": 16.5}, ValueError, r"max_seq_length is 16\.5"),
        ({"workers": 1.5}, ValueError, r"workers is 1\.5"),
        ({"prompt": 3}, TypeError, "prompt is int, expected str"),
        ({"columns": "id"}, TypeError, "columns is a str"),
        ({"overwrite": True}, ValueError, "overwrite is for one file"),
        ({"model": tmp_path}, FileNotFoundError, "config.json"),
    ):
        with pytest.raises(error, match=message):
            embed_corpus(source, out, **(shallow_model | options))
    for target, options, message in (
        (tmp_path / "o.csv", {}, "suffix '.csv'"),
        (tmp_path / "o.npy", {"on_bad": "skip"}, "no room for row numbers"),
        (tmp_path / "o.jsonl", {"workers": 2}, "one process writes"),
    ):
        with pytest.raises(ValueError, match=message):
            embed_corpus(source, target, **shallow_model, **options)
    with pytest.raises(FileNotFoundError, match="no folder"):
        embed_corpus(source, tmp_path / "a" / "b", **shallow_model)
    with pytest.raises(ValueError, match="would be input of the next run"):
        embed_corpus(tmp_path, tmp_path / "inside", **shallow_model)
    for given, message in (
        (tmp_path / "none.jsonl", "there is no file or folder"),
        (tmp_path / "*.parquet", "no file matches"),
        ((tmp_path / "absent").as_uri(), "there is no file or folder"),
        (tmp_path.as_uri() + "/*.parquet", "no file matches"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            embed_corpus(str(given), out, **shallow_model)
    (tmp_path / "x.doc").write_text("")
    (tmp_path / "x.txt").write_text("")
    for inputs, message in (
        (tmp_path / "x.doc", "suffix '.doc'"),
        (tmp_path, "several formats"),
        ([source, source], "named twice"),
        ([], "no input"),
        ("what://is/this", "no URI that pyarrow opens"),
    ):
        with pytest.raises(ValueError, match=message):
            embed_corpus(inputs, tmp_path.parent / "elsewhere", **shallow_model)
    assert not out.exists()


def test_a_checkpoint_without_its_tokenizer_is_refused_before_the_input_is_read(
    tmp_path: Path, shallow_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = write(tmp_path / "in.jsonl", make_rows(3)), tmp_path / "out"
    model = shutil.copytree(shallow_folder, tmp_path / "model")
    (model / "tokenizer.json").unlink()
    monkeypatch.setattr("nomoe.corpus.request.make_plan", None)
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        embed_corpus(source, out, model=model, device="cpu")
    # the same command goes on once it is there
    assert not out.exists()


def test_a_cpu_by_number_is_one_that_processes_share() -> None:
    assert workers.choose_devices("cpu:0", 2) == ["cpu", "cpu"]


def test_the_last_shard_has_the_threads_of_those_before(
    tmp_path: Path, shallow_model: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = write(tmp_path / "in.jsonl", make_rows(30)), tmp_path / "out"
    monkeypatch.setattr(workers, "cores", lambda: 6)
    seen: list[int] = []

    def run(job: Any, device: str, shards: Any, report: Any, threads: int) -> None:
        seen.append(threads)
        workers.run_here(job, device, shards, report, threads)

    monkeypatch.setattr("nomoe.corpus.run.run_here", run)
    embed_corpus(source, out, shard_rows=10, workers=3, **shallow_model)
    (out / "part-000001.parquet").unlink()
    embed_corpus(source, out, shard_rows=10, workers=3, **shallow_model)
    # one shard in all has all cores
    embed_corpus(source, tmp_path / "one", shard_rows=30, workers=3, **shallow_model)
    assert seen == [2, 6]


@pytest.mark.parametrize(
    ("content", "expected"),
    [("400000 100000\n", 4), ("50000 100000\n", 1), ("max 100000\n", 64), ("", 64), (None, 64)],
)
def test_cores_of_a_container(
    tmp_path: Path, content: str | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    monkeypatch.setattr(workers, "_CPU_MAX", tmp_path / "cpu.max")
    if content is not None:
        (tmp_path / "cpu.max").write_text(content)
    assert count_cores() == expected


def test_keywords_are_the_functions_own(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"embed_corpus\(\) got an unexpected .* 'colums'"):
        embed_corpus(tmp_path, tmp_path / "out", colums=["id"])
    shown = inspect.signature(embed_corpus).parameters
    expected = inspect.signature(make_request).parameters
    assert {name: shown[name].default for name in expected} == {
        name: one.default for name, one in expected.items()
    }
    assert set(shown) - set(expected) == {"overwrite"}


def test_an_output_that_would_be_input_is_refused(
    tmp_path: Path, shallow_model: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nomoe.corpus.request.make_plan", None)
    folder = tmp_path / "in"
    folder.mkdir()
    source = write(folder / "a.jsonl", make_rows(3))
    typed = write(tmp_path / "b.parquet", make_rows(3))
    (tmp_path / "link").symlink_to(folder)
    content = source.read_bytes()
    for given, output in (
        (source, source),
        (source, tmp_path / "link" / "a.jsonl"),
        (source.as_uri(), source),
        ([source], folder / ".." / "in" / "a.jsonl"),
    ):
        with pytest.raises(ValueError, match="is an input file"):
            embed_corpus(given, output, overwrite=True, **shallow_model)
    for given, output in (
        (folder, folder / "out.jsonl"),
        (folder.as_uri(), folder / "out.jsonl"),
        (folder.as_uri(), folder / "vectors"),
        (tmp_path / "link", folder / "vectors"),
        (f"{tmp_path}/**/*.jsonl", tmp_path / "deep.jsonl"),
        (f"{folder.as_uri()}/*.jsonl", folder / "out.jsonl"),
        # which the next run would refuse
        (f"{folder}/*", folder / "out.npy"),
        (f"{tmp_path}/**/*.parquet", tmp_path / "vectors"),
        (f"{tmp_path.as_uri()}/**/*.parquet", tmp_path / "vectors"),
        (f"{tmp_path}/link/../link/*.jsonl", folder / "out.jsonl"),
    ):
        with pytest.raises(ValueError, match="would be input of the next run"):
            embed_corpus(given, output, overwrite=output.suffix != "", **shallow_model)
    assert source.read_bytes() == content
    assert typed.exists()
    # what a pattern does not match may lie beside it, and in a folder what is passed over
    monkeypatch.undo()
    embed_corpus(folder, folder / "a.npy", **shallow_model)
    embed_corpus(folder, folder / "_vectors", **shallow_model)
    assert [Path(one.path) for one in find_sources(folder)] == [source]
    embed_corpus(f"{folder}/*.jsonl", folder / "out", **shallow_model)
    embed_corpus(f"{folder}/*.jsonl", folder / "out.npy", **shallow_model)
