"""The kernels as compiled for a GPU, in some of their tiles, run by `emulator` against float64.

What Triton's interpreter cannot see: how the compiler lays out, pipelines, specialises and fences.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import triton

from tests.emulate_kernels import SPOILED
from tests.emulator import KernelError, Launch, Memory, launch
from tests.ptx import Program

WORKER = Path(__file__).with_name("emulate_kernels.py")
# bfloat16 differs in few instructions
RUNS = [
    ("cuda:90", "float16"),
    ("cuda:90", "float32"),
    ("cuda:90", "bfloat16", "layers", "rows"),
    ("cuda:80", "float16"),
]
# Triton's versions whose instructions `ptx` knows
KNOWN = ((3, 6), (3, 7), (3, 8))
VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(VERSION not in KNOWN, reason=f"knows the assembly of {KNOWN}"),
]


def emulate(*arguments: str) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    # the tensors are the CPU's where there is a GPU as well
    environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, str(WORKER), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="session")
def results() -> dict[tuple[str, ...], list[dict[str, Any]]]:
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(RUNS, pool.map(lambda run: emulate(*run), RUNS), strict=True))


@pytest.mark.parametrize("run", RUNS, ids="-".join)
def test_compiled_kernels_are_right(
    run: tuple[str, ...], results: dict[tuple[str, ...], list[dict[str, Any]]]
) -> None:
    kernels = {"tma", "specialized"} if run[0] == "cuda:90" and run[1] != "float32" else set()
    seen = {result["what"] for result in results[run]}
    for kernel in kernels | {"pointer", "small"}:
        assert any(what.startswith(f"layer, {kernel}") for what in seen)
    assert not [result for result in results[run] if not result["error"] < result["bound"]]


def test_what_is_taken_from_a_kernel_shows() -> None:
    results = emulate("cuda:90", "float16", "spoiled")
    assert [result["what"] for result in results] == list(SPOILED)
    for result in results:
        assert result["taken"], result
        assert "refused" in result or result["error"] > 0.1, result


BARRIER = "bar.sync 0;"
# each thread stores its number, loads that of one in the other warp, and stores again
EXCHANGE = """.entry kernel(
.param .u64 kernel_param_0
)
.reqntid 64
{{
mov.u32 %r1, %tid.x;
shl.b32 %r2, %r1, 2;
xor.b32 %r3, %r2, 128;
st.shared.b32 [%r2], %r1;
{before}
ld.shared.b32 %r4, [%r3];
{after}
add.s32 %r1, %r1, 1;
st.shared.b32 [%r2], %r1;
ret;
}}
"""


@pytest.mark.parametrize(
    ("before", "after", "refused"),
    [
        (BARRIER, BARRIER, False),
        ("", BARRIER, True),
        (BARRIER, "", True),
    ],
)
def test_accesses_that_no_barrier_orders_are_refused_in_any_order(
    before: str, after: str, refused: bool
) -> None:
    text = EXCHANGE.format(before=before, after=after)
    for seed in range(10):
        kernel = Launch(text, 256, [0], (1,))
        if refused:
            with pytest.raises(KernelError, match=r"warp . .* what warp . may be (read|writ)ing"):
                launch(kernel, Memory(), seed)
        else:
            launch(kernel, Memory(), seed)


# both warps store numbers at the same places, and load them
BOTH = """.entry kernel(
.param .u64 kernel_param_0
)
.reqntid 64
{{
mov.u32 %r1, %tid.x;
and.b32 %r2, %r1, 31;
shl.b32 %r3, %r2, 2;
st.shared.b32 [%r3], {stored};
bar.sync 0;
ld.shared.b32 %r4, [%r3];
ret;
}}
"""


def test_warps_may_store_the_same_number() -> None:
    for seed in range(10):
        launch(Launch(BOTH.format(stored="%r2"), 256, [0], (1,)), Memory(), seed)
        with pytest.raises(KernelError, match=r"comes to what warp . may be writing"):
            launch(Launch(BOTH.format(stored="%r1"), 256, [0], (1,)), Memory(), seed)


STORE = """.entry kernel(
.param .u64 kernel_param_0
)
.reqntid 32
{{
ld.param.b64 %rd1, [kernel_param_0];
mov.u32 %r1, %tid.x;
mov.u32 %r2, {block};
mad.lo.u32 %r3, %r2, 32, %r1;
mad.wide.u32 %rd2, %r3, 4, %rd1;
ld.global.b32 %r4, [%rd2];
st.global.b32 [%rd2], %r4;
ret;
}}
"""


@pytest.mark.parametrize(("block", "refused"), [("%ctaid.x", False), ("0", True)])
def test_blocks_may_not_write_the_same(block: str, refused: bool) -> None:
    numbers, memory = np.zeros(256, np.uint8), Memory()
    # two tensors that lie in the same memory
    memory.add(4096, numbers, 4096, 256)
    memory.add(4096, numbers[:128], 4096, 256)
    kernel = Launch(STORE.format(block=block), 0, [4096], (2,))
    if refused:
        with pytest.raises(KernelError, match=r"block . reads what another may be writing"):
            launch(kernel, memory, 0)
    else:
        launch(kernel, memory, 0)


# a product of registers with shared memory, whose sum is read
PRODUCT = """.entry kernel(
.param .u64 kernel_param_0
)
.reqntid 128
{{
mov.b64 %rd1, 0;
{fence}
wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {{%r1, %r2, %r3,
%r4}}, {{%r5, %r6, %r7, %r8}}, %rd1, 1, 1, 1, 0;
wgmma.commit_group.sync.aligned;
{before}
wgmma.wait_group.sync.aligned 0;
mov.b32 %r9, %r1;
ret;
}}
"""
FENCE = "wgmma.fence.sync.aligned;"


@pytest.mark.parametrize(
    ("fence", "before", "refused"),
    [
        (FENCE, "", None),
        (FENCE, "mov.b32 %r9, %r5;", None),
        ("", "", "not fenced from"),
        (f"{FENCE} mov.b32 %r8, 0;", "", "not fenced from"),
        (FENCE, "mov.b32 %r9, %r1;", "a register is used that a product in flight writes"),
        (FENCE, "mov.b32 %r1, 0;", "a register is used that a product in flight writes"),
        (FENCE, "mov.b32 %r5, 0;", "a register is written that a product in flight reads"),
    ],
)
def test_registers_of_products_in_flight(fence: str, before: str, refused: str | None) -> None:
    kernel = Launch(PRODUCT.format(fence=fence, before=before), 1024, [0], (1,))
    if refused is None:
        launch(kernel, Memory(), 0)
    else:
        with pytest.raises(KernelError, match=refused):
            launch(kernel, Memory(), 0)


@pytest.mark.parametrize(
    "unknown",
    [
        "add.sat.s32 %r1, %r2, %r3",
        "setp.eq.and.s32 %p1, %r1, %r2, %p2",
        "cvt.rni.s32.f32 %r1, %r2",
        "fma.rn.f16 %rs1, %rs2, %rs3, %rs4",
        "vote.sync.any.pred %p1, %p2, -1",
        "redux.sync.xor.b32 %r1, %r2, -1",
        "shfl.sync.bfly.b32 %r1, %r2, 1, 6175, -1",
        "mov.u32 %r1, %laneid",
        "@%p1 ret",
        "@%p1 bar.sync 0",
        "tcgen05.alloc %r1",
    ],
)
def test_unknown_assembly_is_refused(unknown: str) -> None:
    text = ".entry kernel(\n.param .u64 kernel_param_0\n)\n.reqntid 32\n{{\n{};\nret;\n}}\n"
    Program(text.format("add.s32 %r1, %r2, %r3"))
    with pytest.raises(NotImplementedError, match="kernel: "):
        Program(text.format(unknown))
