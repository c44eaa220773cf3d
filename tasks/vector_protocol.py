"""Vectors and scores over HTTP: `/v1/embeddings` of OpenAI, and `/v1/rerank` of Cohere, Jina and vLLM."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from prefect_huggingface.blocks import EmbeddingOptions, GenerationOptions
from prefect_huggingface.tasks.openai_protocol import (
    CHAT_URL,
    COMPLETIONS_URL,
    BodyError,
    OpenAICall,
    check_all,
    read_call,
)
from prefect_huggingface.tasks.records import Completion, Request

EMBEDDINGS_URL, RERANK_URL = "/v1/embeddings", "/v1/rerank"
TEXT_URLS = (CHAT_URL, COMPLETIONS_URL)
VECTOR_URLS = {"feature-extraction": (EMBEDDINGS_URL,), "text-ranking": (RERANK_URL,)}
MAX_TEXTS = 2048
INPUT_TYPES: dict[str, Literal["query", "document"]] = {
    "query": "query", "search_query": "query", "document": "document", "passage": "document",
    "search_document": "document",
}  # fmt: skip
KNOWN_FIELDS = {
    EMBEDDINGS_URL: {"model", "input", "dimensions", "encoding_format", "user", "input_type", "truncate"},
    RERANK_URL: {"model", "query", "documents", "top_n", "return_documents", "user", "truncate", "instruction"},
}


@dataclass(frozen=True, slots=True)
class VectorCall:
    """What a body asks for.

    Attributes:
        url: Route of the call.
        model: Name of the model, or None.
        requests: One request for each text.
        base64: Whether vectors are written as base64 of float32, and not as numbers.
        top_n: Number of the best texts that are wanted, or None for all.
        return_documents: Whether the texts are written beside their scores.
        stream: Always False.
    """

    url: str
    model: str | None
    requests: tuple[Request, ...]
    base64: bool = False
    top_n: int | None = None
    return_documents: bool = False
    stream: bool = False

    def writer(self, name: str, created: int, model: str | None) -> VectorWriter:
        """Return what writes the answer to this call.

        Args:
            name: Name of the answer.
            created: Not written in these answers.
            model: Name of the model that answers.
        """
        return VectorWriter(self, name, model)


class VectorWriter:
    """Writes the answer to one call."""

    def __init__(self, call: VectorCall, name: str, model: str | None) -> None:
        self._call, self._name, self._model = call, name, model

    def write(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """Return the body of the answer, the completions in the order of the requests.

        Raises:
            BodyError: If one of them failed.
        """
        check_all(completions)
        if any(completion.vector is None for completion in completions):
            raise BodyError("deadline", "The time of the request was up. Send fewer texts.", status=408)
        tokens = sum(completion.prompt_tokens for completion in completions)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        if self._call.url == EMBEDDINGS_URL:
            data = [
                {"object": "embedding", "index": place, "embedding": self._vector(completion)}
                for place, completion in enumerate(completions)
            ]
            return {"object": "list", "data": data, "model": self._model, "usage": usage}
        scores = [float(completion.vector[0]) for completion in completions]
        order = sorted(range(len(scores)), key=lambda place: -scores[place])[: self._call.top_n]
        results = [{"index": place, "relevance_score": scores[place], **self._document(place)} for place in order]
        return {"id": f"rerank-{self._name}", "model": self._model, "results": results, "usage": usage}

    def _vector(self, completion: Completion) -> Any:
        if self._call.base64:
            return base64.b64encode(completion.vector.astype("<f4").tobytes()).decode()
        return completion.vector.tolist()

    def _document(self, place: int) -> dict[str, Any]:
        return {"document": {"text": self._call.requests[place].pair}} if self._call.return_documents else {}


def read_embedding_call(body: Mapping[str, Any]) -> VectorCall:
    """Return what a body for `/v1/embeddings` asks for.

    Raises:
        BodyError: If it asks for what cannot be done.
    """
    model = _read_common(body, EMBEDDINGS_URL)
    texts = _read_texts(body.get("input"), "input")
    form, kind = body.get("encoding_format") or "float", body.get("input_type") or "document"
    if form not in ("float", "base64"):
        raise BodyError(
            "invalid_option", f"`encoding_format` must be 'float' or 'base64', got {form!r}.", "encoding_format"
        )
    if kind not in INPUT_TYPES:
        raise BodyError("invalid_option", f"`input_type` must be 'query' or 'document', got {kind!r}.", "input_type")
    dimensions = _read_number(body, "dimensions")
    embedding = None if dimensions is None else EmbeddingOptions(dimensions=dimensions)
    options = _read_overflow(body)
    requests = [Request(text, options=options, input_type=INPUT_TYPES[kind], embedding=embedding) for text in texts]
    return VectorCall(EMBEDDINGS_URL, model, tuple(requests), base64=form == "base64")


def read_rerank_call(body: Mapping[str, Any]) -> VectorCall:
    """Return what a body for `/v1/rerank` asks for.

    Raises:
        BodyError: If it asks for what cannot be done.
    """
    model = _read_common(body, RERANK_URL)
    query, instruction = body.get("query"), body.get("instruction")
    if not isinstance(query, str):
        raise BodyError("invalid_prompt", f"`query` must be a text, got {query!r:.100}. Give one.", "query")
    given = body.get("documents")
    given = (
        [each.get("text") if isinstance(each, Mapping) else each for each in given]
        if isinstance(given, list)
        else given
    )
    texts = _read_texts(given, "documents")
    if instruction is not None and not isinstance(instruction, str):
        raise BodyError("invalid_option", f"`instruction` must be a text, got {instruction!r:.100}.", "instruction")
    embedding = None if instruction is None else EmbeddingOptions(instruction=instruction)
    options = _read_overflow(body)
    requests = [Request(query, pair=text, options=options, embedding=embedding) for text in texts]
    top_n = _read_number(body, "top_n")
    return VectorCall(
        RERANK_URL, model, tuple(requests), top_n=top_n, return_documents=bool(body.get("return_documents"))
    )


def _read_common(body: Mapping[str, Any], url: str) -> str | None:
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise BodyError("invalid_prompt", f"`model` must be a text, got {model!r:.100}. Correct it.", "model")
    unknown = sorted(name for name in body if name not in KNOWN_FIELDS[url] and body[name] is not None)
    if unknown:
        raise BodyError("invalid_option", f"{unknown[0]!r:.100} is not known for {url}. Leave it out.", unknown[0])
    return model


def _read_texts(given: Any, name: str) -> list[str]:
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise BodyError("invalid_prompt", f"`{name}` must be a text or a list of texts. Tokens are not read.", name)
    if len(texts) > MAX_TEXTS:
        raise BodyError("invalid_prompt", f"`{name}` must hold at most {MAX_TEXTS} texts, got {len(texts)}.", name)
    return texts


def _read_number(body: Mapping[str, Any], name: str) -> int | None:
    value = body.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise BodyError("invalid_option", f"`{name}` must be a whole number above 0, got {value!r:.100}.", name)
    return value


def _read_overflow(body: Mapping[str, Any]) -> GenerationOptions | None:
    return GenerationOptions(context_overflow="truncate_right") if body.get("truncate") in (True, "END") else None


Call = OpenAICall | VectorCall
# What reads the bodies of each route.
READERS: dict[str, Callable[[Mapping[str, Any]], Call]] = {
    CHAT_URL: partial(read_call, chat=True), COMPLETIONS_URL: partial(read_call, chat=False),
    EMBEDDINGS_URL: read_embedding_call, RERANK_URL: read_rerank_call, "/rerank": read_rerank_call,
}  # fmt: skip
