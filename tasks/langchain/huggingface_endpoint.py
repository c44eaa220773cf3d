"""`HuggingFaceEndpoint`: the LangChain LLM of a model that is served elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from operator import add
from typing import Any

from langchain_core.outputs import GenerationChunk, LLMResult
from prefect.types import SecretDict
from pydantic import Field, PrivateAttr, SecretStr, ValidationError

from prefect_huggingface.blocks import HuggingFaceCredentials, InferenceEndpoint
from prefect_huggingface.blocks.endpoint import ExtraOption
from prefect_huggingface.tasks.engines.base import Engine
from prefect_huggingface.tasks.errors import SettingsError
from prefect_huggingface.tasks.langchain.base_llm import AsyncRun, EngineLLM, Run, Stop, llm_output
from prefect_huggingface.tasks.langchain.kwargs import GENERATION_NAMES, Generation, read_generation
from prefect_huggingface.tasks.storage.files import hash_json

DEFAULTS: dict[str, Any] = {"max_new_tokens": 512, "temperature": 0.8, "top_p": 0.95}
# The class has these arguments; they are settings for generating text.
SETTINGS = (
    "max_new_tokens", "top_k", "top_p", "temperature", "repetition_penalty", "return_full_text", "stop_sequences",
    "seed", "do_sample",
)  # fmt: skip
# Parameters of TGI that no other engine has. They are sent as they are.
TGI_PARAMETERS = (
    "typical_p", "truncate", "watermark", "best_of", "top_n_tokens", "adapter_id", "decoder_input_details",
)  # fmt: skip
EXTRA_OPTIONS: tuple[ExtraOption, ...] = ("top_k", "repetition_penalty", "min_new_tokens", "ignore_eos")
OTHER_NAMES = {"stop_sequences": ("stop",), "max_new_tokens": ("max_tokens", "max_completion_tokens")}
TOKEN_VARIABLE = "HUGGINGFACEHUB_API_TOKEN"
BILL_HEADER = "X-HF-Bill-To"
URL_VARIABLE = "HF_INFERENCE_ENDPOINT"


class HuggingFaceEndpoint(EngineLLM):
    """LangChain LLM of a model that a Hugging Face endpoint, an inference provider or another server runs.

    It has the arguments and methods of the class of the same name in `langchain-huggingface`. The token that is given
    goes to the endpoint and nowhere else; for a URL, none of the machine is used. A failure that passes is tried again.
    Text is greedy unless `do_sample` or a sampling setting is given.

    Example:
        Ask a server of one's own:
        ```python
        from prefect_huggingface.tasks.langchain import HuggingFaceEndpoint

        llm = HuggingFaceEndpoint(endpoint_url="http://localhost:8080", max_new_tokens=64)
        print(llm.invoke("What is the capital of France?"))
        ```

    Attributes:
        endpoint: Block of the endpoint, in place of the arguments that say where it is.
        endpoint_url: Address of the endpoint.
        repo_id: Hub id of a model that an inference provider serves.
        provider: Inference provider of `repo_id`.
        model: Address or Hub id, whichever was given.
        huggingfacehub_api_token: Token for the endpoint.
        timeout: Longest silence of the server in seconds.
        streaming: Whether `invoke` streams to the callbacks.
        server_kwargs: `headers` and `bill_to` for the server.
        model_kwargs: Further settings for generating text, and parameters of TGI.
    """

    endpoint: InferenceEndpoint = Field(repr=False)
    endpoint_url: str | None = None
    repo_id: str | None = None
    provider: str | None = None
    model: str = ""
    huggingfacehub_api_token: SecretStr | None = Field(default=None, repr=False, exclude=True)
    max_new_tokens: int = DEFAULTS["max_new_tokens"]
    top_k: int | None = None
    top_p: float | None = DEFAULTS["top_p"]
    typical_p: float | None = None
    temperature: float | None = DEFAULTS["temperature"]
    repetition_penalty: float | None = None
    return_full_text: bool = False
    truncate: int | None = None
    stop_sequences: list[str] = Field(default_factory=list)
    seed: int | None = None
    inference_server_url: str = ""
    timeout: float = 120
    streaming: bool = False
    do_sample: bool = False
    watermark: bool = False
    server_kwargs: dict[str, Any] = Field(default_factory=dict, repr=False)
    model_kwargs: dict[str, Any] = Field(default_factory=dict)

    _task: str = PrivateAttr(default="text-generation")
    _given: dict[str, Any] = PrivateAttr()
    _base: InferenceEndpoint = PrivateAttr()
    _generation: Generation = PrivateAttr()

    def __init__(self, *, task: str | None = None, **kwargs: Any) -> None:
        """Make an LLM of a block, an address, or the id of a model that is served.

        Raises:
            SettingsError: If an argument is unknown, or does not go with another one. It is a `ValueError`.
        """
        given = check_names(kwargs, type(self).model_fields)
        asked = dict(given)
        base = given.pop("endpoint", None)
        if base is None:
            places = [given.pop(name, None) for name in ("model", "endpoint_url", "inference_server_url", "repo_id")]
            given |= _place_of(*places)
            base = read_endpoint(given)
        elif not isinstance(base, InferenceEndpoint) or any(given.get(name) for name in PLACE_ARGUMENTS):
            raise SettingsError("`endpoint` must be an InferenceEndpoint, and excludes the arguments that say where.")
        else:
            given["model"] = base.url or base.model_id
        block, generation = put_over(base, asked)
        super().__init__(**{**given, "endpoint": block})
        self._task = task or self._task
        self._given, self._base, self._generation = asked, base, generation

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field. A setting for generating text counts from then on, and None leaves it to the defaults."""
        if name in (*SETTINGS, *TGI_PARAMETERS, "model_kwargs", "endpoint"):
            given = {**self._given, name: {} if name == "model_kwargs" and value is None else value}
            if name != "model_kwargs":  # a field counts more than the same by another name
                others = {name, *OTHER_NAMES.get(name, ())}
                given["model_kwargs"] = {key: kept for key, kept in given["model_kwargs"].items() if key not in others}
            given = check_names(given, type(self).model_fields)
            base = value if name == "endpoint" else self._base
            block, self._generation = put_over(base, given)
            self._given, self._base = given, base
            super().__setattr__("endpoint", block)
        if name != "endpoint":
            super().__setattr__(name, value)

    def get_engine(self) -> Engine:
        """Return the engine of the endpoint. The endpoint is asked nothing before the first request."""
        from prefect_huggingface.tasks.engines.registry import load_engine

        return load_engine(self.endpoint)

    @property
    def generation(self) -> Generation:
        """Settings for generating text that were given here or stand in the block."""
        return self._generation

    @property
    def task(self) -> str:
        """Task of the model, which is text generation whatever it is called."""
        return "text-generation"

    def _generate(self, prompts: list[str], stop: Stop = None, run_manager: Run = None, **kwargs: Any) -> LLMResult:
        if not self.streaming:
            return super()._generate(prompts, stop, run_manager, **kwargs)
        rows = [list(self._stream(prompt, stop, run_manager, **kwargs)) for prompt in prompts]
        return self._joined(rows)

    async def _agenerate(
        self, prompts: list[str], stop: Stop = None, run_manager: AsyncRun = None, **kwargs: Any
    ) -> LLMResult:
        if not self.streaming:
            return await super()._agenerate(prompts, stop, run_manager, **kwargs)
        rows = [[chunk async for chunk in self._astream(prompt, stop, run_manager, **kwargs)] for prompt in prompts]
        return self._joined(rows)

    def _joined(self, rows: Sequence[Sequence[GenerationChunk]]) -> LLMResult:
        chunks = [reduce(add, row) for row in rows]
        usages = [(chunk.generation_info or {})["token_usage"] for chunk in chunks]
        return LLMResult(generations=[[chunk] for chunk in chunks], llm_output=llm_output(usages, self._model_name))

    @property
    def lc_secrets(self) -> dict[str, str]:
        """Names of the arguments that are secret, so that no trace shows them."""
        return {"huggingfacehub_api_token": "HUGGINGFACEHUB_API_TOKEN"}

    @property
    def _llm_type(self) -> str:
        return "huggingface_endpoint"

    @property
    def _model_name(self) -> str:
        return self.model

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        return {
            "endpoint_url": self.endpoint_url,
            "repo_id": self.repo_id,
            "task": self._task,
            "provider": self.provider,
            "model_kwargs": self.model_kwargs,
            "address": self.endpoint.base_url,
            "name": self.endpoint.model_name,
            # Whatever a server takes may stand in them, also what belongs into no trace.
            "extra_parameters": hash_json(self.endpoint.extra_parameters),
            **self._generation.options.model_dump(mode="json", exclude_unset=True),
        }


PLACE_ARGUMENTS = (
    "model", "endpoint_url", "inference_server_url", "repo_id", "provider", "huggingfacehub_api_token", "server_kwargs",
)  # fmt: skip


def _place_of(
    model: str | None, endpoint_url: str | None, server_url: str | None, repo_id: str | None
) -> dict[str, Any]:
    """Return where the model is, of the four ways to say it."""
    if repo_id and repo_id.startswith(("http://", "https://")):
        raise SettingsError(f"`repo_id` must be a Hub id, got {repo_id!r}. Use `endpoint_url` for an address.")
    given = [place for place in (model, endpoint_url, server_url, repo_id) if place]
    if len(given) > 1:
        raise SettingsError(
            f"Only one of `model`, `endpoint_url` and `repo_id` may be given, got {given!r}. Choose one."
        )
    place = given[0] if given else os.environ.get(URL_VARIABLE)
    if not place:
        raise SettingsError(f"`endpoint_url`, `repo_id` or `model` must be given, or {URL_VARIABLE} be set. Give one.")
    is_url = place.startswith(("http://", "https://")) or bool(endpoint_url or server_url)
    return {"model": place, "endpoint_url": place if is_url else None, "repo_id": None if is_url else place}


def check_names(given: Mapping[str, Any], fields: Iterable[str]) -> dict[str, Any]:
    """Return the arguments with those that are no fields put into `model_kwargs`.

    Raises:
        SettingsError: If one is unknown, or is given twice.
    """
    fields = set(fields)
    more = {name: value for name, value in given.items() if name not in fields}
    kwargs = {**(given.get("model_kwargs") or {})}
    twice = sorted({*more, *given} & set(kwargs))
    if twice:
        raise SettingsError(f"{twice!r} are given twice, directly and in `model_kwargs`. Give them once.")
    kwargs |= more
    unknown = sorted(set(kwargs) - GENERATION_NAMES - set(TGI_PARAMETERS))
    if unknown:
        known = sorted({*fields, *GENERATION_NAMES, *TGI_PARAMETERS})
        raise SettingsError(f"{unknown!r} are no known settings. Remove them, or choose from {known!r}.")
    return {**{name: value for name, value in given.items() if name in fields}, "model_kwargs": kwargs}


def read_endpoint_generation(given: Mapping[str, Any]) -> tuple[Generation, dict[str, Any]]:
    """Return the generation settings of the arguments, and the parameters that only TGI knows.

    The defaults of the class for temperature and top p count only for text that is sampled. Greedy text has none, and a
    block has its own.
    """
    kwargs = given["model_kwargs"]
    settings = {name: given[name] for name in SETTINGS if given.get(name) is not None}
    settings |= {name: value for name, value in kwargs.items() if name in GENERATION_NAMES}
    defaults = {} if isinstance(given.get("endpoint"), InferenceEndpoint) else dict(DEFAULTS)
    new_tokens = defaults.pop("max_new_tokens", None)
    if new_tokens and not settings.keys() & {"max_length", *OTHER_NAMES["max_new_tokens"]}:
        settings.setdefault("max_new_tokens", new_tokens)
    if settings.get("do_sample") is False:
        # LangChain code gives sampling settings beside it, which mean nothing then.
        settings = {name: value for name, value in settings.items() if name not in ("temperature", "top_p", "top_k")}
    generation = read_generation(settings)
    if generation.options.do_sample:
        generation = read_generation({**defaults, **settings})
    parameters = {name: value for name in TGI_PARAMETERS if (value := kwargs.get(name, given.get(name))) is not None}
    if not generation.options.do_sample:
        parameters.pop("typical_p", None)
    if not parameters.get("watermark"):
        parameters.pop("watermark", None)
    return generation, parameters


def put_over(base: InferenceEndpoint, given: Mapping[str, Any]) -> tuple[InferenceEndpoint, Generation]:
    """Return a block with the settings of the arguments put over its own, and these settings.

    Raises:
        SettingsError: If a setting is unknown.
    """
    generation, parameters = read_endpoint_generation(given)
    changes = {
        "options": base.options.merged(generation.options),
        "extra_parameters": {**base.extra_parameters, **parameters},
    }
    block = base.model_copy(update=changes)
    return block, Generation(block.options, generation.max_length, generation.min_length)


def read_endpoint(given: Mapping[str, Any]) -> InferenceEndpoint:
    """Return the block that the arguments mean, without their settings for generating text.

    Raises:
        SettingsError: If an argument is unknown or has no allowed value.
    """
    serverless = given.get("repo_id") is not None
    headers = _read_headers(given.get("server_kwargs") or {})
    try:
        return InferenceEndpoint(
            url=given.get("endpoint_url"),
            model_id=given.get("repo_id"),
            provider=given.get("provider"),
            credentials=_credentials_of(given.get("huggingfacehub_api_token"), serverless),
            headers=SecretDict(headers) if headers else None,
            timeout_seconds=given.get("timeout", 120),
            # A server that does not know these refuses them itself.
            extra_options=list(EXTRA_OPTIONS),
        )
    except ValidationError as exc:
        problems = "; ".join(str(error["msg"]).removeprefix("Value error, ") for error in exc.errors())
        raise SettingsError(problems) from None


def _credentials_of(token: Any, serverless: bool) -> HuggingFaceCredentials | None:
    """Return the credentials that a token argument means. The machine's token is for serverless inference only."""
    text = token.get_secret_value() if isinstance(token, SecretStr) else token
    if not text and serverless:
        text = os.environ.get(TOKEN_VARIABLE)
    # A token that was pasted or read from a file often ends in a line break.
    if text and text.strip():
        return HuggingFaceCredentials(token=SecretStr(text.strip()))
    return HuggingFaceCredentials(use_ambient_token=True) if serverless else None


def _read_headers(server_kwargs: Mapping[str, Any]) -> dict[str, str]:
    unknown = sorted(set(server_kwargs) - {"headers", "bill_to"})
    if unknown:
        raise SettingsError(f"{unknown!r} of `server_kwargs` are not known. Use `headers` and `bill_to` only.")
    headers = dict(server_kwargs.get("headers") or {})
    if server_kwargs.get("bill_to"):
        headers[BILL_HEADER] = str(server_kwargs["bill_to"])
    return headers
