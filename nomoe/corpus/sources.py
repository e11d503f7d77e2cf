"""Which files an input names, what each holds, and how its bytes are opened."""

from __future__ import annotations

import glob
import io
import logging
import re
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

logger = logging.getLogger(__name__)

# what a file holds, by its suffix
FORMATS = {
    ".txt": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".arrows": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
}
# of the formats, those that only pyarrow reads
ARROW_FORMATS = ("parquet", "arrow")

_MAGIC = re.compile(r"[*?\[]")
_BUFFER = 1 << 20


class Source(NamedTuple):
    """One input file."""

    # a path of this machine, or a URI
    path: str
    format: str
    # bytes, and nanoseconds since 1970 (0 where the file system does not say)
    size: int
    modified: int


def find_sources(inputs: str | Path | Sequence[str | Path]) -> list[Source]:
    """List the files that an input names, in the order in which their rows count.

    Args:
        inputs: A file, a folder (all files in it and below it, but none whose name begins with "."
            or "_"), a pattern with `*`, `?`, `[...]` or `**`, or a list of those. Files of a folder
            or pattern come sorted by path. Each may be a URI that pyarrow opens, such as
            "s3://bucket/folder".

    Raises:
        FileNotFoundError: There is no such file, or a folder or pattern has none.
        ValueError: A suffix that is not known, files of several formats, or a file named twice.
        ImportError: A URI or a format that needs pyarrow, which is not installed.
    """
    given = [inputs] if isinstance(inputs, str | Path) else list(inputs)
    if not given:
        raise ValueError("no input is named")
    sources: list[Source] = []
    for one in given:
        sources += _find_remote(str(one)) if "://" in str(one) else _find_local(str(one))
    seen = set()
    for source in sources:
        if source.path in seen:
            raise ValueError(f"{source.path} is named twice")
        seen.add(source.path)
    formats = sorted({source.format for source in sources})
    if len(formats) > 1:
        raise ValueError(
            f"the input holds files of several formats ({', '.join(formats)}); name one with a "
            "pattern such as 'folder/*.parquet'"
        )
    if formats[0] in ARROW_FORMATS:
        require_pyarrow(f"reading {formats[0]} files")
    return sources


def require_pyarrow(purpose: str) -> None:
    """Say what to install where pyarrow is missing.

    Raises:
        ImportError: It is.
    """
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{purpose} needs pyarrow: pip install 'nomoe[parquet]'") from error


def look_again(source: Source) -> Source:
    """Return what a file is now.

    Raises:
        FileNotFoundError: It is gone.
    """
    if "://" not in source.path:
        return _local(Path(source.path))
    (found,) = _find_remote(source.path)
    return found


def open_source(path: str) -> BinaryIO:
    """Open a file of this machine or a URI for reading at any place."""
    if "://" not in path:
        return Path(path).open("rb", buffering=_BUFFER)
    system, inside = _file_system(path)
    # pyarrow's files are raw files to Python but for their class
    return io.BufferedReader(cast(Any, system.open_input_file(inside)), _BUFFER)


def hash_file(path: str, digest: Callable[[bytes], None]) -> None:
    """Give all bytes of a file of this machine or a URI to a digest."""
    with closing(open_source(path)) as file:
        while piece := file.read(_BUFFER):
            digest(piece)


def _find_local(given: str) -> list[Source]:
    path = Path(given).expanduser()
    if path.is_dir():
        found = [one for one in sorted(path.rglob("*")) if one.is_file()]
        return _known(
            given,
            [_local(one) for one in found if not _is_hidden(one.relative_to(path).parts)],
        )
    if path.is_file():
        return [_checked(_local(path))]
    if _MAGIC.search(given):
        found = [Path(one) for one in sorted(glob.glob(str(path), recursive=True))]
        sources = [_checked(_local(one)) for one in found if one.is_file()]
        if sources:
            return sources
        raise FileNotFoundError(f"no file matches {given!r}")
    raise FileNotFoundError(f"there is no file or folder {given}")


def _local(path: Path) -> Source:
    stat = path.stat()
    return Source(str(path), FORMATS.get(path.suffix, ""), stat.st_size, stat.st_mtime_ns)


def _file_system(uri: str) -> tuple[Any, str]:
    """Return pyarrow's file system of a URI, and the path inside it."""
    require_pyarrow(f"opening {uri}")
    import pyarrow as pa
    from pyarrow import fs

    try:
        system, inside = fs.FileSystem.from_uri(uri)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{uri} is no URI that pyarrow opens: {error}") from error
    return system, inside


def _find_remote(uri: str) -> list[Source]:
    from pyarrow import fs

    magic = _MAGIC.search(uri)
    # what is listed of a pattern: the folder before its first wild card
    root = uri[: uri.rindex("/", 0, magic.start()) + 1] if magic else uri
    system, inside = _file_system(root.rstrip("/"))
    prefix = root.rstrip("/").removesuffix(inside)
    info = system.get_file_info(inside)
    if info.type == fs.FileType.NotFound:
        raise FileNotFoundError(f"there is no file or folder {root}")

    def source(of: Any) -> Source:
        suffix = Path(of.path).suffix
        return Source(prefix + of.path, FORMATS.get(suffix, ""), of.size, of.mtime_ns or 0)

    if info.type == fs.FileType.File:
        return [_checked(source(info))]
    below = [
        one
        for one in system.get_file_info(fs.FileSelector(inside, recursive=True))
        if one.type == fs.FileType.File
    ]
    below.sort(key=lambda one: str(one.path))
    if magic:
        pattern = _glob_pattern(uri.removeprefix(prefix))
        sources = [_checked(source(one)) for one in below if pattern.fullmatch(one.path)]
        if not sources:
            raise FileNotFoundError(f"no file matches {uri!r}")
        return sources
    start = len(inside.rstrip("/")) + 1
    return _known(
        uri, [source(one) for one in below if not _is_hidden(one.path[start:].split("/"))]
    )


def _glob_pattern(text: str) -> re.Pattern[str]:
    """Translate a pattern as `glob` understands it, of which `fnmatch` lets `*` cross a slash."""
    parts = {"**/": r"(?:.*/)?", "**": r".*", "*": r"[^/]*", "?": r"[^/]"}
    pieces = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", text)
    return re.compile(
        "".join(
            parts.get(piece) or (piece if piece.startswith("[") else re.escape(piece))
            for piece in pieces
        )
    )


def _is_hidden(parts: Sequence[str]) -> bool:
    return any(part.startswith((".", "_")) for part in parts)


def _checked(source: Source) -> Source:
    if not source.format:
        raise ValueError(
            f"{source.path} has suffix {Path(source.path).suffix!r}, expected one of "
            + ", ".join(FORMATS)
        )
    return source


def _known(folder: str, found: list[Source]) -> list[Source]:
    """Keep a folder's files of known formats, and say which were left out."""
    sources = [source for source in found if source.format]
    others = [source.path for source in found if not source.format]
    if not sources:
        raise FileNotFoundError(f"{folder} holds no file with a suffix of {', '.join(FORMATS)}")
    if others:
        logger.warning(
            "%d of the files in %s have other suffixes and are left out, %s for one",
            len(others),
            folder,
            others[0],
        )
    return sources
