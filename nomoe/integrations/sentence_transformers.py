"""The model as a SentenceTransformer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..arguments import check_dim, check_length, resolve_device, resolve_dtype
from ..backends import BackendName, select_backend
from ..checkpoint import CONFIG_FILE, DEFAULT_REPO, TOKENIZER_FILE, locate
from ..config import NomicMoEConfig
from ..repository import read_sentence_settings
from ..tokenizer import Tokenizer
from .transformers import is_registered, register, unregister

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

# several scripts, accents and runs of spaces: what tokenizers of other kinds disagree on
_PROBE = "search_query: ¿Cuándo cambia la  marea? 潮はいつ変わる? Ａ<mask>"


def sentence_transformer(
    name_or_path: str | Path = DEFAULT_REPO,
    *,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    backend: BackendName = "auto",
    max_seq_length: int | None = None,
    truncate_dim: int | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> SentenceTransformer:
    """Load a checkpoint as a SentenceTransformer: its own class and modules around nomoe's model.

    All trained prompts are there, "document" included, so that `encode_document` adds the prefix.
    Batches that SentenceTransformer pads are unpadded inside. Calls `nomoe.register`: what is saved
    from this model, or what its trainer writes and reads again, has to find the same class.

    Args:
        name_or_path: A folder, or a repository name.
        revision: Branch, tag or commit; None pins the published commit of the default repository
            and follows the main branch of any other.
        device: None takes CUDA where there is one.
        dtype: "float32", "float16", "bfloat16" or the torch dtype; None means float32 on a CPU and
            float16 on CUDA. Train in float32.
        backend: "auto", "torch" or "triton"; only torch trains.
        max_seq_length: Longest text in tokens; None takes the repository's (512).
        truncate_dim: Keep only the first features (Matryoshka); None takes the repository's (all).
            As in any SentenceTransformer vectors are then no longer unit norm.
        local_files_only: Never reach for the network.
        token: Hub token, or True for the stored one.
        cache_dir: Hub cache folder.

    Returns:
        A `sentence_transformers.SentenceTransformer`.

    Raises:
        ImportError: sentence-transformers is not installed.
        FileNotFoundError, PermissionError, ConnectionError: The checkpoint cannot be had.
        ValueError: Its files are unsupported or do not fit together, or an argument is wrong.
        RuntimeError: The backend or device cannot run here.
    """
    from sentence_transformers import SentenceTransformer

    device = resolve_device(device)
    dtype = resolve_dtype(dtype, device)
    select_backend(backend, device, dtype=dtype)
    folder = locate(
        name_or_path,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    config = NomicMoEConfig.from_json(folder / CONFIG_FILE)
    settings = read_sentence_settings(folder, config.n_positions)
    tokenizer = Tokenizer(folder / TOKENIZER_FILE, config.embedding_rows)
    if max_seq_length is not None:
        max_seq_length = check_length(max_seq_length, config)
    if truncate_dim is not None:
        truncate_dim = check_dim("truncate_dim", truncate_dim, config)
    was_registered = is_registered()
    register()
    model_options: dict[str, Any] = {"dtype": dtype, "nomoe_backend": backend}
    loaded = False
    try:
        model = SentenceTransformer(
            str(folder),
            device=str(device),
            prompts=settings.prompts,
            # sentence-transformers 5.3 does not read the repository's
            truncate_dim=settings.truncate_dim if truncate_dim is None else truncate_dim,
            local_files_only=True,
            model_kwargs=model_options,
        )
        _check_tokenizer(model, tokenizer, folder, config.n_positions)
        loaded = True
    finally:
        if not loaded and not was_registered:
            unregister()
    if max_seq_length is not None:
        model.max_seq_length = max_seq_length
    if not Path(name_or_path).expanduser().is_dir():
        _name(model, str(name_or_path), folder.name)
    return model


def _check_tokenizer(
    model: SentenceTransformer, tokenizer: Tokenizer, folder: Path, n_positions: int
) -> None:
    # verbose would have it warn of a probe longer than max_seq_length
    theirs = list(model.tokenizer(_PROBE, verbose=False)["input_ids"])
    if theirs != tokenizer([_PROBE], n_positions).ids[0]:
        raise ValueError(
            f"transformers made a {type(model.tokenizer).__name__} of the tokenizer in {folder}, "
            "and it gives other ids than its tokenizer.json: is tokenizer_config.json missing or "
            "wrong?"
        )


def _name(model: SentenceTransformer, repo: str, commit: str) -> None:
    """Name a repository, in place of its folder in the cache, where saved files name their base."""
    transformer: Any = model[0].auto_model
    transformer.config._name_or_path = transformer.name_or_path = repo
    model.model_card_data.base_model = repo
    model.model_card_data.base_model_revision = commit
