"""Which files an input names, what each holds, and how its bytes are opened."""

from __future__ import annotations

import errno
import fnmatch
import io
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast
from urllib.parse import quote, unquote

from ..tokenizer import is_table

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
# what pyarrow's file systems take after a path: "?region=us-east-1&scheme=http"
_OPTIONS = re.compile(r"\?\w+=[^/?*]*$")
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4")
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
            or "_"), a pattern with `*`, `?`, `[...]` or `**` (which pass over names that begin with
            "."), or a list of those. Files of a folder or pattern come sorted by path, folder by
            folder; links are followed, and a file that is met twice is taken once. Each may be a
            URI that pyarrow opens, such as "s3://bucket/folder", with the options of its file
            system at the end ("?region=us-east-1").

    Raises:
        FileNotFoundError: There is no such file, or a folder or pattern has none.
        ValueError: Standard input ("-"), a suffix that is not known, a compressed file, files of
            several formats, a file named twice, or a name that is not UTF-8.
        ImportError: A URI or a format that needs pyarrow, which is not installed.
        TypeError: Something other than a str or a Path.
    """
    given: list[Any] = [inputs]
    if isinstance(inputs, Iterable) and not isinstance(inputs, str) and not is_table(inputs):
        given = list(inputs)
    for one in given:
        if not isinstance(one, str | Path):
            raise TypeError(
                f"the input is {type(one).__name__}, expected names of files; texts in memory are "
                "for Encoder.encode and Encoder.stream"
            )
    if not given:
        raise ValueError("no input is named")
    if "-" in map(str, given) and not Path("-").exists():
        raise ValueError(
            "standard input cannot be read, since the input is read twice: write it to a file"
        )
    sources: list[Source] = []
    for one in given:
        sources += _find_remote(str(one)) if "://" in str(one) else _find_local(str(one))
    seen = set()
    for source in sources:
        if not _is_utf8(source.path):
            raise ValueError(f"{source.path!r} is a name that is not UTF-8; rename the file")
        path = resolved(source.path)
        if path in seen:
            raise ValueError(f"{source.path} is named twice")
        seen.add(path)
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
    from pyarrow import fs

    system, inside = _file_system(source.path)
    info = system.get_file_info(inside)
    if info.type == fs.FileType.NotFound:
        raise FileNotFoundError(f"there is no file {source.path} any more")
    return source._replace(size=info.size, modified=info.mtime_ns or 0)


def resolved(path: str) -> str:
    """Return one name for whatever names one file: of this machine the path without links."""
    if path.startswith("file://"):
        path = unquote(_OPTIONS.sub("", path).removeprefix("file://"))
    return path if "://" in path else str(Path(path).expanduser().resolve())


def open_source(path: str) -> BinaryIO:
    """Open a file of this machine or a URI for reading at any place.

    An OSError of a read has an errno and the path as its filename, which tells it from what pyarrow
    raises of damaged data.
    """
    if "://" not in path:
        return io.BufferedReader(_NamedFile(io.FileIO(path), path), _BUFFER)
    system, inside = _file_system(path)
    return io.BufferedReader(_NamedFile(system.open_input_file(inside), path), _BUFFER)


class _NamedFile(io.RawIOBase):
    """A raw file of Python or pyarrow; their own errors have no name, and pyarrow's no errno."""

    def __init__(self, file: Any, path: str) -> None:
        self._file = file
        self._path = path

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    @contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            message = error.strerror or str(error)
            raise OSError(error.errno or errno.EIO, message, self._path) from error

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        # the size may have to be asked of a network; any other place that is wrong is damage
        if whence != io.SEEK_END:
            return int(self._file.seek(offset, whence))
        with self._naming():
            return int(self._file.seek(offset, whence))

    def readinto(self, buffer: Any) -> int | None:
        with self._naming():
            return cast("int | None", self._file.readinto(buffer))

    def close(self) -> None:
        self._file.close()
        super().close()


def takes_in(given: str, path: Path) -> bool:
    """Say whether an input that is a folder or a pattern takes in a file, were it there.

    Args:
        given: As for `find_sources`.
        path: A file of this machine, without links.
    """
    if "://" in given and not given.startswith("file://"):
        return False
    if "://" in given:
        given = _OPTIONS.sub("", given)
    here = Path(given).expanduser()
    is_pattern = bool(_MAGIC.search(given)) and not here.exists()
    text = unquote(given) if "://" in given else here.as_posix()
    root, pattern = split_pattern(text)
    folder = Path(resolved((root or ".") if is_pattern else given))
    if folder not in path.parents:
        return False
    inside = path.relative_to(folder)
    if is_pattern:
        return _glob_pattern(pattern).fullmatch(inside.as_posix()) is not None
    return path.suffix.lower() in FORMATS and not _is_hidden(inside.parts)


def hash_file(path: str, digest: Callable[[bytes], None]) -> None:
    """Give all bytes of a file of this machine or a URI to a digest."""
    with closing(open_source(path)) as file:
        while piece := file.read(_BUFFER):
            digest(piece)


def _find_local(given: str) -> list[Source]:
    path = Path(given).expanduser()
    if path.is_dir():
        shown = [one for one in _walk(path) if not _is_hidden(one.relative_to(path).parts)]
        return _known(given, [_local(one) for one in _once(shown)])
    if path.is_file():
        return [_checked(_local(path))]
    if _MAGIC.search(given):
        root, pattern = split_pattern(path.as_posix())
        below = Path(root)
        if not below.is_dir():
            raise FileNotFoundError(f"there is no folder {below}, where {given!r} begins")
        wanted = _glob_pattern(path.as_posix())
        depth = None if "**" in pattern else pattern.count("/") + 1
        matching = [one for one in _walk(below, depth) if wanted.fullmatch(one.as_posix())]
        sources = [_checked(_local(one)) for one in _once(matching)]
        if sources:
            return sources
        raise FileNotFoundError(f"no file matches {given!r}")
    raise FileNotFoundError(f"there is no file or folder {given}")


def _walk(
    folder: Path, depth: int | None = None, above: frozenset[tuple[int, int]] = frozenset()
) -> Iterator[Path]:
    """Yield what is no folder, down to a depth, sorted; no link leads back into its own folder."""
    stat = folder.stat()
    here = (stat.st_dev, stat.st_ino)
    if here in above:
        return
    for path in sorted(folder.iterdir()):
        if not path.is_dir():
            yield path
        elif depth is None or depth > 1:
            yield from _walk(path, None if depth is None else depth - 1, above | {here})


def _once(paths: Iterable[Path]) -> Iterator[Path]:
    """Yield each file once, under the first of its names."""
    seen: dict[Path, Path] = {}
    for path in paths:
        if path.is_symlink() and not path.exists():
            logger.warning("%s is a link to nothing and is left out", path)
        if not path.is_file():
            continue
        first = seen.setdefault(path.resolve(), path)
        if first is path:
            yield path
        else:
            logger.warning("%s is the same file as %s and is left out", path, first)


def _local(path: Path) -> Source:
    stat = path.stat()
    return Source(str(path), _format(path), stat.st_size, stat.st_mtime_ns)


def _format(path: Path) -> str:
    """Return a file's format by its suffix, "" where that says none."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if len(suffixes) == 2 and suffixes[0] in FORMATS and suffixes[1] in _COMPRESSED:
        raise ValueError(
            f"{path} is compressed, and cannot be entered at a row: unpack it, or write it as "
            "Parquet, which is smaller still"
        )
    return FORMATS.get(path.suffix.lower(), "")


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
    # what is listed of a pattern: the folder before its first wild card
    bare = _OPTIONS.sub("", uri)
    options = uri.removeprefix(bare)
    root, magic = split_pattern(bare)
    system, inside = _file_system(root.rstrip("/") + options)
    from pyarrow import fs

    prefix = unquote(root.rstrip("/")).removesuffix(inside)
    info = system.get_file_info(inside)
    if info.type == fs.FileType.NotFound:
        hint = "; a question mark of a name is %3F" if options else ""
        raise FileNotFoundError(f"there is no file or folder {root}{hint}")

    def source(of: Any) -> Source:
        path = prefix + quote(of.path, safe="/:=@+,") + options
        return Source(path, _format(Path(of.path)), of.size, of.mtime_ns or 0)

    if info.type == fs.FileType.File:
        return [_checked(source(info))]
    listed = system.get_file_info(fs.FileSelector(inside, recursive=True))
    try:
        below = [one for one in listed if one.type == fs.FileType.File]
        below.sort(key=lambda one: one.path.split("/"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{root} holds a name that is not UTF-8; rename the file") from error
    if magic:
        pattern = _glob_pattern(unquote(bare).removeprefix(prefix))
        sources = [_checked(source(one)) for one in below if pattern.fullmatch(one.path)]
        if not sources:
            raise FileNotFoundError(f"no file matches {uri!r}")
        return sources
    start = len(inside.rstrip("/")) + 1
    return _known(
        uri, [source(one) for one in below if not _is_hidden(one.path[start:].split("/"))]
    )


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def split_pattern(text: str) -> tuple[str, str]:
    """Split a pattern into the folder before its first wild card and the rest; else ("...", "")."""
    magic = _MAGIC.search(text)
    if not magic:
        return text, ""
    start = text.rfind("/", 0, magic.start()) + 1
    return text[:start], text[start:]


def _glob_pattern(text: str) -> re.Pattern[str]:
    """Translate a pattern as `glob` understands it, of which `fnmatch` lets `*` cross a slash."""
    # a wild card stands for no name that begins with "."
    shown = r"(?!(?:(?<=/)|^)\.)"
    parts = {
        "**/": r"(?:(?!\.)[^/]+/)*",
        "**": r"(?:(?!\.)[^/]+/)*(?!\.)[^/]+",
        "*": shown + r"[^/]*",
        "?": shown + r"[^/]",
    }
    # every second piece is a wild card; the first character of a class may be "]"
    pieces = re.split(r"(\*\*/|\*\*|\*|\?|\[(?:![^/]|[^!/])[^\]/]*\])", text)
    pieces[::2] = map(re.escape, pieces[::2])
    pieces[1::2] = [parts.get(one) or shown + _glob_class(one) for one in pieces[1::2]]
    return re.compile("".join(pieces))


def _glob_class(piece: str) -> str:
    # "(?s:[a-c])\Z", of which the end of the text is not meant
    translated = fnmatch.translate(piece)
    return "(?!/)" + translated[: translated.rindex(")") + 1]


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
