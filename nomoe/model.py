"""The encoder, from token ids to hidden states, in the order of the data.

Inside, a batch is packed: the real tokens of all texts in one (T, D) tensor, text after text, and
the length of each. Padding exists only in `NomicMoEModel.forward`, which packs and unpacks.
"""

from __future__ import annotations

import copy
import logging
import operator
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import opaque
from .arguments import resolve_device, resolve_dtype
from .backends import (
    Backend,
    BackendName,
    Ops,
    TableOps,
    activation_dtype,
    compiled_if_plain,
    cpu_ops,
    is_own,
    rows_wanted,
    select_backend,
    untraced,
)
from .checkpoint import CONFIG_FILE, DEFAULT_REPO, load_tensors, locate
from .config import NomicMoEConfig
from .forks import use_threads
from .moe import LayerNorm, Linear, MoE
from .packable import LAYING_OUT, Packable, opened

logger = logging.getLogger(__name__)


class NomicMoEOutput(NamedTuple):
    """What the encoder returns; `output[0]` is `last_hidden_state`, as in transformers.

    From `forward` hidden states are (B, L, D) with zeros at padding; from `forward_packed` (T, D).
    Routing is (T, K) per MoE layer either way: real tokens only, in row order.
    """

    last_hidden_state: Tensor
    # after the embedding norm, then after each layer
    hidden_states: tuple[Tensor, ...] | None = None
    # softmax probabilities of the chosen experts, divided by their sum where the config says so;
    # float32, best first
    router_weights: tuple[Tensor, ...] | None = None
    # the experts they belong to, int64
    router_experts: tuple[Tensor, ...] | None = None


class Embeddings(nn.Module):
    """Word embedding plus the one token-type row. The <pad> row is trained, so it stays."""

    def __init__(self, config: NomicMoEConfig) -> None:
        super().__init__()
        width = config.n_embd
        # given a weight, nn.Embedding draws none: on the meta device that alone takes a second
        self.word_embeddings = nn.Embedding(
            config.embedding_rows, width, _weight=torch.empty(config.embedding_rows, width)
        )
        self.token_type_embeddings = nn.Embedding(
            config.type_vocab_size, width, _weight=torch.empty(config.type_vocab_size, width)
        )

    def forward(self, ids_T: Tensor, norm: LayerNorm, ops: Ops) -> Tensor:
        """LayerNorm(word + type), (T, D)."""
        return ops.embed(
            ids_T, self.word_embeddings.weight, self.token_type_embeddings.weight[0], norm.parts
        )


class Attention(nn.Module):
    """Full self-attention inside each text."""

    def __init__(self, config: NomicMoEConfig) -> None:
        super().__init__()
        self.heads = config.n_head
        self.Wqkv = Linear(config.n_embd, 3 * config.n_embd)
        self.out_proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x_TD: Tensor, packing: Any, ops: Ops) -> Tensor:
        """Attend within each text, (T, D)."""
        # q, k, v one after the other, each with its heads contiguous ("three-major")
        qkv_T3NH = self.Wqkv(x_TD, ops).unflatten(-1, (3, self.heads, -1))
        out_TD: Tensor = self.out_proj(ops.attention(qkv_T3NH, packing), ops)
        return out_TD


class Mlp(nn.Module):
    """Dense feed-forward with the exact (erf) GELU."""

    def __init__(self, config: NomicMoEConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.n_embd, config.ffn_width)
        self.fc2 = Linear(config.ffn_width, config.n_embd)

    def forward(
        self, x_TD: Tensor, y_TD: Tensor, norm: LayerNorm, next_norm: LayerNorm, ops: Ops
    ) -> Tensor:
        """Apply the layer between its norms: z = norm(x + y), next_norm(z + mlp(z))."""
        z_TD = ops.add_layer_norm(x_TD, y_TD, norm.parts)
        # what stands in for fc1, an adapter say, adds to its result before the GELU
        is_own = isinstance(self.fc1, Linear)
        h_TF = self.fc1(z_TD, ops, gelu=True) if is_own else F.gelu(self.fc1(z_TD, ops))
        return ops.add_layer_norm(z_TD, self.fc2(h_TF, ops), next_norm.parts)


class Layer(nn.Module):
    """Attention and feed-forward, each followed by a residual sum and a norm (post-norm)."""

    def __init__(self, config: NomicMoEConfig, *, moe: bool) -> None:
        super().__init__()
        self.attn = Attention(config)
        self.norm1 = LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp: Mlp | MoE = MoE(config) if moe else Mlp(config)
        self.norm2 = LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)

    @compiled_if_plain
    def forward(
        self, x_TD: Tensor, packing: Any, *, ops: Ops
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Apply the layer; also return a MoE layer's router weights and experts, (T, K) each."""
        y_TD = self.attn(x_TD, packing, ops)
        out = self.mlp(x_TD, y_TD, self.norm1, self.norm2, ops)
        if isinstance(self.mlp, MoE):
            out_TD, weights_TK, experts_TK = out
            return out_TD, (weights_TK, experts_TK)
        return out, None


class Layers(nn.Module):
    """The layers, under the name the checkpoint gives them."""

    def __init__(self, config: NomicMoEConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            Layer(config, moe=config.is_moe_layer(i)) for i in range(config.n_layer)
        )


class NomicMoEModel(nn.Module):
    """The encoder of nomic-embed-text-v2-moe: token ids in, hidden states out.

    `state_dict` has the checkpoint's own keys and shapes. Built from a config the weights are
    random, on torch's default device; `from_pretrained` loads them. The kernels follow the weights
    to where they are moved or loaded.

    Args:
        config: Sizes and settings.
        backend: "auto", "torch" or "triton".
        batch_invariant: Ask for results whose bits do not depend on the batch (triton only).

    Raises:
        RuntimeError: The backend cannot run on this machine.
    """

    # lay matrices out for inference on a CPU, see `nomoe.packable`
    packs_matrices: bool = True

    def __init__(
        self,
        config: NomicMoEConfig,
        *,
        backend: BackendName = "auto",
        batch_invariant: bool = False,
    ) -> None:
        # by name, since a class that has another base beside this one has set that up before
        nn.Module.__init__(self)
        self.config = config
        self._backend_asked = backend
        # what a move, a cast or loading chose; None until then
        self._backend: Backend | None = None
        # what suits weights that came otherwise, and where those were
        self._found: tuple[tuple[torch.device, torch.dtype], Backend] | None = None
        self._batch_invariant = batch_invariant
        self.embeddings = Embeddings(config)
        self.emb_ln = LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.encoder = Layers(config)
        self._number = opaque.register(self)
        self.choose_backend()
        self.register_load_state_dict_post_hook(_choose_backend)  # type: ignore[no-untyped-call]
        self.reset_parameters()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        # a copy is another model, and may be loaded elsewhere
        self._number = opaque.register(self)
        self.choose_backend()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # a forward in another thread must not lay out what is being copied
        with LAYING_OUT:
            copied = type(self).__new__(type(self))
            memo[id(self)] = copied
            state = self.__getstate__()  # type: ignore[no-untyped-call]
            copied.__setstate__(copy.deepcopy(state, memo))
        return copied

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path = DEFAULT_REPO,
        *,
        revision: str | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        backend: BackendName = "auto",
        batch_invariant: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
    ) -> NomicMoEModel:
        """Load a checkpoint from a folder or the Hub, in eval mode.

        Args:
            name_or_path: A folder, or a repository name.
            revision: Branch, tag or commit; None pins the published commit of the default
                repository and follows the main branch of any other.
            device: None takes CUDA where there is one.
            dtype: "float32", "float16", "bfloat16" or the torch dtype; None means float32 on a CPU
                and float16 on CUDA.
            backend: "auto", "torch" or "triton".
            batch_invariant: Ask for results whose bits do not depend on the batch (triton only).
            local_files_only: Never reach for the network.
            token: Hub token, or True for the stored one.
            cache_dir: Hub cache folder.

        Raises:
            FileNotFoundError, PermissionError, ConnectionError: The checkpoint cannot be had.
            ValueError: Its config is unsupported, its tensors do not fit, or an argument is wrong.
            RuntimeError: The backend or device cannot run here, or torch not at all, in a fork.
        """
        device = resolve_device(device)
        dtype = resolve_dtype(dtype, device)
        if device.type == "cpu" and dtype == torch.float16:
            # 18 times on a Zen 4; a CPU with float16 instructions may do better
            logger.warning(
                "few CPUs multiply float16 at speed, and it can be many times slower than float32; "
                "bfloat16 is the faster 16-bit type there"
            )
        select_backend(backend, device, dtype=dtype, batch_invariant=batch_invariant)
        folder = locate(
            name_or_path,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        config = NomicMoEConfig.from_json(folder / CONFIG_FILE)
        # before any weight is read
        select_backend(backend, device, dtype=dtype, config=config, batch_invariant=batch_invariant)
        with torch.device("meta"):
            model = cls(config, backend=backend, batch_invariant=batch_invariant)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        # what checks values runs on the CPU
        use_threads()
        tensors = load_tensors(folder, shapes, dtype=dtype, device=device)
        model.load_state_dict(tensors, assign=True)
        logger.info("backend %s (%s)", model.backend.name, model.backend.reason)
        return model.eval()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw random weights: normal, standard deviation 0.02; biases 0, norms the identity."""
        for name, parameter in self.named_parameters():
            if parameter.is_meta:
                continue
            if name.endswith("bias"):
                parameter.zero_()
            elif "norm" in name or name.startswith("emb_ln"):
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=0.02)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NomicMoEModel:
        """Every move and cast of a module comes through here: the kernels follow the device."""
        # what becomes of an empty tensor tells where the weights will be, before they move
        moved = fn(self.emb_ln.weight.new_empty(0))
        backend = None if moved.is_meta else self._backend_for(moved)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._backend = backend
        return self

    @property
    def backend(self) -> Backend:
        """The kernels it runs on; for weights that were neither moved nor loaded, found here.

        Raises:
            RuntimeError: The backend that was asked for cannot run where the weights are.
        """
        if self._backend is not None:
            return self._backend
        weight = self.emb_ln.weight
        if weight.is_meta:
            return Backend("torch", "its weights are on no device yet")
        # the weights may only be passing through
        where = weight.device, weight.dtype
        if self._found is None or self._found[0] != where:
            self._found = where, self._backend_for(weight)
        return self._found[1]

    @backend.setter
    def backend(self, backend: Backend) -> None:
        self._backend = backend

    def choose_backend(self) -> None:
        """Take the kernels for where the weights are; moves, casts and loading do so themselves.

        Raises:
            RuntimeError: The backend that was asked for cannot run there.
        """
        # what is refused here must not run on the kernels from before
        self._backend = None
        if not self.emb_ln.weight.is_meta:
            self._backend = self._backend_for(self.emb_ln.weight)

    def _backend_for(self, weight: Tensor) -> Backend:
        return select_backend(
            self._backend_asked,
            weight.device,
            dtype=weight.dtype,
            config=self.config,
            batch_invariant=self._batch_invariant,
        )

    def _packables(self) -> list[Packable]:
        return [part for part in self.encoder.modules() if isinstance(part, Packable)]

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """As every module's; a parameter whose numbers are packed gets them back as it comes by."""
        for name, parameter in super().named_parameters(prefix, recurse, remove_duplicate):
            yield name, opened(parameter)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.emb_ln.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        return self.emb_ln.weight.dtype

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        output_hidden_states: bool = False,
        output_routing: bool = False,
    ) -> NomicMoEOutput:
        """Encode a padded batch.

        Args:
            input_ids: Token ids, (B, L), integer.
            attention_mask: 1 for real tokens, 0 for padding, (B, L); None means no padding.
            token_type_ids: Accepted if all zero, (B, L).
            output_hidden_states: Return the hidden states after the embedding norm and each layer.
            output_routing: Return the router's choice in each MoE layer.

        Returns:
            Hidden states (B, L, D), zeros at padding. Padding on either side gives the same result.

        Raises:
            ValueError: Wrong shapes, ids outside the vocabulary, a mask that is not 0 and 1, token
                types other than 0, or a text longer than `config.n_positions`.
            RuntimeError: In a fork of a process that had used torch on the CPU.
        """
        if not torch.compiler.is_compiling():
            use_threads()
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids is {tuple(input_ids.shape)}, expected (texts, tokens)")
        _require_integers("input_ids", input_ids)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        for name, given in (("attention_mask", attention_mask), ("token_type_ids", token_type_ids)):
            if given is not None and given.shape != input_ids.shape:
                raise ValueError(
                    f"{name} is {tuple(given.shape)}, but input_ids is {tuple(input_ids.shape)}"
                )
        wanted = [input_ids, attention_mask != 0, (attention_mask != 0) & (attention_mask != 1)]
        if token_type_ids is not None:
            wanted.append(token_type_ids != 0)
        # to the host together, so that a GPU is waited for once
        together = torch.stack([one.to(input_ids.device, torch.int64) for one in wanted]).cpu()
        ids_BL, real_BL, odd_BL, *typed_BL = together.unbind()
        if odd_BL.any():
            raise ValueError("attention_mask holds values other than 0 and 1")
        if any(one.any() for one in typed_BL):
            raise ValueError("token_type_ids holds values other than 0; the model has one type")

        lengths = real_BL.sum(dim=1).tolist()
        rows_T, columns_T = real_BL.nonzero(as_tuple=True)
        ids_T = ids_BL[rows_T, columns_T]
        self._check_lengths(lengths)
        self._check_ids(ids_T)
        rows_T, columns_T = _sent(rows_T, self.device), _sent(columns_T, self.device)
        # columns rather than counts, so that a gap in the mask keeps its distance
        packed = self._encode(
            _sent(ids_T, self.device),
            [length for length in lengths if length],
            columns_T,
            span=input_ids.shape[1],
            output_hidden_states=output_hidden_states,
            output_routing=output_routing,
            ops=self._lay_out(),
        )

        def pad(hidden_TD: Tensor) -> Tensor:
            hidden_BLD = hidden_TD.new_zeros(*input_ids.shape, hidden_TD.shape[-1])
            return hidden_BLD.index_put((rows_T, columns_T), hidden_TD)

        hidden = packed.hidden_states
        # not _replace: code that torch 2.11 compiles gets an empty tuple from it
        return NomicMoEOutput(
            pad(packed.last_hidden_state),
            None if hidden is None else tuple(pad(one) for one in hidden),
            packed.router_weights,
            packed.router_experts,
        )

    def forward_packed(
        self,
        ids_T: Tensor,
        lengths: Sequence[int] | Tensor,
        *,
        output_hidden_states: bool = False,
        output_routing: bool = False,
    ) -> NomicMoEOutput:
        """Encode texts laid end to end, without any padding.

        Args:
            ids_T: Token ids of all texts, (T,), integer, on the model's device. On CUDA they are
                not checked against the vocabulary, since that would synchronise.
            lengths: Tokens of each text, at least 1 each; a list or an integer CPU tensor (B,).
            output_hidden_states: As `forward`.
            output_routing: As `forward`.

        Returns:
            Hidden states (T, D).

        Raises:
            ValueError: Lengths that do not add up to T, or as `forward`.
        """
        if torch.compiler.is_compiling() and self.backend.name == "triton":
            return self._forward_opaque(ids_T, lengths, output_hidden_states, output_routing)
        if not torch.compiler.is_compiling():
            use_threads()
        if isinstance(lengths, Tensor):
            _require_integers("lengths", lengths)
            if lengths.dim() != 1:
                raise ValueError(f"lengths is {tuple(lengths.shape)}, expected one dimension")
            lengths = lengths.tolist()
        try:
            lengths = [operator.index(length) for length in lengths]
        except TypeError:
            raise ValueError("lengths holds something other than whole numbers") from None
        if ids_T.dim() != 1:
            raise ValueError(f"ids_T is {tuple(ids_T.shape)}, expected one dimension")
        _require_integers("ids_T", ids_T)
        if min(lengths, default=1) < 1 or sum(lengths) != len(ids_T):
            raise ValueError(
                f"lengths {lengths[:8]}... must be at least 1 and add up to {len(ids_T)} tokens"
            )
        self._check_lengths(lengths)
        if not ids_T.is_cuda:
            self._check_ids(ids_T)
        # wherever torch's default device is
        host = torch.device("cpu")
        starts = torch.tensor([0, *lengths[:-1]], device=host).cumsum(0)
        lengths_B = torch.tensor(lengths, dtype=torch.int64, device=host)
        positions = torch.arange(len(ids_T), device=host) - starts[
            : len(lengths)
        ].repeat_interleave(lengths_B, output_size=len(ids_T))
        return self._encode(
            ids_T,
            lengths,
            _sent(positions, ids_T.device),
            span=max(lengths, default=1),
            output_hidden_states=output_hidden_states,
            output_routing=output_routing,
            ops=self._lay_out(),
        )

    def _forward_opaque(
        self,
        ids_T: Tensor,
        lengths: Sequence[int] | Tensor,
        output_hidden_states: bool,
        output_routing: bool,
    ) -> NomicMoEOutput:
        """`forward_packed` as torch.compile sees it: one operator."""
        parameters = super().named_parameters()
        trained = next((one for _, one in parameters if one.requires_grad), None)
        layers = self.encoder.layers
        states = len(layers) + 1 if output_hidden_states else 1
        routings = sum(isinstance(one.mlp, MoE) for one in layers) if output_routing else 0
        flat = opaque.forward_packed(
            ids_T,
            lengths
            if isinstance(lengths, Tensor)
            else torch.tensor(lengths, dtype=torch.int64, device="cpu"),
            self.emb_ln.weight.detach(),
            trained if torch.is_grad_enabled() else None,
            self._number,
            states,
            routings,
            self.config.moe_top_k,
        )
        hidden, weights, experts = (
            tuple(flat[:states]),
            tuple(flat[states : states + routings]),
            tuple(flat[states + routings :]),
        )
        return NomicMoEOutput(
            last_hidden_state=hidden[-1],
            hidden_states=hidden if output_hidden_states else None,
            router_weights=weights if output_routing else None,
            router_experts=experts if output_routing else None,
        )

    def forward_flat(
        self, ids_T: Tensor, lengths: Tensor, hidden_states: bool, routing: bool
    ) -> list[Tensor]:
        """`forward_packed` with its tensors in a row, for the operator in `nomoe.opaque`."""
        output = self.forward_packed(
            ids_T, lengths, output_hidden_states=hidden_states, output_routing=routing
        )
        return [
            *(output.hidden_states or [output.last_hidden_state]),
            *(output.router_weights or ()),
            *(output.router_experts or ()),
        ]

    def forward_tables(self, ops: TableOps, *, output_routing: bool = False) -> NomicMoEOutput:
        """Encode the batch that a kernel module is bound to; see `nomoe.engine`.

        Nothing is checked, and nothing but the layout's sizes decides what is launched.

        Args:
            ops: Kernels and tables.
            output_routing: As `forward`.

        Returns:
            Hidden states (T, D); rows of padding hold anything.
        """
        return self._encode(
            ops.tables.ids_T,
            [],
            ops.tables.positions_T,
            span=self.config.n_positions,
            output_hidden_states=False,
            output_routing=output_routing,
            ops=ops,
        )

    def _check_lengths(self, lengths: list[int]) -> None:
        longest = max(lengths, default=0)
        if longest > self.config.n_positions:
            raise ValueError(
                f"a text has {longest} tokens, the model takes at most {self.config.n_positions}"
            )

    def _check_ids(self, ids_T: Tensor) -> None:
        if len(ids_T):
            low, high = (int(value) for value in ids_T.aminmax())
            if low < 0 or high >= self.config.embedding_rows:
                raise ValueError(
                    f"token ids run from {low} to {high}, outside the vocabulary of "
                    f"{self.config.embedding_rows}"
                )

    @untraced
    def _lay_out(self) -> Ops:
        """Have the weights as the forward that follows wants them, and give its kernels."""
        if self.backend.name != "torch" or self.device.type != "cpu":
            return self.backend.ops
        parts = self._packables()
        # whoever looks at a parameter holds it, and another thread could not lay it out meanwhile
        with LAYING_OUT:
            ops = None if self._needs_parameters(parts) else cpu_ops(self.dtype)
            for part in parts:
                if ops is None:
                    part.unpack()
                else:
                    part.pack()
        return ops or self.backend.ops

    def _needs_parameters(self, parts: list[Packable]) -> bool:
        if self.training or not self.packs_matrices or torch.is_autocast_enabled("cpu"):
            return True
        # all of them: what stands in for a parameter is seen to
        if any([part.has_stand_ins() for part in parts]):
            return True
        # what a hook adds may ask for gradients where no parameter does
        return torch.is_grad_enabled() and (
            any(one.requires_grad for _, one in super().named_parameters()) or not is_own(self)
        )

    @compiled_if_plain
    def _encode(
        self,
        ids_T: Tensor,
        lengths: list[int],
        positions_T: Tensor,
        *,
        span: int,
        output_hidden_states: bool,
        output_routing: bool,
        ops: Ops,
    ) -> NomicMoEOutput:
        tokens = len(ids_T)
        if more := rows_wanted(ops, tokens, self.dtype) - tokens:
            # one text more, which is cut off in the end
            ids_T = F.pad(ids_T, (0, more))
            positions_T = torch.cat([positions_T, torch.arange(more, device="cpu")])
            lengths = [*lengths, more]
        packing = ops.pack(
            lengths,
            positions_T,
            span,
            self.config.head_width,
            self.config.rotary_emb_base,
            self.dtype,
        )
        x_TD = self.embeddings(ids_T.long(), self.emb_ln, ops)
        # what nobody asks for is given back before the layers need room
        hidden = [x_TD[:tokens]] if output_hidden_states else []
        x_TD = x_TD.to(activation_dtype(ops, len(ids_T), self.dtype, self.encoder))
        routings = []
        for layer in self.encoder.layers:
            x_TD, routing = layer(x_TD, packing, ops=ops)
            if output_hidden_states:
                hidden.append(x_TD[:tokens].to(self.dtype))
            if routing is not None and output_routing:
                weights_TK, experts_TK = routing
                routings.append((weights_TK[:tokens], experts_TK[:tokens]))
        return NomicMoEOutput(
            last_hidden_state=x_TD[:tokens].to(self.dtype),
            hidden_states=tuple(hidden) if output_hidden_states else None,
            router_weights=tuple(weights for weights, _ in routings) if output_routing else None,
            router_experts=tuple(experts for _, experts in routings) if output_routing else None,
        )


def _choose_backend(model: NomicMoEModel, incompatible_keys: object) -> None:
    """What a model does once tensors were loaded, which may be elsewhere than those before."""
    model.choose_backend()


# the compiler has no pinned memory
@untraced
def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, for whose copy nobody waits."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _require_integers(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        raise ValueError(f"{name} has dtype {tensor.dtype}, expected int64, int32, int16 or uint8")
