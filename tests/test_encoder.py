"""Encoder: what users call, against vectors made by hand from the model's hidden states."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nomoe import Encoder, data, pipeline
from nomoe.engine import BATCH_TOKENS

TEXTS = [text for group in data.sentences().values() for text in group]
# 5e-7 at width 768 (tests/test_model.py); features of a unit vector of 96 are sqrt(8) times larger
DRIFT = 5e-7 * 8**0.5


def by_hand(encoder: Encoder, text: str, dim: int = 96) -> np.ndarray:
    """Tokenise, run, average, cut and normalise one text on its own."""
    ids = encoder.tokenizer.backend.encode(text).ids
    with torch.no_grad():
        hidden_TD = encoder.model.forward_packed(torch.tensor(ids), [len(ids)])[0]
    vector = hidden_TD.double().mean(0)[:dim].numpy()
    return vector / np.linalg.norm(vector)


def test_encode_gives_unit_vectors_in_order(encoder: Encoder) -> None:
    vectors = encoder.encode(TEXTS, prompt_name="query")
    assert vectors.dtype == np.float32
    assert vectors.shape == (100, 96)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    for i in range(0, 100, 7):
        expected = by_hand(encoder, "search_query: " + TEXTS[i])
        np.testing.assert_allclose(vectors[i], expected, atol=2e-6)


def test_shapes(encoder: Encoder) -> None:
    one = encoder.encode("search_query: hello")
    assert one.shape == (96,)
    assert encoder.encode(["search_query: hello"]).shape == (1, 96)
    np.testing.assert_array_equal(one, encoder.encode(["search_query: hello"])[0])
    assert encoder.encode([]).shape == (0, 96)
    assert encoder.encode([], truncate_dim=10, precision="int8").dtype == np.int8
    assert encoder.encode([], convert_to_tensor=True).shape == (0, 96)
    assert encoder.encode([], convert_to_numpy=False) == []
    for sequence in (tuple(TEXTS[:3]), np.array(TEXTS[:3])):
        np.testing.assert_array_equal(
            encoder.encode(sequence, "query"), encoder.encode(TEXTS[:3], "query")
        )


def test_prompts(encoder: Encoder) -> None:
    assert encoder.prompts["query"] == "search_query: "
    assert encoder.prompts["passage"] == encoder.prompts["document"] == "search_document: "
    text = "The tide turns twice a day."
    queries = {
        "encode_query": encoder.encode_query(text),
        "name": encoder.encode(text, prompt_name="query"),
        "prompt": encoder.encode(text, prompt="search_query: "),
        "prompt beats name": encoder.encode(text, prompt_name="passage", prompt="search_query: "),
        "written out": encoder.encode("search_query: " + text, prompt=""),
        "given to encode_document": encoder.encode_document(text, prompt_name="query"),
    }
    expected = by_hand(encoder, "search_query: " + text)
    for way, vector in queries.items():
        np.testing.assert_allclose(vector, expected, atol=2e-6, err_msg=way)
    document = encoder.encode_document(text)
    np.testing.assert_allclose(document, by_hand(encoder, "search_document: " + text), atol=2e-6)
    assert np.abs(document - expected).max() > 0.01


def test_unknown_prompt(encoder: Encoder) -> None:
    with pytest.raises(ValueError, match=r"no prompt is named 'doc'; known: .*document.*query"):
        encoder.encode(["a"], prompt_name="doc")
    for encode in (encoder.encode_query, encoder.encode_document):
        with pytest.raises(ValueError, match="no prompt is named ''"):
            encode(["a"], prompt_name="")
    with pytest.raises(TypeError, match="prompt is int"):
        encoder.encode(["a"], prompt=3)  # type: ignore[arg-type]


def test_a_missing_prompt_is_logged_once(
    encoder: Encoder, warnings_of_nomoe: pytest.LogCaptureFixture
) -> None:
    encoder.encode(["search_query: a", "clustering: b"])
    encoder.encode(["a"], prompt="")
    encoder.encode_document(["a"])
    assert not warnings_of_nomoe.records
    encoder.encode(["search_query: a", "bare"])
    encoder.encode(["bare"])
    list(encoder.stream(["bare"]))
    assert len(warnings_of_nomoe.records) == 1
    assert "without a prompt" in warnings_of_nomoe.text


def test_matryoshka(encoder: Encoder, tiny_folder: Path) -> None:
    cut = encoder.encode(TEXTS[:5], "query", truncate_dim=32)
    assert cut.shape == (5, 32)
    np.testing.assert_allclose(np.linalg.norm(cut, axis=1), 1, atol=1e-6)
    for vector, text in zip(cut, TEXTS, strict=False):
        np.testing.assert_allclose(vector, by_hand(encoder, "search_query: " + text, 32), atol=2e-6)

    # as SentenceTransformer on this checkpoint: normalised before the cut, not after
    full = encoder.encode(TEXTS[:5], "query")
    raw = encoder.encode(TEXTS[:5], "query", truncate_dim=32, normalize_embeddings=False)
    np.testing.assert_allclose(raw, full[:, :32], atol=1e-6)
    assert (np.linalg.norm(raw, axis=1) < 0.99).all()

    always = Encoder.from_pretrained(tiny_folder, truncate_dim=32)
    assert always.get_embedding_dimension() == always.get_sentence_embedding_dimension() == 32
    np.testing.assert_array_equal(always.encode(TEXTS[:5], "query"), cut)
    assert always.encode(TEXTS[:5], "query", truncate_dim=8).shape == (5, 8)
    assert encoder.encode(TEXTS[:5], "query", truncate_dim=np.int64(8)).shape == (5, 8)
    with pytest.raises(ValueError, match="expected 1 to 96"):
        always.truncate_dim = 5000
    for wrong in (0, 97, -1, 2.5, True):
        with pytest.raises(ValueError, match=r"truncate_dim is .* expected 1 to 96"):
            encoder.encode(["a"], truncate_dim=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected 1 to 96"):
        Encoder.from_pretrained(tiny_folder, truncate_dim=97)


def test_outputs(encoder: Encoder) -> None:
    texts = TEXTS[:4]
    expected = encoder.encode(texts, "query")
    tensor = encoder.encode(texts, "query", convert_to_tensor=True)
    assert isinstance(tensor, torch.Tensor)
    assert tensor.dtype == torch.float32
    assert tensor.device == encoder.device
    np.testing.assert_array_equal(tensor.numpy(), expected)
    rows = encoder.encode(texts, "query", convert_to_numpy=False)
    assert [row.shape for row in rows] == [(96,)] * 4
    # usable in training a head on top, unlike tensors of inference mode
    head = torch.nn.Linear(96, 2)
    head(tensor).sum().backward()
    assert head.weight.grad is not None


def test_token_embeddings(encoder: Encoder) -> None:
    texts = ["search_query: " + text for text in TEXTS[:9]]
    vectors = encoder.encode(texts)
    tokens = encoder.encode(texts, output_value="token_embeddings")
    full = encoder.encode(texts, output_value=None)
    for text, vector, token, row in zip(texts, vectors, tokens, full, strict=True):
        ids = encoder.tokenizer.backend.encode(text).ids
        assert token.shape == (len(ids), 96)
        mean = token.double().mean(0).numpy()
        np.testing.assert_allclose(mean / np.linalg.norm(mean), vector, atol=1e-6)
        assert row["input_ids"].tolist() == ids
        assert row["attention_mask"].tolist() == [1] * len(ids)
        assert torch.equal(row["token_embeddings"], token)
        np.testing.assert_array_equal(row["sentence_embedding"].numpy(), vector)
    assert encoder.encode(texts[0], output_value="token_embeddings").shape == tokens[0].shape
    with pytest.raises(ValueError, match="precision applies"):
        encoder.encode(texts, output_value=None, precision="int8")
    with pytest.raises(ValueError, match="output_value is 'pooled'"):
        encoder.encode(texts, output_value="pooled")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "batching", [{}, {"batch_size": 1}, {"batch_size": 7}, {"batch_tokens": 40}]
)
def test_batching_moves_vectors_by_rounding_only(
    encoder: Encoder, batching: dict[str, int]
) -> None:
    expected = encoder.encode(TEXTS, "document")
    vectors = encoder.encode(TEXTS, "document", **batching)
    assert np.abs(vectors - expected).max() <= DRIFT
    shuffled = encoder.encode(TEXTS[::-1], "document", **batching)[::-1]
    assert np.abs(shuffled - expected).max() <= DRIFT


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"batch_tokens": -1}, {"batch_size": "8"}])
def test_refuses_bad_batching(encoder: Encoder, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is"):
        encoder.encode(["a"], **wrong)


def test_many_windows(encoder: Encoder) -> None:
    """Several windows, so that tokenising ahead and forwarding interleave."""
    texts = [f"{text} {i}" for i, text in enumerate(TEXTS * 3)]
    expected = encoder.encode(texts, "query")
    budget = 8  # 128 characters a window
    vectors = encoder.encode(texts, "query", batch_tokens=budget)
    assert np.abs(vectors - expected).max() <= DRIFT
    parts = list(encoder.stream(iter(texts), "query", batch_tokens=budget))
    assert len(parts) > 50
    np.testing.assert_array_equal(np.concatenate(parts), vectors)


def test_what_does_not_fit_in_memory_is_halved(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch, warnings_of_nomoe: pytest.LogCaptureFixture
) -> None:
    texts = TEXTS * 4
    right = encoder.encode(texts, "query")
    tokens = encoder.encode(texts, "query", output_value="token_embeddings")
    routes = encoder.route(texts, "query")
    forward = encoder.model.forward_packed

    def cramped(ids_T: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        if len(ids_T) > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(ids_T, *arguments, **options)

    monkeypatch.setattr(encoder.model, "forward_packed", cramped)
    assert np.abs(encoder.encode(texts, "query") - right).max() <= DRIFT
    assert len(warnings_of_nomoe.records) == 1
    streamed = np.concatenate(list(encoder.stream(texts, "query")))
    assert np.abs(streamed - right).max() <= DRIFT
    for one, other in zip(
        encoder.encode(texts, "query", output_value="token_embeddings"), tokens, strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    again = encoder.route(texts, "query")
    for one, other in zip(again.experts, routes.experts, strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(torch.OutOfMemoryError, match="a text of 512 tokens does not fit"):
        encoder.encode(["word " * 600, *texts], "query")


def test_two_batches_under_way_give_the_same_vectors(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where a window's last batch is waited for after the next window's first."""
    run_batches = pipeline.run_batches
    monkeypatch.setattr(
        pipeline, "run_batches", lambda *given, depth, **rest: run_batches(*given, depth=2, **rest)
    )
    texts = [f"{text} {i}" for i, text in enumerate(TEXTS * 3)]
    ahead = list(encoder.stream(iter(texts), "query", batch_tokens=32))
    monkeypatch.undo()
    plain = list(encoder.stream(iter(texts), "query", batch_tokens=32))
    assert len(plain) == len(ahead) > 10
    for one, other in zip(ahead, plain, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("texts", [1, 20])
def test_warmup(encoder: Encoder, monkeypatch: pytest.MonkeyPatch, texts: int) -> None:
    forward, ran = encoder.model.forward_packed, []

    def counted(ids_T: torch.Tensor, lengths: list[int], **options: Any) -> Any:
        ran.append(lengths)
        return forward(ids_T, lengths, **options)

    monkeypatch.setattr(encoder.model, "forward_packed", counted)
    assert encoder.warmup(texts) is encoder
    assert ran == [[8]], "a CPU records nothing: one small batch"
    with pytest.raises(ValueError, match="texts is 0, expected a whole number of at least 1"):
        encoder.warmup(0)
    with pytest.raises(ValueError, match="truncate_dim is 97"):
        encoder.warmup(truncate_dim=97)


def test_a_call_that_moves_the_model_takes_the_new_devices_budget(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[str] = []
    monkeypatch.setattr(encoder, "to", moved.append)
    monkeypatch.setattr("nomoe.encoder.token_budget", lambda _: 64 if moved else 8192)
    budgets: list[int] = []
    tokenized = pipeline.tokenized
    monkeypatch.setattr(
        pipeline,
        "tokenized",
        lambda tokenizer, texts, plan: (
            budgets.append(plan.batch_tokens) or tokenized(tokenizer, texts, plan)
        ),
    )
    texts = ["a " * 200] * 20
    encoder.encode_document(texts)
    encoder.encode_document(texts, device="cpu")
    encoder.encode_document(texts, device="cpu", batch_tokens=100)
    assert budgets == [8192, 64, 100]


def test_few_tokens_are_embedded_without_a_look_at_the_memory(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[object] = []
    monkeypatch.setattr("nomoe.encoder.token_budget", lambda model: looks.append(model) or 8192)
    encoder.encode_query("a " * 3000)
    encoder.encode_query(["a"] * 100)
    assert not looks
    encoder.encode_query(["a " * 50] * 100)
    assert len(looks) == 1


def test_another_model_gets_another_engine(encoder: Encoder, tiny_folder: Path) -> None:
    encoder.encode_query("a")
    other = Encoder.from_pretrained(tiny_folder, device="cpu", dtype="bfloat16")
    encoder.model = other.model
    np.testing.assert_array_equal(encoder.encode_query("a"), other.encode_query("a"))


def test_stream_reads_lazily_and_holds_little(encoder: Encoder) -> None:
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield f"text {taken}"

    parts = encoder.stream(endless(), prompt_name="document", batch_tokens=16)
    first = next(parts)
    assert first.shape[1] == 96
    assert taken < 4 * len(first)
    for _ in range(10):
        next(parts)
    assert taken < 14 * len(first)
    parts.close()


def test_stream_checks_its_arguments_at_once(encoder: Encoder) -> None:
    with pytest.raises(TypeError, match="an iterable of texts, not one str"):
        encoder.stream("text")
    with pytest.raises(ValueError, match="no prompt is named"):
        encoder.stream(["text"], prompt_name="nothing")
    with pytest.raises(TypeError, match="text 2 is int"):
        list(encoder.stream(["a", "b", 3], prompt=""))  # type: ignore[list-item]
    assert list(encoder.stream([])) == []


def test_an_exception_of_the_iterable_passes_through(encoder: Encoder) -> None:
    def failing() -> Iterator[str]:
        yield from TEXTS
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        list(encoder.stream(failing(), "query", batch_tokens=8))


def test_stream_quantises(encoder: Encoder) -> None:
    parts = list(encoder.stream(TEXTS, "query", precision="int8", truncate_dim=64, batch_tokens=64))
    whole = encoder.encode(TEXTS, "query", precision="int8", truncate_dim=64)
    assert parts[0].dtype == np.int8
    assert np.abs(np.concatenate(parts).astype(int) - whole.astype(int)).max() <= 1


LONG = "tide " * 2000


def test_too_long_is_cut_and_counted(
    encoder: Encoder, warnings_of_nomoe: pytest.LogCaptureFixture
) -> None:
    assert encoder.max_seq_length == 512
    rows = encoder.encode([LONG, "short", LONG], "query", output_value=None)
    assert [len(row["input_ids"]) for row in rows] == [512, len(rows[1]["input_ids"]), 512]
    assert rows[0]["input_ids"][-1] == 2, "</s> is kept"
    (record,) = warnings_of_nomoe.records
    assert "2 of 3 texts were longer than max_seq_length=512" in record.getMessage()


def test_too_long_is_refused_before_any_compute(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder.model, "forward_packed", lambda *_: pytest.fail("computed"))
    with pytest.raises(ValueError, match=r"text 100 has \d+ tokens.* max_seq_length=512"):
        encoder.encode([*TEXTS, LONG], "query", on_too_long="error", batch_tokens=16)
    with pytest.raises(ValueError, match="on_too_long is 'drop'"):
        encoder.encode(["a"], on_too_long="drop")  # type: ignore[arg-type]


def test_max_seq_length(encoder: Encoder, tiny_folder: Path) -> None:
    encoder.max_seq_length = 16
    assert len(encoder.encode(LONG, "query", output_value="token_embeddings")) == 16
    longer = Encoder.from_pretrained(tiny_folder, max_seq_length=2048)
    for text in (LONG, LONG[: len(LONG) // 2], 2 * LONG):
        whole = len(encoder.tokenizer.backend.encode("search_query: " + text).ids)
        rows = longer.encode(text, "query", output_value="token_embeddings")
        assert len(rows) == min(whole, 2048)
    for wrong in (2, 2049, 12.5, None):
        with pytest.raises(ValueError, match="expected 3 to 2048 tokens"):
            encoder.max_seq_length = wrong  # type: ignore[assignment]


NOT_TEXT: dict[str, tuple[Any, str]] = {
    "None": (None, "inputs is NoneType"),
    "number": (3, "inputs is int"),
    "bytes": (b"text", "inputs is bytes"),
    "set": ({"a", "b"}, "inputs is set"),
    "dict": ({"a": 1}, "inputs is dict, .*; of a table, pass one column"),
    "generator": ((text for text in ["a"]), "inputs is generator"),
    "None inside": (["a", None], "text 1 is NoneType"),
    "bytes inside": (["a", "b", b"c"], "text 2 is bytes"),
    "list inside": ([["a", "b"]], "text 0 is list"),
    "number inside": (["a"] * 5000 + [1.5], "text 5000 is float"),
    "numbers": (np.zeros(3), "text 0 is float64"),
    "array of no dimension": (np.array("a"), "inputs is ndarray"),
}


@pytest.mark.parametrize("case", list(NOT_TEXT))
@pytest.mark.parametrize("method", ["encode", "encode_query", "encode_document", "route"])
def test_refuses_what_is_not_text(
    encoder: Encoder, case: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder.model, "forward_packed", lambda *_: pytest.fail("computed"))
    inputs, message = NOT_TEXT[case]
    with pytest.raises(TypeError, match=message):
        getattr(encoder, method)(inputs)


class Frame(dict[str, list[str]]):
    """As a data frame: iterating gives the names of its columns."""

    columns = ("text",)


@pytest.mark.parametrize("inputs", [{"a": "some text"}, Frame(text=["a"]), "text", b"text"])
def test_stream_refuses_what_would_give_something_else(encoder: Encoder, inputs: Any) -> None:
    with pytest.raises(TypeError, match=f"texts, not one {type(inputs).__name__}"):
        encoder.stream(inputs, "document")


def test_refuses_lone_surrogates_by_position(encoder: Encoder) -> None:
    with pytest.raises(ValueError, match=r"text 1 holds a lone surrogate \(U\+D83D at character 2"):
        encoder.encode(["fine 😀", "a \ud83d b"], "query")
    with pytest.raises(ValueError, match="text 0 holds a lone surrogate"):
        encoder.encode(["a"], prompt="\ud800")


@pytest.mark.parametrize(
    "text",
    ["", " ", "\x00", "a\x00b", "\x07\x1b[31m", "\u200d\u200b", "\ufffd", "🧑🏽‍🚀", "\r\n\t"],
)
def test_odd_texts_are_embedded(encoder: Encoder, text: str) -> None:
    vector = encoder.encode(text, prompt="")
    np.testing.assert_allclose(vector, by_hand(encoder, text), atol=2e-6)


def test_ten_megabytes_of_text(encoder: Encoder) -> None:
    huge = "The tide turns twice a day. " * 370_000
    assert len(huge) > 10_000_000
    cut = encoder.encode([huge], "query")[0]
    np.testing.assert_allclose(cut, encoder.encode(huge[:20_000], "query"), atol=1e-6)


def test_a_word_of_a_hundred_thousand_characters(encoder: Encoder) -> None:
    assert np.isfinite(encoder.encode("x" * 100_000, "query")).all()


def test_similarity(encoder: Encoder) -> None:
    vectors = encoder.encode(TEXTS[:6], "query")
    unit = vectors.astype(np.float64)
    expected = unit @ unit.T
    tensor = torch.from_numpy(vectors)
    frozen, backwards = vectors.copy(), vectors[:, ::-1].copy()
    frozen.setflags(write=False)
    lists: tuple[Sequence[Any], ...] = (
        list(tensor),
        tuple(tensor),
        list(vectors),
        [*tensor[:2], *frozen[2:]],
        list(frozen),
        [one[::-1] for one in backwards],
        [one.astype(">f4") for one in vectors],
    )
    for first in (vectors, tensor, *lists, vectors.tolist(), 3 * vectors):
        with warnings.catch_warnings():
            # torch warns of lists of arrays, which it takes slowly
            warnings.simplefilter("error")
            result = encoder.similarity(first, vectors[:4])
        assert isinstance(result, torch.Tensor)
        np.testing.assert_allclose(result.numpy(), expected[:, :4], atol=1e-6)
    np.testing.assert_allclose(
        encoder.similarity(vectors[0], vectors[1]).numpy(), expected[:1, 1:2], atol=1e-6
    )
    np.testing.assert_allclose(
        encoder.similarity_pairwise(vectors[:3], vectors[3:]).numpy(),
        expected[[0, 1, 2], [3, 4, 5]],
        atol=1e-6,
    )
    assert encoder.similarity_pairwise(vectors[0], vectors[0]).shape == (1,)
    assert encoder.similarity(list(vectors[0]), vectors[0].tolist()).shape == (1, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for one in (frozen, backwards[:, ::-1], vectors.astype(">f4")):
            torch.testing.assert_close(
                encoder.similarity(one, vectors), encoder.similarity(vectors, vectors)
            )
    with pytest.raises(ValueError, match=r"are \[\(96,\), \(32,\)\], not alike"):
        encoder.similarity([tensor[0], tensor[1, :32]], vectors)
    with pytest.raises(ValueError, match="3 rows cannot be paired with 2"):
        encoder.similarity_pairwise(vectors[:3], vectors[:2])
    with pytest.raises(ValueError, match="96 and 32 features"):
        encoder.similarity(vectors, vectors[:, :32])
    # where the tensors are
    mixed = [torch.ones(96, device="meta"), np.ones(96, np.float32)]
    assert encoder.similarity(mixed, mixed).device.type == "meta"
    for codes in (np.ones((2, 96), np.uint8), torch.ones(2, 96, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="uint8 have no cosine"):
            encoder.similarity(codes, vectors)
    with pytest.raises(ValueError, match=r"expected \(d,\) or \(n, d\)"):
        encoder.similarity(vectors[None], vectors)
    codes = encoder.encode(TEXTS[:6], "query", precision="int8")
    np.testing.assert_allclose(encoder.similarity(codes, codes).numpy(), expected, atol=0.02)


def test_routes(encoder: Encoder) -> None:
    texts = TEXTS[:30]
    routes = encoder.route(texts, prompt_name="document")
    total = 0
    for text, tokens, experts, weights in zip(
        texts, routes.tokens, routes.experts, routes.weights, strict=True
    ):
        expected = encoder.tokenizer.backend.encode("search_document: " + text)
        assert tokens == expected.tokens
        assert experts.shape == weights.shape == (len(tokens), 6, 2)
        output = encoder.model.forward_packed(
            torch.tensor(expected.ids), [len(tokens)], output_routing=True
        )
        alone = torch.stack(output.router_experts, 1).numpy()
        # a near-tie may fall either way in another batch
        assert (experts != alone).mean() < 0.01
        same = (experts == alone).all(-1)
        ours = torch.stack(output.router_weights, 1).detach().numpy()
        np.testing.assert_allclose(weights[same], ours[same], atol=1e-5)
        total += len(tokens)
    assert routes.layers == (1, 3, 5, 7, 9, 11)
    assert routes.counts.shape == (6, 8)
    assert routes.counts.sum(axis=1).tolist() == [2 * total] * 6
    stacked = np.concatenate([one.reshape(-1, 6, 2) for one in routes.experts])
    for layer in range(6):
        expected_counts = np.bincount(stacked[:, layer].ravel(), minlength=8)
        assert routes.counts[layer].tolist() == expected_counts.tolist()
    assert len(routes.table().splitlines()) == 7
    empty = encoder.route([])
    assert empty.tokens == []
    assert empty.counts.sum() == 0
    assert "0.0%" in empty.table()
    assert len(encoder.route("one", "query").tokens) == 1


def test_route_picture(encoder: Encoder, tmp_path: Path) -> None:
    encoder.route(TEXTS, "query").save_picture(tmp_path / "routes.png", "expert use")
    assert (tmp_path / "routes.png").read_bytes().startswith(b"\x89PNG")
    encoder.route(TEXTS[:1], "query").save_picture(tmp_path / "routes.svg")
    assert b"<svg" in (tmp_path / "routes.svg").read_bytes()


def test_progress_bar(encoder: Encoder, capsys: pytest.CaptureFixture[str]) -> None:
    encoder.encode(TEXTS, "query", show_progress_bar=True)
    assert "100/100" in capsys.readouterr().err
    encoder.encode(TEXTS, "query")
    encoder.encode(TEXTS, "query", show_progress_bar=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_other_dtypes_give_float32_vectors(encoder: Encoder, tiny_folder: Path, dtype: str) -> None:
    other = Encoder.from_pretrained(tiny_folder, device="cpu", dtype=dtype)
    assert str(other.dtype) == f"torch.{dtype}"
    vectors = other.encode(TEXTS, "query")
    assert vectors.dtype == np.float32
    cosines = (vectors * encoder.encode(TEXTS, "query")).sum(1)
    assert np.median(1 - cosines) < (1e-5 if dtype == "float16" else 1e-3)
    assert other.encode("a", "query", convert_to_tensor=True).dtype == torch.float32
    tokens = other.encode("a", "query", output_value="token_embeddings")
    assert tokens.dtype == torch.float32


def test_properties(encoder: Encoder) -> None:
    assert encoder.device == torch.device("cpu")
    assert encoder.dtype == torch.float32
    assert encoder.backend == "torch"
    assert encoder.get_embedding_dimension() == 96
    assert encoder.to("cpu") is encoder
    np.testing.assert_array_equal(
        encoder.encode("a", "query", device="cpu"), encoder.encode("a", "query")
    )
    assert set(BATCH_TOKENS) == {"cpu", "cuda"}


def test_parameters_are_sentence_transformers_in_its_order() -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    theirs = list(inspect.signature(sentence_transformers.SentenceTransformer.encode).parameters)
    ours = list(inspect.signature(Encoder.encode).parameters)
    shared = theirs[: theirs.index("truncate_dim") + 1]
    assert ours[: len(shared)] == shared


def test_query_and_document_take_encodes_parameters_by_position(encoder: Encoder) -> None:
    for method, prompt in ((encoder.encode_query, "query"), (encoder.encode_document, "document")):
        tensor = method(
            TEXTS[:3], None, None, 2, False, "sentence_embedding", "float32", True, True
        )
        assert isinstance(tensor, torch.Tensor)
        expected = encoder.encode(TEXTS[:3], prompt_name=prompt, batch_size=2)
        np.testing.assert_array_equal(tensor.numpy(), expected)
        assert method([], truncate_dim=4).shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_torchs_default_dtype_changes_nothing(encoder: Encoder, dtype: torch.dtype) -> None:
    expected = encoder.encode_query(TEXTS[:5])
    torch.set_default_dtype(dtype)
    try:
        np.testing.assert_array_equal(encoder.encode_query(TEXTS[:5]), expected)
        assert encoder.encode_query([]).dtype == np.float32
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("library")
def test_torchs_default_device_changes_nothing(tiny_folder: Path) -> None:
    """A program for a GPU may have set it; "meta" holds no numbers, so that any use of it shows."""
    texts = [f"{number} " * number for number in range(1, 60)]

    def everything() -> list[Any]:
        encoder = Encoder.from_pretrained(tiny_folder, device="cpu").warmup()
        token_embeddings = encoder.encode(texts[:3], output_value="token_embeddings")
        return [
            encoder.encode_query(texts),
            encoder.encode_document(texts[0], convert_to_tensor=True),
            *encoder.stream(texts, "query", precision="int8"),
            *token_embeddings,
            encoder.route(texts).counts,
            encoder.similarity(np.eye(3), np.eye(3).tolist()),
        ]

    expected = everything()
    torch.set_default_device("meta")
    try:
        got = everything()
    finally:
        torch.set_default_device(None)
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_fixed_ranges_are_for_unit_vectors(encoder: Encoder) -> None:
    short: dict[str, Any] = {"truncate_dim": 8, "normalize_embeddings": False}
    with pytest.raises(ValueError, match="for unit vectors"):
        encoder.encode(TEXTS[:2], "query", precision="int8", **short)
    limits = np.stack([np.full(8, -0.2), np.full(8, 0.2)])
    assert encoder.encode(TEXTS[:2], "query", precision="int8", ranges=limits, **short).any()


def test_threads_share_an_encoder(encoder: Encoder) -> None:
    from concurrent.futures import ThreadPoolExecutor

    expected = encoder.encode(TEXTS, "query")
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: encoder.encode(TEXTS, "query"), range(8)))
    for result in results:
        assert np.abs(result - expected).max() <= DRIFT


def test_nothing_is_logged_on_plain_use(encoder: Encoder, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        encoder.encode_query(TEXTS)
    assert not caplog.records
