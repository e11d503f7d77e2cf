"""Callable classes for `Dataset.map_batches`; this module does not import Ray."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Unpack, cast

import numpy as np
import numpy.typing as npt

from ..batching import windows
from ..checkpoint import DEFAULT_REPO
from ..config import NomicMoEConfig
from ..corpus.embedder import Embedder, WindowTokenizer, resolve_settings
from ..corpus.plan import VECTOR_COLUMN, OnBad, check_on_bad
from ..corpus.request import ModelOptions
from ..corpus.rows import arrow_texts
from ..tokenizer import Tokens, check_texts

logger = logging.getLogger(__name__)

TOKENS_COLUMN = "input_ids"


class TokenizeBatch:
    """Adds the token ids of each text of a batch, for a stage that needs no GPU.

    The tokenizer is loaded with the first batch; until then an object is small, and it can be
    pickled at any time.

    What acts on tokens (`device`, `dtype`, `backend`, `dim`, `precision`, `batch_tokens`) goes to
    `EmbedBatch` alone.

    Args:
        model: Folder that every node sees, or a repository, which every node downloads.
        column: Where the text is.
        on_bad: "fail" ends the run at a row without a text, or with one that is not valid Unicode,
            "skip" drops such rows, logged with their number.
        revision, local_files_only: As for `nomoe.embed_corpus`; give both stages the same.
        prompt_name, prompt, max_seq_length: As for `nomoe.embed_corpus`.

    Raises:
        ValueError: An unknown `on_bad`.
    """

    def __init__(
        self,
        model: str | Path = DEFAULT_REPO,
        *,
        column: str = "text",
        on_bad: OnBad = "fail",
        revision: str | None = None,
        prompt_name: str | None = "document",
        prompt: str | None = None,
        max_seq_length: int | None = None,
        local_files_only: bool = False,
    ) -> None:
        check_on_bad(on_bad)
        self._model, self._column, self._on_bad = model, column, on_bad
        self._options: ModelOptions = {
            "revision": revision,
            "prompt_name": prompt_name,
            "prompt": prompt,
            "max_seq_length": max_seq_length,
            "local_files_only": local_files_only,
            # token ids do not depend on where the model runs
            "device": "cpu",
        }
        self._tokenize: WindowTokenizer | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tokenize": None}

    def __call__(self, batch: Any) -> Any:
        """Tokenise a batch: dict of numpy arrays, pyarrow.Table or pandas.DataFrame.

        Returns:
            The same kind, with a column "input_ids" of lists.

        Raises:
            ValueError: No such column, one of the new column's name, or a row without a valid text
                under "fail".
        """
        _check_free(batch, TOKENS_COLUMN)
        if self._tokenize is None:
            self._tokenize = WindowTokenizer(resolve_settings(self._model, **self._options))
        batch, texts = _texts(batch, self._column, self._on_bad)
        ids = [np.array(one, dtype=np.int32) for one in self._tokenize(texts).ids]
        return _with_column(batch, TOKENS_COLUMN, ids)


class EmbedBatch:
    """Adds the vector of each text of a batch.

    Pass the class itself to `map_batches`, with `fn_constructor_kwargs` and an actor pool: the
    model is then loaded once in each actor, with its first batch. Until then an object is small,
    and it can be pickled at any time. Nothing is registered anywhere.

    Args:
        model: Folder that every node sees, or a repository, which every node downloads.
        column: Where the text is.
        tokens_column: Where `TokenizeBatch` put the token ids; the column is dropped. Then
            `prompt_name`, `prompt`, `max_seq_length`, and a `column` or `on_bad` other than the
            default are refused: they would do nothing here, and are for `TokenizeBatch`. None
            tokenises here.
        output_column: Name of the column of vectors.
        on_bad: "fail" ends the run at a row without a text, or with one that is not valid Unicode,
            "skip" drops such rows, logged with their number.
        **options: `revision`, `device`, `dtype`, `backend`, `prompt_name`, `prompt`, `dim`,
            `precision`, `max_seq_length`, `batch_tokens`, `local_files_only` as for
            `nomoe.embed_corpus`.

    Raises:
        TypeError: An option of texts beside `tokens_column`.
        ValueError: An unknown `on_bad`.
    """

    def __init__(
        self,
        model: str | Path = DEFAULT_REPO,
        *,
        column: str = "text",
        tokens_column: str | None = None,
        output_column: str = VECTOR_COLUMN,
        on_bad: OnBad = "fail",
        **options: Unpack[ModelOptions],
    ) -> None:
        check_on_bad(on_bad)
        if tokens_column is not None:
            of_texts: list[str] = sorted(
                options.keys() & {"prompt_name", "prompt", "max_seq_length"}
            )
            if column != "text":
                of_texts.append("column")
            if on_bad != "fail":
                of_texts.append("on_bad")
            if of_texts:
                raise TypeError(
                    f"{', '.join(of_texts)} would do nothing beside tokens_column=, where texts "
                    "are tokens already; give such options to TokenizeBatch"
                )
        self._model, self._column, self._on_bad, self._options = model, column, on_bad, options
        self._tokens_column, self._output_column = tokens_column, output_column
        self._embedder: Embedder | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_embedder": None}

    def __call__(self, batch: Any) -> Any:
        """Embed a batch: dict of numpy arrays, pyarrow.Table or pandas.DataFrame.

        Returns:
            The same kind with one more column: an (n, d) array, a fixed-size list, or arrays.

        Raises:
            ValueError: No such column, one of the new column's name, a row without a valid text
                under "fail", or one of `tokens_column` without token ids of this model.
        """
        _check_free(batch, self._output_column)
        if self._embedder is None:
            settings = resolve_settings(self._model, **self._options)
            self._embedder = Embedder(settings, self._options.get("device"))
        embedder = self._embedder
        if self._tokens_column is not None:
            ids = _token_ids(batch, self._tokens_column, embedder.config)
            batch = _without_column(batch, self._tokens_column)
            parts = list(embedder.embed(_token_windows(ids, embedder.settings.batch_tokens)))
        else:
            batch, texts = _texts(batch, self._column, self._on_bad)
            parts = list(embedder.embed_texts(windows(texts, embedder.settings.batch_tokens)))
        settings = embedder.settings
        empty = np.empty((0, settings.stored_dim), settings.stored_dtype)
        return _with_column(batch, self._output_column, np.concatenate([empty, *parts]))


# --- batches in their three kinds ---


def _texts(batch: Any, column: str, on_bad: OnBad) -> tuple[Any, list[str]]:
    """Return a batch's rows that have a valid text, and the texts.

    Raises:
        ValueError: A row has none, and `on_bad` is "fail".
    """
    found = _column(batch, column)
    values: list[Any]
    missing: dict[int, str] = {}
    if hasattr(found, "to_pylist"):
        values, missing = arrow_texts(found)
    else:
        values = list(found)
    problems = {row: problem for row, value in enumerate(values) if (problem := _problem(value))}
    problems |= {row: f"is {why}" for row, why in missing.items()}
    if not problems:
        return batch, cast("list[str]", values)
    if on_bad == "fail":
        row, problem = next(iter(problems.items()))
        raise ValueError(
            f"row {row} of a batch of {len(values)} has no text in column {column!r}: it {problem}"
            "; on_bad='skip' drops such rows"
        )
    logger.warning(
        "%d of %d rows of a batch have no text and are dropped", len(problems), len(values)
    )
    kept = np.array([row not in problems for row in range(len(values))])
    if isinstance(batch, dict):
        batch = {name: np.asarray(part)[kept] for name, part in batch.items()}
    else:
        batch = batch[kept] if hasattr(batch, "iloc") else batch.filter(kept)
    return batch, [value for row, value in enumerate(values) if row not in problems]


def _problem(value: Any) -> str | None:
    """Say why a value is no text."""
    try:
        check_texts([value])
    except (TypeError, ValueError) as error:
        return str(error).removeprefix("text 0 ")
    return None


def _names(batch: Any) -> list[Any]:
    is_table = not isinstance(batch, dict) and not hasattr(batch, "iloc")
    return list(batch.column_names if is_table else batch)


def _check_free(batch: Any, name: str) -> None:
    """Refuse a batch that has a column where another is to be."""
    if name in _names(batch):
        raise ValueError(f"the batch has a column {name!r} already; rename or drop it")


def _column(batch: Any, name: str) -> Any:
    names = _names(batch)
    if name not in names:
        raise ValueError(f"the batch has no column {name!r}; it has {', '.join(map(str, names))}")
    return batch[name]


def _without_column(batch: Any, name: str) -> Any:
    if isinstance(batch, dict):
        return {one: part for one, part in batch.items() if one != name}
    if hasattr(batch, "iloc"):
        return batch.drop(columns=[name])
    return batch.drop_columns([name])


def _with_column(batch: Any, name: str, values: Sequence[Any] | npt.NDArray[Any]) -> Any:
    if isinstance(batch, dict):
        if not isinstance(values, np.ndarray):
            ragged = np.empty(len(values), dtype=object)
            ragged[:] = values
            values = ragged
        return batch | {name: values}
    if hasattr(batch, "iloc"):
        return batch.assign(**{name: list(values)})
    import pyarrow as pa

    if isinstance(values, np.ndarray):
        flat = pa.array(np.ascontiguousarray(values).reshape(-1))
        array = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    else:
        array = pa.array(values, pa.list_(pa.int32()))
    return batch.append_column(name, array)


def _token_ids(batch: Any, column: str, config: NomicMoEConfig) -> list[Any]:
    """Return the token ids of a batch's rows, arrays; on a GPU nothing else would check them.

    Raises:
        ValueError: A row has none, too many, or others than the model's.
    """
    found = _column(batch, column)
    if hasattr(found, "to_pylist"):
        from pyarrow import types

        kinds = (types.is_list, types.is_large_list, types.is_fixed_size_list)
        # of Ray's own kinds only lists can be had
        is_list = any(is_kind(found.type) for is_kind in kinds)
        found = found.to_numpy(zero_copy_only=False) if is_list else found.to_pylist()
    rows = list(found)
    ids = []
    for row, value in enumerate(rows):
        # objects within an array of objects show their type as a list
        if isinstance(value, np.ndarray) and value.dtype == object:
            value = value.tolist()
        try:
            one = np.asarray(value)
        except ValueError:
            one = np.empty(0)
        problem = None
        if one.ndim != 1 or not len(one) or one.dtype.kind not in "iu":
            shown = value.tolist() if isinstance(value, np.ndarray) else value
            problem = f"holds {shown!r:.40}, expected a list of token ids"
        elif len(one) > config.n_positions:
            problem = f"has {len(one)} tokens, the model takes at most {config.n_positions}"
        elif one.min() < 0 or one.max() >= config.embedding_rows:
            problem = (
                f"has ids from {one.min()} to {one.max()}, outside the vocabulary of "
                f"{config.embedding_rows}"
            )
        if problem:
            raise ValueError(f"row {row} of a batch of {len(rows)} in column {column!r} {problem}")
        ids.append(one)
    return ids


def _token_windows(ids: list[Any], batch_tokens: int) -> Iterator[Tokens]:
    """Divide token ids into windows of about four batches."""
    window: list[list[int]] = []
    count = 0
    for one in ids:
        # lists as they are needed: a GPU is at work on the window before
        window.append(one.tolist())
        count += len(one)
        if count >= 4 * batch_tokens:
            yield Tokens(window, [])
            window, count = [], 0
    if window:
        yield Tokens(window, [])
