"""The encoder as a model of MTEB, with the prompt that was published for each kind of task."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from mteb import get_model_meta
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction

from .. import __version__
from ..backends import BackendName
from ..checkpoint import DEFAULT_REPO, DEFAULT_REVISION, SETTINGS_FILES, find_weights, locate
from ..encoder import Encoder
from . import check_encoder

_HASHED_AT_ONCE = 1 << 24


class NomicMoEForMTEB(AbsEncoder):
    """What `mteb.evaluate` runs: an `Encoder`, its prompts under MTEB's names, and its metadata.

    A text's prompt is that of its task's type ("Classification", "STS", ...), else that of its role
    ("query", "document"); what has neither, as in bitext mining, is embedded as a document.

    Args:
        encoder: The encoder.
        meta: What it is.

    Raises:
        TypeError: `encoder` is none.

    Attributes:
        model: The encoder.
        model_prompts: Prompt by task type or role.
        mteb_model_meta: What it is.
    """

    def __init__(self, encoder: Encoder, meta: ModelMeta) -> None:
        check_encoder(encoder)
        self.model = encoder
        self.model_prompts = {name: one for name, one in encoder.prompts.items() if one}
        self.mteb_model_meta = meta

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        batch_size: int | None = None,
        **options: Any,
    ) -> Any:
        """Embed the texts of a data loader.

        Args:
            inputs: Batches, dicts with a list under "text".
            task_metadata: The task's; chooses the prompt.
            hf_split: Not used, as in MTEB's own models.
            hf_subset: Not used, as in MTEB's own models.
            prompt_type: The texts' role, "query" or "document", or None.
            batch_size: Not used: MTEB always sends one, and batches are built by token budget.
            options: As `Encoder.encode`; MTEB sends `show_progress_bar` and `precision`.

        Returns:
            float32 (n, d), unit norm.

        Raises:
            ValueError: The task's inputs are not text.
        """
        texts: list[str] = []
        for batch in inputs:
            if "text" not in batch:
                raise ValueError(
                    f"{task_metadata.name} gives {sorted(batch)}; this model embeds text only"
                )
            texts += batch["text"]
        name = self.get_prompt_name(task_metadata, prompt_type) or "document"
        return self.model.encode(texts, prompt_name=name, **options)


def mteb_model(
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
) -> NomicMoEForMTEB:
    """Load a checkpoint as a model that `mteb.evaluate` takes.

    Its ModelMeta is true for what was loaded, so that MTEB's cache of results takes nothing else
    for it. Of a local folder the revision is a digest of its weights and settings.
    `experiment_kwargs` names nomoe and its version, and dtype, length and dimension where they are
    other than the published ones.

    Args:
        name_or_path: As `Encoder.from_pretrained`, and so are the others.
        revision: As there.
        device: As there.
        dtype: As there.
        backend: As there.
        max_seq_length: As there.
        truncate_dim: As there.
        local_files_only: As there.
        token: As there.
        cache_dir: As there.

    Raises:
        ImportError: mteb is not installed.
        FileNotFoundError, PermissionError, ConnectionError: The checkpoint cannot be had.
        ValueError: Its files are unsupported or do not fit together, or an argument is wrong.
        RuntimeError: The backend or device cannot run here.
    """
    folder = locate(
        name_or_path,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    encoder = Encoder.from_pretrained(
        folder,
        device=device,
        dtype=dtype,
        backend=backend,
        max_seq_length=max_seq_length,
        truncate_dim=truncate_dim,
    )
    is_local = Path(name_or_path).expanduser().is_dir()
    if is_local:
        resolved = Path(name_or_path).expanduser().resolve()
        name, found = f"local/{resolved.name}", _digest(folder)
    else:
        # a snapshot's folder is named after its commit
        name, found = str(name_or_path), folder.name
    return NomicMoEForMTEB(encoder, describe(encoder, name, found))


def describe(encoder: Encoder, name: str, revision: str) -> ModelMeta:
    """Write the metadata of an encoder.

    Args:
        encoder: The encoder.
        name: As the results are to be filed, "owner/name".
        revision: Of its weights.
    """
    model = encoder.model
    config = model.config
    parameters = sum(parameter.numel() for parameter in model.parameters())
    words = model.embeddings.word_embeddings.weight.numel()
    experts = sum(
        2 * config.num_experts * config.ffn_width * config.n_embd for _ in config.moe_layers
    )
    idle = experts * (config.num_experts - config.moe_top_k) // config.num_experts
    changed = {
        "dtype": (str(encoder.dtype).removeprefix("torch."), "float32"),
        "max_seq_length": (encoder.max_seq_length, 512),
        "truncate_dim": (encoder.truncate_dim, None),
    }
    facts = {
        "loader": None,
        "loader_kwargs": {},
        "name": name,
        "revision": revision,
        "n_parameters": parameters,
        "n_embedding_parameters": words,
        "n_active_parameters_override": parameters - words - idle,
        "memory_usage_mb": round(parameters * encoder.dtype.itemsize / 2**20),
        "max_tokens": encoder.max_seq_length,
        "embed_dim": encoder.get_embedding_dimension(),
        "framework": ["PyTorch", "safetensors"],
        "similarity_fn_name": ScoringFunction.COSINE,
        "use_instructions": True,
        "extra_requirements_groups": None,
        # MTEB caches scores by it: other implementations' of the same model are theirs
        "experiment_kwargs": {"implementation": f"nomoe {__version__}"}
        | {key: value for key, (value, published) in changed.items() if value != published},
    }
    if (name, revision) == (DEFAULT_REPO, DEFAULT_REVISION):
        # who made it, when and from what, MTEB knows already
        return get_model_meta(DEFAULT_REPO).model_copy(update=facts)
    return ModelMeta.create_empty(overwrites=facts)


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    settings = {folder / name for name in SETTINGS_FILES} | set(folder.glob("*_Pooling/*.json"))
    for path in [*sorted(path for path in settings if path.is_file()), *find_weights(folder)]:
        # where one file ends and which it is
        digest.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while block := file.read(_HASHED_AT_ONCE):
                digest.update(block)
    return digest.hexdigest()[:40]
