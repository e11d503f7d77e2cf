"""The manifest of an output folder: what its shards were made of and how, and which are finished.

A shard has its name only once it is whole, and carries the identity of its run. So the folder
itself says what is finished, and the manifest is written twice: before the first shard and, with
the totals, after the last.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..files import atomic_output
from .plan import File, Plan
from .sources import require_pyarrow

logger = logging.getLogger(__name__)

# readers of Parquet folders pass over names that begin so
MANIFEST_FILE = "_manifest.json"
LOCK_FILE = ".nomoe.lock"
# in a shard's own metadata
SHARD_KEY = b"nomoe"

_SHARD_NAME = re.compile(r"part-(\d{6,})\.parquet")
# what an interrupted run leaves behind
_UNFINISHED = re.compile(r"\.(part-\d{6,}\.parquet|_manifest\.json)\.[0-9a-f]{8}")
_LAYOUT = 1


@dataclass(frozen=True)
class Manifest:
    """An output folder's description."""

    # what decides the vectors and the rows, by name; a change of one is another run
    settings: dict[str, Any]
    plan: Plan
    # for the reader: where the model came from, on what it ran
    notes: dict[str, Any]
    # once all shards are there
    totals: dict[str, Any] | None = None

    @cached_property
    def run(self) -> str:
        """Identity of the run: a hash of its settings and its input."""
        decisive = [
            self.settings,
            [[file.rows, file.sha256] for file in self.plan.files],
            [[shard.first, shard.rows] for shard in self.plan.shards],
        ]
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()

    def complete(self, folder: Path) -> None:
        """Write the manifest anew, now that all shards are there.

        Raises:
            RuntimeError: They are not, and nothing had said so.
        """
        plan = self.plan
        missing = len(plan.shards) - len(finished_shards(folder, self))
        if missing:
            raise RuntimeError(f"{missing} shards are missing in {folder}: run this again")
        totals = {"rows": plan.rows, "left_out": plan.bad, "shards": len(plan.shards)}
        replace(self, totals=totals).write(folder)

    def write(self, folder: Path) -> None:
        """Put the manifest in place of an earlier one."""
        content = {
            "layout": _LAYOUT,
            "run": self.run,
            "complete": self.totals is not None,
            **({"totals": self.totals} if self.totals else {}),
            "settings": self.settings,
            "notes": self.notes,
            "input": self.plan.to_json(),
        }
        with atomic_output(folder / MANIFEST_FILE) as file:
            file.write(json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n")


def read_manifest(folder: Path) -> Manifest | None:
    """Read a folder's manifest; None where there is none.

    Raises:
        ValueError: It is damaged, or of a layout that this version does not know.
    """
    path = folder / MANIFEST_FILE
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["layout"] != _LAYOUT:
            raise ValueError(
                f"{path} has layout {content['layout']!r}, and this version knows {_LAYOUT}: go on "
                "with the version that began it, or take another folder"
            )
        manifest = Manifest(
            content["settings"],
            Plan.from_json(content["input"]),
            content["notes"],
            content.get("totals"),
        )
        run = content["run"]
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a manifest of nomoe: {error!r}") from error
    if run != manifest.run:
        raise ValueError(f"{path} was changed by hand, and no longer says what the shards are")
    return manifest


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder; the lock goes with the process, however it ends.

    Raises:
        RuntimeError: Another run is at work in it.
    """
    try:
        import filelock
    except ImportError as error:
        raise ImportError(
            "a folder of shards needs filelock: pip install 'nomoe[parquet]'"
        ) from error
    try:
        with filelock.FileLock(folder / LOCK_FILE, timeout=0):
            yield
    except filelock.Timeout as error:
        raise RuntimeError(
            f"another run is at work in {folder}; wait for it or end it, then run this again"
        ) from error


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds something else, and one that cannot be written.

    Raises:
        FileNotFoundError: There is no folder to make it in.
        ValueError: It holds files, but no manifest.
        OSError: It is a file, or cannot be written.
    """
    require_pyarrow("writing Parquet")
    is_new = not folder.exists()
    if is_new and not folder.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {folder.parent} to make {folder.name} in")
    if not is_new and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file, expected a folder")
    place = folder.parent if is_new else folder
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))
    if is_new:
        return
    others = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if others and MANIFEST_FILE not in others:
        raise ValueError(
            f"{folder} holds {others[0]} but no {MANIFEST_FILE}, so it was not begun by nomoe; "
            "take an empty folder"
        )


def remove_unfinished(folder: Path) -> None:
    """Remove what interrupted runs left; only under the lock."""
    for path in folder.iterdir():
        if _UNFINISHED.fullmatch(path.name):
            path.unlink(missing_ok=True)


def remove_empty(folder: Path) -> None:
    """Remove a folder that holds nothing but the lock; only under it."""
    if all(path.name == LOCK_FILE for path in folder.iterdir()):
        # Windows lets nobody remove what is open
        with suppress(OSError):
            (folder / LOCK_FILE).unlink()
            folder.rmdir()


def check_same(begun: Manifest, now: Mapping[str, Any], folder: Path) -> None:
    """Refuse settings other than those that a folder's shards were made with.

    Raises:
        ValueError: Some differ; each is named with both values.
    """
    changed = [
        f"{name} was {begun.settings.get(name)!r} and is now {now.get(name)!r}"
        for name in sorted(begun.settings.keys() | now.keys())
        if begun.settings.get(name) != now.get(name)
    ]
    if changed:
        raise ValueError(
            f"{folder} was begun with other settings, and shards are not mixed: "
            + "; ".join(changed)
            + ". Use the same settings to go on, or take another folder"
        )


def check_same_input(begun: Plan, now: Plan, folder: Path) -> None:
    """Refuse an input whose rows are not those that a folder's shards were made of.

    Raises:
        ValueError: A file was added, removed or changed.
    """

    def changed(then: File, here: File) -> bool:
        return (then.rows, then.sha256) != (here.rows, here.sha256)

    what = None
    if len(begun.files) != len(now.files):
        what = f"it was {len(begun.files)} files and is now {len(now.files)}"
    else:
        pairs = zip(begun.files, now.files, strict=True)
        paths = [here.path for then, here in pairs if changed(then, here)]
        what = f"{paths[0]} has changed" if paths else None
    if what is not None:
        raise ValueError(
            f"{folder} was begun with another input: {what}. Restore it to go on, or take another "
            "folder"
        )


def shard_path(folder: Path, index: int) -> Path:
    """Return where a shard is once it is whole."""
    return folder / f"part-{index:06d}.parquet"


def shard_metadata(manifest: Manifest, index: int) -> dict[bytes, bytes]:
    """Return what a shard says of itself."""
    return {SHARD_KEY: json.dumps({"run": manifest.run, "shard": index}).encode()}


def finished_shards(folder: Path, manifest: Manifest) -> set[int]:
    """Return the shards of a run that are there and whole.

    Raises:
        ValueError: A file has a shard's name but is of another run, or is no such shard.
    """
    from pyarrow import ArrowException, parquet

    finished = set()
    for path in sorted(folder.iterdir()):
        name = _SHARD_NAME.fullmatch(path.name)
        if not name:
            continue
        index = int(name[1])
        if index >= len(manifest.plan.shards):
            raise ValueError(
                f"{path} is no shard of this run, which has {len(manifest.plan.shards)}"
            )
        try:
            found = parquet.read_metadata(path)
        except (ArrowException, OSError) as error:
            logger.warning("%s is damaged and is made again: %s", path, error)
            continue
        expected = shard_metadata(manifest, index)[SHARD_KEY]
        if (found.metadata or {}).get(SHARD_KEY) != expected:
            raise ValueError(
                f"{path} was made by another run than {MANIFEST_FILE} describes; move it away or "
                "take another folder"
            )
        if found.num_rows != manifest.plan.shards[index].rows:
            logger.warning("%s has %d rows and is made again", path, found.num_rows)
            continue
        finished.add(index)
    return finished
