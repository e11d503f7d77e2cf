"""A good build of the same model from torch's own parts: what nomoe has to beat on a GPU.

Packed batches, `torch.nn.attention.varlen`, `F.grouped_mm`, and on CUDA `torch.compile` with CUDA
graphs. In bfloat16 nothing in it synchronises; in other dtypes `F.grouped_mm` does, and then it
runs as it is, without either. It shares no code with nomoe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor

from nomoe import NomicMoEConfig


def obstacle() -> str | None:
    """Why it cannot run here, or None."""
    return None if hasattr(F, "grouped_mm") else "this torch has no F.grouped_mm"


class Stock:
    """The model of torch's own operations, packed.

    Args:
        config: Sizes and settings.
        tensors: A checkpoint's tensors; used as they are, without a copy.
    """

    def __init__(self, config: NomicMoEConfig, tensors: Mapping[str, Tensor]) -> None:
        self.config = config
        self.tensors = tensors
        self.device = tensors["emb_ln.weight"].device
        self.dtype = tensors["emb_ln.weight"].dtype
        self._takes_varlen = self.device.type == "cuda" and self.dtype != torch.float32
        self._run: Callable[..., Tensor] = self._forward
        self.name = "stock torch"
        if self.device.type == "cuda" and self.dtype == torch.bfloat16:
            # a batch of another size is compiled anew: that is warm-up, and each is fastest so.
            # What others compiled counts towards a limit, beyond which nothing more is
            torch._dynamo.reset()
            for one in tensors.values():
                # else a graph copies the weights into buffers of its own at every call
                torch._dynamo.mark_static_address(one)
            self._run = torch.compile(self._forward, mode="reduce-overhead", dynamic=False)
            self.name = "stock torch, compiled"

    def available(self) -> str | None:
        """Return why it cannot run here, or None."""
        return obstacle()

    @torch.no_grad()
    def __call__(self, texts: list[list[int]]) -> Tensor:
        """Embed, (B, D)."""
        lengths = [len(ids) for ids in texts]
        ids_T = torch.tensor(list(chain.from_iterable(texts)))
        text_T = torch.arange(len(texts)).repeat_interleave(torch.tensor(lengths))
        # where each text begins, and where the last one ends
        starts = torch.tensor([0, *lengths]).cumsum(0)
        numbers = [ids_T, torch.arange(len(ids_T)) - starts[text_T], text_T, starts]
        together = torch.cat(numbers)
        if self.device.type == "cuda":
            together = together.pin_memory()
        on_device = together.to(self.device, non_blocking=True).split([len(one) for one in numbers])
        # compiled code would check every length at every call
        apart = None if self._takes_varlen else lengths
        return self._run(*on_device, max(lengths), apart)

    def _forward(
        self,
        ids_T: Tensor,
        positions_T: Tensor,
        text_T: Tensor,
        starts: Tensor,
        longest: int,
        lengths: Sequence[int] | None,
    ) -> Tensor:
        words_TD = F.embedding(ids_T, self.tensors["embeddings.word_embeddings.weight"])
        type_D = self.tensors["embeddings.token_type_embeddings.weight"][0]
        x_TD = self._norm("emb_ln", words_TD + type_D)
        width = self.config.head_width
        exponents = torch.arange(0, width, 2, device=self.device).float() / width
        angles = positions_T.float()[:, None] * self.config.rotary_emb_base**-exponents
        turn = (angles.cos()[:, None], angles.sin()[:, None])
        for index in range(self.config.n_layer):
            layer = f"encoder.layers.{index}"
            y_TD = self._attention(f"{layer}.attn", x_TD, turn, starts, longest, lengths)
            x_TD = self._norm(f"{layer}.norm1", x_TD + y_TD)
            feed_forward = self._experts if self.config.is_moe_layer(index) else self._dense
            x_TD = self._norm(f"{layer}.norm2", x_TD + feed_forward(f"{layer}.mlp", x_TD))
        sum_BD = torch.zeros(len(starts) - 1, x_TD.shape[1], device=self.device)
        return sum_BD.index_add(0, text_T, x_TD.float()) / starts.diff()[:, None]

    def _attention(
        self,
        name: str,
        x_TD: Tensor,
        turn: tuple[Tensor, Tensor],
        starts: Tensor,
        longest: int,
        lengths: Sequence[int] | None,
    ) -> Tensor:
        q_TNH, k_TNH, v_TNH = (
            part_TD.unflatten(-1, (self.config.n_head, -1))
            for part_TD in self._linear(f"{name}.Wqkv", x_TD).chunk(3, dim=-1)
        )
        q_TNH, k_TNH = (_rotate(one, *turn) for one in (q_TNH, k_TNH))
        if lengths is None:
            from torch.nn.attention.varlen import varlen_attn

            bounds = starts.int()
            out_TNH = varlen_attn(q_TNH, k_TNH, v_TNH, bounds, bounds, longest, longest)
        else:
            parts = zip(*(one.split(lengths) for one in (q_TNH, k_TNH, v_TNH)), strict=True)
            out_TNH = torch.cat(
                [
                    # four times as fast on a CPU with a dimension for the batch
                    F.scaled_dot_product_attention(*(one.transpose(0, 1)[None] for one in part))[0]
                    .transpose(0, 1)
                    for part in parts
                ]
            )  # fmt: skip
        return self._linear(f"{name}.out_proj", out_TNH.flatten(1))

    def _dense(self, name: str, x_TD: Tensor) -> Tensor:
        return self._linear(f"{name}.fc2", F.gelu(self._linear(f"{name}.fc1", x_TD)))

    def _experts(self, name: str, x_TD: Tensor) -> Tensor:
        config = self.config
        logits_TE = F.linear(x_TD, self.tensors[f"{name}.router.layer.weight"])
        top_TK, experts_TK = logits_TE.softmax(dim=-1, dtype=torch.float32).topk(config.moe_top_k)
        if config.moe_normalize_expert_weights:
            top_TK = top_TK / top_TK.sum(dim=-1, keepdim=True)
        sorted_R, order_R = experts_TK.flatten().sort(stable=True)
        every_E = torch.arange(config.num_experts, device=self.device)
        # a bincount would synchronise
        ends_E = torch.searchsorted(sorted_R, every_E, right=True, out_int32=True)
        w1_EFD, w2_EFD = (
            self.tensors[f"{name}.experts.mlp.{one}"].unflatten(0, (config.num_experts, -1))
            for one in ("w1", "w2")
        )
        rows_RD = x_TD[order_R // config.moe_top_k]
        h_RF = F.gelu(F.grouped_mm(rows_RD, w1_EFD.transpose(1, 2), offs=ends_E))
        y_RD = F.grouped_mm(h_RF, w2_EFD, offs=ends_E) * top_TK.flatten()[order_R, None]
        y_TKD = torch.empty_like(y_RD).index_copy(0, order_R, y_RD).unflatten(0, top_TK.shape)
        return y_TKD.sum(dim=1).to(x_TD.dtype) + self.tensors[f"{name}.experts.bias"]

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])

    def _norm(self, name: str, x_TD: Tensor) -> Tensor:
        weight_D, bias_D = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        return F.layer_norm(x_TD, weight_D.shape, weight_D, bias_D, self.config.layer_norm_epsilon)


def _rotate(x_TNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Halves (a, b) -> (a cos - b sin, b cos + a sin), in the dtype of x."""
    a, b = x_TNH.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_TNH.dtype)
