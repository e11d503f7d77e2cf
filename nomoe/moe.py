"""The mixture-of-experts feed-forward layer, and the one place that knows there are backends."""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import wraps
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from nomoe_kernels import cpu, reference
from nomoe_kernels.configs import AttentionTile as AttentionTile
from nomoe_kernels.layout import Layout as Layout
from nomoe_kernels.layout import Tables
from nomoe_kernels.matrices import Matrix
from nomoe_kernels.reference import MoEWeights, Norm
from nomoe_kernels.reference import Pooling as Pooling

from .config import NomicMoEConfig

BackendName = Literal["auto", "torch", "triton"]
Result = TypeVar("Result")


class Ops(Protocol):
    """What a model asks of a kernel module; `nomoe_kernels.reference` documents each.

    An operation may overwrite `y_TD` and `qkv_T3NH`, which nobody reads again.
    """

    def add_layer_norm(self, x_TD: Tensor, y_TD: Tensor, norm: Norm) -> Tensor: ...

    def linear(
        self, x_TI: Tensor, weight_OI: Any, bias_O: Tensor | None, *, gelu: bool = False
    ) -> Tensor: ...

    def moe_block(
        self, x_TD: Tensor, y_TD: Tensor, norm: Norm, moe: MoEWeights, next_norm: Norm
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    # a packing is the kernel module's own: `attention` takes what `pack` of the same one returned
    def pack(
        self,
        lengths: Sequence[int],
        positions_T: Tensor,
        span: int,
        head_width: int,
        rotary_base: float,
        dtype: torch.dtype,
    ) -> Any: ...

    def attention(self, qkv_T3NH: Tensor, packing: Any) -> Tensor: ...

    def embed(self, ids_T: Tensor, words_VD: Tensor, type_D: Tensor, norm: Norm) -> Tensor: ...

    def pool(self, hidden_TD: Tensor, lengths: Sequence[int], pooling: Pooling) -> Tensor: ...


class TableOps(Ops, Protocol):
    """Kernels bound to one batch, whose tables are on the device; they look at no lengths."""

    tables: Tables


class Backend(NamedTuple):
    """The kernels a model runs on and why they were chosen."""

    name: Literal["torch", "triton"]
    reason: str
    # a text's bits do not depend on its batch
    batch_invariant: bool = False

    @property
    def ops(self) -> Ops:
        """The kernel module; looked up by name, so that a model stays picklable."""
        if self.name == "triton":
            from nomoe_kernels import fused, invariant

            return invariant if self.batch_invariant else fused
        return reference

    @property
    def takes_tables(self) -> bool:
        """Whether the kernels can read a batch's tables from the device; see `table_ops`."""
        return self.name == "triton"

    def attention_tile(
        self, tokens: int, longest: int, head_width: int, dtype: torch.dtype, device: torch.device
    ) -> AttentionTile:
        """How attention cuts a batch of so many tokens, in texts of about that length at most."""
        kernels: Any = self.ops
        tile: AttentionTile = kernels.attention_tile(tokens, longest, head_width, dtype, device)
        return tile

    def table_ops(self, layout: Layout, numbers: Tensor, *, padded: bool) -> TableOps:
        """The kernels bound to a batch's tables; see `nomoe_kernels.tables`."""
        from nomoe_kernels import tables

        # where bits may not depend on the batch, no kernel comes in two forms either
        padded = padded or self.batch_invariant
        return tables.TableOps(self.ops, layout, numbers, padded=padded)


def cpu_ops(dtype: torch.dtype) -> Ops | None:
    """Give the kernels for inference on a CPU, or None for a dtype that they do not take."""
    return cpu if cpu.supports(dtype) else None


def untraced(function: Callable[..., Result]) -> Callable[..., Result]:
    """Have torch.compile leave a function alone.

    As torch.compiler.disable, which however imports the compiler there and then: more than a second
    and 150 MB for whoever compiles nothing.
    """
    alone = _disable_dynamo(function)

    @wraps(function)
    def run(*args: Any, **options: Any) -> Result:
        return (alone if torch.compiler.is_compiling() else function)(*args, **options)

    return run


def compiled_if_plain(method: Callable[..., Result]) -> Callable[..., Result]:
    """Have torch.compile leave a method alone unless its argument `ops` is plain torch.

    The compiler takes packed matrices and Triton kernels for something of its own, and gains
    nothing beside them.
    """
    alone = untraced(method)

    @wraps(method)
    def run(*args: Any, ops: Ops, **options: Any) -> Result:
        return (method if ops is reference else alone)(*args, ops=ops, **options)

    return run


def activation_dtype(
    ops: Ops | TableOps, tokens: int, dtype: torch.dtype, layers: nn.Module
) -> torch.dtype:
    """The dtype between the operations of a forward: the model's, or float32 where products are.

    What stands in for a part of ours, an adapter say, or hooks it, is given the model's dtype.
    """
    if ops is not cpu or not cpu.widens(tokens, dtype):
        return dtype
    is_own = all(
        type(part).__module__.startswith(("nomoe.", "torch.nn."))
        and not (part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part))
        for part in layers.modules()
    )
    return torch.float32 if is_own else dtype


def rows_wanted(ops: Ops | TableOps, tokens: int, dtype: torch.dtype) -> int:
    """Rows that kernels want a batch of so many tokens to have: as many, but for those of a CPU."""
    return cpu.rows_wanted(tokens, dtype) if ops is cpu else tokens


def select_backend(
    name: BackendName,
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
    config: NomicMoEConfig | None = None,
    batch_invariant: bool = False,
) -> Backend:
    """Choose the kernels for a device.

    Args:
        name: "torch" runs anywhere, "triton" needs its kernels, "auto" takes the fastest that runs.
        device: Where the model will be.
        dtype: What the model will be in, where that is known.
        config: The model's sizes, where they are known.
        batch_invariant: Ask for results whose bits do not depend on the batch.

    Raises:
        ValueError: An unknown name.
        RuntimeError: What was asked for cannot run here; the message says why.
    """
    if name not in ("auto", "torch", "triton"):
        raise ValueError(f"backend is {name!r}, expected 'auto', 'torch' or 'triton'")
    obstacle: str | None
    if name == "torch":
        obstacle = "asked for"
    elif name == "auto" and device.type != "cuda":
        obstacle = f"Triton's kernels need CUDA, and this is {device.type}"
    else:
        obstacle = _triton_obstacle(device, dtype, config)
    if name == "triton" and obstacle:
        raise RuntimeError(f"backend='triton' cannot run: {obstacle}; use 'auto' or 'torch'")
    if obstacle and batch_invariant:
        raise RuntimeError(
            "batch_invariant=True cannot run on backend 'torch', whose products round differently "
            f"by the number of rows; it needs 'triton' (torch: {obstacle}). Without it a text's "
            "vector stays within its dtype's bounds whatever the batch"
        )
    if obstacle:
        return Backend("torch", obstacle)
    reason = "asked for" if name == "triton" else f"{device} runs Triton kernels"
    return Backend("triton", reason, batch_invariant)


def _triton_obstacle(
    device: torch.device, dtype: torch.dtype | None, config: NomicMoEConfig | None
) -> str | None:
    """Why the Triton kernels cannot run this model on a device, or None."""
    if find_spec("triton") is None:
        return "triton is not installed"
    from nomoe_kernels import checks

    if device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        found = f"{device} has compute capability {major}.{minor}"
        if major < 8:
            return f"{found}, below 8.0"
        if major == 10 and checks.RELEASE < checks.FENCES_COPIES:
            # pytorch#181248, triton#9871; on 9.0, where it leaves out some as well, nobody saw it
            return (
                f"{found}, on which Triton before 3.7.1 leaves out fences and gives wrong numbers "
                "at times; torch 2.13 brings 3.7.1"
            )
    if device.type != "cuda" and not (device.type == "cpu" and checks.INTERPRETED):
        return f"Triton's kernels need CUDA, and this is {device.type}"
    if dtype is not None and dtype not in checks.DTYPES:
        return f"its kernels do not take {dtype}"
    if checks.INTERPRETED and dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 wrongly"
    if config is None:
        return None
    if config.num_experts > checks.MAX_EXPERTS or config.moe_top_k > checks.MAX_TOP_K:
        return (
            f"its kernels take {checks.MAX_EXPERTS} experts and {checks.MAX_TOP_K} of them per "
            f"token at most, the model has {config.num_experts} and {config.moe_top_k}"
        )
    if config.head_width > checks.MAX_HEAD_WIDTH:
        return (
            f"its kernels take heads of {checks.MAX_HEAD_WIDTH} features at most, the model's have "
            f"{config.head_width}"
        )
    if config.n_embd % 16 or config.ffn_width % 16:
        return (
            "its kernels take widths that are multiples of 16, the model's are "
            f"{config.n_embd} and {config.ffn_width}"
        )
    return None


# whoever lays weights out, gives them back or looks which they are does so alone
LAYING_OUT = threading.RLock()
if hasattr(os, "register_at_fork"):
    # a child that is forked while another thread holds it would wait for ever
    os.register_at_fork(
        before=LAYING_OUT.acquire,
        after_in_parent=LAYING_OUT.release,
        after_in_child=LAYING_OUT.release,
    )


class Packable(nn.Module):
    """A module whose matrices can be laid out in advance for inference on a CPU.

    While they are, `packed` holds them, and their parameters keep identity, shape and dtype but no
    memory: every number in one is the same NaN. `state_dict`, `train`, `to`, `load_state_dict`,
    pickling (while no other thread embeds) and `copy.deepcopy` of the module give the parameters
    their numbers back first. A parameter that is given other numbers meanwhile keeps those.
    """

    # names of the parameters that are packed
    packable: tuple[str, ...]
    # the matrices of each, by name
    packed: dict[str, list[Matrix]] | None = None
    # the parameters whose numbers they hold
    sealed: dict[str, nn.Parameter]
    # ids of its own parameters, whatever `torch.func.functional_call` puts in their place for a
    # while; what shards a model wants the old ones gone, and `torch.utils.swap_tensors` no weakrefs
    own: dict[str, int]
    # the thread that last ran it with gradients
    trainer: int | None = None
    # a compiler made its forward with gradients, whose backward reads the parameters themselves
    is_traced = False
    # another module has a parameter of it
    is_shared = False

    def matrices(self, name: str, tensor: Tensor) -> list[Tensor]:
        """View a parameter's tensor as the (O, I) matrices it holds."""
        raise NotImplementedError

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As every module's; assigning one comes through here too."""
        super().register_parameter(name, param)
        self._note_own()

    def _note_own(self) -> None:
        self.own = {name: id(parameter) for name, parameter in self._parameters.items()}

    def has_stand_ins(self) -> bool:
        """Whether a parameter that would be packed is not the module's own, or no plain one."""
        for name in self.packable:
            one = self._parameters.get(name)
            if one is not None and (type(one) is not nn.Parameter or self.own.get(name) != id(one)):
                return True
        return False

    @torch.no_grad()
    def pack(self) -> None:
        """Lay the matrices out for `nomoe_kernels.cpu` and free the originals.

        What is computed from other parameters (torch's pruning, parametrizations) stays as it is,
        and so does what stands in for the module's own, or is another's too.
        """
        with LAYING_OUT, torch._C._DisableFuncTorch():
            if not self._has_its_parameters():
                return
            if self.packed is not None:
                now = self._parameters
                if all(now[name] is one and _is_sealed(one) for name, one in self.sealed.items()):
                    return
                self.unpack()
            if self._gives_back_others() or self.is_shared:
                return
            parameters = {name: self.get_parameter(name) for name in self.packable}
            packed = {}
            for name, parameter in parameters.items():
                if parameter.data.flatten()[0].isnan() and parameter.data.isnan().all():
                    raise RuntimeError(
                        "a weight is NaN throughout; if it was computed from one whose numbers "
                        "were packed for inference, call the model's train() or parameters() first"
                    )
                views = self.matrices(name, parameter.data)
                packed[name] = [cpu.pack_weight(view) for view in views]
            # whole before any parameter loses its numbers
            self.packed, self.sealed = packed, parameters
            for parameter in parameters.values():
                parameter.data = parameter.new_full((), torch.nan).expand(parameter.shape)
                parameter.sealed_by = weakref.ref(self)  # type: ignore[attr-defined]

    def _gives_back_others(self) -> bool:
        """Whether another module holds a parameter's numbers, which it then gives back."""
        held = [
            parameter
            for parameter in self._parameters.values()
            if parameter is not None and _is_sealed(parameter) and hasattr(parameter, "sealed_by")
        ]
        for parameter in held:
            owner = parameter.sealed_by()
            if owner is None:
                raise RuntimeError(
                    "a weight's numbers went with the module that had packed it for inference: "
                    "call train() or parameters() of a model before taking its parameters"
                )
            owner.unpack()
            owner.is_shared = self.is_shared = True
        return bool(held)

    def has_gradients_here(self) -> bool:
        """Whether a parameter that would be packed has a gradient, which this thread asked for.

        False where another thread asked last: torch crashes where one reads what it adds up.
        """
        if self.trainer != threading.get_ident():
            return False
        parameters = (self._parameters.get(name) for name in self.packable)
        return any(one is not None and one.is_leaf and one.grad is not None for one in parameters)

    def _has_its_parameters(self) -> bool:
        if all(name in self._parameters for name in self.packable):
            return True
        if self.packed is not None:
            raise RuntimeError(
                "a weight was pruned or parametrized while its numbers were packed for inference, "
                "and read as NaN: call the model's train() or parameters() first"
            )
        return False

    def unpack(self) -> None:
        """Give the parameters their numbers back.

        Raises:
            RuntimeError: They were replaced by others computed from them, which are NaN.
        """
        # made in inference mode, or under one of torch.func's transforms, they would be no plain
        # tensors
        with (
            LAYING_OUT,
            torch._C._DisableFuncTorch(),
            torch.inference_mode(False),
            torch.no_grad(),
        ):
            self._has_its_parameters()
            for name, matrices in (self.packed or {}).items():
                parameter = self.sealed[name]
                vars(parameter).pop("sealed_by", None)
                if not _is_sealed(parameter):
                    parameter.data = parameter.data.contiguous()
                    continue
                dense = torch.empty_like(parameter.data, memory_format=torch.contiguous_format)
                for view, matrix in zip(self.matrices(name, dense), matrices, strict=True):
                    view.copy_(matrix.unpack())
                parameter.data = dense
            self.packed, self.sealed = None, {}
            self._gives_back_others()

    def snapshot(self) -> tuple[dict[str, list[Matrix]] | None, dict[str, Tensor]]:
        """The packed matrices, or None and the parameters' numbers.

        Both stay what they are while another thread packs or unpacks.
        """
        with LAYING_OUT:
            if self.packed is not None:
                return self.packed, {}
            self._gives_back_others()
            return None, {name: getattr(self, name).detach() for name in self.packable}

    def parameters_now(self) -> dict[str, Tensor]:
        """Views of the parameters, with their gradients, that keep their numbers.

        Another thread may pack between this and their use, and between a forward and its backward.
        """
        parameters: dict[str, Tensor] = {name: getattr(self, name) for name in self.packable}
        if not torch.is_grad_enabled() or any(
            one.device.type != "cpu" for one in parameters.values()
        ):
            return parameters
        if torch.compiler.is_compiling():
            self.is_traced = True
            return parameters
        with LAYING_OUT:
            self.trainer = threading.get_ident()
            self.unpack()
            views = {name: one.view_as(one) for name, one in parameters.items()}
        # a graph that held the module would hold what the module's hooks keep of the graph
        owner = weakref.ref(self)
        for view in views.values():
            if view.requires_grad:
                view.register_hook(lambda _: _unpack_in_backward(owner()))
        return views

    def train(self, mode: bool = True) -> Self:
        """Set the mode; training needs the parameters."""
        if mode:
            self.unpack()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # SentenceTransformer moves its model to where it is, in every call
        if self.packed and not _leaves_as_is(fn, self.get_parameter(self.packable[0])):
            self.unpack()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._note_own()
        return self

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self.unpack()
        super()._load_from_state_dict(*arguments)

    def _save_to_state_dict(self, *arguments: Any) -> None:
        with LAYING_OUT:
            self.unpack()
            super()._save_to_state_dict(*arguments)

    def __getstate__(self) -> dict[str, Any]:
        self.unpack()
        of_this_one = {"own", "trainer", "is_traced", "is_shared"}
        return {name: value for name, value in self.__dict__.items() if name not in of_this_one}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._note_own()


def _unpack_in_backward(part: Packable | None) -> None:
    """Give parameters their numbers back, since an optimizer's step may follow."""
    if part is not None:
        part.trainer = threading.get_ident()
        if part.packed is not None:
            part.unpack()


def _is_sealed(parameter: Tensor | None) -> bool:
    """Whether a parameter's numbers are in its packed matrices: it is one NaN, seen many times."""
    return (
        parameter is not None
        and not any(parameter.stride())
        and math.isnan(parameter.data.as_strided((), ()).item())
    )


def _leaves_as_is(fn: Callable[[Tensor], Tensor], parameter: Tensor) -> bool:
    """Whether a move or cast of a module would change nothing about a parameter's tensor."""
    probe = parameter.data.new_zeros(1)
    # share_memory_ gives its argument back, but somewhere else
    return fn(probe) is probe and not probe.is_shared()


class Router(nn.Module):
    """The router's weight, under the name the checkpoint gives it."""

    def __init__(self, config: NomicMoEConfig) -> None:
        super().__init__()
        self.layer = nn.Linear(config.n_embd, config.num_experts, bias=False)


class ExpertWeights(Packable):
    """Both matrices of all experts, stored (E * F, D) each."""

    packable = ("w1", "w2")

    def __init__(self, config: NomicMoEConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        shape = (config.num_experts * config.ffn_width, config.n_embd)
        self.w1 = nn.Parameter(torch.empty(shape))
        self.w2 = nn.Parameter(torch.empty(shape))

    def matrices(self, name: str, tensor: Tensor) -> list[Tensor]:
        """Of each expert: applied as x @ w1[e].T and h @ w2[e]."""
        tensor_EFD = tensor.unflatten(0, (self.num_experts, -1))
        return list(tensor_EFD if name == "w1" else tensor_EFD.transpose(1, 2))


class Experts(nn.Module):
    """The experts' matrices and the one bias they share."""

    def __init__(self, config: NomicMoEConfig) -> None:
        super().__init__()
        self.mlp = ExpertWeights(config)
        self.bias = nn.Parameter(torch.empty(config.n_embd))


class Linear(nn.Linear, Packable):
    """x @ weight.T + bias by the kernels, with the exact (erf) GELU where asked."""

    packable = ("weight",)

    def matrices(self, name: str, tensor: Tensor) -> list[Tensor]:
        """Return the only one."""
        return [tensor]

    def forward(  # type: ignore[override]
        self, x_TI: Tensor, ops: Ops, *, gelu: bool = False
    ) -> Tensor:
        """Apply the layer, (T, O)."""
        weight_OI: Any
        if ops is cpu:
            packed, plain = self.snapshot()
            if packed is None:
                ops, weight_OI = reference, plain["weight"]
                x_TI = x_TI.to(weight_OI.dtype)
            else:
                [weight_OI] = packed["weight"]
        else:
            weight_OI = self.parameters_now()["weight"]
        return ops.linear(x_TI, weight_OI, self.bias, gelu=gelu)


class LayerNorm(nn.LayerNorm):
    """A LayerNorm whose parameters the kernels take; it is never called itself."""

    @property
    def parts(self) -> Norm:
        """Weight, bias and eps."""
        return Norm(self.weight, self.bias, self.eps)


class MoE(nn.Module):
    """out = sum_k weight_k * expert_k(x) + bias, with the top K of a softmax over all E experts."""

    def __init__(self, config: NomicMoEConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.top_k = config.moe_top_k
        self.normalize = config.moe_normalize_expert_weights
        self.router = Router(config)
        self.experts = Experts(config)

    def forward(
        self, x_TD: Tensor, y_TD: Tensor, norm: LayerNorm, next_norm: LayerNorm, ops: Ops
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Apply the layer between its norms: z = norm(x + y), next_norm(z + moe(z)).

        Args:
            x_TD: The layer's input.
            y_TD: What attention made of it.
            norm: The norm before the experts.
            next_norm: The norm after them.
            ops: The kernels.

        Returns:
            out_TD: In the dtype of x.
            weights_TK: float32 router weights, best expert first.
            experts_TK: The experts they belong to.
        """
        mlp = self.experts.mlp
        w1: Any
        w2: Any
        if ops is cpu:
            packed, plain = mlp.snapshot()
            if packed is None:
                ops = reference
                x_TD, y_TD = x_TD.to(plain["w1"].dtype), y_TD.to(plain["w1"].dtype)
        else:
            packed, plain = None, mlp.parameters_now()
        if packed is not None:
            w1, w2 = packed["w1"], packed["w2"]
        else:
            w1, w2 = plain["w1"], plain["w2"]
            # applied as x @ w1[e].T and h @ w2[e]: w1 is viewed transposed, w2 as stored
            w1 = w1.unflatten(0, (self.num_experts, -1)).transpose(1, 2)
            w2 = w2.unflatten(0, (self.num_experts, -1))
        weights = MoEWeights(
            self.router.layer.weight, w1, w2, self.experts.bias, self.top_k, self.normalize
        )
        return ops.moe_block(x_TD, y_TD, norm.parts, weights, next_norm.parts)


def router_input(inputs: tuple[Any, ...]) -> Tensor:
    """What the router reads, (T, D), from the inputs of `MoE.forward` that a hook is given."""
    x_TD, y_TD, norm = inputs[:3]
    return reference.add_layer_norm(x_TD.float(), y_TD, norm.parts)


class Followed:
    """The kernels of one MoE layer in plain torch, on experts that another model chose.

    Args:
        experts_TK: They.
    """

    def __init__(self, experts_TK: Tensor) -> None:
        self._experts_TK = experts_TK

    def moe_block(
        self, x_TD: Tensor, y_TD: Tensor, norm: Norm, moe: MoEWeights, next_norm: Norm
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `reference.moe_block`, with this model's own weights of those experts."""
        z_TD = reference.add_layer_norm(x_TD, y_TD, norm)
        every_TE, experts_TE = reference.route(z_TD, moe.router_ED, len(moe.w1_EDF))
        probabilities_TE = torch.zeros_like(every_TE).scatter(1, experts_TE, every_TE)
        weights_TK = probabilities_TE.gather(1, self._experts_TK)
        if moe.normalize:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        order_R, ends_E = reference.permute(self._experts_TK, len(moe.w1_EDF))
        rows_RD = reference.expert_mlp(
            z_TD[order_R // moe.top_k],
            moe.w1_EDF,
            moe.w2_EFD,
            ends_E,
            weights_TK.flatten()[order_R],
        )
        out_TD = reference.unpermute_add_norm(
            rows_RD, order_R, moe.bias_D, moe.top_k, z_TD, next_norm
        )
        return out_TD, weights_TK, self._experts_TK
