"""How a batch reaches the device, goes through the model and comes back.

On a GPU nothing here waits for it but the one who asks for a result: ids and tables go there in one
asynchronous copy from pinned memory, vectors come back in another. Small batches, whose kernels run
faster than a host can launch them, replay a recorded forward (a CUDA graph).

A recording has a fixed number of tokens and texts, its bucket. A batch takes the smallest that it
fits; what is left over is padding, which is in no expert's group and no text's attention. Its
vectors may differ in their last bits from those of a batch run as it is, and only because torch's
matrix products choose an algorithm by the number of rows, and attention the size of its blocks.
The kernels' own products are cut alike: configurations are chosen by power of two, and where a
token has one expert or two, as published, the buckets lie so that the batch and its bucket have the
same. With batch_invariant no bit differs.
"""

from __future__ import annotations

import logging
import threading
from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from itertools import chain
from operator import getitem, itemgetter
from typing import Any, NamedTuple, Protocol
from weakref import WeakSet

import torch
from torch import Tensor

from .backends import AttentionTile, Layout, Ops
from .backends import Pooling as Pooling
from .config import NomicMoEConfig
from .model import NomicMoEModel, NomicMoEOutput

logger = logging.getLogger(__name__)

# Tokens and texts of the buckets. Powers of two and those midway between waste less than a third
# of the rows of the dense products from 17 tokens on (fewer share one block of rows in any case);
# texts cost only programs that leave at once. Above the largest a forward takes the GPU longer than
# its launches take the host: beside an H200 those took 7 to 9 ms, whatever the batch, and 4,096
# tokens in float16 took 2.4 ms of the GPU, 32,768 took 15.
BUCKET_TOKENS = (
    8,
    16,
    *(size for power in range(4, 14) for size in (3 << (power - 1), 2 << power)),
)
BUCKET_TEXTS = (1, 4, 16, 64, 256, 1024)

# Recordings kept at a time, and the least recently used goes first. They share their buffers, so
# that one more costs the driver's own bookkeeping alone, which is not measured yet.
MOST_RECORDINGS = 64

# tokens of a batch where memory is no concern. On a CPU 2,048 to 8,192 are within 12 % of another,
# and float32 likes fewer, bfloat16 more; on a GPU not tuned yet, large enough for the products
BATCH_TOKENS = {"cpu": 4096, "cuda": 65_536}
# the fewest a shortage of memory brings that down to; what still does not fit is halved when met
_LEAST_BATCH_TOKENS = 512
# torch gives memory back in no thread while another records, on whichever device
_RECORDING = threading.Lock()
# recordings that were broken off, which torch's allocators may still ask
_BROKEN: list[torch.cuda.CUDAGraph] = []
# recordings of a bucket that may fail before no more are tried: what failed may have been somebody
# else's doing, who waited for the whole device meanwhile, or took its memory
_TRIES = 3
# of the free memory, the share that a batch may take: the rest is for fragmentation and others
_MEMORY_SHARE = 0.8


class Bucket(NamedTuple):
    """The tokens and texts of a recording."""

    tokens: int
    texts: int


def bucket_of(tokens: int, texts: int) -> Bucket | None:
    """The smallest bucket a batch fits, or None if it fits none."""
    by_tokens = bisect_left(BUCKET_TOKENS, tokens)
    by_texts = bisect_left(BUCKET_TEXTS, texts)
    if not tokens or by_tokens == len(BUCKET_TOKENS) or by_texts == len(BUCKET_TEXTS):
        return None
    return Bucket(BUCKET_TOKENS[by_tokens], BUCKET_TEXTS[by_texts])


class Recording(Protocol):
    """A step that can be run again."""

    def replay(self) -> None:
        """Run the step on what its buffers hold now."""
        ...

    def release(self) -> None:
        """Give back what it holds; it is at rest."""
        ...


class Recorder(Protocol):
    """What an engine asks of a device's graphs."""

    def record(self, step: Callable[[], None]) -> Recording:
        """Record a step that only reads and writes buffers which outlive the recording.

        Raises:
            RuntimeError: The step cannot be recorded.
        """
        ...

    def turn(self) -> AbstractContextManager[None]:
        """Within it, work is queued behind that of all turns before, on whatever stream it is."""
        ...

    def settle(self) -> None:
        """Wait until the work of all turns is done."""
        ...


class CudaRecorder:
    """CUDA graphs that share one pool of memory, which is safe since no two run at a time.

    Args:
        device: Where they run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._alive: WeakSet[_CudaRecording] = WeakSet()
        # a pool's memory goes by stream: one for all, and they share it. Of the usual priority,
        # which replays keep on whatever stream they are
        self._stream = torch.cuda.Stream(device)
        self._done = torch.cuda.Event()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """As `Recorder.turn`, on the caller's current stream."""
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(self._done)
        try:
            yield
        finally:
            self._done.record(stream)

    def settle(self) -> None:
        """As `Recorder.settle`."""
        self._done.synchronize()

    def record(self, step: Callable[[], None]) -> Recording:
        """As `Recorder.record`; waits for what the caller queued."""
        caller = torch.cuda.current_stream(self._device)
        graph = torch.cuda.CUDAGraph()
        if not self._alive:
            # torch takes no pool again that all graphs have left
            self._pool = torch.cuda.graph_pool_handle()
        try:
            with (
                _RECORDING,
                torch.cuda.device(self._device),
                torch.cuda.stream(self._stream),
                # what torch keeps for recordings is made once, and may be asked for outside
                torch.inference_mode(False),
                torch.no_grad(),
            ):
                self._stream.wait_stream(caller)
                # compiles kernels and fills caches, which may not happen while recording
                step()
                # while recording, torch cannot give memory back to make room. Not the whole device:
                # that would break off what a user records in another thread
                self._stream.synchronize()
                torch.cuda.empty_cache()
                with _own_cublas_workspaces():
                    self._capture(graph, step)
        finally:
            # the step may be under way even where it was not recorded
            caller.wait_stream(self._stream)
        recording = _CudaRecording(graph, self._device, step)
        self._alive.add(recording)
        return recording

    def _capture(self, graph: torch.cuda.CUDAGraph, step: Callable[[], None]) -> None:
        try:
            # other threads may go on allocating
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                step()
            finally:
                graph.capture_end()
        except BaseException:
            # a recording that CUDA has broken off leaves torch's allocator recording; one that
            # ended as it should does not, and torch says so
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(self._stream.device_index, self._pool)
                torch._C._cuda_releasePool(self._stream.device_index, self._pool)
                self._recover(graph)
            raise

    def _recover(self, graph: torch.cuda.CUDAGraph) -> None:
        """Mend what torch 2.11 leaves behind of a recording that was broken off."""
        # its allocator of pinned memory goes on recording, which nothing ends: for another pool it
        # starts anew
        _BROKEN.append(graph)
        self._alive = WeakSet()
        # its random numbers are refused until a recording ends well
        nothing = torch.cuda.CUDAGraph()
        nothing.capture_begin(capture_error_mode="thread_local")
        try:
            torch.cuda._sleep(1)
        finally:
            nothing.capture_end()


@contextmanager
def _own_cublas_workspaces() -> Iterator[None]:
    """Have what is recorded take cuBLAS's workspaces from the recordings' pool of memory.

    Otherwise it builds in those that torch holds for the stream, until whoever else records, such
    as torch.compile(mode="reduce-overhead"), has torch drop them all. Here they are dropped too;
    other threads' stay in torch's cache, for the same stream, so that work under way is safe.
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        # the next recording may use the same memory, so torch may not hold on to it
        torch._C._cuda_clearCublasWorkspaces()


class _CudaRecording:
    def __init__(
        self, graph: torch.cuda.CUDAGraph, device: torch.device, step: Callable[[], None]
    ) -> None:
        self._graph = graph
        self._device = device
        # holds what the graph reads
        self._step = step

    def replay(self) -> None:
        with torch.cuda.device(self._device):
            self._graph.replay()

    def release(self) -> None:
        self._graph.reset()


def recorder_for(model: NomicMoEModel) -> Recorder | None:
    """Make what records this model's forwards, if anything does."""
    if model.device.type == "cuda" and model.backend.takes_tables:
        return CudaRecorder(model.device)
    return None


# what `_Snapshot` looks at of a module's attributes
_CHILDREN = itemgetter("_modules")
_HOOKS = itemgetter("_forward_hooks")
_PRE_HOOKS = itemgetter("_forward_pre_hooks")


class _Snapshot:
    """What a recording has built in of its model, to tell when it is out of date.

    It is asked before every replay, while the GPU has nothing to do, so nothing here loops over
    modules or parameters in Python.
    """

    def __init__(self, model: NomicMoEModel) -> None:
        # what each module's attributes are kept in
        self._modules = [vars(module) for module in model.modules()]
        slots = [
            (module._parameters, name)
            for module in model.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]
        self._holders = [parameters for parameters, _ in slots]
        self._names = [name for _, name in slots]
        self._children = self._current_children()
        self._rest = self._current_rest(model)
        self._pointers = self._current_pointers()

    def holds(self, model: NomicMoEModel) -> bool:
        """Whether the model would still run the same kernels on the same memory."""
        try:
            return (
                self._current_rest(model) == self._rest
                and self._current_pointers() == self._pointers
                and self._current_children() == self._children
                # a recording runs no hooks
                and not any(map(_HOOKS, self._modules))
                and not any(map(_PRE_HOOKS, self._modules))
            )
        except (KeyError, AttributeError, TypeError):
            # a parameter is gone
            return False

    def _current_children(self) -> list[tuple[str, object]]:
        return list(chain.from_iterable(map(dict.items, map(_CHILDREN, self._modules))))

    def _current_pointers(self) -> list[int]:
        # looked up anew: a parameter may be another, or the same with other memory
        parameters = map(getitem, self._holders, self._names)
        return list(map(Tensor.data_ptr, parameters))  # type: ignore[arg-type]

    def _current_rest(self, model: NomicMoEModel) -> tuple[object, ...]:
        matmul = torch.backends.cuda.matmul
        return (
            model.device,
            model.dtype,
            model.backend.takes_tables,
            # by which torch's products are made; the older names of the first raise where a user
            # has set it by this one, and not every torch has the last two
            matmul.fp32_precision,
            matmul.allow_fp16_accumulation,
            matmul.allow_fp16_reduced_precision_reduction,
            matmul.allow_bf16_reduced_precision_reduction,
            getattr(matmul, "allow_fp16_reduced_precision_reduction_split_k", None),
            getattr(matmul, "allow_bf16_reduced_precision_reduction_split_k", None),
        )


class _Key(NamedTuple):
    bucket: Bucket
    pooling: Pooling


class _Buffers(NamedTuple):
    """What every recording reads and writes, each as much of it as it needs."""

    # tables of the batch, int32
    numbers: Tensor
    # (texts, D) float32
    vectors: Tensor


class _Place(NamedTuple):
    """Where a recording finds its batch and leaves the vectors: parts of the buffers."""

    layout: Layout
    # (layout.size,) int32
    numbers: Tensor
    # (layout.texts, dim) float32
    vectors: Tensor


class Engine:
    """Runs batches of one model.

    Threads may share it: those that replay take turns, and each finds its vectors copied away, on
    its own current stream, before the next begins.

    Args:
        model: The model.
        make_recorder: Makes what records its forwards, or None; tests put in their own.
        most_recordings: Recordings kept at a time; with 0 every batch runs as it is.
    """

    def __init__(
        self,
        model: NomicMoEModel,
        *,
        make_recorder: Callable[[NomicMoEModel], Recorder | None] = recorder_for,
        most_recordings: int = MOST_RECORDINGS,
    ) -> None:
        self.model = model
        self._make_recorder = make_recorder
        self._most_recordings = most_recordings
        self._lock = threading.Lock()
        self._forget()

    def __reduce__(self) -> tuple[Any, ...]:
        # locks and recordings belong to a process; a copy makes its own
        return partial(type(self), most_recordings=self._most_recordings), (self.model,)

    def _new_recorder(self) -> Recorder | None:
        return self._make_recorder(self.model) if self._most_recordings else None

    def _forget(self) -> None:
        self._recorder: Recorder | None = None
        self._snapshot: _Snapshot | None = None
        self._buffers: _Buffers | None = None
        self._recordings: OrderedDict[_Key, tuple[_Place, Recording]] = OrderedDict()
        # met once, not recorded yet; and how often those were tried in vain that could not be
        self._met: set[_Key] = set()
        self._refused: Counter[_Key] = Counter()

    @property
    def recordings(self) -> list[Bucket]:
        """Buckets that have a recording, the least recently used first."""
        return [key.bucket for key in self._recordings]

    @torch.no_grad()
    def forward(
        self, ids: Sequence[int], lengths: Sequence[int], *, routing: bool = False
    ) -> tuple[NomicMoEOutput, Ops]:
        """Queue a forward of a batch as it is.

        Args:
            ids: Token ids of all texts, end to end.
            lengths: Tokens of each text.
            routing: Return the router's choices.

        Returns:
            The output, and the kernels to pool it with.
        """
        model, backend = self.model, self.model.backend
        if not backend.takes_tables:
            if self._snapshot is not None:
                # a model that has left a GPU leaves others the room
                self.relieve()
            is_cuda = model.device.type == "cuda"
            ids_T = torch.empty(len(ids), dtype=torch.int64, device="cpu", pin_memory=is_cuda)
            ids_T.numpy()[:] = ids
            ids_T = ids_T.to(model.device, non_blocking=True)
            output = model.forward_packed(ids_T, lengths, output_routing=routing)
            return output, backend.ops
        layout = self.layout_of(lengths)
        device = model.device
        numbers = _tables(layout, ids, lengths, device).to(device, non_blocking=True)
        ops = backend.table_ops(layout, numbers, padded=False)
        return model.forward_tables(ops, output_routing=routing), ops

    def embed(
        self, ids: Sequence[int], lengths: Sequence[int], pooling: Pooling, *, to_host: bool
    ) -> Callable[[], Tensor]:
        """Queue a batch.

        Args:
            ids: Token ids of all texts, end to end.
            lengths: Tokens of each text, at least 1.
            pooling: What to make of them.
            to_host: Bring the vectors to the host.

        Returns:
            A function that waits for the batch and returns its vectors, (B, dim) float32.

        Raises:
            torch.OutOfMemoryError: The batch does not fit.
        """
        bucket = bucket_of(len(ids), len(lengths))
        if bucket is not None:
            pending = self._replay(_Key(bucket, pooling), ids, lengths, to_host)
            if pending is not None:
                return pending
        with torch.no_grad():
            output, ops = self.forward(ids, lengths)
            vectors = ops.pool(output.last_hidden_state, lengths, pooling)
            return _fetch(vectors, to_host)

    @torch.no_grad()
    def prepare(self, texts: int, longest: int, pooling: Pooling) -> None:
        """Record every bucket that a batch of so many texts, each up to so many tokens, can meet.

        Larger batches run once, as they are. Either way their kernels are compiled. Where nothing
        is recorded, one small batch runs.
        """
        # the most texts that a batch has
        budget = token_budget(self.model)
        texts = min(texts, budget)
        most = texts * longest
        if self._new_recorder() is None:
            self.embed([0] * min(8, longest), [min(8, longest)], pooling, to_host=True)()
            return
        for tokens in BUCKET_TOKENS:
            at_most = min(tokens, most)
            bucket = bucket_of(at_most, texts)
            if at_most < texts or bucket is None or bucket.tokens < tokens:
                continue
            batch = _even_batch(at_most, texts)
            key = _Key(bucket, pooling)
            # as often as it takes to know that it cannot be recorded
            tries = (self._replay(key, *batch, False, record=True) for _ in range(_TRIES))
            if all(replayed is None for replayed in tries):
                self.embed(*batch, pooling, to_host=False)()
        if bucket_of(most, texts) is None:
            tokens = max(texts, min(most, budget))
            self.embed(*_even_batch(tokens, texts), pooling, to_host=False)()

    def reset(self) -> None:
        """Drop all recordings and what they hold."""
        with self._lock:
            self._drop()

    def relieve(self) -> None:
        """Give back what memory can be given back."""
        self.reset()
        # the model may have left it
        if torch.cuda.is_initialized():
            # torch refuses while somebody else's graph is recorded
            with _RECORDING, suppress(RuntimeError):
                torch.cuda.empty_cache()

    def _drop(self) -> None:
        if self._recorder is not None:
            self._recorder.settle()
        for _, recording in self._recordings.values():
            recording.release()
        self._forget()

    def _replay(
        self,
        key: _Key,
        ids: Sequence[int],
        lengths: Sequence[int],
        to_host: bool,
        *,
        record: bool = False,
    ) -> Callable[[], Tensor] | None:
        """Queue a batch by its bucket's recording; None where there is none, and none is due.

        A bucket is recorded when it is met for the second time, lest every odd batch pay for a
        recording that nobody replays.
        """
        model = self.model
        device = model.device
        # autocast changes what a forward launches
        if not model.backend.takes_tables or torch.is_autocast_enabled(device.type):
            return None
        with self._lock:
            if self._snapshot is None or not self._snapshot.holds(model):
                self._drop()
                snapshot = _Snapshot(model)
                if not snapshot.holds(model):
                    return None
                self._snapshot, self._recorder = snapshot, self._new_recorder()
            if self._recorder is None:
                return None
            kept = self._recordings.get(key)
            if kept is None:
                if not record and key not in self._met:
                    self._met.add(key)
                    return None
                if self._refused[key] == _TRIES:
                    return None
            place = self._place(key) if kept is None else kept[0]
            try:
                with self._recorder.turn():
                    numbers = _tables(place.layout, ids, lengths, device)
                    place.numbers.copy_(numbers, non_blocking=True)
                    self._recorded(key, place).replay()
                    return _fetch(place.vectors[: len(lengths)], to_host, is_buffer=True)
            except _RefusedError as refusal:
                self._refused[key] += 1
                if self._refused[key] < _TRIES:
                    return None
                reason = str(refusal)
        logger.warning(
            "batches of up to %d tokens in %d texts cannot be recorded, and are launched kernel by "
            "kernel: %s",
            *key.bucket,
            reason,
        )
        return None

    def _recorded(self, key: _Key, place: _Place) -> Recording:
        """The recording of a bucket, made where there is none; the buffers hold a batch of it."""
        assert self._recorder is not None
        if key not in self._recordings:
            while len(self._recordings) >= self._most_recordings:
                self._recorder.settle()
                self._recordings.popitem(last=False)[1][1].release()
            try:
                recording = self._recorder.record(self._step(key, place))
            except RuntimeError as error:
                raise _RefusedError(str(error)) from None
            self._recordings[key] = place, recording
        self._recordings.move_to_end(key)
        return self._recordings[key][1]

    def _place(self, key: _Key) -> _Place:
        layout, buffers = self._layout_in(key.bucket), self._room()
        return _Place(
            layout,
            buffers.numbers[: layout.size],
            buffers.vectors[: layout.texts, : key.pooling.dim],
        )

    def _step(self, key: _Key, place: _Place) -> Callable[[], None]:
        """A forward from buffer to buffer; it names no length but the bucket's."""
        model = self.model
        ops = model.backend.table_ops(place.layout, place.numbers, padded=True)

        @torch.no_grad()
        def step() -> None:
            output = model.forward_tables(ops)
            place.vectors.copy_(ops.pool(output.last_hidden_state, [], key.pooling))

        return step

    def layout_of(self, lengths: Sequence[int]) -> Layout:
        """Room for a batch of texts of these lengths and nothing else."""
        return Layout.of(lengths, self._tile(sum(lengths), max(lengths, default=1)))

    def _layout_in(self, bucket: Bucket) -> Layout:
        # how long the longest is says the mean of the fewest texts that come here: blocks too large
        # for texts cost less than blocks too small
        fewest = 1 + max((texts for texts in BUCKET_TEXTS if texts < bucket.texts), default=0)
        tile = self._tile(bucket.tokens, -(-bucket.tokens // fewest))
        return Layout.room(*bucket, tile)

    def _tile(self, tokens: int, longest: int) -> AttentionTile:
        model = self.model
        return model.backend.attention_tile(
            tokens, longest, model.config.head_width, model.dtype, model.device
        )

    def _room(self) -> _Buffers:
        if self._buffers is None:
            model = self.model
            largest = max(
                self._layout_in(Bucket(tokens, texts)).size
                for tokens in BUCKET_TOKENS
                for texts in BUCKET_TEXTS
            )
            # made in inference mode they could not be written outside it
            with torch.inference_mode(False):
                self._buffers = _Buffers(
                    torch.zeros(largest, dtype=torch.int32, device=model.device),
                    torch.zeros(
                        *(BUCKET_TEXTS[-1], model.config.n_embd),
                        dtype=torch.float32,
                        device=model.device,
                    ),
                )
        return self._buffers


class _RefusedError(RuntimeError):
    """A forward could not be recorded."""


def token_budget(model: NomicMoEModel) -> int:
    """The tokens of a batch: what the free memory of a GPU takes, and no more than is of use."""
    device = model.device
    most = BATCH_TOKENS.get(device.type, BATCH_TOKENS["cpu"])
    if device.type != "cuda":
        return most
    free, _ = torch.cuda.mem_get_info(device)
    # what torch keeps for itself without using it
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    per_token = bytes_per_token(model.config, model.dtype, fused=model.backend.takes_tables)
    return max(_LEAST_BATCH_TOKENS, min(most, int(_MEMORY_SHARE * free) // per_token))


def bytes_per_token(config: NomicMoEConfig, dtype: torch.dtype, *, fused: bool) -> int:
    """Bytes of activations that a token adds to a forward at its widest, between two experts.

    There are the layer's input, what attention made of it, their sum and the result, D each; K rows
    in expert order, D each, whose place the experts' results take; K rows in between, F each; and
    the routing, three numbers of 8 bytes a choice. Plain torch holds the results beside the rows,
    in float32 as well, and two of the wide rows at a time.
    """
    D, F, K = config.n_embd, config.ffn_width, config.moe_top_k
    numbers = 4 * D + K * D + K * F
    if fused:
        return dtype.itemsize * numbers + 24 * K
    return dtype.itemsize * (numbers + K * D + K * F) + 8 * K * D + 24 * K


def _tables(
    layout: Layout, ids: Sequence[int], lengths: Sequence[int], device: torch.device
) -> Tensor:
    """A batch's tables on the host, on their way to a device."""
    # torch keeps pinned memory from being used again until the device has read it
    is_cuda = device.type == "cuda"
    numbers = torch.empty(layout.size, dtype=torch.int32, device="cpu", pin_memory=is_cuda)
    layout.fill(numbers, ids, lengths)
    return numbers


def _even_batch(tokens: int, texts: int) -> tuple[list[int], list[int]]:
    """A batch of as many texts, about as long as each other; ids and lengths."""
    lengths = [tokens // texts + (text < tokens % texts) for text in range(texts)]
    return [0] * tokens, lengths


def _fetch(vectors: Tensor, to_host: bool, is_buffer: bool = False) -> Callable[[], Tensor]:
    """Queue a batch's vectors on their way; the result waits for them."""
    if not vectors.is_cuda:
        taken = vectors.clone() if is_buffer else vectors
        return lambda: taken
    with torch.cuda.device(vectors.device):
        if to_host:
            taken = torch.empty(vectors.shape, dtype=vectors.dtype, device="cpu", pin_memory=True)
            taken.copy_(vectors, non_blocking=True)
        else:
            taken = vectors.clone() if is_buffer else vectors
        arrived = torch.cuda.Event()
        arrived.record()

    def wait() -> Tensor:
        arrived.synchronize()
        return taken

    return wait
