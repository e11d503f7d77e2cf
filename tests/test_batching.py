from __future__ import annotations

import gc
import logging
import random
import threading
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch

from nomoe.batching import Batch, make_batches, run_batches, tokenize_ahead, windows
from nomoe.tokenizer import Tokens
from nomoe_kernels import cpu


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("budget", "size"), [(64, None), (512, 4), (1 << 70, 3), (1, None)])
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
    assert len(batches) == fewest_batches(lengths, budget, size)
    shared = [sum(lengths[position] for position in batch) for batch in batches if len(batch) > 1]
    if shared:
        # a smaller fullest batch would need one more
        assert fewest_batches(lengths, max(shared) - 1, size) > len(batches)


def fewest_batches(lengths: list[int], budget: int, size: int | None) -> int:
    """Count the batches that are there when each takes all it can."""
    batches: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        if not batches or sum(batches[-1]) + length > budget or len(batches[-1]) == size:
            batches.append([])
        batches[-1].append(length)
    return len(batches)


def test_windows_show_onednn_few_numbers_of_rows() -> None:
    """It compiles a product for each, and keeps it."""
    generator = random.Random(0)
    rows = set()
    for _ in range(200):
        # some fill four batches, others begin a fifth
        lengths = [generator.randint(4, 15) for _ in range(generator.randint(1650, 1800))]
        for batch in make_batches(lengths, 4096, None):
            rows.add(cpu.round_up(sum(lengths[position] for position in batch)))
    assert min(rows) > 3000
    assert len(rows) <= 16


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
    # a GPU's budget is large, and its first window keeps it waiting
    large = list(windows(iter(["a" * 1000] * 1000), batch_tokens=65_536))
    assert [len(window) for window in large] == [263, 263, 263, 211]
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
    before = set(threading.enumerate())

    def endless() -> Iterator[list[str]]:
        while True:
            yield ["a"]

    stream = tokenize_ahead(endless(), tokenize)
    next(stream)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert set(threading.enumerate()) <= before


# --- launching ahead, and running out of memory ---


def batches_of(*sizes: list[int]) -> list[Batch]:
    """Batches of one window, each of texts with these many tokens."""
    window = Tokens([[0] * size for batch in sizes for size in batch], [])
    starts = [sum(map(len, sizes[:i])) for i in range(len(sizes))]
    return [
        Batch(window, list(range(start, start + len(batch))))
        for start, batch in zip(starts, sizes, strict=True)
    ]


class Device:
    """Runs what fits, and keeps count of what is under way."""

    def __init__(self, room: int, *, shared: bool = False) -> None:
        # tokens that fit, at a time or in all that is under way
        self.room, self.shared = room, shared
        self.under_way: list[Batch] = []
        self.most_under_way = self.refused = self.relieved = 0
        self.held: list[weakref.ref[object]] = []

    def launch(self, batch: Batch) -> Callable[[], list[int]]:
        class Activations:
            pass

        activations = Activations()
        # what a forward that failed still holds keeps the next from fitting
        assert not [one for one in self.held if one() is not None]
        used = sum(sum(one.lengths) for one in self.under_way) if self.shared else 0
        if used + sum(batch.lengths) > self.room:
            self.refused += 1
            self.held.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        self.under_way.append(batch)
        self.most_under_way = max(self.most_under_way, len(self.under_way))

        def finish() -> list[int]:
            assert self.under_way[0] is batch, "the oldest first"
            return self.under_way.pop(0).positions

        return finish

    def relieve(self) -> None:
        gc.collect()
        assert not self.under_way, "what is under way is finished first"
        self.relieved += 1

    def run(self, batches: list[Batch], depth: int) -> list[int]:
        order = []
        for batch, result in run_batches(
            iter(batches), self.launch, depth=depth, relieve=self.relieve
        ):
            assert result == batch.positions
            order += result
        assert not self.under_way
        return order


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_results_come_in_order_from_batches_launched_ahead(depth: int) -> None:
    device = Device(100)
    batches = batches_of([9, 9], [7], [5, 4, 3], [2])
    assert device.run(batches, depth) == list(range(7))
    assert device.most_under_way == depth
    assert device.relieved == 0


def test_a_batch_is_launched_before_the_one_before_it_is_waited_for() -> None:
    device = Device(100)
    stream = run_batches(
        iter(batches_of([3], [2], [1])), device.launch, depth=2, relieve=device.relieve
    )
    next(stream)
    assert [batch.positions for batch in device.under_way] == [[1]]
    next(stream)
    assert [batch.positions for batch in device.under_way] == [[2]]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(
    ("room", "sizes"),
    [
        (50, [[30, 30, 20, 10], [10, 10]]),  # the first
        (50, [[20, 20], [20, 20, 20], [10, 10]]),  # one between others
        (7, [[7] * 16]),  # down to single texts
        (50, [[49, 49], [30, 30], [20, 20, 20]]),  # each of them
        (10, [[10], [9, 9, 9], [1] * 30]),
    ],
)
def test_what_does_not_fit_runs_in_halves(
    depth: int, room: int, sizes: list[list[int]], warnings_of_nomoe: pytest.LogCaptureFixture
) -> None:
    device = Device(room)
    assert device.run(batches_of(*sizes), depth) == list(range(sum(map(len, sizes))))
    assert device.relieved == device.refused > 0
    assert len(warnings_of_nomoe.records) == 1
    first = next(sum(batch) for batch in sizes if sum(batch) > room)
    assert f"a batch of {first} tokens did not fit" in warnings_of_nomoe.text


def test_later_batches_are_cut_before_they_fail() -> None:
    device = Device(50)
    assert device.run(batches_of(*[[20, 20, 20, 20]] * 20), 2) == list(range(80))
    assert device.refused == 1


@pytest.mark.parametrize("text", [5, 6])
def test_a_text_waits_for_the_room_of_others(text: int) -> None:
    device = Device(10, shared=True)
    batches = batches_of([5], [text])
    assert device.run(batches, 2) == [0, 1]
    assert device.refused == (text == 6)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("sizes", [[[11]], [[5], [11], [3]], [[4, 4, 4], [11, 2]]])
def test_a_text_that_fits_nowhere_is_an_error(depth: int, sizes: list[list[int]]) -> None:
    device = Device(10)
    with pytest.raises(torch.OutOfMemoryError, match=r"a text of 11 tokens does not fit .*2 GiB"):
        device.run(batches_of(*sizes), depth)
    assert device.refused == device.relieved + 1


def test_a_text_alone_is_tried_again_once_memory_was_given_back() -> None:
    """What recordings hold torch cannot free by itself."""
    device = Device(10)

    def relieve() -> None:
        device.relieve()
        device.room = 20

    stream = run_batches(iter(batches_of([11])), device.launch, depth=2, relieve=relieve)
    assert [result for _, result in stream] == [[0]]
    assert (device.refused, device.relieved) == (1, 1)


def test_halves_hold_about_as_many_tokens() -> None:
    for lengths in ([512, 1], [10] * 7, [100, 40, 30, 20, 10], [1, 1, 1, 300]):
        (batch,) = batches_of(lengths)
        first, second = batch.halve()
        assert first.positions + second.positions == batch.positions
        larger = max(sum(first.lengths), sum(second.lengths))
        cuts = range(1, len(lengths))
        assert larger == min(max(sum(lengths[:i]), sum(lengths[i:])) for i in cuts)
    assert batches_of([7])[0].halve() == []


def test_another_error_passes_through(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="nomoe")

    def failing(batch: Batch) -> Callable[[], None]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        list(run_batches(iter(batches_of([1])), failing, depth=2, relieve=lambda: None))
    assert not caplog.records
