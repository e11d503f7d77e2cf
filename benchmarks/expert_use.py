"""Count which experts the texts of each language go to, layer by layer.

    python benchmarks/expert_use.py                        the published weights
    python benchmarks/expert_use.py --model FOLDER         a checkpoint of your own
    python benchmarks/expert_use.py --smoke                small random weights, in seconds

The texts are the shipped sentences of twenty languages, as queries and as documents. Results go to
benchmarks/results/ as dated JSON and Markdown; pictures.py draws them.
"""

from __future__ import annotations

import datetime
import sys
import tempfile
from pathlib import Path

import report
import script

from nomoe import Encoder, data, synthetic
from nomoe.checkpoint import DEFAULT_REPO


def main(arguments: list[str] | None = None) -> int:
    """Count; return the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = script.parser(
        "Count which experts each language uses.", repeats=None, smoke="small random weights"
    )
    parser.add_argument("--model", help=f"a folder or repository (default: {DEFAULT_REPO})")
    args = script.parse(parser, arguments)
    machine = report.machine_line(args.device)
    with tempfile.TemporaryDirectory() as temporary:
        model = args.model or DEFAULT_REPO
        weights = str(model)
        if args.smoke and args.model is None:
            model, weights = synthetic.write_checkpoint(Path(temporary) / "tiny", "tiny"), "random"
        encoder = Encoder.from_pretrained(model, device=args.device)
        routes = {
            language: [encoder.route(texts, prompt_name=one) for one in ("query", "document")]
            for language, texts in data.sentences().items()
        }
    layers = [f"{layer}" for layer in next(iter(routes.values()))[0].layers]
    # of each language and layer, the share of routed rows that each expert has
    shares = {}
    for language, (queries, documents) in routes.items():
        counts_ME = queries.counts + documents.counts
        shares[language] = (counts_ME / counts_ME.sum(axis=1, keepdims=True)).tolist()
    record = {
        "benchmark": "expert_use",
        "date": datetime.date.today().isoformat(),
        "command": report.command_line(arguments),
        "machine": machine,
        "weights": weights,
        "layers": layers,
        "shares": shares,
    }
    cells = [["language", *(f"layer {layer}" for layer in layers)]]
    for language, by_layer in shares.items():
        busiest = (max(range(len(row)), key=row.__getitem__) for row in by_layer)
        cells.append(
            [
                language,
                *(f"e{one} {row[one]:.0%}" for one, row in zip(busiest, by_layer, strict=True)),
            ]
        )
    lines = [
        *report.heading(record),
        f"Weights: {record['weights']}. Given is the busiest expert of each layer and its share of "
        f"routed rows; an even share is {1 / len(by_layer[0]):.0%}.",
        "",
        *report.table(cells),
    ]
    return script.finish(record, args, "expert_use", "\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
