"""The operations for inference on a CPU, and the matrices packed for them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nomoe_kernels
from nomoe import NomicMoEModel, data
from nomoe.packable import Packable
from nomoe_kernels import cpu, matrices, reference
from nomoe_kernels.reference import MoEWeights, Norm
from tests.conftest import LIBRARIES, VENDORS

DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if cpu.supports(dtype)]
MAKERS = ["AuthenticAMD", *(VENDORS[library] for library in LIBRARIES)]
KINDS = [(maker, dtype) for maker in MAKERS for dtype in DTYPES]
# of the largest number of a product: some roundings of its operands' dtype
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 1e-2}

pytestmark = pytest.mark.skipif(not DTYPES, reason="torch has no oneDNN here")


@pytest.fixture(params=KINDS, ids=lambda kind: f"{kind[0] or 'unknown'}-{kind[1]}")
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """One with products at speed, in each library that has them and as on each maker's CPUs."""
    maker, dtype = request.param
    monkeypatch.setattr(matrices, "_vendor", lambda: maker)
    monkeypatch.setattr(matrices, "_has_amx", lambda: False)
    return dtype  # type: ignore[no-any-return]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def off(result: Tensor, exact: Tensor) -> float:
    """Largest difference relative to the largest number; infinite where it is not a number."""
    assert result.shape == exact.shape
    worst = (result.double() - exact).abs().max() / exact.abs().max()
    return float(worst.nan_to_num(torch.inf))


def packed(model: nn.Module) -> bool:
    found = {part.packed is not None for part in model.modules() if isinstance(part, Packable)}
    assert len(found) == 1
    return found.pop()


def embed(model: NomicMoEModel) -> Tensor:
    with torch.no_grad():
        return model.forward_packed(torch.arange(4, 34), [20, 10])[0]


@pytest.mark.parametrize("rows", [1, 5, 33, 130])
def test_linear(rows: int, dtype: torch.dtype) -> None:
    x_TI, weight_OI, bias_O = (
        normal(*shape, seed=seed, dtype=dtype)
        for seed, shape in enumerate(((rows, 96), (80, 96), (80,)))
    )
    packed = cpu.pack_weight(weight_OI)
    assert isinstance(packed, matrices.MklMatrix) == matrices.in_mkl(dtype)
    exact = F.linear(x_TI.double(), weight_OI.double(), bias_O.double())
    for gelu in (False, True):
        result = cpu.linear(x_TI, packed, bias_O, gelu=gelu)
        assert result.dtype == dtype
        assert off(result, F.gelu(exact) if gelu else exact) < BOUNDS[dtype]
    assert off(cpu.linear(x_TI, packed, None), exact - bias_O.double()) < BOUNDS[dtype]
    assert cpu.linear(x_TI[:0], packed, bias_O, gelu=True).shape == (0, 80)


@pytest.mark.skipif(
    "mkl" not in LIBRARIES or len(DTYPES) < 2, reason="torch has no MKL or no bfloat16 here"
)
@pytest.mark.parametrize(
    ("rows", "library", "amx", "expected"),
    [
        (128, "mkl", False, True),
        (127, "mkl", False, False),
        (128, "onednn", False, False),
        (128, "mkl", True, False),
    ],
)
def test_many_rows_in_bfloat16_are_multiplied_in_float32(
    rows: int, library: str, amx: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrices, "_vendor", lambda: VENDORS[library])
    monkeypatch.setattr(matrices, "_has_amx", lambda: amx)
    x_TI, weight_OI, bias_O = (
        normal(*shape, seed=seed, dtype=torch.bfloat16)
        for seed, shape in enumerate(((rows, 96), (80, 96), (80,)))
    )
    packed = cpu.pack_weight(weight_OI)
    found = packed.for_rows(rows)
    if expected:
        assert isinstance(found, matrices.WideMatrix)
        assert torch.equal(found.weight_OI, weight_OI.float())
    else:
        assert found is packed
    exact = F.gelu(F.linear(x_TI.double(), weight_OI.double(), bias_O.double()))
    result = cpu.linear(x_TI, packed, bias_O, gelu=True)
    # rounded once, at the end: by half a unit in the last of eight bits
    assert ((result - exact).abs() <= exact.abs() * 2**-8 * 1.01 + 1e-5).all()
    many = 143 if library == "mkl" and not amx else 144
    assert cpu.rows_wanted(143, torch.bfloat16, 16) == many


@pytest.mark.usefixtures("library")
def test_the_gelu_is_the_exact_one() -> None:
    x_TI = torch.linspace(-6, 6, 4096)[:, None].expand(-1, 16).contiguous()
    result = cpu.linear(x_TI, cpu.pack_weight(torch.eye(16)), None, gelu=True)
    exact = F.gelu(x_TI.double())
    assert (result - exact).abs().max() < 1e-6
    tanh = F.gelu(x_TI.double(), approximate="tanh")
    assert (tanh - exact).abs().max() > 1e-4, "the test could not tell"


def test_packing_loses_nothing(dtype: torch.dtype) -> None:
    weight_OI = normal(80, 96, dtype=dtype)
    # a subnormal number, which arithmetic may take for zero, and the largest
    weight_OI[0, :2] = torch.tensor([2.0**-133, torch.finfo(dtype).max])
    for matrix in (weight_OI, weight_OI.T):
        assert torch.equal(cpu.pack_weight(matrix).unpack(), matrix)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("number", [torch.inf, torch.nan])
def test_packing_loses_no_infinity(number: float) -> None:
    weight_OI = normal(80, 96)
    weight_OI[3, 5] = number
    packed = cpu.pack_weight(weight_OI)
    assert isinstance(packed, matrices.OneDnnMatrix)
    torch.testing.assert_close(packed.unpack(), weight_OI, atol=0, rtol=0, equal_nan=True)
    good = torch.arange(80) != 3
    assert cpu.linear(normal(4, 96), packed, None)[:, good].isfinite().all()


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_unpacking_under_another_default(default: torch.dtype) -> None:
    weight_OI = normal(80, 96)
    packed = cpu.pack_weight(weight_OI)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        with torch.device("meta"):
            back = packed.unpack()
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(back, weight_OI)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    ("x_shape", "bias_shape"), [((4, 48), (80,)), ((4, 200), (80,)), ((4, 96), (3,))]
)
def test_shapes_that_do_not_fit_are_refused(
    x_shape: tuple[int, ...], bias_shape: tuple[int, ...]
) -> None:
    packed = cpu.pack_weight(normal(80, 96))
    with pytest.raises((ValueError, RuntimeError)):
        cpu.linear(normal(*x_shape), packed, normal(*bias_shape))


@pytest.mark.parametrize(
    ("cpuinfo", "intel", "amd"),
    [
        ("processor\t: 0\nvendor_id\t: GenuineIntel\nmodel\t: 207\n", True, False),
        ("processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel\t: 17\n", False, True),
        ("processor\t: 0\nBogoMIPS\t: 243.75\nCPU implementer\t: 0x41\n", False, False),
        (None, True, False),
    ],
    ids=["Intel", "AMD", "ARM", "Windows"],
)
def test_a_cpu_is_told_by_its_maker(
    cpuinfo: str | None,
    intel: bool,
    amd: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    if cpuinfo is not None:
        (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(matrices, "_CPUINFO", tmp_path / "cpuinfo")
    name = "Intel64 Family 6 Model 85 Stepping 7, GenuineIntel"
    monkeypatch.setattr(matrices.platform, "processor", lambda: name)
    monkeypatch.setattr(matrices, "_vendor", matrices._vendor.__wrapped__)
    assert (matrices._is_intel(), matrices._is_amd()) == (intel, amd)


@pytest.mark.skipif("mkl" not in LIBRARIES, reason="torch has no MKL here")
def test_mkl_takes_what_was_packed_for_other_threads(threads: Callable[[int], None]) -> None:
    weight_OI, x_TI = normal(192, 96), normal(33, 96, seed=1)
    exact = F.linear(x_TI.double(), weight_OI.double())
    for packing in (1, 2, 5):
        threads(packing)
        packed = matrices.MklMatrix.pack(weight_OI)
        for running in (1, 2, 5):
            threads(running)
            assert off(cpu.linear(x_TI, packed, None), exact) < BOUNDS[torch.float32]
            assert torch.equal(packed.unpack(), weight_OI)


@pytest.mark.parametrize("lengths", [[], [1], [7, 7, 7], [40, 40, 3, 1, 1], [5, 9, 5]])
def test_attention(lengths: list[int], dtype: torch.dtype) -> None:
    T = sum(lengths)
    qkv_T3NH = normal(T, 3, 6, 16, dtype=dtype)
    positions_T = torch.tensor([*chain.from_iterable(map(range, lengths))], dtype=torch.int64)
    packings = [
        module.pack(lengths, positions_T, 40, 16, 1e4, dtype) for module in (cpu, reference)
    ]
    exact = reference.attention(qkv_T3NH.double(), packings[1])
    result = cpu.attention(qkv_T3NH.clone(), packings[0])
    assert result.dtype == dtype
    if T:
        assert off(result, exact) < BOUNDS[dtype]
    else:
        assert result.shape == (0, 96)


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "normalize"),
    # of the third, two experts have more rows than oneDNN is shown exactly, and one has none
    [(37, 8, 2, False), (1, 4, 3, True), (700, 3, 2, False), (0, 8, 1, False)],
)
def test_moe_block(
    tokens: int, experts: int, top_k: int, normalize: bool, dtype: torch.dtype
) -> None:
    D, ffn_width = 96, 64
    x_TD, y_TD = (normal(tokens, D, seed=seed, dtype=dtype) for seed in (1, 2))
    x_TD[:, 0] = 4
    norms = [Norm(*normal(2, D, seed=seed, dtype=dtype).unbind(), 1e-5) for seed in (3, 4)]
    norms[0].weight_D[0] = 1
    router_ED, bias_D = normal(experts, D, seed=5, dtype=dtype) / 10, normal(D, seed=6, dtype=dtype)
    # an expert that nobody asks for
    router_ED[1, 0] = -9
    w1_EFD, w2_EFD = (normal(experts, ffn_width, D, seed=seed, dtype=dtype) / 8 for seed in (7, 8))
    rest = (bias_D, top_k, normalize)
    plain = MoEWeights(router_ED, w1_EFD.transpose(1, 2), w2_EFD, *rest)
    packed = MoEWeights(
        router_ED,
        [cpu.pack_weight(one) for one in w1_EFD],
        [cpu.pack_weight(one.T) for one in w2_EFD],
        *rest,
    )

    exact_weights = MoEWeights(*(one.double() for one in plain[:4]), *rest[1:])
    exact_norms = [Norm(one.weight_D.double(), one.bias_D.double(), one.eps) for one in norms]
    exact_TD = reference.moe_block(
        x_TD.double(), y_TD.double(), exact_norms[0], exact_weights, exact_norms[1]
    )[0]
    expected = reference.moe_block(x_TD, y_TD, norms[0], plain, norms[1])
    out_TD, weights_TK, experts_TK = cpu.moe_block(x_TD, y_TD.clone(), norms[0], packed, norms[1])
    assert out_TD.dtype == dtype
    assert out_TD.shape == (tokens, D)
    assert torch.equal(experts_TK, expected[2])
    torch.testing.assert_close(weights_TK, expected[1], atol=1e-5, rtol=0)
    if tokens:
        assert not (experts_TK == 1).any()
        assert off(out_TD, exact_TD) < max(1.2 * off(expected[0], exact_TD), BOUNDS[dtype])


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Set torch's number of threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_experts_show_onednn_few_numbers_of_rows(
    shown: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It compiles a product for each."""
    monkeypatch.setattr(matrices, "_vendor", lambda: "")
    D, every = 32, set()
    norm = Norm(torch.ones(D), torch.zeros(D), 1e-5)
    matrix = cpu.pack_weight(torch.eye(D))
    moe = MoEWeights(torch.zeros(1, D), [matrix], [matrix], torch.zeros(D), 1, False)
    for tokens in range(1, 1025):
        x_TD = torch.zeros(tokens, D)
        shown.clear()
        assert len(cpu.moe_block(x_TD, x_TD.clone(), norm, moe, norm)[0]) == tokens
        assert shown[::2] == shown[1::2]
        assert tokens <= sum(shown[::2]) <= tokens * 17 / 16
        every.update(shown)
    # all up to 32, and 16 in each octave up to 512
    assert len(every) == 32 + 4 * 16


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize(("vendor", "fewest"), [("", 1), ("GenuineIntel", 1), ("AuthenticAMD", 6)])
def test_an_expert_multiplies_six_rows_where_those_are_faster(
    vendor: str, fewest: int, tokens: int, shown: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last one too, after whose rows none are left."""
    monkeypatch.setattr(matrices, "_vendor", lambda: vendor)
    D, dtype = 32, DTYPES[-1]
    eye_DD, x_TD = torch.eye(D, dtype=dtype), normal(tokens, D, dtype=dtype)
    norm = Norm(torch.ones(D, dtype=dtype), torch.zeros(D, dtype=dtype), 1e-5)
    packed = [cpu.pack_weight(eye_DD)] * 2
    moe = MoEWeights(eye_DD[:2], packed, packed, eye_DD[0], 1, False)
    eyes_EDD = torch.eye(D).double().expand(2, D, D)
    exact_norm = Norm(norm.weight_D.double(), norm.bias_D.double(), norm.eps)
    exact_moe = MoEWeights(eyes_EDD[0, :2], eyes_EDD, eyes_EDD, eyes_EDD[0, 0], 1, False)
    # one token is the first expert's and all others the second's, or the other way round
    for one, others in ((0, 1), (1, 0)):
        x_TD[:, :2] = 9 * eye_DD[others, :2]
        x_TD[0, :2] = 9 * eye_DD[one, :2]
        y_TD = torch.zeros_like(x_TD)
        exact_TD = reference.moe_block(x_TD.double(), y_TD, exact_norm, exact_moe, exact_norm)[0]
        shown.clear()
        found_TD = cpu.moe_block(x_TD, y_TD, norm, moe, norm)[0]
        rows = {one: fewest, others: tokens - 1}
        assert shown[::2] == shown[1::2] == [rows[expert] for expert in (0, 1) if rows[expert]]
        assert off(found_TD, exact_TD) < BOUNDS[dtype]


@pytest.mark.skipif("mkl" not in LIBRARIES, reason="torch has no MKL here")
def test_mkl_multiplies_no_rows_in_vain(shown: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrices, "_vendor", lambda: VENDORS["mkl"])
    model = NomicMoEModel.from_pretrained(data.TINY, device="cpu")
    with torch.no_grad():
        model.forward_packed(torch.arange(129), [100, 29])
    dense = [rows for rows in shown if rows == 129]
    layers, moe = model.config.n_layer, len(model.config.moe_layers)
    assert len(dense) == 2 * layers + 2 * (layers - moe)
    # both products of each expert
    assert sum(shown) - sum(dense) == moe * 2 * 2 * 129


def test_a_torch_without_onednn_imports_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for library in (torch.backends.mkldnn, torch.backends.mkl):
        monkeypatch.setattr(library, "is_available", lambda: False)
    for name in ("mkldnn", "mkl"):
        monkeypatch.setattr(torch.ops, name, object())
    with pytest.MonkeyPatch.context() as patch:
        # imported as for the first time, and gone again
        patch.setattr(nomoe_kernels, "matrices", matrices)
        patch.delitem(sys.modules, "nomoe_kernels.matrices")
        importlib.import_module("nomoe_kernels.matrices")
    reloaded = importlib.reload(cpu)
    assert not reloaded.supports(torch.float32)
    model = NomicMoEModel.from_pretrained(data.TINY, device="cpu")
    assert embed(model).isfinite().all()
    assert not packed(model)
