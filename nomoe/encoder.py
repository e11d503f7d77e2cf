"""Texts in, vectors out: the class most people need."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from .batching import make_batches, tokenize_ahead, windows
from .checkpoint import DEFAULT_REPO, TOKENIZER_FILE, locate
from .model import NomicMoEModel, resolve_device
from .moe import BackendName, select_backend
from .quantize import Precision, check_precision, quantize
from .repository import SentenceSettings, read_sentence_settings
from .routes import Routes
from .tokenizer import Tokenizer, Tokens, check_texts

logger = logging.getLogger(__name__)

OnTooLong = Literal["warn", "error"]
Array = npt.NDArray[Any]

# on two CPU cores the matrix products gain nothing beyond some 4,000 rows, and the activations of a
# larger batch leave the caches
_BATCH_TOKENS = {"cpu": 4096, "cuda": 65_536}
# a bar that would be gone before it is read is not shown
_BAR_DELAY_S = 2.0


class _Batch(NamedTuple):
    """One batch of a window after the forward."""

    # positions of its texts in the window
    positions: list[int]
    lengths: list[int]
    hidden_TD: Tensor
    # mean over each text's tokens, (B, D), float32
    pooled_BD: Tensor


class Encoder:
    """Embeds texts with nomic-embed-text-v2-moe.

    The model was trained with a prefix on every text; `encode_query` and `encode_document` add the
    right one. Parameters of `encode` have SentenceTransformer's names and order.

    Args:
        model: The encoder.
        tokenizer: Its tokenizer.
        settings: What its repository says about prompts, length and pooling.
        max_seq_length: Longest text in tokens, special tokens and prompt included; None takes the
            repository's (512). The model was trained at 512 and runs up to 2048.
        truncate_dim: Keep only the first features (Matryoshka); None keeps all.

    Attributes:
        prompts: Prompt by name; "document" is always there.
    """

    def __init__(
        self,
        model: NomicMoEModel,
        tokenizer: Tokenizer,
        settings: SentenceSettings,
        *,
        max_seq_length: int | None = None,
        truncate_dim: int | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.prompts = settings.prompts
        self.default_prompt_name = settings.default_prompt_name
        self._normalizes = settings.normalizes
        self.max_seq_length = settings.max_seq_length if max_seq_length is None else max_seq_length
        self.truncate_dim = self._check_dim(truncate_dim)
        self._warned_of_prefix = False

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path = DEFAULT_REPO,
        *,
        revision: str | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        backend: BackendName = "auto",
        batch_invariant: bool = False,
        max_seq_length: int | None = None,
        truncate_dim: int | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
    ) -> Encoder:
        """Load a checkpoint from a folder or the Hub.

        Args:
            name_or_path: A folder, or a repository name.
            revision: Branch, tag or commit; None pins the published commit of the default
                repository and follows the main branch of any other.
            device: None takes CUDA where there is one.
            dtype: "float32", "float16" or "bfloat16"; None means float32 on a CPU and float16 on
                CUDA.
            backend: "auto", "torch" or "triton".
            batch_invariant: Ask for vectors whose bits do not depend on the batch (triton only).
            max_seq_length: Longest text in tokens; None takes the repository's (512).
            truncate_dim: Keep only the first features (Matryoshka); None keeps all.
            local_files_only: Never reach for the network.
            token: Hub token, or True for the stored one.
            cache_dir: Hub cache folder.

        Raises:
            FileNotFoundError, PermissionError, ConnectionError: The checkpoint cannot be had.
            ValueError: Its files are unsupported or do not fit together, or an argument is wrong.
            RuntimeError: The backend or device cannot run here.
        """
        device = resolve_device(device)
        select_backend(backend, device, batch_invariant=batch_invariant)
        folder = locate(
            name_or_path,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        settings = read_sentence_settings(folder)
        model = NomicMoEModel.from_pretrained(
            folder, device=device, dtype=dtype, backend=backend, batch_invariant=batch_invariant
        )
        tokenizer = Tokenizer(folder / TOKENIZER_FILE, model.config.embedding_rows)
        return cls(
            model, tokenizer, settings, max_seq_length=max_seq_length, truncate_dim=truncate_dim
        )

    @property
    def max_seq_length(self) -> int:
        """Longest text in tokens, special tokens and prompt included; longer ones are cut."""
        return self._max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        most = self.model.config.n_positions
        if not isinstance(value, int) or not 3 <= value <= most:
            raise ValueError(f"max_seq_length is {value!r}, expected 3 to {most} tokens")
        self._max_seq_length = value

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The model's dtype; vectors are float32 whatever it is."""
        return self.model.dtype

    @property
    def backend(self) -> str:
        """The kernels in use, "torch" or "triton"."""
        return self.model.backend.name

    def get_embedding_dimension(self) -> int:
        """Features of a vector, after truncation."""
        return self.truncate_dim or self.model.config.n_embd

    def get_sentence_embedding_dimension(self) -> int:
        """Features of a vector, after truncation; SentenceTransformer's older name."""
        return self.get_embedding_dimension()

    def to(self, device: str | torch.device) -> Encoder:
        """Move the model to a device, keeping its dtype."""
        self.model.to(resolve_device(device))
        return self

    def encode(
        self,
        inputs: str | Sequence[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        output_value: Literal["sentence_embedding", "token_embeddings"] | None = (
            "sentence_embedding"
        ),
        precision: Precision = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: str | torch.device | None = None,
        normalize_embeddings: bool = True,
        truncate_dim: int | None = None,
        *,
        batch_tokens: int | None = None,
        on_too_long: OnTooLong = "warn",
        ranges: npt.ArrayLike | None = None,
    ) -> Any:
        """Embed texts.

        Args:
            inputs: One text or a sequence of them.
            prompt_name: Name of the prompt to put before each text, such as "query".
            prompt: The prompt itself; beats `prompt_name`.
            batch_size: Most texts of a batch; None leaves it to `batch_tokens`.
            show_progress_bar: True or False; None shows one on a terminal once work takes long.
            output_value: "sentence_embedding"; "token_embeddings" for each text's last hidden
                states; None for a dict per text with both, `input_ids` and `attention_mask`.
            precision: "float32", "int8", "uint8", "binary" or "ubinary"; see `nomoe.quantize`.
            convert_to_numpy: Return numpy arrays; if neither is asked for, a list of tensors.
            convert_to_tensor: Return one tensor on the encoder's device; beats `convert_to_numpy`.
            device: Move the model there first.
            normalize_embeddings: Make vectors unit norm, after truncation. False leaves them as
                SentenceTransformer would: unit norm before truncation, shorter after it.
            truncate_dim: Keep only the first features; None takes the encoder's setting.
            batch_tokens: Most tokens of a batch; None chooses by device.
            on_too_long: "warn" cuts texts over `max_seq_length` and logs how many; "error" refuses.
            ranges: (2, d) minimum and maximum of each feature for int8 and uint8, in place of the
                fixed range.

        Returns:
            float32 (n, d), or (d,) for a str and (0, d) for an empty sequence; quantised dtypes as
            `nomoe.quantize.quantize` says. For other values of `output_value` a list with one
            entry per text, or that entry for a str.

        Raises:
            TypeError: The input or one of its items is not text; the message says which.
            ValueError: An unknown prompt name, precision or dimension, text that is not valid
                Unicode, or a text too long under `on_too_long="error"`.
        """
        single = isinstance(inputs, str)
        texts = [inputs] if isinstance(inputs, str) else _as_list(inputs)
        check_texts(texts)
        prefix = self._prefix(prompt_name, prompt)
        dim = self._check_dim(truncate_dim) or self.get_embedding_dimension()
        check_precision(precision, dim, ranges)
        batch_tokens = self._check_batching(batch_size, batch_tokens)
        if on_too_long not in ("warn", "error"):
            raise ValueError(f"on_too_long is {on_too_long!r}, expected 'warn' or 'error'")
        if output_value not in ("sentence_embedding", "token_embeddings", None):
            raise ValueError(
                f"output_value is {output_value!r}, expected 'sentence_embedding', "
                "'token_embeddings' or None"
            )
        if output_value != "sentence_embedding" and precision != "float32":
            raise ValueError("precision applies to output_value='sentence_embedding' only")
        if device is not None and resolve_device(device) != self.device:
            self.to(device)

        prepared = self._tokenized(texts, prefix, batch_tokens, on_too_long)
        with _progress(show_progress_bar, len(texts)) as bar:
            if output_value != "sentence_embedding":
                rows = []
                for tokens in prepared:
                    batches = self._forward(tokens, batch_tokens, batch_size, bar)
                    rows += self._rows(tokens, batches, dim, normalize_embeddings, output_value)
                return rows[0] if single else rows
            parts = [
                self._vectors(tokens, batch_tokens, batch_size, bar, dim, normalize_embeddings)
                for tokens in prepared
            ]
        vectors = torch.cat(parts) if parts else torch.empty(0, dim, device=self.device)
        if precision != "float32":
            quantized = quantize(vectors.cpu().numpy(), precision, ranges)
            vectors = torch.from_numpy(quantized).to(self.device)
        result: Any = vectors
        if not convert_to_tensor:
            result = vectors.cpu().numpy() if convert_to_numpy else list(vectors)
        return result[0] if single else result

    def encode_query(self, inputs: str | Sequence[str], **options: Any) -> Any:
        """Embed queries: `encode` with the prompt "query" unless another one is given."""
        return self.encode(inputs, **self._with_prompt("query", options))

    def encode_document(self, inputs: str | Sequence[str], **options: Any) -> Any:
        """Embed documents: `encode` with the prompt "document" unless another one is given."""
        return self.encode(inputs, **self._with_prompt("document", options))

    def stream(
        self,
        inputs: Iterable[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        precision: Precision = "float32",
        normalize_embeddings: bool = True,
        truncate_dim: int | None = None,
        *,
        batch_tokens: int | None = None,
        on_too_long: OnTooLong = "warn",
        ranges: npt.ArrayLike | None = None,
        total: int | None = None,
    ) -> Iterator[Array]:
        """Embed an endless run of texts in bounded memory.

        Texts are read a window at a time, some tens of thousands of tokens; the next window is
        tokenised while this one runs. An exception from the iterable, or a bad text, ends the
        stream there; up to two windows before it are not returned.

        Args:
            inputs: Any iterable of texts. The others are as for `encode`.
            prompt_name: As `encode`.
            prompt: As `encode`.
            batch_size: As `encode`.
            show_progress_bar: As `encode`.
            precision: As `encode`.
            normalize_embeddings: As `encode`.
            truncate_dim: As `encode`.
            batch_tokens: As `encode`.
            on_too_long: As `encode`; "error" refuses a window before its forward.
            ranges: As `encode`.
            total: Number of texts, if known, for the progress bar.

        Returns:
            An iterator of (m, d) arrays, in input order; m varies.

        Raises:
            TypeError: `inputs` is a str or bytes, or a text is not a str (while iterating).
            ValueError: As `encode`; for a bad text while iterating.
        """
        if isinstance(inputs, str | bytes):
            raise TypeError(f"stream takes an iterable of texts, not one {type(inputs).__name__}")
        prefix = self._prefix(prompt_name, prompt)
        dim = self._check_dim(truncate_dim) or self.get_embedding_dimension()
        check_precision(precision, dim, ranges)
        batch_tokens = self._check_batching(batch_size, batch_tokens)
        if on_too_long not in ("warn", "error"):
            raise ValueError(f"on_too_long is {on_too_long!r}, expected 'warn' or 'error'")
        texts = iter(inputs)

        def generate() -> Iterator[Array]:
            with _progress(show_progress_bar, total) as bar:
                for tokens in self._tokenized(texts, prefix, batch_tokens, on_too_long):
                    vectors = self._vectors(
                        tokens, batch_tokens, batch_size, bar, dim, normalize_embeddings
                    )
                    yield quantize(vectors.cpu().numpy(), precision, ranges)

        return generate()

    def route(
        self, inputs: str | Sequence[str], prompt_name: str | None = None, prompt: str | None = None
    ) -> Routes:
        """Tell which experts each token of each text goes to.

        Args:
            inputs: One text or a sequence of them; one text gives lists of one entry.
            prompt_name: As `encode`.
            prompt: As `encode`.

        Raises:
            TypeError, ValueError: As `encode`.
        """
        texts = [inputs] if isinstance(inputs, str) else _as_list(inputs)
        check_texts(texts)
        prefix = self._prefix(prompt_name, prompt)
        batch_tokens = self._check_batching(None, None)
        config = self.model.config
        counts = np.zeros((len(config.moe_layers), config.num_experts), dtype=np.int64)
        tokens_of: list[list[str]] = []
        experts_of: list[npt.NDArray[np.int64]] = []
        weights_of: list[npt.NDArray[np.float32]] = []
        for tokens in self._tokenized(texts, prefix, batch_tokens, "warn"):
            experts: dict[int, npt.NDArray[np.int64]] = {}
            weights: dict[int, npt.NDArray[np.float32]] = {}
            lengths = [len(ids) for ids in tokens.ids]
            for positions in make_batches(lengths, batch_tokens, None):
                batch_lengths = [lengths[position] for position in positions]
                with torch.no_grad():
                    output = self.model.forward_packed(
                        self._ids(tokens, positions), batch_lengths, output_routing=True
                    )
                assert output.router_experts is not None
                assert output.router_weights is not None
                experts_TMK = torch.stack(output.router_experts, dim=1).cpu()
                weights_TMK = torch.stack(output.router_weights, dim=1).cpu()
                for layer in range(len(counts)):
                    counts[layer] += np.bincount(
                        experts_TMK[:, layer].flatten().numpy(), minlength=config.num_experts
                    )
                for position, e, w in zip(
                    positions,
                    experts_TMK.split(batch_lengths),
                    weights_TMK.split(batch_lengths),
                    strict=True,
                ):
                    experts[position], weights[position] = e.numpy().copy(), w.numpy().copy()
            for position, ids in enumerate(tokens.ids):
                tokens_of.append(self.tokenizer.pieces(ids))
                experts_of.append(experts[position])
                weights_of.append(weights[position])
        return Routes(tokens_of, experts_of, weights_of, counts, config.moe_layers)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Cosine similarity of all pairs.

        Args:
            embeddings1: (n, d) or (d,), array or tensor, any dtype.
            embeddings2: (m, d) or (d,).

        Returns:
            (n, m), float32; a single vector counts as one row.

        Raises:
            ValueError: Other shapes.
        """
        first, second = _unit_rows(embeddings1, embeddings2)
        return first @ second.T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Cosine similarity of row i of the one with row i of the other.

        Args:
            embeddings1: (n, d) or (d,), array or tensor, any dtype.
            embeddings2: As many rows.

        Returns:
            (n,), float32.

        Raises:
            ValueError: Other shapes.
        """
        first, second = _unit_rows(embeddings1, embeddings2)
        if len(first) != len(second):
            raise ValueError(f"{len(first)} rows cannot be paired with {len(second)}")
        return (first * second).sum(dim=1)

    def _with_prompt(self, name: str, options: dict[str, Any]) -> dict[str, Any]:
        if options.get("prompt") is None and options.get("prompt_name") is None:
            return options | {"prompt_name": name}
        return options

    def _prefix(self, prompt_name: str | None, prompt: str | None) -> str | None:
        """Return the prompt to use, or None where the caller named none."""
        if prompt is not None:
            if not isinstance(prompt, str):
                raise TypeError(f"prompt is {type(prompt).__name__}, expected str")
            check_texts([prompt])
            return prompt
        name = self.default_prompt_name if prompt_name is None else prompt_name
        if name is None:
            return None
        if name not in self.prompts:
            raise ValueError(
                f"no prompt is named {name!r}; known: {', '.join(sorted(self.prompts))}"
            )
        return self.prompts[name]

    def _check_dim(self, dim: int | None) -> int | None:
        most = self.model.config.n_embd
        if dim is not None and (
            not isinstance(dim, int) or isinstance(dim, bool) or not 1 <= dim <= most
        ):
            raise ValueError(f"truncate_dim is {dim!r}, expected 1 to {most}")
        return dim

    def _check_batching(self, batch_size: int | None, batch_tokens: int | None) -> int:
        for name, value in (("batch_size", batch_size), ("batch_tokens", batch_tokens)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is {value!r}, expected at least 1")
        return batch_tokens or _BATCH_TOKENS.get(self.device.type, _BATCH_TOKENS["cpu"])

    def _tokenized(
        self, texts: Iterable[str], prefix: str | None, batch_tokens: int, on_too_long: OnTooLong
    ) -> Iterator[Tokens]:
        """Yield windows of tokenised texts, warning or refusing as asked."""
        limit = self.max_seq_length
        known = tuple(sorted({prompt for prompt in self.prompts.values() if prompt}))
        seen = cut = 0

        def tokenize(window: list[str]) -> Tokens:
            if prefix is None:
                self._warn_of_prefix(window, known)
                return self.tokenizer(window, limit)
            return self.tokenizer([prefix + text for text in window], limit)

        def checked() -> Iterator[Tokens]:
            nonlocal seen, cut
            for tokens in tokenize_ahead(windows(texts, batch_tokens), tokenize):
                if tokens.cut and on_too_long == "error":
                    position, length = tokens.cut[0]
                    raise ValueError(
                        f"text {seen + position} has {length} tokens with its prompt, more than "
                        f"max_seq_length={limit}"
                    )
                seen += len(tokens.ids)
                cut += len(tokens.cut)
                yield tokens

        # to refuse before any compute, everything has to be tokenised first
        refuse_first = on_too_long == "error" and isinstance(texts, list)
        try:
            yield from list(checked()) if refuse_first else checked()
        finally:
            if cut:
                logger.warning(
                    "%d of %d texts were longer than max_seq_length=%d tokens and were cut",
                    cut,
                    seen,
                    limit,
                )

    def _warn_of_prefix(self, window: list[str], known: tuple[str, ...]) -> None:
        if not self._warned_of_prefix and not all(text.startswith(known) for text in window):
            self._warned_of_prefix = True
            logger.warning(
                "texts are embedded without a prompt, and the model was trained with one on every "
                "text: use encode_query or encode_document, or prompt_name= one of %s",
                ", ".join(sorted(self.prompts)),
            )

    def _ids(self, tokens: Tokens, positions: list[int]) -> Tensor:
        ids = list(chain.from_iterable(tokens.ids[position] for position in positions))
        return torch.tensor(ids, dtype=torch.int64).to(self.device)

    def _forward(
        self, tokens: Tokens, batch_tokens: int, batch_size: int | None, bar: tqdm[Any]
    ) -> Iterator[_Batch]:
        lengths = [len(ids) for ids in tokens.ids]
        for positions in make_batches(lengths, batch_tokens, batch_size):
            batch_lengths = [lengths[position] for position in positions]
            with torch.no_grad():
                hidden_TD = self.model.forward_packed(
                    self._ids(tokens, positions), batch_lengths
                ).last_hidden_state
                pooled_BD = self.model.backend.ops.mean_pool(hidden_TD, batch_lengths)
            yield _Batch(positions, batch_lengths, hidden_TD, pooled_BD)
            bar.update(len(positions))

    def _finish(self, pooled_BD: Tensor, dim: int, normalize: bool) -> Tensor:
        """Truncate and normalise, (B, dim)."""
        if not normalize and self._normalizes:
            pooled_BD = F.normalize(pooled_BD, dim=1)
        vectors = pooled_BD[:, :dim]
        return F.normalize(vectors, dim=1) if normalize else vectors

    def _vectors(
        self,
        tokens: Tokens,
        batch_tokens: int,
        batch_size: int | None,
        bar: tqdm[Any],
        dim: int,
        normalize: bool,
    ) -> Tensor:
        """Embed a window; (m, dim) float32 on the model's device, in the window's order."""
        vectors = torch.empty(len(tokens.ids), dim, device=self.device)
        for batch in self._forward(tokens, batch_tokens, batch_size, bar):
            vectors[batch.positions] = self._finish(batch.pooled_BD, dim, normalize)
        return vectors

    def _rows(
        self,
        tokens: Tokens,
        batches: Iterator[_Batch],
        dim: int,
        normalize: bool,
        output_value: Literal["token_embeddings"] | None,
    ) -> list[Any]:
        """Embed a window token by token: an entry per text, in the window's order."""
        rows: list[Any] = [None] * len(tokens.ids)
        for batch in batches:
            vectors = self._finish(batch.pooled_BD, dim, normalize)
            parts = batch.hidden_TD.float().split(batch.lengths)
            for position, part, vector in zip(batch.positions, parts, vectors, strict=True):
                if output_value == "token_embeddings":
                    # a copy, or keeping one text would keep its whole batch
                    rows[position] = part.clone()
                    continue
                ids = torch.tensor(tokens.ids[position])
                rows[position] = {
                    "input_ids": ids,
                    "attention_mask": torch.ones_like(ids),
                    "token_embeddings": part.clone(),
                    "sentence_embedding": vector.clone(),
                }
        return rows


def _as_list(inputs: Sequence[str]) -> list[str]:
    """Accept any sequence of texts; refuse what has no order or no length."""
    if isinstance(inputs, bytes | bytearray):
        raise TypeError(f"inputs is {type(inputs).__name__}, expected str or a sequence of str")
    if not (hasattr(inputs, "__len__") and hasattr(inputs, "__getitem__")) or isinstance(
        inputs, dict
    ):
        raise TypeError(
            f"inputs is {type(inputs).__name__}, expected str or a sequence of str; stream() takes "
            "any iterable"
        )
    return list(inputs)


def _unit_rows(embeddings1: Any, embeddings2: Any) -> tuple[Tensor, Tensor]:
    rows = []
    for given in (embeddings1, embeddings2):
        tensor = torch.as_tensor(given).float()
        if tensor.dim() == 1:
            tensor = tensor[None]
        if tensor.dim() != 2:
            raise ValueError(f"embeddings are {tuple(tensor.shape)}, expected (d,) or (n, d)")
        rows.append(F.normalize(tensor, dim=1))
    first, second = rows
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"embeddings have {first.shape[1]} and {second.shape[1]} features")
    return first, second.to(first.device)


def _progress(show: bool | None, total: int | None) -> tqdm[Any]:
    # None: tqdm itself keeps silent where stderr is no terminal
    disable = None if show is None else not show
    delay = _BAR_DELAY_S if show is None else 0
    return tqdm(total=total, unit=" texts", desc="embedding", disable=disable, delay=delay)
