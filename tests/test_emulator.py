"""The emulator of PTX itself: small kernels that are right, and what it must refuse in others."""

from __future__ import annotations

import numpy as np
import pytest

from tests.emulator import KernelError, Launch, Memory, launch
from tests.ptx import Program

BARRIER = "bar.sync 0;"


def kernel_of(*lines: str, threads: int = 64) -> str:
    """A kernel of some lines: %p1 is its first thread, %p2 and %p3 its first and second warp."""
    head = (
        f".entry kernel(\n.param .u64 kernel_param_0\n)\n.reqntid {threads}\n{{\n"
        "ld.param.b64 %rd1, [kernel_param_0];\nadd.s64 %rd2, %rd1, 3072;\n"
        "mov.u32 %r1, %tid.x;\nshr.u32 %r2, %r1, 5;\nand.b32 %r3, %r1, 31;\nshl.b32 %r4, %r3, 2;\n"
        "setp.eq.s32 %p1, %r1, 0;\nsetp.eq.s32 %p2, %r2, 0;\nsetp.eq.s32 %p3, %r2, 1;\n"
    )
    return head + "\n".join(lines) + "\nret;\n}\n"


@pytest.mark.parametrize(
    ("before", "after", "refused"),
    [(BARRIER, BARRIER, False), ("", BARRIER, True), (BARRIER, "", True)],
)
def test_accesses_that_no_barrier_orders_are_refused_in_any_order(
    before: str, after: str, refused: bool
) -> None:
    """Each thread stores a number, loads that of one in the other warp, and stores again."""
    text = kernel_of(
        "shl.b32 %r5, %r1, 2;\nxor.b32 %r6, %r5, 128;\nst.shared.b32 [%r5], %r1;",
        before,
        "ld.shared.b32 %r7, [%r6];",
        after,
        "add.s32 %r8, %r1, 1;\nst.shared.b32 [%r5], %r8;",
    )
    for seed in range(10):
        kernel = Launch(text, 256, [0], (1,))
        if refused:
            with pytest.raises(KernelError, match=r"warp . .* what warp . may be (read|writ)ing"):
                launch(kernel, Memory(), seed)
        else:
            launch(kernel, Memory(), seed)


def test_warps_may_store_the_same_number() -> None:
    for seed in range(10):
        same, others = (
            kernel_of(f"st.shared.b32 [%r4], {stored};", BARRIER, "ld.shared.b32 %r5, [%r4];")
            for stored in ("%r3", "%r1")
        )
        launch(Launch(same, 256, [0], (1,)), Memory(), seed)
        with pytest.raises(KernelError, match=r"comes to what warp . may be writing"):
            launch(Launch(others, 256, [0], (1,)), Memory(), seed)


def test_another_number_may_not_follow_the_same_one() -> None:
    text = kernel_of(
        "st.shared.b32 [%r4], %r3;\n$Lafter:\n@%p2 st.shared.b32 [%r4], %r1;",
        "add.s32 %r5, %r1, 1;\n$Llast:\n@%p2 st.shared.b32 [%r4], %r5;",
    )
    for seed in range(40):
        with pytest.raises(KernelError, match=r"may be (reading|writing)"):
            launch(Launch(text, 256, [0], (1,)), Memory(), seed)


@pytest.mark.parametrize(("block", "refused"), [("%ctaid.x", False), ("0", True)])
def test_blocks_may_not_write_the_same(block: str, refused: bool) -> None:
    text = kernel_of(
        f"mov.u32 %r50, {block};\nmad.lo.u32 %r51, %r50, 32, %r1;\n"
        "mad.wide.u32 %rd5, %r51, 4, %rd1;\nld.global.b32 %r52, [%rd5];\n"
        "st.global.b32 [%rd5], %r52;",
        threads=32,
    )
    numbers, memory = np.zeros(256, np.uint8), Memory()
    # two tensors that lie in the same memory
    memory.add(4096, numbers, 4096, 256)
    memory.add(4096, numbers[:128], 4096, 256)
    if refused:
        with pytest.raises(KernelError, match=r"block . reads what another may be writing"):
            launch(Launch(text, 0, [4096], (2,)), memory, 0)
    else:
        launch(Launch(text, 0, [4096], (2,)), memory, 0)


def test_a_block_may_not_write_what_another_reads() -> None:
    one_each = (
        "mov.u32 %r50, %ctaid.x;\nsetp.eq.s32 %p4, %r50, 0;\n"
        "@%p4 ld.global.b32 %r52, [%rd1];\n@!%p4 st.global.b32 [%rd1], %r50;"
    )
    for seed in range(10):
        memory = Memory()
        memory.add(65536, np.zeros(4096, np.uint8), 65536, 4096)
        with pytest.raises(KernelError, match=r"block . (reads|writes) what another may be"):
            launch(Launch(kernel_of(one_each, threads=32), 0, [65536], (2,)), memory, seed)


# --- products of warp groups


FENCE = "wgmma.fence.sync.aligned;"


def product(sums: str, factors: str) -> str:
    """Registers times shared memory."""
    return (
        f"wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {{{sums}}}, {{{factors}}}, %rd1, 1, 1, "
        "1, 0;\nwgmma.commit_group.sync.aligned;"
    )


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
        (FENCE, "st.shared.b32 [%r20], %r21;", "writes what products of warp . may be reading"),
        (
            FENCE,
            product("%r5, %r6, %r7, %r8", "%r10, %r11, %r12, %r13"),
            "writes what one in flight reads",
        ),
        (
            FENCE,
            product("%r10, %r11, %r12, %r13", "%r1, %r2, %r3, %r4"),
            "reads what one in flight writes",
        ),
        (FENCE, product("%r2, %r1, %r3, %r4", "%r5, %r6, %r7, %r8"), "of another shape"),
        (FENCE, product("%r1, %r2, %r3, %r4", "%r5, %r6, %r7, %r8"), None),
    ],
)
def test_registers_of_products_in_flight(fence: str, before: str, refused: str | None) -> None:
    text = kernel_of(
        "mov.b64 %rd1, 0;\nmov.b32 %r20, 0;\nmov.b32 %r21, 0;",
        fence,
        product("%r1, %r2, %r3, %r4", "%r5, %r6, %r7, %r8"),
        before,
        "wgmma.wait_group.sync.aligned 0;\nmov.b32 %r9, %r1;",
        threads=128,
    )
    kernel = Launch(text, 1024, [0], (1,))
    if refused is None:
        launch(kernel, Memory(), 0)
    else:
        with pytest.raises(KernelError, match=refused):
            launch(kernel, Memory(), 0)


# --- a hand-over by a barrier in shared memory, and copies


def init(barrier: int = 0) -> str:
    return f"mov.b32 %r26, {barrier};\n@%p1 mbarrier.init.shared::cta.b64 [%r26], 1;"


def invalidate(barrier: int = 0) -> str:
    return f"mov.b32 %r26, {barrier};\n@%p1 mbarrier.inval.shared::cta.b64 [%r26];"


def expect(size: int, barrier: int = 0) -> str:
    return f"mov.b32 %r27, {barrier};\n@%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r27], {size};"


def wait(parity: int, label: str, barrier: int = 0) -> str:
    return (
        f"mov.b32 %r24, {barrier};\nmov.b32 %r25, {parity};\n$L{label}:\n"
        f"mbarrier.try_wait.parity.shared::cta.b64 %p9, [%r24], %r25;\n@!%p9 bra $L{label};"
    )


def store(at: int) -> str:
    """The first warp stores."""
    return f"add.s32 %r40, %r4, {at};\n@%p2 st.shared.b32 [%r40], %r3;"


def load(at: int) -> str:
    return f"add.s32 %r30, %r4, {at};\nld.shared.b32 %r31, [%r30];"


FENCE_MAP = "fence.proxy.tensormap::generic.acquire.gpu [%rd2], 128;"


def tensor_map(base: str = "%rd1", then: str = f"@%p1 {FENCE_MAP}\n{BARRIER}") -> str:
    """Describe a tensor of eight rows of 32 numbers, at 1024, and publish that at %rd2."""
    fields = [
        ("global_address", "", base, "b64"), ("rank", "", 1, "b32"),
        ("box_dim", " 0,", 32, "b32"), ("box_dim", " 1,", 1, "b32"),
        ("global_dim", " 0,", 32, "b32"), ("global_dim", " 1,", 8, "b32"),
        ("global_stride", " 0,", 128, "b64"), ("elemtype", "", 7, "b32"),
        ("interleave_layout", "", 0, "b32"), ("swizzle_mode", "", 0, "b32"),
    ]  # fmt: skip
    return "\n".join([
        "mov.b32 %r10, 1024;",
        *(
            f"@%p1 tensormap.replace.tile.{name}.shared::cta.b1024.{kind} [%r10],{place} {value};"
            for name, place, value, kind in fields
        ),
        "@%p1 tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync"
        ".aligned [%rd2], [%r10], 128;",
        then,
    ])  # fmt: skip


def copy_row(to: int, row: int, barrier: int = 0) -> str:
    return (
        f"mov.b32 %r20, {to};\nmov.b32 %r21, 0;\nmov.b32 %r22, {row};\nmov.b32 %r23, {barrier};\n"
        "@%p1 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%r20], [%rd2, {%r21, %r22}], [%r23];"
    )


def copy_words(to: int) -> str:
    """The first warp copies 32 numbers."""
    return (
        f"cvt.u64.u32 %rd8, %r4;\nadd.s64 %rd9, %rd1, %rd8;\nadd.s32 %r41, %r4, {to};\n"
        "@%p2 cp.async.ca.shared.global [%r41], [%rd9], 4;\ncp.async.commit_group;"
    )


ARRIVE = "mov.b32 %r27, 0;\n@%p1 mbarrier.arrive.shared::cta.b64 _, [%r27];"
SPLIT = f"{init()}\n{BARRIER}\n@%p3 bra $Lsecond;"
SECOND = f"ret;\n$Lsecond:\n{wait(0, 'wait')}\n{load(512)}"
MAPPED = f"{init()}\n{tensor_map()}"
COPIED = f"{MAPPED}\n{expect(128)}\n{copy_row(128, 1)}\n{wait(0, 'first')}\n{load(128)}"
NEXT = f"{expect(128)}\n{copy_row(128, 2)}\n{wait(1, 'next')}\n{load(128)}"
WAIT_COPIES = "cp.async.wait_group 0;"
HAND_OVERS = {
    "a store before the arrival": ([SPLIT, store(512), ARRIVE, SECOND], None),
    "a store after the arrival": (
        [SPLIT, ARRIVE, store(512), SECOND], "comes to what warp 0 may be writing",
    ),
    "a store between arrivals, of which the first is waited for": (
        [SPLIT, ARRIVE, store(512), ARRIVE, ARRIVE, SECOND], "comes to what warp 0 may be writing",
    ),
    "copies of two turns": ([COPIED, BARRIER, NEXT], None),
    "a copy over what is being read": ([COPIED, NEXT], "may be (reading|writing)|all wait"),
    "a copy that nobody waits for": (
        [MAPPED, expect(128), copy_row(128, 1), "@%p3 bra $Lend;", load(128), "$Lend:"],
        "warp 0 comes to what tensor copies of barrier 0 may be writing",
    ),
    "a copy over a copy": (
        [MAPPED, expect(256), copy_row(128, 1), copy_row(128, 2), wait(0, "both")],
        "comes to what tensor copies of barrier 0 may be writing",
    ),
    "too few bytes expected": (
        [MAPPED, expect(128), copy_row(128, 1), copy_row(256, 2), wait(0, "one"), load(256)],
        "a phase ends with work in flight",
    ),
    "a barrier that goes too early": (
        [MAPPED, expect(128), copy_row(128, 1), invalidate(), BARRIER],
        "a barrier goes with work in flight",
    ),
    "a barrier made twice": ([COPIED, BARRIER, invalidate(), BARRIER, init(), BARRIER], None),
    "a barrier that may still be waited for": (
        [COPIED, invalidate()], "may be (reading|writing)|no barrier",
    ),
    "a tensor map that is not fenced in": (
        [init(), tensor_map(then=BARRIER), expect(128), copy_row(128, 1), wait(0, "first")],
        "a tensor map is used that was not fenced in",
    ),
    "a tensor map fenced in by who does not know of it": (
        [init(), tensor_map(then=f"@%p3 {FENCE_MAP}\n{BARRIER}"), expect(128), copy_row(128, 1)],
        "a tensor map is used that was not fenced in",
    ),
    "a tensor map used by who does not know that it is fenced in": (
        [init(), tensor_map(then=f"{BARRIER}\n@%p3 {FENCE_MAP}\n$Lafter:"), expect(128),
         copy_row(128, 1)],
        "a tensor map is used that was not fenced in",
    ),
    "words copied and waited for": ([copy_words(512), WAIT_COPIES, BARRIER, load(512)], None),
    "words copied, and no barrier": (
        [copy_words(512), WAIT_COPIES, load(512)],
        "copies of warp 0 may be writing|may be reading",
    ),
    "words copied, and waited for all but the last": (
        [copy_words(512), "cp.async.wait_group 1;", BARRIER, load(512)],
        "copies of warp 0 may be writing",
    ),
    "words copied, and no wait": (
        [copy_words(512), BARRIER, load(512)], "copies of warp 0 may be writing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(HAND_OVERS))
def test_what_is_handed_over(case: str) -> None:
    lines, refused = HAND_OVERS[case]
    text = kernel_of(*lines)
    for seed in range(20):
        numbers, memory = np.arange(1024, dtype=np.int32).view(np.uint8), Memory()
        memory.add(65536, numbers, 65536, 4096)
        if refused is None:
            launch(Launch(text, 4096, [65536], (1,)), memory, seed)
        else:
            with pytest.raises(KernelError, match=refused):
                launch(Launch(text, 4096, [65536], (1,)), memory, seed)


# --- tensor memory

# shared memory holds 2,048 ones in float16, then a barrier, then where tensor memory is; a warp's
# lanes are at %r60
ONES = (
    "shl.b32 %r50, %r1, 4;\nmov.b32 %r51, 1006648320;\n"
    "st.shared.v4.b32 [%r50], {%r51, %r51, %r51, %r51};\n"
    "st.shared.v4.b32 [%r50 + 2048], {%r51, %r51, %r51, %r51};"
)
ALLOCATE = (
    "mov.b32 %r52, 4112;\n@%p2 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r52], 32;"
    f"\n{BARRIER}\nld.shared.b32 %r53, [%r52];\nshl.b32 %r54, %r2, 21;\nadd.s32 %r60, %r53, %r54;"
)
DEALLOCATE = f"{BARRIER}\n@%p2 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r53, 32;"
# (128, 16) times (16, 16), sums in float32; pieces of eight rows are 256 bytes apart, of 16 bytes
# of a row 128
DESCRIPTION = 1 << 4 | 16 // 8 << 17 | 128 // 16 << 24
OPERAND = 128 >> 4 << 16 | 256 >> 4 << 32 | 1 << 46


def tensor_product(adds: int) -> str:
    return (
        f"mov.b64 %rd20, {OPERAND};\nmov.b32 %r55, {DESCRIPTION};\nmov.pred %p5, {adds};\n"
        "@%p1 tcgen05.mma.cta_group::1.kind::f16 [%r53], %rd20, %rd20, %r55, %p5;"
    )


COMMIT = (
    "mov.b32 %r56, 4096;\n@%p1 tcgen05.commit.cta_group::1.mbarrier::arrive::one"
    ".shared::cluster.b64 [%r56];"
)
PREPARED = f"{ONES}\n{init(4096)}\n{ALLOCATE}"
FENCE_STORES = f"fence.proxy.async.shared::cta;\n{BARRIER}"
TWICE = f"{tensor_product(0)}\n{tensor_product(-1)}"
WAIT_PRODUCTS = wait(0, "products", 4096)
LOAD = "tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r61}, [%r60 + 3];"
WAIT_LOAD = "tcgen05.wait::ld.sync.aligned;"
STORE = "tcgen05.st.sync.aligned.32x32b.x1.b32 [%r60 + 3], {%r51};"
WAIT_STORE = "tcgen05.wait::st.sync.aligned;"
END = (
    "mad.wide.u32 %rd5, %r1, 4, %rd1;\nst.global.b32 [%rd5], %r61;\n"
    f"mov.b32 %r62, 0;\nst.global.b32 [%rd5 + 512], %r62;\n{DEALLOCATE}"
)
TENSOR_MEMORY = {
    "products": ([FENCE_STORES, TWICE, COMMIT, WAIT_PRODUCTS, LOAD, WAIT_LOAD], None),
    "sums that were stored": (
        [STORE, WAIT_STORE, FENCE_STORES, tensor_product(-1), COMMIT, WAIT_PRODUCTS, LOAD,
         WAIT_LOAD],
        None,
    ),
    "no fence": (
        [BARRIER, TWICE, COMMIT, WAIT_PRODUCTS], "a product reads what was stored and not fenced",
    ),
    "no commit": ([FENCE_STORES, TWICE, WAIT_PRODUCTS], "all wait"),
    "no wait for products": (
        [FENCE_STORES, TWICE, COMMIT, LOAD, WAIT_LOAD],
        "products of warp 0 (may be writing|writes what warp . may be reading)",
    ),
    "no wait for products, and all is over": (
        [FENCE_STORES, TWICE, COMMIT], "comes to what products of warp 0 may be writing",
    ),
    "a store to what products read": (
        [FENCE_STORES, TWICE, COMMIT, "st.shared.b32 [%r50], %r1;"],
        "products of warp 0 (may be reading|comes to what warp . may be writing)",
    ),
    "no wait for stores": (
        [STORE, FENCE_STORES, TWICE, COMMIT, WAIT_PRODUCTS], "did not wait for tensor memory",
    ),
    "no wait for loads": (
        [FENCE_STORES, TWICE, COMMIT, WAIT_PRODUCTS, LOAD], "did not wait for tensor memory",
    ),
    "no barrier after stores": (
        [FENCE_STORES, STORE, WAIT_STORE, tensor_product(-1), COMMIT, WAIT_PRODUCTS],
        "may be (writing|reading)",
    ),
    "another warp's lanes": ([LOAD.replace("%r60", "%r53")], "comes to lane 0 of tensor memory"),
    "columns of others": ([LOAD.replace("+ 3", "+ 32")], "columns .* of tensor memory"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(TENSOR_MEMORY))
def test_tensor_memory(case: str) -> None:
    lines, refused = TENSOR_MEMORY[case]
    text = kernel_of(PREPARED, *lines, END, threads=128)
    for seed in range(20):
        numbers, memory = np.zeros(1024, np.uint8), Memory()
        memory.add(65536, numbers, 65536, 1024)
        kernel = Launch(text, 4128, [65536], (1,))
        if refused is None:
            launch(kernel, memory, seed)
            stored = np.uint32(0x3C003C00).view(np.float32)
            expected = np.float32(32) if case == "products" else 16 + stored
            assert (numbers.view(np.float32)[:128] == expected).all()
        else:
            with pytest.raises(KernelError, match=refused):
                launch(kernel, memory, seed)


def test_blocks_may_not_keep_tensor_maps_in_one_place() -> None:
    place = "mov.u32 %r50, %ctaid.x;\nmul.wide.u32 %rd5, %r50, 128;\nadd.s64 %rd6, %rd1, %rd5;"
    text = kernel_of(place, init(), tensor_map("%rd6"))
    memory = Memory()
    memory.add(65536, np.zeros(4096, np.uint8), 65536, 4096)
    launch(Launch(text, 4096, [65536], (1,)), memory, 0)
    memory = Memory()
    memory.add(65536, np.zeros(4096, np.uint8), 65536, 4096)
    with pytest.raises(KernelError, match="block 1 writes what another may be writing"):
        launch(Launch(text, 4096, [65536], (2,)), memory, 0)


@pytest.mark.parametrize(
    ("before", "refused"),
    [
        ("mov.u32 %r1, %tid.x;", None),
        ("ld.global.b32 {%r1}, [%rd1];", "ld.global.b32"),
        ("st.global.b32 [%rd1], {%r1};", "st.global.b32"),
        ("@%p1 bra $L__BB0_2;", "bra"),
    ],
)
def test_a_kernel_waits_for_the_one_ahead_before_all_else(before: str, refused: str | None) -> None:
    text = (
        ".entry kernel(\n.param .u64 kernel_param_0\n)\n.reqntid 32\n{\n"
        f"griddepcontrol.launch_dependents;\n{before}\ngriddepcontrol.wait;\n$L__BB0_2:\nret;\n}}\n"
    )
    if refused is None:
        Program(text)
        return
    with pytest.raises(ValueError, match=f"kernel: {refused} before the kernel ahead is done"):
        Program(text)


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
        "add.rz.f32x2 %rd1, %rd2, %rd3",
        "add.rn.f32.f64 %r1, %rd2, %r3",
        "tcgen05.alloc %r1",
        "tcgen05.ld.sync.aligned.16x64b.x1.b32 {%r1}, [%r2]",
        "tcgen05.ld.sync.aligned.32x32b.x2.b32 {%r1}, [%r2]",
        "tcgen05.mma.cta_group::2.kind::f16 [%r1], %rd1, %rd2, %r2, %p1",
    ],
)
def test_unknown_assembly_is_refused(unknown: str) -> None:
    text = ".entry kernel(\n.param .u64 kernel_param_0\n)\n.reqntid 32\n{{\n{};\nret;\n}}\n"
    Program(text.format("add.s32 %r1, %r2, %r3"))
    with pytest.raises(NotImplementedError, match="kernel: "):
        Program(text.format(unknown))
