from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from nomoe import NomicMoEConfig, data


@pytest.fixture
def values() -> dict[str, Any]:
    return data.real_config()


def test_the_published_config(values: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    config = NomicMoEConfig.from_dict(values)
    assert (config.n_embd, config.n_head, config.head_width, config.ffn_width) == (
        768,
        12,
        64,
        3072,
    )
    assert config.embedding_rows == 250_048
    assert config.moe_layers == (1, 3, 5, 7, 9, 11)
    assert (config.num_experts, config.moe_top_k) == (8, 2)
    assert config.rotary_emb_base == 10_000
    assert not caplog.records, "every key of the published config is known"


@pytest.mark.parametrize(
    ("every", "layers", "expected"), [(2, 5, (1, 3)), (3, 8, (1, 4, 7)), (12, 12, (1,))]
)
def test_layer_placement(
    values: dict[str, Any], every: int, layers: int, expected: tuple[int, ...]
) -> None:
    config = NomicMoEConfig.from_dict(values | {"moe_every_n_layers": every, "n_layer": layers})
    assert config.moe_layers == expected


def test_null_and_padded_sizes(values: dict[str, Any]) -> None:
    config = NomicMoEConfig.from_dict(values | {"n_inner": None, "vocab_size": 1000})
    assert config.ffn_width == 4 * 768
    assert config.embedding_rows == 1024


UNSUPPORTED = [
    ("activation_function", "gelu_new"),
    ("activation_function", "swiglu"),
    ("rotary_emb_fraction", 0.5),
    ("rotary_emb_fraction", 0.0),
    ("rotary_emb_interleaved", True),
    ("rotary_emb_scale_base", 512),
    ("rotary_scaling_factor", 2),
    ("prenorm", True),
    ("parallel_block", True),
    ("causal", True),
    ("use_rms_norm", True),
    ("qkv_proj_bias", False),
    ("mlp_fc1_bias", False),
    ("mlp_fc2_bias", False),
    ("scale_attn_weights", False),
    ("scale_attn_by_inverse_layer_idx", True),
    ("expert_choice_router", True),
    ("num_shared_experts", 1),
    ("ffn_div", 2),
    ("quantization_config", {"bits": 4}),
    ("rope_parameters", {"rope_theta": 1e6}),
]


@pytest.mark.parametrize(("key", "value"), UNSUPPORTED)
def test_refuses_what_it_does_not_compute(values: dict[str, Any], key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"unsupported settings: {key}="):
        NomicMoEConfig.from_dict(values | {key: value})


def test_lists_all_unsupported_settings_at_once(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"rotary_emb_interleaved=True.*prenorm=True.*causal=True"):
        NomicMoEConfig.from_dict(
            values | {"rotary_emb_interleaved": True, "prenorm": True, "causal": True}
        )


@pytest.mark.parametrize("key", ["activation_function", "rotary_emb_fraction"])
def test_silence_is_refused_where_the_reference_assumes_otherwise(
    values: dict[str, Any], key: str
) -> None:
    del values[key]
    with pytest.raises(ValueError, match=f"{key} is absent"):
        NomicMoEConfig.from_dict(values)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_size", 0),
        ("n_embd", 770),
        ("n_embd", 780),  # head width 65
        ("n_head", "12"),
        ("n_head", 0),
        ("n_layer", 1),
        ("n_layer", 12.0),
        ("n_inner", -1),
        ("moe_top_k", 0),
        ("moe_top_k", 9),
        ("moe_every_n_layers", 0),
        ("moe_every_n_layers", 1),
        ("layer_norm_epsilon", 0),
        ("layer_norm_epsilon", "small"),
        ("layer_norm_epsilon", float("nan")),
        ("rotary_emb_base", -1),
        ("rotary_emb_base", 10**400),
        ("n_embd", 96 * 10**30),
        ("n_layer", 30_000),
        ("num_experts", 10**9),
        ("pad_token_id", 300_000),
        ("type_vocab_size", 0),
        ("moe_normalize_expert_weights", 1),
    ],
)
def test_refuses_absurd_values_by_name(values: dict[str, Any], key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=key):
        NomicMoEConfig.from_dict(values | {key: value})


def test_missing_sizes_are_listed(values: dict[str, Any]) -> None:
    del values["n_embd"], values["n_head"]
    with pytest.raises(ValueError, match="missing settings: n_embd, n_head"):
        NomicMoEConfig.from_dict(values)


def test_the_dense_model_is_named(values: dict[str, Any]) -> None:
    for key in ("num_experts", "moe_top_k", "moe_every_n_layers"):
        del values[key]
    with pytest.raises(ValueError, match=r"dense nomic_bert.*transformers"):
        NomicMoEConfig.from_dict(values)


def test_another_architecture(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="model_type is 'bert'"):
        NomicMoEConfig.from_dict(values | {"model_type": "bert"})


def test_unknown_keys_are_ignored_and_logged(
    values: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="nomoe"):
        config = NomicMoEConfig.from_dict(values | {"frobnicate": 3})
    assert config == NomicMoEConfig.from_dict(values)
    assert "frobnicate" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not JSON"),
        (b"[]", "holds list"),
        (b"\xff\xfe", "not JSON"),
        (b"", "not JSON"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_damaged_files(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        NomicMoEConfig.from_json(tmp_path / "config.json")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        NomicMoEConfig.from_json(tmp_path / "config.json")


def test_errors_name_the_file(tmp_path: Path, values: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(values | {"causal": True}))
    with pytest.raises(ValueError, match=r"config\.json: unsupported settings: causal"):
        NomicMoEConfig.from_json(tmp_path / "config.json")
