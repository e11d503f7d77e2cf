"""The model and the texts that benchmarks run, made so that the work is like the real model's."""

from __future__ import annotations

import json
import shutil
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from nomoe import NomicMoEConfig, NomicMoEModel
from nomoe.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from nomoe.moe import MoE, router_input
from nomoe.synthetic import random_model

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


def draw_model(config: NomicMoEConfig, texts: list[list[int]], seed: int) -> NomicMoEModel:
    """Draw a float32 model that routes these texts about as the real one routes real text.

    Layer by layer, random weights make the tokens of a text alike, and random routers then send
    nearly all of them to the same two experts; in the real model 16 tokens already touch 7.9 of 8.
    So each router is made blind to the mean of every text, in the order of the data.

    Args:
        config: Sizes, of which the width must exceed the number of texts.
        texts: Token ids.
        seed: Of the weights.
    """
    model = random_model(config, seed)
    lengths = [len(ids) for ids in texts]

    def spread(moe: MoE, inputs: tuple[Any, ...]) -> None:
        x_TD, weight_ED = router_input(inputs), moe.router.layer.weight
        means_BD = torch.stack([part.mean(dim=0) for part in x_TD.split(lengths)])
        # orthonormal columns that span the means
        basis_DB = torch.linalg.qr(means_BD.T).Q
        weight_ED -= weight_ED @ basis_DB @ basis_DB.T
        weight_ED *= _LOGIT_SPREAD / (x_TD @ weight_ED.T).std()

    handles = [
        module.register_forward_pre_hook(spread)
        for module in model.modules()
        if isinstance(module, MoE)
    ]
    with torch.no_grad():
        model.forward_packed(torch.tensor(list(chain.from_iterable(texts))), lengths)
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
