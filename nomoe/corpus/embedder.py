"""From texts to the vectors of an output: a loaded model with settings that do not change.

The bits of a vector depend on the batch it ran in. Here a batch depends on its window alone and a
window on its shard, never on free memory or on what ran before; only a batch that does not fit in
memory and is halved breaks this.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import tokenizers
import torch

from .. import pipeline
from ..arguments import (
    check_count,
    check_dim,
    check_length,
    choose_prompt,
    resolve_device,
    resolve_dtype,
)
from ..backends import BackendName, select_backend
from ..batching import tokenize_ahead
from ..checkpoint import CONFIG_FILE, DEFAULT_REPO, TOKENIZER_FILE, locate
from ..config import NomicMoEConfig
from ..engine import BATCH_TOKENS, Engine, Pooling
from ..model import NomicMoEModel
from ..quantize import Precision as EncoderPrecision
from ..quantize import check_precision, quantize
from ..repository import read_sentence_settings
from ..tokenizer import Tokenizer, Tokens

# how vectors are stored: what `Encoder.encode` gives, and float16
Precision = Literal["float32", "float16", "int8", "uint8", "binary", "ubinary"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

# Characters after which a text is cut before it is tokenised, for each token that is kept. Unigram
# pieces are up to 16 characters long, and real text has 2 to 5 a token; a text in which so many
# characters make no more tokens than are kept is tokenised whole.
_CHARACTERS_PER_TOKEN = 64
# two of the common ideographs, which no normaliser changes or joins with what stands beside them
_IDEOGRAPHS = re.compile("[\u4e00-\u9fff]{2}")


@dataclass(frozen=True)
class ModelSettings:
    """A model and what is made with it, checked and complete; it can be sent to a process."""

    folder: Path
    dtype: str
    backend: BackendName
    # put before every text
    prompt: str
    # longest text in tokens, prompt and special tokens included
    max_seq_length: int
    # features of a vector, how they are stored, and most tokens of a batch
    dim: int
    precision: Precision
    batch_tokens: int

    @property
    def stored_dim(self) -> int:
        """Numbers of a vector as it is stored."""
        return self.dim // 8 if self.precision.endswith("binary") else self.dim

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        """Type of those numbers."""
        kinds = {"ubinary": "uint8", "binary": "int8"}
        return np.dtype(kinds.get(self.precision, self.precision))

    def describe(self) -> dict[str, Any]:
        """Return all that decides a vector but the files of the checkpoint."""
        values = asdict(self)
        del values["folder"]
        return values


def resolve_settings(
    model: str | Path = DEFAULT_REPO,
    *,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    backend: BackendName = "auto",
    prompt_name: str | None = "document",
    prompt: str | None = None,
    max_seq_length: int | None = None,
    dim: int | None = None,
    precision: Precision = "float32",
    batch_tokens: int | None = None,
    local_files_only: bool = False,
) -> ModelSettings:
    """Check settings with the small files of a checkpoint, before its weights are read.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError: The checkpoint cannot be had.
        TypeError: `prompt` is not a str.
        ValueError: An argument is wrong, or the files are unsupported.
        RuntimeError: The backend or device cannot run here.
    """
    device = resolve_device(device)
    dtype = resolve_dtype(dtype, device)
    chosen = select_backend(backend, device, dtype=dtype)
    folder = locate(model, revision=revision, local_files_only=local_files_only)
    config = NomicMoEConfig.from_json(folder / CONFIG_FILE)
    sentence = read_sentence_settings(folder, config.n_positions)
    prompt = choose_prompt(sentence.prompts, sentence.default_prompt_name, prompt_name, prompt)
    max_seq_length = sentence.max_seq_length if max_seq_length is None else max_seq_length
    max_seq_length = check_length(max_seq_length, config)
    dim = (sentence.truncate_dim or config.n_embd) if dim is None else dim
    dim = check_dim("dim", dim, config)
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}, expected one of {', '.join(PRECISIONS)}")
    check_precision(_encoder_precision(precision), dim, None)
    if batch_tokens is None:
        batch_tokens = BATCH_TOKENS.get(device.type, BATCH_TOKENS["cpu"])
    batch_tokens = check_count("batch_tokens", batch_tokens)
    return ModelSettings(
        folder=folder,
        dtype=str(dtype).removeprefix("torch."),
        backend=chosen.name,
        prompt=prompt,
        max_seq_length=max_seq_length,
        dim=dim,
        precision=precision,
        batch_tokens=batch_tokens,
    )


class WindowTokenizer:
    """The tokenizer half of an embedder, which needs no weights."""

    def __init__(self, settings: ModelSettings) -> None:
        config = NomicMoEConfig.from_json(settings.folder / CONFIG_FILE)
        self._tokenizer = Tokenizer(settings.folder / TOKENIZER_FILE, config.embedding_rows)
        self._settings = settings

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """Tokenise texts with the prompt before each, cut to the longest length."""
        prompt, longest = self._settings.prompt, self._settings.max_seq_length
        clipped = [self._clip(text) for text in texts]
        tokens = self._tokenizer([prompt + text for text in clipped], longest)
        is_cut = {position for position, _ in tokens.cut}
        # clipped, and yet not too long: mostly white space, perhaps
        again = [
            position
            for position, (text, short) in enumerate(zip(texts, clipped, strict=True))
            if len(short) < len(text) and position not in is_cut
        ]
        if again:
            whole = self._tokenizer([prompt + texts[position] for position in again], longest)
            for position, ids in zip(again, whole.ids, strict=True):
                tokens.ids[position] = ids
            tokens.cut.extend((again[position], length) for position, length in whole.cut)
        return tokens

    def _clip(self, text: str) -> str:
        """Cut a very long text where the tokens that are kept of it cannot change.

        A word is tokenised by itself, so that what follows a space changes nothing before it. Nor
        does what follows the first of two ideographs that no piece of the vocabulary has side by
        side: every division into pieces has a border there, so the best one does, and what is best
        before it is so by itself. Ten million characters otherwise take seconds and half a
        gigabyte, of which 512 tokens are kept.
        """
        most = _CHARACTERS_PER_TOKEN * self._settings.max_seq_length
        if len(text) <= most:
            return text
        space = text.rfind(" ", most // 2, most)
        if space >= 0:
            return text[:space]
        if _IDEOGRAPHS.search(text, most // 2, most) and self._is_unigram:
            for end in range(most - 1, most // 2, -1):
                pair = text[end - 1 : end + 1]
                if _IDEOGRAPHS.fullmatch(pair) and pair not in self._joined:
                    return text[:end]
        return text

    @property
    def _is_unigram(self) -> bool:
        return isinstance(self._tokenizer.backend.model, tokenizers.models.Unigram)

    @cached_property
    def _joined(self) -> frozenset[str]:
        """Pairs of ideographs that stand side by side in some piece of the vocabulary."""
        pieces = self._tokenizer.backend.get_vocab(with_added_tokens=True)
        return frozenset(
            piece[start : start + 2]
            for piece in pieces
            for start in range(len(piece) - 1)
            if _IDEOGRAPHS.match(piece, start)
        )


class Embedder:
    """A loaded model that embeds windows of tokens.

    Args:
        settings: Checked.
        device: Where to run.

    Raises:
        FileNotFoundError, ValueError: As `NomicMoEModel.from_pretrained`.
    """

    def __init__(self, settings: ModelSettings, device: str | torch.device | None = None) -> None:
        self.settings = settings
        self.tokenize = WindowTokenizer(settings)
        model = NomicMoEModel.from_pretrained(
            settings.folder,
            device=resolve_device(device),
            dtype=resolve_dtype(settings.dtype, resolve_device(device)),
            backend=settings.backend,
        )
        self.config = model.config
        # a batch that replays a recording may differ in its last bits from one that runs as it is,
        # and which of them do depends on what ran before
        self._engine = Engine(model, most_recordings=0)
        self._plan = pipeline.Plan(
            prefix=settings.prompt,
            max_length=settings.max_seq_length,
            refuse_long=False,
            batch_tokens=settings.batch_tokens,
            batch_size=None,
            pooling=Pooling(settings.dim, normalize_before=False, normalize_after=True),
        )

    def embed(self, windows: Iterable[Tokens]) -> Iterator[npt.NDArray[Any]]:
        """Embed windows, none of them empty.

        Yields:
            (m, d) of the stored dtype for each window, in its order.
        """
        with pipeline.progress(False, None) as bar:
            for vectors in pipeline.embed(self._engine, windows, self._plan, bar, to_host=True):
                yield store(vectors.numpy(), self.settings.precision)

    def embed_texts(
        self, windows: Iterable[list[str]], note: Callable[[Tokens], None] = lambda tokens: None
    ) -> Iterator[npt.NDArray[Any]]:
        """Embed windows of texts; the next is tokenised while one runs.

        Args:
            windows: Texts, checked; no window is empty.
            note: Told of a window's tokens when its vectors are there.
        """
        waiting: deque[Tokens] = deque()

        def tokens() -> Iterator[Tokens]:
            for one in tokenize_ahead(iter(windows), self.tokenize):
                waiting.append(one)
                yield one

        for vectors in self.embed(tokens()):
            note(waiting.popleft())
            yield vectors


def store(vectors: npt.NDArray[np.float32], precision: Precision) -> npt.NDArray[Any]:
    """Make of unit vectors what is stored, (n, d) or (n, d / 8) for the binary precisions."""
    if precision == "float16":
        return vectors.astype(np.float16)
    return quantize(vectors, _encoder_precision(precision))


def _encoder_precision(precision: Precision) -> EncoderPrecision:
    return "float32" if precision == "float16" else precision
