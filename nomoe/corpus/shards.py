"""Embedding shards one after another: the work of one process."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..batching import windows
from ..tokenizer import Tokens
from .embedder import Embedder
from .outputs import Output
from .plan import Piece, Plan
from .rows import Block, Columns, Place, good_columns, read_blocks, slice_columns
from .sources import look_again

# blocks of vectors that wait to be written
_WRITES_AHEAD = 2


class Window(NamedTuple):
    """Rows of one shard that are batched together."""

    shard: int
    texts: list[str]
    # their numbers in the input, int64
    rows: npt.NDArray[np.int64]
    # their columns, in parts
    columns: list[Columns]
    is_last: bool


class Progress(NamedTuple):
    """What was done since the last report."""

    rows: int
    tokens: int
    # texts longer than the longest length
    cut: int
    # a shard that was finished, or None
    shard: int | None = None


class ShardReader:
    """Reads shards, and goes on in a file where it stopped, if the next piece lies ahead.

    Args:
        plan: What to read.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._file = -1
        # of the open file: its blocks, the rest of the one under way, and the row it begins at
        self._blocks: Iterator[Block] = iter(())
        self._rest: Block | None = None
        self._row = 0

    def windows(self, shard: int, batch_tokens: int) -> Iterator[Window]:
        """Divide a shard into windows; it has at least one good row.

        Raises:
            RuntimeError: The input is no longer what the plan was made of.
        """
        held: deque[tuple[npt.NDArray[np.int64], Columns]] = deque()

        def texts() -> Iterator[str]:
            number = self._plan.shards[shard].first
            for piece in self._plan.shards[shard].pieces:
                for block in self._piece(piece):
                    good = [row for row in range(len(block.texts)) if row not in block.problems]
                    if good:
                        held.append((np.array(good, dtype=np.int64) + number, good_columns(block)))
                    number += len(block.texts)
                    yield from (text for text in block.texts if text is not None)

        left = self._plan.shards[shard].rows
        for window in windows(texts(), batch_tokens):
            left -= len(window)
            if not left:
                # a file may have been written anew while it was open
                for piece in self._plan.shards[shard].pieces:
                    self._check_unchanged(piece)
            rows, columns = _take(held, len(window))
            yield Window(shard, window, rows, columns, is_last=not left)
        if left:
            raise self._changed(self._plan.shards[shard].pieces[-1])

    def _piece(self, piece: Piece) -> Iterator[Block]:
        # to go on is best, to read over rows in between second to finding the place by its offset
        is_ahead = piece.row == self._row or (piece.row > self._row and not piece.offset)
        if piece.file != self._file or not is_ahead:
            file = self._plan.files[piece.file]
            self._check_unchanged(piece)
            place = Place(piece.row, piece.offset)
            self._blocks = read_blocks(file.source, self._plan.column, self._plan.columns, place)
            self._file, self._row, self._rest = piece.file, piece.row, None
        end = piece.row + piece.count
        while self._row < end:
            block = self._rest or next(self._blocks, None)
            if block is None:
                raise self._changed(piece)
            size = len(block.texts)
            start = min(size, max(0, piece.row - self._row))
            stop = min(size, end - self._row)
            self._rest = _slice_block(block, stop, size) if stop < size else None
            self._row += stop
            if start < stop:
                yield _slice_block(block, start, stop)

    def _check_unchanged(self, piece: Piece) -> None:
        source = self._plan.files[piece.file].source
        if look_again(source) != source:
            raise self._changed(piece)

    def _changed(self, piece: Piece) -> RuntimeError:
        path = self._plan.files[piece.file].path
        return RuntimeError(f"{path} changed after it was read first: its rows may be others now")


def _slice_block(block: Block, start: int, stop: int) -> Block:
    if not start and stop == len(block.texts):
        return block
    return Block(
        block.texts[start:stop],
        {row - start: one for row, one in block.problems.items() if start <= row < stop},
        slice_columns(block.columns, start, stop),
        [],
    )


def _take(
    held: deque[tuple[npt.NDArray[np.int64], Columns]], count: int
) -> tuple[npt.NDArray[np.int64], list[Columns]]:
    rows: list[npt.NDArray[np.int64]] = []
    columns: list[Columns] = []
    while count:
        numbers, part = held.popleft()
        size = len(numbers)
        if size > count:
            held.appendleft((numbers[count:], slice_columns(part, count, size)))
            numbers, part = numbers[:count], slice_columns(part, 0, count)
        rows.append(numbers)
        columns.append(part)
        count -= len(numbers)
    return np.concatenate(rows), columns


def embed_shards(
    embedder: Embedder,
    plan: Plan,
    shards: Iterable[int],
    open_output: Callable[[int], Output],
    report: Callable[[Progress], None],
) -> None:
    """Embed shards in order, each into its output; reading, running and writing overlap.

    Args:
        embedder: The model.
        plan: The input.
        shards: Positions in the plan, asked for one by one.
        open_output: Makes the output of a shard. Shards that follow one another may share one.
        report: Told of every window, and of a shard once its output is committed.

    Raises:
        OSError: Input or output failed; the output under way is removed, earlier ones stay.
        RuntimeError: The input changed meanwhile.
    """
    waiting: deque[Window] = deque()
    tokens: deque[Tokens] = deque()
    reader = ShardReader(plan)

    def texts() -> Iterator[list[str]]:
        for shard in shards:
            for window in reader.windows(shard, embedder.settings.batch_tokens):
                waiting.append(window)
                yield window.texts

    output: Output | None = None
    writes: deque[Future[None]] = deque()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="nomoe-write") as pool:
        try:
            for vectors in embedder.embed_texts(texts(), tokens.append):
                window, done = waiting.popleft(), tokens.popleft()
                if output is None:
                    output = open_output(window.shard)
                writes.append(pool.submit(output.add, window.rows, window.columns, vectors))
                while len(writes) > (0 if window.is_last else _WRITES_AHEAD):
                    writes.popleft().result()
                if window.is_last:
                    pool.submit(output.commit).result()
                    output = None
                count = sum(map(len, done.ids))
                shard = window.shard if window.is_last else None
                report(Progress(len(window.texts), count, len(done.cut), shard))
        finally:
            if output is not None:
                for write in writes:
                    # one that has begun must end before its file is closed
                    if not write.cancel():
                        write.exception()
                output.abort()
