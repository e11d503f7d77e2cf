"""From a run of texts to packed batches: windows, token budgets, tokenising ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from .tokenizer import Tokens, check_texts

# a window holds about four batches of text, at some four characters per token, so that sorting by
# length has something to sort; and never so many short texts that the first result waits long
_CHARACTERS_PER_BUDGET_TOKEN = 16
_WINDOW_TEXTS = 16_384


def windows(texts: Iterable[str], batch_tokens: int) -> Iterator[list[str]]:
    """Split a run of texts into windows, checking each text as it comes.

    Raises:
        TypeError: A text is not a str; the message gives its position.
        ValueError: A text is not valid Unicode.
    """
    window: list[str] = []
    characters = seen = 0
    for text in texts:
        check_texts([text], seen)
        seen += 1
        window.append(text)
        characters += len(text)
        if (
            characters >= batch_tokens * _CHARACTERS_PER_BUDGET_TOKEN
            or len(window) >= _WINDOW_TEXTS
        ):
            yield window
            window, characters = [], 0
    if window:
        yield window


def tokenize_ahead(
    windows: Iterator[list[str]], tokenize: Callable[[list[str]], Tokens]
) -> Iterator[Tokens]:
    """Tokenise each window while the consumer works on the one before it."""
    first = next(windows, None)
    second = next(windows, None)
    if first is None:
        return
    if second is None:
        # the common short call is spared a thread
        yield tokenize(first)
        return
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="nomoe-tokenize") as pool:
        current: Future[Tokens] | None = pool.submit(tokenize, first)
        following: list[str] | None = second
        while current is not None:
            tokens = current.result()
            current = None if following is None else pool.submit(tokenize, following)
            yield tokens
            following = next(windows, None)


def make_batches(lengths: list[int], batch_tokens: int, batch_size: int | None) -> list[list[int]]:
    """Divide texts into batches of similar length.

    Args:
        lengths: Tokens of each text.
        batch_tokens: Most tokens of a batch; a longer text is a batch of its own.
        batch_size: Most texts of a batch; None for no such limit.

    Returns:
        Positions in `lengths`, longest texts first, so that the first batch needs the most memory.
    """
    batches: list[list[int]] = []
    tokens = 0
    for position in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        tokens += lengths[position]
        if not batches or tokens > batch_tokens or len(batches[-1]) == batch_size:
            batches.append([])
            tokens = lengths[position]
        batches[-1].append(position)
    return batches
