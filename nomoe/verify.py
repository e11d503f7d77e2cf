"""Parity of this machine's backend and dtype with the golden data, and with the published model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cosine_similarity

from . import data
from .backends import BackendName
from .checkpoint import CONFIG_FILE
from .config import NomicMoEConfig
from .encoder import Encoder
from .model import NomicMoEModel
from .moe import Followed, MoE, router_input
from .synthetic import random_model

# absolute, on every hidden state, pooled vector and router weight; a plain float32 implementation
# is within 2.2e-6 (tiny) and 6.2e-6 (full_width), a single TF32 pass is not
FLOAT32_BOUND = {"tiny": 1e-5, "full_width": 5e-5}
# 1 - cosine of pooled vectors on full_width: texts in which no expert differs from the oracle's ...
POOLED_BOUND = {torch.float16: 5e-6, torch.bfloat16: 2e-3}
# ... and texts in which one does; float16 may only differ where the oracle's gap is below this, the
# oracle having taken the same experts until then: one flip moves all that its text does after it
FLIPPED_BOUND = {torch.float16: 1e-4, torch.bfloat16: 2e-3}
FLIP_GAP = {torch.float16: 2e-3}

CARD_BOUND = 2e-5
PUBLISHED_COSINE = 0.99999

REFERENCE_TEXTS = 64
REFERENCE_HIDDEN_BOUND = 1e-4
REFERENCE_GAP = 1e-5
REFERENCE_POOLED_BOUND = 1e-9


class Check(NamedTuple):
    """One line of the table."""

    name: str
    measured: str
    bound: str
    result: Literal["ok", "MISS", "skipped"]


class GoldenCase(NamedTuple):
    """Inputs of one golden case and what an independent float64 implementation answers."""

    name: str
    input_ids: Tensor
    attention_mask: Tensor
    # by index, 0 after the embedding norm; full_width has the last only
    hidden: dict[int, Tensor]
    pooled: Tensor
    router_weights: list[Tensor]
    router_experts: list[Tensor]


def golden_cases(folder: Path) -> Iterator[GoldenCase]:
    """Read the golden cases of `nomoe.data.TINY` or `nomoe.data.FULL_WIDTH`."""
    stored = load_file(folder / "cases.safetensors")
    for name in sorted({key.split(".")[0] for key in stored}):
        layers = sum(key.startswith(f"{name}.router_weights.") for key in stored)
        yield GoldenCase(
            name,
            stored[f"{name}.input_ids"],
            stored[f"{name}.attention_mask"],
            {
                int(key.rsplit(".", 1)[1]): tensor
                for key, tensor in stored.items()
                if key.startswith(f"{name}.hidden.")
            },
            stored[f"{name}.pooled"],
            [stored[f"{name}.router_weights.{layer}"] for layer in range(layers)],
            [stored[f"{name}.router_experts.{layer}"] for layer in range(layers)],
        )


def full_width_model() -> NomicMoEModel:
    """Build the float32 model of `nomoe.data.FULL_WIDTH`; its 1.1 GB of weights are drawn."""
    return random_model(NomicMoEConfig.from_json(data.FULL_WIDTH / CONFIG_FILE), seed=0)


def verify_golden(device: torch.device, dtype: torch.dtype, backend: BackendName) -> list[Check]:
    """Compare with the golden data that ships: both sizes in float32, full_width in 16 bits."""
    if dtype == torch.float32:
        tiny = NomicMoEModel.from_pretrained(data.TINY, device=device, dtype=dtype, backend=backend)
        checks = [
            check
            for case in golden_cases(data.TINY)
            for check in compare_float32(tiny, case, "tiny")
        ]
        model = _on(full_width_model(), device, dtype, backend)
        for case in golden_cases(data.FULL_WIDTH):
            checks += compare_float32(model, case, "full_width")
        return checks
    exact = full_width_model()
    # the gaps are nomoe's own in float32 on the CPU, so that has to hold first
    checks = [
        check
        for case in golden_cases(data.FULL_WIDTH)
        for check in compare_float32(exact, case, "full_width in float32")
    ]
    model = _on(exact, device, dtype, backend)
    for case in golden_cases(data.FULL_WIDTH):
        checks += compare_16_bit(model, case, partial(follow, exact, case))
    return checks


def _on(
    model: NomicMoEModel, device: torch.device, dtype: torch.dtype, backend: BackendName
) -> NomicMoEModel:
    with torch.device("meta"):
        moved = NomicMoEModel(model.config, backend=backend)
    state = {name: one.to(device, dtype) for name, one in model.state_dict().items()}
    moved.load_state_dict(state, assign=True)
    return moved.eval()


@torch.no_grad()
def compare_float32(model: NomicMoEModel, case: GoldenCase, size: str) -> list[Check]:
    """Compare every stored number of a case, absolutely."""
    output = model(
        case.input_ids.to(model.device),
        case.attention_mask.to(model.device),
        output_hidden_states=True,
        output_routing=True,
    )
    bound = FLOAT32_BOUND[size.partition(" ")[0]]
    hidden = _largest(
        _distance(output.hidden_states[index], expected) for index, expected in case.hidden.items()
    )
    pooled = _pool(output.last_hidden_state, case.attention_mask)
    weights = _largest(map(_distance, output.router_weights, case.router_weights))
    flips = _flips(output.router_experts, case.router_experts)
    name = f"golden {size} {case.name}"
    return [
        _at_most(f"{name}: hidden states", hidden, bound),
        _at_most(f"{name}: pooled", _distance(pooled, case.pooled), bound),
        _at_most(f"{name}: router weights", weights, bound),
        _at_most(f"{name}: experts that differ", int(flips.sum()), 0),
    ]


@torch.no_grad()
def compare_16_bit(
    model: NomicMoEModel,
    case: GoldenCase,
    follow: Callable[[Sequence[Tensor]], tuple[Tensor, Tensor]],
) -> list[Check]:
    """Compare pooled vectors, and experts with those of an exact model; `follow` asks it."""
    output = model(
        case.input_ids.to(model.device),
        case.attention_mask.to(model.device),
        output_routing=True,
    )
    assert output.router_experts is not None
    pooled = _pool(output.last_hidden_state, case.attention_mask)
    distances = 1 - cosine_similarity(pooled, case.pooled.double())
    flips_TM = _flips(output.router_experts, case.router_experts)
    text_T = case.attention_mask.nonzero()[:, 0]
    flipped = {int(text) for text in text_T[flips_TM.any(dim=1)]}
    name = f"golden full_width {case.name}"
    checks = []
    for text, distance in enumerate(distances.tolist()):
        kind, bound = (
            (", an expert differs", FLIPPED_BOUND) if text in flipped else ("", POOLED_BOUND)
        )
        checks.append(
            _at_most(f"{name}, text {text}{kind}: 1 - cosine", distance, bound[model.dtype])
        )
    if model.dtype in FLIP_GAP and flipped:
        differs_TM, gaps_TM = follow([one.cpu() for one in output.router_experts])
        widest = float(gaps_TM[differs_TM].max())
        bound_gap = FLIP_GAP[model.dtype]
        checks.append(_at_most(f"{name}: widest gap at which experts differ", widest, bound_gap))
    return checks


@torch.no_grad()
def follow(
    model: NomicMoEModel, case: GoldenCase, experts: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Run a model on experts that another chose, and ask it at every token what it would have.

    Args:
        model: On the CPU.
        case: What to run.
        experts: The other's choices, (T, K) for each MoE layer.

    Returns:
        differs_TM: Where it would have chosen others, (T, MoE layers).
        gaps_TM: How sure it was: probability of its K-th expert less that of the next.
    """
    own: list[Tensor] = []
    gaps: list[Tensor] = []
    told = iter(experts)

    def hook(moe: MoE, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        logits_TE = router_input(inputs).double() @ moe.router.layer.weight.double().T
        probabilities_TE = torch.softmax(logits_TE, dim=-1)
        own.append(probabilities_TE.topk(moe.top_k).indices)
        gaps.append(_gap(probabilities_TE, moe.top_k))
        return (*inputs[:4], Followed(next(told)))

    handles = [
        part.register_forward_pre_hook(hook) for part in model.modules() if isinstance(part, MoE)
    ]
    try:
        # in training mode nothing is laid out for a CPU, and that is all that changes
        model.train()(case.input_ids, case.attention_mask)
    finally:
        model.eval()
        for handle in handles:
            handle.remove()
    return _flips(own, experts), torch.stack(gaps, dim=1)


def verify_published(encoder: Encoder) -> list[Check]:
    """Compare the real weights in float32 with the figures others published for them."""
    figures = data.published()
    state = encoder.model.state_dict()
    parameters = sum(tensor.numel() for tensor in state.values())
    wanted = figures["checkpoint"]
    checks = [
        _equal("published: tensors", len(state), wanted["tensors"]),
        _equal("published: parameters", parameters, wanted["parameters"]),
    ]
    if any(check.result == "MISS" for check in checks):
        # another model: its vectors may not even have as many features
        return checks
    pair = torch.from_numpy(encoder.encode(figures["card_similarity"]["texts"]))
    cosine = float(cosine_similarity(pair[0].double(), pair[1].double(), dim=0))
    expected = figures["card_similarity"]["cosine_more_digits"]
    vectors = figures["mean_pooled_unnormalised_float32"]
    ours = torch.from_numpy(encoder.encode(vectors["texts"], prompt="")).double()
    cosines = cosine_similarity(ours, torch.tensor(vectors["vectors"], dtype=torch.float64))
    return [
        *checks,
        _at_most(
            f"published: the card's pair, {cosine:.6f} from {expected}",
            abs(cosine - expected),
            CARD_BOUND,
        ),
        *(
            Check(
                f"published: vector {text}, cosine",
                f"{cosine:.7f}",
                f">= {PUBLISHED_COSINE}",
                "ok" if cosine >= PUBLISHED_COSINE else "MISS",
            )
            for text, cosine in enumerate(cosines.tolist())
        ),
    ]


def reference_texts() -> list[str]:
    """Sixty-four texts in twenty languages with trained prefixes, from a few to 300 tokens.

    Shorter ones come first, so that the reference, which pads its batches, has little to pad.
    """
    groups = list(data.sentences().values())
    single = list(chain.from_iterable(zip_longest(*groups)))
    # every eighth text is long: a language's five sentences, three times over
    texts = [
        " ".join(groups[i % len(groups)] * 3) if i % 8 == 7 else text
        for i, text in enumerate(islice(single, REFERENCE_TEXTS))
    ]
    prefixes = ("search_query: ", "search_document: ", "classification: ", "clustering: ")
    return sorted((prefixes[i % 4] + text for i, text in enumerate(texts)), key=len)


def verify_reference(
    encoder: Encoder, repo: str, revision: str | None, code_revision: str | None
) -> list[Check]:
    """Compare with the reference Hugging Face code, run in a process of its own.

    Args:
        encoder: nomoe on the same weights, float32.
        repo: Repository or folder whose config.json has an `auto_map`.
        revision: Of the weights.
        code_revision: Of the code, where it lives in another repository.

    Raises:
        RuntimeError: The reference did not run; its last words are in the message.
    """
    with tempfile.TemporaryDirectory() as folder:
        texts, answers = Path(folder) / "texts.json", Path(folder) / "answers.safetensors"
        texts.write_text(json.dumps(reference_texts()), encoding="utf-8")
        command = [sys.executable, "-m", "nomoe.reference_hf", repo, str(texts), str(answers)]
        command += [f"--revision={revision}"] if revision else []
        command += [f"--code-revision={code_revision}"] if code_revision else []
        command += [f"--max-length={encoder.max_seq_length}"]
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            # transformers copies the code it runs; nothing of it is to stay
            env=os.environ | {"HF_MODULES_CACHE": str(Path(folder) / "modules")},
        )
        if done.returncode:
            tail = "\n".join(done.stderr.strip().splitlines()[-8:])
            raise RuntimeError(f"the reference code did not run:\n{tail}")
        stored = load_file(answers)
    return compare_reference(encoder, stored)


@torch.no_grad()
def compare_reference(encoder: Encoder, stored: dict[str, Tensor]) -> list[Check]:
    """Compare with what `nomoe.reference_hf` wrote."""
    model = encoder.model
    config = model.config
    tokens = encoder.tokenizer(reference_texts(), encoder.max_seq_length)
    ids_T = torch.tensor(list(chain.from_iterable(tokens.ids)))
    lengths = [len(ids) for ids in tokens.ids]
    if not torch.equal(ids_T, stored["ids"]) or lengths != stored["lengths"].tolist():
        return [Check("reference: token ids", "differ", "equal", "MISS")]
    output = model.forward_packed(
        ids_T.to(model.device), lengths, output_hidden_states=True, output_routing=True
    )
    checks = [Check("reference: token ids", "equal", "equal", "ok")]
    assert output.hidden_states is not None
    assert output.router_experts is not None
    for layer, ours in enumerate(output.hidden_states):
        distance = _distance(ours, stored[f"hidden.{layer}"])
        name = f"reference: hidden state {layer} of {config.n_layer}"
        checks.append(_at_most(name, distance, REFERENCE_HIDDEN_BOUND))
    differing = 0
    for layer, ours in zip(config.moe_layers, output.router_experts, strict=True):
        probabilities_TE = stored[f"probabilities.{layer}"]
        clear_T = _gap(probabilities_TE, config.moe_top_k) > REFERENCE_GAP
        theirs = probabilities_TE.topk(config.moe_top_k).indices
        differing += int((_flips([ours], [theirs])[:, 0] & clear_T).sum())
    checks.append(
        _at_most(f"reference: experts that differ at gaps above {REFERENCE_GAP}", differing, 0)
    )
    ours_BD, theirs_BD = (
        torch.stack([part.double().mean(dim=0) for part in hidden_TD.cpu().split(lengths)])
        for hidden_TD in (output.last_hidden_state, stored[f"hidden.{config.n_layer}"])
    )
    distance = float((1 - cosine_similarity(ours_BD, theirs_BD)).max())
    checks.append(_at_most("reference: pooled, 1 - cosine", distance, REFERENCE_POOLED_BOUND))
    return checks


def table(checks: list[Check]) -> str:
    """Render checks as aligned text."""
    rows = [("check", "measured", "bound", "result"), *checks]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _pool(hidden_BLD: Tensor, attention_mask: Tensor) -> Tensor:
    """Masked mean in float64 on the CPU, so that pooling adds no error of its own."""
    mask_BL1 = attention_mask[..., None].double()
    return (hidden_BLD.cpu().double() * mask_BL1).sum(dim=1) / mask_BL1.sum(dim=1)


def _distance(ours: Tensor, expected: Tensor) -> float:
    return float((ours.cpu().double() - expected.double()).abs().max())


def _largest(distances: Iterable[float]) -> float:
    # unlike max(), which loses a NaN that is not the first
    return float(torch.tensor(list(distances), dtype=torch.float64).max())


def _flips(ours: Sequence[Tensor], expected: Sequence[Tensor]) -> Tensor:
    """Where the set of chosen experts differs, (T, MoE layers)."""
    return torch.stack(
        [
            (one.cpu().sort(dim=1).values != other.sort(dim=1).values).any(dim=1)
            for one, other in zip(ours, expected, strict=True)
        ],
        dim=1,
    )


def _gap(probabilities_TE: Tensor, top_k: int) -> Tensor:
    if top_k == probabilities_TE.shape[1]:
        return torch.ones(len(probabilities_TE))
    best = probabilities_TE.topk(top_k + 1).values
    return best[:, -2] - best[:, -1]


def _at_most(name: str, value: float, bound: float) -> Check:
    # written so that a NaN misses
    result: Literal["ok", "MISS"] = "ok" if value <= bound else "MISS"
    measured = f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
    return Check(name, measured, f"<= {bound:.3g}", result)


def _equal(name: str, value: int, expected: int) -> Check:
    return Check(name, f"{value:,}", f"= {expected:,}", "ok" if value == expected else "MISS")
