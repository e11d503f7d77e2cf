"""The adapters, each against the real package: prefixes, order, and neighbours in its own store."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from langchain_core.documents import Document
from langchain_core.vectorstores import InMemoryVectorStore
from llama_index.core import VectorStoreIndex
from llama_index.core.ingestion import IngestionCache, IngestionPipeline
from llama_index.core.ingestion.pipeline import get_transformation_hash
from llama_index.core.schema import TextNode

import nomoe
from nomoe import Encoder, data
from nomoe.integrations.langchain import NomicMoEEmbeddings
from nomoe.integrations.llama_index import NomicMoEEmbedding

TEXTS = [text for group in data.sentences().values() for text in group]
QUERIES = TEXTS[:3]


@pytest.fixture
def documents(encoder: Encoder) -> np.ndarray:
    return encoder.encode_document(TEXTS)


def nearest(encoder: Encoder, query: str, documents: np.ndarray, count: int) -> list[int]:
    scores = documents @ encoder.encode_query(query)
    return np.argsort(-scores, kind="stable")[:count].tolist()


def test_langchain(encoder: Encoder, documents: np.ndarray) -> None:
    embeddings = NomicMoEEmbeddings(encoder)
    vectors = embeddings.embed_documents(TEXTS)
    assert isinstance(vectors[0][0], float)
    np.testing.assert_allclose(vectors, documents, atol=1e-6)
    query = embeddings.embed_query(QUERIES[0])
    np.testing.assert_allclose(query, encoder.encode_query(QUERIES[0]), atol=1e-6)
    np.testing.assert_allclose(asyncio.run(embeddings.aembed_query(QUERIES[0])), query, atol=1e-6)
    assert embeddings.embed_documents([]) == []

    store = InMemoryVectorStore(embeddings)
    store.add_documents([Document(text, metadata={"row": i}) for i, text in enumerate(TEXTS)])
    for text in QUERIES:
        found = [one.metadata["row"] for one in store.similarity_search(text, k=5)]
        assert found == nearest(encoder, text, documents, 5)


def test_llama_index(encoder: Encoder, documents: np.ndarray) -> None:
    embedding = NomicMoEEmbedding(encoder, model_name="tiny", embed_batch_size=7)
    assert embedding.class_name() == "NomicMoEEmbedding"
    assert embedding.to_dict()["model_name"] == "tiny"
    vectors = embedding.get_text_embedding_batch(TEXTS)
    np.testing.assert_allclose(vectors, documents, atol=1e-5)
    np.testing.assert_allclose(embedding.get_text_embedding(TEXTS[4]), documents[4], atol=1e-6)
    query = embedding.get_query_embedding(QUERIES[0])
    np.testing.assert_allclose(query, encoder.encode_query(QUERIES[0]), atol=1e-6)
    awaited = asyncio.run(embedding.aget_query_embedding(QUERIES[0]))
    np.testing.assert_allclose(awaited, query, atol=1e-6)

    nodes = [TextNode(text=text, id_=str(i)) for i, text in enumerate(TEXTS)]
    retriever = VectorStoreIndex(nodes, embed_model=embedding).as_retriever(similarity_top_k=5)
    for text in QUERIES:
        found = [int(one.node.node_id) for one in retriever.retrieve(text)]
        assert found == nearest(encoder, text, documents, 5)


def test_llama_indexs_cache_tells_models_apart(encoder: Encoder) -> None:
    nodes = [TextNode(text="tide", id_="1")]

    def key(name: str) -> str:
        return get_transformation_hash(nodes, NomicMoEEmbedding(encoder, model_name=name))

    keys = [key("tiny"), key("other")]
    assert key("tiny") == keys[0]
    encoder.truncate_dim = 24
    keys.append(key("tiny"))
    encoder.max_seq_length = 64
    keys.append(key("tiny"))
    assert len(set(keys)) == 4

    cache = IngestionCache()
    for dim in (96, 24):
        encoder.truncate_dim = dim
        embedding = NomicMoEEmbedding(encoder, model_name="tiny")
        pipeline = IngestionPipeline(transformations=[embedding], cache=cache)
        (found,) = pipeline.run(nodes=[TextNode(text="tide", id_="1")])
        np.testing.assert_allclose(found.embedding, encoder.encode_document("tide"), atol=1e-6)


def test_llama_index_wants_the_models_name(encoder: Encoder) -> None:
    with pytest.raises(TypeError, match="model_name"):
        NomicMoEEmbedding(encoder)  # type: ignore[call-arg]


def test_a_name_is_no_encoder_and_a_text_no_list(encoder: Encoder) -> None:
    with pytest.raises(TypeError, match=r"encoder is str, .* nomoe\.Encoder\.from_pretrained"):
        NomicMoEEmbeddings("nomic-ai/nomic-embed-text-v2-moe")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="encoder is str"):
        NomicMoEEmbedding("tiny", model_name="tiny")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="texts is str"):
        NomicMoEEmbeddings(encoder).embed_documents("one")  # type: ignore[arg-type]


def test_check_sees_the_model_in_an_adapter(encoder: Encoder) -> None:
    adapters = (NomicMoEEmbeddings(encoder), NomicMoEEmbedding(encoder, model_name="tiny"))
    for adapter in adapters:
        nomoe.check(adapter)
    encoder.model.encoder.layers[3].mlp.experts.mlp.w2 = None
    for adapter in adapters:
        with pytest.raises(ValueError, match="lacks 1 of"):
            nomoe.check(adapter)


def test_the_encoders_dimension_holds(encoder: Encoder) -> None:
    encoder.truncate_dim = 24
    for vector in (
        NomicMoEEmbeddings(encoder).embed_query("tide"),
        NomicMoEEmbedding(encoder, model_name="tiny").get_query_embedding("tide"),
    ):
        assert len(vector) == 24
        assert np.linalg.norm(vector) == pytest.approx(1)
