"""`HuggingFaceEndpoint`: the LangChain LLM of a model that is served elsewhere."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.outputs import LLMResult
from pydantic import Field, PrivateAttr, SecretStr

from prefect_huggingface.blocks import InferenceEndpoint
from prefect_huggingface.tasks.engines.base import Engine
from prefect_huggingface.tasks.errors import SettingsError
from prefect_huggingface.tasks.langchain.endpoint_settings import (
    DEFAULTS,
    check_names,
    read_endpoint,
    read_endpoint_generation,
)
from prefect_huggingface.tasks.langchain.generation_settings import Generation
from prefect_huggingface.tasks.langchain.llms import EngineLLM
from prefect_huggingface.tasks.langchain.streams import astream_completion, stream_completion
from prefect_huggingface.tasks.records import Completion

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

    def __init__(self, *, task: str | None = None, **kwargs: Any) -> None:
        """Make an LLM of a block, an address, or the id of a model that is served.

        Raises:
            SettingsError: If an argument is unknown, or does not go with another one. It is a `ValueError`.
        """
        given = check_names(kwargs, type(self).model_fields)
        generation, parameters = read_endpoint_generation(given)
        block = given.pop("endpoint", None)
        if block is None:
            places = [given.pop(name, None) for name in ("model", "endpoint_url", "inference_server_url", "repo_id")]
            given |= _place_of(*places)
            block = read_endpoint(given, generation.options, parameters)
        elif not isinstance(block, InferenceEndpoint) or any(given.get(name) for name in PLACE_ARGUMENTS):
            raise SettingsError("`endpoint` must be an InferenceEndpoint, and excludes the arguments that say where.")
        else:
            options = block.options.merged(generation.options)
            block = block.model_copy(
                update={"options": options, "extra_parameters": {**block.extra_parameters, **parameters}}
            )
            given["model"] = block.url or block.model_id
        super().__init__(**{**given, "endpoint": block})
        self._task = task or self._task
        self._generation = Generation(block.options, generation.max_length, generation.min_length)

    def get_engine(self) -> Engine:
        """Return the engine of the endpoint. The endpoint is asked nothing before the first request."""
        from prefect_huggingface.tasks.engines.registry import load_engine

        return load_engine(self.endpoint)

    @property
    def task(self) -> str:
        """Task of the model, which is text generation whatever it is called."""
        return "text-generation"

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        if not self.streaming:
            return super()._generate(prompts, stop, run_manager, **kwargs)
        engine, rows = self.get_engine(), []
        for prompt in prompts:
            for piece in stream_completion(engine, self.make_request(engine, prompt, kwargs, stop)):
                if isinstance(piece, Completion):
                    rows.append(piece)
                elif run_manager:
                    run_manager.on_llm_new_token(piece)
        return self._to_result(rows)

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        if not self.streaming:
            return await super()._agenerate(prompts, stop, run_manager, **kwargs)
        engine, rows = self.get_engine(), []
        for prompt in prompts:
            async for piece in astream_completion(engine, self.make_request(engine, prompt, kwargs, stop)):
                if isinstance(piece, Completion):
                    rows.append(piece)
                elif run_manager:
                    await run_manager.on_llm_new_token(piece)
        return self._to_result(rows)

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
