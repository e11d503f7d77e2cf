"""What callers' numbers and prompt names have to be, wherever they are given."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import SupportsIndex

from .config import NomicMoEConfig
from .tokenizer import check_texts


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
        TypeError: `prompt` is not a str.
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
    if name not in prompts:
        raise ValueError(f"no prompt is named {name!r}; known: {', '.join(sorted(prompts))}")
    return prompts[name]


def _whole(value: object) -> int | None:
    """Return a whole number of any type, numpy's included, as int; None for anything else."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        return None
    return operator.index(value)
