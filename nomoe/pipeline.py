"""From texts to pooled vectors: what `Encoder` runs once a call's settings are checked."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from .batching import make_batches, tokenize_ahead, windows
from .model import NomicMoEModel, NomicMoEOutput
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
    # features to keep, and whether to normalise before and after dropping the others
    dim: int
    normalize_before: bool
    normalize_after: bool


class Batch(NamedTuple):
    """One batch of a window after the forward."""

    # positions of its texts in the window
    positions: list[int]
    lengths: list[int]
    output: NomicMoEOutput


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


def forward(
    model: NomicMoEModel, tokens: Tokens, plan: Plan, bar: tqdm[Any], *, routing: bool = False
) -> Iterator[Batch]:
    """Run a window batch by batch, longest texts first."""
    lengths = [len(ids) for ids in tokens.ids]
    for positions in make_batches(lengths, plan.batch_tokens, plan.batch_size):
        ids = list(chain.from_iterable(tokens.ids[position] for position in positions))
        batch_lengths = [lengths[position] for position in positions]
        # not inference mode: its tensors could not be used in anybody's training
        with torch.no_grad():
            output = model.forward_packed(
                torch.tensor(ids, dtype=torch.int64).to(model.device),
                batch_lengths,
                output_routing=routing,
            )
        yield Batch(positions, batch_lengths, output)
        bar.update(len(positions))


@torch.no_grad()
def pool(model: NomicMoEModel, batch: Batch, plan: Plan) -> Tensor:
    """Pool, truncate and normalise, (B, d) float32."""
    mean_pool = model.backend.ops.mean_pool
    vectors = mean_pool(batch.output.last_hidden_state, batch.lengths)
    if plan.normalize_before:
        vectors = F.normalize(vectors, dim=1)
    vectors = vectors[:, : plan.dim]
    return F.normalize(vectors, dim=1) if plan.normalize_after else vectors


def embed(model: NomicMoEModel, tokens: Tokens, plan: Plan, bar: tqdm[Any]) -> Tensor:
    """Embed a window; (m, d) float32 on the model's device, in the window's order."""
    vectors = torch.empty(len(tokens.ids), plan.dim, dtype=torch.float32, device=model.device)
    for batch in forward(model, tokens, plan, bar):
        vectors[batch.positions] = pool(model, batch, plan)
    return vectors


def embed_tokens(
    model: NomicMoEModel, tokens: Tokens, plan: Plan, bar: tqdm[Any]
) -> list[dict[str, Tensor]]:
    """Embed a window token by token: a dict per text, in the window's order."""
    rows: list[dict[str, Tensor]] = [{}] * len(tokens.ids)
    for batch in forward(model, tokens, plan, bar):
        hidden = batch.output.last_hidden_state.float().split(batch.lengths)
        vectors = pool(model, batch, plan)
        for position, hidden_LD, vector in zip(batch.positions, hidden, vectors, strict=True):
            ids = torch.tensor(tokens.ids[position])
            # clones, or keeping one text would keep its whole batch
            rows[position] = {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "token_embeddings": hidden_LD.clone(),
                "sentence_embedding": vector.clone(),
            }
    return rows


def progress(show: bool | None, total: int | None) -> tqdm[Any]:
    """Make a progress bar; None shows it on a terminal once the work has taken a while."""
    # given None, tqdm itself keeps silent where stderr is no terminal
    disable = None if show is None else not show
    delay = _BAR_DELAY_S if show is None else 0
    return tqdm(total=total, unit=" texts", desc="embedding", disable=disable, delay=delay)
