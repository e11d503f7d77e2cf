"""What every script shares: its options, and how it ends."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import report
import torch
from harness import DisagreementError

from nomoe.model import resolve_device


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
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    return args


def refuse(error: DisagreementError) -> int:
    """Say why there are no figures; return the exit status."""
    print(f"no speed is reported, since outputs disagree: {error}", file=sys.stderr)
    return 1


def finish(
    record: Mapping[str, Any], args: argparse.Namespace, stem: str, text: str | None = None
) -> int:
    """Print a record and write it; return the exit status.

    Args:
        record: What `report.make_record` returned, or one with as much as `report.heading` reads.
        args: What `parse` returned.
        stem: Of the files' names.
        text: The record in Markdown; None leaves that to `report.render`.
    """
    text = report.render(record) if text is None else text
    print(text)
    stem += "-smoke" if args.smoke else ""
    for path in report.write_results(record, args.output, stem, text):
        print(f"wrote {path}", file=sys.stderr)
    return 0
