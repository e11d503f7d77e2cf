"""The model as transformers knows models, and how `AutoModel` comes to load it.

transformers 5 has a `nomic_bert` of its own, dense, which takes this checkpoint without an error
and throws its experts away. `register` puts the classes below in its place, for this process alone.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .. import data
from ..backends import BackendName
from ..checkpoint import is_finite
from ..config import NomicMoEConfig
from ..model import NomicMoEModel

MODEL_TYPE = "nomic_bert"
# earlier ones ask for a repository's own config before they ask who is registered
_OLDEST = (5, 12)

# the Auto classes that the published `auto_map` names
_AUTO_CLASSES = (
    "AutoModel",
    "AutoModelForMaskedLM",
    "AutoModelForMultipleChoice",
    "AutoModelForQuestionAnswering",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
)
# what transformers knows of every config, and what is none of the model's business
_NOT_OURS = frozenset(
    """
    chunk_size_feed_forward id2label is_encoder_decoder label2id output_attentions
    output_hidden_states problem_type return_dict
    """.split()
)


class HFNomicMoEConfig(PretrainedConfig):
    """config.json of a nomic mixture of experts as a transformers config, with its own keys.

    transformers' names for sizes (`hidden_size`, ...) are aliases. Saved, it names the class and
    the code that the published one names, so that other programs read the result.

    Args:
        values: The settings; none has a published default, and `num_experts` must be among them.

    Raises:
        ValueError: No experts.
    """

    model_type = MODEL_TYPE
    # some versions of transformers would make an empty one to compare with
    has_no_defaults_at_init = True
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "n_embd",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
        "intermediate_size": "n_inner",
        "max_position_embeddings": "n_positions",
        "layer_norm_eps": "layer_norm_epsilon",
        "num_experts_per_tok": "moe_top_k",
    }

    # what the model derives from the keys, defined once
    embedding_rows = NomicMoEConfig.embedding_rows
    ffn_width = NomicMoEConfig.ffn_width
    head_width = NomicMoEConfig.head_width
    is_moe_layer = NomicMoEConfig.is_moe_layer
    moe_layers = NomicMoEConfig.moe_layers

    def __init__(self, **values: Any) -> None:
        if not values.get("num_experts"):
            raise ValueError(
                "num_experts is absent or 0: give the settings of a mixture of experts, as its "
                "config.json has them, or make a transformers.NomicBertConfig for a dense model"
            )
        super().__init__(**values)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build from the contents of a config.json; a dense one gives transformers' own config.

        Raises:
            ValueError: A dense one, and this transformers has no class for it.
        """
        if config_dict.get("num_experts"):
            return super().from_dict(config_dict, **kwargs)
        native = _native_config()
        if native is None:
            raise ValueError(
                "num_experts is absent or 0: this is a dense nomic_bert, for which transformers "
                f"{transformers.__version__} has no class; nomoe.unregister() leaves it to the "
                "repository's own code"
            )
        return native.from_dict(config_dict, **kwargs)

    def checked(self) -> NomicMoEConfig:
        """Check the settings.

        Raises:
            ValueError: As `NomicMoEConfig.from_dict`.
        """
        values = self.to_dict()
        return NomicMoEConfig.from_dict(
            {key: value for key, value in values.items() if key not in _NOT_OURS}
        )

    def to_dict(self) -> dict[str, Any]:
        """All settings, with the class that their `auto_map` names, or the published pair."""
        published = data.real_config()
        values: dict[str, Any] = super().to_dict()
        if "AutoModel" not in (values.get("auto_map") or {}):
            # without a class for the model the rest of a map is of no use
            values["auto_map"] = published["auto_map"]
        # saving has put the name of nomoe's class there
        values["architectures"] = [values["auto_map"]["AutoModel"].rpartition(".")[2]]
        return values


@dataclass
class HFNomicMoEOutput(BaseModelOutput):
    """As `nomoe.model.NomicMoEOutput`, with hidden states (B, L, D) and routing (T, K)."""

    router_weights: tuple[Tensor, ...] | None = None
    router_experts: tuple[Tensor, ...] | None = None


class HFNomicMoEModel(NomicMoEModel, PreTrainedModel):
    """`NomicMoEModel` as a transformers model: the same modules, tensors and computation.

    It has no buffers: rotary angles are computed from positions in every forward, so there is
    nothing that loading could leave unfilled.

    Args:
        config: Its settings.
        nomoe_backend: "auto", "torch" or "triton". `from_pretrained(..., nomoe_backend="torch")`
            reaches it, and so does SentenceTransformer's `model_kwargs`, where "backend" is taken.

    Raises:
        ValueError: Settings that are unsupported or out of range.
        RuntimeError: The backend cannot run here.
    """

    config_class = HFNomicMoEConfig
    main_input_name = "input_ids"
    # torch's scaled_dot_product_attention runs on the torch backend, kernels of ours on triton
    _supports_sdpa = True

    def __init__(self, config: HFNomicMoEConfig, *, nomoe_backend: BackendName = "auto") -> None:
        checked = config.checked()
        # defaults that the file leaves out
        for field in dataclasses.fields(checked):
            setattr(config, field.name, getattr(checked, field.name))
        PreTrainedModel.__init__(self, config)
        NomicMoEModel.__init__(self, checked, backend=nomoe_backend)
        self.config: Any = config
        PreTrainedModel.post_init(self)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, *model_args: Any, **kwargs: Any
    ) -> Any:
        """Load as every transformers model; parameters are those of `PreTrainedModel`.

        Raises:
            ValueError: Tensors are missing, unexpected, of another shape or not finite in the
                dtype, settings unsupported, or `device_map` spreads the model over several devices.
            RuntimeError: The backend cannot run here.
        """
        _check_device_map(kwargs.get("device_map"))
        wants_info = kwargs.pop("output_loading_info", False)
        # past NomicMoEModel's own
        model, info = super(NomicMoEModel, cls).from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        problems = [
            f"{key}: {kind}"
            for kind in ("missing", "unexpected", "mismatched")
            for key in sorted(str(one) for one in info.get(f"{kind}_keys", ()))
        ]
        if problems:
            raise ValueError(
                f"{pretrained_model_name_or_path} does not fit its config.json:\n  "
                + "\n  ".join(problems)
            )
        spoiled = [
            name
            for name, tensor in model.state_dict().items()
            if not tensor.is_meta and not is_finite(tensor)
        ]
        if spoiled:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds NaN, infinite or (for {model.dtype}) too "
                "large values in: " + ", ".join(spoiled)
            )
        # a device map of one device moves nothing, it loads there
        _check_device_map(getattr(model, "hf_device_map", None))
        model.choose_backend()
        return (model, info) if wants_info else model

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_routing: bool = False,
        return_dict: bool | None = None,
        head_mask: Tensor | None = None,
    ) -> HFNomicMoEOutput | tuple[Any, ...]:
        """Encode a padded batch; padding is taken out inside.

        Args:
            input_ids: Token ids, (B, L).
            attention_mask: 1 for real tokens, 0 for padding, (B, L); None means no padding.
            token_type_ids: Accepted if all zero, (B, L).
            position_ids: Refused: a text's positions run from 0.
            inputs_embeds: Refused: the model takes ids.
            output_attentions: Refused: no kernel keeps the attention weights.
            output_hidden_states: Return the hidden states after the embedding norm and each layer.
            output_routing: Return the router's choice in each MoE layer.
            return_dict: False gives a tuple.
            head_mask: Refused: no head is left out.

        Returns:
            Hidden states (B, L, D), zeros at padding.

        Raises:
            ValueError: One of those refused, or as `NomicMoEModel.forward`.
            RuntimeError: Training on the triton backend, which has no backward pass.
        """
        # by name, for **others in the signature has Trainer hand over what it keeps back otherwise
        refused = {
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "head_mask": head_mask,
        }
        for name, given in refused.items():
            if given is not None:
                raise ValueError(f"{name} is not supported: the model takes ids and their mask")
        if input_ids is None:
            raise ValueError("input_ids is missing")
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise ValueError("output_attentions is not supported: attention weights are not kept")
        if self.backend.name == "triton" and self.training and torch.is_grad_enabled():
            self._refuse_training()
        output = super().forward(
            input_ids,
            attention_mask,
            token_type_ids,
            output_hidden_states=_chosen(output_hidden_states, self.config.output_hidden_states),
            output_routing=output_routing,
        )
        result = HFNomicMoEOutput(**output._asdict())
        return result if _chosen(return_dict, self.config.return_dict) else result.to_tuple()

    def _refuse_training(self) -> None:
        if any(parameter.requires_grad for parameter in self.parameters()):
            raise RuntimeError(
                "nomoe's Triton kernels have no backward pass: train on the torch backend, with "
                "AutoModel.from_pretrained(..., nomoe_backend='torch') or "
                "nomoe.sentence_transformer(..., backend='torch')"
            )

    def save_pretrained(self, save_directory: str | Path, *arguments: Any, **options: Any) -> None:
        """Save as every transformers model; tensors keep the checkpoint's own names."""
        # some versions would turn them into what they think they were before transformers read them
        options["save_original_format"] = False
        super().save_pretrained(save_directory, *arguments, **options)

    def get_input_embeddings(self) -> nn.Module:
        """The table of word embeddings."""
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the table of word embeddings."""
        self.embeddings.word_embeddings = value  # type: ignore[assignment]

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Module:
        """As every transformers model; rows stay a multiple of `pad_vocab_size_multiple`."""
        multiple = math.lcm(self.config.pad_vocab_size_multiple, pad_to_multiple_of or 1)
        table: nn.Module = super().resize_token_embeddings(
            new_num_tokens, pad_to_multiple_of=multiple, mean_resizing=mean_resizing
        )
        return table

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: `reset_parameters` has drawn what is not loaded, and all is loaded or none."""

    def __getstate__(self) -> dict[str, Any]:
        # a process that is sent the model registers as this one did
        return self.__dict__ | {"_registers": is_registered()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state.pop("_registers", False):
            register()
        super().__setstate__(state)


class _Refusal:
    """What an Auto class gives for a config that it must not load."""

    config_class: ClassVar[type]
    message: ClassVar[str]

    @classmethod
    def from_pretrained(cls, *arguments: Any, **options: Any) -> Any:
        raise ValueError(cls.message)

    @classmethod
    def _from_config(cls, *arguments: Any, **options: Any) -> Any:
        raise ValueError(cls.message)


class _Dense:
    """transformers' own dense model, for those who do not ask for the repository's code."""

    config_class: ClassVar[type]
    auto: ClassVar[str]
    native: ClassVar[Any]

    @classmethod
    def from_pretrained(
        cls, name: Any, *arguments: Any, config: Any, trust_remote_code: Any = None, **options: Any
    ) -> Any:
        cls._refuse_experts(config)
        if trust_remote_code and cls.auto in (getattr(config, "auto_map", None) or {}):
            raise RuntimeError(
                f"{name} is a dense nomic_bert with code of its own. While nomoe is registered, "
                "transformers has read its config for the native class, which that code does not "
                "take: call nomoe.unregister() before loading it with trust_remote_code=True, or "
                "leave trust_remote_code out for transformers' own dense model"
            )
        return cls.native.from_pretrained(name, *arguments, config=config, **options)

    @classmethod
    def _from_config(cls, config: Any, **options: Any) -> Any:
        cls._refuse_experts(config)
        return cls.native._from_config(config, **options)

    @staticmethod
    def _refuse_experts(config: Any) -> None:
        experts = getattr(config, "num_experts", None)
        if experts:
            raise ValueError(
                f"the config has {experts} experts, and is of transformers' dense class: either it "
                "was read before nomoe.register(), then read it again, or num_experts was passed "
                "for a dense checkpoint"
            )


def register() -> None:
    """Have AutoConfig, AutoModel and SentenceTransformer load this model, in this process.

    Every `nomic_bert` checkpoint with experts then loads as `HFNomicMoEModel`, whatever
    `trust_remote_code` says, offline, and its repository's code is never fetched. Dense ones (v1,
    v1.5) load as transformers' own class as before; with `trust_remote_code=True` they raise an
    error that names `unregister`. Registering twice is registering once. Models sent to another
    process by pickling (SentenceTransformer's pool does) register there too; any other process has
    to call this itself.

    Raises:
        RuntimeError: Somebody else has registered `nomic_bert`, or this transformers is too old.
    """
    if is_registered():
        return
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version < _OLDEST:
        raise RuntimeError(
            f"transformers is {transformers.__version__}, and nomoe.register() needs 5.12 or "
            "newer: with trust_remote_code=True older ones run a repository's code, whatever is "
            "registered"
        )
    there = CONFIG_MAPPING._extra_content.get(MODEL_TYPE)
    if there is not None:
        raise RuntimeError(
            f"{there.__module__}.{there.__qualname__} is registered for {MODEL_TYPE} already; "
            "nomoe would take its place"
        )
    for config, name, model in _stand_ins():
        # the public way passes transformers' own config classes over in some versions
        getattr(transformers, name)._model_mapping._extra_content[config] = model
    transformers.AutoConfig.register(MODEL_TYPE, HFNomicMoEConfig, exist_ok=True)


def unregister() -> None:
    """Undo `register`; models that are loaded stay as they are."""
    if not is_registered():
        return
    # transformers offers no public way back
    del CONFIG_MAPPING._extra_content[MODEL_TYPE]
    for name in _AUTO_CLASSES:
        mapping = getattr(transformers, name)._model_mapping._extra_content
        for config in (HFNomicMoEConfig, _native_config()):
            mapping.pop(config, None)


def is_registered() -> bool:
    """Whether `register` is in force in this process."""
    return CONFIG_MAPPING._extra_content.get(MODEL_TYPE) is HFNomicMoEConfig


def _stand_ins() -> list[tuple[type, str, type]]:
    """Config class, Auto class and what the second gives for the first."""
    found: list[tuple[type, str, type]] = [(HFNomicMoEConfig, "AutoModel", HFNomicMoEModel)]
    for name in _AUTO_CLASSES[1:]:
        message = (
            f"nomoe has no model for {name}; nomoe.unregister() leaves it to the repository's own "
            "code"
        )
        refusal = {"config_class": HFNomicMoEConfig, "message": message}
        found.append((HFNomicMoEConfig, name, type(f"No{name}", (_Refusal,), refusal)))
    config = _native_config()
    if config is None:
        return found
    for name in _AUTO_CLASSES:
        native = getattr(transformers, name)._model_mapping.get(config, None)
        members: dict[str, Any]
        if native is None:
            message = (
                f"transformers has no dense nomic_bert for {name}; call nomoe.unregister() before "
                "loading it with trust_remote_code=True"
            )
            members = {"config_class": config, "message": message}
            found.append((config, name, type(f"No{name}", (_Refusal,), members)))
        else:
            members = {"config_class": config, "auto": name, "native": native}
            found.append((config, name, type(f"Dense{name}", (_Dense,), members)))
    return found


def _native_config() -> Any:
    """Transformers' own config class for `nomic_bert`, or None before it had one."""
    return getattr(transformers, "NomicBertConfig", None)


def _check_device_map(device_map: Any) -> None:
    if isinstance(device_map, dict):
        devices = sorted({str(device) for device in device_map.values()})
        if len(devices) > 1 or devices == ["disk"]:
            raise ValueError(
                f"device_map spreads the model over {', '.join(devices)}, but its kernels take "
                'weights from one device: pass a device_map such as "cuda:0" or {"": 0}'
            )


def _chosen(given: bool | None, default: bool) -> bool:
    return bool(default if given is None else given)
