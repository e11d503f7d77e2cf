"""Which accesses to memory a kernel orders: what is unordered shows whatever the order it ran in.

Within a block a warp knows of what others did from barriers and waits alone. Everyone who works is
an agent with a time of its own: each warp, its copies, its products, and each barrier for the
tensor copies that tell it when they are done. A clock holds, for each agent, up to which of its
times all it did is known.
"""

from __future__ import annotations

import numpy as np

__all__ = ["Clock", "KernelError", "Launched", "Order"]

Clock = np.ndarray
NOBODY, SEVERAL = -1, -2


class KernelError(Exception):
    """What would be undefined on a GPU, or never end."""


class Order:
    """The last accesses to each byte of a block's shared memory, and each cell of tensor memory."""

    def __init__(self, size: int, warps: int, barriers: int, trusts_copies: bool = False) -> None:
        self.warps = warps
        # what needs a fence before a product reads it is written by the first so many
        self._unfenced = warps if trusts_copies else 2 * warps
        self._names = [
            *(f"{what} {warp}" for what in ("warp", "copies of warp", "products of warp")
              for warp in range(warps)),
            *(f"tensor copies of barrier {barrier}" for barrier in range(barriers)),
        ]  # fmt: skip
        self._read = np.zeros((size, len(self._names)), np.int32)
        self._written = np.zeros(size, np.int32)
        self._writer = np.zeros(size, np.int16)
        self._barriers: dict[int, int] = {}

    def clock(self) -> Clock:
        """Of one who knows nothing.

        Its first half holds what is known, its second what of that products may read.
        """
        return np.zeros(2 * len(self._names), np.int32)

    def fence(self, clock: Clock) -> None:
        """Let products read what one with this clock knows, and whoever it tells."""
        known, fenced = np.split(clock, 2)
        np.maximum(fenced, known, out=fenced)

    def is_fenced(self, clock: Clock, at: np.ndarray) -> bool:
        """Whether products may read what warps and their copies wrote last."""
        writer = self._writer[at]
        fenced = self._written[at] <= clock[len(self._names) + writer]
        return bool((fenced | (writer >= self._unfenced)).all())

    def barrier(self, address: int) -> int:
        """The agent of a barrier's tensor copies."""
        agent = self._barriers.setdefault(address, 3 * self.warps + len(self._barriers))
        if agent == len(self._names):
            raise NotImplementedError("a kernel inits more barriers than its assembly has places")
        return agent

    def read(self, clock: Clock, at: np.ndarray, agent: int, time: int) -> None:
        """An agent reads at a time of its own what one with this clock told it to."""
        self._check_written(clock, at, agent)
        self._read[at, agent] = time

    def write(
        self, clock: Clock, at: np.ndarray, agent: int, time: int, same: np.ndarray | None = None
    ) -> None:
        """An agent writes; what is the same as a warp wrote changes nothing, in whatever order."""
        if same is not None:
            late = ~self.is_known(clock, at)
            same = late & same & (self._writer[at] < self.warps)
            # who writes something else must know of it, as of one who reads
            self._read[at[same], agent] = time
            at = at[~same]
        self._check_written(clock, at, agent)
        late = self._read[at] > clock[: len(self._names)]
        if late.any():
            *place, reader = np.argwhere(late)[0]
            raise KernelError(
                f"place {at[tuple(place)]}: {self._names[agent]} writes what "
                f"{self._names[reader]} may be reading"
            )
        self._written[at] = time
        self._writer[at] = agent

    def is_known(self, clock: Clock, at: np.ndarray) -> np.ndarray:
        """Whether one with this clock knows what was written last."""
        return np.asarray(self._written[at] <= clock[self._writer[at]])

    def _check_written(self, clock: Clock, at: np.ndarray, agent: int) -> None:
        late = ~self.is_known(clock, at)
        if late.any():
            first = at[late][0]
            raise KernelError(
                f"place {first}: {self._names[agent]} comes to what "
                f"{self._names[self._writer[first]]} may be writing"
            )


class Launched:
    """Which block of a launch read and wrote each byte of a tensor: blocks wait for no others."""

    def __init__(self, size: int) -> None:
        self.reader = np.full(size, NOBODY, np.int32)
        self.writer = np.full(size, NOBODY, np.int32)

    def part(self, first: int, size: int) -> Launched:
        """Of some of the bytes."""
        part = Launched(0)
        part.reader, part.writer = (one[first : first + size] for one in (self.reader, self.writer))
        return part

    def read(self, at: np.ndarray, block: int) -> None:
        self._check(self.writer[at], block, "reads what another may be writing")
        known = self.reader[at]
        self.reader[at] = np.where((known == NOBODY) | (known == block), block, SEVERAL)

    def write(self, at: np.ndarray, block: int) -> None:
        self._check(self.writer[at], block, "writes what another may be writing")
        self._check(self.reader[at], block, "writes what another may be reading")
        self.writer[at] = block

    def _check(self, others: np.ndarray, block: int, what: str) -> None:
        if ((others != NOBODY) & (others != block)).any():
            raise KernelError(f"block {block} {what}")
