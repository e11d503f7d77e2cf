"""Compile the kernels for a device that this machine need not have and run them in `emulator`.

    python tests/emulate_kernels.py cuda:90 float16
    python tests/emulate_kernels.py cuda:90 float16 layers attention
    python tests/emulate_kernels.py cuda:90 float16 spoiled

Prints one JSON line for each case: what ran, its error against float64 and the bound for it. The
names of `PARTS` run those alone; `spoiled` runs kernels from which something was taken, and says
why the emulator refused to go on where it did. Runs without TRITON_INTERPRET, so in a process of
its own, as `compile_kernels` does.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from nomoe_kernels import checks, configs, fused, invariant, launch, reference
from nomoe_kernels.configs import AttentionTile, Plan, Shape, Tile
from nomoe_kernels.reference import MoEWeights, Norm, Pooling
from tests import emulator
from tests.compile_kernels import DEVICES, NoDevice, prepare, target_of
from tests.emulator import KernelError, Launch, Memory
from tests.test_attention_ops import exact_attention
from tests.test_fused_ops import BOUNDS, Case, exact_layer, make_layer

compile_kernel = JITFunction.run
# what Triton aligns the memory to in which kernels keep their descriptors
SCRATCH_ALIGNMENT = 128


class Emulator:
    """Runs what is launched; each launch draws other numbers."""

    def __init__(self) -> None:
        self.launches = 0
        # what to replace in a kernel's assembly, and how often it was
        self.spoil: Spoil | None = None
        self.spoiled = 0

    def install(self, target: str) -> None:
        prepare(target)
        # so few that the programs of a persistent grid have several tiles each
        device = DEVICES[target]._replace(multiprocessors=2)
        launch.device = lambda _: device
        driver.set_active(NoDevice(target_of(target)))
        emulate = self.run

        def run(function: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
            emulate(function, arguments, grid, options)

        JITFunction.run = run

    def run(
        self, function: Any, arguments: tuple[Any, ...], grid: Any, options: dict[str, Any]
    ) -> None:
        kernel = compile_kernel(function, *arguments, grid=grid, warmup=True, **options)
        given = dict(zip(function.arg_names, arguments, strict=False)) | options
        programs = int(np.prod(grid))
        scratch = torch.zeros(
            max(1, kernel.metadata.global_scratch_size) * programs + SCRATCH_ALIGNMENT,
            dtype=torch.int8,
        )
        memory, parameters = Memory(), []
        for name, kind in kernel.src.signature.items():
            if kind == "constexpr":
                continue
            value = given[name]
            if isinstance(value, Tensor):
                add(memory, value)
                parameters.append(value.data_ptr())
            elif isinstance(value, float):
                parameters.append(int(np.float32(value).view(np.uint32)))
            else:
                parameters.append(value)
        add(memory, scratch)
        at = scratch.data_ptr()
        # the second is for Triton's profiler
        parameters += [at + -at % SCRATCH_ALIGNMENT, 0]
        text = kernel.asm["ptx"]
        if self.spoil and self.spoil.kernel == kernel.metadata.name:
            text, count = re.subn(self.spoil.pattern, self.spoil.replacement, text)
            self.spoiled += count
        # what is missing shows on 10.0 alone, where the model refuses such a Triton
        trusts_copies = checks.RELEASE < checks.FENCES_COPIES
        started = Launch(text, kernel.metadata.shared, parameters, tuple(grid), trusts_copies)
        emulator.launch(started, memory, seed=self.launches)
        self.launches += 1


def add(memory: Memory, tensor: Tensor) -> None:
    """Let a kernel come to a tensor's bytes."""
    span = tensor.element_size() * (
        1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    )
    octets = (ctypes.c_uint8 * (span if tensor.numel() else 0)).from_address(tensor.data_ptr())
    storage = tensor.untyped_storage()
    memory.add(tensor.data_ptr(), np.frombuffer(octets, np.uint8), storage.data_ptr(), len(storage))


def off(actual: Tensor, exact: Tensor) -> float:
    """Largest error over largest value; infinite where something is NaN."""
    error = ((actual.double() - exact).abs().max() / exact.abs().max()).item()
    return error if error == error else float("inf")


def plans(target: str, itemsize: int) -> dict[str, Plan]:
    """The tiles that a formula may pick on a device, or others of their kernel and blocks.

    A plan has the same for both products, but for few rows, where it is the published model's.
    """
    device, menu = DEVICES[target], configs.menu(DEVICES[target], itemsize)
    tiles = {f"{tile.kernel} {tile.block_m} x {tile.block_n}": tile for tile in menu}
    if target == "cuda:90" and itemsize == 2:
        # in steps that divide the widths here, and without warps of two kinds
        tiles["specialized 128 x 128"] = Tile("specialized", 128, 128, 64, 4, 3)
        tiles["tma 128 x 256"] = Tile("tma", 128, 256, 64, 8, 3)
    found = {name: Plan(tile, tile) for name, tile in tiles.items()}
    return found | {"small": configs.formula(device, Shape(8, 768, 3072, itemsize, 64))}


def layers(plans: dict[str, Plan], dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    """A whole layer by each kernel: experts without rows, and with more than one block of them."""
    for name, plan in plans.items():
        # rows for two blocks of an expert, and more steps of each product than it has stages; of
        # few rows fewer than a block has, and more
        width = 160 if dtype == torch.float32 else 320
        for tokens in (7, 24) if name == "small" else (140,):
            layer = make_layer(Case(tokens, 4, 2, width, width * 6 // 5, "empty experts"), dtype)
            exact_TD, probabilities_TE, exact_TK = exact_layer(layer)
            out_TD, weights_TK, experts_TK = fused.run_layer(*layer, tiles=plan)
            assert experts_TK.equal(exact_TK)
            assert off(weights_TK, probabilities_TE.gather(1, exact_TK)) < 2e-6
            yield f"layer, {name}, {tokens} tokens", off(out_TD, exact_TD)


def block(plans: dict[str, Plan], dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    """The block of an engine, with tokens of padding, and that of one tile class."""
    layer = make_layer(Case(40, 8, 2, 96, 96), dtype)
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    y_TD, norms = normal(40, 96), [Norm(normal(96), normal(96), 1e-5) for _ in range(2)]
    moe = MoEWeights(layer.router_ED, layer.w1_EDF, layer.w2_EFD, layer.bias_D, layer.top_k)
    exact = [Norm(norm.weight_D.double(), norm.bias_D.double(), norm.eps) for norm in norms]
    double = MoEWeights(*(one.double() for one in moe[:4]), layer.top_k)
    live = torch.tensor([33], dtype=torch.int32)
    exact_TD, _, exact_TK = reference.moe_block(
        layer.x_TD.double(), y_TD.double(), exact[0], double, exact[1]
    )
    for name, module in (("fused", fused), ("invariant", invariant)):
        out_TD, _, experts_TK = module.moe_block(
            layer.x_TD, y_TD.clone(), norms[0], moe, norms[1], live=live
        )
        assert experts_TK[:33].equal(exact_TK[:33])
        assert (experts_TK[33:] == 8).all()
        yield f"block, {name}", off(out_TD[:33], exact_TD[:33])


def dense(plans: dict[str, Plan], dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    generator = torch.Generator().manual_seed(2)
    x_TI, weight_OI, bias_O = (
        torch.randn(*shape, generator=generator).to(dtype)
        for shape in ((130, 256), (160, 256), (160,))
    )
    weight_OI /= 16
    exact_TO = torch.nn.functional.gelu(x_TI.double() @ weight_OI.double().T + bias_O.double())
    for name, plan in plans.items():
        out_TO = torch.full((130, 160), torch.nan, dtype=dtype)
        launch.linear(x_TI, weight_OI, bias_O, out_TO, plan.up, gelu=True)
        yield f"dense, {name}", off(out_TO, exact_TO)
    # of a query, whose sum takes three steps on Hopper
    x_TI, weight_OI = x_TI[:11].repeat(1, 3), weight_OI.repeat(1, 3) / 3
    shape = configs.DenseShape(768, 3072, dtype.itemsize, len(x_TI), gelu=True)
    tile = configs.dense_formula(launch.device(x_TI.device), shape)
    if isinstance(tile, Tile):
        exact_TO = torch.nn.functional.gelu(x_TI.double() @ weight_OI.double().T + bias_O.double())
        out_TO = torch.full((11, 160), torch.nan, dtype=dtype)
        launch.linear(x_TI, weight_OI, bias_O, out_TO, tile, gelu=True)
        yield "dense, a query", off(out_TO, exact_TO)


def attention(plans: dict[str, Plan], dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    # the second has more blocks of keys than a loop has stages
    lengths = [1, 220, 33]
    generator = torch.Generator().manual_seed(3)
    positions_T = torch.cat([torch.arange(length) for length in lengths])
    few = AttentionTile("rotating", 16, 16, 4, 2)
    known = {
        configs.attention_formula(
            launch.device(torch.device("cpu")),
            configs.AttentionShape(64, dtype.itemsize, longest, 254),
        )
        for longest in (16, 64, 220, 512)
    }
    for tile in sorted({few, few._replace(stages=1), *known}):
        for heads, width in ((1, 64), (2, 16)):
            qkv = torch.randn(254, 3, heads, width, generator=generator).to(dtype)
            exact_TD = exact_attention(qkv, positions_T, lengths)
            packing = fused.pack(lengths, positions_T, 250, width, 10000.0, dtype, tile=tile)
            out_TD = fused.attention(qkv, packing)
            yield f"attention, {heads} x {width}, {tuple(tile)}", off(out_TD, exact_TD)


def rows(plans: dict[str, Plan], dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    """What works on whole rows: the embedding, the norm between layers, and pooling."""
    generator = torch.Generator().manual_seed(4)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    words_VD, x_TD, y_TD, type_D = normal(50, 768), normal(37, 768), normal(37, 768), normal(768)
    norm = Norm(normal(768), normal(768), 1e-5)
    exact = Norm(norm.weight_D.double(), norm.bias_D.double(), norm.eps)
    ids_T = torch.randint(50, (37,), generator=generator)
    yield (
        "embed",
        off(
            fused.embed(ids_T, words_VD, type_D, norm),
            reference.embed(ids_T, words_VD.double(), type_D.double(), exact),
        ),
    )
    yield (
        "add_layer_norm",
        off(
            fused.add_layer_norm(x_TD, y_TD.clone(), norm),
            reference.add_layer_norm(x_TD.double(), y_TD.double(), exact),
        ),
    )
    pooling = Pooling(256, True, True)
    yield (
        "pool",
        off(fused.pool(x_TD, [1, 36], pooling), reference.pool(x_TD.double(), [1, 36], pooling)),
    )


PARTS: dict[str, Callable[[dict[str, Plan], torch.dtype], Iterator[tuple[str, float]]]] = {
    "layers": layers,
    "dense": dense,
    "block": block,
    "attention": attention,
    "rows": rows,
}


class Spoil(NamedTuple):
    """What is taken from the assembly of a kernel."""

    part: str
    # the plan of a layer's products, where the part has several
    plan: str | None
    kernel: str
    pattern: str
    replacement: str
    # what the emulator says; None where it may as well show in the result alone
    refused: str | None
    target: str = "cuda:90"


SPOILED = {
    "no wait for products": Spoil(
        "layers", "tma 128 x 256", "tma_kernel", r"wgmma\.wait_group[^;]*;", "",
        "that a product in flight|what products of warp . may be reading",
    ),
    "no wait for copies": Spoil(
        "layers", "pointer 64 x 128", "pointer_kernel", r"cp\.async\.wait_group[^;]*;", "",
        "comes to what copies of warp . may be writing",
    ),
    "no wait for tensor copies": Spoil(
        "layers", "tma 128 x 256", "tma_kernel", r"@!complete bra[^;]*;", "",
        "comes to what tensor copies of barrier . may be writing",
    ),
    "no bytes expected": Spoil(
        "layers", "tma 128 x 256", "tma_kernel", r"@\S+ mbarrier\.arrive\.expect_tx[^;]*;", "",
        "all wait",
    ),
    "a phase ahead": Spoil(
        "layers", "specialized, 4 stages", "tma_kernel", r"(setp\.eq\.b64\s+\S+ \S+) 0;", r"\1 4;",
        "all wait",
    ),
    "phases from zero at each tile": Spoil(
        "layers", "specialized 128 x 128", "tma_kernel",
        r"(?s)((?:mov\.b64\s+%rd\d+, 0;\s+)+)(\$L__BB\d+_\d+:)", r"\1\2 \1", None,
    ),
    "no barriers": Spoil(
        "layers", "pointer 64 x 128", "pointer_kernel", r"bar\.sync[^;]*;", "",
        "may be (writing|reading)",
    ),
    "rows beyond the last": Spoil(
        "layers", "pointer 64 x 128", "pointer_kernel", r"@\S+ (st\.global)", r"\1",
        "are in no tensor|writes what another may be",
    ),
    "no fence": Spoil(
        "attention", None, "attention_kernel", r"fence\.proxy\.async[^;]*;", "",
        "a product reads what was stored and not fenced",
    ),
    "no fence of registers": Spoil(
        "layers", "tma 128 x 256", "tma_kernel", r"wgmma\.fence[^;]*;", "",
        "a product uses registers that it is not fenced from",
    ),
    "no fence of tensor maps": Spoil(
        "layers", "tma 128 x 256", "tma_kernel", r"@\S+ fence\.proxy\.tensormap[^;]*;", "",
        "a tensor map is used that was not fenced in",
    ),
    "all blocks keep their tensor maps in one place": Spoil(
        "layers", "tma 128 x 256", "tma_kernel", r"shl\.b32\s+(%r\d+, \S+) 8;", r"mul.lo.s32 \1 0;",
        "block . (reads|writes) what another may be (writing|reading)",
    ),
    "all blocks do the first one's work": Spoil(
        "layers", "pointer 64 x 128", "pointer_kernel", r"%ctaid\.x", "0",
        "block . writes what another may be writing",
    ),
    "no wait for products of tensor memory": Spoil(
        "dense", "pointer 128 x 128", "pointer_kernel", r"@!complete bra[^;]*;", "",
        "products of warp . may be (reading|writing)", "cuda:100",
    ),
    "no commit of products": Spoil(
        "attention", None, "attention_kernel", r"@\S+ tcgen05\.commit[^;]*;", "", "all wait",
        "cuda:100",
    ),
    "no wait for stores to tensor memory": Spoil(
        "attention", None, "attention_kernel", r"tcgen05\.wait::st[^;]*;", "",
        "did not wait for tensor memory", "cuda:100",
    ),
    "no fence between copies and products of tensor memory": Spoil(
        "dense", "pointer 64 x 128", "pointer_kernel", r"fence\.proxy\.async[^;]*;", "",
        "a product reads what was stored and not fenced", "cuda:100",
    ),
    "no deallocation": Spoil(
        "dense", "pointer 128 x 128", "pointer_kernel", r"@\S+ tcgen05\.dealloc[^;]*;", "",
        "ends and keeps its tensor memory", "cuda:100",
    ),
    "no fence before products of tensor memory": Spoil(
        "attention", None, "attention_kernel", r"fence\.proxy\.async[^;]*;", "",
        "a product reads what was stored and not fenced", "cuda:100",
    ),
}  # fmt: skip


def spoiled(machine: Emulator, target: str, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    found = plans(target, dtype.itemsize)
    # a power of two of them shows where the assembly keeps the phases
    even = Tile("specialized", 128, 256, 64, 4, 4)
    found["specialized, 4 stages"] = Plan(even, even)
    for what, spoil in SPOILED.items():
        if spoil.target != target:
            continue
        machine.spoil, machine.spoiled = spoil, 0
        try:
            tiles = {spoil.plan: found[spoil.plan]} if spoil.plan else {}
            errors = dict(PARTS[spoil.part](tiles, dtype))
        except (KernelError, AssertionError) as refused:
            yield {"what": what, "taken": machine.spoiled, "refused": str(refused)}
        else:
            yield {"what": what, "taken": machine.spoiled, "error": max(errors.values())}


if __name__ == "__main__":
    target, dtype, parts = sys.argv[1], getattr(torch, sys.argv[2]), sys.argv[3:] or list(PARTS)
    # what a kernel should have written and did not is then NaN, or no index
    torch.use_deterministic_algorithms(True)
    machine = Emulator()
    machine.install(target)
    if parts == ["spoiled"]:
        for line in spoiled(machine, target, dtype):
            print(json.dumps(line), flush=True)
    else:
        for part in parts:
            for what, error in PARTS[part](plans(target, dtype.itemsize), dtype):
                line = {"what": what, "error": error, "bound": BOUNDS[dtype]}
                print(json.dumps(line), flush=True)
