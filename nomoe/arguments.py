"""What callers' numbers, prompts, devices and dtypes have to be, wherever they are given."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import SupportsIndex

import torch

from .config import NomicMoEConfig
from .tokenizer import check_texts

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def check_count(name: str, value: SupportsIndex) -> int:
    """Check a number of things, and give it as an int.

    Raises:
        ValueError: No whole number, or below 1.
    """
    number = _whole(value)
    if number is None or number < 1:
        raise ValueError(f"{name} is {value!r}, expected a whole number of at least 1")
    return number


def check_dim(name: str, value: SupportsIndex, config: NomicMoEConfig) -> int:
    """Check a number of features to keep of a vector, and give it as an int.

    Raises:
        ValueError: No whole number, or outside 1..d.
    """
    number = _whole(value)
    if number is None or not 1 <= number <= config.n_embd:
        raise ValueError(f"{name} is {value!r}, expected 1 to {config.n_embd}")
    return number


def check_length(value: SupportsIndex, config: NomicMoEConfig) -> int:
    """Check the longest length of a text in tokens, two of them special, and give it as an int.

    Raises:
        ValueError: No whole number, or outside of what the model takes.
    """
    number = _whole(value)
    if number is None or not 3 <= number <= config.n_positions:
        raise ValueError(f"max_seq_length is {value!r}, expected 3 to {config.n_positions} tokens")
    return number


def check_seed(value: SupportsIndex) -> int:
    """Check a seed of random numbers, and give it as an int.

    Raises:
        ValueError: No whole number, or outside 0..2^32 - 1.
    """
    number = _whole(value)
    if number is None or not 0 <= number < 2**32:
        raise ValueError(f"seed is {value!r}, expected 0 to 2^32 - 1")
    return number


def choose_prompt(
    prompts: Mapping[str, str], default: str | None, name: str | None, prompt: str | None
) -> str:
    """Give what to put before each text.

    Args:
        prompts: By name.
        default: The name that holds where none is given; None for no prompt.
        name: A name that was given.
        prompt: The prompt itself; beats `name`.

    Raises:
        TypeError: `prompt` or `name` is not a str.
        ValueError: An unknown name, or a prompt that is not valid Unicode.
    """
    if prompt is not None:
        if not isinstance(prompt, str):
            raise TypeError(f"prompt is {type(prompt).__name__}, expected str")
        check_texts([prompt])
        return prompt
    name = default if name is None else name
    if name is None:
        return ""
    if not isinstance(name, str):
        raise TypeError(f"prompt_name is {type(name).__name__}, expected str")
    if name not in prompts:
        known = ", ".join(sorted(prompts))
        raise ValueError(f"no prompt is named {name!r}; known: {known}; prompt= takes any text")
    return prompts[name]


def resolve_device(device: str | torch.device | None) -> torch.device:
    """Turn a device argument into a device; None means CUDA where there is one.

    Raises:
        RuntimeError: The device is not available here.
        ValueError: Not the name of a device that computes.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except TypeError as error:
        raise ValueError(f"device is {device!r}, expected one device's name") from error
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}, expected one device's name: {error}") from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"device is {device!r}, but torch finds no CUDA device here")
    if resolved.type == "meta":
        raise ValueError("device is 'meta', which computes nothing")
    try:
        torch.empty(1, device=resolved)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise RuntimeError(f"device is {device!r}, which torch cannot use here: {error}") from error
    return resolved


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """Turn a dtype argument into a dtype; None means float16 on CUDA and float32 elsewhere.

    Raises:
        ValueError: Not one of float32, float16 and bfloat16.
    """
    if dtype is None:
        # float16 has bfloat16's speed and eight times its precision; activations stay below 30
        return torch.float16 if device.type == "cuda" else torch.float32
    resolved = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if resolved is None or resolved not in DTYPES.values():
        raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    return resolved


def _whole(value: object) -> int | None:
    """Return a whole number of any type, numpy's included, as int; None for anything else."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        return None
    return operator.index(value)
