"""Time one MoE layer, and each of its kernels, against plain torch and other ways to compute it.

    python benchmarks/bench_moe.py                           bfloat16 on the GPU
    python benchmarks/bench_moe.py --tokens 16 65536 --routing balanced skewed
    python benchmarks/bench_moe.py --kernels --tokens 65536  each kernel by itself
    python benchmarks/bench_moe.py --smoke                   toy sizes, on a CPU too

A run is six layers with weights of their own, one after the other, so that no cache flatters; on a
GPU it is replayed as a CUDA graph, but for what synchronises. Outputs have to agree with the layer
in float32, of all six layers before any time is taken, and of the last at every call. Ceilings, in
the same run: torch's matrix product over as many rows, and a copy of as many bytes.

Routings: `balanced`, every expert the same; `skewed`, one expert has half of all rows; `uneven`, an
expert gets 0.78 of what the one before it gets. F.grouped_mm runs without a synchronisation in
bfloat16 alone, which is why that is the default dtype here.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import NamedTuple

import harness
import report
import script
import torch
import torch.nn.functional as F
from harness import Case, Contender, Deviation
from torch import Tensor
from tqdm.auto import tqdm

from nomoe.arguments import DTYPES
from nomoe.backends import select_backend
from nomoe_kernels import configs, reference

SEED = 0
LAYERS = 6
TOP_K = 2
TOKENS = (16, 64, 256, 512, 1024, 2048, 4096, 16384, 65536, 131072)
SMOKE_TOKENS = (5, 40)
ROUTINGS = ("balanced", "skewed", "uneven")
# what no GPU's L2 holds
COLD_BYTES = 256 << 20
# an expert's share of the rows next to the one before it
UNEVEN = 0.78
CONTENDERS = ("nomoe (triton)", "nomoe (torch)", "torch, F.grouped_mm", "scattermoe")
# the torch backend reads the number of rows of each expert back
SYNCHRONISE = ("nomoe (torch)",)
# logits of the two chosen experts, at which they hold 0.70 of the softmax over eight, as real
# tokens do
CHOSEN_LOGITS = (2.2, 1.6)
# of a row's mean 1 - cosine and length, and of any number, against float32
BOUNDS = {
    "float32": Deviation(cosine_distance=1e-10, max_abs=1e-4, length=1e-5),
    "float16": Deviation(cosine_distance=1e-6, max_abs=2e-2, length=1e-3),
    "bfloat16": Deviation(cosine_distance=5e-5, max_abs=0.2, length=5e-3),
}


class Sizes(NamedTuple):
    """A layer's sizes."""

    experts: int
    width: int
    ffn_width: int


REAL = Sizes(8, 768, 3072)
SMOKE = Sizes(8, 96, 192)


class Layer(NamedTuple):
    """A layer's weights, as `moe_layer` takes them."""

    router_ED: Tensor
    w1_EDF: Tensor
    w2_EFD: Tensor
    bias_D: Tensor


def draw_layers(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> list[Layer]:
    """Weights that keep the variance; the router's rows are orthonormal, the same in all layers."""
    experts, width, ffn_width = sizes
    generator = torch.Generator(device).manual_seed(SEED)

    def normal(*shape: int, scale: float) -> Tensor:
        drawn = torch.randn(*shape, generator=generator, device=device)
        return (drawn * scale).to(dtype)

    router_ED = torch.linalg.qr(normal(width, experts, scale=1.0).float()).Q.T.contiguous()
    return [
        Layer(
            router_ED.to(dtype),
            normal(experts, ffn_width, width, scale=width**-0.5).transpose(1, 2),
            normal(experts, ffn_width, width, scale=ffn_width**-0.5),
            normal(width, scale=1.0),
        )
        for _ in range(LAYERS)
    ]


def draw_choices(tokens: int, experts: int, routing: str) -> Tensor:
    """The two experts of each token, (T, 2), first choice first."""
    generator = torch.Generator().manual_seed(SEED)
    if routing == "balanced":
        turn = torch.arange(tokens)[torch.randperm(tokens, generator=generator)]
        step = 1 + turn // experts % (experts - 1)
        return torch.stack([turn % experts, (turn + step) % experts], dim=1)
    if routing == "skewed":
        others = torch.randint(1, experts, (tokens,), generator=generator)
        return torch.stack([torch.zeros_like(others), others], dim=1)
    popularity_E = UNEVEN ** torch.arange(experts, dtype=torch.float32)
    return torch.multinomial(popularity_E.expand(tokens, -1), TOP_K, generator=generator)


def draw_tokens(choices_TK: Tensor, layer: Layer) -> Tensor:
    """Tokens that this router sends to these experts, (T, D), in the dtype of the weights."""
    device = layer.router_ED.device
    generator = torch.Generator(device).manual_seed(SEED)
    router_ED = layer.router_ED.float()
    shape = (len(choices_TK), router_ED.shape[1])
    x_TD = torch.randn(shape, generator=generator, device=device)
    x_TD -= (x_TD @ router_ED.T) @ router_ED
    for choice, logit in enumerate(CHOSEN_LOGITS):
        x_TD += logit * router_ED[choices_TK[:, choice].to(device)]
    return x_TD.to(layer.w1_EDF.dtype)


def triton_layer(x_TD: Tensor, layer: Layer) -> Tensor:
    """The layer of `nomoe_kernels.fused`, imported where Triton is sure to be."""
    from nomoe_kernels import fused

    return fused.moe_layer(x_TD, *layer, TOP_K)[0]


def stock_layer(x_TD: Tensor, layer: Layer) -> Tensor:
    """A good build of stock operations: sort, F.grouped_mm, GELU by itself, gather and sum."""
    probabilities_TE = F.linear(x_TD, layer.router_ED).softmax(dim=-1, dtype=torch.float32)
    weights_TK, experts_TK = probabilities_TE.topk(TOP_K)
    _, order_R, ends_E = sort_by_expert(experts_TK, len(layer.w1_EDF))
    h_RF = F.gelu(F.grouped_mm(x_TD[order_R // TOP_K], layer.w1_EDF, offs=ends_E))
    y_RD = F.grouped_mm(h_RF, layer.w2_EFD, offs=ends_E)
    y_RD = y_RD * weights_TK.to(y_RD.dtype).flatten()[order_R, None]
    return reference.unpermute(y_RD, order_R, layer.bias_D, TOP_K)


def scattermoe_layer(x_TD: Tensor, layer: Layer) -> Tensor:
    """The same with ScatterMoE's products, which gather and scatter rows themselves."""
    from scattermoe.parallel_experts import parallel_linear

    weights_TK, experts_TK = reference.route(x_TD, layer.router_ED, TOP_K)
    sorted_R, order_R, ends_E = sort_by_expert(experts_TK, len(layer.w1_EDF))
    where = (sorted_R, order_R, ends_E.long())
    h_RF = F.gelu(parallel_linear(x_TD, layer.w1_EDF, TOP_K, *where, grouped_out=True))
    gates_TK = weights_TK.to(x_TD.dtype)
    out_TD: Tensor = parallel_linear(h_RF, layer.w2_EFD, 1, *where, gates=gates_TK, grouped_in=True)
    return out_TD.float() + layer.bias_D.float()


def sort_by_expert(experts_TK: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.permute` without the synchronisation of a bincount, after the sorted experts."""
    sorted_R, order_R = experts_TK.flatten().sort(stable=True)
    every_E = torch.arange(experts, device=experts_TK.device)
    return sorted_R, order_R, torch.searchsorted(sorted_R, every_E, right=True, out_int32=True)


class Ceiling(NamedTuple):
    """Something that the work cannot be faster than, and what it costs itself."""

    name: str
    run: Callable[[Layer], Tensor]
    flop: int
    bytes: int


class Work(NamedTuple):
    """What a case measures: runs by name, all six layers each, and what they cost."""

    title: str
    tokens: int
    runs: dict[str, Callable[[Layer], Tensor]]
    expected: Callable[[Layer], Tensor]
    baseline: str
    flop: int
    bytes: int
    ceilings: list[Ceiling]
    # compares what no output of a run shows; raises DisagreementError
    check: Callable[[], None] = lambda: None


def layer_work(tokens: int, routing: str, layers: list[Layer], contenders: list[str]) -> Work:
    """The whole layer, from tokens to the sum over their experts."""
    layer = layers[0]
    E, D, F_ = layer.w1_EDF.shape
    choices_TK = draw_choices(tokens, E, routing)
    x_TD = draw_tokens(choices_TK, layer)
    chosen_TK = reference.route(x_TD.float(), layer.router_ED, TOP_K)[1]
    if not torch.equal(chosen_TK.cpu(), choices_TK):
        raise RuntimeError("the drawn tokens are not routed as they should be")
    runs: dict[str, Callable[[Layer], Tensor]] = {
        "nomoe (triton)": lambda one: triton_layer(x_TD, one),
        "nomoe (torch)": lambda one: reference.moe_layer(x_TD, *one, TOP_K)[0],
        "torch, F.grouped_mm": lambda one: stock_layer(x_TD, one),
        "scattermoe": lambda one: scattermoe_layer(x_TD, one),
    }
    used = len(choices_TK.unique())
    item = x_TD.itemsize
    flop = 4 * tokens * TOP_K * D * F_
    # weights of the experts in use and tokens once, the result in float32
    moved = 2 * used * D * F_ * item + tokens * D * (item + 4)
    return Work(
        f"layer, {tokens:,} tokens, {routing}",
        tokens,
        {name: runs[name] for name in contenders},
        lambda one: exact_layer(x_TD, one),
        "nomoe (torch)",
        flop=flop,
        bytes=moved,
        ceilings=[
            products_ceiling(layer, tokens * TOP_K, up=True, down=True),
            copy_ceiling(moved, x_TD.device),
        ],
    )


def kernel_works(tokens: int, layers: list[Layer], *, all_tiles: bool) -> list[Work]:
    """Each kernel of the layer by itself, balanced routing.

    The layer's own calls differ in two things: there the first product divides the order of the
    rows itself, and the second writes its rows back in token order.
    """
    from nomoe_kernels import fused, launch

    layer = layers[0]
    E, D, F_ = layer.w1_EDF.shape
    x_TD = draw_tokens(draw_choices(tokens, E, "balanced"), layer)
    weights_TK, experts_TK = reference.route(x_TD, layer.router_ED, TOP_K)
    # the reference returns columns of a wider tensor
    experts_TK = experts_TK.contiguous()
    _, order_R, ends_E = sort_by_expert(experts_TK, E)
    gather_R = order_R // TOP_K
    rows_RD, row_weights_R = x_TD[gather_R], weights_TK.flatten()[order_R]
    h_RF = torch.rand(len(rows_RD), F_, device=x_TD.device).to(x_TD.dtype)
    R, item, matrices = len(rows_RD), x_TD.itemsize, E * D * F_ * x_TD.itemsize
    device = x_TD.device
    counts_PE, chunk = launch.count(experts_TK, E)
    plan = configs.plan(configs.device_of(device), configs.Shape(E, D, F_, item, R))

    def product(tile: configs.Tile, up: bool) -> Callable[[Layer], Tensor]:
        gathers = up and tile.kernel == "pointer"

        def run(one: Layer) -> Tensor:
            if up:
                return fused.grouped_gemm(
                    x_TD if gathers else rows_RD, one.w1_EDF, ends_E, gelu=True,
                    gather_R=gather_R if gathers else None, tile=tile,
                )  # fmt: skip
            return fused.grouped_gemm(
                h_RF, one.w2_EFD, ends_E, row_weights_R=row_weights_R, tile=tile
            )

        return run

    def label(tile: configs.Tile) -> str:
        return "nomoe " + "-".join(str(field) for field in tile[:6])

    works = []
    for up, configured in ((True, plan.up), (False, plan.down)):
        candidates = [] if configured.kernel == "small" else [configured]
        if all_tiles:
            candidates = list(
                configs.candidates(configs.device_of(device), item, E, D if up else F_)
            )
        if not candidates:
            continue
        stock = (
            (lambda one: F.gelu(F.grouped_mm(rows_RD, one.w1_EDF, offs=ends_E)))
            if up
            else lambda one: (
                F.grouped_mm(h_RF, one.w2_EFD, offs=ends_E) * row_weights_R[:, None]
            ).to(h_RF.dtype)
        )
        exact = (
            (lambda one: exact_rows(rows_RD, one.w1_EDF, ends_E, gelu=True))
            if up
            else lambda one: exact_rows(h_RF, one.w2_EFD, ends_E, weights_R=row_weights_R)
        )
        works.append(
            Work(
                f"{'up-projection with GELU' if up else 'down-projection'}, {tokens:,} tokens",
                tokens,
                {
                    "F.grouped_mm and stock operations": stock,
                    **{label(tile): product(tile, up) for tile in candidates},
                },
                exact,
                "F.grouped_mm and stock operations",
                flop=2 * R * D * F_,
                bytes=matrices + R * (D + F_) * item,
                ceilings=[
                    products_ceiling(layer, R, up=up, down=not up),
                    copy_ceiling(matrices + R * (D + F_) * item, device),
                ],
            )
        )

    def memory_work(
        title: str,
        read: Tensor,
        ours: Callable[[Tensor], Tensor],
        stock: Callable[[Tensor], Tensor],
        moved: int,
        check: Callable[[], None] = lambda: None,
    ) -> Work:
        # other memory for each call of a run, as the copy has
        copies = [read, *(read.clone() for _ in range(LAYERS - 1))]
        turns = {"nomoe": itertools.cycle(copies), "torch": itertools.cycle(copies)}
        return Work(
            f"{title}, {tokens:,} tokens",
            tokens,
            {
                "nomoe": lambda one: ours(next(turns["nomoe"])),
                "torch": lambda one: stock(next(turns["torch"])),
            },
            lambda one: stock(read).float(),
            "torch",
            flop=0,
            bytes=moved,
            ceilings=[copy_ceiling(moved, device)],
            check=check,
        )

    norm = reference.Norm(torch.ones_like(layer.bias_D), layer.bias_D, 1e-5)
    router = (layer.router_ED, TOP_K)

    def check_route() -> None:
        found, expected = (module.route(x_TD, *router) for module in (fused, reference))
        check_routing(f"route, {tokens:,} tokens", found, expected, ties=0)

    def check_norm_route() -> None:
        found, expected = (
            module.add_norm_route(x_TD, x_TD, norm, *router)[1:] for module in (fused, reference)
        )
        check_routing(f"residual, LayerNorm and route, {tokens:,} tokens", found, expected)

    works += [
        memory_work(
            "route",
            x_TD,
            lambda x_TD: fused.route(x_TD, *router)[0],
            lambda x_TD: reference.route(x_TD, *router)[0],
            tokens * (D * item + TOP_K * 12),
            check_route,
        ),
        memory_work(
            "residual, LayerNorm and route",
            x_TD,
            lambda x_TD: fused.add_norm_route(x_TD, x_TD, norm, *router)[0],
            lambda x_TD: reference.add_norm_route(x_TD, x_TD, norm, *router)[0],
            # both operands are the same tensor
            tokens * (2 * D * item + TOP_K * 12),
            check_norm_route,
        ),
        memory_work(
            "permute with rows",
            x_TD,
            lambda x_TD: launch.permute(experts_TK, counts_PE, chunk, x_TD)[2],
            lambda x_TD: x_TD[sort_by_expert(experts_TK, E)[1] // TOP_K],
            tokens * (1 + TOP_K) * D * item,
        ),
        memory_work(
            "unpermute",
            rows_RD,
            lambda rows_RD: fused.unpermute(rows_RD, None, layer.bias_D, TOP_K),
            lambda rows_RD: reference.unpermute(rows_RD, None, layer.bias_D, TOP_K),
            tokens * D * (TOP_K * item + 4),
        ),
    ]
    return works


def exact_layer(x_TD: Tensor, layer: Layer) -> Tensor:
    """The layer in float32."""
    exact = Layer(*(tensor.float() for tensor in layer))
    return reference.moe_layer(x_TD.float(), *exact, TOP_K)[0]


def exact_rows(
    rows_RI: Tensor,
    weight_EIO: Tensor,
    ends_E: Tensor,
    *,
    gelu: bool = False,
    weights_R: Tensor | None = None,
) -> Tensor:
    """One product of all experts in float32."""
    return reference.grouped_gemm(
        rows_RI.float(), weight_EIO.float(), ends_E, gelu=gelu, row_weights_R=weights_R
    )


def check_routing(
    title: str, found: Sequence[Tensor], expected: Sequence[Tensor], ties: float = 1e-3
) -> None:
    """Compare weights and experts, which no timed output shows.

    Both routes work in float32 on the same numbers, so that only tokens at a tie may differ.

    Args:
        title: Of the work.
        found: weights_TK and experts_TK.
        expected: The same of plain torch.
        ties: Share of tokens that may take other experts.

    Raises:
        DisagreementError: They differ.
    """
    (weights_TK, experts_TK), (expected_TK, chosen_TK) = found, expected
    differing = float((experts_TK != chosen_TK).any(dim=1).float().mean())
    off = float((weights_TK - expected_TK).abs().max())
    # written so that a NaN disagrees
    if not (differing <= ties and off <= 1e-4):
        raise harness.DisagreementError(
            f"{title}: {differing:.2%} of the tokens take other experts, and weights are off by "
            f"{off:.3g}"
        )


def products_ceiling(layer: Layer, rows: int, *, up: bool, down: bool) -> Ceiling:
    """Torch's product of as many rows with one matrix: no experts, nothing but arithmetic."""
    _, D, F_ = layer.w1_EDF.shape
    x_RD = torch.randn(rows, D, device=layer.bias_D.device).to(layer.bias_D.dtype)
    h_RF = torch.randn(rows, F_, device=layer.bias_D.device).to(layer.bias_D.dtype)

    def run(one: Layer) -> Tensor:
        with harness.fastest_products(x_RD.device):
            if up:
                out = x_RD @ one.w1_EDF[0]
            if down:
                out = h_RF @ one.w2_EFD[0]
        return out

    matrices = up + down
    item = layer.bias_D.itemsize
    moved = matrices * (D * F_ + rows * (D + F_)) * item
    name = "ceiling: both products" if up and down else "ceiling: product"
    return Ceiling(name, run, flop=matrices * 2 * rows * D * F_, bytes=moved)


def copy_ceiling(moved: int, device: torch.device, calls: int = LAYERS) -> Ceiling:
    """Reading and writing as many bytes together, in each call of a run other memory.

    Where a few calls' memory is more than any cache holds, the next ones have the same again. Each
    number is negated on its way: a plain copy becomes a copy of the driver's in a CUDA graph, which
    moved 2.7 TB/s on an H200 where a kernel moves 4.3.
    """
    turns = min(calls, 1 + COLD_BYTES // moved)
    memory = torch.ones(2, turns, max(moved // 8, 1), dtype=torch.int32, device=device)
    turn = itertools.cycle(range(turns))

    def run(one: Layer) -> Tensor:
        index = next(turn)
        return torch.neg(memory[1, index], out=memory[0, index])

    return Ceiling("ceiling: moving the bytes", run, flop=0, bytes=moved)


def build_case(work: Work, layers: list[Layer], dtype: str, device: torch.device) -> Case:
    """Check each contender on every layer, then make runs of all of them that can be timed.

    Raises:
        DisagreementError: An output is not the expected one.
    """
    work.check()
    bound = BOUNDS[dtype]
    for one in layers:
        expected = work.expected(one)
        for name, run in work.runs.items():
            harness.check_agreement(f"{work.title}, {name}", run(one), expected, bound)

    def all_layers(name: str, run: Callable[[Layer], Tensor]) -> Callable[[], Tensor]:
        def run_all() -> Tensor:
            for one in layers:
                output = run(one)
            return output

        waits = name in SYNCHRONISE or ("F.grouped_mm" in name and dtype != "bfloat16")
        return run_all if waits or device.type != "cuda" else harness.captured(run_all)

    calls = len(layers)
    contenders = [
        Contender(name, all_layers(name, run), calls * work.flop, bound, calls * work.bytes)
        for name, run in work.runs.items()
    ] + [
        Contender(name, all_layers(name, run), calls * flop, None, calls * moved)
        for name, run, flop, moved in work.ceilings
    ]
    return Case(work.title, calls * work.tokens, contenders, expected, baseline=work.baseline)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = script.parser(
        "Time one MoE layer and its kernels.", repeats=10, smoke="toy sizes and few tokens"
    )
    parser.add_argument("--kernels", action="store_true", help="each kernel instead of the layer")
    parser.add_argument(
        "--tiles", action="store_true", help="with --kernels: every tile of the tuner's menu"
    )
    parser.add_argument("--tokens", type=int, nargs="+", help="tokens of a batch")
    parser.add_argument("--routing", nargs="+", choices=ROUTINGS, default=list(ROUTINGS))
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    args = script.parse(parser, arguments, counts=["tokens"])
    tokens = args.tokens or (SMOKE_TOKENS if args.smoke else TOKENS)
    if args.tiles and not args.kernels:
        parser.error("--tiles goes with --kernels")
    device = args.device
    machine = report.machine_line(device)
    dtype = DTYPES[args.dtype]
    obstacle = triton_obstacle(device, dtype)
    if args.kernels and obstacle:
        parser.error(f"--kernels needs the triton backend: {obstacle}")

    not_run = {}
    if obstacle:
        not_run["nomoe (triton)"] = obstacle
    if find_spec("scattermoe") is None:
        not_run["scattermoe"] = "not installed"
    contenders = [name for name in CONTENDERS if name not in not_run]
    kind = "kernels" if args.kernels else "layer"
    run = script.Run(
        args,
        f"bench_moe-{kind}-{device.type}-{args.dtype}",
        benchmark="bench_moe",
        command=report.command_line(arguments),
        machine=machine,
        settings={
            "dtype": args.dtype,
            "device": str(device),
            "repeats": args.repeats,
            "warm-up": harness.WARM_UP,
            "layers in a run": LAYERS,
            "CUDA graphs": device.type == "cuda",
        },
        not_run=not_run,
    )
    with torch.no_grad():
        layers = draw_layers(SMOKE if args.smoke else REAL, dtype, device)
        plan = [(count, routing) for count in tokens for routing in args.routing]
        if args.kernels:
            plan = [(count, "balanced") for count in tokens]
        for count, routing in tqdm(plan, unit=" sizes", disable=None):
            with run.attempt(f"{count:,} tokens, {routing}"):
                works = (
                    kernel_works(count, layers, all_tiles=args.tiles)
                    if args.kernels
                    else [layer_work(count, routing, layers, contenders)]
                )
                for work in works:
                    with run.attempt(work.title):
                        run.measure(build_case(work, layers, args.dtype, device))
    return run.finish()


def triton_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot run here, or None."""
    try:
        select_backend("triton", device, dtype=dtype)
    except RuntimeError as error:
        return str(error)
    return None


if __name__ == "__main__":
    sys.exit(main())
