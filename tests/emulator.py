"""Runs a compiled kernel without a GPU: its PTX, block by block, on the memory of tensors.

What hardware leaves open is drawn at random: which warp goes on, and when asynchronous work is done
(copies, tensor copies, products of warp groups and of tensor memory, each some time between its
start and the wait for it). So a barrier, a wait or a phase that is missing often shows in the
result, or as a deadlock; where it does not, `order` sees accesses that nothing orders, of warps to
shared and tensor memory and of blocks to tensors. Both memories start as NaN. Loads and stores are
checked (bounds, alignment), that a barrier was made, and that registers of products in flight are
left alone.

Not modelled: rounding within a tensor core (sums here are float32), approximations, threads of a
warp that are not in step, limits on registers and on tensor maps, copies of one group out of their
order, and fences but for those of tensor maps, of products' registers, and between what is stored
or copied and a product that reads it.
Sources: NVIDIA's PTX ISA 8.7; for operands in shared memory CUTLASS's mma_sm90_desc.hpp.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from tests.order import Clock, KernelError, Launched, Order
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
from tests.tensor_memory import Description, TensorMemory

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
# turns in a row that warps wait in vain before a tensor copy is no longer put off, and before a
# kernel is given up that has none in flight
IMPATIENCE, PATIENCE = 20, 4000


class Part(NamedTuple):
    """A tensor's bytes, from an address on, and who came to them in this launch."""

    start: int
    octets: np.ndarray
    launched: Launched


class Memory:
    """The bytes of tensors, at the addresses they have."""

    def __init__(self) -> None:
        self._parts: list[Part] = []
        # by address; tensors may lie in the same
        self._storages: dict[int, Launched] = {}

    def add(self, address: int, octets: np.ndarray, storage: int, size: int) -> None:
        """A tensor, which lies in a storage of so many bytes from an address on."""
        launched = self._storages.setdefault(storage, Launched(size))
        self._parts.append(Part(address, octets, launched.part(address - storage, len(octets))))

    def place(self, addresses: np.ndarray, size: int) -> tuple[Part, np.ndarray]:
        """The tensor that holds all these accesses, and where in it their bytes are."""
        first, last = int(addresses.min()), int(addresses.max()) + size
        for part in self._parts:
            if part.start <= first and last <= part.start + len(part.octets):
                return part, (addresses - part.start)[..., None] + np.arange(size)
        known = [(start, start + len(octets)) for start, octets, _ in self._parts]
        raise KernelError(f"{size} bytes at {first} to {last} are in no tensor of {known}")

    def load(self, addresses: np.ndarray, size: int, threads: np.ndarray, block: int) -> np.ndarray:
        loaded = np.zeros((len(addresses), size), U8)
        if threads.any():
            _check_aligned(addresses[threads], size)
            loaded[threads] = self.read(addresses[threads], size, block)
        return loaded

    def read(self, addresses: np.ndarray, size: int, block: int) -> np.ndarray:
        part, at = self.place(addresses, size)
        part.launched.read(at, block)
        return part.octets[at]

    def store(
        self, addresses: np.ndarray, values: np.ndarray, threads: np.ndarray, block: int
    ) -> None:
        if threads.any():
            size = values.shape[1]
            _check_aligned(addresses[threads], size)
            part, at = self.place(addresses[threads], size)
            part.launched.write(at, block)
            part.octets[at] = values[threads]


def _check_aligned(addresses: np.ndarray, size: int) -> None:
    if (addresses % min(size, 16)).any():
        raise KernelError(f"{size} bytes at {addresses.tolist()} are not aligned")


class Pending:
    """Asynchronous work of one warp, waited for in groups, oldest first; an agent of its own."""

    def __init__(self, lateness: float, chance: random.Random, clock: Clock, agent: int) -> None:
        self._lateness, self._chance = lateness, chance
        self._clock, self.agent = clock, agent
        # number of the group that is being started
        self.time = 1
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
        self.time += 1

    def finish(self, time: int) -> None:
        """Do all up to a group."""
        while self._groups and self.time - len(self._groups) <= time:
            _do(self._groups.popleft())

    def wait(self, groups: int) -> None:
        """Until at most so many groups are in flight."""
        self._clock[self.agent] = max(self._clock[self.agent], self.time - 1 - groups)
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
        self.clock = block.order.clock()
        self.clock[number] = 1
        self.copies, self.products = (
            Pending(block.lateness(kind), block.chance, self.clock, number + agent)
            for kind, agent in (("copies", block.order.warps), ("products", 2 * block.order.warps))
        )
        # registers that products in flight write (the group of the last, and which of its sums it
        # is) or read (the group); and those that other instructions wrote since products were
        # fenced from them
        self._sums: dict[int, tuple[int, int]] = {}
        self._factors: dict[int, int] = {}
        self._unfenced = set(range(len(self.registers)))
        # whether loads of tensor memory were not waited for, and such stores: cells and numbers
        self.is_loading = False
        self.tensor_stores: list[tuple[np.ndarray, np.ndarray]] = []

    @property
    def time(self) -> int:
        return int(self.clock[self.number])

    def hear(self, clock: Clock) -> None:
        """Know what another knows."""
        np.maximum(self.clock, clock, out=self.clock)

    def tell(self) -> Clock:
        """What others may know from here on; what comes after is of a later time."""
        if self.is_loading or self.tensor_stores:
            raise KernelError(f"warp {self.number} did not wait for tensor memory")
        told = self.clock.copy()
        self.clock[self.number] += 1
        return told

    def touch(self, read: frozenset[int], written: frozenset[int]) -> None:
        """Other instructions than products use these registers."""
        if not self._sums.keys().isdisjoint(read | written):
            raise KernelError("a register is used that a product in flight writes")
        if not self._factors.keys().isdisjoint(written):
            raise KernelError("a register is written that a product in flight reads")
        self._unfenced |= written

    def fence_products(self) -> None:
        self._unfenced.clear()

    def hold(self, sums: list[int], factors: list[int]) -> None:
        """A product starts that uses these registers."""
        if not self._unfenced.isdisjoint((*sums, *factors)):
            raise KernelError("a product uses registers that it is not fenced from")
        if not self._sums.keys().isdisjoint(factors):
            raise KernelError("a product reads what one in flight writes")
        if not self._factors.keys().isdisjoint(sums):
            raise KernelError("a product writes what one in flight reads")
        if any(self._sums.get(one, (0, at))[1] != at for at, one in enumerate(sums)):
            raise KernelError("a product adds to sums in flight of another shape")
        self._sums |= {one: (self.products.time, at) for at, one in enumerate(sums)}
        self._factors |= dict.fromkeys(factors, self.products.time)

    def wait_products(self, groups: int) -> None:
        self.products.wait(groups)
        first = self.products.time - groups
        self._sums = {one: held for one, held in self._sums.items() if held[0] >= first}
        self._factors = {one: group for one, group in self._factors.items() if group >= first}

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
    """An mbarrier: a phase ends when all have arrived, and all bytes that they said to expect.

    Attributes:
        agent: Of the tensor copies that tell it of their bytes.
        time: Theirs, one for each phase.
        coming: How many tensor copies and groups of products are in flight that tell it.
        over: What was known at the end of each phase.
    """

    def __init__(self, count: int, agent: int, clock: Clock) -> None:
        self.count = self.left = count
        self.bytes = self.coming = 0
        self.agent, self.time = agent, int(clock[agent]) + 1
        self.over: list[Clock] = []
        self._coming = clock.copy()
        # the last phase that each warp waited for
        self._heard: dict[int, int] = {}

    def wait(self, warp: Warp, parity: int) -> bool:
        """Whether a phase of a parity is over, the one before the first counting as odd.

        A warp then knows what was known at the end of the earliest that it may mean.
        """
        if len(self.over) & 1 == parity:
            return False
        phase = self._heard.get(warp.number, -2) + 1
        phase += phase & 1 != parity
        if phase < len(self.over):
            self._heard[warp.number] = phase
            if phase >= 0:
                warp.hear(self.over[phase])
        return True

    def copied(self, size: int) -> None:
        """A tensor copy is done."""
        self.coming -= 1
        self.arrive(0, -size)

    def arrive(self, amount: int, expected: int, clock: Clock | None = None) -> None:
        if amount > self.left:
            raise KernelError(f"{amount} arrive at a barrier that waits for {self.left}")
        self.left -= amount
        self.bytes += expected
        if clock is not None:
            np.maximum(self._coming, clock, out=self._coming)
        if not self.left and not self.bytes:
            if self.coming:
                raise KernelError("a phase ends with work in flight that it is told of")
            self.left = self.count
            self._coming[self.agent] = self.time
            self.over.append(self._coming.copy())
            self.time += 1


class Block:
    """A block of threads with its shared memory."""

    def __init__(
        self,
        program: Program,
        memory: Memory,
        parameters: dict[str, int],
        number: int,
        place: Sequence[int],
        grid: Sequence[int],
        shared: int,
        seed: str,
        trusts_copies: bool,
    ) -> None:
        self.program, self.memory, self.parameters = program, memory, parameters
        self.number = number
        self.chance = random.Random(seed)
        self._lateness: dict[str, float] = {}
        self._size = shared
        self.shared = np.full(shared + -shared % 4, 0xFF, U8)
        # both lie in shared memory, and are lost where it is written
        self._barriers: dict[int, Barrier] = {}
        self._maps: dict[int, dict[Any, int]] = {}
        self._kept = np.zeros(len(self.shared), bool)
        self._published: dict[int, dict[Any, int]] = {}
        # by whom, and when, tensor maps were published, and those were fenced in
        self._publishers: dict[int, tuple[int, int]] = {}
        self._fenced_maps: dict[int, list[tuple[int, int]]] = {}
        self._tensor = TensorMemory() if program.has_tensor_memory else None
        places = len(self.shared) + (TensorMemory.size if program.has_tensor_memory else 0)
        self.order = Order(places, program.threads // 32, program.barriers, trusts_copies)
        # tensor copies, and groups of products of tensor memory, that barriers are told of
        self._telling: list[Work] = []
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
            if is_stuck and not self._telling:
                where = {warp.number: warp.at for warp in live}
                raise KernelError(f"{self.program.name}: all wait, warps at {where}")
            puts_off = self.chance.random() < self.lateness("what barriers are told")
            if self._telling and (is_stuck or vain > IMPATIENCE or not puts_off):
                self._telling.pop(self.chance.randrange(len(self._telling)))()
                vain = 0
            elif ready:
                vain = self._turn(self.chance.choice(ready), live, met, vain)
        if self._telling:
            raise KernelError(f"{self.program.name} ends with work in flight")
        if self._tensor and self._tensor.count:
            raise KernelError(f"{self.program.name} ends and keeps its tensor memory")

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
                arrived = met.pop(number)
                joint = np.maximum.reduce([other.tell() for other in arrived])
                for other in arrived:
                    other.is_waiting = False
                    other.hear(joint)
            return 0
        return vain

    def _check(self, addresses: np.ndarray, size: int) -> None:
        if len(addresses):
            if addresses.min() < 0 or addresses.max() + size > self._size:
                raise KernelError(f"{size} bytes at {addresses.tolist()} of {self._size} shared")
            _check_aligned(addresses, size)

    def load_global(self, addresses: np.ndarray, size: int, threads: np.ndarray) -> np.ndarray:
        return self.memory.load(addresses, size, threads, self.number)

    def store_global(
        self, warp: Warp, addresses: np.ndarray, values: Any, threads: np.ndarray
    ) -> None:
        self.memory.store(addresses, np.concatenate(values, axis=1), threads, self.number)

    def load_shared(
        self, warp: Warp, addresses: np.ndarray, size: int, threads: np.ndarray
    ) -> np.ndarray:
        self._check(addresses[threads], size)
        at = addresses[:, None] + np.arange(size)
        self._read(warp, at[threads])
        return self.shared[np.where(threads[:, None], at, 0)]

    def store_shared(
        self, warp: Warp, addresses: np.ndarray, values: Any, threads: np.ndarray
    ) -> None:
        joined = np.concatenate(values, axis=1)
        at = addresses[threads]
        self._check(at, joined.shape[1])
        self._store(warp, at[:, None] + np.arange(joined.shape[1]), joined[threads])

    def _read(self, warp: Warp, at: np.ndarray) -> None:
        self.order.read(warp.clock, at, warp.number, warp.time)

    def _store(self, warp: Warp, at: np.ndarray, octets: np.ndarray) -> None:
        same = self.shared[at] == octets
        self.order.write(warp.clock, at, warp.number, warp.time, same)
        self._write(at, octets)

    def _write(self, at: np.ndarray, octets: np.ndarray) -> None:
        self.shared[at] = octets
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
        """What a warp knows to be stored may be read by asynchronous work."""
        self.order.fence(warp.clock)

    def ldmatrix(
        self, warp: Warp, rows: np.ndarray, count: int, transposed: bool
    ) -> list[np.ndarray]:
        """Tiles of 8 rows of 16 bytes, whose addresses eight threads each give."""
        tiles = []
        for tile in rows[: 8 * count].reshape(count, 8):
            self._check(tile, 16)
            at = tile[:, None] + np.arange(16)
            self._read(warp, at)
            numbers = self.shared[at].view(U16)
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
            self._store(warp, tile[:, None] + np.arange(16), numbers.view(U8))

    def copy(
        self, warp: Warp, to: np.ndarray, of: np.ndarray, size: int, given: Any, threads: np.ndarray
    ) -> None:
        """cp.async: of its bytes as many as are given, then zeros."""
        is_read = threads & (given > 0)
        if ((given != 0) & (given != size)).any():
            raise KernelError("copies of a part")
        self._check(to[threads], size)
        at = to[threads][:, None] + np.arange(size)
        self.order.write(warp.clock, at, warp.copies.agent, warp.copies.time)

        def work() -> None:
            self._write(at, self.memory.load(of, size, is_read, self.number)[threads])

        warp.copies.start(work)

    def describe(
        self, warp: Warp, at: np.ndarray, field: tuple[Any, ...], value: Any, threads: np.ndarray
    ) -> None:
        """Set a field of a tensor map in shared memory."""
        for address in at[threads].tolist():
            self._keep(address, MAP)
            self.order.write(warp.clock, address + np.arange(MAP), warp.number, warp.time)
            self._maps.setdefault(address, {})[field] = int(np.broadcast_to(value, 32)[0])

    def publish(self, warp: Warp, of: np.ndarray, to: np.ndarray, threads: np.ndarray) -> None:
        """Copy a tensor map to global memory, from where it is used."""
        if threads.any():
            part, at = self.memory.place(to[threads], MAP)
            part.launched.write(at, self.number)
            self._read(warp, of[0] + np.arange(MAP))
            if int(of[0]) not in self._maps:
                raise KernelError(f"no tensor map at {of[0]}")
            self._published[int(to[0])] = dict(self._maps[int(of[0])])
            self._publishers[int(to[0])] = (warp.number, warp.time)
            self._fenced_maps[int(to[0])] = []

    def fence_map(self, warp: Warp, of: np.ndarray, threads: np.ndarray) -> None:
        """A tensor map that was published may be used by those who come after this."""
        if threads.any():
            used = int(of[0])
            publisher, time = self._publishers.get(used, (warp.number, warp.time + 1))
            if warp.clock[publisher] >= time:
                self._fenced_maps[used].append((warp.number, warp.time))

    def copy_tensor(
        self,
        warp: Warp,
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
        used = int(tensor_map[thread])
        fences = self._fenced_maps.get(used, [])
        if not any(warp.clock[fencing] >= time for fencing, time in fences):
            raise KernelError("a tensor map is used that was not fenced in")
        fields = self._published[used]
        told, start = self._barrier(warp, int(barrier[thread])), int(to[thread])
        size = ELEMENT[fields["elemtype",]]
        if fields["rank",] != 1 or fields["interleave_layout",]:
            raise KernelError("tensor maps of other than two dimensions")
        rows = np.arange(fields["box_dim", 1])[:, None]
        octets_in = np.arange(fields["box_dim", 0] * size)[None, :]
        width = octets_in.shape[1]
        at = start + rows * width + octets_in
        mode = fields["swizzle_mode",]
        if mode:
            if width > SWIZZLED_MAP[mode]:
                raise KernelError("a box is wider than its swizzle")
            at = swizzle(at, SWIZZLED_MAP[mode])
        self._check(at.reshape(-1), 1)
        rows, octets_in = rows + first[0], octets_in + first[1] * size
        inside = (rows >= 0) & (rows < fields["global_dim", 1]) & (octets_in >= 0)
        inside &= octets_in < fields["global_dim", 0] * size
        base, stride = fields["global_address",], fields["global_stride", 0]
        if base % 16 or stride % 16 or start % 128:
            raise KernelError("a tensor copy is not aligned")
        self.order.write(warp.clock, at, told.agent, told.time)
        part, place = self.memory.place(np.array([used]), MAP)
        part.launched.read(place, self.number)
        told.coming += 1

        def work() -> None:
            box = np.zeros(inside.shape, U8)
            if inside.any():
                of = (base + rows * stride + octets_in)[inside]
                box[inside] = self.memory.read(of, 1, self.number)[:, 0]
            self._write(at, box)
            told.copied(box.size)

        self._telling.append(work)

    def _barrier(self, warp: Warp, address: int) -> Barrier:
        self._read(warp, address + np.arange(BARRIER))
        if address not in self._barriers:
            raise KernelError(f"no barrier at {address}")
        return self._barriers[address]

    def init(self, warp: Warp, at: np.ndarray, count: int, threads: np.ndarray) -> None:
        for address in at[threads].tolist():
            self.forget(warp, np.array([address]), np.array([True]))
            self._keep(address, BARRIER)
            agent = self.order.barrier(address)
            self._barriers[address] = Barrier(count, agent, warp.clock.copy())

    def forget(self, warp: Warp, at: np.ndarray, threads: np.ndarray) -> None:
        for address in at[threads].tolist():
            self.order.write(warp.clock, address + np.arange(BARRIER), warp.number, warp.time)
            known = self._barriers.pop(address, None)
            if known is not None and known.coming:
                raise KernelError("a barrier goes with work in flight that tells it")

    def arrive(
        self, warp: Warp, at: np.ndarray, amount: int, expects: bool, threads: np.ndarray
    ) -> None:
        if not threads.any():
            return
        barriers = [self._barrier(warp, address) for address in at[threads].tolist()]
        told = warp.tell()
        for barrier in barriers:
            barrier.arrive(*((1, amount) if expects else (amount, 0)), told)

    def passed(self, warp: Warp, at: np.ndarray, parity: Any) -> bool:
        """Whether the phase of a parity is over; of the parity the hardware reads one bit."""
        return self._barrier(warp, int(at[0])).wait(warp, int(np.broadcast_to(parity, 32)[0]) & 1)

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
        is_sum = bool(np.broadcast_to(adds, 32)[0])
        of_b = self._operand(warp, int(b[0]), width, inner, kind, transposed[1])
        if isinstance(a, list):
            warp.hold(into, a)
        else:
            warp.hold(into, [])
            rows_of_warp = slice(16 * (warp.number % 4), 16 * (warp.number % 4) + 16)
            first = int(warp.registers[a][0])
            of_a = self._operand(warp, first, 64, inner, kind, transposed[0], rows_of_warp)

        # of a register in each thread: two neighbours of a row, the same eight rows below, and on
        tile, place = np.divmod(np.arange(len(into))[:, None], 4)
        rows, columns = ROW + place // 2 * 8, 8 * tile + 2 * COLUMN + place % 2

        def work() -> None:
            registers = warp.registers
            if isinstance(a, list):
                left = fragment([registers[one] for one in a], kind, HALVES)
            else:
                left = self._numbers(of_a, kind)
            product = (left @ self._numbers(of_b, kind).T)[rows, columns]
            if is_sum:
                product += np.stack([registers[one] for one in into]).view(F32)
            for one, bits in zip(into, product.view(U32), strict=True):
                registers[one] = bits

        warp.products.start(work)

    @property
    def tensor(self) -> TensorMemory:
        """Its tensor memory, whose cells come after shared memory's bytes to `order`."""
        assert self._tensor is not None
        return self._tensor

    def allocate(self, warp: Warp, at: np.ndarray, count: int, threads: np.ndarray) -> None:
        if _all_or_none(threads):
            first = self.chance.randrange(0, 512 - count + 1, 32)
            self.tensor.allocate(first, count)
            self.store_shared(warp, at, [octets(U32(first), U32)], LANES == 0)

    def deallocate(self, warp: Warp, threads: np.ndarray) -> None:
        if _all_or_none(threads):
            at = len(self.shared) + self.tensor.deallocate()
            self.order.write(warp.clock, at, warp.number, warp.time)

    def load_tensor(
        self,
        warp: Warp,
        into: list[int],
        address: np.ndarray,
        split: int | None,
        threads: np.ndarray,
    ) -> None:
        """tcgen05.ld: the registers have their numbers at once.

        The compiler moves them to others before it waits, and the assembler knows that it has to.
        """
        if _all_or_none(threads):
            cells = self.tensor.of_warp(warp.number, _same(address), len(into), split)
            self.order.read(warp.clock, len(self.shared) + cells, warp.number, warp.time)
            for register, at in zip(into, cells.T, strict=True):
                warp.registers[register] = self.tensor.cells[at]
            warp.is_loading = True

    def store_tensor(
        self,
        warp: Warp,
        of: list[int],
        address: np.ndarray,
        split: int | None,
        threads: np.ndarray,
    ) -> None:
        """tcgen05.st: the cells have their numbers once they are waited for."""
        if _all_or_none(threads):
            cells = self.tensor.of_warp(warp.number, _same(address), len(of), split)
            self.order.write(warp.clock, len(self.shared) + cells, warp.number, warp.time)
            numbers = np.stack([warp.registers[register] for register in of], axis=1)
            warp.tensor_stores.append((cells, numbers))

    def wait_tensor_ld(self, warp: Warp) -> None:
        warp.is_loading = False

    def wait_tensor_st(self, warp: Warp) -> None:
        for cells, numbers in warp.tensor_stores:
            self.tensor.cells[cells] = numbers
        warp.tensor_stores.clear()

    def multiply_tensor(
        self,
        warp: Warp,
        into: np.ndarray,
        a: Any,
        is_stored: bool,
        b: Any,
        description: Any,
        adds: Any,
        kind: str,
        threads: np.ndarray,
    ) -> None:
        """tcgen05.mma, by one thread: sums in tensor memory, a there or in shared memory."""
        if not threads.any():
            return
        (thread,) = np.flatnonzero(threads)
        first_a, first_b, bits, is_sum = (
            np.broadcast_to(one, 32)[thread].item() for one in (a, b, description, adds)
        )
        product = Description.read(bits, kind)
        if warp.is_loading or warp.tensor_stores:
            raise KernelError("a product starts before tensor memory was waited for")
        agent, time = warp.products.agent, warp.products.time
        # products of one thread come one after the other
        clock = warp.clock.copy()
        clock[agent] = time
        of_b = self._tensor_operand(warp, first_b, product.width, product, 1)
        if is_stored:
            # of 32 bits each, as in a row of an operand in shared memory
            of_a = self.tensor.of_product(first_a, product.rows, 8)
            self.order.read(clock, len(self.shared) + of_a, agent, time)
        else:
            of_a = self._tensor_operand(warp, first_a, product.rows, product, 0)
        sums = self.tensor.of_product(int(into[thread]), product.rows, product.width)
        self.order.write(clock, len(self.shared) + sums, agent, time)

        def work() -> None:
            cells = self.tensor.cells
            if is_stored:
                stored = np.ascontiguousarray(cells[of_a])
                halves = stored if product.kind == "tf32" else stored.view(U16)
                left = numbers_of(halves, product.kind)
            else:
                left = self._numbers(of_a, product.kind)
            result = left @ self._numbers(of_b, product.kind).T
            if is_sum:
                result = result + cells[sums].view(F32)
            cells[sums] = result.view(U32)

        warp.products.start(work)

    def _tensor_operand(
        self, warp: Warp, descriptor: int, rows: int, product: Description, which: int
    ) -> np.ndarray:
        # the version, and modes of swizzling that warp groups have as well
        if descriptor >> 46 & 7 != 1 or descriptor >> 52 & 1 or descriptor >> 61 & 1:
            raise NotImplementedError(f"operands described as {descriptor:#x}")
        return self._operand(
            warp, descriptor, rows, product.inner, product.kind, product.transposed[which]
        )

    def commit_products(self, warp: Warp, at: np.ndarray, threads: np.ndarray) -> None:
        """tcgen05.commit: a barrier hears once all products of before are done."""
        if not threads.any():
            return
        (thread,) = np.flatnonzero(threads)
        told = self._barrier(warp, int(at[thread]))
        clock = self.order.clock()
        clock[warp.products.agent] = time = warp.products.time
        warp.products.commit()
        told.coming += 1

        def work() -> None:
            warp.products.finish(time)
            told.coming -= 1
            told.arrive(1, 0, clock)

        self._telling.append(work)

    def _operand(
        self,
        warp: Warp,
        descriptor: int,
        rows: int,
        inner: int,
        kind: str,
        transposed: bool,
        part: slice = slice(None),
    ) -> np.ndarray:
        """Where some rows of a matrix in shared memory, (rows, inner), are by its descriptor."""
        size = 4 if kind == "tf32" else 2
        start, leading, stride = (((descriptor >> bit) & 0x3FFF) << 4 for bit in (0, 16, 32))
        if descriptor >> 49 & 7:
            raise KernelError("descriptors with a base offset")
        wide = SWIZZLED.get(descriptor >> 62, 16)
        row, column = np.arange(rows)[part, None], np.arange(inner)[None, :]
        # eight rows of `wide` bytes lie together; a transposed matrix has its columns as such rows
        along, across = (row * size, column) if transposed else (column * size, row)
        if wide == 16 and transposed:
            leading, stride = stride, leading
        at = start + along % wide + along // wide * leading + across % 8 * wide
        at = swizzle(at + across // 8 * stride, wide)
        self._check(at.reshape(-1), size)
        # the first byte of each stands for all, as none is written by halves
        self.order.read(warp.clock, at, warp.products.agent, warp.products.time)
        if not self.order.is_fenced(warp.clock, at):
            raise KernelError("a product reads what was stored and not fenced")
        return at

    def _numbers(self, at: np.ndarray, kind: str) -> np.ndarray:
        size = 4 if kind == "tf32" else 2
        return numbers_of(self.shared.view(U32 if size == 4 else U16)[at // size], kind)


def _all_or_none(threads: np.ndarray) -> bool:
    """Whether all threads of a warp do what they may only do together."""
    if threads.any() != threads.all():
        raise KernelError("some threads of a warp do what all have to")
    return bool(threads.all())


def _same(addresses: np.ndarray) -> int:
    """The one that all threads give."""
    if (addresses != addresses[0]).any():
        raise KernelError("threads of a warp give other addresses of tensor memory")
    return int(addresses[0])


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
    # whether products may read what was copied without a fence
    trusts_copies: bool = False


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
            drawn = f"{seed} {number}"
            block = Block(
                program, memory, parameters, number, place, grid, kernel.shared, drawn,
                kernel.trusts_copies,
            )  # fmt: skip
            block.run()
