"""What all LangChain LLMs of this library have in common: their text comes from an engine."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseLLM, LanguageModelInput
from langchain_core.language_models.base import LangSmithParams
from langchain_core.outputs import Generation as LLMGeneration
from langchain_core.outputs import GenerationChunk, LLMResult
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import get_config_list
from pydantic import ConfigDict, Field, PrivateAttr

from prefect_huggingface.tasks.engines.base import Engine
from prefect_huggingface.tasks.langchain.chat_prompts import render_messages
from prefect_huggingface.tasks.langchain.generation_settings import (
    Generation,
    fit_options,
    merge_generation,
    read_generation,
)
from prefect_huggingface.tasks.langchain.results import add_usage, generation_info, usage_of
from prefect_huggingface.tasks.langchain.streams import acomplete, astream_completion, complete, stream_completion
from prefect_huggingface.tasks.records import Completion, Message, Request


class EngineLLM(BaseLLM):
    """LangChain LLM whose text comes from an engine.

    A call takes the generation settings of LangChain and Hugging Face as keyword arguments, directly or in
    `pipeline_kwargs`. An unknown one is an error.
    """

    # Arguments may hold a token, so that no error shows them.
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True, protected_namespaces=())

    batch_size: int | None = Field(default=None, ge=1)
    """Number of prompts of one call that are generated side by side. When left empty, the engine fills its batches."""

    _generation: Generation = PrivateAttr()

    @abstractmethod
    def get_engine(self) -> Engine:
        """Return the engine; load it first where needed."""

    @property
    @abstractmethod
    def task(self) -> str:
        """Task of the model."""

    def make_request(
        self,
        engine: Engine,
        prompt: str | None,
        call: Mapping[str, Any],
        stop: Sequence[str] | None = None,
        *,
        messages: Sequence[Message] | None = None,
        request_id: int | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> Request:
        """Return the request for a prompt or a conversation.

        Args:
            engine: Engine that will get it; it counts tokens where a total length is set.
            prompt: Text to go on from, or None with `messages`.
            call: Keyword arguments of the call.
            stop: Further stop strings.
            messages: Conversation, in place of the prompt.
            request_id: Name of the request.
            tools: Functions that the model may call.
        """
        generation = self.read_call(call, stop)

        def count() -> int:
            text = prompt if messages is None else render_messages(engine, messages, tools)
            return engine.count_tokens(text or "")

        options = fit_options(generation, count)
        return Request(prompt, messages, options, request_id, tuple(call.get("images", ())), tuple(tools))

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
        generation = merge_generation(self._generation, read_generation(settings, self.task))
        return merge_generation(generation, read_generation({"stop": stop})) if stop else generation

    @property
    def concurrency(self) -> int:
        """Number of calls that are run side by side, so that the batches of the engine are full."""
        return self.batch_size or self.get_engine().in_flight

    def get_num_tokens(self, text: str) -> int:
        """Return the number of tokens of a text, without special tokens."""
        return self.get_engine().count_tokens(text)

    def batch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
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
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[str]:
        """Return one text for each input; with `return_exceptions`, a bad input gives its own exception."""
        if not return_exceptions:
            return await super().abatch(inputs, config, **kwargs)
        return await Runnable.abatch(self, inputs, config, return_exceptions=True, **kwargs)

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        engine = self.get_engine()
        requests = [self.make_request(engine, text, kwargs, stop, request_id=row) for row, text in enumerate(prompts)]
        return self._to_result(complete(engine, requests, self.batch_size))

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        engine = await asyncio.to_thread(self.get_engine)
        requests = [self.make_request(engine, text, kwargs, stop, request_id=row) for row, text in enumerate(prompts)]
        async with asyncio.TaskGroup() as group:
            runs = [group.create_task(acomplete(engine, request)) for request in requests]
        return self._to_result([run.result() for run in runs])

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        engine = self.get_engine()
        for piece in stream_completion(engine, self.make_request(engine, prompt, kwargs, stop)):
            chunk = _to_chunk(piece)
            if run_manager and chunk.text:
                run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            yield chunk

    async def _astream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[GenerationChunk]:
        engine = await asyncio.to_thread(self.get_engine)
        async for piece in astream_completion(engine, self.make_request(engine, prompt, kwargs, stop)):
            chunk = _to_chunk(piece)
            if run_manager and chunk.text:
                await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            yield chunk

    def _to_result(self, completions: Sequence[Completion]) -> LLMResult:
        generations = [
            [LLMGeneration(text=text, generation_info=generation_info(row)) for text in (row.text, *row.alternatives)]
            for row in completions
        ]
        usage = add_usage(usage_of(row) for row in completions)
        output = {"token_usage": usage, "model_name": self._model_name}
        return LLMResult(generations=generations, llm_output=output)

    @property
    @abstractmethod
    def _model_name(self) -> str:
        """Name of the model for results and traces."""

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop, **kwargs)
        params["ls_provider"] = "huggingface"
        params["ls_model_name"] = self._model_name
        return params


def _to_chunk(piece: str | Completion) -> GenerationChunk:
    if isinstance(piece, str):
        return GenerationChunk(text=piece)
    return GenerationChunk(text="", generation_info=generation_info(piece))


def concurrent_configs(
    config: RunnableConfig | list[RunnableConfig] | None, length: int, limit: int
) -> list[RunnableConfig]:
    """Return one configuration for each input, with a limit of calls at once where none is set."""
    configs = get_config_list(config, length)
    for one in configs:
        one["max_concurrency"] = one.get("max_concurrency") or limit
    return configs
