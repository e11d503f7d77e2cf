"""What only a CUDA device can show of the engine: recorded forwards, streams, threads, memory."""

from __future__ import annotations

import copy
import gc
import random
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nomoe import Encoder, NomicMoEModel, engine
from nomoe.engine import Bucket, CudaRecorder, Engine, Pooling

pytestmark = pytest.mark.gpu

POOLING = Pooling(768, False, True)
# 1 - cosine of a text: at most where no expert flips, and where one does; see nomoe verify. The
# fewer tokens, the further one flip moves a text: some 0.05 of one token, up to 0.2 seen
ALIKE = {torch.float32: (1e-9, 1e-5), torch.float16: (5e-6, 1e-4), torch.bfloat16: (2e-3, 2e-2)}
SHORT, WORST_SHORT = 64, 0.3
# of fewer texts, a flip may move the median
MOST_FEW = 8
# one query, its lengths; one long text; batches; texts that differ; more texts than a power of four
SHAPES = [
    *([1], [3], [8], [9], [16], [17], [40], [129], [512]),
    *([128] * 32, [16] * 16, [7] * 5, [512, 3, 90], [2] * 100, [300, 200, 100, 50]),
]


@pytest.fixture(scope="module", params=[torch.float16, torch.float32], ids=str)
def model(request: pytest.FixtureRequest, full_width: NomicMoEModel) -> NomicMoEModel:
    """The real sizes, but for the vocabulary, on the triton backend."""
    model = copy.deepcopy(full_width).to("cuda", request.param)
    assert model.backend.name == "triton"
    return model


def ids_of(model: NomicMoEModel, count: int, seed: int = 0) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(4, model.config.embedding_rows) for _ in range(count)]


@torch.no_grad()
def eager(model: NomicMoEModel, ids: list[int], lengths: list[int]) -> Tensor:
    hidden_TD = model.forward_packed(torch.tensor(ids, device="cuda"), lengths)[0]
    return model.backend.ops.pool(hidden_TD, lengths, POOLING).cpu()


def distances_of(got: Tensor, expected: Tensor) -> Tensor:
    """1 - cosine of each text; float32 leaves the vectors' own lengths off by some 1e-7."""
    return 1 - torch.nn.functional.cosine_similarity(got.double(), expected.double())


def check_alike(
    got: Tensor, expected: Tensor, dtype: torch.dtype, lengths: list[int]
) -> list[float]:
    """Check that vectors are of the same texts; what is left is 1 - cosine of each."""
    assert got.shape == expected.shape
    distances = distances_of(got, expected)
    usual, worst = ALIKE[dtype]
    if len(distances) > MOST_FEW:
        assert distances.median() <= usual
    for length, distance in zip(lengths, distances.tolist(), strict=True):
        is_short = length < SHORT and dtype != torch.float32
        assert distance <= (WORST_SHORT if is_short else worst), length
    return distances.tolist()


@pytest.mark.parametrize("to_host", [True, False])
def test_a_replay_is_the_forward(model: NomicMoEModel, to_host: bool) -> None:
    runner = Engine(model)
    distances = []
    for repeat in range(3):
        for shape, lengths in enumerate(SHAPES):
            ids = ids_of(model, sum(lengths), seed=100 * repeat + shape)
            got = runner.embed(ids, lengths, POOLING, to_host=to_host)()
            assert got.is_cuda != to_host
            expected = eager(model, ids, lengths)
            distances += check_alike(got.cpu(), expected, model.dtype, lengths)
    # few flip
    assert np.mean(np.array(distances) > ALIKE[model.dtype][0]) <= 0.05
    met = {engine.bucket_of(sum(lengths), len(lengths)) for lengths in SHAPES}
    assert set(runner.recordings) == met


def test_a_replay_repeats_bit_for_bit(model: NomicMoEModel) -> None:
    runner = Engine(model)
    runner.prepare(1, 40, POOLING)
    ids, others = ids_of(model, 30), ids_of(model, 27, seed=1)
    first = runner.embed(ids, [30], POOLING, to_host=True)()
    for _ in range(50):
        runner.embed(others, [27], POOLING, to_host=True)()
        assert torch.equal(runner.embed(ids, [30], POOLING, to_host=True)(), first)


@pytest.mark.parametrize("lengths", [[16], [128] * 32, [512] * 40], ids=len)
def test_nobody_waits_for_the_device(model: NomicMoEModel, lengths: list[int]) -> None:
    ids = ids_of(model, sum(lengths))
    ids_T = torch.tensor(ids, device="cuda")
    runner = Engine(model)

    def both() -> Any:
        with torch.no_grad():
            model.forward_packed(ids_T, lengths)
        return runner.embed(ids, lengths, POOLING, to_host=True)

    for _ in range(2):
        both()()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        pending = both()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    check_alike(pending(), eager(model, ids, lengths), model.dtype, lengths)


def test_the_padded_door_waits_once(model: NomicMoEModel) -> None:
    ids_BL = torch.tensor(ids_of(model, 8 * 100), device="cuda").view(8, 100)
    mask_BL = torch.arange(100, device="cuda") < torch.arange(30, 110, 10, device="cuda")[:, None]
    batch = {"attention_mask": mask_BL.long(), "token_type_ids": torch.zeros_like(ids_BL)}
    with torch.no_grad(), warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model(ids_BL, **batch)
        torch.cuda.synchronize()
        seen.clear()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            model(ids_BL, **batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len([one for one in seen if "called a synchronizing" in str(one.message)]) == 1


def test_batches_queue_up_before_the_first_is_done(model: NomicMoEModel) -> None:
    lengths = [512] * 40
    ids = ids_of(model, sum(lengths))
    runner = Engine(model)
    # compiles
    expected = runner.embed(ids, lengths, POOLING, to_host=True)().clone()
    # the first time gets memory for two batches, on the device and pinned, for which it may wait
    for _ in range(2):
        # the device is kept busy long enough for the host to run ahead
        torch.cuda._sleep(2_000_000_000)
        done = torch.cuda.Event()
        done.record()
        pending = [runner.embed(ids, lengths, POOLING, to_host=True) for _ in range(2)]
        in_time = not done.query()
        for one in pending:
            assert torch.equal(one(), expected)
        del one, pending
    assert in_time, "both were queued while the device was still at what came before"


def test_a_users_stream(model: NomicMoEModel) -> None:
    runner = Engine(model)
    runner.prepare(1, 64, POOLING)
    ids = [ids_of(model, 50, seed=seed) for seed in range(8)]
    right = [eager(model, one, [50]) for one in ids]
    streams = [torch.cuda.Stream() for _ in range(3)]
    pending = []
    for turn, one in enumerate(ids):
        # each on another stream, with none waited for in between
        with torch.cuda.stream(streams[turn % 3]):
            torch.cuda._sleep(2_000_000 * (turn % 3))
            pending.append(runner.embed(one, [50], POOLING, to_host=turn % 2 == 0))
    for got, expected in zip(pending, right, strict=True):
        check_alike(got().cpu(), expected, model.dtype, [50])


@pytest.mark.parametrize("prepared", [True, False])
def test_two_threads(model: NomicMoEModel, prepared: bool) -> None:
    """Not prepared, one records while the other allocates and runs."""
    runner = Engine(model)
    if prepared:
        runner.prepare(1, 64, POOLING)
    right = {
        seed: eager(model, ids_of(model, 20 + 9 * seed, seed), [20 + 9 * seed]) for seed in range(4)
    }
    failures: list[BaseException] = []

    def work(seeds: list[int]) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(20):
                    for seed in seeds:
                        length = 20 + 9 * seed
                        ids = ids_of(model, length, seed)
                        got = runner.embed(ids, [length], POOLING, to_host=True)()
                        check_alike(got, right[seed], model.dtype, [length])
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(seeds,)) for seeds in ([0, 1, 2], [3, 1, 0])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def test_recordings_share_their_memory(model: NomicMoEModel) -> None:
    runner = Engine(model)
    most = engine.BUCKET_TOKENS[-1]
    # what earlier tests left would be given back meanwhile
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    lengths = [512] * (most // 512)
    runner.embed(ids_of(model, most), lengths, POOLING, to_host=True)()
    runner.embed(ids_of(model, most), lengths, POOLING, to_host=True)()
    largest = torch.cuda.memory_reserved() - before
    runner.prepare(1, 512, POOLING)
    runner.prepare(32, 128, POOLING)
    assert len(runner.recordings) > 20
    torch.cuda.empty_cache()
    grown = torch.cuda.memory_reserved() - before
    print(f"one recording {largest >> 20} MiB, {len(runner.recordings)} of them {grown >> 20} MiB")
    assert grown < 2 * largest + (64 << 20)
    runner.reset()
    torch.cuda.empty_cache()
    # of cuBLAS's workspaces, only those of this test's own stream are left
    assert torch.cuda.memory_reserved() - before < 128 << 20


def test_recordings_outlive_workspaces_that_others_drop(model: NomicMoEModel) -> None:
    """As torch.compile(mode="reduce-overhead") does around its own recordings."""
    lengths = [512] * 4
    ids = ids_of(model, sum(lengths))
    runner = Engine(model)
    for _ in range(3):
        expected = runner.embed(ids, lengths, POOLING, to_host=True)()
    torch._C._cuda_clearCublasWorkspaces()
    gc.collect()
    torch.cuda.empty_cache()
    # whatever was given back is somebody else's now
    theirs = [torch.zeros(1 << 20, dtype=torch.uint8, device="cuda") for _ in range(512)]
    assert torch.equal(runner.embed(ids, lengths, POOLING, to_host=True)(), expected)
    assert not any(one.any() for one in theirs)


@pytest.mark.parametrize("broken_off", [False, True])
def test_a_recording_that_fails_is_not_the_last(broken_off: bool) -> None:
    recorder = CudaRecorder(torch.device("cuda", torch.cuda.current_device()))
    x = torch.zeros(8, device="cuda")

    def fails() -> None:
        x.add_(torch.ones_like(x))
        if torch.cuda.is_current_stream_capturing():
            if broken_off:
                # which no graph can hold, and CUDA ends the recording
                torch.cuda.synchronize()
            raise RuntimeError("no")

    def adds() -> None:
        x.add_(torch.ones_like(x))

    for attempt in range(1, 4):
        with pytest.raises(RuntimeError):
            recorder.record(fails)
        # which torch refuses where it takes a recording to be under way
        torch.cuda.empty_cache()
        recording = recorder.record(adds)
        with recorder.turn():
            recording.replay()
        # both steps ran once before they were recorded
        assert x.tolist() == [3.0 * attempt] * 8
        # which torch refuses in the same case
        torch.rand(8, device="cuda")
        torch.empty(8, pin_memory=True)
        if attempt == 2:
            # its pool is left by all, and by none in the other turns
            recording.release()
            del recording


def test_recording_in_inference_mode_comes_and_goes() -> None:
    recorder = CudaRecorder(torch.device("cuda", torch.cuda.current_device()))
    x = torch.zeros(8, device="cuda")
    for attempt in range(1, 5):
        with torch.inference_mode(attempt % 2 == 1):
            recorder.record(lambda: x.add_(1)).replay()
        assert x.tolist() == [2.0 * attempt] * 8


def test_changed_weights_are_not_replayed(full_width: NomicMoEModel) -> None:
    model = copy.deepcopy(full_width).to("cuda", torch.float16)
    runner = Engine(model)
    ids = ids_of(model, 16)

    def both() -> tuple[Tensor, Tensor]:
        for _ in range(3):
            got = runner.embed(ids, [16], POOLING, to_host=True)()
        return got, eager(model, ids, [16])

    before, _ = both()
    model.load_state_dict(
        {name: one.clone() * 1.1 for name, one in model.state_dict().items()}, assign=True
    )
    after, expected = both()
    check_alike(after, expected, torch.float16, [16])
    assert (after - before).abs().max() > 1e-3
    model.to(torch.float32)
    check_alike(*both(), torch.float32, [16])


def test_forward_packed_in_a_graph_of_ones_own(model: NomicMoEModel) -> None:
    lengths = [100, 7, 33]
    ids_T = torch.tensor(ids_of(model, 140), device="cuda")
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            model.forward_packed(ids_T, lengths)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            hidden_TD = model.forward_packed(ids_T, lengths)[0]
        for seed in range(3):
            ids_T.copy_(torch.tensor(ids_of(model, 140, seed)))
            # what pinned memory the recording left behind is used again here
            model.forward_packed(ids_T.flip(0), [1] * 140)
            graph.replay()
            assert torch.equal(hidden_TD, model.forward_packed(ids_T, lengths)[0])


def test_forward_packed_compiled_by_inductor(model: NomicMoEModel) -> None:
    lengths = [100, 7, 33]
    whole = torch.compile(
        lambda ids_T: model.forward_packed(ids_T, lengths)[0].float() * 2, fullgraph=True
    )
    ids_T = torch.tensor(ids_of(model, 140), device="cuda")
    with torch.no_grad():
        expected_TD = model.forward_packed(ids_T, lengths)[0].float() * 2
        torch.testing.assert_close(whole(ids_T), expected_TD, atol=0, rtol=0)


# --- batch_invariant ---


@pytest.fixture(scope="module", params=[torch.float16, torch.bfloat16, torch.float32], ids=str)
def invariant_model(request: pytest.FixtureRequest, full_width: NomicMoEModel) -> NomicMoEModel:
    with torch.device("cuda"):
        model = NomicMoEModel(full_width.config, backend="triton", batch_invariant=True)
    model.load_state_dict(full_width.state_dict())
    return model.eval().to(request.param)


@torch.no_grad()
def test_a_thousand_compositions_change_no_bit(invariant_model: NomicMoEModel) -> None:
    """Random batch-mates, orders and sizes, replayed and as they are, against each text alone."""
    model, runner = invariant_model, Engine(invariant_model)
    assert model.backend.batch_invariant
    generator = random.Random(0)
    lengths = [1, 2, 512, *(generator.randint(1, 512) for _ in range(125))]
    texts = [ids_of(model, length, seed) for seed, length in enumerate(lengths)]
    alone = torch.stack(
        [runner.embed(ids, [len(ids)], POOLING, to_host=True)()[0] for ids in texts]
    )
    replayed = 0
    for turn in range(1000):
        # now and then more than any bucket holds
        size = generator.choice([1, 2, 3, 5, 8, 16, 64, 128])
        chosen = generator.sample(range(len(texts)), size)
        ids = [one for place in chosen for one in texts[place]]
        sizes = [lengths[place] for place in chosen]
        replayed += engine.bucket_of(len(ids), size) in runner.recordings
        vectors = runner.embed(ids, sizes, POOLING, to_host=True)()
        assert torch.equal(vectors, alone[chosen]), (turn, sizes)
        if turn % 10 == 0:
            assert torch.equal(eager(model, ids, sizes), alone[chosen]), (turn, sizes)
    assert 500 < replayed < 1000


# --- the encoder ---


@pytest.fixture
def restored_memory() -> Iterator[None]:
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def mixed_texts(count: int) -> list[str]:
    generator = random.Random(0)
    return [
        " ".join(f"word{generator.randrange(1000)}" for _ in range(generator.randint(1, 120)))
        for _ in range(count)
    ]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_two_thousand_texts_are_each_what_it_is_alone(tiny_folder: Path, dtype: str) -> None:
    encoder = Encoder.from_pretrained(tiny_folder, device="cuda", dtype=dtype, backend="triton")
    texts = mixed_texts(2000)
    for _ in range(2):
        # a batch's first time is not replayed, and may differ from the others in its last bits
        encoder.encode_document(texts)
    together = torch.from_numpy(encoder.encode_document(texts))
    alone = torch.from_numpy(np.stack([encoder.encode_document(text) for text in texts]))
    distances = distances_of(together, alone)
    # at width 96, with random routers, a flipped expert moves a text further than at 768
    assert distances.median() <= (1e-9 if dtype == "float32" else 1e-5)
    assert (distances > 1e-4).float().mean() <= (0.001 if dtype == "float32" else 0.1)
    streamed = np.concatenate(list(encoder.stream(texts, "document")))
    np.testing.assert_array_equal(streamed, together.numpy())
    tensors = encoder.encode_document(texts, convert_to_tensor=True)
    assert tensors.is_cuda
    np.testing.assert_array_equal(tensors.cpu().numpy(), together.numpy())


@pytest.mark.usefixtures("restored_memory")
def test_memory_that_runs_out(
    tiny_folder: Path, warnings_of_nomoe: pytest.LogCaptureFixture
) -> None:
    encoder = Encoder.from_pretrained(tiny_folder, device="cuda", dtype="float32")
    texts = mixed_texts(2000)
    right = encoder.encode_document(texts, batch_tokens=4096)
    encoder._engine.relieve()
    total = torch.cuda.get_device_properties(0).total_memory
    # room for a few thousand tokens beside the weights
    room = torch.cuda.memory_reserved() + (64 << 20)
    torch.cuda.set_per_process_memory_fraction(room / total)
    got = encoder.encode_document(texts, batch_tokens=1 << 20)
    assert warnings_of_nomoe.text.count("did not fit in memory") == 1
    distances = distances_of(torch.from_numpy(got), torch.from_numpy(right))
    assert distances.median() <= 1e-9
    assert (distances > 1e-4).float().mean() <= 0.001


def test_warmup_leaves_nothing_to_record(tiny_folder: Path) -> None:
    encoder = Encoder.from_pretrained(tiny_folder, device="cuda").warmup()
    recorded = set(encoder._engine.recordings)
    assert {Bucket(16, 1), Bucket(512, 1)} <= recorded
    # where it is
    encoder.to("cuda")
    assert set(encoder._engine.recordings) == recorded
    for words in range(1, 520, 7):
        encoder.encode_query("a " * words)
    assert set(encoder._engine.recordings) == recorded


def test_an_encoder_moved_away_and_back(tiny_folder: Path) -> None:
    encoder = Encoder.from_pretrained(tiny_folder, device="cuda", dtype="float32").warmup()
    before = encoder.encode_query("a")
    encoder.to("cpu")
    torch.cuda.empty_cache()
    assert np.abs(encoder.encode_query("a") - before).max() < 1e-5
    encoder.to("cuda")
    for _ in range(3):
        assert np.abs(encoder.encode_query("a") - before).max() < 1e-6
