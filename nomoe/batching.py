"""From a run of texts to packed batches: windows, token budgets, tokenising and launching ahead."""

from __future__ import annotations

import logging
from array import array
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate, pairwise
from typing import NamedTuple, TypeVar

import torch

from .tokenizer import Tokens, check_texts

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# a window holds about four batches of text, at some four characters per token, so that sorting by
# length has something to sort; where batches are large, as on a GPU, about one, lest it wait long
# for the first. And never so many short texts that the first result waits long
_CHARACTERS_PER_TOKEN = 4
_BATCHES = 4
_WINDOW_CHARACTERS = 262_144
_WINDOW_TEXTS = 16_384


def windows(texts: Iterable[str], batch_tokens: int) -> Iterator[list[str]]:
    """Split a run of texts into windows, checking each text as it comes.

    Raises:
        TypeError: A text is not a str; the message gives its position.
        ValueError: A text is not valid Unicode.
    """
    window: list[str] = []
    characters = seen = 0
    batch = batch_tokens * _CHARACTERS_PER_TOKEN
    most = max(batch, min(_BATCHES * batch, _WINDOW_CHARACTERS))
    for text in texts:
        check_texts([text], seen)
        seen += 1
        window.append(text)
        characters += len(text)
        if characters >= most or len(window) >= _WINDOW_TEXTS:
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
    """Divide texts into the fewest batches of similar length, and those as evenly as can be.

    Were each filled to the brim, the rest might be of any size, and on a CPU every new number of
    tokens takes memory that is not given back (see `nomoe_kernels.cpu.round_up`).

    Args:
        lengths: Tokens of each text.
        batch_tokens: Most tokens of a batch; a longer text is a batch of its own.
        batch_size: Most texts of a batch; None for no such limit.

    Returns:
        Positions in `lengths`, longest texts first, so that no later batch needs much more memory.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    ends = list(accumulate((lengths[position] for position in order), initial=0))
    most_texts = batch_size or len(order)
    if order and ends[-1] <= batch_tokens and len(order) <= most_texts:
        return [order]

    def cut(most_tokens: int) -> list[int]:
        cuts = [0]
        while (start := cuts[-1]) < len(order):
            stop = bisect_right(ends, ends[start] + most_tokens, start) - 1
            cuts.append(max(start + 1, min(stop, start + most_texts)))
        return cuts

    fewest = len(cut(batch_tokens))
    # the smallest budget that needs no more batches
    budgets = range(min(batch_tokens, ends[-1]))
    budget = bisect_left(budgets, True, key=lambda most: len(cut(most)) <= fewest)
    return [order[start:stop] for start, stop in pairwise(cut(budget))]


class Batch(NamedTuple):
    """Texts of a window that run together."""

    window: Tokens
    # of its texts in the window
    positions: list[int]

    @property
    def ids(self) -> list[list[int]]:
        """Token ids of each text."""
        return [self.window.ids[position] for position in self.positions]

    @property
    def packed_ids(self) -> array[int]:
        """Token ids of all texts, end to end."""
        # 66,664 in 0.3 ms; numpy, and this with signed numbers, take four times as long from lists
        packed = array("I")
        for ids in self.ids:
            packed.fromlist(ids)
        return packed

    @property
    def lengths(self) -> list[int]:
        """Tokens of each text."""
        return [len(self.window.ids[position]) for position in self.positions]

    def halve(self) -> list[Batch]:
        """Divide the texts into two batches of about as many tokens; none of one text."""
        if len(self.positions) == 1:
            return []
        ends = list(accumulate(self.lengths))
        # where the larger part is smallest
        cut = min(range(1, len(ends)), key=lambda text: abs(2 * ends[text - 1] - ends[-1]))
        return [
            self._replace(positions=part) for part in (self.positions[:cut], self.positions[cut:])
        ]


def run_batches(
    batches: Iterable[Batch],
    launch: Callable[[Batch], Callable[[], Result]],
    *,
    depth: int,
    relieve: Callable[[], None],
) -> Iterator[tuple[Batch, Result]]:
    """Launch batches ahead of their results, and in halves where memory runs out.

    Once a batch has not fitted, the later ones are cut to what its halves had.

    Args:
        batches: What to run.
        launch: Queues a batch; what it returns waits for the result.
        depth: Most batches launched and not waited for.
        relieve: Gives memory back before another try.

    Yields:
        Batches, or parts of them, with their results, in the order given.

    Raises:
        torch.OutOfMemoryError: One text alone does not fit.
    """
    waiting: deque[tuple[Batch, Callable[[], Result]]] = deque()
    most: int | None = None
    # since the last launch that succeeded
    is_relieved = False
    for batch in batches:
        parts = [batch]
        while parts:
            part = parts.pop()
            tokens, is_divisible = sum(part.lengths), len(part.positions) > 1
            if is_divisible and most is not None and tokens > most:
                parts += reversed(part.halve())
                continue
            try:
                waiting.append((part, launch(part)))
                is_short = is_relieved = False
            except torch.OutOfMemoryError as error:
                if not is_divisible and not waiting and is_relieved:
                    raise torch.OutOfMemoryError(
                        f"a text of {tokens} tokens does not fit in memory even by itself: free "
                        f"some, lower max_seq_length or take a smaller dtype ({error})"
                    ) from error
                is_short = True
            # the error is gone, and what the forward held with it
            while len(waiting) >= depth or (waiting and is_short):
                done, finish = waiting.popleft()
                yield done, finish()
            if is_short:
                relieve()
                is_relieved = True
                halves = part.halve()
                if most is None and halves:
                    logger.warning(
                        "a batch of %d tokens did not fit in memory; it and the rest of this call "
                        "run in smaller ones: batch_tokens= sets their size",
                        tokens,
                    )
                if halves:
                    most = max(sum(half.lengths) for half in halves)
                parts += reversed(halves or [part])
    while waiting:
        done, finish = waiting.popleft()
        yield done, finish()
