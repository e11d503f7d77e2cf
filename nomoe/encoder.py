"""Texts in, vectors out: the class most people need."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm.auto import tqdm

from . import pipeline, similarity
from .arguments import (
    check_count,
    check_dim,
    check_length,
    choose_prompt,
    resolve_device,
    resolve_dtype,
)
from .backends import BackendName, select_backend
from .checkpoint import CONFIG_FILE, DEFAULT_REPO, TOKENIZER_FILE, locate
from .config import NomicMoEConfig
from .engine import Engine, Pooling, token_budget
from .model import NomicMoEModel
from .pipeline import Plan
from .quantize import Precision, check_precision, quantize
from .repository import SentenceSettings, read_sentence_settings
from .routes import Routes
from .tokenizer import Tokenizer, check_texts, is_table

logger = logging.getLogger(__name__)

OnTooLong = Literal["warn", "error"]
Array = npt.NDArray[Any]

# a call of no more tokens than this does not look at the memory first
_FEW_TOKENS = 4096


class Encoder:
    """Embeds texts with nomic-embed-text-v2-moe.

    The model was trained with a prefix on every text; `encode_query` and `encode_document` add the
    right one. Parameters of `encode` have SentenceTransformer's names and order.

    Args:
        model: The encoder.
        tokenizer: Its tokenizer.
        settings: What its repository says about prompts, length, dimension and pooling.
        max_seq_length: Longest text in tokens, special tokens and prompt included; None takes the
            repository's (512). The model was trained at 512 and runs up to 2048.
        truncate_dim: Keep only the first features (Matryoshka); None takes the repository's (all).

    Attributes:
        prompts: Prompt by name; where the repository has "passage", "document" is there too.
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
        self._engine_of_model = Engine(model)
        self.tokenizer = tokenizer
        self.prompts = settings.prompts
        self.default_prompt_name = settings.default_prompt_name
        self._normalizes = settings.normalizes
        self.max_seq_length = settings.max_seq_length if max_seq_length is None else max_seq_length
        self.truncate_dim = settings.truncate_dim if truncate_dim is None else truncate_dim
        self._noted_missing_prompt = False

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
            truncate_dim: Keep only the first features (Matryoshka); None takes the repository's
                (all).
            local_files_only: Never reach for the network.
            token: Hub token, or True for the stored one.
            cache_dir: Hub cache folder.

        Raises:
            FileNotFoundError, PermissionError, ConnectionError: The checkpoint cannot be had.
            ValueError: Its files are unsupported or do not fit together, or an argument is wrong.
            RuntimeError: The backend or device cannot run here.
        """
        device = resolve_device(device)
        dtype = resolve_dtype(dtype, device)
        select_backend(backend, device, dtype=dtype, batch_invariant=batch_invariant)
        folder = locate(
            name_or_path,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        # the small files first, so that nothing is found wrong only after the weights are read
        config = NomicMoEConfig.from_json(folder / CONFIG_FILE)
        settings = read_sentence_settings(folder, config.n_positions)
        if max_seq_length is None:
            max_seq_length = settings.max_seq_length
        if truncate_dim is None:
            truncate_dim = settings.truncate_dim
        check_length(max_seq_length, config)
        if truncate_dim is not None:
            check_dim("truncate_dim", truncate_dim, config)
        tokenizer = Tokenizer(folder / TOKENIZER_FILE, config.embedding_rows)
        model = NomicMoEModel.from_pretrained(
            folder, device=device, dtype=dtype, backend=backend, batch_invariant=batch_invariant
        )
        return cls(
            model, tokenizer, settings, max_seq_length=max_seq_length, truncate_dim=truncate_dim
        )

    @property
    def max_seq_length(self) -> int:
        """Longest text in tokens, special tokens and prompt included; longer ones are cut.

        Settable; ValueError where the model has no such length.
        """
        return self._max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        self._max_seq_length = check_length(value, self.model.config)

    @property
    def truncate_dim(self) -> int | None:
        """Features to keep (Matryoshka); None keeps all. Settable; ValueError outside 1..d."""
        return self._truncate_dim

    @truncate_dim.setter
    def truncate_dim(self, value: int | None) -> None:
        if value is not None:
            value = check_dim("truncate_dim", value, self.model.config)
        self._truncate_dim = value

    def __repr__(self) -> str:
        return (
            f"Encoder(dimension={self.get_embedding_dimension()}, "
            f"max_seq_length={self.max_seq_length}, device={str(self.device)!r}, "
            f"dtype={self.dtype}, backend={self.backend!r})"
        )

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
        """Move the model to a device, keeping its dtype.

        Raises:
            ValueError: Not the name of a device that computes.
            RuntimeError: The device, or the backend on it, cannot run here.
        """
        device = resolve_device(device)
        # with its number, which "cuda" has not
        if torch.empty(0, device=device).device != self.device:
            # what it holds there would be in the way
            self._engine.relieve()
        self.model.to(device)
        return self

    @property
    def _engine(self) -> Engine:
        if self._engine_of_model.model is not self.model:
            self._engine_of_model = Engine(self.model)
        return self._engine_of_model

    def warmup(
        self, texts: int = 1, *, normalize_embeddings: bool = True, truncate_dim: int | None = None
    ) -> Encoder:
        """Do now what the first calls would otherwise wait for.

        On CUDA with the triton backend that is compiling kernels, which takes seconds to a minute
        where Triton's cache on disk has none, and recording a CUDA graph for every bucket that a
        batch of so many texts can meet; batches of few tokens then replay them. A call that takes
        more than one batch has smaller ones among them, which may meet others. Without `warmup` a
        bucket is recorded when it is met for the second time. Elsewhere one small batch runs.

        Args:
            texts: Texts of a call.
            normalize_embeddings: As the calls will have it.
            truncate_dim: As the calls will have it.

        Returns:
            The encoder.

        Raises:
            ValueError: `texts` is below 1, or `truncate_dim` outside 1..d.
        """
        texts = check_count("texts", texts)
        plan = self._plan(None, "", truncate_dim=truncate_dim, normalize=normalize_embeddings)
        self._engine.prepare(texts, self.max_seq_length, plan.pooling)
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
                states, a float32 tensor (L, D) on the encoder's device; None for a dict per text
                with both, `input_ids` and `attention_mask`.
            precision: "float32", "int8", "uint8", "binary" or "ubinary"; see `nomoe.quantize`.
            convert_to_numpy: Return numpy arrays; if neither is asked for, a list of tensors.
            convert_to_tensor: Return one tensor on the encoder's device; beats `convert_to_numpy`.
            device: Move the model there first.
            normalize_embeddings: Make vectors unit norm, after truncation. False leaves them as
                SentenceTransformer would: unit norm before truncation, shorter after it.
            truncate_dim: Keep only the first features; None takes the encoder's setting.
            batch_tokens: Most tokens of a batch; None chooses by device and its free memory. On
                CUDA a batch that does not fit is halved, and the rest of the call kept to that
                size.
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
                Unicode, a text too long under `on_too_long="error"`, or vectors that are not finite
                under a precision of integers.
            RuntimeError: `device` cannot be used here.
            torch.OutOfMemoryError: On CUDA, a text does not fit in memory even by itself.
        """
        texts = _as_list(inputs)
        plan = self._plan(
            prompt_name,
            prompt,
            truncate_dim=truncate_dim,
            normalize=normalize_embeddings,
            precision=precision,
            ranges=ranges,
            batch_tokens=batch_tokens,
            batch_size=batch_size,
            on_too_long=on_too_long,
            texts=texts,
        )
        if output_value not in ("sentence_embedding", "token_embeddings", None):
            raise ValueError(
                f"output_value is {output_value!r}, expected 'sentence_embedding', "
                "'token_embeddings' or None"
            )
        if output_value != "sentence_embedding" and precision != "float32":
            raise ValueError("precision applies to output_value='sentence_embedding' only")
        if device is not None:
            self.to(device)
            if batch_tokens is None:
                plan = plan._replace(batch_tokens=self._budget(plan.prefix, texts))
        if prompt_name is None and prompt is None:
            texts = list(self._noting_missing_prompt(texts))

        single = isinstance(inputs, str)
        windows = pipeline.tokenized(self.tokenizer, texts, plan)
        if plan.refuse_long:
            # to refuse before any compute, everything is tokenised first
            windows = iter(list(windows))
        with _bar(show_progress_bar, len(texts)) as bar:
            if output_value != "sentence_embedding":
                rows: list[Any] = []
                for of_window in pipeline.embed_tokens(self._engine, windows, plan, bar):
                    rows += of_window
                if output_value == "token_embeddings":
                    rows = [row["token_embeddings"] for row in rows]
                return rows[0] if single else rows
            to_host = precision != "float32" or (convert_to_numpy and not convert_to_tensor)
            parts = pipeline.embed(self._engine, windows, plan, bar, to_host=to_host)
            vectors = _gather(
                parts, (len(texts), plan.pooling.dim), "cpu" if to_host else self.device
            )
        if precision != "float32":
            vectors = torch.from_numpy(quantize(vectors.numpy(), precision, ranges))
        result: Any
        if convert_to_numpy and not convert_to_tensor:
            result = vectors.numpy()
        else:
            vectors = vectors.to(self.device)
            result = vectors if convert_to_tensor else list(vectors)
        return result[0] if single else result

    def encode_query(
        self,
        inputs: str | Sequence[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        *arguments: Any,
        **options: Any,
    ) -> Any:
        """Embed queries: `encode`, its parameters too, with the prompt "query" by default."""
        name = "query" if prompt_name is None else prompt_name
        return self.encode(inputs, name, prompt, *arguments, **options)

    def encode_document(
        self,
        inputs: str | Sequence[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        *arguments: Any,
        **options: Any,
    ) -> Any:
        """Embed documents: `encode`, its parameters too, with the prompt "document" by default."""
        name = "document" if prompt_name is None else prompt_name
        return self.encode(inputs, name, prompt, *arguments, **options)

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

        Texts are read a window at a time, of some four batches on a CPU and one on a GPU; the next
        window is tokenised while this one runs. An exception from the iterable, or a bad text, ends
        the stream there; up to three windows before it are not returned.

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
            TypeError: `inputs` is one text, a mapping or a table, or a text is not a str (while
                iterating).
            ValueError: As `encode`; for a bad text while iterating.
        """
        if isinstance(inputs, str | bytes | bytearray) or is_table(inputs):
            raise TypeError(f"stream takes an iterable of texts, not one {type(inputs).__name__}")
        plan = self._plan(
            prompt_name,
            prompt,
            truncate_dim=truncate_dim,
            normalize=normalize_embeddings,
            precision=precision,
            ranges=ranges,
            batch_tokens=batch_tokens,
            batch_size=batch_size,
            on_too_long=on_too_long,
        )
        texts = iter(inputs)
        if prompt_name is None and prompt is None:
            texts = self._noting_missing_prompt(texts)

        def generate() -> Iterator[Array]:
            with pipeline.progress(show_progress_bar, total) as bar:
                windows = pipeline.tokenized(self.tokenizer, texts, plan)
                for vectors in pipeline.embed(self._engine, windows, plan, bar, to_host=True):
                    yield quantize(vectors.numpy(), precision, ranges)

        return generate()

    def route(
        self,
        inputs: str | Sequence[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        show_progress_bar: bool | None = None,
    ) -> Routes:
        """Tell which experts each token of each text goes to.

        Args:
            inputs: One text or a sequence of them; one text gives lists of one entry.
            prompt_name: As `encode`.
            prompt: As `encode`.
            show_progress_bar: As `encode`.

        Raises:
            TypeError, ValueError: As `encode`.
        """
        texts = _as_list(inputs)
        plan = self._plan(prompt_name, prompt, texts=texts)
        config = self.model.config
        pieces: list[list[str]] = []
        experts: list[npt.NDArray[np.int64]] = []
        weights: list[npt.NDArray[np.float32]] = []
        with pipeline.progress(show_progress_bar, len(texts)) as bar:
            windows = pipeline.tokenized(self.tokenizer, texts, plan)
            for tokens, routed in pipeline.route(self._engine, windows, plan, bar):
                pieces += [self.tokenizer.pieces(ids) for ids in tokens.ids]
                experts += [of_text.numpy() for of_text, _ in routed]
                weights += [by_text.numpy() for _, by_text in routed]
        counts = np.zeros((len(config.moe_layers), config.num_experts), dtype=np.int64)
        for one in experts:
            for layer, count in enumerate(counts):
                count += np.bincount(one[:, layer].ravel(), minlength=config.num_experts)
        return Routes(pieces, experts, weights, counts, config.moe_layers)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Cosine similarity of all pairs, (n, m) float32; see `nomoe.similarity.cosine`."""
        return similarity.cosine(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Cosine similarity row by row, (n,) float32; see `nomoe.similarity.cosine_pairwise`."""
        return similarity.cosine_pairwise(embeddings1, embeddings2)

    def _noting_missing_prompt(self, texts: Iterable[str]) -> Iterator[str]:
        """Pass texts through; log once per encoder if one carries none of the trained prefixes."""
        known = tuple(prompt for prompt in self.prompts.values() if prompt)
        for text in texts:
            if (
                not self._noted_missing_prompt
                and self.default_prompt_name is None
                and isinstance(text, str)
                and not text.startswith(known)
            ):
                self._noted_missing_prompt = True
                logger.warning(
                    "texts are embedded without a prompt, and the model was trained with one on "
                    "every text: use encode_query or encode_document, or prompt_name= one of %s",
                    ", ".join(sorted(self.prompts)),
                )
            yield text

    def _plan(
        self,
        prompt_name: str | None,
        prompt: str | None,
        *,
        truncate_dim: int | None = None,
        normalize: bool = True,
        precision: Precision = "float32",
        ranges: npt.ArrayLike | None = None,
        batch_tokens: int | None = None,
        batch_size: int | None = None,
        on_too_long: OnTooLong = "warn",
        texts: list[str] | None = None,
    ) -> Plan:
        """Check a call's settings before anything is computed; `texts` is None where unknown."""
        prefix = choose_prompt(self.prompts, self.default_prompt_name, prompt_name, prompt)
        dim = self.get_embedding_dimension()
        if truncate_dim is not None:
            dim = check_dim("truncate_dim", truncate_dim, self.model.config)
        check_precision(precision, dim, ranges)
        unit = normalize or (self._normalizes and dim == self.model.config.n_embd)
        if precision in ("int8", "uint8") and ranges is None and not unit:
            raise ValueError(
                f"the fixed range of {precision} is for unit vectors; give ranges= or leave "
                "normalize_embeddings on"
            )
        if batch_size is not None:
            batch_size = check_count("batch_size", batch_size)
        if batch_tokens is not None:
            batch_tokens = check_count("batch_tokens", batch_tokens)
        if on_too_long not in ("warn", "error"):
            raise ValueError(f"on_too_long is {on_too_long!r}, expected 'warn' or 'error'")
        if batch_tokens is None:
            batch_tokens = self._budget(prefix, texts)
        return Plan(
            prefix=prefix,
            max_length=self.max_seq_length,
            refuse_long=on_too_long == "error",
            batch_tokens=batch_tokens,
            batch_size=batch_size,
            pooling=Pooling(dim, self._normalizes and not normalize, normalize),
        )

    def _budget(self, prefix: str, texts: list[str] | None) -> int:
        """Most tokens of a batch of a call with such texts."""
        if texts is None:
            return token_budget(self.model)
        # no text has more of them, and hardly one as many as it has characters, with two around it
        tokens = len(texts) * self.max_seq_length
        if tokens > _FEW_TOKENS:
            tokens = sum(map(len, texts)) + len(texts) * (len(prefix) + 2)
        return _FEW_TOKENS if tokens <= _FEW_TOKENS else token_budget(self.model)


def _gather(
    parts: Iterator[torch.Tensor], shape: tuple[int, int], device: str | torch.device
) -> torch.Tensor:
    """Put parts end to end as they come: meanwhile a GPU is at the next ones."""
    first = next(parts, None)
    if first is not None and len(first) == shape[0] and next(parts, None) is None:
        return first
    whole = torch.empty(shape, dtype=torch.float32, device=device)
    start = 0
    for part in chain([] if first is None else [first], parts):
        whole[start : start + len(part)] = part
        start += len(part)
    return whole


def _bar(show: bool | None, texts: int) -> AbstractContextManager[tqdm[Any] | None]:
    """A progress bar of a call, or none where it could not be seen; making one takes a while."""
    if show is False or (show is None and texts == 1):
        return nullcontext()
    return pipeline.progress(show, texts)


def _as_list(inputs: str | Sequence[str]) -> list[str]:
    """Make a checked list of one text or any sequence of texts.

    Raises:
        TypeError: Not a sequence (a set has no order, a generator no length), or not of texts.
        ValueError: A text is not valid Unicode.
    """
    if isinstance(inputs, str):
        inputs = [inputs]
    sequence = hasattr(inputs, "__len__") and hasattr(inputs, "__getitem__")
    # an array of no dimension has both, and no length
    sequence = sequence and getattr(inputs, "ndim", 1) > 0
    if not sequence or is_table(inputs) or isinstance(inputs, bytes | bytearray):
        hint = "stream() takes any iterable of str"
        if is_table(inputs):
            hint = "of a table, pass one column"
        raise TypeError(
            f"inputs is {type(inputs).__name__}, expected a str or a sequence of str; {hint}"
        )
    texts = list(inputs)
    check_texts(texts)
    return texts
