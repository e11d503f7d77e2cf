"""Matrices laid out in advance for products on a CPU, by oneDNN or by MKL."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Matrix",
    "MklMatrix",
    "OneDnnMatrix",
    "WideMatrix",
    "fewest_rows",
    "in_mkl",
    "pack_weight",
    "widens",
]

# oneDNN lays a matrix out by the rows it expects; one layout serves a query and a batch alike
_ROWS_EXPECTED = 1024
# MKL shares the work among threads as suits this many rows: for some 100 each has columns of its
# own, and so works whatever rows come (seen with 2 to 16 threads); for 1,024 some have rows of
# their own, and idle when few come
_ROWS_SHARED = 128
# from so many rows on, the faster product makes up for widening the matrix first
_ROWS_WIDENED = 128
_CPUINFO = Path("/proc/cpuinfo")


class WideMatrix(NamedTuple):
    """An (O, I) matrix of bfloat16 numbers held in float32, for products of many rows."""

    weight_OI: Tensor

    def for_rows(self, rows: int) -> WideMatrix:
        """This matrix."""
        del rows
        return self

    def linear(self, x_TI: Tensor, bias_O: Tensor | None, *, gelu: bool) -> Tensor:
        """As `OneDnnMatrix.linear`: sums, bias and GELU in float32, rounded once to x's dtype."""
        bias_O = None if bias_O is None else bias_O.float()
        out_TO = F.linear(x_TI.float(), self.weight_OI, bias_O)
        return (torch.ops.aten.gelu_(out_TO) if gelu else out_TO).to(x_TI.dtype)


class OneDnnMatrix(NamedTuple):
    """An (O, I) matrix in float32 or bfloat16."""

    packed: Tensor

    @classmethod
    def pack(cls, weight_OI: Tensor) -> OneDnnMatrix:
        """Lay a matrix out in new memory."""
        rows = _ROWS_EXPECTED
        return cls(torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous(), rows))

    def unpack(self) -> Tensor:
        """Give the matrix back, exactly."""
        return self.packed.to_dense()

    def for_rows(self, rows: int) -> OneDnnMatrix | WideMatrix:
        """What multiplies so many rows fastest: this matrix, or a new one, itself in float32."""
        if widens(rows, self.packed.dtype):
            return WideMatrix(self.packed.to_dense(torch.float32))
        return self

    def linear(self, x_TI: Tensor, bias_O: Tensor | None, *, gelu: bool) -> Tensor:
        """As `reference.linear`, with bias and GELU in the product's last step."""
        # looked up here, since a torch without oneDNN has no such operator; the last "none" is the
        # GELU without an approximation, that is by erf
        out_TO: Tensor = torch.ops.mkldnn._linear_pointwise.default(
            x_TI.to(self.packed.dtype), self.packed, bias_O, "gelu" if gelu else "none", [], "none"
        )
        return out_TO.to(x_TI.dtype)


class MklMatrix(NamedTuple):
    """An (O, I) matrix in float32, all its numbers finite.

    Its memory is 8 to 12 MB longer than what MKL writes of it, and stays untouched where the
    allocator has it fresh from the system.
    """

    packed: Tensor
    # one number seen as (O, I), where torch's operator looks up the shape
    shape_OI: Tensor

    @classmethod
    def pack(cls, weight_OI: Tensor) -> MklMatrix:
        """Lay a matrix out in new memory."""
        packed = torch.ops.mkl._mkl_reorder_linear_weight(weight_OI.contiguous(), _ROWS_SHARED)
        return cls(packed, weight_OI.new_full((), torch.nan).expand(weight_OI.shape))

    def unpack(self) -> Tensor:
        """Give the matrix back, exactly but for the sign of zeros.

        Under `torch.set_flush_denormal(True)` subnormal numbers come back as zero.
        """
        # what MKL laid out only MKL can read: the product with the identity is the transpose
        identity_II = torch.eye(self.shape_OI.shape[1], dtype=torch.float32, device="cpu")
        return self.linear(identity_II, None, gelu=False).T

    def for_rows(self, rows: int) -> MklMatrix:
        """This matrix."""
        del rows
        return self

    def linear(self, x_TI: Tensor, bias_O: Tensor | None, *, gelu: bool) -> Tensor:
        """As `reference.linear`; torch would read beyond a wrong shape.

        Raises:
            ValueError: Shapes do not fit.
        """
        O, I = self.shape_OI.shape  # noqa: E741
        if x_TI.dim() != 2 or x_TI.shape[1] != I or (bias_O is not None and bias_O.shape != (O,)):
            bias = None if bias_O is None else tuple(bias_O.shape)
            raise ValueError(
                f"x is {tuple(x_TI.shape)} and the bias {bias}, "
                f"expected (T, {I}) and ({O},) or None"
            )
        # torch takes the packed matrix where the last argument, meant as the rows it was packed
        # for, is the rows it has; MKL takes any number
        out_TO: Tensor = torch.ops.mkl._mkl_linear(
            x_TI, self.packed, self.shape_OI, bias_O, len(x_TI)
        )
        return torch.ops.aten.gelu_(out_TO) if gelu else out_TO


Matrix = OneDnnMatrix | MklMatrix


def in_mkl(dtype: torch.dtype) -> bool:
    """Whether products of a dtype run in MKL: those in float32 on CPUs of Intel's.

    On two cores of Emerald Rapids, with AVX-512 and with AVX2, MKL takes 0.8 to 0.95 of oneDNN's
    time up to 256 rows and all of it beyond, and it compiles nothing for each number of rows. On
    CPUs of others oneDNN stays: on two cores of Zen 4 MKL takes 1.1 to 1.3 times as long from 512
    rows on, up to 5 times for few.
    """
    return dtype == torch.float32 and torch.backends.mkl.is_available() and _is_intel()


def widens(rows: int, dtype: torch.dtype) -> bool:
    """Whether a product of so many rows runs in float32 on a matrix held in bfloat16.

    So it does for many rows on Intel's CPUs without AMX, whose instructions for bfloat16 multiply
    no more numbers in a cycle than those for float32: on two cores of Emerald Rapids MKL's product
    of 512 rows takes 0.6 of the time, 0.75 with the widening; some 128 rows are even. For few rows
    reading half as much weighs more.
    """
    return (
        dtype == torch.bfloat16
        and rows >= _ROWS_WIDENED
        and in_mkl(torch.float32)
        and not _has_amx()
    )


def fewest_rows() -> int:
    """How many rows of an expert's to multiply at least, if need be with others.

    On two cores of Zen 4 oneDNN takes 1.1 to 1.7 times as long for one row or two as for six in
    float32, 1.1 to 1.6 times in bfloat16, and up to 1.2 times for three to five. AMD's other CPUs
    are taken to be alike; CPUs of others have not been measured.
    """
    return 6 if _is_amd() else 1


@cache
def _has_amx() -> bool:
    return torch.cpu._is_amx_tile_supported()


def _is_intel() -> bool:
    return "GenuineIntel" in _vendor()


def _is_amd() -> bool:
    return "AuthenticAMD" in _vendor()


@cache
def _vendor() -> str:
    """A text that names who made this CPU, where the system tells."""
    try:
        with _CPUINFO.open(encoding="utf-8", errors="replace") as lines:
            return next((line for line in lines if line.startswith("vendor_id")), "")
    except OSError:
        return platform.processor()


def pack_weight(weight_OI: Tensor) -> Matrix:
    """Lay an (O, I) matrix out in new memory, by the library that multiplies it faster here."""
    # of other numbers MKL could not give the matrix back
    if in_mkl(weight_OI.dtype) and weight_OI.sum().isfinite():
        return MklMatrix.pack(weight_OI)
    return OneDnnMatrix.pack(weight_OI)
