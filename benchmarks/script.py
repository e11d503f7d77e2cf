"""What every script shares: its options, and how it ends."""

from __future__ import annotations

import argparse
import datetime
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import harness
import report
import torch
from harness import Case
from tqdm.auto import tqdm

from nomoe.arguments import resolve_device


def parser(
    description: str,
    *,
    repeats: int | None,
    smoke: str = "a toy model, in seconds",
    device: bool = True,
) -> argparse.ArgumentParser:
    """Make a parser with the options that scripts have in common.

    Args:
        description: What the script does.
        repeats: Timed calls of each contender, by default; None where nothing is timed.
        smoke: What --smoke does.
        device: Offer --device.
    """
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--smoke", action="store_true", help=smoke)
    if device:
        made.add_argument("--device", help="cpu, cuda, ...; by default a GPU where there is one")
    if repeats is not None:
        made.add_argument(
            "--repeats", type=int, default=repeats, help="timed calls of each contender"
        )
    made.add_argument("--threads", type=int, help="CPU threads; by default torch's own choice")
    made.add_argument("--output", type=Path, default=report.RESULTS, help="folder for results")
    return made


def parse(
    made: argparse.ArgumentParser, arguments: Sequence[str], counts: Sequence[str] = ()
) -> argparse.Namespace:
    """Parse, refuse counts below one, find the device, and set the number of threads.

    Args:
        made: What `parser` made, with what the script added.
        arguments: Of the command line.
        counts: Further options that count something.
    """
    args = made.parse_args(arguments)
    for name in ("repeats", "threads", *counts):
        value = getattr(args, name, None)
        least = min(value) if isinstance(value, list) else value
        if least is not None and least < 1:
            made.error(f"--{name.replace('_', '-')} is {least}, expected at least 1")
    if hasattr(args, "device"):
        try:
            args.device = resolve_device(args.device)
        except (ValueError, RuntimeError) as error:
            made.error(str(error))
        if args.device.type == "cuda":
            # graphs are captured on the current device
            torch.cuda.set_device(args.device.index or 0)
    else:
        args.device = torch.device("cpu")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    return args


class Run:
    """A run's cases, measured one by one and written after each: nothing that is known gets lost.

    Args:
        args: What `parse` returned.
        stem: Of the files' names.
        about: What `report.make_record` is told beside the cases.
    """

    def __init__(self, args: argparse.Namespace, stem: str, **about: Any) -> None:
        self._args, self._stem = args, stem
        self._about = {"date": datetime.date.today().isoformat(), **about}
        self._cases: list[dict[str, Any]] = []
        self._left_out: dict[str, str] = {}
        self._paths: tuple[Path, Path] | None = None

    @contextmanager
    def attempt(self, title: str) -> Iterator[None]:
        """Leave a case out whose outputs disagree, or that fails otherwise; say so, and go on.

        Writes what is known so far.

        Raises:
            OSError: It cannot be written.
        """
        why = None
        try:
            yield
        except harness.DisagreementError as error:
            why = disagreement(error)
        # whatever it is, the next case may do without it
        except Exception as error:
            tqdm.write(traceback.format_exc(), file=sys.stderr)
            why = f"{title} failed: {type(error).__name__}: {error}"
        if why is not None:
            tqdm.write(why, file=sys.stderr)
            self._left_out[title] = why
        self._write(complete=False)

    def measure(
        self,
        case: Case,
        *,
        repeats: int | None = None,
        warm_up: int = harness.WARM_UP,
        bar: tqdm[Any] | None = None,
        **more: Any,
    ) -> None:
        """Time a case's contenders, within an `attempt`.

        Args:
            case: The work.
            repeats: As `harness.measure` takes it; by default that of the command line.
            warm_up: The same.
            bar: The same.
            more: What else the record is to hold of this case.

        Raises:
            DisagreementError: An output is not the expected one.
        """
        measured = harness.measure(
            case,
            repeats=repeats or self._args.repeats,
            warm_up=warm_up,
            device=self._args.device,
            bar=bar,
        )
        self._cases.append(report.case_record(case, measured) | more)

    def finish(self) -> int:
        """Print the record and write it; return the exit status, 1 if a case was left out."""
        print(self._write(complete=True))
        for path in self._paths or ():
            print(f"wrote {path}", file=sys.stderr)
        return 1 if self._left_out else 0

    def _write(self, *, complete: bool) -> str:
        record = report.make_record(
            cases=self._cases, left_out=self._left_out, complete=complete, **self._about
        )
        if self._paths is None:
            self._paths = _paths(self._args, record["date"], self._stem)
        text = report.render(record)
        report.write_results(record, self._paths, text)
        return text


def disagreement(error: harness.DisagreementError) -> str:
    """Say why there are no figures."""
    return f"outputs disagree, so that no speed is reported: {error}"


def finish(record: Mapping[str, Any], args: argparse.Namespace, stem: str, text: str) -> int:
    """Print a record that is not of a `Run` and write it; return the exit status.

    Args:
        record: With as much as `report.heading` reads.
        args: What `parse` returned.
        stem: Of the files' names.
        text: The record in Markdown.
    """
    print(text)
    paths = _paths(args, record["date"], stem)
    report.write_results(record, paths, text)
    for path in paths:
        print(f"wrote {path}", file=sys.stderr)
    return 0


def _paths(args: argparse.Namespace, date: str, stem: str) -> tuple[Path, Path]:
    return report.result_paths(args.output, date, stem + ("-smoke" if args.smoke else ""))
