"""Recordings, on a CPU: a replay runs the step again.

Most of it with a model of one table, whose vectors are plain to see; at the end with the real one,
under Triton's interpreter.
"""

from __future__ import annotations

import copy
import logging
import math
import pickle
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from nomoe import NomicMoEModel, engine
from nomoe.engine import BUCKET_TEXTS, BUCKET_TOKENS, Bucket, Engine, Pooling, bucket_of
from nomoe.model import NomicMoEOutput
from nomoe_kernels import configs, reference
from nomoe_kernels.configs import AttentionTile
from nomoe_kernels.layout import Layout
from tests.test_model import batch_of, config_of

POOLING = Pooling(24, False, True)
# of unit vectors: torch's products and attention's blocks differ between a batch and its bucket
DRIFT = 5e-7


class Rerun:
    """A recorder that keeps the step itself, and counts what is asked of it."""

    def __init__(self) -> None:
        self.records = self.replays = self.releases = 0
        self.in_turn = False
        self.pause = 0.0

    def record(self, step: Callable[[], None]) -> Rerun.Recording:
        assert self.in_turn
        self.records += 1
        step()
        return Rerun.Recording(self, step)

    @contextmanager
    def turn(self) -> Iterator[None]:
        assert not self.in_turn, "one at a time"
        self.in_turn = True
        try:
            yield
        finally:
            self.in_turn = False

    def settle(self) -> None:
        assert not self.in_turn or self.records

    class Recording:
        def __init__(self, recorder: Rerun, step: Callable[[], None]) -> None:
            self._recorder, self._step = recorder, step

        def replay(self) -> None:
            assert self._recorder.in_turn
            self._recorder.replays += 1
            time.sleep(self._recorder.pause)
            self._step()

        def release(self) -> None:
            self._recorder.releases += 1
            del self._step


class StandInOps:
    """Kernels bound to a batch's tables; padding is NaN, and so is the mean of no tokens."""

    def __init__(self, layout: Layout, numbers: Tensor, *, padded: bool) -> None:
        self.tables = layout.split(numbers)

    def pool(self, hidden_TD: Tensor, lengths: list[int], pooling: Pooling) -> Tensor:
        bounds = self.tables.bounds
        return reference.pool(hidden_TD[: bounds[-1]], torch.diff(bounds).tolist(), pooling)


class StandInBackend(NamedTuple):
    takes_tables: bool = True

    @property
    def ops(self) -> Any:
        return reference

    def attention_tile(self, *sizes: Any) -> AttentionTile:
        return AttentionTile("rotating", 16, 16, 4, 2)

    def table_ops(self, layout: Layout, numbers: Tensor, *, padded: bool) -> StandInOps:
        return StandInOps(layout, numbers, padded=padded)


class StandIn(torch.nn.Module):
    """A token's hidden state is its row of a table, times one more than its place in its text."""

    def __init__(self) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(100, 32)
        self.config = config_of(n_embd=32)
        self.backend = StandInBackend()
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def forward_packed(
        self, ids_T: Tensor, lengths: list[int], *, output_routing: bool = False
    ) -> NomicMoEOutput:
        places_T = torch.cat([torch.arange(1, length + 1) for length in lengths])
        return NomicMoEOutput(self.words(ids_T) * places_T[:, None])

    def forward_tables(self, ops: StandInOps, *, output_routing: bool = False) -> NomicMoEOutput:
        tables = ops.tables
        hidden_TD = self.words(tables.ids_T) * (1 + tables.positions_T)[:, None]
        hidden_TD[int(tables.live) :] = math.nan
        return NomicMoEOutput(hidden_TD)


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return StandIn()


def engine_of(model: Any, **options: Any) -> tuple[Engine, Rerun]:
    recorder = Rerun()
    return Engine(model, make_recorder=lambda _: recorder, **options), recorder


def run(runner: Engine, sizes: list[int], pooling: Pooling = POOLING, seed: int = 0) -> Tensor:
    texts = [[(one + seed) % 100 for one in text] for text in batch_of(sizes)]
    ids = [one for text in texts for one in text]
    return runner.embed(ids, sizes, pooling, to_host=True)()


@torch.no_grad()
def expected(model: Any, sizes: list[int], pooling: Pooling = POOLING, seed: int = 0) -> Tensor:
    rows = []
    for text in batch_of(sizes):
        hidden = [
            (place + 1) * model.words.weight[(one + seed) % 100] for place, one in enumerate(text)
        ]
        row = sum(hidden) / len(text)
        if model._modules["words"]._forward_hooks:
            row = row + sum(range(1, len(text) + 1)) / len(text)
        if pooling.normalize_before:
            row = row / row.norm()
        row = row[: pooling.dim]
        rows.append(row / row.norm() if pooling.normalize_after else row)
    return torch.stack(rows)


def test_every_batch_takes_the_smallest_bucket_it_fits() -> None:
    for tokens in [*range(1, 4200), *range(4200, BUCKET_TOKENS[-1] + 100, 61)]:
        for texts in (1, 2, 4, 5, 64, 65, 1024, 1025):
            fitting = [
                Bucket(t, b)
                for t in BUCKET_TOKENS
                for b in BUCKET_TEXTS
                if t >= tokens and b >= texts
            ]
            assert bucket_of(tokens, texts) == (min(fitting) if fitting else None)
    assert bucket_of(0, 0) is None


def test_a_bucket_wastes_no_more_than_a_third() -> None:
    assert list(BUCKET_TOKENS) == sorted(set(BUCKET_TOKENS))
    # where weights are most of what is read, padding costs nothing
    for tokens in range(17, BUCKET_TOKENS[-1] + 1):
        bucket = bucket_of(tokens, 1)
        assert bucket is not None
        assert bucket.tokens - tokens < bucket.tokens / 3 + 1


def test_a_bucket_has_the_size_class_of_what_it_holds() -> None:
    for tokens in range(1, 4097):
        bucket = bucket_of(tokens, 1)
        assert bucket is not None
        assert configs.size_class(2 * tokens) == configs.size_class(2 * bucket.tokens)


def test_a_replay_gives_the_vectors_of_the_batch_as_it_is(model: Any) -> None:
    runner, recorder = engine_of(model)
    # in turn larger and smaller than the last, so that there is something stale to read
    for sizes in ([9, 3, 2], [5], [8, 8], [2], [5, 4, 1], [7, 1]):
        for seed in (0, 31):
            got = run(runner, sizes, seed=seed)
            assert got.shape == (len(sizes), 24)
            torch.testing.assert_close(
                got, expected(model, sizes, seed=seed), atol=DRIFT, rtol=0, msg=str(sizes)
            )
    assert recorder.replays >= 6


def test_stale_buffers_change_nothing(model: Any) -> None:
    runner, recorder = engine_of(model)
    clean = [run(runner, [5, 4]) for _ in range(2)][1]
    buffers = runner._buffers
    assert buffers is not None
    buffers.numbers.fill_(1 << 30)
    buffers.vectors.fill_(math.nan)
    assert torch.equal(run(runner, [5, 4]), clean)
    assert recorder.replays == 2


@pytest.mark.parametrize(
    "pooling",
    [Pooling(32, False, False), Pooling(8, True, False), Pooling(8, False, True)],
    ids=str,
)
def test_each_pooling_has_its_recording(model: Any, pooling: Pooling) -> None:
    runner, recorder = engine_of(model)
    for _ in range(2):
        run(runner, [5])
        got = run(runner, [5], pooling)
    assert recorder.records == 2
    torch.testing.assert_close(got, expected(model, [5], pooling), atol=3e-6, rtol=0)


def test_a_bucket_is_recorded_once_and_at_its_second_meeting(model: Any) -> None:
    runner, recorder = engine_of(model)
    counts = []
    for sizes in ([5], [3], [8], [6]):
        run(runner, sizes)
        counts.append((recorder.records, recorder.replays))
    assert counts == [(0, 0), (1, 1), (1, 2), (1, 3)]
    assert runner.recordings == [Bucket(8, 1)]


def test_recordings_are_bounded_and_the_oldest_goes(model: Any) -> None:
    runner, recorder = engine_of(model, most_recordings=2)
    for sizes in ([5], [5], [9], [9], [5], [2, 2], [2, 2]):
        run(runner, sizes)
    assert runner.recordings == [Bucket(8, 1), Bucket(8, 4)]
    assert (recorder.records, recorder.releases) == (3, 1)
    run(runner, [9])
    assert recorder.records == 4, "met before: recorded again at once"


def test_results_do_not_share_memory_with_the_next_batch(model: Any) -> None:
    runner, _ = engine_of(model)
    run(runner, [5])
    first = run(runner, [5])
    kept = first.clone()
    run(runner, [5], seed=31)
    assert torch.equal(first, kept)


def break_off(recorder: Rerun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no recording succeed."""

    @contextmanager
    def turn() -> Iterator[None]:
        yield

    def failing(step: Callable[[], None]) -> Any:
        recorder.records += 1
        step()
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(recorder, "record", failing)
    monkeypatch.setattr(recorder, "turn", turn)


def test_a_batch_that_cannot_be_recorded_runs_as_it_is(
    model: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="nomoe")
    runner, recorder = engine_of(model)
    break_off(recorder, monkeypatch)
    for _ in range(6):
        torch.testing.assert_close(run(runner, [5]), expected(model, [5]), atol=DRIFT, rtol=0)
    assert recorder.records == 3, "tried thrice, since others may have been in the way"
    assert [record.getMessage() for record in caplog.records] == [
        "batches of up to 8 tokens in 1 texts cannot be recorded, and are launched kernel by "
        "kernel: operation not permitted when stream is capturing"
    ]


def test_what_cannot_be_recorded_is_known_after_warming_up(
    model: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="nomoe")
    runner, recorder = engine_of(model)
    break_off(recorder, monkeypatch)
    runner.prepare(1, 8, POOLING)
    assert recorder.records == 3
    assert len(caplog.records) == 1
    run(runner, [5])
    assert recorder.records == 3


def change_in_place(model: Any) -> None:
    with torch.no_grad():
        model.words.weight += 1


def assign_other_data(model: Any) -> None:
    model.words.weight.data = model.words.weight.data + 1


def load_other_weights(model: Any) -> None:
    state = {name: one + 1 for name, one in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def replace_a_module(model: Any) -> None:
    model.words = torch.nn.Embedding(100, 32)


def hook(model: Any) -> None:
    model.words.register_forward_hook(lambda module, inputs, out: out + 1)


@pytest.mark.parametrize(
    ("change", "replays"),
    [
        (change_in_place, 2),
        (assign_other_data, 1),
        (load_other_weights, 1),
        (replace_a_module, 1),
        (hook, 1),
    ],
)
def test_a_changed_model_is_noticed(
    model: Any, change: Callable[[Any], None], replays: int
) -> None:
    runner, recorder = engine_of(model)
    before = [run(runner, [5]) for _ in range(2)][1]
    # a step that is run again would see the change by itself: count what was replayed
    change(model)
    got = run(runner, [5])
    torch.testing.assert_close(got, expected(model, [5]), atol=DRIFT, rtol=0)
    assert (got - before).abs().max() > 1e-3
    assert recorder.replays == replays
    assert recorder.releases == 2 - replays


def take_away_a_bias(model: Any) -> None:
    model[1].bias = None


def delete_a_weight(model: Any) -> None:
    del model[1].weight


def hook_before(model: Any) -> None:
    model[2][0].register_forward_pre_hook(lambda module, inputs: None)


def hook_among_other_hooks(model: Any) -> None:
    # how some take all hooks off a module
    model[2][0]._forward_hooks = OrderedDict()
    model[2][0].register_forward_hook(lambda module, inputs, out: None)


def add_below_a_leaf(model: Any) -> None:
    model[1].adapter = torch.nn.Linear(4, 4)


def swap_children(model: Any) -> None:
    model[2][0], model[2][1] = model[2][1], model[2][0]


def reorder_children(model: Any) -> None:
    children = model[2]._modules
    children["0"] = children.pop("0")


@pytest.mark.parametrize(
    "change",
    [
        reorder_children,
        take_away_a_bias,
        delete_a_weight,
        hook_before,
        hook_among_other_hooks,
        add_below_a_leaf,
        swap_children,
    ],
)
def test_a_snapshot_holds_until_a_change(change: Callable[[Any], None]) -> None:
    model: Any = torch.nn.Sequential(
        torch.nn.LayerNorm(4),
        torch.nn.Linear(4, 4),
        torch.nn.Sequential(torch.nn.GELU(), torch.nn.Tanh()),
    )
    model.backend = StandInBackend()
    model.device, model.dtype = torch.device("cpu"), torch.float32
    snapshot = engine._Snapshot(model)
    assert snapshot.holds(model)
    change(model)
    assert not snapshot.holds(model)


def test_a_users_precision_of_products_by_its_newer_name(model: Any) -> None:
    """Where it is set, torch refuses to give it by the older one."""
    runner, recorder = engine_of(model)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for precision, records in (("ieee", 1), ("tf32", 2)):
            torch.backends.cuda.matmul.fp32_precision = precision
            for _ in range(2):
                run(runner, [5])
            assert recorder.records == records
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("allow_fp16_accumulation", (False, True)),
        ("allow_fp16_reduced_precision_reduction", (True, False)),
        ("allow_bf16_reduced_precision_reduction", (True, False)),
        ("allow_fp16_reduced_precision_reduction", ((False, True), (False, False))),
        ("allow_bf16_reduced_precision_reduction", ((False, True), (False, False))),
    ],
)
def test_a_recording_sums_products_as_the_user_asks(
    model: Any, name: str, settings: tuple[Any, Any]
) -> None:
    runner, recorder = engine_of(model)
    before = getattr(torch.backends.cuda.matmul, name)
    try:
        for records, setting in enumerate(settings, start=1):
            setattr(torch.backends.cuda.matmul, name, setting)
            for _ in range(2):
                run(runner, [5])
            assert recorder.records == records
    finally:
        setattr(torch.backends.cuda.matmul, name, before)


def test_autocast_is_not_replayed(model: Any) -> None:
    runner, recorder = engine_of(model)
    run(runner, [5])
    with torch.autocast("cpu", enabled=True, dtype=torch.float16):
        runner._replay(engine._Key(Bucket(8, 1), POOLING), [1], [1], True)
    assert recorder.records == 0


@pytest.mark.parametrize("sizes", [[5], [2] * 1025], ids=["small", "without a bucket"])
def test_a_model_that_leaves_triton_leaves_no_recordings(model: Any, sizes: list[int]) -> None:
    """As `model.cpu()` does: what it held on the device is for others."""
    runner, recorder = engine_of(model)
    for _ in range(2):
        run(runner, [5])
    model.backend = StandInBackend(takes_tables=False)
    assert torch.equal(run(runner, sizes), expected(model, sizes))
    assert runner.recordings == []
    assert recorder.releases == 1
    assert runner._buffers is None


def test_no_recordings_may_be_asked_for(model: Any) -> None:
    runner, recorder = engine_of(model, most_recordings=0)
    for _ in range(3):
        assert torch.equal(run(runner, [5]), expected(model, [5]))
    runner.prepare(2, 8, POOLING)
    assert recorder.records == 0


def test_inference_mode_comes_and_goes(model: Any) -> None:
    runner, recorder = engine_of(model)
    with torch.inference_mode():
        run(runner, [5])
        run(runner, [5])
    torch.testing.assert_close(run(runner, [5]), expected(model, [5]), atol=DRIFT, rtol=0)
    assert recorder.replays == 2


def test_threads_take_turns(model: Any) -> None:
    runner, recorder = engine_of(model)
    for _ in range(2):
        run(runner, [4, 3])
    right = {seed: expected(model, [4, 3], seed=seed) for seed in range(4)}
    # time for another thread to come in between
    recorder.pause = 0.01

    def work(seed: int) -> bool:
        return all(
            torch.allclose(run(runner, [4, 3], seed=seed), right[seed], atol=DRIFT, rtol=0)
            for _ in range(3)
        )

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(work, right)) == [True] * 4


def test_preparing_records_what_such_calls_meet(model: Any) -> None:
    runner, recorder = engine_of(model)
    runner.prepare(1, 20, POOLING)
    assert runner.recordings == [Bucket(8, 1), Bucket(16, 1), Bucket(24, 1)]
    for length in range(1, 21):
        run(runner, [length])
    assert recorder.records == 3, "nothing is left to record"
    runner.prepare(3, 8, POOLING)
    assert runner.recordings[-3:] == [Bucket(8, 4), Bucket(16, 4), Bucket(24, 4)]


def test_preparing_for_more_than_any_bucket_runs_one_such_batch(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, _ = engine_of(model)
    ran: list[tuple[int, int]] = []
    monkeypatch.setattr(engine, "BUCKET_TOKENS", (8, 16))
    monkeypatch.setattr(
        runner, "embed", lambda ids, lengths, *_, **__: ran.append((len(ids), len(lengths))) or int
    )
    runner.prepare(4, 20, POOLING)
    assert ran == [(80, 4)]
    assert runner.recordings == [Bucket(8, 4), Bucket(16, 4)]


def test_preparing_for_more_texts_than_a_batch_has(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, _ = engine_of(model)
    ran: list[tuple[int, int]] = []
    monkeypatch.setattr(engine, "BUCKET_TOKENS", (8, 16))
    monkeypatch.setattr(engine, "token_budget", lambda _: 100)
    monkeypatch.setattr(
        runner, "embed", lambda ids, lengths, *_, **__: ran.append((len(ids), len(lengths))) or int
    )
    runner.prepare(10**7, 20, POOLING)
    assert ran == [(100, 100)]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_engines_are_copied_without_their_recordings(model: Any, duplicate: Any) -> None:
    other = duplicate(Engine(model, most_recordings=3))
    assert other.recordings == []
    assert other._most_recordings == 3
    torch.testing.assert_close(run(other, [5]), expected(model, [5]), atol=DRIFT, rtol=0)


def test_large_batches_run_as_they_are(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "BUCKET_TOKENS", (8,))
    runner, recorder = engine_of(model)
    for _ in range(3):
        assert torch.equal(run(runner, [9, 3]), expected(model, [9, 3])), (
            "not padded: the same bits"
        )
    assert recorder.records == 0


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/test_gpu_engine.py records for real")
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the mean of no tokens
def test_the_real_model_replays() -> None:
    torch.manual_seed(0)
    real = NomicMoEModel(config_of(n_layer=2, n_embd=32, n_inner=32, n_head=2), backend="triton")
    for parameter in real.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    runner, recorder = engine_of(real)
    for sizes, seed in (([7], 0), ([7], 31), ([3], 0), ([2, 4], 0), ([2, 4], 0)):
        texts = [[(one + seed) % 100 for one in text] for text in batch_of(sizes)]
        ids_T = torch.tensor([one for text in texts for one in text])
        with torch.no_grad():
            hidden_TD = real.forward_packed(ids_T, sizes)[0]
            right = real.backend.ops.pool(hidden_TD, sizes, POOLING)
        torch.testing.assert_close(run(runner, sizes, seed=seed), right, atol=DRIFT, rtol=0)
    assert recorder.replays == 3


def test_blocks_of_a_recording_are_not_for_shorter_texts_than_come(tiny_folder: Path) -> None:
    """A bucket has room for up to four times as many texts as a batch has."""
    runner = Engine(NomicMoEModel.from_pretrained(tiny_folder, device="cpu", backend="triton"))
    for tokens, texts, block_m in ((4096, 256, 64), (1024, 1024, 16), (512, 1, 64)):
        assert runner._layout_in(Bucket(tokens, texts)).tile.block_m == block_m


# --- memory ---


def test_bytes_per_token_are_what_a_layer_holds() -> None:
    config = config_of(n_embd=768, n_inner=3072)
    # x, y, z and the result; rows of two experts in order, then their results; rows in between;
    # routing
    fp16 = 2 * (4 * 768 + 2 * 768 + 2 * 3072) + 2 * (4 + 8 + 8 + 4)
    assert engine.bytes_per_token(config, torch.float16, fused=True) == fp16
    assert engine.bytes_per_token(config, torch.float32, fused=True) == 2 * fp16 - 48
    assert engine.bytes_per_token(config, torch.float16, fused=False) > 1.4 * fp16


@pytest.mark.parametrize(
    ("free", "unused", "tokens"),
    [
        (100 << 30, 0, 65_536),
        (1 << 30, 0, 39856),
        (1 << 29, 1 << 29, 39856),
        (0, 1 << 20, 512),
    ],
)
def test_the_budget_follows_free_memory(
    monkeypatch: pytest.MonkeyPatch, free: int, unused: int, tokens: int
) -> None:
    class OnGpu:
        device = torch.device("cuda", 0)
        dtype = torch.float16
        config = config_of(n_embd=768, n_inner=3072)
        backend = NomicMoEModel(config_of(), backend="triton").backend

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 141 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: unused + 77)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 77)
    got = engine.token_budget(OnGpu)  # type: ignore[arg-type]
    assert got == tokens
    per_token = engine.bytes_per_token(OnGpu.config, torch.float16, fused=True)
    assert got in (512, 65_536) or np.isclose(got * per_token, 0.8 * (free + unused), rtol=1e-4)
