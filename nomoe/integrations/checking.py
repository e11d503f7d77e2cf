"""Is what somebody loaded, by whatever road, the model it should be?"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..config import NomicMoEConfig
from ..model import NomicMoEModel

logger = logging.getLogger(__name__)

_REMEDY = (
    "call nomoe.register() before loading with AutoModel or SentenceTransformer, or load with "
    "nomoe.sentence_transformer() or nomoe.Encoder.from_pretrained()"
)
_SHOWN = 8


def check(model: Any) -> None:
    """Raise unless a loaded model has its experts.

    transformers 5 loads this checkpoint as its own dense `nomic_bert` without an error: the vectors
    look plausible and mean nothing. This finds that class inside whatever holds it, and otherwise
    compares the names and shapes of all tensors with those that the model's config calls for. Where
    a SentenceTransformer would embed documents without their prefix, a warning is logged.

    Args:
        model: A transformers model, SentenceTransformer, `nomoe.NomicMoEModel` or any torch module
            that holds one or several; or what has one as its `model`, such as `nomoe.Encoder`; or
            nomoe's adapters for MTEB, LangChain and LlamaIndex.

    Raises:
        TypeError: Neither a torch module nor one of nomoe's classes.
        ValueError: The native class, or tensors missing or of another shape; the message says what
            to do.
    """
    module = _unwrap(model)
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"model is {type(model).__name__}, expected a torch module, nomoe.Encoder, one of "
            "nomoe's adapters, or what has such a one as its `model`"
        )
    parts = list(module.modules())
    for part in parts:
        if type(part).__module__.startswith("transformers.models.nomic_bert."):
            raise ValueError(_native(part))
    owners = [part for part in parts if _settings(part) is not None]
    if not owners:
        raise ValueError(f"{type(model).__name__} holds no nomic_bert with experts; {_REMEDY}")
    for owner in owners:
        # what holds a model may hand its config on: the innermost is the model itself
        inner = {id(part) for part in owner.modules() if part is not owner}
        if not any(id(other) in inner for other in owners):
            _check_tensors(owner)
    _check_prompts(model)


def _unwrap(model: Any) -> Any:
    """The torch module in whatever holds it."""
    while not isinstance(model, nn.Module):
        # LangChain's adapter and LlamaIndex's hold an Encoder
        for name in ("model", "encoder", "_encoder"):
            if hasattr(model, name):
                model = getattr(model, name)
                break
        else:
            break
    return model


def _native(part: nn.Module) -> str:
    name = f"{type(part).__module__}.{type(part).__qualname__}"
    experts = getattr(getattr(part, "config", None), "num_experts", None)
    if not experts:
        return f"{name} is transformers' dense nomic_bert, a model without experts; {_REMEDY}"
    return (
        f"{name} is transformers' dense nomic_bert, but the checkpoint has {experts} experts: they "
        "were thrown away, its feed-forward weights are random, and so are its vectors. "
        f"{_REMEDY[0].upper()}{_REMEDY[1:]}; vectors stored from this model have to be made again"
    )


def _settings(part: nn.Module) -> NomicMoEConfig | None:
    """The config of a nomic mixture of experts, in whatever class it comes."""
    config = getattr(part, "config", None)
    if isinstance(config, NomicMoEConfig):
        return config
    if getattr(config, "model_type", None) != "nomic_bert" or not getattr(config, "num_experts", 0):
        return None
    # of settings that change a result but no tensor, loading has judged
    fields = [field.name for field in dataclasses.fields(NomicMoEConfig)]
    given = {name: getattr(config, name, None) for name in fields}
    return NomicMoEConfig(**{name: value for name, value in given.items() if value is not None})


def _check_tensors(owner: nn.Module) -> None:
    config = _settings(owner)
    assert config is not None
    with torch.device("meta"):
        expected = {
            name: tensor.shape for name, tensor in NomicMoEModel(config).state_dict().items()
        }
    found = dict(_shapes(owner))
    problems = [f"{name}: missing" for name in expected.keys() - found.keys()]
    problems += [
        f"{name}: shape {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if problems:
        raise ValueError(
            f"{type(owner).__module__}.{type(owner).__qualname__} lacks {len(problems)} of the "
            f"model's {len(expected)} tensors: "
            + "; ".join(sorted(problems)[:_SHOWN])
            + ("; ..." if len(problems) > _SHOWN else "")
            + f". {_REMEDY[0].upper()}{_REMEDY[1:]}"
        )


def _shapes(owner: nn.Module) -> Iterator[tuple[str, torch.Size]]:
    """Shape of every parameter, by the name it has without adapters around it."""
    for path, part in owner.named_modules():
        # read here rather than from state_dict, which copies what is laid out for the CPU
        for name, parameter in part._parameters.items():
            if parameter is not None:
                whole = f"{path}.{name}" if path else name
                for around in (".base_layer.", ".original_module."):
                    whole = whole.replace(around, ".")
                yield whole, parameter.shape


def _check_prompts(model: Any) -> None:
    prompts = getattr(model, "prompts", None)
    if isinstance(prompts, dict) and prompts.get("passage") and not prompts.get("document"):
        logger.warning(
            "encode_document of this %s adds no prefix, since no prompt is named 'document'; pass "
            "prompt_name='passage', or load with nomoe.sentence_transformer()",
            type(model).__name__,
        )
