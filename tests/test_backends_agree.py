"""Mixed batches in float32: the triton backend against plain torch, text by text.

Rounding may send a token near a tie to other experts, and with it, by attention, its text in all
layers after. So of each text the first layer counts in which the two differ: there the experts in
question have to be next to each other. And where plain torch takes the other's experts, it has to
come to the other's vectors.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from nomoe import NomicMoEModel
from nomoe.engine import Pooling
from nomoe.moe import MoE, router_input
from nomoe_kernels import cpu, reference

CUDA = torch.cuda.is_available()
pytestmark = [pytest.mark.gpu] if CUDA else []
BATCHES = 1000 if CUDA else 3
MOST_TOKENS = 4096 if CUDA else 40
# in the router's probabilities
NEAR = 1e-5


class Compared(NamedTuple):
    """Of the texts of a batch."""

    # 1 - cosine of the vectors, float64
    distances: Tensor
    # by text that went to other experts: how far apart these are in probability
    gaps: dict[int, float]
    # 1 - cosine of the other's vectors and plain torch's with the other's experts
    explained: Tensor


def build(backend: Any, request: pytest.FixtureRequest) -> NomicMoEModel:
    """On CUDA the real sizes, but for the vocabulary; in the interpreter two small layers."""
    if not CUDA:
        folder = request.getfixturevalue("shallow_folder")
        return NomicMoEModel.from_pretrained(folder, device="cpu", backend=backend)
    full_width = request.getfixturevalue("full_width")
    with torch.device("cuda"):
        model = NomicMoEModel(full_width.config, backend=backend)
    model.load_state_dict(full_width.state_dict())
    return model.eval()


@pytest.fixture(scope="module")
def plain(request: pytest.FixtureRequest) -> NomicMoEModel:
    return build("torch", request)


@pytest.fixture(scope="module")
def triton(request: pytest.FixtureRequest) -> NomicMoEModel:
    return build("triton", request)


def draw_batch(generator: random.Random, model: NomicMoEModel) -> tuple[Tensor, list[int]]:
    """Texts of 1 to 512 tokens, most of them short; ids end to end."""
    lengths: list[int] = []
    wanted = generator.randint(1, 64)
    while len(lengths) < wanted:
        length = min(int(2 ** generator.uniform(0, 9)), MOST_TOKENS - sum(lengths))
        if not length:
            break
        lengths.append(length)
    rows = model.config.embedding_rows
    ids = [generator.randrange(4, rows) for _ in range(sum(lengths))]
    return torch.tensor(ids, device=model.device), lengths


@contextmanager
def routed_as(experts: Sequence[Tensor]) -> Iterator[None]:
    """Have plain torch send the tokens where each layer's (T, K) says, by its own weights."""
    route, turns = reference.route, iter(experts)

    def forced(
        x_TD: Tensor, router_ED: Tensor, top_k: int, *, normalize: bool = False
    ) -> tuple[Tensor, Tensor]:
        ranked_TE, order_TE = route(x_TD, router_ED, len(router_ED))
        probabilities_TE = torch.empty_like(ranked_TE).scatter_(1, order_TE, ranked_TE)
        theirs_TK = next(turns)
        # rows beyond are of a text that only fills the batch
        experts_TK = torch.cat([theirs_TK, order_TE[len(theirs_TK) :, :top_k]])
        weights_TK = probabilities_TE.gather(1, experts_TK)
        assert not normalize
        return weights_TK, experts_TK

    with pytest.MonkeyPatch.context() as patch:
        for module in (reference, cpu):
            patch.setattr(module, "route", forced)
        yield


@torch.no_grad()
def compare(
    plain: NomicMoEModel, other: NomicMoEModel, ids_T: Tensor, lengths: list[int]
) -> Compared:
    config = plain.config
    gaps_LT: list[Tensor] = []

    def look(moe: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(moe, MoE)
        # rows beyond the tokens are of a text that only fills the batch
        x_TD = router_input(inputs)[: len(ids_T)].double()
        sorted_TE = (x_TD @ moe.router.layer.weight.double().T).softmax(1).sort(1, True)[0]
        # of an order that rounding may change: within the chosen, and to the first that is not
        gaps_LT.append((-sorted_TE.diff(dim=1))[:, : config.moe_top_k].amin(dim=1))

    hooks = [one.register_forward_pre_hook(look) for one in plain.modules() if isinstance(one, MoE)]
    try:
        expected = plain.forward_packed(ids_T, lengths, output_routing=True)
    finally:
        for hook in hooks:
            hook.remove()
    got = other.forward_packed(ids_T, lengths, output_routing=True)
    with routed_as(got.router_experts):
        forced = plain.forward_packed(ids_T, lengths, output_routing=True)
    assert all(map(torch.equal, forced.router_experts, got.router_experts))
    pooling = Pooling(config.n_embd, False, False)
    vectors = [
        reference.pool(one.last_hidden_state, lengths, pooling).double()
        for one in (expected, got, forced)
    ]
    gaps: dict[int, float] = {}
    assert len(gaps_LT) == len(expected.router_experts) == len(got.router_experts)
    for gaps_T, *experts in zip(gaps_LT, expected.router_experts, got.router_experts, strict=True):
        differs_T = (experts[0] != experts[1]).any(dim=1)
        # of a token that stays where it was, the gap says nothing
        parts = torch.where(differs_T, gaps_T, -1).split(lengths)
        for text, most in enumerate(torch.stack([part.max() for part in parts]).tolist()):
            if most >= 0:
                gaps.setdefault(text, most)
    distances, explained = (
        1 - torch.nn.functional.cosine_similarity(vectors[1], one) for one in vectors[::2]
    )
    return Compared(distances, gaps, explained)


def test_mixed_batches(plain: NomicMoEModel, triton: NomicMoEModel) -> None:
    assert (plain.backend.name, triton.backend.name) == ("torch", "triton")
    generator = random.Random(0)
    texts = flipped = 0
    for batch in range(BATCHES):
        ids_T, lengths = draw_batch(generator, plain)
        distances, gaps, explained = compare(plain, triton, ids_T, lengths)
        assert all(gap < NEAR for gap in gaps.values()), (batch, gaps)
        stayed = [text for text in range(len(lengths)) if text not in gaps]
        assert (distances[stayed] < 1e-9).all(), (batch, distances.max())
        assert (explained < 1e-9).all(), (batch, explained.max())
        texts += len(lengths)
        flipped += len(gaps)
    print(f"{BATCHES} batches of {texts} texts, {flipped} with other experts near a tie")
    assert flipped <= 0.01 * texts


def test_a_router_that_is_off_is_seen(plain: NomicMoEModel, triton: NomicMoEModel) -> None:
    generator = random.Random(1)
    found: list[float] = []
    router = next(one for one in triton.modules() if isinstance(one, MoE)).router.layer
    right = router.weight.data
    router.weight.data = right + 0.1 * torch.randn_like(right) * right.std()
    try:
        for _ in range(2):
            found += compare(plain, triton, *draw_batch(generator, plain)).gaps.values()
    finally:
        router.weight.data = right
    assert max(found) > NEAR
