"""Vectors and scores of the model server, as the official client and plain requests get them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from starlette.testclient import TestClient

from prefect_huggingface.blocks import EmbeddingOptions, GenerationOptions, LocalModel
from prefect_huggingface.deployments.model_server.app import create_app
from prefect_huggingface.deployments.model_server.models import ServedModel, ServedModels
from prefect_huggingface.deployments.model_server.settings import ServerSettings
from prefect_huggingface.tasks import embed_texts, rerank_texts
from support.vector_models import TEXTS, make_embedder, make_ranker

LOCAL = "http://localhost/v1"
QUERY = "Which city is the capital of France?"


@pytest.fixture(scope="module")
def blocks(session_folder: Path) -> dict[str, LocalModel]:
    embedder = make_embedder(session_folder / "served" / "embedder", "xlm-roberta")
    ranker = make_ranker(session_folder / "served" / "ranker", "bge-reranker")
    return {
        "vectors": LocalModel(model_id=str(embedder), task="feature-extraction", backend="torch"),
        "scores": LocalModel(model_id=str(ranker), task="text-ranking", backend="torch"),
    }


@pytest.fixture(scope="module")
def server(blocks: dict[str, LocalModel]) -> Iterator[TestClient]:
    models = ServedModels([ServedModel(name, block) for name, block in blocks.items()])
    with TestClient(create_app(models, ServerSettings(), ()), base_url="http://localhost/v1") as client:
        yield client


def test_the_official_client_gets_the_vectors_of_the_task(server: TestClient, blocks: dict[str, LocalModel]) -> None:
    client = openai.OpenAI(base_url="http://localhost/v1", api_key="none", http_client=server)
    expected = embed_texts.fn(blocks["vectors"], TEXTS)

    # The client asks for base64 where nothing else is said, and reads it.
    answer = client.embeddings.create(model="vectors", input=TEXTS)
    numbers = client.embeddings.create(model="vectors", input=TEXTS, encoding_format="float", dimensions=8)

    assert np.allclose([each.embedding for each in answer.data], expected.vectors, atol=1e-6)
    assert [each.index for each in answer.data] == list(range(len(TEXTS)))
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(expected.tokens)
    cut = embed_texts.fn(blocks["vectors"], TEXTS, embedding=EmbeddingOptions(dimensions=8))
    assert np.allclose([each.embedding for each in numbers.data], cut.vectors, atol=1e-6)


def test_queries_have_the_prompt_of_queries(server: TestClient, blocks: dict[str, LocalModel]) -> None:
    answer = server.post("/embeddings", json={"model": "vectors", "input": QUERY, "input_type": "query"}).json()

    expected = embed_texts.fn(blocks["vectors"], [QUERY], input_type="query").vectors[0]
    assert np.allclose(answer["data"][0]["embedding"], expected, atol=1e-6)


def test_texts_are_ranked(server: TestClient, blocks: dict[str, LocalModel]) -> None:
    body = {"model": "scores", "query": QUERY, "documents": [*TEXTS[:2], {"text": TEXTS[2]}], "return_documents": True}
    scores = [float(score.score or 0) for score in rerank_texts.fn(blocks["scores"], QUERY, TEXTS[:3])]

    answer = server.post("/rerank", json=body).json()
    best = server.post("/rerank", json={**body, "top_n": 1, "return_documents": False}).json()["results"]

    order = sorted(range(3), key=lambda place: -scores[place])
    assert [each["index"] for each in answer["results"]] == order
    assert np.allclose([each["relevance_score"] for each in answer["results"]], [scores[place] for place in order])
    assert [each["document"]["text"] for each in answer["results"]] == [TEXTS[place] for place in order]
    assert [list(each) for each in best] == [["index", "relevance_score"]]


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        ("embeddings", {"input": []}, "input"),
        ("embeddings", {"input": [1, 2]}, "input"),
        ("embeddings", {"input": "Paris", "encoding_format": "int8"}, "encoding_format"),
        ("embeddings", {"input": "Paris", "dimensions": 0}, "dimensions"),
        ("embeddings", {"input": "Paris", "unknown": 1}, "unknown"),
        ("rerank", {"documents": ["Paris"]}, "query"),
        ("rerank", {"query": QUERY, "documents": "x", "top_n": "1"}, "top_n"),
    ],
)
def test_wrong_bodies_are_refused_with_the_field(
    server: TestClient, route: str, body: dict[str, Any], param: str
) -> None:
    answer = server.post(f"/{route}", json={"model": "vectors", **body})

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_a_text_that_cannot_be_embedded_is_an_error_of_the_client(
    server: TestClient, blocks: dict[str, LocalModel]
) -> None:
    for text in (" ", "One, two, three. " * 90):
        assert server.post("/embeddings", json={"model": "vectors", "input": ["Paris", text]}).status_code == 400
    skipping = blocks["vectors"].model_copy(update={"options": GenerationOptions(context_overflow="skip")})
    with TestClient(create_app(ServedModels([ServedModel("s", skipping)]), ServerSettings(), ()), LOCAL) as other:
        assert other.post("/embeddings", json={"input": "One, two, three. " * 90}).status_code == 400
    long = {"model": "vectors", "input": "One, two, three. " * 90, "truncate": True}
    assert server.post("/embeddings", json=long).status_code == 200
    assert server.post("/embeddings", json={"model": "scores", "input": "Paris"}).status_code == 400
    assert server.post("/rerank", json={"model": "vectors", "query": "a", "documents": ["b"]}).status_code == 400
