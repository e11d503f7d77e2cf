"""Strings to token ids, with the checkpoint's own tokenizer.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import tokenizers


class Tokens(NamedTuple):
    """A window of tokenised texts."""

    # token ids of each text, special tokens included, at most the maximum length
    ids: list[list[int]]
    # (position, tokens before the cut) of each text that was cut
    cut: list[tuple[int, int]]


class Tokenizer:
    """The checkpoint's tokenizer: `<s> ... </s>` around each text, cut but never padded.

    Args:
        path: tokenizer.json. Truncation and padding settings stored in it are overridden.
        vocabulary: Rows of the model's embedding table.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: It is damaged, gives ids outside the table, or adds other special tokens than
            one before and one after a text.
    """

    def __init__(self, path: Path, vocabulary: int) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"no tokenizer.json at {path}")
        try:
            self.backend = tokenizers.Tokenizer.from_buffer(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} is not a tokenizer.json: {error}") from error
        self.backend.no_truncation()
        self.backend.no_padding()
        largest = max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1)
        if largest >= vocabulary:
            raise ValueError(
                f"{path} gives ids up to {largest}, but the model's table has {vocabulary} rows: "
                "tokenizer and weights belong to different checkpoints"
            )
        word = self.backend.encode("a")
        mask = word.special_tokens_mask
        if sum(mask) != 2 or not (mask[0] and mask[-1]):
            raise ValueError(f"{path} turns 'a' into {word.tokens}, expected <s> ... </s>")

    def __call__(self, texts: list[str], max_length: int) -> Tokens:
        """Tokenise in parallel; a text over `max_length` tokens keeps its end token."""
        ids = []
        cut = []
        for position, encoding in enumerate(self.backend.encode_batch_fast(texts)):
            row = encoding.ids
            if len(row) > max_length:
                cut.append((position, len(row)))
                row = row[: max_length - 1] + row[-1:]
            ids.append(row)
        return Tokens(ids, cut)

    def pieces(self, ids: list[int]) -> list[str]:
        """Return the vocabulary's piece for each id."""
        return [self.backend.id_to_token(one) or "" for one in ids]


def is_table(inputs: object) -> bool:
    """Whether iterating would give keys, or the names of a data frame's columns."""
    return isinstance(inputs, Mapping) or hasattr(inputs, "columns")


def check_texts(texts: list[str], first: int = 0) -> None:
    """Refuse what is not text.

    Args:
        texts: What the caller gave as texts.
        first: Position of the first one, for the message.

    Raises:
        TypeError: An item is not a str.
        ValueError: An item holds a lone surrogate, so is not valid Unicode.
    """
    for position, text in enumerate(texts, first):
        if not isinstance(text, str):
            raise TypeError(f"text {position} is {type(text).__name__}, expected str")
        if not text.isascii():
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"text {position} holds a lone surrogate (U+{ord(text[error.start]):04X} at "
                    f"character {error.start}), which is not valid Unicode; decode the source with "
                    "errors='replace' to embed it"
                ) from None
