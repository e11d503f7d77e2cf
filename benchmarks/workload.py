"""The model and the texts that benchmarks run, made so that the work is like the real model's."""

from __future__ import annotations

import json
import random
import shutil
from itertools import chain, cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from nomoe import NomicMoEConfig, NomicMoEModel, data
from nomoe.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from nomoe.moe import MoE, router_input
from nomoe.synthetic import random_model
from nomoe.tokenizer import Tokenizer

# spread of the router's logits, at which the two best of eight experts take the 0.7 of a token that
# they take in the real model
_LOGIT_SPREAD = 1.5


def draw_texts(config: NomicMoEConfig, seed: int) -> dict[str, list[list[int]]]:
    """Draw texts of random token ids: one short, a batch of equals, a batch of mixed lengths."""
    generator = np.random.default_rng(seed)
    shapes = {
        "1 text of 16 tokens": [16],
        "8 texts of 128 tokens": [128] * 8,
        "16 texts of 16 to 256 tokens": generator.integers(16, 256, 16, endpoint=True).tolist(),
    }
    # the first ids are special tokens
    return {
        title: [generator.integers(4, config.vocab_size, length).tolist() for length in lengths]
        for title, lengths in shapes.items()
    }


# texts by kind: their prompt, and the range of their tokens, prompt and special tokens included
KINDS = {
    "queries": ("search_query: ", 8, 30),
    "passages": ("search_document: ", 60, 250),
    "documents": ("search_document: ", 512, 512),
}


class Writer:
    """Writes texts of words drawn from the shipped sentences, each text in one of twenty languages.

    Args:
        tokenizer: Of the model that will read them.
        seed: Of the words and lengths.
    """

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self._tokenizer = tokenizer
        self._generator = random.Random(seed)
        languages = {
            language: " ".join(sentences).split()
            for language, sentences in data.sentences().items()
        }
        # what each word costs: by itself it has two special tokens more
        self._costs = {
            language: [len(ids) - 2 for ids in tokenizer(words, 512).ids]
            for language, words in languages.items()
        }
        self._words = languages
        self._turn = cycle(languages)

    def text(self, shortest: int, longest: int, prompt: str = "") -> str:
        """A text of so many tokens, prompt and special tokens included, in the next language.

        Words are whole, so it may be a few tokens longer where it is not cut at 512.
        """
        language = next(self._turn)
        words, costs = self._words[language], self._costs[language]
        room = self._generator.randint(shortest, longest)
        room -= len(self._tokenizer([prompt], 512).ids[0])
        chosen = []
        while room > 0:
            place = self._generator.randrange(len(words))
            chosen.append(words[place])
            room -= max(1, costs[place])
        return prompt + " ".join(chosen)

    def texts(self, kind: str, count: int) -> list[str]:
        """Texts of one of `KINDS`."""
        prompt, shortest, longest = KINDS[kind]
        return [self.text(shortest, longest, prompt) for _ in range(count)]

    def inputs(self, scale: int) -> dict[str, list[str]]:
        """What people embed: one query, then queries, passages, documents, and a mixture of them.

        Args:
            scale: How many times 16 queries, 8 passages and 2 documents.
        """
        counts = {"queries": 16 * scale, "passages": 8 * scale, "documents": 2 * scale}
        made = {"1 query": self.texts("queries", 1)}
        made |= {f"{count:,} {kind}": self.texts(kind, count) for kind, count in counts.items()}
        mixture = [one for kind, count in counts.items() for one in self.texts(kind, count // 2)]
        self._generator.shuffle(mixture)
        return made | {f"a mixture of {len(mixture):,}": mixture}


def draw_model(
    config: NomicMoEConfig, texts: list[list[int]], seed: int, unevenness: float = 0.0
) -> NomicMoEModel:
    """Draw a float32 model that routes these texts about as the real one routes real text.

    Layer by layer, random weights make the tokens of a text alike, and random routers then send
    nearly all of them to the same two experts; in the real model 16 tokens already touch 7.9 of 8.
    So each router is made blind to the mean of every text, in the order of the data.

    Args:
        config: Sizes.
        texts: Token ids.
        seed: Of the weights.
        unevenness: Spread of the experts' offsets, in units of the logits' own spread: 0 sends
            every expert about as many tokens.

    Raises:
        ValueError: As many texts as the model is wide, or more: nothing is blind to all of them.
    """
    if len(texts) >= config.n_embd:
        raise ValueError(f"{len(texts)} texts, expected fewer than the width of {config.n_embd}")
    model = random_model(config, seed)
    lengths = [len(ids) for ids in texts]

    def spread(moe: MoE, inputs: tuple[Any, ...]) -> None:
        x_TD, weight_ED = router_input(inputs), moe.router.layer.weight
        means_BD = torch.stack([part.mean(dim=0) for part in x_TD.split(lengths)])
        # orthonormal columns that span the means
        basis_DB = torch.linalg.qr(means_BD.T).Q
        weight_ED -= weight_ED @ basis_DB @ basis_DB.T
        weight_ED *= _LOGIT_SPREAD / (x_TD @ weight_ED.T).std()
        # of the mean of any text this makes the offset, and nothing of what is across them all
        even_D = torch.linalg.lstsq(means_BD, torch.ones(len(lengths), 1)).solution[:, 0]
        offsets_E = torch.linspace(1.7, -1.7, moe.num_experts) * _LOGIT_SPREAD * unevenness
        weight_ED += offsets_E[:, None] * even_D

    handles = [
        module.register_forward_pre_hook(spread)
        for module in model.modules()
        if isinstance(module, MoE)
    ]
    with torch.no_grad():
        # in training mode nothing is laid out for a CPU: the hooks see these tokens and no others
        model.train().forward_packed(torch.tensor(list(chain.from_iterable(texts))), lengths)
        model.eval()
    for handle in handles:
        handle.remove()
    return model


def write_shallow(checkpoint: Path, folder: Path, layers: int = 2) -> Path:
    """Copy a checkpoint with its first layers alone, so that work around the model shows."""
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    (folder / CONFIG_FILE).write_text(json.dumps(config | {"n_layer": layers}), encoding="utf-8")
    kept = {
        name: tensor
        for name, tensor in load_file(folder / WEIGHTS_FILE).items()
        if not name.startswith("encoder.layers.") or int(name.split(".")[2]) < layers
    }
    (folder / WEIGHTS_FILE).unlink()
    save_file(kept, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    return folder
