"""The model once more, from its description, in float64 and in the most literal form.

Every expert runs on every token and the unchosen ones get weight zero; attention is a softmax over
an explicit score matrix, one text and one head at a time. Slow, differentiable, and sharing nothing
with nomoe but the checkpoint's tensor names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from nomoe import NomicMoEConfig


class Answer(NamedTuple):
    hidden: list[Tensor]
    # softmax over all experts in each MoE layer, (T, E)
    probabilities: list[Tensor]


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + eps) * weight + bias


def rotate(x_LH: Tensor, base: float) -> Tensor:
    length, width = x_LH.shape
    rows = []
    for position in range(length):
        angles = torch.tensor(
            [position / base ** (2 * i / width) for i in range(width // 2)], dtype=torch.float64
        )
        a, b = x_LH[position, : width // 2], x_LH[position, width // 2 :]
        rows.append(
            torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()])
        )
    return torch.stack(rows)


def encode(config: NomicMoEConfig, state: Mapping[str, Tensor], ids: list[int]) -> Answer:
    """Encode one text."""
    w = {name: tensor.double() for name, tensor in state.items()}
    D, N, F, E = config.n_embd, config.n_head, config.ffn_width, config.num_experts
    H = D // N
    eps = config.layer_norm_epsilon
    x = (
        w["embeddings.word_embeddings.weight"][ids]
        + w["embeddings.token_type_embeddings.weight"][0]
    )
    x = layer_norm(x, w["emb_ln.weight"], w["emb_ln.bias"], eps)
    hidden, probabilities = [x], []
    for layer in range(config.n_layer):
        p = f"encoder.layers.{layer}."
        qkv = x @ w[p + "attn.Wqkv.weight"].T + w[p + "attn.Wqkv.bias"]
        heads = []
        for head in range(N):
            q, k, v = (qkv[:, part * D + head * H : part * D + (head + 1) * H] for part in range(3))
            scores = rotate(q, config.rotary_emb_base) @ rotate(k, config.rotary_emb_base).T
            heads.append((scores / math.sqrt(H)).softmax(-1) @ v)
        y = torch.cat(heads, -1) @ w[p + "attn.out_proj.weight"].T + w[p + "attn.out_proj.bias"]
        x = layer_norm(x + y, w[p + "norm1.weight"], w[p + "norm1.bias"], eps)
        if layer % config.moe_every_n_layers == 1:
            probability = (x @ w[p + "mlp.router.layer.weight"].T).softmax(-1)
            probabilities.append(probability)
            best = probability.topk(config.moe_top_k).indices
            gate = torch.zeros_like(probability).scatter(1, best, 1.0) * probability
            if config.moe_normalize_expert_weights:
                gate = gate / gate.sum(-1, keepdim=True)
            y = w[p + "mlp.experts.bias"].expand_as(x)
            for e in range(E):
                w1 = w[p + "mlp.experts.mlp.w1"][e * F : (e + 1) * F]
                w2 = w[p + "mlp.experts.mlp.w2"][e * F : (e + 1) * F]
                y = y + gate[:, e : e + 1] * (gelu(x @ w1.T) @ w2)
        else:
            h = gelu(x @ w[p + "mlp.fc1.weight"].T + w[p + "mlp.fc1.bias"])
            y = h @ w[p + "mlp.fc2.weight"].T + w[p + "mlp.fc2.bias"]
        x = layer_norm(x + y, w[p + "norm2.weight"], w[p + "norm2.bias"], eps)
        hidden.append(x)
    return Answer(hidden, probabilities)


def rms_of(values: Tensor) -> float:
    return values.double().square().mean().sqrt().item()


def most_error(plain: Tensor, exact: Tensor, terms: int) -> float:
    """What a product of so many terms may be off by: half as much again as cuBLAS.

    For a few rows in float32 cuBLAS adds up many short sums. One long sum, rounded after each of
    its n terms, may be off by sqrt(n) roundings, 2**-24 each.
    """
    return max(1.5 * rms_of(plain - exact), terms**0.5 * 2**-24 * rms_of(exact))
