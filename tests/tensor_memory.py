"""Tensor memory, where products of compute capability 10.0 keep their sums: of one block.

It has 128 lanes of 512 columns of 32 bits. Each warp comes to a quarter of the lanes, 32 numbered
as its threads are; a product of 128 rows has one in each lane, one of 64 rows sixteen in a quarter.
Sources: NVIDIA's PTX ISA 8.7, sections on tcgen05 (data movement shapes, data path layouts F and D,
instruction descriptor).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tests.order import KernelError
from tests.ptx import LANES, U32

__all__ = ["Description", "TensorMemory"]

COLUMNS = 512


class Description(NamedTuple):
    """A product as its instruction descriptor says: (rows, inner) times (width, inner) transposed.

    Attributes:
        kind: Type of the factors.
        rows: Of the first.
        width: Rows of the second.
        inner: Columns of both.
        transposed: Whether columns of each lie together.
    """

    kind: str
    rows: int
    width: int
    inner: int
    transposed: tuple[bool, bool]

    @classmethod
    def read(cls, bits: int, kind: str) -> Description:
        kinds = {"f16": {0: "f16", 1: "bf16"}, "tf32": {2: "tf32"}}[kind]
        of_a, of_b = bits >> 7 & 7, bits >> 10 & 7
        # sums in float32, no sparsity, nothing negated or shifted
        rows, width = (bits >> 24 & 31) * 16, (bits >> 17 & 63) * 8
        is_plain = bits & 0x3F == 1 << 4 and not bits >> 13 & 3 and not bits >> 29
        if not is_plain or of_a != of_b or of_a not in kinds or rows not in (64, 128) or not width:
            raise NotImplementedError(f"products described as {bits:#x}")
        transposed = bool(bits >> 15 & 1), bool(bits >> 16 & 1)
        return cls(kinds[of_a], rows, width, 8 if kind == "tf32" else 16, transposed)


class TensorMemory:
    """Its cells, by lane and then column; what nothing wrote is NaN."""

    size = 128 * COLUMNS

    def __init__(self) -> None:
        self.cells = np.full(self.size, 0xFFFFFFFF, U32)
        self._first = self.count = 0

    def allocate(self, first: int, count: int) -> None:
        """Give a kernel so many columns."""
        if self.count or count & (count - 1) or not 32 <= count <= COLUMNS:
            raise NotImplementedError(f"{count} columns of tensor memory beside {self.count}")
        self._first, self.count = first, count

    def deallocate(self) -> np.ndarray:
        """Take them back; where they were."""
        columns = np.arange(self._first, self._first + self.count)
        self.count = 0
        return (np.arange(128)[:, None] * COLUMNS + columns).reshape(-1)

    def of_warp(self, warp: int, address: int, count: int, split: int | None) -> np.ndarray:
        """Where each thread of a warp has a number of columns, (32, count).

        Of shape 32x32b, or with a split 16x32bx2, whose second 16 threads have the lanes of the
        first, so many columns further on.
        """
        lane, column = divmod(address, 1 << 16)
        quarter = 32 * (warp % 4)
        if lane not in ((quarter,) if split is None else (quarter, quarter + 16)):
            raise KernelError(f"warp {warp} comes to lane {lane} of tensor memory")
        if split is None:
            return self._at(lane + LANES[:, None], column + np.arange(count))
        further = split * (LANES[:, None] // 16)
        return self._at(lane + LANES[:, None] % 16, column + further + np.arange(count))

    def of_product(self, address: int, rows: int, count: int) -> np.ndarray:
        """Where a product's matrix of so many columns of 32 bits is, (rows, count)."""
        lane, column = divmod(address, 1 << 16)
        if lane not in ((0,) if rows == 128 else (0, 16)):
            raise KernelError(f"a product comes to lane {lane} of tensor memory")
        row = np.arange(rows)[:, None]
        lanes = row if rows == 128 else row // 16 * 32 + row % 16
        return self._at(lane + lanes, column + np.arange(count))

    def _at(self, lanes: np.ndarray, columns: np.ndarray) -> np.ndarray:
        if columns.min() < self._first or columns.max() >= self._first + self.count:
            raise KernelError(f"columns {columns.min()} to {columns.max()} of tensor memory")
        return lanes * COLUMNS + columns
