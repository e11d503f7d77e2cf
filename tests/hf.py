"""Small repositories for the tests of transformers and sentence-transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

TEXTS = [
    "search_document: The tide turns twice a day.",
    "search_query: ¿Cuándo cambia la marea?",
    "classification: 潮",
]
DENSE_CONFIG = """
from transformers import PretrainedConfig

class RemoteConfig(PretrainedConfig):
    model_type = "nomic_bert"

    def __init__(self, **values):
        super().__init__(**values)
"""
DENSE_MODEL = """
from torch import nn
from transformers import PreTrainedModel
from .configuration_dense import RemoteConfig

class RemoteModel(PreTrainedModel):
    config_class = RemoteConfig

    def __init__(self, config):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.n_embd)
        self.post_init()
"""


def batch(folder: Path, texts: list[str] = TEXTS) -> dict[str, Tensor]:
    """Padded ids and mask."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return dict(tokenizer(texts, padding=True, truncation=True, return_tensors="pt"))


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: v for key, v in values.items() if v is not None}))


def native_can_load(source: Path, folder: Path) -> Path:
    """Copy a checkpoint, its sizes also under the names by which transformers' own class has them.

    The published one needs none of this: its sizes are that class's defaults.
    """
    shutil.copytree(source, folder)
    change_config(
        folder, hidden_size=96, num_attention_heads=6, intermediate_size=192, num_hidden_layers=12
    )
    return folder


def write_dense(folder: Path, *, with_code: bool) -> Path:
    """A small dense nomic_bert as v1.5 is, with code of its own where asked."""
    from transformers import NomicBertConfig, NomicBertModel

    config = NomicBertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
    )
    NomicBertModel(config).save_pretrained(folder)
    if with_code:
        (folder / "configuration_dense.py").write_text(DENSE_CONFIG)
        (folder / "modeling_dense.py").write_text(DENSE_MODEL)
        model = "modeling_dense.RemoteModel"
        change_config(
            folder,
            n_embd=32,
            auto_map={
                "AutoConfig": "configuration_dense.RemoteConfig",
                "AutoModel": model,
                "AutoModelForMaskedLM": model,
                "AutoModelForMultipleChoice": model,
            },
        )
    return folder
