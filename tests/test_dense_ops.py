"""Products with one matrix in the project's own kernels, against float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import interpreter_builder

from nomoe_kernels import configs, fused, launch, reference
from nomoe_kernels.configs import Tile
from tests.oracle import most_error, rms_of
from tests.test_fused_ops import BOUNDS, CUDA, DEVICE, DTYPES, poisoned

__all__ = ["poisoned"]
pytestmark = [pytest.mark.gpu] if CUDA else []

TILES = {
    "pointer": Tile("pointer", 32, 32, 32, 4, 2),
    "tma": Tile("tma", 64 if CUDA else 16, 64 if CUDA else 32, 32, 4, 2),
    "small": Tile("small", 16, 32, 32, 4, 2),
}
if CUDA:
    TILES["specialized"] = Tile("specialized", 128, 128, 32, 4, 3)


def tiles_of(dtype: torch.dtype) -> dict[str, Tile]:
    return {
        kernel: tile
        for kernel, tile in TILES.items()
        if configs.supports(tile, 1, 96, dtype.itemsize)
    }


TILES_AND_DTYPES = [(kernel, dtype) for dtype in DTYPES for kernel in tiles_of(dtype)]


def draw(
    rows: int, inner: int, outer: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Products of unit variance, and a bias as large."""
    generator = torch.Generator().manual_seed(seed)
    x_TI, weight_OI, bias_O = (
        torch.randn(*shape, generator=generator)
        for shape in ((rows, inner), (outer, inner), (outer,))
    )
    weight_OI /= math.sqrt(inner)
    return tuple(one.to(DEVICE, dtype) for one in (x_TI, weight_OI, bias_O))  # type: ignore[return-value]


def exact_linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, gelu: bool) -> Tensor:
    out_TO = x_TI.double() @ weight_OI.double().T
    if bias_O is not None:
        out_TO = out_TO + bias_O.double()
    return 0.5 * out_TO * (1 + torch.erf(out_TO / math.sqrt(2))) if gelu else out_TO


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("kernel", "dtype"), TILES_AND_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "inner", "outer", "bias", "gelu"),
    [
        (17, 96, 80, True, True),
        (17, 96, 80, True, False),
        (17, 96, 80, False, True),
        (1, 96, 96, True, True),
        # widths that no block divides
        (37, 80, 48, True, True),
        (0, 96, 96, True, True),
    ],
)
def test_linear(
    rows: int, inner: int, outer: int, bias: bool, gelu: bool, kernel: str, dtype: torch.dtype
) -> None:
    if kernel in ("tma", "specialized") and inner % 32:
        pytest.skip("this kernel takes widths that its blocks divide")
    x_TI, weight_OI, bias_O = draw(rows, inner, outer, dtype)
    given = x_TI, weight_OI, bias_O if bias else None
    out_TO = fused.linear(*given, gelu=gelu, tile=TILES[kernel])
    assert out_TO.dtype == dtype
    assert out_TO.shape == (rows, outer)
    if rows:
        exact_TO = exact_linear(*given, gelu)
        assert (out_TO - exact_TO).abs().max() / exact_TO.abs().max() < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_that_of_plain_torch(dtype: torch.dtype) -> None:
    x_TI, weight_OI, bias_O = draw(37, 768, 96, dtype)
    exact_TO = exact_linear(x_TI, weight_OI, bias_O, True)
    plain_TO = reference.linear(x_TI, weight_OI, bias_O, gelu=True)
    rms = {
        kernel: rms_of(fused.linear(x_TI, weight_OI, bias_O, gelu=True, tile=tile) - exact_TO)
        for kernel, tile in tiles_of(dtype).items()
    }
    # in 16 bits one rounding where torch has two
    most = (1.5 if dtype == torch.float32 else 0.95) * rms_of(plain_TO - exact_TO)
    if CUDA and dtype == torch.float32:
        most = most_error(plain_TO, exact_TO, 768)
    assert all(one <= most for one in rms.values()), (rms, most)


@pytest.mark.skipif(CUDA, reason="turns the interpreter's own grid around")
@pytest.mark.parametrize("kernel", list(TILES))
def test_programs_may_run_in_any_order(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = draw(37, 64, 96, torch.float32)
    expected = fused.linear(*given, gelu=True, tile=TILES[kernel])
    device = configs.device_of(DEVICE)
    set_place = interpreter_builder.set_grid_idx

    def set_place_from_the_end(*place: int) -> None:
        last = (size - 1 for size in interpreter_builder.grid_dim)
        set_place(*(end - at for end, at in zip(last, place, strict=True)))

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", set_place_from_the_end)
    for multiprocessors in (1, 3, 1000):
        many = device._replace(multiprocessors=multiprocessors)
        monkeypatch.setattr(launch, "device", lambda _, many=many: many)
        assert torch.equal(fused.linear(*given, gelu=True, tile=TILES[kernel]), expected)


@pytest.mark.parametrize("kernel", list(TILES))
def test_a_bad_row_stays_alone(kernel: str) -> None:
    x_TI, *weights = draw(24, 96, 64, torch.float16)
    clean = fused.linear(x_TI, *weights, gelu=True, tile=TILES[kernel])
    x_TI[3], x_TI[23, 5] = math.nan, math.inf
    out_TO = fused.linear(x_TI, *weights, gelu=True, tile=TILES[kernel])
    good = [t for t in range(24) if t not in (3, 23)]
    assert torch.equal(out_TO[good], clean[good])
    assert out_TO[3].isnan().all()


def test_the_library_computes_what_the_formula_leaves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    given = draw(9, 96, 64, torch.float16)
    plain, own = reference.linear(*given, gelu=True), fused.linear(*given, gelu=True)
    assert torch.equal(fused.linear(*given, gelu=True, tile="library"), plain)
    assert not torch.equal(own, plain), "rounded once and twice"
    assert torch.equal(fused.linear(*given), reference.linear(*given)), "no GELU: the library's"
    monkeypatch.setattr(configs, "dense", lambda device, shape: "library")
    assert torch.equal(fused.linear(*given, gelu=True), plain)


@pytest.mark.parametrize("gelu", [False, True])
def test_under_autocast_the_library_multiplies(gelu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the rows; and it leaves 16 bits beside weights in float32, which no kernel takes."""
    x_TI, weight_OI, bias_O = draw(9, 96, 64, torch.float32)
    monkeypatch.setattr(configs, "dense", lambda device, shape: TILES["small"])
    with torch.autocast(DEVICE.type, torch.float16):
        for one in (x_TI, x_TI.half()):
            out_TO = fused.linear(one, weight_OI, bias_O, gelu=gelu)
            assert torch.equal(out_TO, reference.linear(one, weight_OI, bias_O, gelu=gelu))
        halves = [one.half() for one in (x_TI, weight_OI, bias_O)]
        own_TO = fused.linear(*halves, gelu=gelu, tile=TILES["small"])
        assert torch.equal(fused.linear(*halves, gelu=gelu), own_TO), "nothing to cast"
        with pytest.raises(ValueError, match=r"weight_OI has dtype torch\.float32"):
            fused.linear(x_TI.half(), weight_OI, bias_O, gelu=gelu, tile=TILES["small"])
    with pytest.raises(ValueError, match=r"weight_OI has dtype torch\.float32"):
        fused.linear(x_TI.half(), weight_OI, bias_O, gelu=gelu)


def test_no_gradient() -> None:
    x_TI, weight_OI, bias_O = draw(3, 32, 32, torch.float32)
    for one in (x_TI, weight_OI, bias_O):
        out_TO = fused.linear(x_TI, weight_OI, bias_O.requires_grad_(), gelu=True)
        with pytest.raises(RuntimeError, match="no backward pass"):
            out_TO.sum().backward()
        one.requires_grad_(False)


@pytest.mark.parametrize(
    ("message", "changed"),
    [
        (r"x_TI is \(96,\)", {"x_TI": lambda x: x[0]}),
        ("x_TI has dtype torch.float64", {"x_TI": lambda x: x.double()}),
        ("weight_OI has dtype torch.float32, expected torch.float16", {"x_TI": lambda x: x.half()}),
        ("x_TI has strides", {"x_TI": lambda x: x.T.contiguous().T}),
        ("x_TI is 90 wide", {"x_TI": lambda x: x[:, :90].contiguous()}),
        (r"weight_OI is \(64, 96\)", {"x_TI": lambda x: x[:, :80].contiguous()}),
        ("weight_OI has strides", {"weight_OI": lambda w: w.T.contiguous().T}),
        ("weight_OI makes 50 columns", {"weight_OI": lambda w: w[:50]}),
        (r"bias_O is \(63,\)", {"bias_O": lambda b: b[1:]}),
        ("bias_O has dtype torch.float16", {"bias_O": lambda b: b.half()}),
    ],
)
def test_bad_input_is_refused(
    message: str, changed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "linear", lambda *_, **__: pytest.fail("launched unchecked"))
    given = dict(zip(("x_TI", "weight_OI", "bias_O"), draw(4, 96, 64, torch.float32), strict=True))
    for name, make in changed.items():
        given[name] = make(given[name])
    with pytest.raises(ValueError, match=message):
        fused.linear(**given, gelu=True, tile=TILES["pointer"])


def test_tiles_that_do_not_fit_are_refused() -> None:
    given = draw(4, 48, 64, torch.float32)
    with pytest.raises(ValueError, match="cannot cut a product of 1 experts and inner width 48"):
        fused.linear(*given, tile=TILES["tma"])
    with pytest.raises(ValueError, match="splits a product whose parts nobody sums"):
        fused.linear(*given, tile=TILES["small"]._replace(splits=2))
