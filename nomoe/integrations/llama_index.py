"""The encoder as LlamaIndex's `BaseEmbedding`."""

from __future__ import annotations

from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import PrivateAttr

from ..checkpoint import DEFAULT_REPO
from ..encoder import Encoder


class NomicMoEEmbedding(BaseEmbedding):
    """Embeds nodes and queries, each with its own prefix.

        Settings.embed_model = NomicMoEEmbedding(nomoe.Encoder.from_pretrained())

    Args:
        encoder: The encoder; its `truncate_dim` and `max_seq_length` hold here too.
        model_name: What LlamaIndex files its vectors under.
        embed_batch_size: Texts that LlamaIndex hands over at a time, at most 2048; the encoder
            makes its own batches of them by tokens.
        options: Other fields of `BaseEmbedding`, such as `callback_manager`.
    """

    _encoder: Encoder = PrivateAttr()

    def __init__(
        self,
        encoder: Encoder,
        *,
        model_name: str = DEFAULT_REPO,
        embed_batch_size: int = 512,
        **options: Any,
    ) -> None:
        super().__init__(model_name=model_name, embed_batch_size=embed_batch_size, **options)
        self._encoder = encoder

    @classmethod
    def class_name(cls) -> str:
        """Return the name that LlamaIndex stores."""
        return "NomicMoEEmbedding"

    def _get_query_embedding(self, query: str) -> list[float]:
        vector: list[float] = self._encoder.encode_query(query).tolist()
        return vector

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_query_embedding(query)

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        vectors: list[list[float]] = self._encoder.encode_document(texts).tolist()
        return vectors
