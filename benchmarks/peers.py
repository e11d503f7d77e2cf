"""Other ways to run the same model, one adapter each, over the same weights.

An adapter takes token ids, so that all contenders do the same work and tokenising is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nomoe import NomicMoEConfig, NomicMoEModel
from nomoe.backends import Pooling
from nomoe.batching import make_batches
from nomoe.engine import Engine
from nomoe.moe import MoE, router_input

# experts that are less far apart in probability may change places by rounding in float32
NEAR_TIE = 2e-6
# a model whose router cannot tell experts apart has no text that is not near a tie
MOST_DRAWS = 20


class Peer(Protocol):
    """What an adapter offers. Making one is cheap: models of its own are loaded at first call."""

    name: str

    def available(self) -> str | None:
        """Return why it cannot run here, or None where it can."""

    def __call__(self, texts: list[list[int]]) -> Tensor:
        """Mean over each text's last hidden states, (B, D) in float32, in the order given.

        Args:
            texts: Token ids of each text, special tokens included.
        """


class Packed:
    """nomoe: packed batches without padding, longest text first, as `Encoder` runs them.

    On CUDA small ones replay graphs, like stock torch's.

    Args:
        model: The model.
        batch_tokens: Most tokens of a batch; None for one batch whatever its size.
    """

    def __init__(self, model: NomicMoEModel, batch_tokens: int | None = None) -> None:
        self.name = f"nomoe ({model.backend.name})"
        self.model = model
        self.engine = Engine(model)
        self.batch_tokens = batch_tokens

    def available(self) -> str | None:
        """It runs wherever its model was built."""
        return None

    @torch.no_grad()
    def __call__(self, texts: list[list[int]]) -> Tensor:
        """Embed, (B, D)."""
        pooling = Pooling(self.model.config.n_embd, False, False)
        batches = self.batches([len(ids) for ids in texts])
        under_way = []
        for positions in batches:
            some = [texts[position] for position in positions]
            ids, lengths = list(chain.from_iterable(some)), [len(one) for one in some]
            under_way.append(self.engine.embed(ids, lengths, pooling, to_host=False))
        pooled_BD = torch.cat([wait() for wait in under_way])
        if len(batches) == 1 and batches[0] == sorted(batches[0]):
            return pooled_BD
        order = torch.tensor(list(chain.from_iterable(batches)), device=self.model.device)
        return torch.empty_like(pooled_BD).index_copy_(0, order, pooled_BD)

    def batches(self, lengths: list[int]) -> list[list[int]]:
        """Positions of the texts of each batch."""
        return make_batches(lengths, self.batch_tokens or sum(lengths), None)

    @torch.no_grad()
    def routed_rows(self, texts: list[list[int]]) -> list[list[int]]:
        """Count the rows that go to each expert, for each MoE layer."""
        output = self.model.forward_packed(
            self._ids(texts), [len(ids) for ids in texts], output_routing=True
        )
        assert output.router_experts is not None
        return [
            experts_TK.flatten().bincount(minlength=self.model.config.num_experts).tolist()
            for experts_TK in output.router_experts
        ]

    @torch.no_grad()
    def near_ties(self, texts: list[list[int]], gap: float) -> list[int]:
        """Positions, in order, of texts that the last bit of a sum may send to other experts.

        Those have a token of which, in some layer, the last expert that is chosen and the first
        that is not are less than `gap` apart in the router's probabilities.
        """
        config = self.model.config
        if config.moe_top_k == config.num_experts:
            return []
        # of the batch under way
        is_near_T = torch.empty(0)

        def look(layer: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
            assert isinstance(layer, MoE)
            logits_TE = router_input(inputs) @ layer.router.layer.weight.float().T
            sorted_TE = logits_TE.softmax(dim=-1).sort(dim=-1, descending=True).values
            last_T, next_T = sorted_TE[:, config.moe_top_k - 1 :][:, :2].unbind(1)
            # rows beyond these are of a text that only fills the batch
            is_near_T.logical_or_((last_T - next_T < gap)[: len(is_near_T)])

        layers = [one for one in self.model.modules() if isinstance(one, MoE)]
        hooks = [one.register_forward_pre_hook(look) for one in layers]
        near = []
        try:
            for positions in self.batches([len(ids) for ids in texts]):
                lengths = [len(texts[position]) for position in positions]
                ids_T = self._ids(texts[position] for position in positions)
                is_near_T = torch.zeros_like(ids_T, dtype=torch.bool)
                self.model.forward_packed(ids_T, lengths)
                parts = zip(positions, is_near_T.split(lengths), strict=True)
                near += [position for position, part in parts if part.any()]
        finally:
            for hook in hooks:
                hook.remove()
        return sorted(near)

    def away_from_ties(
        self, texts: list[list[int]], draw: Callable[[int], list[int]]
    ) -> list[list[int]]:
        """Put other texts, drawn by their length, in the place of those that are near a tie."""
        texts = list(texts)
        for _ in range(MOST_DRAWS):
            near = self.near_ties(texts, NEAR_TIE)
            if not near:
                break
            for position in near:
                texts[position] = draw(len(texts[position]))
        return texts

    def _ids(self, texts: Iterable[list[int]]) -> Tensor:
        return torch.tensor(list(chain.from_iterable(texts))).to(self.model.device)


class PaddedLoop:
    """The form of the published remote code without megablocks: padded, looping over experts.

    Texts are padded to the longest and every layer works on all B * L positions, padding included;
    P below is that number. Experts run one after the other, on rows picked by Python lists of
    indices. It shares no code with nomoe.

    Args:
        config: Sizes and settings.
        tensors: A checkpoint's tensors, such as a `state_dict`; used as they are, without a copy.
        batch_size: Most texts of a batch. Like sentence-transformers, whose default this is, a
            larger input is split longest text first.
    """

    name = "padded loop"

    def __init__(
        self, config: NomicMoEConfig, tensors: Mapping[str, Tensor], batch_size: int = 32
    ) -> None:
        self.config = config
        self.tensors = tensors
        self.batch_size = batch_size

    def available(self) -> str | None:
        """It runs anywhere."""
        return None

    @torch.no_grad()
    def __call__(self, texts: list[list[int]]) -> Tensor:
        """Embed, (B, D)."""
        order = sorted(range(len(texts)), key=lambda position: -len(texts[position]))
        device = self.tensors["emb_ln.weight"].device
        pooled_BD = torch.empty(len(texts), self.config.n_embd, device=device)
        for start in range(0, len(texts), self.batch_size):
            positions = order[start : start + self.batch_size]
            pooled_BD[positions] = self._embed([texts[position] for position in positions], device)
        return pooled_BD

    def _embed(self, texts: list[list[int]], device: torch.device) -> Tensor:
        longest = max(len(ids) for ids in texts)
        pad = self.config.pad_token_id
        ids_BL = torch.tensor([ids + [pad] * (longest - len(ids)) for ids in texts]).to(device)
        lengths_B = torch.tensor([len(ids) for ids in texts]).to(device)
        mask_BL = torch.arange(longest, device=device) < lengths_B[:, None]

        words_BLD = F.embedding(ids_BL, self.tensors["embeddings.word_embeddings.weight"])
        type_D = self.tensors["embeddings.token_type_embeddings.weight"][0]
        x_BLD = self._norm("emb_ln", words_BLD + type_D)
        cos_LH, sin_LH = self._rotary(longest, x_BLD)
        for index in range(self.config.n_layer):
            layer = f"encoder.layers.{index}"
            y_BLD = self._attention(f"{layer}.attn", x_BLD, mask_BL, cos_LH, sin_LH)
            x_BLD = self._norm(f"{layer}.norm1", x_BLD + y_BLD)
            feed_forward = self._experts if self.config.is_moe_layer(index) else self._dense
            x_BLD = self._norm(f"{layer}.norm2", x_BLD + feed_forward(f"{layer}.mlp", x_BLD))

        real_BL1 = mask_BL[..., None]
        return (x_BLD.float() * real_BL1).sum(dim=1) / real_BL1.sum(dim=1)

    def _attention(
        self, name: str, x_BLD: Tensor, mask_BL: Tensor, cos_LH: Tensor, sin_LH: Tensor
    ) -> Tensor:
        qkv_BLD = self._linear(f"{name}.Wqkv", x_BLD)
        q_BNLH, k_BNLH, v_BNLH = (
            part_BLD.unflatten(-1, (self.config.n_head, -1)).transpose(1, 2)
            for part_BLD in qkv_BLD.chunk(3, dim=-1)
        )
        q_BNLH = q_BNLH * cos_LH + _turned(q_BNLH) * sin_LH
        k_BNLH = k_BNLH * cos_LH + _turned(k_BNLH) * sin_LH
        out_BNLH = F.scaled_dot_product_attention(
            q_BNLH, k_BNLH, v_BNLH, attn_mask=mask_BL[:, None, None, :]
        )
        return self._linear(f"{name}.out_proj", out_BNLH.transpose(1, 2).flatten(2))

    def _dense(self, name: str, x_BLD: Tensor) -> Tensor:
        return self._linear(f"{name}.fc2", F.gelu(self._linear(f"{name}.fc1", x_BLD)))

    def _experts(self, name: str, x_BLD: Tensor) -> Tensor:
        config = self.config
        x_PD = x_BLD.flatten(0, 1)
        logits_PE = F.linear(x_PD, self.tensors[f"{name}.router.layer.weight"])
        top_PK, experts_PK = logits_PE.softmax(dim=-1, dtype=torch.float32).topk(config.moe_top_k)
        if config.moe_normalize_expert_weights:
            top_PK = top_PK / top_PK.sum(dim=-1, keepdim=True)
        top_PK = top_PK.to(x_PD.dtype)

        w1_EFD = self.tensors[f"{name}.experts.mlp.w1"].unflatten(0, (config.num_experts, -1))
        w2_EFD = self.tensors[f"{name}.experts.mlp.w2"].unflatten(0, (config.num_experts, -1))
        out_PD = torch.zeros_like(x_PD)
        for expert in range(config.num_experts):
            rows, choices = torch.where(experts_PK == expert)
            if not len(rows):
                continue
            # by lists, as the remote code does: a copy to the host for every expert of every layer
            row_list, choice_list = rows.tolist(), choices.tolist()
            hidden = F.gelu(x_PD[row_list] @ w1_EFD[expert].T)
            product = hidden @ w2_EFD[expert] * top_PK[row_list, choice_list, None]
            out_PD.index_add_(0, rows, product)
        return out_PD.view_as(x_BLD) + self.tensors[f"{name}.experts.bias"]

    def _rotary(self, longest: int, x_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every angle in float32, both halves of a head alike, (L, H)."""
        width = self.config.head_width
        exponents = torch.arange(0, width, 2, device=x_BLD.device).float() / width
        positions_L = torch.arange(longest, device=x_BLD.device).float()
        angles = positions_L[:, None] * self.config.rotary_emb_base**-exponents
        angles_LH = torch.cat((angles, angles), dim=-1)
        return angles_LH.cos().to(x_BLD.dtype), angles_LH.sin().to(x_BLD.dtype)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])

    def _norm(self, name: str, x_BLD: Tensor) -> Tensor:
        weight_D, bias_D = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        return F.layer_norm(x_BLD, weight_D.shape, weight_D, bias_D, self.config.layer_norm_epsilon)


def _turned(x_BNLH: Tensor) -> Tensor:
    """Halves (a, b) -> (-b, a)."""
    a, b = x_BNLH.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)
