"""The encoder as LangChain's `Embeddings`."""

from __future__ import annotations

from langchain_core.embeddings import Embeddings

from ..encoder import Encoder
from . import check_encoder


class NomicMoEEmbeddings(Embeddings):
    """Embeds documents and queries, each with its own prefix.

        embeddings = NomicMoEEmbeddings(nomoe.Encoder.from_pretrained())

    The asynchronous methods are LangChain's own: they run these in a thread.

    Args:
        encoder: The encoder; its `truncate_dim` and `max_seq_length` hold here too.

    Raises:
        TypeError: It is none.
    """

    def __init__(self, encoder: Encoder) -> None:
        check_encoder(encoder)
        self.encoder = encoder

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed documents, unit norm, in the order given.

        Raises:
            TypeError, ValueError: As `Encoder.encode`, and for one text, which is no list.
        """
        if isinstance(texts, str):
            raise TypeError("texts is str, expected a list of str")
        vectors: list[list[float]] = self.encoder.encode_document(texts).tolist()
        return vectors

    def embed_query(self, text: str) -> list[float]:
        """Embed a query, unit norm.

        Raises:
            TypeError, ValueError: As `Encoder.encode`.
        """
        vector: list[float] = self.encoder.encode_query(text).tolist()
        return vector
