"""A whole checkpoint in the real format with random weights: for the demo, tests and benchmarks."""

from __future__ import annotations

import json
import math
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from torch import Tensor

from . import data
from .arguments import check_seed
from .checkpoint import (
    CONFIG_FILE,
    INDEX_FILE,
    MODULES_FILE,
    POOLING_FILE,
    PROMPTS_FILE,
    SENTENCE_FILE,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
)
from .config import NomicMoEConfig
from .model import NomicMoEModel
from .moe import MoE, router_input
from .repository import TRAINED_LENGTH, TRAINED_PROMPTS

Size = Literal["tiny", "full"]

# "tiny" keeps the twelve layers, six of them MoE, and the expert counts
_TINY = {"n_embd": 96, "n_head": 6, "n_inner": 192, "vocab_size": 2048}
_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
_PIECES = 2000
# spread of the experts' offsets in units of the logits' own spread: on the shipped sentences the
# busiest expert of a layer then takes two to three times its even share
_UNEVENNESS = 0.5


def write_checkpoint(folder: str | Path, size: Size = "tiny", seed: int = 0) -> Path:
    """Write a model repository with random weights, in every file as the published one.

    The router weights are scaled so that the mean sum of a token's top-2 weights is, layer by
    layer, what was published for the real model on real text, and loads are uneven. The tokenizer
    knows the shipped sentences' twenty languages; ids of `<s>`, `<pad>`, `</s>` and `<unk>` are the
    real ones.

    Args:
        folder: Where to write; created if absent.
        size: "tiny" (width 96, 2.6 M parameters, seconds) or "full" (the real 475,292,928
            parameters, 1.9 GB, under a minute).
        seed: Of the weights.

    Returns:
        The folder.

    Raises:
        ValueError: An unknown size, or a seed outside 0..2^32 - 1.
        FileExistsError: The folder already holds a checkpoint, or a part of one.
    """
    if size not in ("tiny", "full"):
        raise ValueError(f"size is {size!r}, expected 'tiny' or 'full'")
    seed = check_seed(seed)
    values = data.real_config() | (_TINY if size == "tiny" else {})
    text_files = _text_files(values)
    folder = Path(folder)
    taken = [
        name
        for name in (WEIGHTS_FILE, INDEX_FILE, TOKENIZER_FILE, *text_files)
        if (folder / name).exists()
    ]
    if taken:
        raise FileExistsError(f"{folder} already holds a checkpoint: {', '.join(taken)}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "2_Normalize").mkdir(exist_ok=True)

    tokenizer = _build_tokenizer()
    tokenizer.save(str(folder / TOKENIZER_FILE))
    for name, content in text_files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    config = NomicMoEConfig.from_dict(values)
    model = random_model(config, seed)
    _calibrate_routers(model, tokenizer)
    # a repository whose weights are there is whole
    unfinished = folder / f".{WEIGHTS_FILE}.unfinished"
    save_file(model.state_dict(), unfinished, metadata={"format": "pt"})
    # safetensors makes it private
    shutil.copymode(folder / CONFIG_FILE, unfinished)
    os.replace(unfinished, folder / WEIGHTS_FILE)
    return folder


def random_model(config: NomicMoEConfig, seed: int) -> NomicMoEModel:
    """Build a float32 model whose weights follow the golden data's recipe."""
    with torch.device("meta"):
        model = NomicMoEModel(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    model.load_state_dict(random_tensors(shapes, config, seed), assign=True)
    return model.eval()


def random_tensors(
    shapes: Mapping[str, tuple[int, ...]], config: NomicMoEConfig, seed: int
) -> dict[str, Tensor]:
    """Draw tensors by the golden data's recipe: each depends on its name and the seed alone."""

    def draw(item: tuple[str, tuple[int, ...]]) -> Tensor:
        name, shape = item
        generator = np.random.RandomState(zlib.crc32(name.encode()) ^ seed)
        values = generator.standard_normal(shape)
        if name.endswith(("norm1.weight", "norm2.weight", "emb_ln.weight")):
            values = 1 + 0.1 * values
        else:
            values *= _scale(name, shape, config)
        return torch.from_numpy(values.astype(np.float32))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(shapes, pool.map(draw, shapes.items()), strict=True))


def _scale(name: str, shape: tuple[int, ...], config: NomicMoEConfig) -> float:
    if name.endswith(".bias"):
        return 0.1
    if "router" in name:
        return 1.5 / math.sqrt(config.n_embd)
    if "embeddings" in name:
        return 0.5
    if name.endswith("w2"):
        return 1.5 / math.sqrt(config.ffn_width)
    return 1 / math.sqrt(config.ffn_width if name.endswith("fc2.weight") else shape[-1])


def _build_tokenizer() -> tokenizers.Tokenizer:
    """Build a small Unigram tokenizer from the shipped sentences, without a normaliser."""
    counts: Counter[str] = Counter()
    words = set()
    prompts = set(TRAINED_PROMPTS.values())
    for text in [*prompts, *(one for group in data.sentences().values() for one in group)]:
        for word in text.split():
            marked = "▁" + word
            words.add(marked)
            # every substring of up to six characters, and the whole word
            pieces = {marked[i:j] for i in range(len(marked)) for j in range(i + 1, i + 7)}
            counts.update(pieces | {marked})
    counts.update(chr(code) for code in range(33, 127))
    counts.update("▁")
    characters = sorted(piece for piece in counts if len(piece) == 1)
    # whole words first, as a trained vocabulary of this language mix would have them
    longer = sorted(
        (piece for piece in counts if len(piece) > 1),
        key=lambda piece: (piece not in words, -counts[piece] * len(piece), piece),
    )
    chosen = characters + longer[: _PIECES - len(characters)]
    total = sum(counts[piece] for piece in chosen)
    vocabulary = [(piece, 0.0) for piece in _SPECIAL]
    vocabulary += [(piece, math.log(counts[piece] / total)) for piece in chosen]
    vocabulary.append(("<mask>", 0.0))

    tokenizer = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=3, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    tokenizer.add_special_tokens([AddedToken(one, special=True) for one in _SPECIAL])
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    return tokenizer


def _text_files(config: dict[str, Any]) -> dict[str, Any]:
    special = {
        "bos_token": "<s>",
        "cls_token": "<s>",
        "eos_token": "</s>",
        "mask_token": "<mask>",
        "pad_token": "<pad>",
        "sep_token": "</s>",
        "unk_token": "<unk>",
    }
    kinds = ("Transformer", "Pooling", "Normalize")
    paths = ("", "1_Pooling", "2_Normalize")
    return {
        CONFIG_FILE: config,
        "tokenizer_config.json": special
        | {"model_max_length": TRAINED_LENGTH, "tokenizer_class": "XLMRobertaTokenizer"},
        "special_tokens_map.json": special,
        MODULES_FILE: [
            {
                "idx": idx,
                "name": str(idx),
                "path": path,
                "type": f"sentence_transformers.models.{kind}",
            }
            for idx, (kind, path) in enumerate(zip(kinds, paths, strict=True))
        ],
        POOLING_FILE: {
            "word_embedding_dimension": config["n_embd"],
            "pooling_mode_cls_token": False,
            "pooling_mode_mean_tokens": True,
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
            "pooling_mode_weightedmean_tokens": False,
            "pooling_mode_lasttoken": False,
            "include_prompt": True,
        },
        SENTENCE_FILE: {"max_seq_length": TRAINED_LENGTH, "do_lower_case": False},
        PROMPTS_FILE: {
            "prompts": TRAINED_PROMPTS,
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    }


@torch.no_grad()
def _calibrate_routers(model: NomicMoEModel, tokenizer: tokenizers.Tokenizer) -> None:
    """Set each router, in the order of the data, from the activations that reach it."""
    published = data.published()["routing_on_real_text"]["mean_top2_weight_sum_by_layer"]
    texts = [
        prompt + one
        for group in data.sentences().values()
        for one in group
        for prompt in ("search_query: ", "search_document: ")
    ]
    rows = [encoding.ids for encoding in tokenizer.encode_batch(texts)]

    def calibrate(layer: int) -> Any:
        def hook(moe: MoE, inputs: tuple[Any, ...]) -> None:
            x_TD = router_input(inputs).double()
            mean_D = x_TD.mean(dim=0)
            unit_D = mean_D / mean_D.square().sum()
            weight_ED = moe.router.layer.weight.double()
            # without its part along the mean activation a row's mean logit is zero ...
            weight_ED = weight_ED - (weight_ED @ mean_D)[:, None] * unit_D
            spread = (x_TD @ weight_ED.T).std()
            # ... and with offset * unit it is the offset
            offsets_E = torch.linspace(-1.7, 1.7, moe.num_experts).double().roll(layer) * spread
            weight_ED = weight_ED + _UNEVENNESS * offsets_E[:, None] * unit_D
            logits_TE = x_TD @ weight_ED.T
            low, high = 0.0, 100.0 / float(spread)
            for _ in range(60):
                scale = (low + high) / 2
                top_TK = (scale * logits_TE).softmax(dim=-1).topk(moe.top_k).values
                below = float(top_TK.sum(dim=-1).mean()) < published[str(layer)]
                low, high = (scale, high) if below else (low, scale)
            moe.router.layer.weight.copy_(scale * weight_ED)

        return hook

    handles = [
        model.get_submodule(f"encoder.layers.{layer}.mlp").register_forward_pre_hook(
            calibrate(layer)
        )
        for layer in model.config.moe_layers
    ]
    ids = torch.tensor([one for row in rows for one in row])
    # in training mode nothing is laid out for a CPU: the hooks see these tokens and no others
    model.train().forward_packed(ids, [len(row) for row in rows])
    model.eval()
    for handle in handles:
        handle.remove()
