"""nomic-embed-text-v2-moe in plain PyTorch.

    import nomoe
    encoder = nomoe.Encoder.from_pretrained()
    vectors = encoder.encode_document(["The tide turns twice a day."])

Importing this package imports no torch; its names are loaded when first used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import synthetic
    from .config import NomicMoEConfig
    from .corpus import embed_corpus
    from .encoder import Encoder
    from .integrations.checking import check
    from .integrations.mteb import mteb_model
    from .integrations.sentence_transformers import sentence_transformer
    from .integrations.transformers import register, unregister
    from .model import NomicMoEModel
    from .routes import Routes

__version__ = "0.1.0"

__all__ = [
    "Encoder",
    "NomicMoEConfig",
    "NomicMoEModel",
    "Routes",
    "__version__",
    "check",
    "embed_corpus",
    "mteb_model",
    "register",
    "sentence_transformer",
    "synthetic",
    "unregister",
]

_HOME = {
    "Encoder": "encoder",
    "NomicMoEConfig": "config",
    "NomicMoEModel": "model",
    "Routes": "routes",
    "check": "integrations.checking",
    "mteb_model": "integrations.mteb",
    "embed_corpus": "corpus",
    "register": "integrations.transformers",
    "sentence_transformer": "integrations.sentence_transformers",
    "unregister": "integrations.transformers",
}
# the extra that brings what a name needs, and the package it cannot do without
_EXTRAS = {
    "mteb_model": ("mteb", "mteb"),
    "register": ("transformers", "transformers"),
    "sentence_transformer": ("sentence-transformers", "sentence_transformers"),
    "unregister": ("transformers", "transformers"),
}


def __getattr__(name: str) -> Any:
    if name == "synthetic":
        return import_module(".synthetic", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    extra, package = _EXTRAS.get(name, ("", ""))
    if _is_missing(name):
        raise ImportError(
            f"nomoe.{name} needs {package}, which is not installed: pip install 'nomoe[{extra}]'"
        )
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    # help() and others get each of these
    return [name for name in __all__ if not _is_missing(name)]


def _is_missing(name: str) -> bool:
    """Whether a name needs a package that is not installed."""
    package = _EXTRAS[name][1] if name in _EXTRAS else ""
    # what is loaded need not have a spec
    return bool(package) and sys.modules.get(package) is None and find_spec(package) is None
