"""The command line. Nothing here imports torch before a command runs, so that --help is quick."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .signals import end_politely

if TYPE_CHECKING:
    from .encoder import Encoder

# from checkpoint.py, which would import torch
_DEFAULT_REPO = "nomic-ai/nomic-embed-text-v2-moe"
# and from corpus/embedder.py
_PRECISIONS = ("float32", "float16", "int8", "uint8", "binary", "ubinary")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns 0, 1 where `verify` finds a miss, 2 on an error."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(format="nomoe: %(message)s", level=logging.WARNING)
    command = {
        "demo": _demo,
        "embed": _embed,
        "verify": _verify,
        "route": _route,
        "info": _info,
    }[options.command]
    earlier = end_politely()
    try:
        return command(options)
    except KeyboardInterrupt:
        print("nomoe: interrupted", file=sys.stderr)
        return 130
    # what bad input, an absent file or an unable machine raises; any other bug shows itself
    except (ValueError, OSError, RuntimeError, ImportError, MemoryError) as error:
        if options.traceback:
            raise
        # a MemoryError may say nothing
        print(f"nomoe: error: {str(error) or repr(error)}", file=sys.stderr)
        return 2
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nomoe", description="Multilingual embeddings with nomic-embed-text-v2-moe."
    )
    parser.add_argument("--version", action="version", version=f"nomoe {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, summary: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=summary, description=summary)

    demo = add("demo", "Embed twenty languages with a model of random weights, offline.")
    demo.add_argument(
        "--folder", type=Path, help="keep the checkpoint there (default: a temporary folder)"
    )

    embed = add("embed", "Embed the texts of files, and go on where a run was interrupted.")
    embed.add_argument(
        "input",
        nargs="+",
        metavar="INPUT",
        help=".parquet, .arrow, .jsonl, .csv or .txt (a text a line); a folder, a pattern, a URI",
    )
    embed.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="OUT",
        help="a folder of Parquet shards, which resumes; or one .npy, .jsonl or .parquet file",
    )
    embed.add_argument(
        "--prompt",
        default="document",
        metavar="NAME",
        help="prompt of every text: query, document, ...; '' for none (default: %(default)s)",
    )
    embed.add_argument(
        "--dim", type=int, help="keep the first features only (default: as the model says, or all)"
    )
    embed.add_argument("--column", default="text", help="where the text is (default: %(default)s)")
    embed.add_argument(
        "--columns",
        metavar="NAMES",
        help="columns that go along, with commas; '' for none (default: all)",
    )
    embed.add_argument(
        "--precision",
        choices=_PRECISIONS,
        default="float32",
        help="of the vectors that are written (default: %(default)s)",
    )
    embed.add_argument("--max-seq-length", type=int, metavar="TOKENS", help="(default: 512)")
    embed.add_argument("--batch-tokens", type=int, metavar="TOKENS", help="most tokens of a batch")
    embed.add_argument(
        "--on-bad",
        choices=("fail", "skip"),
        default="fail",
        help="rows without a text: refuse the input, or leave them out (default: %(default)s)",
    )
    embed.add_argument("--limit", type=int, metavar="ROWS", help="read only so many rows")
    embed.add_argument(
        "--shard-rows", type=int, metavar="ROWS", help="(default: 4096 on a CPU, 32768 on a GPU)"
    )
    embed.add_argument(
        "--workers",
        type=int,
        metavar="PROCESSES",
        help="(default: one for each GPU; on a CPU one for each 8 cores)",
    )
    embed.add_argument(
        "--dry-run", action="store_true", help="count, estimate time and size, write nothing"
    )
    embed.add_argument("--overwrite", action="store_true", help="replace OUT if it is a file")
    _add_model_options(embed)

    verify = add("verify", "Check this machine's results against golden data. Exits 1 on a miss.")
    verify.add_argument(
        "--reference",
        action="store_true",
        help="also compare with the reference Hugging Face code, which this downloads and runs "
        "(pip install 'nomoe[reference]')",
    )
    verify.add_argument(
        "--code-revision", metavar="COMMIT", help="of the reference code (default: the pinned one)"
    )
    _add_model_options(verify)

    route = add("route", "Show which experts the texts of a file use, layer by layer.")
    route.add_argument(
        "input",
        metavar="TEXTFILE",
        help="a file, folder, pattern or URI of what embed reads: .txt, .jsonl, ...",
    )
    route.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="PICTURE",
        help="heat map, .png, .svg or .pdf (default: TEXTFILE.routes.png; needs matplotlib)",
    )
    route.add_argument("--prompt", default="document", metavar="NAME", help="(default: document)")
    route.add_argument("--column", default="text", help="(default: text)")
    route.add_argument("--overwrite", action="store_true", help="replace PICTURE if it exists")
    _add_model_options(route)

    info = add("info", "Show versions, the device, and the backend in use and why.")
    info.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    return parser


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default=_DEFAULT_REPO,
        metavar="PATH_OR_REPO",
        help="folder or Hub repository (default: %(default)s, pinned)",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a Hub repository")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="of the model (default: float32 on a CPU, float16 on CUDA)",
    )
    parser.add_argument(
        "--backend",
        choices=("auto", "torch", "triton"),
        default="auto",
        help="kernels (default: %(default)s, the fastest that run)",
    )


def _demo(options: argparse.Namespace) -> int:
    from .demo import run

    run(options.folder)
    return 0


def _embed(options: argparse.Namespace) -> int:
    from .corpus import embed_corpus, estimate_corpus

    columns = options.columns
    settings: dict[str, Any] = {
        "overwrite": options.overwrite,
        "model": options.model,
        "revision": options.revision,
        "device": options.device,
        "dtype": options.dtype,
        "backend": options.backend,
        "prompt_name": options.prompt or None,
        "prompt": None if options.prompt else "",
        "dim": options.dim,
        "precision": options.precision,
        "max_seq_length": options.max_seq_length,
        "batch_tokens": options.batch_tokens,
        "column": options.column,
        "columns": None if columns is None else [one for one in columns.split(",") if one],
        "on_bad": options.on_bad,
        "limit": options.limit,
        "shard_rows": options.shard_rows,
        "workers": options.workers,
    }
    if options.dry_run:
        for line in estimate_corpus(options.input, options.output, **settings).lines():
            print(line)
        return 0
    report = embed_corpus(options.input, options.output, **settings)
    print(f"{report.rows:,} texts -> {report.output}")
    if report.found:
        print(f"{report.found:,} of {report.shards:,} shards were there already")
    if report.bad:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in report.bad.items())
        print(f"rows left out: {reasons}")
    return 0


def _texts(options: argparse.Namespace) -> Iterator[str]:
    """Read and check the texts of the input file, one at a time."""
    from .corpus.rows import read_blocks
    from .corpus.sources import find_sources

    for source in find_sources(options.input):
        row = 0
        for block in read_blocks(source, options.column, columns=()):
            for text in block.texts:
                if text is None:
                    raise ValueError(
                        f"{source.path}, row {row} (the first is 0): "
                        + next(iter(block.problems.values()))
                    )
                row += 1
                yield text


def _load(options: argparse.Namespace, **settings: Any) -> Encoder:
    from .encoder import Encoder

    given = {
        "revision": options.revision,
        "device": options.device,
        "dtype": options.dtype,
        "backend": options.backend,
    }
    return Encoder.from_pretrained(options.model, **(given | settings))


def _verify(options: argparse.Namespace) -> int:
    import torch

    from . import data
    from .arguments import resolve_device, resolve_dtype
    from .backends import select_backend
    from .verify import Check, table, verify_golden, verify_published, verify_reference

    if options.code_revision and not options.reference:
        raise ValueError("--code-revision is of the reference code: it goes with --reference")
    for name in ("transformers", "einops") if options.reference else ():
        if find_spec(name) is None:
            raise ImportError(f"the reference code needs {name}: pip install 'nomoe[reference]'")
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    backend = select_backend(options.backend, device, dtype=dtype)
    named = str(dtype).removeprefix("torch.")
    print(f"backend {backend.name} on {device} in {named}; torch {torch.__version__}\n", flush=True)

    default = options.model == _DEFAULT_REPO
    # asked for by name, or needed for the reference, the weights have to be there
    needed = options.reference or not default
    encoder = None
    try:
        encoder = _load(options, dtype=torch.float32, local_files_only=not needed)
    except FileNotFoundError:
        if needed:
            raise
    checks = verify_golden(device, dtype, options.backend)
    if encoder is None:
        absent = "the weights are not in the local cache"
        checks.append(Check("published figures", absent, "", "skipped"))
    elif default or not options.reference:
        checks += verify_published(encoder)
    if options.reference:
        assert encoder is not None
        pinned = data.published()["checkpoint"]
        try:
            checks += verify_reference(
                encoder,
                options.model,
                options.revision or (pinned["revision"] if default else None),
                options.code_revision or (pinned["remote_code_revision"] if default else None),
            )
        except RuntimeError:
            # what was found so far is not lost
            print(table(checks), flush=True)
            raise
    print(table(checks))
    missed, skipped = (
        sum(check.result == result for check in checks) for result in ("MISS", "skipped")
    )
    verdict = f"{missed} of {len(checks)} checks missed" if missed else "all checks hold"
    print(f"\n{verdict}" + (f"; skipped: {skipped}" if skipped else ""))
    return 1 if missed else 0


def _route(options: argparse.Namespace) -> int:
    from .corpus.sources import find_sources
    from .files import check_output
    from .routes import PICTURE_SUFFIXES

    picture = options.output
    drawable = find_spec("matplotlib") is not None
    if picture and not drawable:
        raise ImportError("the picture needs matplotlib: pip install 'nomoe[plot]'")
    if drawable:
        given = Path(options.input)
        if picture is None and not given.is_file():
            find_sources(options.input)
            raise ValueError(
                f"{options.input} is not one file here: -o says where the picture goes"
            )
        picture = picture or given.with_name(given.name + ".routes.png")
        check_output(picture, PICTURE_SUFFIXES, overwrite=options.overwrite)
    texts = list(_texts(options))
    routes = _load(options).route(
        texts, prompt_name=options.prompt or None, prompt=None if options.prompt else ""
    )
    tokens = sum(len(one) for one in routes.tokens)
    title = f"expert use, {len(texts):,} texts, {tokens:,} tokens"
    print(f"{title}\n\n{routes.table()}\n")
    if drawable:
        routes.save_picture(picture, f"{Path(options.input).name}: {title}")
        print(f"picture: {picture}")
    else:
        print("for a picture: pip install 'nomoe[plot]'")
    return 0


def _info(options: argparse.Namespace) -> int:
    from .info import describe

    for name, value in describe(options.device):
        print(f"{name:<20} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
