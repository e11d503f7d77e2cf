from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from itertools import pairwise

import pytest

from nomoe.batching import make_batches, tokenize_ahead, windows
from nomoe.tokenizer import Tokens


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("budget", "size"), [(64, None), (512, 4), (10_000, 3), (1, None)])
def test_batches_hold_each_text_once_within_the_budget(
    seed: int, budget: int, size: int | None
) -> None:
    generator = random.Random(seed)
    lengths = [generator.randint(2, 200) for _ in range(100)]
    batches = make_batches(lengths, budget, size)
    assert sorted(position for batch in batches for position in batch) == list(range(100))
    ordered = [lengths[position] for batch in batches for position in batch]
    assert ordered == sorted(lengths, reverse=True), "longest first, like beside like"
    for batch in batches:
        assert sum(lengths[position] for position in batch) <= budget or len(batch) == 1
        assert size is None or len(batch) <= size
    for batch, following in pairwise(batches):
        grown = sum(lengths[position] for position in [*batch, following[0]])
        assert grown > budget or len(batch) == size, "no batch stops early"


def test_no_texts_no_batches() -> None:
    assert make_batches([], 100, None) == []
    assert list(windows([], 100)) == []


def test_windows_keep_order_and_are_bounded() -> None:
    texts = ["x" * (i % 50) for i in range(3000)]
    cut = list(windows(iter(texts), batch_tokens=16))
    assert [text for window in cut for text in window] == texts
    for window in cut[:-1]:
        characters = sum(map(len, window))
        assert 256 <= characters < 256 + 50
    many_short = list(windows(iter([""] * 40_000), batch_tokens=16))
    assert [len(window) for window in many_short] == [16_384, 16_384, 40_000 - 2 * 16_384]


def test_windows_name_the_position_in_the_whole_run() -> None:
    with pytest.raises(TypeError, match="text 1000 is int"):
        list(windows(["abc"] * 1000 + [7], batch_tokens=1))  # type: ignore[list-item]


def tokenize(window: list[str]) -> Tokens:
    return Tokens([[len(text)] for text in window], [])


@pytest.mark.parametrize("count", [0, 1, 2, 3, 10])
def test_tokenising_ahead_keeps_order(count: int) -> None:
    given = [["a" * i] for i in range(count)]
    assert [tokens.ids for tokens in tokenize_ahead(iter(given), tokenize)] == [
        [[i]] for i in range(count)
    ]


def test_the_next_window_is_tokenised_while_this_one_is_used() -> None:
    started = [threading.Event() for _ in range(4)]

    def recording(window: list[str]) -> Tokens:
        started[len(window[0])].set()
        return tokenize(window)

    stream = tokenize_ahead(iter([["a" * i] for i in range(4)]), recording)
    for position, _ in enumerate(stream):
        if position < 3:
            # the consumer is at work on this window, and the next one is already begun
            assert started[position + 1].wait(timeout=10)
        if position < 2:
            assert not started[position + 2].is_set()


def test_a_failing_tokeniser_raises_in_the_consumer() -> None:
    def failing(window: list[str]) -> Tokens:
        if window == ["bad"]:
            raise ValueError("no such piece")
        return tokenize(window)

    stream = tokenize_ahead(iter([["a"], ["b"], ["bad"], ["c"]]), failing)
    assert next(stream).ids == [[1]]
    assert next(stream).ids == [[1]]
    with pytest.raises(ValueError, match="no such piece"):
        next(stream)


def test_closing_early_ends_the_thread() -> None:
    before = threading.active_count()

    def endless() -> Iterator[list[str]]:
        while True:
            yield ["a"]

    stream = tokenize_ahead(endless(), tokenize)
    next(stream)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before
