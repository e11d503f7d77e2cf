"""Loading from the Hub: what is asked for, what is kept, and what is said when it fails.

huggingface_hub reads its settings when it is imported, so loads run in processes of their own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from nomoe.checkpoint import (
    CONFIG_FILE,
    DEFAULT_REPO,
    DEFAULT_REVISION,
    INDEX_FILE,
    MODULES_FILE,
    POOLING_FILE,
    PROMPTS_FILE,
    SENTENCE_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
)
from tests.hub_server import HubServer

REPO = "owner/name"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER_COMMIT = "f" * 40
NEEDED = (
    CONFIG_FILE,
    TOKENIZER_FILE,
    TOKENIZER_CONFIG_FILE,
    "special_tokens_map.json",
    MODULES_FILE,
    POOLING_FILE,
    SENTENCE_FILE,
    PROMPTS_FILE,
    WEIGHTS_FILE,
)
DECOYS = ("README.md", "pytorch_model.bin", "onnx/model.onnx", "original/model.safetensors")
# the longest a load may take; an interrupted download is retried for five seconds
LIMIT_S = 60

# answers requests, one JSON document a line, until its standard input ends
CLIENT = """
import json, sys
import nomoe
from nomoe.checkpoint import locate

replies, sys.stdout = sys.stdout, sys.stderr
for line in sys.stdin:
    action, arguments = json.loads(line)
    try:
        if action == "encode":
            encoder = nomoe.Encoder.from_pretrained(device="cpu", **arguments)
            value = encoder.encode_query(["ein Satz", "another sentence"]).tolist()
        else:
            value = str(locate(**arguments))
        reply = {"value": value}
    except Exception as error:
        reply = {"type": type(error).__qualname__, "message": str(error)}
    print(json.dumps(reply), file=replies, flush=True)
"""


class Failure(Exception):  # noqa: N818 -- an outcome, not an error of the tests
    """What a load in the other process ended with."""

    def __init__(self, kind: str, message: str) -> None:
        self.kind = kind
        self.message = message
        super().__init__(f"{kind}: {message}")


class Client:
    """Another process, with huggingface_hub pointed at a server."""

    def __init__(self, url: str, home: Path, **settings: str) -> None:
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))
            and not name.lower().endswith("_proxy")
        }
        self._process = subprocess.Popen(
            [sys.executable, "-c", CLIENT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=inherited
            | {
                "HF_ENDPOINT": url,
                "HF_HOME": str(home),
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                # several processes share the cores
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            }
            | settings,
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=LIMIT_S)

    def locate(self, name: str = REPO, **arguments: Any) -> Path:
        return Path(self._ask("locate", {"name_or_path": name} | arguments))

    def encode(self, *name: str, **arguments: Any) -> list[list[float]]:
        vectors: list[list[float]] = self._ask(
            "encode", arguments | ({"name_or_path": name[0]} if name else {})
        )
        return vectors

    def _ask(self, action: str, arguments: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        arguments = {
            key: str(value) if isinstance(value, Path) else value
            for key, value in arguments.items()
        }
        print(json.dumps([action, arguments]), file=self._process.stdin, flush=True)
        timer = Timer(LIMIT_S, self._process.kill)
        timer.start()
        line = self._process.stdout.readline()
        timer.cancel()
        if not line:
            pytest.fail(f"the other process died or took more than {LIMIT_S} s")
        reply = json.loads(line)
        if "value" not in reply:
            raise Failure(reply["type"], reply["message"])
        return reply["value"]


@pytest.fixture(scope="module")
def repository(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint, and files that are of no use to nomoe."""
    folder = tmp_path_factory.mktemp("repository") / "files"
    shutil.copytree(tiny_folder, folder)
    for name in DECOYS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"of no use")
    return folder


@pytest.fixture(scope="module")
def running_server(repository: Path) -> Iterator[HubServer]:
    server = HubServer(repository, {REPO: COMMIT, DEFAULT_REPO: DEFAULT_REVISION})
    yield server
    server.stop()


@pytest.fixture
def server(running_server: HubServer) -> HubServer:
    running_server.reset()
    return running_server


@pytest.fixture(scope="module")
def client(running_server: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with Client(running_server.url, tmp_path_factory.mktemp("online")) as client:
        yield client


@pytest.fixture(scope="module")
def offline_client(
    running_server: HubServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Client]:
    home = tmp_path_factory.mktemp("offline")
    with Client(running_server.url, home, HF_HUB_OFFLINE="1") as client:
        yield client


@pytest.fixture(scope="module")
def vectors(client: Client, repository: Path) -> list[list[float]]:
    """What the checkpoint gives when it is loaded from its folder."""
    return client.encode(str(repository))


@pytest.fixture(scope="module")
def filled(
    running_server: HubServer, client: Client, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A cache that holds the branch "main", and so the commit."""
    running_server.reset()
    cache = tmp_path_factory.mktemp("filled")
    client.locate(revision="main", cache_dir=cache)
    return cache


def test_first_load_fetches_what_is_needed_and_no_more(
    server: HubServer, client: Client, vectors: list[list[float]], tmp_path: Path
) -> None:
    assert client.encode(REPO, revision=COMMIT, cache_dir=tmp_path) == vectors
    assert server.fetched() == dict.fromkeys(NEEDED, 1)


def test_second_load_of_a_commit_asks_nothing(
    server: HubServer, vectors: list[list[float]], filled: Path, tmp_path: Path
) -> None:
    # a new process, with nothing in memory
    with Client(server.url, tmp_path) as other:
        assert other.encode(REPO, revision=COMMIT, cache_dir=filled) == vectors
    assert server.requests == []


@pytest.mark.parametrize("revision", [COMMIT, "main", None])
def test_cache_alone(
    server: HubServer, client: Client, offline_client: Client, filled: Path, revision: str | None
) -> None:
    there = {"revision": revision, "cache_dir": filled}
    expected = client.locate(revision=COMMIT, cache_dir=filled)
    assert client.locate(local_files_only=True, **there) == expected
    assert offline_client.locate(**there) == expected
    assert server.requests == []


def test_offline_gives_the_same_vectors(
    offline_client: Client, filled: Path, vectors: list[list[float]]
) -> None:
    assert offline_client.encode(REPO, cache_dir=filled) == vectors


@pytest.mark.parametrize("revision", [COMMIT, "main"])
def test_never_downloaded(
    server: HubServer, client: Client, offline_client: Client, tmp_path: Path, revision: str
) -> None:
    for load in (
        lambda: client.locate(revision=revision, cache_dir=tmp_path, local_files_only=True),
        lambda: offline_client.locate(revision=revision, cache_dir=tmp_path),
    ):
        with pytest.raises(Failure) as failure:
            load()
        assert failure.value.kind == "FileNotFoundError"
        for part in (REPO, revision, "not in the local cache", f"hf download {REPO}"):
            assert part in failure.value.message
    assert server.requests == []


def test_branch_is_looked_up_and_survives_a_dead_hub(
    server: HubServer, client: Client, filled: Path, tmp_path: Path
) -> None:
    expected = filled / f"models--{REPO.replace('/', '--')}" / "snapshots" / COMMIT
    assert client.locate(revision="main", cache_dir=filled) == expected
    assert any("/revision/main" in request.path for request in server.requests)
    assert not server.fetched()
    server.stop()
    try:
        assert client.locate(revision="main", cache_dir=filled) == expected
        with pytest.raises(Failure) as failure:
            client.locate(revision="main", cache_dir=tmp_path)
    finally:
        server.restart()
    assert failure.value.kind == "ConnectionError"
    assert f"{REPO} at revision main" in failure.value.message


@pytest.mark.parametrize("revision", ["no-such-branch", OTHER_COMMIT])
def test_unknown_revision(server: HubServer, client: Client, tmp_path: Path, revision: str) -> None:
    with pytest.raises(Failure) as failure:
        client.locate(revision=revision, cache_dir=tmp_path)
    assert failure.value.kind == "ValueError"
    assert f"{REPO} has no revision {revision!r}" in failure.value.message


@pytest.mark.parametrize(
    ("fault", "kind", "part"),
    [
        ("private", "PermissionError", "hf auth login"),
        ("gated", "PermissionError", "hf auth login"),
        ("forbidden", "PermissionError", "hf auth login"),
        ("no repository", "FileNotFoundError", "neither a folder nor a repository"),
        ("internal error", "ConnectionError", "500"),
        ("web page", "ConnectionError", "load again"),
        ("hang up", "ConnectionError", "load again"),
        ("cut always", "ConnectionError", "load again"),
        ("no storage", "ConnectionError", "load again"),
    ],
)
def test_failure_is_clear_and_leaves_nothing_broken(
    server: HubServer,
    client: Client,
    repository: Path,
    tmp_path: Path,
    fault: Any,
    kind: str,
    part: str,
) -> None:
    if fault == "no storage":
        pytest.importorskip("hf_xet", reason="Xet storage is not used without it")
    server.reset(fault)
    with pytest.raises(Failure) as failure:
        client.locate(cache_dir=tmp_path)
    assert failure.value.kind == kind
    assert REPO in failure.value.message
    assert part in failure.value.message
    assert len(failure.value.message) < 400, failure.value.message
    assert not list(tmp_path.rglob(WEIGHTS_FILE))

    server.reset()
    folder = client.locate(cache_dir=tmp_path)
    for name in NEEDED:
        assert (folder / name).read_bytes() == (repository / name).read_bytes()


def test_interrupted_download_is_resumed_or_refused(
    server: HubServer, client: Client, repository: Path, tmp_path: Path
) -> None:
    server.reset("cut once")
    # newer versions of huggingface_hub go on where the transfer broke off, older ones give up
    outcome = "resumed"
    try:
        client.locate(revision=COMMIT, cache_dir=tmp_path)
    except Failure as failure:
        outcome = failure.kind
    assert server.cuts == 1
    assert outcome in ("resumed", "ConnectionError")

    folder = client.locate(revision=COMMIT, cache_dir=tmp_path)
    for name in NEEDED:
        assert (folder / name).read_bytes() == (repository / name).read_bytes()


def test_default_is_the_pinned_commit(
    server: HubServer, client: Client, vectors: list[list[float]], tmp_path: Path
) -> None:
    assert client.encode(cache_dir=tmp_path) == vectors
    asked = [request.path for request in server.requests if DEFAULT_REPO in request.path]
    assert any(path.startswith("/api/models/") for path in asked)
    assert [path for path in asked if DEFAULT_REVISION not in path] == []

    server.reset()
    client.locate(DEFAULT_REPO, revision="main", cache_dir=tmp_path)
    assert any("/revision/main" in request.path for request in server.requests)


def test_shards_are_fetched(tiny_folder: Path, repository: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    shutil.copytree(repository, folder, ignore=lambda _, names: {WEIGHTS_FILE} & set(names))
    tensors = load_file(tiny_folder / WEIGHTS_FILE)
    weight_map = {
        name: f"model-0000{place % 2 + 1}-of-00002.safetensors"
        for place, name in enumerate(sorted(tensors))
    }
    shards = set(weight_map.values())
    for shard in shards:
        kept = {name: tensor for name, tensor in tensors.items() if weight_map[name] == shard}
        save_file(kept, folder / shard)
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))

    server = HubServer(folder, {REPO: COMMIT})
    wanted = {"revision": COMMIT, "cache_dir": tmp_path / "cache"}
    with Client(server.url, tmp_path) as client:
        client.locate(**wanted)
        assert server.fetched().keys() == {*NEEDED, *shards, INDEX_FILE} - {WEIGHTS_FILE}
        server.reset()
        client.locate(**wanted)
    assert server.requests == []
    server.stop()


def test_what_another_program_left_out_is_fetched(
    server: HubServer, client: Client, repository: Path, tmp_path: Path
) -> None:
    # transformers reads no sentence-transformers file; without them prompts would be guessed
    folder = client.locate(revision=COMMIT, cache_dir=tmp_path)
    (folder / PROMPTS_FILE).resolve().unlink()
    (folder / PROMPTS_FILE).unlink()
    shutil.rmtree(folder.parents[1] / "trees", ignore_errors=True)
    server.reset()
    # a new process: the listing is also kept in memory
    with Client(server.url, tmp_path) as other:
        assert other.locate(revision=COMMIT, cache_dir=tmp_path) == folder
    assert (folder / PROMPTS_FILE).read_bytes() == (repository / PROMPTS_FILE).read_bytes()
    assert server.fetched() == {PROMPTS_FILE: 1}


def test_wanted_token_is_absent(server: HubServer, client: Client, tmp_path: Path) -> None:
    with pytest.raises(Failure) as failure:
        client.locate(token=True, cache_dir=tmp_path)
    assert failure.value.kind == "PermissionError"
    assert "hf auth login" in failure.value.message
    assert server.requests == []


@pytest.mark.parametrize("name", ["no/such/folder", "~/nowhere", "a--b/c", "./owner", "name", ""])
@pytest.mark.parametrize("revision", [None, COMMIT])
def test_neither_folder_nor_repository(
    server: HubServer, client: Client, tmp_path: Path, name: str, revision: str | None
) -> None:
    with pytest.raises(Failure) as failure:
        client.locate(name, revision=revision, cache_dir=tmp_path)
    assert failure.value.kind == "FileNotFoundError"
    assert "neither" in failure.value.message
    assert server.requests == []


def test_file_in_place_of_a_folder(client: Client, repository: Path) -> None:
    with pytest.raises(Failure) as failure:
        client.locate(str(repository / CONFIG_FILE))
    assert failure.value.kind == "FileNotFoundError"
    assert "is a file" in failure.value.message
