"""The kernels a model runs on: what it asks of them, and how they are chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from nomoe_kernels import cpu, reference
from nomoe_kernels.configs import AttentionTile as AttentionTile
from nomoe_kernels.layout import Layout as Layout
from nomoe_kernels.layout import Tables
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
    return torch.float32 if is_own(layers) else dtype


def is_own(module: nn.Module) -> bool:
    """Whether all in a module is nomoe's or torch's, and nobody hooks it."""
    return all(
        type(part).__module__.startswith(("nomoe.", "torch.nn."))
        and not (part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part))
        for part in module.modules()
    )


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
