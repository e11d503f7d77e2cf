"""Several processes, each with a model of its own, fed from one queue of shards."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection, get_context, process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from ..arguments import check_count
from ..signals import end_politely
from .embedder import Embedder, ModelSettings
from .manifest import Manifest, shard_metadata, shard_path
from .outputs import Output, ParquetOutput, as_arrays
from .rows import Columns
from .shards import Progress, embed_shards

# cores that one process makes good use of on a CPU
CORES_PER_PROCESS = 8
_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")


class Job(NamedTuple):
    """What every process is told once."""

    settings: ModelSettings
    manifest: Manifest
    folder: Path

    def open_output(self, shard: int) -> Output:
        """Begin a shard's file."""
        schema = self.manifest.plan.schema
        assert schema is not None
        return ParquetOutput(
            shard_path(self.folder, shard),
            schema,
            self.settings.stored_dim,
            self.settings.stored_dtype,
            shard_metadata(self.manifest, shard),
        )

    def pack(self, columns: Sequence[Columns]) -> bytes:
        """Make bytes of rows' columns, as the output has them; `unpack` makes rows of them."""
        import pyarrow as pa

        schema = self.manifest.plan.schema
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, schema) as writer:
            for part in columns:
                arrays = as_arrays(part, schema)
                writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
        return bytes(sink.getvalue())

    def unpack(self, packed: bytes) -> list[Columns]:
        """As `pack`."""
        import pyarrow as pa

        return list(pa.ipc.open_stream(packed))


def cores() -> int:
    """Return how many cores this process may use, in a container what it is granted."""
    visible = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        visible = len(os.sched_getaffinity(0))
    try:
        # Linux, cgroup 2: microseconds of processor time, or "max", of so many
        quota, period = _CPU_MAX.read_text(encoding="ascii").split()
        return max(1, min(visible, int(quota) // int(period)))
    except (OSError, ValueError):
        return visible


def threads_of(devices: Sequence[str], shards: int) -> int:
    """Return the threads of each process, one for each device, if there are so many shards in all.

    Of the plan, not of what is left: the bits of a shard may depend on it.
    """
    return max(1, cores() // max(1, min(len(devices), shards)))


@contextmanager
def using_threads(device: str, threads: int) -> Iterator[None]:
    """Within it, torch has so many threads on a CPU, or as many as it had if these are fewer."""
    import torch

    earlier = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(min(threads, earlier))
    try:
        yield
    finally:
        torch.set_num_threads(earlier)


def refuse_reentry() -> None:
    """Refuse to embed while a process that was started for that imports its script.

    Raises:
        RuntimeError: The script calls for work as it is imported.
    """
    # as multiprocessing itself tells, where a process is started at that moment
    if getattr(process.current_process(), "_inheriting", False):
        raise RuntimeError(
            "a process that embeds a corpus imported the script that started it, which begins "
            'another run; put what the script does under `if __name__ == "__main__":`'
        )


def choose_devices(device: str | None, workers: int | None) -> list[str]:
    """Choose the device of each process.

    Args:
        device: "cpu", "cuda" for every GPU that is visible, "cuda:1" for one; None takes the GPUs
            if there are any.
        workers: Number of processes; None is one for each GPU, and on a CPU one for each eight
            cores.

    Raises:
        ValueError: `workers` is below 1.
        RuntimeError: The device is not available.
    """
    import torch

    from ..arguments import resolve_device

    resolved = resolve_device(device)
    workers = None if workers is None else check_count("workers", workers)
    # a CPU's number means nothing
    names = ["cpu" if resolved.type == "cpu" else str(resolved)]
    if resolved.type == "cuda" and device in (None, "cuda"):
        names = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if resolved.type == "cpu" and workers is None:
        workers = max(1, cores() // CORES_PER_PROCESS)
    return [names[index % len(names)] for index in range(workers or len(names))]


def run_here(
    job: Job,
    device: str,
    shards: Iterable[int],
    report: Callable[[Progress], None],
    threads: int,
) -> None:
    """Embed shards in this process; see `using_threads`."""
    with using_threads(device, threads):
        embedder = Embedder(job.settings, device)
        embed_shards(embedder, job.manifest.plan, shards, job.open_output, report)


def run_processes(
    job: Job,
    devices: Sequence[str],
    shards: Sequence[int],
    report: Callable[[Progress], None],
    threads: int,
) -> None:
    """Embed shards in one process for each device, with so many threads on a CPU.

    Each asks for its next shard.

    Raises:
        RuntimeError: A process ended before its work did. Finished shards stay.
        OSError, ValueError, ...: What a process raised.
    """
    context = get_context("spawn")
    left = deque(shards)
    pipes: dict[Connection, Any] = {}
    try:
        for device in devices:
            here, there = context.Pipe()
            process = context.Process(
                target=_work,
                args=(there, job, device, threads),
                daemon=True,
                name=f"nomoe {device}",
            )
            with _ignoring_interrupts():
                process.start()
            # the process has the other end alone, so that its death ends the pipe
            there.close()
            pipes[here] = process
        while pipes:
            for pipe in connection.wait(list(pipes)):
                assert isinstance(pipe, Connection)
                try:
                    message = pipe.recv()
                    if message is None:
                        pipe.send(left[0] if left else None)
                        if left:
                            left.popleft()
                        continue
                # the other end is gone, before or after it had its answer
                except (EOFError, ConnectionResetError, BrokenPipeError):
                    process = pipes.pop(pipe)
                    process.join()
                    if process.exitcode:
                        reason = (
                            "it was killed, perhaps for lack of memory"
                            if process.exitcode < 0
                            else "what it printed says why"
                        )
                        raise RuntimeError(
                            f"the process on {process.name.removeprefix('nomoe ')} ended with exit "
                            f"code {process.exitcode} before its work was done: {reason}"
                        ) from None
                    continue
                if isinstance(message, Exception):
                    raise message
                report(message)
    finally:
        for process in pipes.values():
            process.terminate()
        for pipe in pipes:
            # a signal that comes just before a process waits here for its next shard wakes nobody
            pipe.close()
        for process in pipes.values():
            process.join()


@contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """Ignore interrupts, as a process begun meanwhile then does from its first moment on.

    An interrupt reaches all processes of a terminal: the parent ends the others, politely.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, earlier)


def _work(pipe: Connection, job: Job, device: str, threads: int) -> None:
    """Run a process until there are no shards left, or nobody to report to."""
    end_politely()
    # the tokenizer's own threads, which otherwise are as many as cores in every process
    os.environ.setdefault("RAYON_NUM_THREADS", str(threads))

    def shards() -> Iterator[int]:
        while True:
            pipe.send(None)
            shard = pipe.recv()
            if shard is None:
                return
            yield shard

    try:
        run_here(job, device, shards(), pipe.send, threads)
    except (BrokenPipeError, EOFError, ConnectionResetError):
        # the parent was killed, and another run may be at work
        sys.exit(1)
    # what bad input, a full disk or an unable machine raises; a bug shows itself
    except (ValueError, OSError, RuntimeError, ImportError, MemoryError) as error:
        with suppress(BrokenPipeError):
            pipe.send(error)
