"""Retrieval quality on MTEB's tasks, beside the figures of the model card.

    python benchmarks/mteb.py beir                   BEIR, English: the card has 52.86
    python benchmarks/mteb.py miracl                 MIRACL, 18 languages: the card has 65.80
    python benchmarks/mteb.py beir --tasks SciFact   some tasks of it, without the mean
    python benchmarks/mteb.py smoke                  a toy task and model, offline, in seconds

Needs nomoe[mteb], the network for weights and data sets, and for all of BEIR or MIRACL a GPU and a
day. Finished tasks are kept in MTEB's cache (~/.cache/mteb), apart from those that another program
or another version of nomoe ran, and not run again. The scores are nDCG at 10, in percent, and their
mean over tasks (BEIR) or languages (MIRACL). The card does not say how it averages: BEIR's 15 data
sets, CQADupStack as one, are the usual way.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

# the folder of this file comes first when it is run, and it is named as what it imports
sys.path[:] = [one for one in sys.path if Path(one or ".").resolve() != Path(__file__).parent]

import mteb
from datasets import Dataset
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata

import nomoe
from nomoe import data, synthetic
from nomoe.checkpoint import DEFAULT_REPO


class Toy(AbsTaskRetrieval):
    """The shipped sentences: German ones are to find the same sentence in English."""

    metadata = TaskMetadata(
        name="ToyRetrieval",
        description="German sentences find their English translation.",
        reference=None,
        type="Retrieval",
        category="t2t",
        modalities=["text"],
        dataset={"path": "local", "revision": "1"},
        eval_splits=["test"],
        eval_langs=["eng-Latn", "deu-Latn"],
        main_score="ndcg_at_10",
    )

    def load_data(self, num_proc: int | None = None, **options: object) -> None:
        """Make the data set."""
        sentences = data.sentences()
        corpus = [
            {"id": f"d{i}", "text": text, "title": ""}
            for i, text in enumerate(sentences["English"])
        ]
        queries = [{"id": f"q{i}", "text": text} for i, text in enumerate(sentences["German"])]
        split = {
            "corpus": Dataset.from_list(corpus),
            "queries": Dataset.from_list(queries),
            "relevant_docs": {f"q{i}": {f"d{i}": 1} for i in range(len(queries))},
            "top_ranked": None,
        }
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


def main() -> None:
    """Run one benchmark and print its scores."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("benchmark", choices=["beir", "miracl", "smoke"])
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="only these of its tasks")
    parser.add_argument("--model", default=DEFAULT_REPO, help="a folder or a repository")
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="float32", help="float32, float16 or bfloat16")
    options = parser.parse_args()

    published = data.published()["card_benchmarks"]
    if options.benchmark == "smoke":
        with tempfile.TemporaryDirectory() as folder:
            synthetic.write_checkpoint(Path(folder) / "tiny")
            model = nomoe.mteb_model(Path(folder) / "tiny", device="cpu")
            report(mteb.evaluate(model, [Toy()], cache=None, show_progress_bar=False), None)
        return
    tasks = (
        list(mteb.get_benchmark("BEIR").tasks)
        if options.benchmark == "beir"
        else list(mteb.get_tasks(tasks=["MIRACLRetrieval"]))
    )
    if options.tasks:
        known = [task.metadata.name for task in tasks]
        unknown = sorted(set(options.tasks) - set(known))
        if unknown:
            parser.error(f"no task of {options.benchmark} is named {unknown}; known: {known}")
        tasks = [task for task in tasks if task.metadata.name in options.tasks]
    model = nomoe.mteb_model(options.model, device=options.device, dtype=options.dtype)
    card = None if options.tasks else published[options.benchmark.upper()]
    report(mteb.evaluate(model, tasks), card)


def report(result: mteb.ModelResult, card: float | None) -> None:
    """Print nDCG@10 of each task, of each language where there are several, and the mean."""
    means = []
    for task in result.task_results:
        for split, scores in task.scores.items():
            if len(scores) > 1:
                for score in scores:
                    print(f"  {score['hf_subset']:<28}{100 * score['main_score']:8.2f}  ({split})")
        means.append(100 * task.get_score())
        print(f"{task.task_name:<30}{means[-1]:8.2f}")
    print(f"{'mean':<30}{sum(means) / len(means):8.2f}")
    if card is not None:
        print(f"{'model card':<30}{card:8.2f}")
    print(f"{result.model_name} at {result.model_revision}, nomoe {nomoe.__version__}")


if __name__ == "__main__":
    main()
