"""The encoder as LlamaIndex's `BaseEmbedding`."""

from __future__ import annotations

from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import PrivateAttr

from ..encoder import Encoder
from . import check_encoder


class NomicMoEEmbedding(BaseEmbedding):
    """Embeds nodes and queries, each with its own prefix.

        name = "nomic-ai/nomic-embed-text-v2-moe"
        encoder = nomoe.Encoder.from_pretrained(name)
        Settings.embed_model = NomicMoEEmbedding(encoder, model_name=name)

    Args:
        encoder: The encoder; its `truncate_dim` and `max_seq_length` hold here too.
        model_name: What the encoder was loaded from. LlamaIndex files vectors under this name, and
            its caches hand those of one name to every model of that name.
        embed_batch_size: Texts that LlamaIndex hands over at a time, at most 2048; the encoder
            makes its own batches of them by tokens.
        options: Other fields of `BaseEmbedding`, such as `callback_manager`.

    Raises:
        TypeError: `encoder` is none.
    """

    _encoder: Encoder = PrivateAttr()

    def __init__(
        self,
        encoder: Encoder,
        *,
        model_name: str,
        embed_batch_size: int = 512,
        **options: Any,
    ) -> None:
        check_encoder(encoder)
        super().__init__(model_name=model_name, embed_batch_size=embed_batch_size, **options)
        self._encoder = encoder

    @classmethod
    def class_name(cls) -> str:
        """Return the name that LlamaIndex stores."""
        return "NomicMoEEmbedding"

    def to_dict(self, **options: Any) -> dict[str, Any]:
        """Return what LlamaIndex stores and what its caches go by.

        That is the fields, and the encoder's dimension and length as they are now.

        Args:
            options: As pydantic's `model_dump`.
        """
        values: dict[str, Any] = super().to_dict(**options)
        values["dim"] = self._encoder.get_embedding_dimension()
        values["max_seq_length"] = self._encoder.max_seq_length
        return values

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
