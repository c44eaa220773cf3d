"""LangChain classes for vectors and scores: `HuggingFaceEmbeddings`, its twin for endpoints, and a cross-encoder."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, Self

import httpx
from langchain_core.cross_encoders import BaseCrossEncoder
from langchain_core.embeddings import Embeddings
from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential

from prefect_huggingface.blocks import (
    EmbeddingOptions,
    GenerationOptions,
    HuggingFaceCredentials,
    InferenceEndpoint,
    LocalModel,
)
from prefect_huggingface.blocks.model import Task
from prefect_huggingface.tasks.engines.base import Engine
from prefect_huggingface.tasks.engines.registry import load_engine
from prefect_huggingface.tasks.errors import EngineError, GenerationError, SettingsError
from prefect_huggingface.tasks.langchain.kwargs import read_fields
from prefect_huggingface.tasks.records import Completion, Request

DEFAULT_MODEL = "sentence-transformers/all-mpnet-base-v2"
DEFAULT_RERANKER = "BAAI/bge-reranker-base"
TOKEN_VARIABLES = ("HUGGINGFACEHUB_API_TOKEN", "HF_TOKEN")
# Arguments that are fields of the block; those of Transformers are understood beside them.
FIELDS = ("backend", "weight_format", "quantization", "store", "credentials")
OPTIONS = {"truncate_dim": "dimensions", "max_seq_length": "max_length", "max_length": "max_length"}
# What changes neither the model nor its vectors here.
WITHOUT_EFFECT = frozenset({
    "similarity_fn_name", "model_card_data", "batch_size", "show_progress_bar", "convert_to_numpy", "convert_to_tensor",
    "chunk_size", "pool", "file_name", "provider", "prompts", "default_prompt_name",
})  # fmt: skip
NESTED = ("model_kwargs", "tokenizer_kwargs", "processor_kwargs", "config_kwargs")
# As Sentence Transformers does: a text that is too long is cut, and an empty one is the special tokens alone.
LENIENT = GenerationOptions(context_overflow="truncate_right")
RETRIED_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
ENDPOINT_BATCH = 64


class HuggingFaceEmbeddings(BaseModel, Embeddings):
    """LangChain embeddings of a model that runs on this machine.

    It has the arguments of the class of the same name in `langchain-huggingface`, and gives the same vectors. The model
    runs on torch, or on OpenVINO with `model_kwargs={"backend": "openvino"}`; its engine is shared with all other users
    of the same model in this process.

    Example:
        Embed documents and a query:
        ```python
        from prefect_huggingface.tasks.langchain import HuggingFaceEmbeddings

        embeddings = HuggingFaceEmbeddings(model_name="sentence-transformers/all-MiniLM-L6-v2")
        vectors = embeddings.embed_documents(["Paris is the capital of France."])
        ```

    Attributes:
        model_name: Id or folder of the model; `model` is another name for it, and takes a `LocalModel` too.
        block: What is loaded. With a block, the prompts of its repository are used for queries and documents.
        cache_folder: Folder for models.
        model_kwargs: Arguments of Sentence Transformers for loading the model, and `weight_format` for OpenVINO.
        encode_kwargs: Arguments for documents, and for queries where they have none of their own.
        query_encode_kwargs: Arguments for queries.
        multi_process: Accepted; an engine uses the whole device.
        show_progress: Whether a bar shows how far a call is.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), populate_by_name=True, hide_input_in_errors=True)

    model_name: str = Field(default=DEFAULT_MODEL, alias="model")
    block: LocalModel | None = Field(default=None, repr=False, exclude=True)
    cache_folder: str | None = None
    model_kwargs: dict[str, Any] = Field(default_factory=dict, repr=False)
    encode_kwargs: dict[str, Any] = Field(default_factory=dict)
    query_encode_kwargs: dict[str, Any] = Field(default_factory=dict)
    multi_process: bool = False
    show_progress: bool = False

    def __init__(self, **kwargs: Any) -> None:
        """Check the arguments. The model is loaded when it is first used.

        Raises:
            SettingsError: If an argument is unknown, or does not go with another one. It is a `ValueError`.
        """
        if isinstance(kwargs.get("model"), LocalModel):
            kwargs["block"] = kwargs.pop("model")
        if kwargs.get("block") is not None:
            kwargs["model_name"] = kwargs["block"].model_id
        super().__init__(**kwargs)
        for given in (self.encode_kwargs, self.query_encode_kwargs):
            _read_encode_kwargs(given, {})
            if given.get("device") is not None:
                _check_device(self.local_model, str(given["device"]))
        assert self.local_model

    @cached_property
    def local_model(self) -> LocalModel:
        """What is loaded."""
        if self.block is not None:
            if self.model_kwargs:
                raise SettingsError("A `LocalModel` excludes `model_kwargs`. Set the fields of the block.")
            return self.block
        return read_model(self.model_name, "feature-extraction", self.model_kwargs, self.cache_folder)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Return the vectors of documents.

        Raises:
            GenerationError: If one of them has none.
        """
        return self._embed(texts, "document", self.encode_kwargs)

    def embed_query(self, text: str) -> list[float]:
        """Return the vector of a query.

        Raises:
            GenerationError: If it has none.
        """
        return self._embed([text], "query", self.query_encode_kwargs or self.encode_kwargs)[0]

    def _embed(self, texts: Sequence[str], input_type: Any, given: Mapping[str, Any]) -> list[list[float]]:
        engine = load_engine(self.local_model)
        options = _read_encode_kwargs(given, self._prompts(engine))
        # Line ends are spaces, as in the class of LangChain.
        requests = [
            Request(text.replace("\n", " "), options=LENIENT, input_type=input_type, embedding=options)
            for text in texts
        ]
        vectors = [completion.vector for completion in _ask(engine, requests, self.show_progress)]
        return [[float(value) for value in vector] for vector in vectors]

    def _prompts(self, engine: Engine) -> dict[str, str]:
        """Return the prompts by their names; the one named None is for texts that ask for none."""
        inputs: Any = engine.inputs
        prompts: dict[Any, str] = {**inputs.files.prompts, **(self.model_kwargs.get("prompts") or {})}
        default = self.model_kwargs.get("default_prompt_name") or inputs.files.default_prompt_name
        if self.block is None:
            prompts[None] = prompts.get(default, "")
        return prompts


class HuggingFaceCrossEncoder(BaseModel, BaseCrossEncoder):
    """LangChain cross-encoder of a reranker that runs on this machine.

    Attributes:
        model_name: Id or folder of the model.
        block: What is loaded, in place of the other arguments.
        model_kwargs: Arguments of Sentence Transformers for loading the model, and `weight_format` for OpenVINO.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), hide_input_in_errors=True)

    model_name: str = DEFAULT_RERANKER
    block: LocalModel | None = Field(default=None, repr=False, exclude=True)
    model_kwargs: dict[str, Any] = Field(default_factory=dict, repr=False)

    @cached_property
    def local_model(self) -> LocalModel:
        """What is loaded."""
        return self.block or read_model(self.model_name, "text-ranking", self.model_kwargs)

    def score(self, text_pairs: list[tuple[str, str]]) -> list[float]:
        """Return how well the second text of each pair answers the first one.

        Raises:
            GenerationError: If a pair cannot be scored.
        """
        options = EmbeddingOptions(allow_empty=True)
        requests = [Request(query, pair=text, options=LENIENT, embedding=options) for query, text in text_pairs]
        return [float(completion.vector[0]) for completion in _ask(load_engine(self.local_model), requests)]


class HuggingFaceEndpointEmbeddings(BaseModel, Embeddings):
    """LangChain embeddings of a model that a server or an inference provider runs.

    It has the arguments of the class of the same name in `langchain-huggingface`. A server is asked by the protocol of
    OpenAI, which Text Embeddings Inference, vLLM and the model server of this library speak; an inference provider by
    the client of the Hub. The token that is given goes to the endpoint and nowhere else; for a URL, none of the machine
    is used.

    Attributes:
        model: Address or Hub id.
        repo_id: Hub id; another name for `model`.
        endpoint_url: Address of a server; another name for `model`.
        provider: Inference provider of a Hub id.
        task: Must be "feature-extraction".
        model_kwargs: Further fields of each request, `dimensions` for instance.
        huggingfacehub_api_token: Token for the endpoint.
        timeout: Longest silence of the server in seconds.
        max_attempts: How often a request is sent that fails in passing.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), hide_input_in_errors=True)

    model: str | None = None
    repo_id: str | None = None
    endpoint_url: str | None = None
    provider: str | None = None
    task: str = "feature-extraction"
    model_kwargs: dict[str, Any] = Field(default_factory=dict)
    huggingfacehub_api_token: SecretStr | None = Field(default=None, repr=False, exclude=True)
    timeout: float = 120
    max_attempts: int = Field(default=4, ge=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.task != "feature-extraction":
            raise SettingsError(f"`task` must be 'feature-extraction', got {self.task!r}. Leave it out.")
        given = [value for value in (self.model, self.repo_id, self.endpoint_url) if value]
        if len(set(given)) > 1 and not self.endpoint_url:
            raise SettingsError(f"`model` and `repo_id` name two models, got {given!r}. Give one of them.")
        return self

    @cached_property
    def endpoint(self) -> InferenceEndpoint:
        """Block of the endpoint."""
        name = self.repo_id or self.model
        is_url = name is not None and name.startswith(("http://", "https://"))
        url = self.endpoint_url or (name if is_url else None)
        token = self.huggingfacehub_api_token
        if token is None and url is None:
            found = next((os.environ[name] for name in TOKEN_VARIABLES if os.environ.get(name)), None)
            token = None if found is None else SecretStr(found)
        credentials = None if token is None else HuggingFaceCredentials(token=token)
        if url is not None:
            return InferenceEndpoint(url=url, model_id=None if is_url else name, credentials=credentials)
        return InferenceEndpoint(model_id=name or DEFAULT_MODEL, provider=self.provider, credentials=credentials)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Return the vectors of documents.

        Raises:
            GenerationError: If the endpoint gives none.
        """
        found: list[list[float]] = []
        with httpx.Client(timeout=self.timeout) as client:
            for place in range(0, len(texts), ENDPOINT_BATCH):
                found += self._ask(client, [text.replace("\n", " ") for text in texts[place : place + ENDPOINT_BATCH]])
        return found

    def embed_query(self, text: str) -> list[float]:
        """Return the vector of a query.

        Raises:
            GenerationError: If the endpoint gives none.
        """
        return self.embed_documents([text])[0]

    def _ask(self, client: httpx.Client, texts: list[str]) -> list[list[float]]:
        attempts = Retrying(
            stop=stop_after_attempt(self.max_attempts), wait=wait_exponential(0.5, 20), reraise=True,
            retry=retry_if_exception(_is_passing),
        )  # fmt: skip
        failure = None
        try:
            vectors = (
                attempts(self._ask_provider, texts)
                if self.endpoint.url is None
                else attempts(self._ask_server, client, texts)
            )
        except httpx.HTTPError as exc:
            status = _status_of(exc)
            failure = f"HTTP status {status}" if status else type(exc).__name__
        except (ValueError, KeyError, TypeError, OSError) as exc:
            failure = type(exc).__name__ if self.endpoint.url else str(exc).rstrip(".")
        # Outside of the handler, so that no exception with headers in it is the context of this one.
        if failure is not None or len(vectors) != len(texts):
            place = self.endpoint.url or self.endpoint.model_id
            raise GenerationError(
                f"{place!r} gave no vectors: {failure or 'their number is wrong'}. "
                "Check the address, the token and the model of the server."
            )
        return vectors

    def _ask_server(self, client: httpx.Client, texts: list[str]) -> list[list[float]]:
        endpoint, token = self.endpoint, self.endpoint.get_token()
        headers = {**endpoint.get_headers(), **({} if token is None else {"Authorization": f"Bearer {token}"})}
        base = endpoint.base_url.rstrip("/")
        route = f"{base}/embeddings" if base.endswith("/v1") else f"{base}/v1/embeddings"
        body = {"model": endpoint.model_name or "default", "input": texts, **self.model_kwargs}
        answer = client.post(route, json=body, headers=headers).raise_for_status()
        rows = sorted(answer.json()["data"], key=lambda row: int(row["index"]))
        return [[float(value) for value in row["embedding"]] for row in rows]

    def _ask_provider(self, texts: list[str]) -> list[list[float]]:
        """Ask by the client of the Hub, which knows the routes of the providers and their names of the models."""
        from huggingface_hub import InferenceClient

        provider: Any = self.provider
        with InferenceClient(provider=provider, token=self.endpoint.get_token(), timeout=self.timeout) as client:
            made = client.feature_extraction(texts, model=self.endpoint.model_id, **self.model_kwargs)
        found: list[list[float]] = made.tolist()
        return found


def read_model(
    model_name: str, task: Task, model_kwargs: Mapping[str, Any], cache_folder: str | None = None
) -> LocalModel:
    """Return the block that the arguments of Sentence Transformers mean.

    Raises:
        SettingsError: If an argument is unknown.
    """
    given = dict(_flat(model_kwargs))
    given["cache_dir"] = cache_folder or given.pop("cache_folder", None)
    options = {OPTIONS[name]: given.pop(name) for name in list(given) if name in OPTIONS}
    fields: dict[str, Any] = {name: given.pop(name) for name in list(given) if name in FIELDS}
    fields.setdefault("backend", "torch")
    if fields["backend"] == "openvino":
        fields.setdefault("weight_format", "fp32")
    loading = {name: value for name, value in given.items() if name not in WITHOUT_EFFECT and value is not None}
    known = {
        name: value
        for name, value in {**read_fields(loading, fields["backend"]), **fields}.items()
        if value is not None
    }
    return LocalModel(model_id=model_name, task=task, embedding=EmbeddingOptions(**options), **known)


def _flat(given: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    for name, value in given.items():
        if name in NESTED and isinstance(value, Mapping):
            yield from _flat(value)
        else:
            yield name, value


def _read_encode_kwargs(given: Mapping[str, Any], prompts: Mapping[Any, str]) -> EmbeddingOptions:
    """Return the options that arguments of `encode` mean.

    Raises:
        SettingsError: If an argument is unknown, or asks for something other than vectors of float32.
    """
    named, fixed = given.get("prompt_name"), {"precision": "float32", "output_value": "sentence_embedding"}
    known = {"normalize_embeddings", "truncate_dim", "prompt", "prompt_name", "device", *WITHOUT_EFFECT}
    unknown = {name: value for name, value in given.items() if name not in known and fixed.get(name) != value}
    if unknown:
        raise SettingsError(f"`encode_kwargs` has {unknown}, which is not known. Remove it.")
    if named is not None and prompts and named not in prompts:
        names = ", ".join(repr(each) for each in prompts if each is not None) or "none"
        raise SettingsError(f"`prompt_name` must be a prompt of the model ({names}), got {named!r}. Correct it.")
    prompt = given.get("prompt")
    prompt = prompts.get(named) if prompt is None else prompt
    options: dict[str, Any] = {"query_prompt": prompt, "document_prompt": prompt} if prompt is not None else {}
    if given.get("normalize_embeddings"):
        options["normalize"] = True
    if given.get("truncate_dim") is not None:
        options["dimensions"] = given["truncate_dim"]
    return EmbeddingOptions(allow_empty=True, **options)


def _check_device(model: LocalModel, device: str) -> None:
    """Refuse a device that is not the one that the model is loaded on.

    Raises:
        SettingsError: With the device of the model.
    """
    from prefect_huggingface.tasks.engines.openvino_runtime import choose_device
    from prefect_huggingface.tasks.engines.torch_loading import resolve_device

    try:
        if model.backend == "openvino":
            used, named = choose_device(model), choose_device(model.model_copy(update={"device": device}))
        else:
            used, named = str(model.device_map or resolve_device(model.device)), resolve_device(device)
    except EngineError as exc:
        raise SettingsError(str(exc)) from None
    if used != named:
        raise SettingsError(
            f"The model runs on device {used!r}, and `encode_kwargs` names {device!r}. Put `device` into "
            "`model_kwargs`."
        )


def _ask(engine: Engine, requests: Sequence[Request], show_progress: bool = False) -> list[Completion]:
    """Return the completions of requests, in order.

    Raises:
        GenerationError: If one of them fails; the others are cancelled.
    """
    from rich.progress import Progress

    with Progress(disable=not show_progress) as bar:
        batches = bar.add_task("Batches", total=len(requests))

        def check(completion: Completion) -> None:
            if completion.vector is None:
                raise GenerationError(
                    f"Text {completion.request_id} has no vector: {completion.error or completion.finish_reason}",
                    error_code=completion.error_code,
                )
            bar.advance(batches)

        return engine.answer_all(requests, check=check)


def _status_of(error: BaseException) -> int | None:
    """Return the status that a server answered with, None where it did not answer."""
    status: int | None = getattr(getattr(error, "response", None), "status_code", None)
    return status


def _is_passing(error: BaseException) -> bool:
    if status := _status_of(error):
        return status in RETRIED_STATUS
    return isinstance(error, httpx.TransportError) and not isinstance(error, httpx.UnsupportedProtocol)
