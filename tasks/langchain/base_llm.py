"""What all LangChain LLMs of this library have in common: their text comes from an engine."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseLLM, LanguageModelInput
from langchain_core.language_models.base import LangSmithParams
from langchain_core.messages.ai import UsageMetadata
from langchain_core.outputs import Generation as LLMGeneration
from langchain_core.outputs import GenerationChunk, LLMResult
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import get_config_list
from pydantic import ConfigDict, Field

from prefect_huggingface.tasks.engines.base import Engine, Inbox, Piece, Reasoning, checked
from prefect_huggingface.tasks.errors import GenerationError
from prefect_huggingface.tasks.langchain.kwargs import (
    Generation,
    fit_options,
    merge_generation,
    read_generation,
    read_images,
)
from prefect_huggingface.tasks.records import Completion, Message, Request

# Types of arguments that LangChain gives to many methods.
Stop = list[str] | None
Run = CallbackManagerForLLMRun | None
AsyncRun = AsyncCallbackManagerForLLMRun | None
Configs = RunnableConfig | list[RunnableConfig] | None

USAGE_NAMES = ("prompt_tokens", "completion_tokens", "total_tokens")


class EngineLLM(BaseLLM):
    """LangChain LLM whose text comes from an engine.

    A call takes the generation settings of LangChain and Hugging Face as keyword arguments, directly or in
    `pipeline_kwargs`. An unknown one is an error.
    """

    # Arguments may hold a token, so that no error shows them.
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True, protected_namespaces=())

    batch_size: int | None = Field(default=None, ge=1)
    """Number of prompts of one call that are generated side by side. When left empty, the engine fills its batches."""

    @abstractmethod
    def get_engine(self) -> Engine:
        """Return the engine; load it first where needed."""

    @property
    @abstractmethod
    def task(self) -> str:
        """Task of the model."""

    @property
    @abstractmethod
    def generation(self) -> Generation:
        """Settings for generating text that are set on this LLM."""

    @property
    def request_defaults(self) -> dict[str, Any]:
        """Fields of every request, which a call may replace."""
        return {}

    def make_request(
        self,
        engine: Engine,
        prompt: str | None,
        call: Mapping[str, Any],
        stop: Sequence[str] | None = None,
        **fields: Any,
    ) -> Request:
        """Return the request for a prompt or a conversation.

        Args:
            engine: Engine that will get it; it counts tokens where a total length is set.
            prompt: Text to go on from, or None with `messages`.
            call: Keyword arguments of the call.
            stop: Further stop strings.
            fields: Further fields of the request, such as `messages` and `tools`.
        """
        fields = {**self.request_defaults, **fields}
        if call.get("images"):
            fields["images"] = read_images(call["images"])
        request = Request(prompt, **fields)
        generation = self.read_call(call, stop)
        return replace(request, options=fit_options(generation, partial(_count, engine, request, generation)))

    def read_call(self, call: Mapping[str, Any], stop: Sequence[str] | None = None) -> Generation:
        """Return the generation settings of a call, over those of the LLM.

        Args:
            call: Keyword arguments of the call.
            stop: Further stop strings.

        Raises:
            SettingsError: If an argument is unknown.
            pydantic.ValidationError: If a value is out of its range.
        """
        settings = {name: value for name, value in call.items() if name != "images"}
        settings = {**(settings.pop("pipeline_kwargs", None) or {}), **settings}
        generation = merge_generation(self.generation, read_generation(settings, self.task))
        return merge_generation(generation, read_generation({"stop": stop})) if stop else generation

    @property
    def concurrency(self) -> int:
        """Number of calls that are run side by side, so that the batches of the engine are full."""
        return self.batch_size or self.get_engine().in_flight

    def get_num_tokens(self, text: str) -> int:
        """Return the number of tokens of a text, without special tokens."""
        if self.custom_get_token_ids is not None:
            return len(self.custom_get_token_ids(text))
        return self.get_engine().count_tokens(text)

    def get_token_ids(self, text: str) -> list[int]:
        """Return the tokens of a text, without special tokens.

        Raises:
            GenerationError: If the model runs on a server, which keeps its tokenizer to itself.
        """
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        inputs = self.get_engine().inputs
        if inputs is None:
            raise GenerationError("The tokenizer of the server is not known here. Set `custom_get_token_ids`.")
        return inputs.tokenizer.encode(text, add_special_tokens=False)

    def batch(
        self,
        inputs: list[LanguageModelInput],
        config: Configs = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[str]:
        """Return one text for each input; with `return_exceptions`, a bad input gives its own exception."""
        if not return_exceptions:
            return super().batch(inputs, config, **kwargs)
        # Each row is a call of its own, so that only a bad one fails. The engine puts the calls together again.
        configs = concurrent_configs(config, len(inputs), self.concurrency)
        return Runnable.batch(self, inputs, configs, return_exceptions=True, **kwargs)

    async def abatch(
        self,
        inputs: list[LanguageModelInput],
        config: Configs = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[str]:
        """Return one text for each input; with `return_exceptions`, a bad input gives its own exception."""
        if not return_exceptions:
            return await super().abatch(inputs, config, **kwargs)
        configs = concurrent_configs(config, len(inputs), await asyncio.to_thread(lambda: self.concurrency))
        return await Runnable.abatch(self, inputs, configs, return_exceptions=True, **kwargs)

    def _requests(self, engine: Engine, prompts: list[str], stop: Any, kwargs: Mapping[str, Any]) -> list[Request]:
        return [self.make_request(engine, prompt, kwargs, stop) for prompt in prompts]

    def _generate(self, prompts: list[str], stop: Stop = None, run_manager: Run = None, **kwargs: Any) -> LLMResult:
        engine = self.get_engine()
        requests = self._requests(engine, prompts, stop, kwargs)
        return self._to_result(engine.answer_all(requests, self.batch_size, checked))

    async def _agenerate(
        self, prompts: list[str], stop: Stop = None, run_manager: AsyncRun = None, **kwargs: Any
    ) -> LLMResult:
        engine = await asyncio.to_thread(self.get_engine)
        requests = self._requests(engine, prompts, stop, kwargs)
        return self._to_result(await acomplete_all(engine, requests, self.batch_size))

    def _stream(
        self, prompt: str, stop: Stop = None, run_manager: Run = None, **kwargs: Any
    ) -> Iterator[GenerationChunk]:
        engine = self.get_engine()
        for piece in engine.stream_pieces(self.make_request(engine, prompt, kwargs, stop)):
            if (chunk := _to_chunk(piece)) is None:
                continue
            if run_manager and chunk.text:
                run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            yield chunk

    async def _astream(
        self, prompt: str, stop: Stop = None, run_manager: AsyncRun = None, **kwargs: Any
    ) -> AsyncIterator[GenerationChunk]:
        engine = await asyncio.to_thread(self.get_engine)
        async for piece in astream(engine, self.make_request(engine, prompt, kwargs, stop)):
            if (chunk := _to_chunk(piece)) is None:
                continue
            if run_manager and chunk.text:
                await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            yield chunk

    def _to_result(self, completions: Sequence[Completion]) -> LLMResult:
        generations = [
            [LLMGeneration(text=text, generation_info=generation_info(row)) for text in (row.text, *row.alternatives)]
            for row in completions
        ]
        return LLMResult(generations=generations, llm_output=llm_output(map(usage_of, completions), self._model_name))

    @property
    @abstractmethod
    def _model_name(self) -> str:
        """Name of the model for results and traces."""

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop, **kwargs)
        params["ls_provider"] = "huggingface"
        params["ls_model_name"] = str(kwargs.get("model", self._model_name))
        return params


async def astream(engine: Engine, request: Request) -> AsyncIterator[Piece]:
    """Yield what a request brings piece by piece, and then its completion, without a thread of its own.

    Raises:
        GenerationError: If the request fails, as soon as it does.
    """
    inbox = Inbox()
    future = await _in_thread(inbox.submit, engine, request)
    try:
        while not future.cancelled():
            for _, piece in await inbox.take():
                if isinstance(piece, Completion):
                    yield checked(piece)
                    return
                yield piece
    finally:
        future.cancel()


async def acomplete(engine: Engine, request: Request) -> Completion:
    """Return the completion of a request. Cancelling the caller cancels the request.

    Raises:
        GenerationError: If the request fails.
    """
    future = await _in_thread(engine.submit, request)
    return checked(await asyncio.wrap_future(future))


async def acomplete_all(engine: Engine, requests: Sequence[Request], in_flight: int | None = None) -> list[Completion]:
    """Return the completions of requests in their order.

    Raises:
        GenerationError: The first one, if a request fails. The others are cancelled.
    """
    places = asyncio.Semaphore(in_flight or engine.in_flight)

    async def run(request: Request) -> Completion:
        async with places:
            return await acomplete(engine, request)

    runs = [asyncio.ensure_future(run(request)) for request in requests]
    try:
        return list(await asyncio.gather(*runs))
    finally:
        for one in runs:
            one.cancel()
        await asyncio.gather(*runs, return_exceptions=True)


async def _in_thread(submit: Callable[..., Future[Completion]], *arguments: Any) -> Future[Completion]:
    """Submit a request in a thread, as that may take a while; a caller that is cancelled meanwhile cancels it."""
    submitted = asyncio.get_running_loop().run_in_executor(None, submit, *arguments)
    try:
        return await asyncio.shield(submitted)
    except asyncio.CancelledError:
        submitted.add_done_callback(lambda done: done.exception() or done.result().cancel())
        raise


def usage_of(completion: Completion) -> dict[str, int]:
    """Return the token counts of a completion, under the names of OpenAI."""
    prompt, generated = completion.prompt_tokens, completion.generated_tokens
    return dict(zip(USAGE_NAMES, (prompt, generated, prompt + generated), strict=True))


def llm_output(usages: Any, model_name: str) -> dict[str, Any]:
    """Return what is said about a whole call: the sum of its token counts, and the model."""
    total = dict.fromkeys(USAGE_NAMES, 0)
    for usage in usages:
        total = {name: total[name] + usage[name] for name in USAGE_NAMES}
    return {"token_usage": total, "model_name": model_name}


def usage_metadata(completion: Completion) -> UsageMetadata:
    """Return the token counts of a completion, under the names of LangChain's messages."""
    prompt, generated = completion.prompt_tokens, completion.generated_tokens
    return UsageMetadata(input_tokens=prompt, output_tokens=generated, total_tokens=prompt + generated)


def generation_info(completion: Completion) -> dict[str, Any]:
    """Return what is known about a completion, other than its text."""
    info: dict[str, Any] = {"finish_reason": completion.finish_reason, "token_usage": usage_of(completion)}
    if completion.logprobs is not None:
        info["logprobs"] = list(completion.logprobs)
    if completion.reasoning is not None:
        info["reasoning"] = completion.reasoning
    return info


def concurrent_configs(
    config: RunnableConfig | list[RunnableConfig] | None, length: int, limit: int
) -> list[RunnableConfig]:
    """Return one configuration for each input, with a limit of calls at once where none is set."""
    configs = get_config_list(config, length)
    for one in configs:
        one["max_concurrency"] = one.get("max_concurrency") or limit
    return configs


def _to_chunk(piece: Piece) -> GenerationChunk | None:
    if isinstance(piece, Reasoning):
        return None
    if isinstance(piece, str):
        return GenerationChunk(text=piece)
    return GenerationChunk(text="", generation_info=generation_info(piece))


def _count(engine: Engine, request: Request, generation: Generation) -> int:
    """Return the number of tokens of the prompt of a request."""
    messages: Sequence[Message] | None = request.messages
    if engine.inputs is not None and messages is not None:
        return engine.count_tokens(engine.inputs.write(request, generation.options).text)
    return engine.count_tokens(request.prompt or "\n".join(str(message["content"]) for message in messages or ()))
