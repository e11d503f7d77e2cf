"""What a checkpoint's sentence-transformers files say: prompts, pooling, length."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

from .checkpoint import (
    MODULES_FILE,
    POOLING_FILE,
    PROMPTS_FILE,
    SENTENCE_FILE,
    TOKENIZER_CONFIG_FILE,
)
from .tokenizer import check_texts

logger = logging.getLogger(__name__)

# the prompts the model was trained with, under the names its repository gives them
TRAINED_PROMPTS = {
    "query": "search_query: ",
    "passage": "search_document: ",
    "Classification": "classification: ",
    "MultilabelClassification": "classification: ",
    "Clustering": "clustering: ",
    "PairClassification": "classification: ",
    "STS": "classification: ",
    "Summarization": "classification: ",
    "Speed": "search_document: ",
}
# the length the model was trained with, in tokens
TRAINED_LENGTH = 512
# transformers writes 10^30 where nobody set a length
_NO_LENGTH = 10**9


class SentenceSettings(NamedTuple):
    """How a repository wants its texts embedded."""

    prompts: dict[str, str]
    default_prompt_name: str | None
    max_seq_length: int
    # whether the repository's own pipeline ends in a Normalize module
    normalizes: bool
    # features to keep of a vector; None keeps all
    truncate_dim: int | None


def read_sentence_settings(folder: Path, n_positions: int) -> SentenceSettings:
    """Read the sentence-transformers files; an absent one means what the published model has.

    Args:
        folder: The checkpoint.
        n_positions: Longest text that the model takes, in tokens.

    Raises:
        FileNotFoundError: modules.json names a pooling whose settings are absent.
        ValueError: A damaged file, or a pipeline other than mean pooling, then normalising.
    """
    modules = _read(folder / MODULES_FILE, list)
    normalizes = True
    pooling_file = folder / POOLING_FILE
    if modules is not None:
        if not all(isinstance(module, dict) for module in modules):
            raise ValueError(f"{folder / MODULES_FILE} is not a list of objects")
        kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
        if kinds not in (["Transformer", "Pooling", "Normalize"], ["Transformer", "Pooling"]):
            raise ValueError(
                f"{folder / MODULES_FILE} chains {kinds}; nomoe runs Transformer, Pooling and "
                "optionally Normalize"
            )
        normalizes = kinds[-1] == "Normalize"
        pooling_file = folder / str(modules[1].get("path", "")) / "config.json"
        if not pooling_file.is_file():
            raise FileNotFoundError(
                f"{folder / MODULES_FILE} puts the pooling's settings in {pooling_file}, which is "
                "absent; without them the pooling would be a guess"
            )
    _check_pooling(pooling_file)

    sentence = _read(folder / SENTENCE_FILE, dict) or {}
    length = sentence.get("max_seq_length") or _tokenizers_length(folder, n_positions)
    if sentence.get("do_lower_case"):
        raise ValueError(f"{folder / SENTENCE_FILE}: do_lower_case=true is unsupported")
    if not isinstance(length, int):
        raise ValueError(f"{folder / SENTENCE_FILE}: max_seq_length is {length!r}")

    settings = _read(folder / PROMPTS_FILE, dict) or {}
    similarity = settings.get("similarity_fn_name")
    # of unit vectors both are the same
    if similarity not in (None, "cosine", "dot") or (similarity == "dot" and not normalizes):
        raise ValueError(
            f"{folder / PROMPTS_FILE}: similarity_fn_name {similarity!r} is unsupported"
        )
    truncate_dim = settings.get("truncate_dim")
    if truncate_dim is not None and type(truncate_dim) is not int:
        raise ValueError(f"{folder / PROMPTS_FILE}: truncate_dim is {truncate_dim!r}")
    prompts = settings.get("prompts") or TRAINED_PROMPTS
    if not isinstance(prompts, dict) or not all(isinstance(p, str) for p in prompts.values()):
        raise ValueError(f"{folder / PROMPTS_FILE}: prompts must map names to strings")
    check_texts(list(prompts.values()))
    default = settings.get("default_prompt_name")
    if default is not None and default not in list(prompts):
        raise ValueError(f"{folder / PROMPTS_FILE}: default_prompt_name {default!r} is no prompt")
    if default is None and not any(prompts.values()):
        # what sentence-transformers saves of a model whose prompts nobody set
        logger.warning(
            "%s has no prompt but empty ones, and the model was trained with one on every text: "
            "its trained prompts are taken; prompt='' embeds without",
            folder / PROMPTS_FILE,
        )
        prompts = TRAINED_PROMPTS
    # the repository calls it "passage"; SentenceTransformer.encode_document looks for "document",
    # and without this key embeds documents with no prefix at all
    if not prompts.get("document") and prompts.get("passage"):
        prompts = prompts | {"document": prompts["passage"]}
    return SentenceSettings(dict(prompts), default, length, normalizes, truncate_dim)


def _tokenizers_length(folder: Path, n_positions: int) -> int:
    """The length where sentence-transformers 6 saves it, with the tokenizer."""
    path = folder / TOKENIZER_CONFIG_FILE
    length = (_read(path, dict) or {}).get("model_max_length")
    if length is None:
        return TRAINED_LENGTH
    if isinstance(length, bool) or not isinstance(length, int | float):
        raise ValueError(f"{path}: model_max_length is {length!r}")
    return TRAINED_LENGTH if length > _NO_LENGTH else min(int(length), n_positions)


def _check_pooling(path: Path) -> None:
    pooling = _read(path, dict)
    if pooling is None:
        return
    modes = {key for key, on in pooling.items() if key.startswith("pooling_mode_") and on is True}
    mode = pooling.get("pooling_mode")
    if (modes and modes != {"pooling_mode_mean_tokens"}) or mode not in (None, "mean"):
        raise ValueError(f"{path}: pooling {mode or sorted(modes)} is unsupported, expected mean")
    if pooling.get("include_prompt", True) is not True:
        raise ValueError(f"{path}: include_prompt=false is unsupported; the prompt is pooled too")


def _read(path: Path, expected: type) -> Any:
    """Read a JSON file; None if it is absent."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, expected):
        raise ValueError(f"{path} holds {type(value).__name__}, expected {expected.__name__}")
    return value
