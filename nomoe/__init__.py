"""nomic-embed-text-v2-moe in plain PyTorch.

    import nomoe
    encoder = nomoe.Encoder.from_pretrained()
    vectors = encoder.encode_document(["The tide turns twice a day."])

Importing this package imports no torch; its names are loaded when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import synthetic
    from .config import NomicMoEConfig
    from .corpus import embed_corpus
    from .encoder import Encoder
    from .model import NomicMoEModel
    from .routes import Routes

__version__ = "0.1.0"

__all__ = [
    "Encoder",
    "NomicMoEConfig",
    "NomicMoEModel",
    "Routes",
    "__version__",
    "embed_corpus",
    "synthetic",
]

_HOME = {
    "Encoder": "encoder",
    "NomicMoEConfig": "config",
    "NomicMoEModel": "model",
    "Routes": "routes",
    "embed_corpus": "corpus",
}


def __getattr__(name: str) -> Any:
    if name == "synthetic":
        return import_module(".synthetic", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
