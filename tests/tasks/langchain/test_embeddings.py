"""`HuggingFaceEmbeddings` and the cross-encoder: the arguments, and the vectors, of LangChain's classes."""

from __future__ import annotations

import ctypes
import inspect
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from langchain_tests.integration_tests import EmbeddingsIntegrationTests
from langchain_tests.unit_tests import EmbeddingsUnitTests

from prefect_huggingface.blocks import EmbeddingOptions, LocalModel
from prefect_huggingface.tasks import embed_texts, rerank_texts
from prefect_huggingface.tasks.engines.torch_loading import available_devices
from prefect_huggingface.tasks.errors import GenerationError, SettingsError
from prefect_huggingface.tasks.langchain import (
    HuggingFaceCrossEncoder,
    HuggingFaceEmbeddings,
    HuggingFaceEndpointEmbeddings,
)
from prefect_huggingface.tasks.langchain.embeddings import _ask
from prefect_huggingface.tasks.records import Request
from support.instant_engines import InstantEngine
from support.vector_models import TEXTS, make_embedder, make_ranker

# Synchronous tests ignore the mark.
pytestmark = [pytest.mark.asyncio, pytest.mark.filterwarnings("ignore:.*is marked with '@pytest.mark.asyncio'")]

ARGUMENTS = {
    "model_name", "cache_folder", "model_kwargs", "encode_kwargs", "query_encode_kwargs", "multi_process",
    "show_progress",
}  # fmt: skip
TOKEN = "hf_embeddingsSecret"


@pytest.fixture(scope="module")
def embedder(session_folder: Path) -> Path:
    return make_embedder(session_folder / "langchain" / "embedder", "xlm-roberta")


@pytest.fixture(scope="module")
def ranker(session_folder: Path) -> Path:
    return make_ranker(session_folder / "langchain" / "ranker", "bge-reranker")


class Suite:
    @pytest.fixture(autouse=True)
    def _use(self, embedder: Path) -> None:
        self.folder = embedder

    @property
    def embeddings_class(self) -> type[HuggingFaceEmbeddings]:
        return HuggingFaceEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"model": str(self.folder)}


class TestUnit(Suite, EmbeddingsUnitTests):
    pass


class TestIntegration(Suite, EmbeddingsIntegrationTests):
    pass


def plain(folder: Path, texts: list[str], prompt: str = "", **options: Any) -> np.ndarray:
    model = LocalModel(model_id=str(folder), task="feature-extraction", backend="torch")
    chosen = EmbeddingOptions(document_prompt=prompt, **options)
    return embed_texts.fn(model, texts, embedding=chosen).vectors


def test_all_arguments_are_there() -> None:
    assert ARGUMENTS <= set(HuggingFaceEmbeddings.model_fields)
    assert list(inspect.signature(HuggingFaceCrossEncoder.score).parameters) == ["self", "text_pairs"]
    assert {"model_name", "model_kwargs"} <= set(HuggingFaceCrossEncoder.model_fields)
    names = {"model", "provider", "repo_id", "task", "model_kwargs", "huggingfacehub_api_token"}
    assert names <= set(HuggingFaceEndpointEmbeddings.model_fields)


def test_prompts_are_used_where_they_are_asked_for(embedder: Path) -> None:
    embeddings = HuggingFaceEmbeddings(
        model_name=str(embedder),
        model_kwargs={"device": "cpu"},
        encode_kwargs={"normalize_embeddings": True, "batch_size": 8, "device": "CPU"},
        query_encode_kwargs={"prompt_name": "query"},
    )

    assert np.allclose(embeddings.embed_documents(TEXTS), plain(embedder, TEXTS), atol=1e-5)
    assert np.allclose(embeddings.embed_query("Paris"), plain(embedder, ["query: Paris"])[0], atol=1e-5)
    with pytest.raises(SettingsError, match="'query', 'document'"):
        HuggingFaceEmbeddings(model_name=str(embedder), encode_kwargs={"prompt_name": "x"}).embed_query("Paris")


def test_a_block_brings_its_own_prompts(embedder: Path) -> None:
    block = LocalModel(model_id=str(embedder), task="feature-extraction", backend="torch")

    embeddings = HuggingFaceEmbeddings(model=block)

    assert np.allclose(embeddings.embed_query("Paris"), plain(embedder, ["query: Paris"])[0], atol=1e-5)
    assert np.allclose(embeddings.embed_documents(["Paris"]), plain(embedder, ["passage: Paris"]), atol=1e-5)


def test_empty_and_long_texts_have_vectors_too(embedder: Path) -> None:
    embeddings = HuggingFaceEmbeddings(model_name=str(embedder), model_kwargs={"truncate_dim": 16})

    found = embeddings.embed_documents(["", "One, two,\nthree. " * 80])

    assert np.shape(found) == (2, 16)
    assert np.isfinite(found).all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"model_kwargs": {"unknown": 1}}, {"encode_kwargs": {"unknown": 1}}, {"encode_kwargs": {"precision": "binary"}},
        {"model_kwargs": {"backend": "onnx"}}, {"unknown": 1}, {"encode_kwargs": {"device": "cuda"}},
        {"model_kwargs": {"device": "cpu"}, "query_encode_kwargs": {"device": "cuda:1"}},
    ],
)  # fmt: skip
def test_unknown_arguments_are_refused(embedder: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        HuggingFaceEmbeddings(model_name=str(embedder), **wrong)


@pytest.mark.parametrize("backend", ["torch", "openvino"])
@pytest.mark.parametrize("used", [None, "cpu", "CPU", "-1"])
@pytest.mark.parametrize("named", ["cpu", "CPU", -1])
def test_the_device_that_is_used_may_be_named_again(embedder: Path, backend: str, used: Any, named: Any) -> None:
    if backend == "torch" and used is None:
        used = "cpu" if len(available_devices()) > 1 else None  # the best one is another one there
    HuggingFaceEmbeddings(
        model_name=str(embedder),
        model_kwargs={"backend": backend, "device": used},
        encode_kwargs={"device": named},
    )


def test_a_device_that_is_not_used_is_refused_with_the_one_that_is(embedder: Path) -> None:
    given = {"backend": "openvino"}
    with pytest.raises(ValueError, match="runs on device 'CPU', and `encode_kwargs` names 'auto'"):
        HuggingFaceEmbeddings(model_name=str(embedder), model_kwargs=given, encode_kwargs={"device": "auto"})


def test_a_cross_encoder_scores_pairs(ranker: Path) -> None:
    model = LocalModel(model_id=str(ranker), task="text-ranking", backend="torch")
    expected = [score.score for score in rerank_texts.fn(model, "Paris", TEXTS)]

    found = HuggingFaceCrossEncoder(model_name=str(ranker)).score([("Paris", text) for text in TEXTS])

    assert np.allclose(found, expected, atol=1e-6)


@pytest.fixture
def endpoint() -> Iterator[Callable[[list[int]], tuple[str, list[Any]]]]:
    """Start a server that answers with these statuses first, and return its address and what it was asked."""
    servers: list[ThreadingHTTPServer] = []

    def start(statuses: list[int]) -> tuple[str, list[Any]]:
        asked: list[Any] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                asked.append((self.path, self.headers.get("authorization"), body))
                status = statuses.pop(0) if statuses else 200
                rows = [{"index": at, "embedding": [float(len(text))]} for at, text in enumerate(body["input"])]
                content = json.dumps({"data": rows[::-1]}).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                return

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}", asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_server_is_asked_in_batches_and_again_after_a_passing_failure(endpoint: Any) -> None:
    url, asked = endpoint([503])
    embeddings = HuggingFaceEndpointEmbeddings(
        endpoint_url=url, huggingfacehub_api_token=TOKEN, model_kwargs={"dimensions": 1}
    )

    found = embeddings.embed_documents(["a" * count for count in range(1, 71)])

    assert found == [[float(count)] for count in range(1, 71)]
    assert [len(body["input"]) for _, _, body in asked] == [64, 64, 6]
    assert {(path, token, body["dimensions"]) for path, token, body in asked} == {
        ("/v1/embeddings", f"Bearer {TOKEN}", 1)
    }
    assert TOKEN not in repr(embeddings)


def test_no_token_of_the_machine_goes_to_a_server(endpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    url, asked = endpoint([])

    HuggingFaceEndpointEmbeddings(model=url).embed_query("Paris")

    assert asked[0][1] is None


def test_a_failure_of_the_server_shows_no_token(endpoint: Any) -> None:
    url, _ = endpoint([401])

    with pytest.raises(GenerationError, match="HTTP status 401") as caught:
        HuggingFaceEndpointEmbeddings(endpoint_url=url, huggingfacehub_api_token=TOKEN).embed_query("Paris")

    assert caught.value.__context__ is None


@pytest.mark.parametrize("provider", [None, "hf-inference"])
def test_a_model_of_the_hub_is_asked_by_the_route_of_its_provider(
    provider: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    mapping = {"hf-inference": {"status": "live", "providerId": "org/model", "task": "feature-extraction"}}
    about = {"id": "org/model", "pipeline_tag": "feature-extraction", "inferenceProviderMapping": mapping}
    posts: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(200, json=about)
        posts.append(request)
        if len(posts) == 1:
            return httpx.Response(503)
        return httpx.Response(200, json=[[float(len(text))] for text in json.loads(request.content)["inputs"]])

    set_client_factory(lambda: httpx.Client(transport=httpx.MockTransport(answer)))
    try:
        embeddings = HuggingFaceEndpointEmbeddings(
            model="org/model", provider=provider, huggingfacehub_api_token=TOKEN, model_kwargs={"normalize": True}
        )
        assert embeddings.embed_documents(["a", "bc"]) == [[1.0], [2.0]]
        posts.clear()
        embeddings = embeddings.model_copy(update={"max_attempts": 1})
        with pytest.raises(GenerationError, match="'org/model' gave no vectors: HTTP status 503"):
            embeddings.embed_query("a")
    finally:
        set_client_factory(_http.default_client_factory)
    [post] = posts
    assert str(post.url) == "https://router.huggingface.co/hf-inference/models/org/model/pipeline/feature-extraction"
    assert post.headers["authorization"] == f"Bearer {TOKEN}"
    assert json.loads(post.content)["normalize"] is True


def test_offline_is_told_as_any_other_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # read when the client is imported
    embeddings = HuggingFaceEndpointEmbeddings(model="org/model", huggingfacehub_api_token=TOKEN, max_attempts=1)
    with pytest.raises(GenerationError, match="'org/model' gave no vectors"):
        embeddings.embed_query("a")


@pytest.mark.parametrize("kind", [HuggingFaceEmbeddings, HuggingFaceEndpointEmbeddings, HuggingFaceCrossEncoder])
def test_a_token_under_a_wrong_name_is_not_shown(kind: Any) -> None:
    with pytest.raises(ValueError, match="token") as caught:
        kind(token=TOKEN)
    assert TOKEN not in str(caught.value)


def test_an_interruption_ends_the_wait_for_vectors() -> None:
    """Prefect ends a run that is late by an exception in its thread, which no blocking call notices."""

    class Late(BaseException):
        pass

    ended: list[float] = []

    def wait() -> None:
        try:
            _ask(InstantEngine(seconds=30), [Request("One")])
        except Late:
            ended.append(time.monotonic())

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    time.sleep(0.1)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(Late))
    thread.join(10)
    assert ended
