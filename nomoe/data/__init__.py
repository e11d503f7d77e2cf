"""Data that ships with nomoe: golden cases, published figures, sentences in twenty languages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
# a small checkpoint with its expected results, and expected results at the real sizes
TINY = HERE / "tiny"
FULL_WIDTH = HERE / "full_width"


def published() -> dict[str, Any]:
    """Figures others published for the real weights."""
    return _read("published.json")


def real_config() -> dict[str, Any]:
    """Return config.json of the published checkpoint, whole."""
    return _read("config_real.json")


def sentences() -> dict[str, list[str]]:
    """Five sentences in each of twenty languages, the same five in all."""
    return _read("sentences.json")


def _read(name: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((HERE / name).read_text(encoding="utf-8"))
    return value
