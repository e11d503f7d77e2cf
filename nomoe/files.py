"""Files that are either whole or not there."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt


def check_output(path: Path, suffixes: Sequence[str], *, overwrite: bool) -> None:
    """Refuse an output that cannot be written, before any work.

    Raises:
        ValueError: Another suffix.
        FileNotFoundError: Its folder is absent.
        FileExistsError: It exists, and `overwrite` is not set.
        OSError: Its folder is not writable.
    """
    if path.suffix not in suffixes:
        raise ValueError(f"{path} has suffix {path.suffix!r}, expected {' or '.join(suffixes)}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} into")
    if path.is_dir():
        raise FileExistsError(f"{path} is a folder")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; --overwrite replaces it")
    trial = _beside(path)
    trial.touch(exist_ok=False)
    trial.unlink()


@contextmanager
def atomic_output(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`, which takes its name only if the block ends well."""
    unfinished = _beside(path)
    try:
        # not tempfile, whose files are private: the result is to be as open as any new file
        with unfinished.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        _sync_folder(path.parent)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    """Make a new name as durable as the file, where a folder can be opened."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


class NpyWriter:
    """Writes (m, d) arrays as one .npy, whose length is known at the end.

    Args:
        file: At its beginning.
        dim: Numbers of a row.
        dtype: Their type.
    """

    def __init__(self, file: BinaryIO, dim: int, dtype: npt.DTypeLike) -> None:
        self._file = file
        self._dim = dim
        self._dtype = np.dtype(dtype)
        self.rows = 0
        self._write_header()
        self._start = file.tell()

    def _write_header(self) -> None:
        # numpy pads the header so that the first axis can grow in place
        header = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False}
        np.lib.format.write_array_header_1_0(self._file, header | {"shape": (self.rows, self._dim)})

    def write(self, part: npt.NDArray[Any]) -> None:
        """Append rows."""
        self._file.write(np.ascontiguousarray(part, self._dtype).tobytes())
        self.rows += len(part)

    def finish(self) -> None:
        """Write the number of rows; all are in.

        Raises:
            RuntimeError: numpy left no room for it.
        """
        self._file.seek(0)
        self._write_header()
        if self._file.tell() != self._start:
            raise RuntimeError("numpy left no room in the .npy header for the number of rows")
        self._file.seek(0, os.SEEK_END)
