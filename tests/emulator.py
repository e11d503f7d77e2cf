"""Runs a compiled kernel without a GPU: its PTX, block by block, on the memory of tensors.

What hardware leaves open is drawn at random: which warp goes on, and when asynchronous work is done
(copies, tensor copies and products of warp groups, each some time between its start and the wait
for it). So a barrier, a wait or a phase that is missing often shows in the result, or as a
deadlock; not always. Shared memory starts as NaN. Loads and stores are checked (bounds, alignment),
and that a barrier was made.

Not modelled: rounding within a tensor core (sums here are float32), approximations, fences but for
those between a store and a product that reads it, limits on registers and on tensor maps, copies of
one group out of their order, and what several blocks would do at once.
Sources: NVIDIA's PTX ISA 8.7; for operands in shared memory CUTLASS's mma_sm90_desc.hpp.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from tests.ptx import (
    COLUMN,
    F32,
    HALVES,
    LANES,
    ROW,
    U8,
    U16,
    U32,
    Program,
    fragment,
    numbers_of,
    octets,
    pair,
)

__all__ = ["KernelError", "Memory", "launch"]

Work = Callable[[], None]
# bytes of a row that a layout's bits 4 to 6 are exchanged in, by the mode of a descriptor of
# operands and of a tensor map
SWIZZLED = {1: 128, 2: 64, 3: 32}
SWIZZLED_MAP = {3: 128, 2: 64, 1: 32}
# bytes of an element by a tensor map's type
ELEMENT = {1: 2, 6: 2, 7: 4, 10: 2}
# bytes of a barrier and of a tensor map
BARRIER, MAP = 8, 128
NOBODY = -1
# turns in a row that warps wait in vain before a tensor copy is no longer put off, and before a
# kernel is given up that has none in flight
IMPATIENCE, PATIENCE = 20, 4000


class KernelError(Exception):
    """What would be undefined on a GPU, or never end."""


class Memory:
    """The bytes of tensors, at the addresses they have."""

    def __init__(self) -> None:
        self._parts: list[tuple[int, np.ndarray]] = []

    def add(self, address: int, octets: np.ndarray) -> None:
        self._parts.append((address, octets))

    def place(self, addresses: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """The tensor that holds all these accesses, and where in it they are."""
        first, last = int(addresses.min()), int(addresses.max()) + size
        for start, part in self._parts:
            if start <= first and last <= start + len(part):
                return part, addresses - start
        known = [(start, start + len(part)) for start, part in self._parts]
        raise KernelError(f"{size} bytes at {first} to {last} are in no tensor of {known}")

    def load(self, addresses: np.ndarray, size: int, threads: np.ndarray) -> np.ndarray:
        loaded = np.zeros((len(addresses), size), U8)
        if threads.any():
            _check_aligned(addresses[threads], size)
            part, at = self.place(addresses[threads], size)
            loaded[threads] = part[at[:, None] + np.arange(size)]
        return loaded

    def store(self, addresses: np.ndarray, values: np.ndarray, threads: np.ndarray) -> None:
        if threads.any():
            size = values.shape[1]
            _check_aligned(addresses[threads], size)
            part, at = self.place(addresses[threads], size)
            part[at[:, None] + np.arange(size)] = values[threads]


def _check_aligned(addresses: np.ndarray, size: int) -> None:
    if (addresses % min(size, 16)).any():
        raise KernelError(f"{size} bytes at {addresses.tolist()} are not aligned")


class Pending:
    """Asynchronous work of one warp, waited for in groups, oldest first."""

    def __init__(self, lateness: float, chance: random.Random) -> None:
        self._lateness, self._chance = lateness, chance
        self._group: list[Work] = []
        self._groups: deque[list[Work]] = deque()

    def start(self, work: Work) -> None:
        self._group.append(work)
        if self._chance.random() >= self._lateness:
            # what was started earlier is done earlier
            for group in (*self._groups, self._group):
                _do(group)

    def commit(self) -> None:
        self._groups.append(self._group)
        self._group = []

    def wait(self, groups: int) -> None:
        """Until at most so many groups are in flight."""
        while len(self._groups) > groups:
            _do(self._groups.popleft())


def _do(group: list[Work]) -> None:
    for work in group:
        work()
    group.clear()


class Warp:
    """32 threads, one after the other instruction."""

    def __init__(self, block: Block, number: int, special: dict[str, Any]) -> None:
        self.block, self.number = block, number
        self.special = {**special, "%tid.x": (LANES + 32 * number).astype(U32)}
        self.registers = block.program.registers()
        self.active = np.ones(32, bool)
        self.at: int = 0
        self.is_waiting = False
        self.copies = Pending(block.lateness("copies"), block.chance)
        self.products = Pending(block.lateness("products"), block.chance)

    def branch(self, taken: np.ndarray, target: int, following: int) -> int:
        """The next run; where threads part, both ways are gone to where they meet."""
        taken = taken & self.active
        if not taken.any():
            return following
        if (taken == self.active).all():
            return target
        program, whole, before = self.block.program, self.active, self.registers
        meeting = program.meeting_point(self.at)
        parts = (taken, whole & ~taken)
        after = []
        for part, at in zip(parts, (target, following), strict=True):
            self.active, self.at, self.registers = part, at, list(before)
            while self.at != meeting:
                step = program.code[self.at](self)
                if not isinstance(step, int) or step < 0:
                    raise KernelError(f"threads of warp {self.number} part and do not meet: {step}")
                self.at = step
            after.append(self.registers)
        self.active = whole
        self.registers = [
            a if a is b else np.where(parts[0], a, b) for a, b in zip(*after, strict=True)
        ]
        return meeting


class Barrier:
    """An mbarrier: a phase ends when all have arrived, and all bytes that they said to expect."""

    def __init__(self, count: int) -> None:
        self.count = self.left = count
        self.bytes = self.phase = 0

    def arrive(self, amount: int, expected: int) -> None:
        if amount > self.left:
            raise KernelError(f"{amount} arrive at a barrier that waits for {self.left}")
        self.left -= amount
        self.bytes += expected
        if not self.left and not self.bytes:
            self.left = self.count
            self.phase ^= 1


class Block:
    """A block of threads with its shared memory."""

    def __init__(
        self,
        program: Program,
        memory: Memory,
        parameters: dict[str, int],
        place: Sequence[int],
        grid: Sequence[int],
        shared: int,
        seed: str,
    ) -> None:
        self.program, self.memory, self.parameters = program, memory, parameters
        self.chance = random.Random(seed)
        self._lateness: dict[str, float] = {}
        self._size = shared
        self.shared = np.full(shared + -shared % 4, 0xFF, U8)
        # the warp that stored a byte which products of warp groups may not read before its fence
        self._storing = np.full(len(self.shared), NOBODY, np.int16)
        # both lie in shared memory, and are lost where it is written
        self._barriers: dict[int, Barrier] = {}
        self._maps: dict[int, dict[Any, int]] = {}
        self._kept = np.zeros(len(self.shared), bool)
        self._published: dict[int, dict[Any, int]] = {}
        self._tensor_copies: list[Work] = []
        special = {
            f"%{name}.{axis}": np.full(32, number, U32)
            for name, numbers in (("ctaid", place), ("nctaid", grid))
            for axis, number in zip("xyz", numbers, strict=True)
        }
        self._warps = [Warp(self, number, special) for number in range(program.threads // 32)]

    def lateness(self, kind: str) -> float:
        """How often work of a kind is put off: never, always, or now and then."""
        return self._lateness.setdefault(kind, self.chance.choice((0.0, 0.5, 1.0)))

    def run(self) -> None:
        live, met = list(self._warps), dict[int, list[Warp]]()
        vain = 0
        while live:
            ready = [warp for warp in live if not warp.is_waiting]
            is_stuck = not ready or vain > PATIENCE
            if is_stuck and not self._tensor_copies:
                where = {warp.number: warp.at for warp in live}
                raise KernelError(f"{self.program.name}: all wait, warps at {where}")
            puts_off = self.chance.random() < self.lateness("tensor copies")
            if self._tensor_copies and (is_stuck or vain > IMPATIENCE or not puts_off):
                self._tensor_copies.pop(self.chance.randrange(len(self._tensor_copies)))()
                vain = 0
            elif ready:
                vain = self._turn(self.chance.choice(ready), live, met, vain)
        if self._tensor_copies:
            raise KernelError(f"{self.program.name} ends with copies in flight")

    def _turn(self, warp: Warp, live: list[Warp], met: dict[int, list[Warp]], vain: int) -> int:
        """Let a warp go on for a while; how many waits were in vain since something happened."""
        for _ in range(self.chance.randrange(1, 12)):
            step = self.program.code[warp.at](warp)
            if isinstance(step, int):
                if step < 0:
                    live.remove(warp)
                    return 0
                warp.at = step
                continue
            kind, number, *counts, warp.at = step
            if kind == "try":
                if not number:
                    return vain + 1
                vain = 0
                continue
            here = met.setdefault(number, [])
            here.append(warp)
            warp.is_waiting = True
            missing = (counts[0] or self.program.threads) - 32 * len(here)
            if missing < 0:
                raise KernelError(f"more threads at barrier {number} than it waits for")
            if not missing:
                for other in met.pop(number):
                    other.is_waiting = False
            return 0
        return vain

    def _check(self, addresses: np.ndarray, size: int) -> None:
        if len(addresses):
            if addresses.min() < 0 or addresses.max() + size > self._size:
                raise KernelError(f"{size} bytes at {addresses.tolist()} of {self._size} shared")
            _check_aligned(addresses, size)

    def load_global(self, addresses: np.ndarray, size: int, threads: np.ndarray) -> np.ndarray:
        return self.memory.load(addresses, size, threads)

    def store_global(
        self, warp: Warp, addresses: np.ndarray, values: Any, threads: np.ndarray
    ) -> None:
        self.memory.store(addresses, np.concatenate(values, axis=1), threads)

    def load_shared(self, addresses: np.ndarray, size: int, threads: np.ndarray) -> np.ndarray:
        self._check(addresses[threads], size)
        return self.shared[np.where(threads, addresses, 0)[:, None] + np.arange(size)]

    def store_shared(
        self, warp: Warp, addresses: np.ndarray, values: Any, threads: np.ndarray
    ) -> None:
        joined = np.concatenate(values, axis=1)
        at = addresses[threads]
        self._check(at, joined.shape[1])
        self._write(at[:, None] + np.arange(joined.shape[1]), joined[threads], warp.number)

    def _write(self, at: np.ndarray, octets: np.ndarray, storing: int = NOBODY) -> None:
        self.shared[at] = octets
        self._storing[at] = storing
        if self._kept[at].any():
            written = set(at.ravel().tolist())
            for kept, size in ((self._barriers, BARRIER), (self._maps, MAP)):
                for start in [one for one in kept if written & set(range(one, one + size))]:
                    del kept[start]
                    self._kept[start : start + size] = False

    def _keep(self, start: int, size: int) -> None:
        self._check(np.array([start]), size)
        self._kept[start : start + size] = True

    def fence(self, warp: Warp) -> None:
        """What a warp has stored may be read by asynchronous work."""
        self._storing[self._storing == warp.number] = NOBODY

    def ldmatrix(self, rows: np.ndarray, count: int, transposed: bool) -> list[np.ndarray]:
        """Tiles of 8 rows of 16 bytes, whose addresses eight threads each give."""
        tiles = []
        for tile in rows[: 8 * count].reshape(count, 8):
            self._check(tile, 16)
            numbers = self.shared[tile[:, None] + np.arange(16)].view(U16)
            numbers = numbers.T if transposed else numbers
            tiles.append(pair(numbers[ROW, 2 * COLUMN], numbers[ROW, 2 * COLUMN + 1]))
        return tiles

    def stmatrix(
        self, warp: Warp, rows: np.ndarray, values: list[np.ndarray], transposed: bool
    ) -> None:
        for tile, bits in zip(rows[: 8 * len(values)].reshape(-1, 8), values, strict=True):
            self._check(tile, 16)
            numbers = octets(bits, U32).view(U16).reshape(8, 8)
            numbers = np.ascontiguousarray(numbers.T) if transposed else numbers
            self._write(tile[:, None] + np.arange(16), numbers.view(U8), warp.number)

    def copy(
        self, warp: Warp, to: np.ndarray, of: np.ndarray, size: int, given: Any, threads: np.ndarray
    ) -> None:
        """cp.async: of its bytes as many as are given, then zeros."""
        is_read = threads & (given > 0)
        if ((given != 0) & (given != size)).any():
            raise KernelError("copies of a part")

        def work() -> None:
            at, loaded = to[threads], self.memory.load(of, size, is_read)
            self._check(at, size)
            self._write(at[:, None] + np.arange(size), loaded[threads])

        warp.copies.start(work)

    def describe(
        self, at: np.ndarray, field: tuple[Any, ...], value: Any, threads: np.ndarray
    ) -> None:
        """Set a field of a tensor map in shared memory."""
        for address in at[threads].tolist():
            self._keep(address, MAP)
            self._maps.setdefault(address, {})[field] = int(np.broadcast_to(value, 32)[0])

    def publish(self, of: np.ndarray, to: np.ndarray, threads: np.ndarray) -> None:
        """Copy a tensor map to global memory, from where it is used."""
        if threads.any():
            self.memory.place(to[threads], 128)
            if int(of[0]) not in self._maps:
                raise KernelError(f"no tensor map at {of[0]}")
            self._published[int(to[0])] = dict(self._maps[int(of[0])])

    def copy_tensor(
        self,
        to: np.ndarray,
        tensor_map: np.ndarray,
        column: Any,
        row: Any,
        barrier: np.ndarray,
        threads: np.ndarray,
    ) -> None:
        """Start a tensor copy, by one thread; the barrier hears of its bytes when it is done."""
        if not threads.any():
            return
        (thread,) = np.flatnonzero(threads)
        first = (int(np.broadcast_to(row, 32)[thread]), int(np.broadcast_to(column, 32)[thread]))
        fields = self._published[int(tensor_map[thread])]
        start, told = int(to[thread]), int(barrier[thread])
        self._tensor_copies.append(lambda: self._copy_box(fields, first, start, told))

    def _copy_box(
        self, fields: dict[Any, int], first: tuple[int, int], start: int, told: int
    ) -> None:
        size = ELEMENT[fields["elemtype",]]
        if fields["rank",] != 1 or fields["interleave_layout",]:
            raise KernelError("tensor maps of other than two dimensions")
        rows = np.arange(fields["box_dim", 1])[:, None] + first[0]
        octets_in = np.arange(fields["box_dim", 0] * size)[None, :] + first[1] * size
        width = octets_in.shape[1]
        inside = (rows >= 0) & (rows < fields["global_dim", 1]) & (octets_in >= 0)
        inside &= octets_in < fields["global_dim", 0] * size
        base, stride = fields["global_address",], fields["global_stride", 0]
        if base % 16 or stride % 16 or start % 128:
            raise KernelError("a tensor copy is not aligned")
        box = np.zeros(inside.shape, U8)
        if inside.any():
            part, at = self.memory.place((base + rows * stride + octets_in)[inside], 1)
            box[inside] = part[at]
        at = start + np.arange(len(rows))[:, None] * width + np.arange(width)[None, :]
        mode = fields["swizzle_mode",]
        if mode:
            if width > SWIZZLED_MAP[mode]:
                raise KernelError("a box is wider than its swizzle")
            at = swizzle(at, SWIZZLED_MAP[mode])
        self._check(at.reshape(-1), 1)
        self._write(at, box)
        self._barrier(told).arrive(0, -box.size)

    def _barrier(self, address: int) -> Barrier:
        if address not in self._barriers:
            raise KernelError(f"no barrier at {address}")
        return self._barriers[address]

    def init(self, at: np.ndarray, count: int, threads: np.ndarray) -> None:
        for address in at[threads].tolist():
            self._keep(address, BARRIER)
            self._barriers[address] = Barrier(count)

    def forget(self, at: np.ndarray, threads: np.ndarray) -> None:
        for address in at[threads]:
            self._barriers.pop(int(address), None)

    def arrive(self, at: np.ndarray, amount: int, expects: bool, threads: np.ndarray) -> None:
        for address in at[threads]:
            barrier = self._barrier(int(address))
            barrier.arrive(*((1, amount) if expects else (amount, 0)))

    def passed(self, at: np.ndarray, parity: Any) -> bool:
        """Whether the phase of a parity is over; of the parity the hardware reads one bit."""
        return self._barrier(int(at[0])).phase != int(np.broadcast_to(parity, 32)[0]) & 1

    def multiply_group(
        self,
        warp: Warp,
        into: list[int],
        a: list[int] | int,
        b: np.ndarray,
        adds: Any,
        width: int,
        inner: int,
        kind: str,
        transposed: tuple[bool, bool],
    ) -> None:
        """wgmma: (64, inner) times (width, inner) transposed, of which a warp has 16 rows."""
        is_sum, of_b = bool(np.broadcast_to(adds, 32)[0]), int(b[0])
        of_a = None if isinstance(a, list) else int(warp.registers[a][0])

        # of a register in each thread: two neighbours of a row, the same eight rows below, and on
        tile, place = np.divmod(np.arange(len(into))[:, None], 4)
        rows, columns = ROW + place // 2 * 8, 8 * tile + 2 * COLUMN + place % 2

        def work() -> None:
            registers = warp.registers
            right = self._operand(of_b, width, inner, kind, transposed[1])
            if isinstance(a, list):
                left = fragment([registers[one] for one in a], kind, HALVES)
            else:
                assert of_a is not None
                first = 16 * (warp.number % 4)
                left = self._operand(of_a, 64, inner, kind, transposed[0])[first : first + 16]
            product = (left @ right.T)[rows, columns]
            if is_sum:
                product += np.stack([registers[one] for one in into]).view(F32)
            for one, bits in zip(into, product.view(U32), strict=True):
                registers[one] = bits

        warp.products.start(work)

    def _operand(
        self, descriptor: int, rows: int, inner: int, kind: str, transposed: bool
    ) -> np.ndarray:
        """A matrix in shared memory, (rows, inner), as its descriptor says."""
        size = 4 if kind == "tf32" else 2
        start, leading, stride = (((descriptor >> bit) & 0x3FFF) << 4 for bit in (0, 16, 32))
        if descriptor >> 49 & 7:
            raise KernelError("descriptors with a base offset")
        wide = SWIZZLED.get(descriptor >> 62, 16)
        row, column = np.arange(rows)[:, None], np.arange(inner)[None, :]
        # eight rows of `wide` bytes lie together; a transposed matrix has its columns as such rows
        along, across = (row * size, column) if transposed else (column * size, row)
        if wide == 16 and transposed:
            leading, stride = stride, leading
        at = start + along % wide + along // wide * leading + across % 8 * wide
        at = swizzle(at + across // 8 * stride, wide)
        self._check(at.reshape(-1), size)
        if (self._storing[at] != NOBODY).any():
            raise KernelError("a product reads what was stored and not fenced")
        return numbers_of(self.shared.view(U32 if size == 4 else U16)[at // size], kind)


def swizzle(addresses: np.ndarray, wide: int) -> np.ndarray:
    """Exchange 16-byte pieces within rows of so many bytes by the number of 128-byte row."""
    return addresses ^ ((addresses >> 7 & wide // 16 - 1) << 4)


class Launch(NamedTuple):
    """What a kernel is started with."""

    text: str
    # bytes of shared memory, and the kernel's parameters in order
    shared: int
    parameters: list[int]
    grid: tuple[int, ...]


program_of = lru_cache(maxsize=None)(Program)


def launch(kernel: Launch, memory: Memory, seed: int) -> None:
    """Run all blocks, in random order.

    Raises:
        KernelError: The kernel does what is undefined, or does not end.
        NotImplementedError: It has an instruction that is unknown here.
    """
    program = program_of(kernel.text)
    parameters = dict(zip(program.parameters, kernel.parameters, strict=True))
    x, y, z = grid = (*kernel.grid, 1, 1)[:3]
    places = [(i, j, k) for i in range(x) for j in range(y) for k in range(z)]
    random.Random(seed).shuffle(places)
    with np.errstate(all="ignore"):
        for number, place in enumerate(places):
            Block(program, memory, parameters, place, grid, kernel.shared, f"{seed} {number}").run()
