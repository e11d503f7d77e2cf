"""The model in its padded form, head by head and expert by expert: slow and plain.

transformers loads this file by its folder's `auto_map` with trust_remote_code=True, as it loads the
published model's code. It shares no line with nomoe.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from .configuration_naive import NaiveNomicConfig


def rotate(x_BNLH, base):
    """Turn the pair (x[i], x[i + H / 2]) at position p by the angle p * base^(-2i / H)."""
    length, width = x_BNLH.shape[-2:]
    rotated = torch.empty_like(x_BNLH)
    for i in range(width // 2):
        angle_L = torch.arange(length, dtype=torch.float64) * base ** (-2 * i / width)
        cos_L, sin_L = angle_L.cos().to(x_BNLH.dtype), angle_L.sin().to(x_BNLH.dtype)
        a, b = x_BNLH[..., i], x_BNLH[..., i + width // 2]
        rotated[..., i] = a * cos_L - b * sin_L
        rotated[..., i + width // 2] = b * cos_L + a * sin_L
    return rotated


class Embeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        multiple = config.pad_vocab_size_multiple
        rows = -(-config.vocab_size // multiple) * multiple
        self.word_embeddings = nn.Embedding(rows, config.n_embd)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.n_embd)

    def forward(self, input_ids):
        return self.word_embeddings(input_ids) + self.token_type_embeddings.weight[0]


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.n_head
        self.base = config.rotary_emb_base
        self.Wqkv = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.out_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x_BLD, mask_B11L):
        width = x_BLD.shape[-1] // self.heads
        q_BLD, k_BLD, v_BLD = self.Wqkv(x_BLD).chunk(3, dim=-1)
        heads = []
        for head in range(self.heads):
            mine = slice(head * width, (head + 1) * width)
            q_B1LH = rotate(q_BLD[:, None, :, mine], self.base)
            k_B1LH = rotate(k_BLD[:, None, :, mine], self.base)
            scores_B1LL = q_B1LH @ k_B1LH.transpose(-1, -2) / width**0.5 + mask_B11L
            heads.append((scores_B1LL.softmax(dim=-1) @ v_BLD[:, None, :, mine])[:, 0])
        return self.out_proj(torch.cat(heads, dim=-1))


class Mlp(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.n_embd, config.n_inner)
        self.fc2 = nn.Linear(config.n_inner, config.n_embd)

    def forward(self, x_BLD):
        return self.fc2(F.gelu(self.fc1(x_BLD)))


class Router(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layer = nn.Linear(config.n_embd, config.num_experts, bias=False)
        self.top_k = config.moe_top_k
        self.normalize = config.moe_normalize_expert_weights

    def forward(self, x_TD):
        weights_TK, experts_TK = self.layer(x_TD).softmax(dim=-1).topk(self.top_k, dim=-1)
        if self.normalize:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        return weights_TK, experts_TK


class ExpertWeights(nn.Module):
    def __init__(self, config):
        super().__init__()
        rows = config.num_experts * config.n_inner
        self.w1 = nn.Parameter(torch.zeros(rows, config.n_embd))
        self.w2 = nn.Parameter(torch.zeros(rows, config.n_embd))


class Experts(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.width = config.n_inner
        self.num_experts = config.num_experts
        self.mlp = ExpertWeights(config)
        self.bias = nn.Parameter(torch.zeros(config.n_embd))

    def forward(self, x_TD, weights_TK, experts_TK):
        out_TD = torch.zeros_like(x_TD)
        for expert in range(self.num_experts):
            mine = slice(expert * self.width, (expert + 1) * self.width)
            w1_FD, w2_FD = self.mlp.w1[mine], self.mlp.w2[mine]
            tokens, ks = (experts_TK == expert).nonzero(as_tuple=True)
            h_RF = F.gelu(x_TD[tokens] @ w1_FD.T)
            out_TD[tokens] += weights_TK[tokens, ks, None] * (h_RF @ w2_FD)
        return out_TD + self.bias


class MoE(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config)

    def forward(self, x_BLD):
        x_TD = x_BLD.flatten(0, 1)
        return self.experts(x_TD, *self.router(x_TD)).view_as(x_BLD)


class Layer(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        is_moe = layer % config.moe_every_n_layers == 1
        self.attn = Attention(config)
        self.norm1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MoE(config) if is_moe else Mlp(config)
        self.norm2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)

    def forward(self, x_BLD, mask_B11L):
        x_BLD = self.norm1(x_BLD + self.attn(x_BLD, mask_B11L))
        # a tuple, as the published code returns
        return self.norm2(x_BLD + self.mlp(x_BLD)), None, None


class Layers(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.n_layer))

    def forward(self, x_BLD, mask_B11L):
        for layer in self.layers:
            x_BLD, _, _ = layer(x_BLD, mask_B11L)
        return x_BLD


class NaiveNomicModel(PreTrainedModel):
    config_class = NaiveNomicConfig

    def __init__(self, config):
        super().__init__(config)
        self.embeddings = Embeddings(config)
        self.emb_ln = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.encoder = Layers(config)
        self.post_init()

    def forward(self, input_ids, attention_mask):
        # a method that the published code calls and transformers 5.23 no longer has
        mask_B11L = self.get_extended_attention_mask(attention_mask, input_ids.shape)
        x_BLD = self.emb_ln(self.embeddings(input_ids))
        return BaseModelOutput(last_hidden_state=self.encoder(x_BLD, mask_B11L))
