"""What `nomoe demo` does: the main job, offline, with random weights."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from . import data
from .encoder import Encoder
from .synthetic import write_checkpoint

_SHOWN = ("English", "German", "Russian", "Arabic", "Hindi", "Thai", "Chinese", "Korean")


def run(folder: Path | None) -> None:
    """Write a checkpoint, embed the shipped sentences, show similarities and expert use.

    Args:
        folder: Where to keep the checkpoint; None takes a temporary folder.

    Raises:
        FileExistsError: The folder already holds a checkpoint.
    """
    with tempfile.TemporaryDirectory(prefix="nomoe-demo-") as temporary:
        target = folder or Path(temporary)
        say(f"A small checkpoint in the real format, with RANDOM weights, in {target}:")
        write_checkpoint(target)
        for path in sorted(target.rglob("*")):
            if path.is_file():
                name = path.relative_to(target).as_posix()
                say(f"    {name:<36} {path.stat().st_size:>11,} bytes")
        show(Encoder.from_pretrained(target, device="cpu"))


def show(encoder: Encoder) -> None:
    """Embed the shipped sentences and print what comes out."""
    groups = data.sentences()
    texts = [text for group in groups.values() for text in group]
    started = time.perf_counter()
    documents = encoder.encode_document(texts)
    seconds = time.perf_counter() - started
    say(
        f"\n{len(texts)} sentences in {len(groups)} languages -> {documents.dtype} "
        f"{documents.shape} on {encoder.device} ({encoder.backend}, {seconds:.2f} s)"
    )

    say('\nCosine similarity of "The tide turns twice a day." across languages:')
    rows = [list(groups).index(language) * 5 for language in _SHOWN]
    similarity = encoder.similarity(documents[rows], documents[rows])
    say(" " * 10 + "".join(f"{language[:7]:>9}" for language in _SHOWN))
    for language, row in zip(_SHOWN, similarity.tolist(), strict=True):
        say(f"{language:<10}" + "".join(f"{cosine:>9.3f}" for cosine in row))

    queries = encoder.encode_query(texts)
    nearest = encoder.similarity(queries, documents).argmax(dim=1).tolist()
    found = sum(hit == row for row, hit in enumerate(nearest))
    say(f"\nEach sentence as a query: {found} of {len(texts)} find themselves among the documents.")

    routes = encoder.route(texts, prompt_name="document")
    tokens = sum(len(one) for one in routes.tokens)
    say(f"\nExpert use over {tokens:,} tokens, by MoE layer:\n{routes.table()}")
    say(
        "\nThe weights are random: this shows that everything runs, not what the model knows. With "
        "the\npublished weights:  nomoe embed texts.txt -o vectors.npy"
    )


def say(text: str) -> None:
    """Print a line."""
    print(text, flush=True)  # noqa: T201
