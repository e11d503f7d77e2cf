"""The command line, mostly in this process; what only a process can show in one of its own."""

from __future__ import annotations

import json
import os
import resource
import signal
import stat
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import torch

from nomoe import Encoder, cli, data, files
from nomoe.backends import cpu_ops
from nomoe.corpus.outputs import JsonlOutput
from nomoe.corpus.rows import read_blocks
from nomoe.corpus.sources import find_sources
from nomoe.signals import end_politely

ROOT = Path(__file__).parent.parent
LINES = ["The tide turns twice a day.", "", "潮水每天涨落两次。", "a\rb", " spaces "]


def run(*arguments: object) -> int:
    return cli.main([str(one) for one in arguments])


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(LINES) + "\n", encoding="utf-8", newline="")
    return path


def left_over(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_help_is_quick_and_needs_no_torch() -> None:
    code = (
        "import sys; sys.path[:0] = ['.', 'kernels']\n"
        "from nomoe.cli import main\n"
        "try: main(['embed', '--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    begun = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert "--overwrite" in done.stdout
    # of a processor: on a busy machine it may wait
    assert ended.ru_utime + ended.ru_stime - begun.ru_utime - begun.ru_stime < 0.5


def test_embed_text_to_npy(text_file: Path, tiny_folder: Path, encoder: Encoder) -> None:
    out = text_file.with_name("vectors.npy")
    assert run("embed", text_file, "-o", out, "--model", tiny_folder) == 0
    vectors = np.load(out)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, encoder.encode_document(LINES), atol=2e-6)
    assert left_over(out.parent) == []
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(out.stat().st_mode) == 0o666 & ~mask


def test_embed_options(text_file: Path, tiny_folder: Path, encoder: Encoder) -> None:
    out = text_file.with_name("vectors.npy")
    base = ("embed", text_file, "-o", out, "--overwrite", "--model", tiny_folder)
    assert run(*base, "--prompt", "query", "--dim", 32) == 0
    expected = encoder.encode_query(LINES, truncate_dim=32)
    np.testing.assert_allclose(np.load(out), expected, atol=2e-6)
    assert run(*base, "--prompt", "", "--precision", "int8") == 0
    expected = encoder.encode(LINES, prompt="", precision="int8")
    assert np.load(out).dtype == np.int8
    assert np.abs(np.load(out).astype(int) - expected).max() <= 1
    assert run(*base, "--precision", "ubinary") == 0
    assert np.load(out).shape == (5, 12)


def test_embed_jsonl_keeps_columns(tmp_path: Path, tiny_folder: Path, encoder: Encoder) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [{"id": i, "body": text, "tags": ["é", None]} for i, text in enumerate(LINES)]
    source.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    assert run("embed", source, "-o", out, "--column", "body", "--model", tiny_folder) == 0
    written = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    vectors = np.array([row.pop("embedding") for row in written], dtype=np.float32)
    assert written == rows
    np.testing.assert_allclose(vectors, encoder.encode_document(LINES), atol=2e-6)


def test_json_numbers_read_back_exactly(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    for dtype in (np.float32, np.float16):
        out = JsonlOutput(tmp_path / "out.jsonl", numbered=False)
        out.add(np.arange(3), [[{"id": i} for i in range(3)]], vectors.astype(dtype))
        out.commit()
        rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        found = np.array([row["embedding"] for row in rows], dtype)
        assert np.array_equal(found, vectors.astype(dtype))


def test_what_has_no_utf8_passes_through_escaped(tmp_path: Path) -> None:
    out = JsonlOutput(tmp_path / "out.jsonl", numbered=False)
    out.add(np.arange(2), [[{"title": "\ud800é"}, {"title": "é"}]], np.zeros((2, 1), np.float32))
    out.commit()
    written = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["title"] for line in written] == ["\ud800é", "é"]


def test_text_and_jsonl_need_no_pyarrow(text_file: Path, tiny_folder: Path) -> None:
    code = (
        "import sys; sys.path[:0] = ['.', 'kernels']; sys.modules['pyarrow'] = None\n"
        "from nomoe import cli\n"
        f"source, out = {str(text_file)!r}, {str(text_file.with_name('o.jsonl'))!r}\n"
        f"model = ['--model', {str(tiny_folder)!r}, '--device', 'cpu']\n"
        "done = cli.main(['embed', source, '-o', out, *model])\n"
        "done += cli.main(['embed', out, '-o', source + '.npy', '--columns', 'text', *model])\n"
        "assert done == 0\n"
        "assert cli.main(['embed', out, '-o', source + '.parquet', *model]) == 2\n"
        "assert cli.main(['embed', source + '.parquet', '-o', source + '.2.npy', *model]) == 2\n"
        "assert cli.main(['embed', 's3://b/x.jsonl', '-o', source + '.2.npy', *model]) == 2\n"
    )
    text_file.with_name("texts.txt.parquet").write_bytes(b"PAR1")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "writing Parquet needs pyarrow: pip install 'nomoe[parquet]'" in done.stderr
    assert "reading parquet files needs pyarrow: pip install 'nomoe[parquet]'" in done.stderr
    assert "opening s3://b/x.jsonl needs pyarrow: pip install 'nomoe[parquet]'" in done.stderr
    assert np.load(str(text_file) + ".npy").shape == (5, 96)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_leaves_nothing(name: str, text_file: Path, tiny_folder: Path) -> None:
    code = (
        "import os, signal, sys, time; sys.path[:0] = ['.', 'kernels']\n"
        "from nomoe import cli, model\n"
        # whoever runs the tests under nohup has it ignored
        f"signal.signal(signal.{name}, signal.SIG_DFL)\n"
        f"def forward(*_, **__): os.kill(os.getpid(), signal.{name}); time.sleep(60)\n"
        "model.NomicMoEModel.forward_packed = forward\n"
        f"cli.main(['embed', {str(text_file)!r}, '-o', {str(text_file.with_name('o.npy'))!r}, "
        f"'--model', {str(tiny_folder)!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == 128 + getattr(signal, name)
    assert os.listdir(text_file.parent) == [text_file.name]


def test_signals_are_as_before_once_a_command_has_ended() -> None:
    """And under nohup a terminal may close."""
    before = signal.getsignal(signal.SIGTERM)
    assert run("info") == 0
    assert signal.getsignal(signal.SIGTERM) == before
    hung_up = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        handlers = end_politely()
        assert signal.SIGHUP not in handlers
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        for number, handler in handlers.items():
            signal.signal(number, handler)
    finally:
        signal.signal(signal.SIGHUP, hung_up)


def test_the_package_runs_as_the_command() -> None:
    command = [sys.executable, "-m", "nomoe", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: nomoe ")


def test_standard_input_is_refused(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("embed", "-", "-o", tmp_path / "o.npy", "--model", tiny_folder) == 2
    assert "standard input cannot be read" in capsys.readouterr().err


def test_npy_of_many_parts(tmp_path: Path) -> None:
    parts = [np.full((n, 3), n, np.float32) for n in (0, 1, 1000, 99_999)]
    with files.atomic_output(tmp_path / "out.npy") as file:
        writer = files.NpyWriter(file, 3, np.float32)
        for part in parts:
            writer.write(part)
        writer.finish()
    assert writer.rows == 101_000
    assert np.array_equal(np.load(tmp_path / "out.npy"), np.concatenate(parts))


def test_an_empty_file_gives_no_rows(tmp_path: Path, tiny_folder: Path) -> None:
    (tmp_path / "in.txt").write_text("")
    assert run("embed", tmp_path / "in.txt", "-o", tmp_path / "o.npy", "--model", tiny_folder) == 0
    assert np.load(tmp_path / "o.npy").shape == (0, 96)


def test_carriage_returns_and_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n\r\nfour")
    (source,) = find_sources(tmp_path / "in.txt")
    texts = [text for block in read_blocks(source, "text") for text in block.texts]
    assert texts == ["one", "two", "", "four"]


BAD_INPUT = {
    "not utf-8": ("in.txt", b"fine\n\xff\xfe\n", "not UTF-8"),
    "not json": ("in.jsonl", b'{"text": "a"}\n{"text": \n', "row 1 (the first is 0): not JSON"),
    "no column": (
        "in.jsonl",
        b'{"text": "a"}\n{"body": "b"}\n',
        "row 1 (the first is 0): no text in column 'text'",
    ),
    "null": ("in.jsonl", b'{"text": null}\n', "row 0 (the first is 0): no text"),
    "not an object": (
        "in.jsonl",
        b'"a"\n',
        "row 0 (the first is 0): a JSON str, expected an object",
    ),
    "surrogate": (
        "in.jsonl",
        b'{"text": "\\ud800"}\n',
        "row 0 (the first is 0): holds a lone surrogate",
    ),
    "suffix": ("in.doc", b"text\na\n", "suffix '.doc', expected one of .txt, .jsonl"),
}


@pytest.mark.parametrize("case", list(BAD_INPUT))
def test_bad_input_is_refused_before_the_model_is_read(
    tmp_path: Path,
    tiny_folder: Path,
    case: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nomoe.model.NomicMoEModel.from_pretrained", None)
    name, content, message = BAD_INPUT[case]
    (tmp_path / name).write_bytes(content)
    assert run("embed", tmp_path / name, "-o", tmp_path / "out.npy", "--model", tiny_folder) == 2
    error = capsys.readouterr().err
    assert error.startswith("nomoe: error: ")
    assert error.count("\n") == 1
    assert message in error
    assert os.listdir(tmp_path) == [name]


def test_outputs_that_cannot_be(
    text_file: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = text_file.parent
    out = folder / "vectors.npy"
    out.write_bytes(b"precious")
    base = ("embed", text_file, "--model", tiny_folder, "-o")
    for target, message in (
        (out, "exists; --overwrite replaces it"),
        (folder / "vectors.csv", "expected .npy, .jsonl, .parquet, or none for a folder"),
        (folder / "absent" / "vectors.npy", "there is no folder"),
        (folder, "texts.txt is in the output folder"),
    ):
        assert run(*base, target) == 2
        assert message in capsys.readouterr().err
    assert out.read_bytes() == b"precious"
    assert run("embed", folder / "none.txt", "-o", folder / "o.npy") == 2
    assert "none.txt" in capsys.readouterr().err


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out.npy"
    out.write_bytes(b"precious")

    def full(file: BinaryIO) -> None:
        files.NpyWriter(file, 3, np.float32).write(np.zeros((4, 3), np.float32))
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"), files.atomic_output(out) as file:
        full(file)
    assert out.read_bytes() == b"precious"
    assert os.listdir(tmp_path) == ["out.npy"]


def test_an_interrupt_leaves_nothing(
    text_file: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nomoe.model.NomicMoEModel.forward_packed", interrupted)
    out = text_file.with_name("o.npy")
    assert run("embed", text_file, "-o", out, "--model", tiny_folder) == 130
    assert os.listdir(text_file.parent) == [text_file.name]


def test_an_error_without_words_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("nomoe.cli._info", full)
    assert run("info") == 2
    assert capsys.readouterr().err == "nomoe: error: MemoryError()\n"


def test_route(text_file: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("route", text_file, "--model", tiny_folder) == 0
    printed = capsys.readouterr().out
    assert "expert use, 5 texts" in printed
    assert "weight sum" in printed
    picture = text_file.with_name("texts.txt.routes.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert run("route", text_file, "--model", tiny_folder) == 2
    assert "exists; --overwrite replaces it" in capsys.readouterr().err
    for name, message in (("x.xyz", "suffix '.xyz'"), ("absent/x.png", "there is no folder")):
        target = text_file.with_name(name) if "/" not in name else text_file.parent / name
        assert run("route", text_file, "--model", "absent/", "-o", target) == 2
        assert message in capsys.readouterr().err
    svg = text_file.with_name("use.svg")
    assert run("route", text_file, "--model", tiny_folder, "-o", svg) == 0
    assert b"<svg" in svg.read_bytes()
    # what embed reads: a URI, a pattern, a folder; none of them says where the picture goes
    for given in (text_file.as_uri(), f"{text_file.parent}/*.txt", text_file.parent):
        assert run("route", given, "--model", tiny_folder) == 2
        assert "is not one file here: -o says where" in capsys.readouterr().err
        assert run("route", given, "--model", tiny_folder, "-o", svg, "--overwrite") == 0
        assert "expert use, 5 texts" in capsys.readouterr().out
    assert run("route", text_file.with_name("absent.txt"), "--model", tiny_folder) == 2
    assert "there is no file or folder" in capsys.readouterr().err


def test_demo(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run("demo", "--folder", tmp_path / "model") == 0
    printed = capsys.readouterr().out
    assert "100 sentences in 20 languages -> float32 (100, 96)" in printed
    assert "RANDOM" in printed
    assert "weights are random" in printed
    assert (tmp_path / "model" / "model.safetensors").exists()
    assert run("demo", "--folder", tmp_path / "model") == 2
    assert "already holds a checkpoint" in capsys.readouterr().err


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info", "--device", "cpu") == 0
    printed = capsys.readouterr().out
    for word in ("torch", "triton", "device", "backend", "published weights"):
        assert word in printed
    if cpu_ops(torch.bfloat16):
        assert "of float32's time here" in printed


def test_a_bug_shows_its_traceback(
    tiny_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("bug")

    monkeypatch.setattr("nomoe.model.NomicMoEModel.forward_packed", broken)
    with pytest.raises(KeyError):
        run("embed", text_file, "-o", text_file.with_name("o.npy"), "--model", tiny_folder)
    with pytest.raises(FileNotFoundError):
        run("--traceback", "embed", "none.txt", "-o", text_file.with_name("o.npy"))


def test_shipped_sentences_cover_ten_scripts() -> None:
    import unicodedata

    scripts = {
        unicodedata.name(character).split()[0]
        for group in data.sentences().values()
        for character in group[0]
        if character.isalpha()
    }
    assert len(scripts) >= 10


@pytest.mark.parametrize("name", ["transformers", "einops"])
def test_the_reference_code_says_what_it_needs(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("nomoe.cli.find_spec", lambda one: None if one == name else find_spec(one))
    assert run("verify", "--reference") == 2
    assert run("verify", "--code-revision", "main") == 2
    assert f"needs {name}: pip install 'nomoe[reference]'" in capsys.readouterr().err
