"""The sentence-transformers files of a repository, and its tokenizer.json."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from nomoe import Encoder
from nomoe.corpus.embedder import resolve_settings
from nomoe.repository import TRAINED_PROMPTS, read_sentence_settings
from nomoe.tokenizer import Tokenizer


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A checkpoint that the test may change."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "checkpoint"))


def edit(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(values | changes), encoding="utf-8")


def test_the_published_settings(folder: Path) -> None:
    settings = read_sentence_settings(folder, 2048)
    assert settings.prompts == TRAINED_PROMPTS | {"document": "search_document: "}
    assert settings.max_seq_length == 512
    assert settings.normalizes
    assert settings.default_prompt_name is None


def test_absent_files_mean_the_published_model(tmp_path: Path) -> None:
    settings = read_sentence_settings(tmp_path, 2048)
    assert settings.prompts == TRAINED_PROMPTS | {"document": "search_document: "}
    assert settings.max_seq_length == 512
    assert settings.normalizes


def test_a_repositorys_own_settings(folder: Path) -> None:
    edit(
        folder / "config_sentence_transformers.json",
        prompts={"query": "q: ", "passage": "p: ", "document": ""},
        default_prompt_name="query",
    )
    edit(folder / "sentence_bert_config.json", max_seq_length=128)
    encoder = Encoder.from_pretrained(folder)
    assert encoder.prompts == {"query": "q: ", "passage": "p: ", "document": "p: "}
    assert encoder.max_seq_length == 128
    assert (encoder.encode("a") == encoder.encode("q: a", prompt="")).all()


@pytest.mark.parametrize(
    ("length", "expected"), [(128, 128), (8192, 2048), (10**30, 512), (1e30, 512), (None, 512)]
)
def test_length_that_the_tokenizer_holds(folder: Path, length: Any, expected: int) -> None:
    """sentence-transformers 6 saves none in its own file."""
    edit(folder / "sentence_bert_config.json", max_seq_length=None)
    edit(folder / "tokenizer_config.json", model_max_length=length)
    assert read_sentence_settings(folder, 2048).max_seq_length == expected


def test_a_length_of_the_tokenizer_that_is_none(folder: Path) -> None:
    edit(folder / "sentence_bert_config.json", max_seq_length=None)
    edit(folder / "tokenizer_config.json", model_max_length="long")
    with pytest.raises(ValueError, match="model_max_length is 'long'"):
        read_sentence_settings(folder, 2048)


def test_empty_prompts_are_none(folder: Path, warnings_of_nomoe: pytest.LogCaptureFixture) -> None:
    """sentence-transformers 6 writes them where nobody set prompts."""
    (folder / "config_sentence_transformers.json").write_text(
        '{"prompts": {"query": "", "document": ""}}'
    )
    settings = read_sentence_settings(folder, 2048)
    assert settings.prompts == TRAINED_PROMPTS | {"document": "search_document: "}
    assert "no prompt but empty ones" in warnings_of_nomoe.text
    (folder / "config_sentence_transformers.json").write_text(
        '{"prompts": {"query": "q: ", "document": ""}}'
    )
    assert read_sentence_settings(folder, 2048).prompts == {"query": "q: ", "document": ""}
    # one that is chosen is meant
    (folder / "config_sentence_transformers.json").write_text(
        '{"prompts": {"mine": ""}, "default_prompt_name": "mine"}'
    )
    assert read_sentence_settings(folder, 2048).prompts == {"mine": ""}


def test_a_repositorys_dimension_and_length_give_way_to_arguments(folder: Path) -> None:
    edit(folder / "sentence_bert_config.json", max_seq_length=None)
    edit(folder / "tokenizer_config.json", model_max_length=32)
    edit(folder / "config_sentence_transformers.json", truncate_dim=24)
    encoder = Encoder.from_pretrained(folder, device="cpu")
    assert (encoder.max_seq_length, encoder.truncate_dim) == (32, 24)
    assert encoder.encode_query("tide").shape == (24,)
    encoder = Encoder.from_pretrained(folder, device="cpu", max_seq_length=64, truncate_dim=96)
    assert (encoder.max_seq_length, encoder.truncate_dim) == (64, 96)
    settings = resolve_settings(folder, device="cpu")
    assert (settings.max_seq_length, settings.dim) == (32, 24)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("1_Pooling/config.json", {"pooling_mode_cls_token": True}, "pooling .* expected mean"),
        (
            "1_Pooling/config.json",
            {"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True},
            "pooling_mode_lasttoken",
        ),
        ("1_Pooling/config.json", {"pooling_mode": "cls"}, "pooling cls"),
        ("1_Pooling/config.json", {"include_prompt": False}, "include_prompt=false"),
        ("sentence_bert_config.json", {"max_seq_length": "long"}, "max_seq_length is 'long'"),
        ("sentence_bert_config.json", {"max_seq_length": 4096}, "expected 3 to 2048"),
        ("config_sentence_transformers.json", {"truncate_dim": "all"}, "truncate_dim is 'all'"),
        ("config_sentence_transformers.json", {"truncate_dim": 97}, "truncate_dim is 97"),
        ("config_sentence_transformers.json", {"prompts": ["a"]}, "prompts must map"),
        ("config_sentence_transformers.json", {"default_prompt_name": "x"}, "is no prompt"),
        ("config_sentence_transformers.json", {"similarity_fn_name": "euclidean"}, "euclidean"),
    ],
)
def test_refuses_other_pipelines(
    folder: Path, file: str, changes: dict[str, Any], message: str
) -> None:
    edit(folder / file, **changes)
    with pytest.raises(ValueError, match=message):
        Encoder.from_pretrained(folder)


def test_refuses_other_modules(folder: Path) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    modules.append({"idx": 3, "name": "3", "path": "3_Dense", "type": "x.models.Dense"})
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match=r"chains \['Transformer', 'Pooling', 'Normalize', 'Dense"):
        Encoder.from_pretrained(folder)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("modules.json", "[1, 2, 3]", "not a list of objects"),
        ("modules.json", "[" * 100_000, "not JSON"),
        ("sentence_bert_config.json", '{"do_lower_case": true}', "do_lower_case=true"),
        ("config_sentence_transformers.json", '{"default_prompt_name": ["x"]}', "is no prompt"),
        ("config_sentence_transformers.json", '{"prompts": {"q": "\\ud800"}}', "lone surrogate"),
        ("config_sentence_transformers.json", '{"prompts": {"q": null}}', "must map names"),
    ],
)
def test_odd_settings_are_refused(folder: Path, file: str, content: str, message: str) -> None:
    (folder / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        Encoder.from_pretrained(folder)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dtype": "float8"}, ValueError, "dtype is 'float8'"),
        ({"truncate_dim": 9999}, ValueError, "truncate_dim is 9999"),
        ({"max_seq_length": 99_999}, ValueError, "max_seq_length is 99999"),
        ({"max_seq_length": 0}, ValueError, "max_seq_length is 0"),
        ({"max_seq_length": 64.0}, ValueError, r"max_seq_length is 64\.0"),
        ({"backend": "triton", "dtype": "bfloat16"}, RuntimeError, "backend='triton' cannot run"),
        ({"device": "meta"}, ValueError, "computes nothing"),
        ({"device": "xpu"}, RuntimeError, "cannot use here"),
        ({"revision": "v1"}, ValueError, "has no revision 'v1'"),
    ],
)
def test_bad_arguments_are_found_before_the_weights_are_read(
    folder: Path, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    (folder / "model.safetensors").write_bytes(b"not read")
    with pytest.raises(error, match=message):
        Encoder.from_pretrained(folder, **arguments)


def test_a_pooling_whose_settings_are_absent_is_no_guess(folder: Path) -> None:
    shutil.rmtree(folder / "1_Pooling")
    with pytest.raises(FileNotFoundError, match=r"1_Pooling.config\.json, which is absent"):
        Encoder.from_pretrained(folder)


def test_without_a_normalize_module(folder: Path) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps(modules[:2]))
    encoder = Encoder.from_pretrained(folder)
    raw = encoder.encode("a", "query", normalize_embeddings=False)
    assert abs((raw**2).sum() - 1) > 0.1
    assert abs((encoder.encode("a", "query") ** 2).sum() - 1) < 1e-5


@pytest.mark.parametrize("file", ["modules.json", "config_sentence_transformers.json"])
def test_damaged_files(folder: Path, file: str) -> None:
    (folder / file).write_text("{")
    with pytest.raises(ValueError, match=f"{file} is not JSON"):
        Encoder.from_pretrained(folder)
    (folder / file).write_text("3")
    with pytest.raises(ValueError, match=f"{file} holds int"):
        Encoder.from_pretrained(folder)


def test_a_tokenizer_of_another_checkpoint(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"ids up to 2004, but the model's table has 1000 rows"):
        Tokenizer(folder / "tokenizer.json", vocabulary=1000)


def test_a_tokenizer_without_special_tokens(folder: Path) -> None:
    edit(folder / "tokenizer.json", post_processor=None)
    with pytest.raises(ValueError, match=r"turns 'a' into \[.*\], expected <s> \.\.\. </s>"):
        Encoder.from_pretrained(folder)


def test_a_tokenizer_with_two_end_tokens(folder: Path) -> None:
    processor = json.loads((folder / "tokenizer.json").read_text())["post_processor"]
    processor["single"] = [*processor["single"][1:], processor["single"][-1]]
    edit(folder / "tokenizer.json", post_processor=processor)
    with pytest.raises(ValueError, match=r"expected <s> \.\.\. </s>"):
        Encoder.from_pretrained(folder)


def test_a_dot_product_of_vectors_of_any_length(folder: Path) -> None:
    edit(folder / "config_sentence_transformers.json", similarity_fn_name="dot")
    Encoder.from_pretrained(folder)
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps(modules[:2]))
    with pytest.raises(ValueError, match="similarity_fn_name 'dot' is unsupported"):
        Encoder.from_pretrained(folder)


def test_stored_truncation_and_padding_are_overridden(folder: Path, tiny_folder: Path) -> None:
    edit(
        folder / "tokenizer.json",
        truncation={"max_length": 8, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
        padding={
            "strategy": {"Fixed": 64},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 1,
            "pad_type_id": 0,
            "pad_token": "<pad>",
        },
    )
    text = "search_query: The tide turns twice a day, and so on and on."
    expected = Encoder.from_pretrained(tiny_folder).tokenizer([text], 512)
    assert Encoder.from_pretrained(folder).tokenizer([text], 512) == expected
    assert len(expected.ids[0]) > 8


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [(None, FileNotFoundError, "no tokenizer.json"), ("{}", ValueError, "not a tokenizer.json")],
)
def test_missing_or_damaged_tokenizer(
    folder: Path, content: str | None, error: type[Exception], message: str
) -> None:
    (folder / "tokenizer.json").unlink()
    if content is not None:
        (folder / "tokenizer.json").write_text(content)
    with pytest.raises(error, match=message):
        Encoder.from_pretrained(folder)
