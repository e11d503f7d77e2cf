"""From texts to pooled vectors: what `Encoder` runs once a call's settings are checked."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .batching import Batch, Result, make_batches, run_batches, tokenize_ahead, windows
from .engine import Engine, Pooling
from .tokenizer import Tokenizer, Tokens

logger = logging.getLogger(__name__)

# a bar that would be gone before it is read is not shown
_BAR_DELAY_S = 2.0


class Plan(NamedTuple):
    """One call's settings, checked."""

    # put before every text
    prefix: str
    # longest text in tokens, and whether a longer one is refused or cut
    max_length: int
    refuse_long: bool
    # most tokens and most texts of a batch
    batch_tokens: int
    batch_size: int | None
    pooling: Pooling


def tokenized(tokenizer: Tokenizer, texts: Iterable[str], plan: Plan) -> Iterator[Tokens]:
    """Yield windows of tokenised texts; log how many were cut once all are through.

    Raises:
        TypeError, ValueError: A bad text, or one too long where the plan refuses those.
    """
    seen = cut = 0

    def tokenize(window: list[str]) -> Tokens:
        return tokenizer([plan.prefix + text for text in window], plan.max_length)

    try:
        for tokens in tokenize_ahead(windows(texts, plan.batch_tokens), tokenize):
            if tokens.cut and plan.refuse_long:
                position, length = tokens.cut[0]
                raise ValueError(
                    f"text {seen + position} has {length} tokens with its prompt, more than "
                    f"max_seq_length={plan.max_length}"
                )
            seen += len(tokens.ids)
            cut += len(tokens.cut)
            yield tokens
    finally:
        if cut:
            logger.warning(
                "%d of %d texts were longer than max_seq_length=%d tokens and were cut",
                cut,
                seen,
                plan.max_length,
            )


def run(
    engine: Engine,
    windows: Iterable[Tokens],
    plan: Plan,
    bar: tqdm[Any] | None,
    launch: Callable[[Batch], Callable[[], Result]],
) -> Iterator[tuple[Tokens, list[tuple[Batch, Result]]]]:
    """Run windows batch by batch, longest texts first; yield each with its batches' results.

    On a GPU two batches are under way: while one runs, the next is prepared and queued.
    """

    def batches() -> Iterator[Batch]:
        for window in windows:
            lengths = [len(ids) for ids in window.ids]
            for positions in make_batches(lengths, plan.batch_tokens, plan.batch_size):
                yield Batch(window, positions)

    depth = 2 if engine.model.device.type == "cuda" else 1
    done: list[tuple[Batch, Result]] = []
    texts = 0
    for batch, result in run_batches(batches(), launch, depth=depth, relieve=engine.relieve):
        done.append((batch, result))
        texts += len(batch.positions)
        if bar is not None:
            bar.update(len(batch.positions))
        if texts == len(batch.window.ids):
            yield batch.window, done
            done, texts = [], 0


def embed(
    engine: Engine, windows: Iterable[Tokens], plan: Plan, bar: tqdm[Any] | None, *, to_host: bool
) -> Iterator[Tensor]:
    """Embed windows; (m, d) float32 for each, in its order, on the host or the model's device."""

    def launch(batch: Batch) -> Callable[[], Tensor]:
        return engine.embed(batch.packed_ids, batch.lengths, plan.pooling, to_host=to_host)

    for _, parts in run(engine, windows, plan, bar, launch):
        # a copy even of one: vectors that were kept would keep pinned memory
        rows = torch.cat([vectors for _, vectors in parts])
        positions = [position for batch, _ in parts for position in batch.positions]
        if len(positions) == 1:
            yield rows
            continue
        order = torch.tensor(positions, device="cpu", pin_memory=rows.is_cuda)
        # rows into the order of the window
        yield torch.empty_like(rows).index_copy_(0, order.to(rows.device, non_blocking=True), rows)


def embed_tokens(
    engine: Engine, windows: Iterable[Tokens], plan: Plan, bar: tqdm[Any] | None
) -> Iterator[list[dict[str, Tensor]]]:
    """Embed windows token by token: a dict per text, in the window's order."""

    @torch.no_grad()
    def launch(batch: Batch) -> Callable[[], list[dict[str, Tensor]]]:
        output, ops = engine.forward(batch.packed_ids, batch.lengths)
        vectors = ops.pool(output.last_hidden_state, batch.lengths, plan.pooling)
        hidden = output.last_hidden_state.float().split(batch.lengths)
        # clones, or keeping one text would keep its whole batch
        texts = [
            {
                "input_ids": torch.tensor(ids, device="cpu"),
                "attention_mask": torch.ones(len(ids), dtype=torch.int64, device="cpu"),
                "token_embeddings": hidden_LD.clone(),
                "sentence_embedding": vector.clone(),
            }
            for ids, hidden_LD, vector in zip(batch.ids, hidden, vectors, strict=True)
        ]
        return lambda: texts

    for _, parts in run(engine, windows, plan, bar, launch):
        yield _in_order(parts)


def route(
    engine: Engine, windows: Iterable[Tokens], plan: Plan, bar: tqdm[Any] | None
) -> Iterator[tuple[Tokens, list[tuple[Tensor, Tensor]]]]:
    """Route windows: experts and weights of each text, (L, M, K) on the host, in its order."""

    def launch(batch: Batch) -> Callable[[], list[tuple[Tensor, Tensor]]]:
        output, _ = engine.forward(batch.packed_ids, batch.lengths, routing=True)
        assert output.router_experts is not None
        assert output.router_weights is not None
        experts_TMK = torch.stack(output.router_experts, dim=1).cpu().split(batch.lengths)
        weights_TMK = torch.stack(output.router_weights, dim=1).cpu().split(batch.lengths)
        texts = [
            (experts_LMK.clone(), weights_LMK.clone())
            for experts_LMK, weights_LMK in zip(experts_TMK, weights_TMK, strict=True)
        ]
        return lambda: texts

    for window, parts in run(engine, windows, plan, bar, launch):
        yield window, _in_order(parts)


def _in_order(parts: list[tuple[Batch, list[Result]]]) -> list[Result]:
    """The results of a window's texts in its order."""
    by_position = {
        position: text
        for batch, texts in parts
        for position, text in zip(batch.positions, texts, strict=True)
    }
    return [by_position[position] for position in range(len(by_position))]


def progress(
    show: bool | None, total: int | None, *, unit: str = "texts", what: str = "embedding"
) -> tqdm[Any]:
    """Make a progress bar; None shows it on a terminal once the work has taken a while."""
    # given None, tqdm itself keeps silent where stderr is no terminal
    disable = None if show is None else not show
    delay = _BAR_DELAY_S if show is None else 0
    return tqdm(total=total, unit=f" {unit}", desc=what, disable=disable, delay=delay)
