"""How every benchmark measures: correctness before speed, and contenders in turn.

A benchmark builds `Case`s and gives each to `measure`; what comes of it goes to `report`. No time
leaves `measure` unless every output of every contender agreed with the expected one.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from nomoe import NomicMoEConfig

# calls of each contender before its times count: the first fills caches and allocator
WARM_UP = 2
# of a GPU's clock, some half a millisecond, in which a graph of hundreds of kernels is launched
WAIT_CYCLES = 1_000_000

Output = TypeVar("Output")


class DisagreementError(RuntimeError):
    """A contender's output is not the expected one, so its speed means nothing."""


class Deviation(NamedTuple):
    """How far an output is from the expected one."""

    # mean over the rows of 1 - cosine: in 16 bits a text in which an expert is chosen otherwise is
    # far off its neighbours, so the worst row says little about the rest
    cosine_distance: float
    # largest difference of any number
    max_abs: float
    # mean over the rows of the relative difference in length, to which a cosine is blind, and the
    # largest difference too where it has to be wide. A twentieth tells a wrong weight or a missing
    # sum from a text that took other experts
    length: float = 0.05


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to do a case's work."""

    name: str
    run: Callable[[], Tensor]
    # floating-point operations of the work; a multiplication and an addition count as two
    flop: int
    # how far its output may be from the case's; None for a ceiling, which computes something else
    bound: Deviation | None
    # fewest bytes the work moves, each input read and each output written once; 0 if not counted
    bytes: int = 0
    # name of the ceiling its time is compared with; None for the slowest of the case
    ceiling: str | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """Work that several contenders do.

    Raises:
        ValueError: Two contenders have the same name, or none has the baseline's.
    """

    title: str
    tokens: int
    contenders: Sequence[Contender]
    expected_BD: Tensor
    # name of the contender that the others' speed is given relative to
    baseline: str

    def __post_init__(self) -> None:
        names = [contender.name for contender in self.contenders]
        if len(set(names)) < len(names) or self.baseline not in names:
            raise ValueError(
                f"contenders are {', '.join(names)}; names must differ and {self.baseline!r} be "
                "one of them"
            )


class Result(NamedTuple):
    """The times of one contender in one case."""

    contender: Contender
    # worst over all calls; None for a ceiling
    deviation: Deviation | None
    seconds: list[float]


def check_agreement(
    name: str, output_BD: Tensor, expected_BD: Tensor, bound: Deviation
) -> Deviation:
    """Compare an output with the expected one.

    Both bounds are needed: a cosine is blind to a wrong scale, a difference to how large it is.

    Raises:
        DisagreementError: The output has another shape, or is further off than the bound.
    """
    if output_BD.shape != expected_BD.shape:
        raise DisagreementError(
            f"{name}: output is {tuple(output_BD.shape)}, expected {tuple(expected_BD.shape)}"
        )
    # outputs of a layer can be large: they are compared where they are, if float64 exists there
    where = output_BD.device if output_BD.is_cuda else torch.device("cpu")
    output_BD, expected_BD = output_BD.to(where).double(), expected_BD.to(where).double()
    deviation = Deviation(
        float((1 - F.cosine_similarity(output_BD, expected_BD)).mean()),
        float((output_BD - expected_BD).abs().max()),
        float((output_BD.norm(dim=1) / expected_BD.norm(dim=1) - 1).abs().mean()),
    )
    # written so that a NaN disagrees
    if not all(value <= most for value, most in zip(deviation, bound, strict=True)):
        raise DisagreementError(
            f"{name}: output is off by a mean 1 - cosine of {deviation.cosine_distance:.3g} (at "
            f"most {bound.cosine_distance:.3g}), by {deviation.max_abs:.3g} at the worst place (at "
            f"most {bound.max_abs:.3g}) and by {deviation.length:.3g} in length (at most "
            f"{bound.length:.3g})"
        )
    return deviation


def time_call(run: Callable[[], Output], device: torch.device) -> tuple[float, Output]:
    """Run once with nothing else queued on the device; seconds, and what it returned.

    Of a `Replay` the time is the device's alone, without what the host takes to launch it.
    """
    if device.type != "cuda":
        start = time.perf_counter()
        output = run()
        return time.perf_counter() - start, output
    with torch.cuda.device(device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if isinstance(run, Replay):
            # the device waits until it has all of the graph
            torch.cuda._sleep(WAIT_CYCLES)  # type: ignore[no-untyped-call]
        begin.record()
        output = run()
        end.record()
        torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000, output


class Replay(Generic[Output]):
    """A run recorded as a CUDA graph, which a call replays into the same output.

    A graph owns what is allocated while it is recorded, not what it reads: that stays as long as
    the run does, which this holds.
    """

    def __init__(self, graph: torch.cuda.CUDAGraph, output: Output, run: object) -> None:
        self._graph, self._output, self._run = graph, output, run

    def __call__(self) -> Output:
        """Replay."""
        self._graph.replay()
        return self._output


def captured(run: Callable[[], Output]) -> Replay[Output]:
    """Record a run as a CUDA graph.

    Raises:
        SystemExit: It cannot be recorded, after which torch cannot be relied on to time others.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # compiles kernels and fills caches, which a capture may not
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            output = run()
    except Exception as error:
        raise SystemExit(f"a CUDA graph could not be recorded: {error}") from error
    return Replay(graph, output, run)


def interleave(
    runs: Mapping[str, Callable[[], Output]],
    *,
    repeats: int,
    device: torch.device,
    inspect: Callable[[str, Output], None],
    warm_up: int = WARM_UP,
) -> dict[str, list[float]]:
    """Time several runs in turn, so that a machine that slows down slows all of them.

    Each round calls every run once. Orders differ, lest one always follow the same: every run comes
    first in its turn, then the same orders backwards.

    Args:
        runs: What to time, by name.
        repeats: Rounds whose times count.
        device: Where the work happens.
        inspect: Called with a name and an output after every call, outside the timed stretch.
        warm_up: Rounds before those.

    Returns:
        Seconds of each counted call, by name.
    """
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warm_up + repeats):
        cycle, first = divmod(turn, len(names))
        order = names[first:] + names[:first]
        for name in reversed(order) if cycle % 2 else order:
            taken, output = time_call(runs[name], device)
            inspect(name, output)
            if turn >= warm_up:
                seconds[name].append(taken)
    return seconds


def measure(
    case: Case,
    *,
    repeats: int,
    device: torch.device,
    bar: tqdm[Any] | None = None,
    warm_up: int = WARM_UP,
) -> list[Result]:
    """Time a case's contenders, checking every output of every call.

    Args:
        case: The work.
        repeats: Timed calls of each contender.
        device: Where the work happens.
        bar: Advanced by one for every call, `warm_up + repeats` for each contender.
        warm_up: Calls of each contender before those.

    Raises:
        DisagreementError: An output is not the expected one.
    """
    contenders = {contender.name: contender for contender in case.contenders}
    deviations: dict[str, Deviation] = {}

    def inspect(name: str, output: Tensor) -> None:
        bound = contenders[name].bound
        if bound is not None:
            found = check_agreement(f"{case.title}, {name}", output, case.expected_BD, bound)
            worst = deviations.get(name, found)
            deviations[name] = Deviation(*map(max, found, worst))
        if bar is not None:
            bar.update()

    runs = {name: contender.run for name, contender in contenders.items()}
    seconds = interleave(runs, repeats=repeats, device=device, inspect=inspect, warm_up=warm_up)
    return [
        Result(contender, deviations.get(name), seconds[name])
        for name, contender in contenders.items()
    ]


def forward_flop(config: NomicMoEConfig, lengths: Sequence[int]) -> int:
    """Operations of a forward over texts of these lengths: matrix products, without padding.

    At the real sizes 226.6 M per token and 36,864 more for each token it attends to.
    """
    # scores and their product with the values, 2 * D each for every pair of tokens
    attention = 4 * config.n_layer * config.n_embd * sum(length**2 for length in lengths)
    return projection_flop(config, sum(lengths)) + attention


def projection_flop(config: NomicMoEConfig, tokens: int) -> int:
    """Operations of a forward's products with weights, of which `linear_ceiling` runs the same."""
    moe_layers, width = len(config.moe_layers), config.n_embd
    attention = 4 * width
    dense = 2 * config.ffn_width
    moe = 2 * config.ffn_width * config.moe_top_k + config.num_experts
    columns = config.n_layer * attention + (config.n_layer - moe_layers) * dense + moe_layers * moe
    return 2 * tokens * width * columns


def linear_ceiling(
    config: NomicMoEConfig,
    tensors: Mapping[str, Tensor],
    routed: Sequence[Sequence[int]],
    prepare: Callable[[Tensor], Any] = lambda weight: weight,
    linear: Callable[[Tensor, Any], Tensor] = F.linear,
) -> Callable[[], Tensor]:
    """Make a run of a forward's products with weights and nothing else: what could be reached.

    `F.linear` on the model's own weights, which it reads from memory as a forward does. Inputs are
    random, at hand in the order in which they are needed, and outputs are dropped.

    Args:
        config: Sizes.
        tensors: The model's tensors.
        routed: Rows of each expert, for each MoE layer.
        prepare: Makes of a weight (O, I) what `linear` takes, before the run.
        linear: Computes a product, in place of `F.linear`.
    """
    rows = sum(routed[0])
    like = tensors["emb_ln.weight"]
    inputs = {
        width: torch.randn(rows, width).to(like) for width in (config.n_embd, config.ffn_width)
    }
    products: list[tuple[Tensor, Any]] = []

    def add(weight: Tensor, rows: int) -> None:
        products.append((inputs[weight.shape[1]][:rows], prepare(weight)))

    tokens = rows // config.moe_top_k
    for index in range(config.n_layer):
        layer = f"encoder.layers.{index}"
        add(tensors[f"{layer}.attn.Wqkv.weight"], tokens)
        add(tensors[f"{layer}.attn.out_proj.weight"], tokens)
        if not config.is_moe_layer(index):
            add(tensors[f"{layer}.mlp.fc1.weight"], tokens)
            add(tensors[f"{layer}.mlp.fc2.weight"], tokens)
            continue
        add(tensors[f"{layer}.mlp.router.layer.weight"], tokens)
        w1_EFD, w2_EFD = (
            tensors[f"{layer}.mlp.experts.mlp.{name}"].unflatten(0, (config.num_experts, -1))
            for name in ("w1", "w2")
        )
        for expert, count in enumerate(routed[config.moe_layers.index(index)]):
            if count:
                add(w1_EFD[expert], count)
                add(w2_EFD[expert].T, count)

    @torch.no_grad()
    def run() -> Tensor:
        with fastest_products(like.device):
            for x, weight in products:
                out = linear(x, weight)
        return out

    return run


@contextmanager
def fastest_products(device: torch.device) -> Iterator[None]:
    """Let torch's float32 products on CUDA run in TF32, for ceilings: nothing may beat those.

    A contender may not, since its outputs would be off; but three such passes, as nomoe's kernels
    make, may be faster than torch's float32 without tensor cores.
    """
    earlier = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(earlier)
