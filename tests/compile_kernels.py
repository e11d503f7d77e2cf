"""Compile every kernel a layer launches, for a device this machine need not have; print JSON lines.

    python tests/compile_kernels.py cuda:90 float16
    python tests/compile_kernels.py cuda:90 float16 '["tma", 128, 256, 64, 8, 4]'

A tile as third argument compiles the two products cut by it, instead of the configured ones.

The layer runs as ever, on unfilled CPU tensors; where a kernel would be launched it is compiled for
the target instead, with the arguments, specialisations and tiles it was launched with. Runs without
TRITON_INTERPRET, so in a process of its own.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from nomoe_kernels import checks, configs, fused, invariant, launch
from nomoe_kernels.configs import DenseShape, Device, Plan, Shape, Tile
from nomoe_kernels.reference import MoEWeights, Norm, Pooling

DEVICES = {
    "cuda:80": Device("A100", (8, 0), 108, 166_912),
    "cuda:86": Device("A10", (8, 6), 72, 101_376),
    "cuda:89": Device("L4", (8, 9), 58, 101_376),
    "cuda:90": Device("H200", (9, 0), 132, 232_448),
    "cuda:100": Device("B200", (10, 0), 148, 232_448),
    "cuda:120": Device("RTX 5090", (12, 0), 170, 101_376),
    "hip:gfx942": Device("MI300X", (0, 0), 304, 65_536),
}
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class NoDevice:
    """A driver that knows its target and can do nothing else."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def target_of(name: str) -> GPUTarget:
    backend, arch = name.split(":")
    return GPUTarget("cuda", int(arch), 32) if backend == "cuda" else GPUTarget("hip", arch, 64)


def report(kernel: Any) -> dict[str, Any]:
    """Registers, spills, shared memory and instructions of a compiled kernel."""
    assembly, meta = kernel.asm, kernel.metadata
    found: dict[str, Any] = {"shared": meta.shared, "warps": meta.num_warps}
    if "amdgcn" in assembly:
        text = assembly["amdgcn"]
        found["registers"] = max(int(n) for n in re.findall(r"\.vgpr_count:\s+(\d+)", text))
        spills = re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", text)
        found["spills"] = sum(int(n) for n in spills)
        found["mfma"] = text.count("v_mfma")
        return found
    ptx = assembly["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(assembly["cubin"])

        def tool(*command: str) -> str:
            done = subprocess.run(
                [TOOLS / command[0], *command[1:], cubin], capture_output=True, text=True
            )
            return done.stdout + done.stderr

        usage = re.search(r"REG:(\d+) STACK:(\d+)", tool("cuobjdump", "-res-usage"))
        sass = tool("nvdisasm", "-c")
    assert usage, "cuobjdump reports no resources"
    found["registers"], found["stack"] = int(usage[1]), int(usage[2])
    found["spills"] = len(re.findall(r"\b(?:STL|LDL)\b", sass))
    found["wgmma"] = ptx.count("wgmma.mma_async")
    found["tcgen05"] = ptx.count("tcgen05.mma")
    found["mma"] = len(re.findall(r"\bmma\.sync", ptx))
    found["copies"] = len(re.findall(r"cp\.async(?:\.cg|\.ca|\.bulk)", ptx))
    # each group of warps of a specialised kernel sets its own share of the registers
    found["specialized"] = ptx.count("setmaxnreg")
    found["split_copies"] = split_copies(assembly["ttgir"])
    found["barriers"] = len(re.findall(r"\bbar\.sync", ptx))
    found["exponentials"] = ptx.count("ex2.approx")
    found["instructions"] = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", sass, re.MULTILINE))
    return found


def split_copies(ttgir: str) -> int:
    """Tensor memory copies whose descriptor moves another number of elements than there is room.

    What Triton 3.6 makes of a host's descriptor when it splits a block between groups of warps.
    """
    pairs = re.findall(
        r"async_tma_copy_global_to_local.*tensordesc<(?:tensor<)?([\dx]+)x.*"
        r"-> !ttg.memdesc<([\dx]+)x",
        ttgir,
    )
    assert len(pairs) == ttgir.count("ttng.async_tma_copy_global_to_local")
    return sum(block != room for block, room in pairs)


def compile_all(name: str, run: Callable[[], None]) -> list[dict[str, Any]]:
    """Run something that launches kernels and report each distinct one compiled for a target."""
    driver.set_active(NoDevice(target_of(name)))
    run_kernel = JITFunction.run
    reports: dict[str, dict[str, Any]] = {}

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run_kernel(self, *args, grid=grid, warmup=True, **options)
        shown = {
            key: value
            for key, value in options.items()
            if (isinstance(value, (int, str)) and key.isupper()) or key.startswith("num_")
        }
        dtypes = [str(a.dtype).removeprefix("torch.") for a in args if isinstance(a, torch.Tensor)]
        if kernel.hash not in reports:
            reports[kernel.hash] = {
                "target": name,
                "kernel": self.__name__,
                "options": shown,
                "dtypes": dtypes,
                **report(kernel),
            }
        return kernel

    JITFunction.run = compile_only
    try:
        run()
    finally:
        JITFunction.run = run_kernel
    return list(reports.values())


E, K, D, F, H = 8, 2, 768, 3072, 64


def prepare(name: str) -> None:
    """Let the layer run on CPU tensors as if they were on the device."""
    launch.device = lambda _: DEVICES[name]
    checks.device = lambda name, tensor: None
    launch.allocate = lambda size, alignment, stream: torch.empty(size, dtype=torch.int8)
    launch.is_nvidia = lambda tensor: name.startswith("cuda")


def weights(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.empty(E, F, D, dtype=dtype).transpose(1, 2),
        torch.empty(E, F, D, dtype=dtype),
    )


def launch_layers(device: Device, dtype: torch.dtype) -> None:
    """The layer at every size class of the published model, and the kernels around it."""
    router, bias = torch.empty(E, D, dtype=dtype), torch.empty(D, dtype=dtype)
    w1, w2 = weights(dtype)
    seen: set[Plan] = set()
    for power in range(4, 18):
        tokens = 1 << power
        tiles = configs.plan(device, Shape(E, D, F, dtype.itemsize, tokens * K))
        if tiles in seen:
            continue
        seen.add(tiles)
        x = torch.empty(tokens, D, dtype=dtype)
        fused.run_layer(x, router, w1, w2, bias, K)
        fused.run_layer(x.float(), router, w1, w2, bias, K)
    launch_dense(device, dtype)
    x, vector = torch.empty(64, D, dtype=dtype), torch.empty(D, dtype=dtype)
    norm = Norm(vector, vector, 1e-5)
    fused.add_norm_route(x, x, norm, router, K)
    routing = launch.empty_routing(x, K)
    live = torch.zeros(1, dtype=torch.int32)
    launch.route(x, router, *routing, normalize=False, rounded_TD=x, added=(x, norm), live=live)
    for parts in (1, 4):
        rows = torch.empty(parts, 64 * K, D, dtype=torch.float32 if parts > 1 else dtype)
        launch.unpermute(rows, bias, x, K, added=(x, norm))
    positions = torch.zeros(512, dtype=torch.int64)
    for module, lengths in (
        *((fused, lengths) for lengths in ([512], [256], [60] * 4, [32] * 2, [16] * 16)),
        (invariant, [256]),
    ):
        T = sum(lengths)
        packing = module.pack(lengths, positions[:T], 512, H, 10000.0, dtype)
        qkv = torch.empty(T, 3, D // H, H, dtype=dtype)
        module.attention(qkv, packing)
    moe = MoEWeights(router, w1, w2, bias, K)
    invariant.moe_block(x, x, norm, moe, norm, live=torch.zeros(1, dtype=torch.int32))
    fused.add_layer_norm(x, x, norm)
    fused.permute(torch.zeros(64, K, dtype=torch.int64), E)
    fused.embed(torch.zeros(64, dtype=torch.int64), w2[0], vector, norm)
    fused.pool(x, [60, 4], Pooling(D, True, True))


def launch_dense(device: Device, dtype: torch.dtype) -> None:
    """Every product with one matrix that is not left to the library, at every size class."""
    seen = set()
    for inner, outer, gelu in ((D, F, True), (F, D, False), (D, 3 * D, False), (D, D, False)):
        weight, bias = torch.empty(outer, inner, dtype=dtype), torch.empty(outer, dtype=dtype)
        for power in range(4, 18):
            shape = DenseShape(inner, outer, dtype.itemsize, 1 << power, gelu)
            tile = configs.dense(device, shape)
            if tile != "library" and (tile, inner, outer) not in seen:
                seen.add((tile, inner, outer))
                x = torch.empty(1 << power, inner, dtype=dtype)
                fused.linear(x, weight, bias, gelu=gelu)
        invariant.linear(torch.empty(64, inner, dtype=dtype), weight, bias, gelu=gelu)


def launch_products(tile: Tile, dtype: torch.dtype) -> None:
    """Both products of a layer, cut by one tile."""
    w1, w2 = weights(dtype)
    x, h = torch.empty(4096, D, dtype=dtype), torch.empty(4096, F, dtype=dtype)
    ends, order = torch.zeros(E, dtype=torch.int32), torch.zeros(4096, dtype=torch.int64)
    launch.grouped_gemm(x, w1, ends, h, tile, gelu=True)
    launch.grouped_gemm(h, w2, ends, x, tile, row_weights_R=torch.empty(4096), scatter_R=order)


if __name__ == "__main__":
    target, dtype = sys.argv[1], getattr(torch, sys.argv[2])
    prepare(target)
    if len(sys.argv) > 3:
        tile = Tile(*json.loads(sys.argv[3]))
        reports = compile_all(target, lambda: launch_products(tile, dtype))
    else:
        reports = compile_all(target, lambda: launch_layers(DEVICES[target], dtype))
    for line in reports:
        print(json.dumps(line))
