"""A checkpoint's config.json, checked: what changes a result is honoured or refused by name."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

# key -> the values under which nomoe's result is the model's; the first one is what the reference
# code assumes where the key is absent. An absent key whose default is not listed is refused too.
_FIXED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu",),
    "rotary_emb_fraction": (1.0,),
    "rotary_emb_interleaved": (False,),
    "rotary_emb_scale_base": (None,),
    "rotary_scaling_factor": (None,),
    "prenorm": (False,),
    "parallel_block": (False,),
    "causal": (False,),
    "use_rms_norm": (False, None),
    "qkv_proj_bias": (True,),
    "mlp_fc1_bias": (True,),
    "mlp_fc2_bias": (True,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "expert_choice_router": (False,),
    "num_shared_experts": (0, None),
    "ffn_div": (1,),
    "quantization_config": (None,),
    # how transformers 5 writes rotary settings
    "rope_parameters": (None,),
    "rope_scaling": (None,),
}
# the reference code's default for these is another one (gelu_new, 0.0), so silence is no consent
_MUST_BE_STATED = ("activation_function", "rotary_emb_fraction")

# far above any such model, so that a damaged file is refused before anything is built from it
_MOST = {
    "vocab_size": 10_000_000,
    "n_embd": 65_536,
    "n_head": 4096,
    "n_layer": 1000,
    "n_inner": 1_000_000,
    "n_positions": 1_000_000,
    "num_experts": 4096,
    "pad_vocab_size_multiple": 1_000_000,
    "type_vocab_size": 1000,
}

# keys that change nothing nomoe computes: training, other heads, other implementations' switches
_WITHOUT_EFFECT = frozenset(
    """
    _name_or_path add_pooling_layer architectures attn_pdrop auto_map bos_token_id
    dense_seq_output dtype embd_pdrop eos_token_id fused_bias_fc fused_dropout_add_ln
    initializer_range max_trained_positions moe_impl moe_resid_pdrop parallel_block_tied_norm
    reorder_and_upcast_attn resid_pdrop router_aux_loss_coef summary_activation
    summary_first_dropout summary_proj_to_labels summary_type summary_use_proj tie_word_embeddings
    torch_dtype transformers_version use_cache use_flash_attn use_xentropy
    """.split()
)


@dataclass(frozen=True, kw_only=True)
class NomicMoEConfig:
    """The settings of a nomic MoE encoder, under the names of its config.json.

    Raises:
        ValueError: A value out of range, with the name of the setting.
    """

    # rows of the word-embedding table, before rounding up to pad_vocab_size_multiple
    vocab_size: int
    # model width D
    n_embd: int
    # attention heads N; the head width H = n_embd / n_head must be even for the rotary halves
    n_head: int
    # encoder layers
    n_layer: int
    # experts E of a MoE layer
    num_experts: int
    # experts per token K
    moe_top_k: int
    # layer i is a MoE layer where i % moe_every_n_layers == 1
    moe_every_n_layers: int
    # feed-forward width F; null in the file means 4 * n_embd
    n_inner: int | None = None
    # longest sequence, in tokens
    n_positions: int = 2048
    # divide each token's K expert weights by their sum
    moe_normalize_expert_weights: bool = False
    # the word-embedding table is rounded up to a multiple of this
    pad_vocab_size_multiple: int = 1
    # rows of the token-type table, of which only row 0 is used
    type_vocab_size: int = 2
    # id that fills up a padded batch
    pad_token_id: int = 1
    layer_norm_epsilon: float = 1e-5
    # base of the rotary angles
    rotary_emb_base: float = 10000.0

    def __post_init__(self) -> None:
        if self.n_inner is None:
            object.__setattr__(self, "n_inner", 4 * self.n_embd)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "bool":
                if not isinstance(value, bool):
                    raise ValueError(f"{field.name} must be true or false, not {value!r}")
            elif field.type == "float":
                if not _is_number(value) or not abs(value) <= sys.float_info.max:
                    raise ValueError(f"{field.name} must be a finite number, not {value!r:.40}")
            elif not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"{field.name} must be a whole number, not {value!r}")
        for name, most in _MOST.items():
            self._require(name, 1 <= getattr(self, name) <= most, f"1 to {most:,}")
        self._require(
            "n_embd", self.n_embd % self.n_head == 0, f"a multiple of n_head={self.n_head}"
        )
        self._require("n_embd", self.head_width % 2 == 0, "twice a multiple of n_head, for rotary")
        self._require(
            "moe_top_k",
            1 <= self.moe_top_k <= self.num_experts,
            f"1 to {self.num_experts} (experts)",
        )
        self._require("moe_every_n_layers", self.moe_every_n_layers >= 2, "at least 2")
        self._require("n_layer", self.n_layer >= 2, "at least 2, or no layer is a MoE layer")
        self._require("pad_token_id", 0 <= self.pad_token_id < self.vocab_size, "in the vocabulary")
        self._require("layer_norm_epsilon", self.layer_norm_epsilon > 0, "above 0")
        self._require("rotary_emb_base", self.rotary_emb_base > 0, "above 0")

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f"{name} is {getattr(self, name)!r} but must be {allowed}")

    @property
    def head_width(self) -> int:
        """Width of one attention head, H."""
        return self.n_embd // self.n_head

    @property
    def ffn_width(self) -> int:
        """Width of the feed-forward layers and of each expert, F."""
        assert self.n_inner is not None
        return self.n_inner

    @property
    def embedding_rows(self) -> int:
        """Rows of the word-embedding table, V."""
        return -(-self.vocab_size // self.pad_vocab_size_multiple) * self.pad_vocab_size_multiple

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the MoE layers."""
        return tuple(i for i in range(self.n_layer) if self.is_moe_layer(i))

    def is_moe_layer(self, layer: int) -> bool:
        """Whether the feed-forward of this layer is a mixture of experts."""
        return layer % self.moe_every_n_layers == 1

    @classmethod
    def from_json(cls, path: str | Path) -> NomicMoEConfig:
        """Read a config.json.

        Raises:
            FileNotFoundError: The file is missing.
            ValueError: It is not JSON, or a setting is missing, out of range or not supported;
                all unsupported ones are listed.
        """
        path = Path(path)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise FileNotFoundError(f"no config.json at {path}") from None
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} holds {type(values).__name__}, expected a JSON object")
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> NomicMoEConfig:
        """Build from the contents of a config.json; unknown keys are ignored and logged.

        Raises:
            ValueError: As `from_json`.
        """
        if values.get("model_type", "nomic_bert") != "nomic_bert":
            raise ValueError(f"model_type is {values['model_type']!r}, expected 'nomic_bert'")
        if not values.get("num_experts"):
            raise ValueError(
                "num_experts is absent or 0: this is a dense nomic_bert (such as "
                "nomic-embed-text-v1.5), and nomoe runs the mixture of experts only; transformers "
                "5 and newer runs the dense model natively"
            )
        unsupported = [
            f"{key}={values[key]!r} (supported: {allowed[0]!r})"
            if key in values
            else f"{key} is absent (supported: {allowed[0]!r})"
            for key, allowed in _FIXED.items()
            if (key in values or key in _MUST_BE_STATED)
            and not any(_same(values.get(key, ...), one) for one in allowed)
        ]
        if unsupported:
            raise ValueError("unsupported settings: " + ", ".join(unsupported))

        fields = {field.name: field for field in dataclasses.fields(cls)}
        required = [name for name, f in fields.items() if f.default is dataclasses.MISSING]
        missing = [name for name in required if values.get(name) is None]
        if missing:
            raise ValueError("missing settings: " + ", ".join(missing))
        known = fields.keys() | _FIXED.keys() | _WITHOUT_EFFECT | {"model_type"}
        unknown = sorted(values.keys() - known)
        if unknown:
            logger.warning("config.json: ignoring unknown settings %s", ", ".join(unknown))
        # a null falls back to the default, as in the reference code
        return cls(**{name: values[name] for name in fields if values.get(name) is not None})


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _same(value: object, allowed: object) -> bool:
    """Equality that keeps booleans apart from numbers, but not 1 from 1.0."""
    return value == allowed and isinstance(value, bool) == isinstance(allowed, bool)
