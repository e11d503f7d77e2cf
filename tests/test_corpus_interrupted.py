"""Runs that end early: killed, out of disk, refused; and several processes at one input."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nomoe import embed_corpus, files
from nomoe.corpus import workers
from nomoe.corpus.manifest import locked
from tests.corpora import make_rows, write

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

ROOT = Path(__file__).parent.parent
ROWS, SHARD_ROWS = 600, 50


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files, of which shards take rows of both."""
    folder = tmp_path_factory.mktemp("corpus")
    generator = np.random.default_rng(0)
    words = "the tide turns twice a day bread needs flour water salt and time".split()
    rows = [
        {"id": row, "text": " ".join(generator.choice(words, generator.integers(1, 12)))}
        for row in range(ROWS)
    ]
    pq.write_table(pa.Table.from_pylist(rows[:388]), folder / "1.parquet", row_group_size=150)
    pq.write_table(pa.Table.from_pylist(rows[388:]), folder / "2.parquet")
    return folder


@pytest.fixture(scope="module")
def options(shallow_folder: Path) -> dict[str, Any]:
    return {"model": shallow_folder, "device": "cpu", "shard_rows": SHARD_ROWS}


@pytest.fixture(scope="module")
def whole(
    corpus: Path, options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """The shards of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    embed_corpus(corpus, out, **options)
    return shards(out)


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("part-*.parquet")}


def left_over(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".part")]


def assert_whole(folder: Path, whole: dict[str, bytes]) -> None:
    """Row for row and bit for bit the uninterrupted run, and no row missing or doubled."""
    assert shards(folder) == whole
    assert left_over(folder) == []
    table = pq.read_table(folder)
    assert table["source_row"].to_pylist() == list(range(ROWS))
    assert table["id"].to_pylist() == list(range(ROWS))
    assert json.loads((folder / "_manifest.json").read_text())["complete"] is True


def embed_in_child(corpus: Path, out: Path, options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    workers.cores = lambda: 2
    embed_corpus(corpus, out, **options)


@pytest.fixture(scope="module")
def forks() -> Any:
    """Processes that have imported everything already: a moment is spent in the run itself."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nomoe.corpus", "nomoe.model", "pyarrow.parquet", "pandas"])
    return context


# --- killed ---


@pytest.mark.slow
def test_killed_at_ten_moments_the_union_is_the_uninterrupted_run(
    tmp_path: Path, corpus: Path, options: dict[str, Any], whole: dict[str, bytes], forks: Any
) -> None:
    def start(out: Path) -> Any:
        process = forks.Process(target=embed_in_child, args=(corpus, out, options))
        process.start()
        return process

    # the first process waits for the imports
    start(tmp_path / "first").join()
    begun = time.perf_counter()
    trial = start(tmp_path / "trial")
    trial.join()
    duration = time.perf_counter() - begun
    assert trial.exitcode == 0
    assert_whole(tmp_path / "trial", whole)

    seed = int(time.time())
    # shown if the test fails
    print(f"seed {seed}")
    generator = np.random.default_rng(seed)
    kills, runs, unfinished = 0, 0, 0
    while kills < 10:
        out = tmp_path / f"out{runs}"
        process = start(out)
        # from before the manifest is written to after the last shard
        process.join(float(generator.uniform(0, duration)))
        process.kill()
        process.join()
        if process.exitcode == 0:
            assert_whole(out, whole)
            runs += 1
            continue
        assert process.exitcode == -signal.SIGKILL
        kills += 1
        there = shards(out) if out.exists() else {}
        assert there == {name: whole[name] for name in there}
        unfinished += len(there) < len(whole)
    assert unfinished
    embed_corpus(corpus, tmp_path / f"out{runs}", **options)
    assert_whole(tmp_path / f"out{runs}", whole)


@pytest.mark.slow
def test_several_processes_give_the_same_shards(
    tmp_path: Path, corpus: Path, options: dict[str, Any], whole: dict[str, bytes]
) -> None:
    report = embed_corpus(corpus, tmp_path / "out", workers=2, **options)
    assert (report.embedded, report.shards) == (ROWS, len(whole))
    assert_whole(tmp_path / "out", whole)


@pytest.mark.slow
def test_the_parent_or_a_process_is_killed(
    tmp_path: Path, corpus: Path, options: dict[str, Any], whole: dict[str, bytes], forks: Any
) -> None:
    out = tmp_path / "out"
    process = forks.Process(target=embed_in_child, args=(corpus, out, options | {"workers": 2}))
    process.start()
    while not (out.exists() and shards(out)):
        assert process.is_alive()
        time.sleep(0.02)
    process.kill()
    process.join()
    # its processes notice, and until then write what this run writes
    report = embed_corpus(corpus, out, **options)
    assert report.embedded + report.found * SHARD_ROWS == ROWS
    assert_whole(out, whole)

    for name in ("part-000004.parquet", "part-000009.parquet"):
        (out / name).unlink()

    def kill_one(path: Path) -> None:
        for process in multiprocessing.active_children():
            if process.name.startswith("nomoe"):
                assert process.pid is not None
                os.kill(process.pid, signal.SIGKILL)
                return

    with pytest.MonkeyPatch.context() as patch:
        started = workers.connection.wait

        def wait(*arguments: Any) -> Any:
            kill_one(out)
            return started(*arguments)

        patch.setattr(workers.connection, "wait", wait)
        with pytest.raises(RuntimeError, match=r"exit code -9 .*: it was killed, perhaps for"):
            embed_corpus(corpus, out, workers=2, **options)
    assert not [one for one in multiprocessing.active_children() if one.name.startswith("nomoe")]
    embed_corpus(corpus, out, **options)
    assert_whole(out, whole)


@pytest.mark.slow
def test_processes_end_though_a_signal_was_lost(
    tmp_path: Path, corpus: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that comes just before a process waits for its next shard is noticed after that."""
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "terminate", lambda process: None)
    done = threading.Event()

    def kill_late() -> None:
        if not done.wait(60):
            for process in multiprocessing.active_children():
                process.kill()

    killing = threading.Thread(target=kill_late)
    killing.start()

    def failing(count: Any, progress: Any) -> None:
        raise RuntimeError("no more of this")

    monkeypatch.setattr("nomoe.corpus.run._Count.__call__", failing)
    with pytest.raises(RuntimeError, match="no more of this"):
        embed_corpus(corpus, tmp_path / "out", workers=2, **options)
    ended_by_themselves = not done.is_set() and killing.is_alive()
    done.set()
    killing.join()
    assert ended_by_themselves


def test_a_script_without_a_guard_is_told(tmp_path: Path, shallow_folder: Path) -> None:
    source = write(tmp_path / "in.jsonl", make_rows(4))
    script = tmp_path / "script.py"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}

    def run() -> Any:
        command = [sys.executable, script]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    script.write_text(
        f"import nomoe\nnomoe.embed_corpus({str(source)!r}, {str(tmp_path / 'out')!r}, "
        f"model={str(shallow_folder)!r}, device='cpu', workers=2, shard_rows=2)\n"
    )
    done = run()
    assert done.returncode == 1
    assert "put what the script does under `if __name__" in done.stderr
    assert done.stderr.endswith("before its work was done: what it printed says why\n")
    script.write_text(
        script.read_text().replace("nomoe.embed", "if __name__ == '__main__': nomoe.embed")
    )
    done = run()
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_an_interrupt_says_how_to_go_on(
    tmp_path: Path, corpus: Path, options: dict[str, Any], whole: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "nomoe.cli", "embed", str(corpus), "-o", str(out)]
    command += ["--model", str(options["model"]), "--device", "cpu"]
    command += ["--shard-rows", str(SHARD_ROWS), "--workers", "2"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}

    def prepare() -> None:
        # a shell that puts the tests in the background has them, and so this, ignore it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        # one thread for each of its processes
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])

    for _ in range(5):
        process = subprocess.Popen(
            command,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=prepare,
        )
        while not (out.exists() and shards(out)) and process.poll() is None:
            time.sleep(0.002)
        if process.poll() is None:
            # as a terminal does: to all processes of the group
            os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=60)
        if process.returncode != 0 and len(shards(out)) < len(whole):
            break
        # all was done before the signal came: once more
        shutil.rmtree(out)
    assert process.returncode == 130, said
    assert "shards in" in said
    assert "are finished and stay; the same command goes on from there" in said
    assert said.splitlines()[-1] == "nomoe: interrupted"
    assert "Traceback" not in said
    assert left_over(out) == []
    there = shards(out)
    assert there == {name: whole[name] for name in there}
    assert 0 < len(there) < len(whole)
    assert json.loads((out / "_manifest.json").read_text())["complete"] is False
    embed_corpus(corpus, out, **options)
    assert_whole(out, whole)


# --- two runs at once ---


def test_a_second_run_is_kept_out(
    tmp_path: Path, corpus: Path, options: dict[str, Any], forks: Any
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with locked(out):
        with pytest.raises(RuntimeError, match="another run is at work in"):
            embed_corpus(corpus, out, **options)
        process = forks.Process(target=embed_in_child, args=(corpus, out, options))
        process.start()
        process.join()
        assert process.exitcode == 1
    assert shards(out) == {}


# --- disk ---


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    """A file system of that size."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"no small file system can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="only root mounts a small file system"
)
@pytest.mark.parametrize("count", [1, 2])
def test_a_full_disk(
    tmp_path: Path, corpus: Path, options: dict[str, Any], whole: dict[str, bytes], count: int
) -> None:
    size = sum(map(len, whole.values()))
    with small_disk(tmp_path / "disk", size // 2048) as disk:
        with pytest.raises(OSError, match=r"No space left on device: '.*part-\d+\.parquet'"):
            embed_corpus(corpus, disk / "out", workers=count, **options)
        there = shards(disk / "out")
        assert there == {name: whole[name] for name in there}
        assert 0 < len(there) < len(whole)
        assert left_over(disk / "out") == []
        subprocess.run(
            ["mount", "-o", f"remount,size={4 * size}", str(disk)], check=True, capture_output=True
        )
        report = embed_corpus(corpus, disk / "out", **options)
        assert report.found == len(there)
        assert_whole(disk / "out", whole)
        free = os.statvfs(disk)
        (disk / "filler").write_bytes(bytes(free.f_bavail * free.f_frsize - 8192))
        with pytest.raises(OSError, match=r"No space left on device: '.*o\.npy'"):
            embed_corpus(corpus, disk / "o.npy", **options)
        assert {path.name for path in disk.iterdir()} == {"out", "filler"}


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, corpus: Path, options: dict[str, Any], whole: dict[str, bytes]
) -> None:
    # root writes anywhere, until it gives up the capability
    drop = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override"]
    if os.geteuid() == 0 and (
        shutil.which("setpriv") is None or subprocess.run([*drop, "true"], check=False).returncode
    ):
        pytest.skip("root can write anywhere, and cannot give that up here")
    out = tmp_path / "out"
    embed_corpus(corpus, out, **options)
    (out / "part-000003.parquet").unlink()
    out.chmod(0o555)
    command = drop if os.geteuid() == 0 else []
    command = [*command, sys.executable, "-m", "nomoe.cli", "embed", str(corpus), "-o", str(out)]
    command += ["--model", str(options["model"]), "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    finally:
        out.chmod(0o755)
    assert done.returncode == 2, done.stderr
    assert f"Permission denied: '{out}" in done.stderr
    assert shards(out) == {name: one for name, one in whole.items() if "000003" not in name}
    embed_corpus(corpus, out, **options)
    assert_whole(out, whole)


def test_a_shard_has_its_name_only_once_it_is_on_the_disk(
    tmp_path: Path, corpus: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, str]] = []
    synced, replaced = os.fsync, os.replace

    def fsync(handle: int) -> None:
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{handle}")).name))
        synced(handle)

    def replace(source: Path, target: Path) -> None:
        assert pq.ParquetFile(source).read().num_rows if target.suffix == ".parquet" else True
        events.append(("name", target.name))
        replaced(source, target)

    monkeypatch.setattr(files.os, "fsync", fsync)
    monkeypatch.setattr(files.os, "replace", replace)
    embed_corpus(corpus, tmp_path / "out", limit=75, **options)
    names = [name for what, name in events if what == "name"]
    assert names == [
        "_manifest.json",
        "part-000000.parquet",
        "part-000001.parquet",
        "_manifest.json",
    ]
    for index, (what, name) in enumerate(events):
        if what == "name":
            before, after = events[index - 1], events[index + 1]
            assert before[0] == "sync"
            assert before[1].startswith(f".{name}.")
            assert after == ("sync", "out")
