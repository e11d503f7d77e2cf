"""From a folder or a Hub repository to checked tensors.

Only safetensors files are read. A float32 checkpoint loaded as float32 on a CPU keeps its tensors
memory-mapped: they are not copied, and processes on one machine share them, until the first
inference lays the large matrices out in memory of its own. The file must stay as it is meanwhile.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from os import PathLike
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor

DEFAULT_REPO = "nomic-ai/nomic-embed-text-v2-moe"
# the published weights; a name without a revision would follow whatever is pushed next
DEFAULT_REVISION = "1066b6599d099fbb93dfcb64f9c37a7c9e503e85"

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
# transformers takes a tokenizer of another kind where this is absent
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
MODULES_FILE = "modules.json"
POOLING_FILE = "1_Pooling/config.json"
SENTENCE_FILE = "sentence_bert_config.json"
PROMPTS_FILE = "config_sentence_transformers.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

SETTINGS_FILES = (
    CONFIG_FILE,
    TOKENIZER_FILE,
    TOKENIZER_CONFIG_FILE,
    MODULES_FILE,
    POOLING_FILE,
    SENTENCE_FILE,
    PROMPTS_FILE,
)
# everything that nomoe, or transformers for it, reads from a repository, and nothing else
NEEDED_FILES = (
    *SETTINGS_FILES,
    "special_tokens_map.json",
    # where modules.json puts the pooling elsewhere
    "*_Pooling/config.json",
    WEIGHTS_FILE,
    INDEX_FILE,
    "model-*-of-*.safetensors",
)

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
# huggingface_hub lets errors of its HTTP library through, which is requests, httpx or httpx2 by its
# version; their common base is a base of its own HTTP error
_HTTP_ERRORS: tuple[type[Exception], ...] = tuple(
    base
    for base in HfHubHTTPError.__mro__
    if issubclass(base, Exception)
    and base.__module__.partition(".")[0] not in ("builtins", "huggingface_hub")
)
_DOWNLOAD_ERRORS: tuple[type[Exception], ...] = (
    *_HTTP_ERRORS,
    OSError,
    HFValidationError,
    # an answer that is no Hub's
    json.JSONDecodeError,
    # all that hf_xet says
    RuntimeError,
)


def locate(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """Return the folder that holds a checkpoint, downloading it from the Hub if need be.

    A pinned commit that is already in the cache is used without asking the Hub anything.

    Args:
        name_or_path: A local folder, or a repository name such as "owner/name".
        revision: Branch, tag or commit. None means the published commit for `DEFAULT_REPO` and the
            main branch for any other repository.
        token: Hub token, or True for the stored one.
        cache_dir: Hub cache folder.
        local_files_only: Never reach for the network.

    Raises:
        FileNotFoundError: Neither a folder nor a repository, or not in the cache while offline.
        PermissionError: The Hub refuses access.
        ValueError: The revision does not exist, or is asked of a folder.
        ConnectionError: The Hub could not be reached, or the download broke.
        TypeError: The name is neither a str nor a path.
    """
    if not isinstance(name_or_path, str | PathLike):
        kind = type(name_or_path).__name__
        raise TypeError(f"the model is {kind}, expected a repository's name or a folder")
    repo = str(name_or_path)
    folder = Path(name_or_path).expanduser()
    if repo and folder.is_dir():
        if revision is not None:
            raise ValueError(f"{repo} is a local folder, which has no revision {revision!r}")
        return folder
    if repo and folder.exists():
        raise FileNotFoundError(f"{repo} is a file; expected the folder that holds {CONFIG_FILE}")
    if not _REPO_ID.fullmatch(repo):
        raise FileNotFoundError(f"{repo!r} is neither an existing folder nor a repository name")
    if revision is None:
        revision = DEFAULT_REVISION if repo == DEFAULT_REPO else "main"

    def fetch(*, local: bool) -> Path:
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local,
                allow_patterns=list(NEEDED_FILES),
            )
        )

    try:
        # a commit never changes, but older versions of huggingface_hub ask all the same
        if _COMMIT.fullmatch(revision) and not local_files_only:
            with suppress(LocalEntryNotFoundError):
                cached = fetch(local=True)
                if _is_whole(cached):
                    return cached
        return fetch(local=local_files_only)
    except _DOWNLOAD_ERRORS as error:
        # a full disk, or a cache that may not be written, says so itself
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise _explain(error, repo, revision) from error


def _explain(error: Exception, repo: str, revision: str) -> Exception:
    """Say in one of Python's own errors why a checkpoint could not be had, and what to do."""
    at = f"{repo} at revision {revision}"
    # where the cache does not help either, the reason why the Hub did not is the cause
    reason = error
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        reason = error.__cause__
    if isinstance(reason, LocalEntryNotFoundError | OfflineModeIsEnabled):
        return FileNotFoundError(
            f"{at} is not in the local cache, or only in part, and the network may not be used "
            "(local_files_only or HF_HUB_OFFLINE); on a connected machine run "
            f"`hf download {repo} --revision {revision} --local-dir FOLDER`, bring FOLDER here and "
            "load that"
        )
    if isinstance(reason, HFValidationError):
        return FileNotFoundError(f"{repo!r} is neither an existing folder nor a repository name")
    if isinstance(reason, LocalTokenNotFoundError):
        return PermissionError(
            f"{at}: token=True, but no token is stored; log in with `hf auth login`"
        )
    if isinstance(reason, RevisionNotFoundError):
        return ValueError(f"{repo} has no revision {revision!r}")
    if isinstance(reason, HfHubHTTPError):
        status = reason.response.status_code
        if status in (401, 403):
            return PermissionError(
                f"there is no folder {repo}, and the Hub refuses access to {at} ({status}): the "
                "name is wrong, or the repository is private or gated; log in with "
                "`hf auth login` or pass token="
            )
        if isinstance(reason, RepositoryNotFoundError):
            return FileNotFoundError(f"{repo} is neither a folder nor a repository on the Hub")
        return ConnectionError(f"the Hub answered {status} to a request for {at}; try again later")
    return ConnectionError(
        f"{at} could not be downloaded; check the connection and load again. "
        f"{type(reason).__name__}: {reason}"
    )


def _is_whole(folder: Path) -> bool:
    """Whether every file nomoe reads is there.

    An absent settings file may be one that the repository lacks, or one that another program had no
    use for; only the Hub knows.
    """
    try:
        find_weights(folder)
    except (FileNotFoundError, ValueError):
        return False
    return all((folder / name).is_file() for name in SETTINGS_FILES)


def find_weights(folder: Path) -> list[Path]:
    """List the safetensors files of a checkpoint: one, or the shards that its index names.

    Raises:
        FileNotFoundError: There are none. Pickled weights are named but never read.
        ValueError: The index is damaged.
    """
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    index = folder / INDEX_FILE
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is not a safetensors index: {error!r}") from error
        if not names:
            raise ValueError(f"{index} names no shards")
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or name == "..":
                raise ValueError(f"{index} names {name!r}, which is not a file beside it")
        shards = sorted(folder / name for name in names)
        absent = [path.name for path in shards if not path.is_file()]
        if absent:
            raise FileNotFoundError(f"{index} names shards that are absent: {', '.join(absent)}")
        return shards
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if pickled:
        raise FileNotFoundError(
            f"{folder} holds {', '.join(pickled)} but no {WEIGHTS_FILE}. Pickled weights can run "
            "code and are never loaded; save the checkpoint as safetensors"
        )
    raise FileNotFoundError(f"{folder} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}")


def load_tensors(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], *, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Load exactly the expected tensors, cast one at a time.

    Args:
        folder: The checkpoint.
        shapes: Name and shape of every tensor the model has.
        dtype: Wanted dtype. Where the file has it and the device is the CPU, nothing is copied.
        device: Wanted device.

    Raises:
        FileNotFoundError: As `find_weights`.
        ValueError: Tensors missing, unexpected, of another shape or not floating (all are listed),
            a damaged file, or values that are not finite in `dtype`.
    """
    with ExitStack() as stack:
        files: dict[str, safe_open] = {}
        problems = []
        for path in find_weights(folder):
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
            except SafetensorError as error:
                raise ValueError(
                    f"{path} is not a whole safetensors file (a broken download, or a pointer that "
                    f"`git lfs pull` replaces?): {error}"
                ) from error
            for name in file.keys():  # noqa: SIM118 -- not a dict
                if name in files:
                    problems.append(f"{name}: stored in more than one shard")
                files[name] = file
        problems += _compare(files, shapes)
        if problems:
            raise ValueError(
                f"{folder} does not fit its config.json:\n  " + "\n  ".join(sorted(problems))
            )
        tensors = {}
        spoiled = []
        for name in shapes:
            tensor = files[name].get_tensor(name).to(device=device, dtype=dtype)
            if not is_finite(tensor):
                spoiled.append(name)
            tensors[name] = tensor
        if spoiled:
            raise ValueError(
                f"{folder} holds NaN, infinite or (for {dtype}) too large values in: "
                + ", ".join(spoiled)
            )
        return tensors


def _compare(
    files: Mapping[str, safe_open], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[str]:
    for name in shapes.keys() - files.keys():
        yield f"{name}: missing, expected {list(shapes[name])}"
    for name in files.keys() - shapes.keys():
        yield f"{name}: unexpected"
    for name in shapes.keys() & files.keys():
        stored = files[name].get_slice(name)
        if tuple(stored.get_shape()) != tuple(shapes[name]):
            yield f"{name}: shape {stored.get_shape()}, expected {list(shapes[name])}"
        if stored.get_dtype() not in _FLOATS:
            yield f"{name}: dtype {stored.get_dtype()}, expected one of {', '.join(_FLOATS)}"


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor has neither NaN nor infinite values."""
    # the extremes of a tensor with a NaN are NaN; unlike isfinite() this makes no temporary
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))
