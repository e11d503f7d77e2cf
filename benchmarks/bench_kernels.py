"""Time the kernels outside the mixture of experts: attention, dense products, norms and pooling.

    python benchmarks/bench_kernels.py                              float16 on the GPU
    python benchmarks/bench_kernels.py --only attention dense --tiles
    python benchmarks/bench_kernels.py --tokens 16 65536 --dtype bfloat16
    python benchmarks/bench_kernels.py --smoke                      toy sizes, on a CPU too

As in bench_moe, whose harness this shares: a run is six calls on weights or tokens of their own, so
that no cache flatters; on a GPU it is replayed as a CUDA graph. Outputs have to agree with plain
torch in float32 before any time is taken, and at every call. Ceilings, in the same run: torch's
matrix product of as much arithmetic, and a copy of as many bytes.

Without --tiles each kernel runs as `nomoe_kernels.configs` says, beside what it could be instead:
the library's product, a kernel where the library is the choice, the tile of batch_invariant=True,
each form of attention. The route after a norm is in bench_moe.py --kernels too, with the rest of
its layer.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import bench_moe
import harness
import report
import script
import torch
import torch.nn.functional as F
from bench_moe import LAYERS, Ceiling, Work, copy_ceiling
from torch import Tensor
from tqdm.auto import tqdm

from nomoe.arguments import DTYPES
from nomoe_kernels import configs, reference
from nomoe_kernels.configs import AttentionShape, AttentionTile, DenseShape, Tile
from nomoe_kernels.reference import Norm, Pooling

SEED = 0
TOKENS = (16, 512, 4096, 65_536)
# texts and tokens of each
TEXTS = ((1, 16), (1, 512), (256, 16), (32, 128), (128, 512), (4, 2048))
SMOKE_TOKENS = (5, 40)
SMOKE_TEXTS = ((1, 5), (3, 20))
TOP_K = 2
KINDS = ("attention", "dense", "embed", "norm", "route", "pool")


class Sizes(NamedTuple):
    """A model's sizes."""

    width: int
    ffn_width: int
    heads: int
    experts: int
    vocabulary: int


REAL = Sizes(768, 3072, 12, 8, 250_048)
SMOKE = Sizes(64, 96, 4, 4, 500)


class Bench(NamedTuple):
    """What every work is drawn with."""

    sizes: Sizes
    dtype: torch.dtype
    device: torch.device
    # the Triton kernels, or None where they cannot run
    fused: Any
    # every tile of the tuner's menu
    all_tiles: bool

    def normal(self, *shape: int, scale: float = 1.0, seed: int = SEED) -> Tensor:
        """Numbers that are the same in every run."""
        generator = torch.Generator(self.device).manual_seed(seed)
        drawn = torch.randn(*shape, generator=generator, device=self.device)
        return (drawn * scale).to(self.dtype)

    def for_each_call(
        self, *shape: int, scale: float = 1.0, calls: int | None = None
    ) -> list[Tensor]:
        """Numbers of their own for each call of a run, by default of LAYERS."""
        every = range(LAYERS if calls is None else calls)
        return [self.normal(*shape, scale=scale, seed=SEED + 1 + call) for call in every]

    @property
    def described(self) -> configs.Device:
        """What configurations depend on."""
        return configs.device_of(self.device)


def attention_works(bench: Bench, texts: int, length: int) -> Iterator[tuple[Work, list[Any]]]:
    """Every form of attention over texts of one length.

    Forms that rotate keys in place would rotate them once more at every call. So all angles are
    0 while time is taken, at true positions: a rotation reads as much and changes nothing.
    `check_rotation` has seen true ones.
    """
    D, H = bench.sizes.width, bench.sizes.width // bench.sizes.heads
    T, lengths = texts * length, [length] * texts
    layers = bench.for_each_call(T, 3, bench.sizes.heads, H)
    positions_T = torch.arange(length, device=bench.device).repeat(texts)

    def pack(module: Any, dtype: torch.dtype, **options: Any) -> Any:
        packing = module.pack(lengths, positions_T, length, H, 10_000.0, dtype, **options)
        return packing._replace(cos=torch.ones_like(packing.cos), sin=torch.zeros_like(packing.sin))

    plain, exact = pack(reference, bench.dtype), pack(reference, torch.float32)
    runs = {"torch, rotation and SDPA": lambda qkv: reference.attention(qkv, plain)}
    tiles = dict(attention_tiles(bench, AttentionShape(H, layers[0].itemsize, length, T)))
    for name, tile in tiles.items():
        packing = pack(bench.fused, bench.dtype, tile=tile)
        runs[name] = lambda qkv, packing=packing: bench.fused.attention(qkv, packing)
    moved = 4 * T * D * layers[0].itemsize
    flop = 4 * texts * length**2 * D
    yield (
        Work(
            f"attention, {texts} x {length:,} tokens",
            T,
            runs,
            lambda qkv: reference.attention(qkv.float(), exact),
            "torch, rotation and SDPA",
            flop=flop,
            bytes=moved,
            ceilings=[
                # the scores' and the values' products in one, with texts of this length
                product_ceiling(bench, T, D, 2 * length),
                copy_ceiling(moved, bench.device),
            ],
            check=lambda: check_rotation(bench, tiles.values(), lengths),
        ),
        layers,
    )


def attention_tiles(bench: Bench, shape: AttentionShape) -> Iterator[tuple[str, AttentionTile]]:
    """The forms that run here, the configured one among them."""
    if bench.fused is None:
        return
    configured = configs.attention(bench.described, shape)
    tiles = {configured: None}
    for kernel in ("rotating", "rotated", "varlen"):
        tiles[configured._replace(kernel=kernel)] = None
    tiles[configured._replace(kernel="rotating", stages=1)] = None
    tiles[configs.invariant_attention(shape.itemsize)] = None
    if bench.all_tiles:
        tiles |= dict.fromkeys(configs.attention_candidates(bench.described, shape))
    for tile in tiles:
        if tile.kernel != "varlen" or (bench.device.type == "cuda" and shape.itemsize == 2):
            is_chosen = " (configured)" if tile == configured else ""
            yield f"nomoe {'-'.join(map(str, tile))}{is_chosen}", tile


def check_rotation(bench: Bench, tiles: Iterable[AttentionTile], lengths: list[int]) -> None:
    """Compare forms of attention with plain torch at true positions.

    Raises:
        DisagreementError: They differ.
    """
    H = bench.sizes.width // bench.sizes.heads
    qkv = bench.normal(sum(lengths), 3, bench.sizes.heads, H)
    positions_T = torch.cat([torch.arange(length) for length in lengths]).to(bench.device)
    packed = (lengths, positions_T, max(lengths), H, 10_000.0)
    expected = reference.attention(qkv.float(), reference.pack(*packed, torch.float32))
    bound = bench_moe.BOUNDS[str(bench.dtype).removeprefix("torch.")]
    for tile in tiles:
        # some rotate what they are given
        out = bench.fused.attention(qkv.clone(), bench.fused.pack(*packed, bench.dtype, tile=tile))
        harness.check_agreement(f"{tile} at true positions", out, expected, bound)


class DenseLayer(NamedTuple):
    """What a product takes."""

    weight_OI: Tensor
    bias_O: Tensor


def dense_works(bench: Bench, tokens: int) -> Iterator[tuple[Work, list[Any]]]:
    """The four products with one matrix, with their bias and GELU."""
    D, F_ = bench.sizes.width, bench.sizes.ffn_width
    for name, inner, outer, gelu in (
        ("fc1 with GELU", D, F_, True),
        ("fc2", F_, D, False),
        ("Wqkv", D, 3 * D, False),
        ("out_proj", D, D, False),
    ):
        x_TI = bench.normal(tokens, inner)
        # a forward reads each matrix once, and no cache has it before
        cold = bench_moe.COLD_BYTES // (inner * outer * x_TI.itemsize)
        calls = max(LAYERS, 1 + cold if bench.device.type == "cuda" else 0)
        weights = bench.for_each_call(outer, inner, scale=inner**-0.5, calls=calls)
        layers = list(map(DenseLayer, weights, bench.for_each_call(outer, calls=calls)))
        runs = {"torch": lambda one, x=x_TI, gelu=gelu: reference.linear(x, *one, gelu=gelu)}
        shape = DenseShape(inner, outer, x_TI.itemsize, tokens, gelu)
        for label, tile in dense_tiles(bench, shape):
            runs[label] = partial(own_linear, bench.fused, x_TI, tile, gelu)
        moved = (inner * outer + tokens * (inner + outer)) * x_TI.itemsize
        yield (
            Work(
                f"{name}, {tokens:,} tokens",
                tokens,
                runs,
                lambda one, x=x_TI, gelu=gelu: reference.linear(
                    x.float(), one.weight_OI.float(), one.bias_O.float(), gelu=gelu
                ),
                "torch",
                flop=2 * tokens * inner * outer,
                bytes=moved,
                ceilings=[
                    Ceiling(
                        "ceiling: product",
                        partial(plain_product, x_TI),
                        2 * tokens * inner * outer,
                        moved,
                    ),
                    copy_ceiling(moved, bench.device, calls),
                ],
            ),
            layers,
        )


def plain_product(x_TI: Tensor, layer: DenseLayer) -> Tensor:
    """Torch's product alone."""
    with harness.fastest_products(x_TI.device):
        return x_TI @ layer.weight_OI.T


def own_linear(fused: Any, x_TI: Tensor, tile: Tile, gelu: bool, layer: DenseLayer) -> Tensor:
    """A product by one of the kernels."""
    out: Tensor = fused.linear(x_TI, *layer, gelu=gelu, tile=tile)
    return out


def dense_tiles(bench: Bench, shape: DenseShape) -> Iterator[tuple[str, Tile]]:
    """The configured tile, or the one that would be; that of batch_invariant=True; all if asked."""
    if bench.fused is None:
        return
    device = bench.described
    configured = configs.dense(device, shape)
    one = configs.Shape(1, shape.inner, shape.outer, shape.itemsize, shape.rows)
    tiles = {}
    if configured == "library":
        tiles[configs.largest(device, one, shape.inner, shape.outer)] = None
    else:
        tiles[configured] = None
    tiles[configs.invariant_tile(device, shape.itemsize)] = None
    if bench.all_tiles:
        tiles |= dict.fromkeys(configs.dense_candidates(device, shape))
    for tile in tiles:
        is_chosen = " (configured)" if tile == configured else ""
        yield f"nomoe {'-'.join(map(str, tile[:6]))}{is_chosen}", tile


def row_works(bench: Bench, tokens: int, kind: str) -> Iterator[tuple[Work, list[Any]]]:
    """What works on whole rows: embedding and norm, residual and norm, the same and the router."""
    D = bench.sizes.width
    vectors = bench.for_each_call(3, D)
    item = bench.dtype.itemsize
    layers: list[Any] = vectors
    if kind == "embed":
        words_VD = bench.normal(bench.sizes.vocabulary, D)
        generator = torch.Generator().manual_seed(SEED)
        # ids of their own for each call: the table is too large to be there six times
        layers = [
            (
                torch.randint(len(words_VD), (tokens,), generator=generator).to(bench.device),
                *vector_3D,
            )
            for vector_3D in vectors
        ]

        def run(module: Any, one: Any) -> Tensor:
            ids_T, type_D, *norm = one
            return module.embed(ids_T, words_VD, type_D, Norm(*norm, 1e-5))

        title, moved = "embedding and LayerNorm", tokens * (2 * D * item + 8)
    elif kind == "norm":
        layers = list(zip(bench.for_each_call(2, tokens, D), vectors, strict=True))

        def run(module: Any, one: Any) -> Tensor:
            (x_TD, y_TD), (weight_D, bias_D, _) = one
            return module.add_layer_norm(x_TD, y_TD, Norm(weight_D, bias_D, 1e-5))

        title, moved = "residual and LayerNorm", 3 * tokens * D * item
    else:
        routers = bench.for_each_call(bench.sizes.experts, D, scale=D**-0.5)
        layers = list(zip(bench.for_each_call(2, tokens, D), routers, strict=True))
        norm = Norm(*vectors[0][:2], 1e-5)

        def routed(module: Any, one: Any) -> Any:
            (x_TD, y_TD), router_ED = one
            return module.add_norm_route(x_TD, y_TD, norm, router_ED, TOP_K)

        def run(module: Any, one: Any) -> Tensor:
            return routed(module, one)[0]

        title, moved = "residual, LayerNorm and route", tokens * (3 * D * item + TOP_K * 12)

    def check() -> None:
        if kind == "route" and bench.fused is not None:
            for one in layers:
                found, expected = (routed(module, one)[1:] for module in (bench.fused, reference))
                bench_moe.check_routing(f"{title}, {tokens:,} tokens", found, expected)

    runs = {"torch": partial(run, reference)}
    if bench.fused is not None:
        runs["nomoe"] = partial(run, bench.fused)
    yield (
        Work(
            f"{title}, {tokens:,} tokens",
            tokens,
            runs,
            lambda one: run(reference, one).float(),
            "torch",
            flop=0,
            bytes=moved,
            ceilings=[copy_ceiling(moved, bench.device)],
            check=check,
        ),
        layers,
    )


def pool_works(bench: Bench, texts: int, length: int) -> Iterator[tuple[Work, list[Any]]]:
    """Mean and norm of texts of one length."""
    D, lengths, pooling = (
        bench.sizes.width,
        [length] * texts,
        Pooling(bench.sizes.width, False, True),
    )
    layers = bench.for_each_call(texts * length, D)
    lengths_B1 = torch.tensor(lengths, device=bench.device)[:, None]
    text_T = torch.arange(texts, device=bench.device).repeat_interleave(length)

    def stock_pool(hidden_TD: Tensor) -> Tensor:
        sum_BD = torch.zeros(texts, D, device=bench.device).index_add(0, text_T, hidden_TD.float())
        return F.normalize(sum_BD / lengths_B1, dim=1)

    runs = {"torch": stock_pool}
    if bench.fused is not None:
        starts = torch.arange(texts + 1, dtype=torch.int32, device=bench.device) * length
        # as an engine has it: where texts start is on the device already
        runs["nomoe"] = lambda one: bench.fused.pool_between(one, starts, pooling)
    moved = texts * D * (length * layers[0].itemsize + 4)
    yield (
        Work(
            f"pooling, {texts} x {length:,} tokens",
            texts * length,
            runs,
            lambda one: reference.pool(one.float(), lengths, pooling),
            "torch",
            flop=0,
            bytes=moved,
            ceilings=[copy_ceiling(moved, bench.device)],
        ),
        layers,
    )


def product_ceiling(bench: Bench, rows: int, inner: int, outer: int) -> Ceiling:
    """Torch's product of (rows, inner) with (inner, outer)."""
    x, weight = bench.normal(rows, inner), bench.normal(inner, outer)
    moved = (inner * outer + rows * (inner + outer)) * x.itemsize

    def run(one: Any) -> Tensor:
        with harness.fastest_products(bench.device):
            return x @ weight

    return Ceiling("ceiling: product", run, 2 * rows * inner * outer, moved)


def works(
    bench: Bench, kind: str, tokens: tuple[int, ...], texts: tuple[tuple[int, int], ...]
) -> Iterator[tuple[Work, list[Any]]]:
    """All works of a kind, each drawn when it is asked for, with what its six calls are given."""
    if kind in ("attention", "pool"):
        for count, length in texts:
            make = attention_works if kind == "attention" else pool_works
            yield from make(bench, count, length)
        return
    for count in tokens:
        if kind == "dense":
            yield from dense_works(bench, count)
        else:
            yield from row_works(bench, count, kind)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = script.parser(
        "Time attention, dense products, norms, pooling.",
        repeats=10,
        smoke="toy sizes and few tokens",
    )
    parser.add_argument(
        "--only", nargs="+", choices=KINDS, default=list(KINDS), help="which kernels"
    )
    parser.add_argument("--tiles", action="store_true", help="every tile of the tuner's menu")
    parser.add_argument(
        "--tokens", type=int, nargs="+", help="tokens of a batch, where no text ends"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    args = script.parse(parser, arguments, counts=["tokens"])
    tokens = tuple(args.tokens or (SMOKE_TOKENS if args.smoke else TOKENS))
    device = args.device
    machine = report.machine_line(device)
    dtype = DTYPES[args.dtype]
    obstacle = bench_moe.triton_obstacle(device, dtype)
    not_run = {"nomoe": obstacle} if obstacle else {}
    fused = None
    if not obstacle:
        from nomoe_kernels import fused
    bench = Bench(SMOKE if args.smoke else REAL, dtype, device, fused, args.tiles)
    run = script.Run(
        args,
        f"bench_kernels-{device.type}-{args.dtype}",
        benchmark="bench_kernels",
        command=report.command_line(arguments),
        machine=machine,
        settings={
            "dtype": args.dtype,
            "device": str(device),
            "repeats": args.repeats,
            "warm-up": harness.WARM_UP,
            "CUDA graphs": device.type == "cuda",
        },
        not_run=not_run,
    )
    texts = SMOKE_TEXTS if args.smoke else TEXTS
    with torch.no_grad():
        for kind in tqdm(args.only, unit=" kinds", disable=None):
            with run.attempt(kind):
                for work, layers in works(bench, kind, tokens, texts):
                    with run.attempt(work.title):
                        run.measure(
                            bench_moe.build_case(work, layers, args.dtype, device),
                            calls=len(layers),
                        )
                    # before the next ones are drawn
                    del work, layers
    return run.finish()


if __name__ == "__main__":
    sys.exit(main())
