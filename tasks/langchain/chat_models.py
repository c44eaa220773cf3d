"""`ChatHuggingFace`: the LangChain chat model on top of an LLM of this library."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any, Self

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.language_models.base import LangSmithParams
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import ConfigDict, Field

from prefect_huggingface.tasks.engines.base import Engine
from prefect_huggingface.tasks.errors import SettingsError
from prefect_huggingface.tasks.langchain.chat_answers import chat_chunks, chat_result
from prefect_huggingface.tasks.langchain.chat_prompts import render_messages
from prefect_huggingface.tasks.langchain.chat_requests import ChatRequest, chat_request, written_prompt
from prefect_huggingface.tasks.langchain.llms import EngineLLM, concurrent_configs
from prefect_huggingface.tasks.langchain.messages import read_messages
from prefect_huggingface.tasks.langchain.pipelines import HuggingFacePipeline
from prefect_huggingface.tasks.langchain.streams import acomplete, astream_completion, complete, stream_completion
from prefect_huggingface.tasks.langchain.structured_outputs import Method, bind_schema
from prefect_huggingface.tasks.langchain.tool_calls import choose_tools

# Arguments of `from_model_id` that are for the LLM.
LLM_ARGUMENTS = ("device", "device_map", "model_kwargs", "pipeline_kwargs", "batch_size")
SETTING_FIELDS = (
    "temperature", "top_p", "max_tokens", "seed", "n", "logprobs", "presence_penalty", "frequency_penalty",
    "top_logprobs", "logit_bias",
)  # fmt: skip


class ChatHuggingFace(BaseChatModel):
    """LangChain chat model of a Hugging Face model.

    It has the arguments and methods of the class of the same name in `langchain-huggingface`. Messages go through the
    chat template of the model exactly once; answers have token counts and a finish reason.

    Example:
        Ask a model on this machine:
        ```python
        from prefect_huggingface.tasks.langchain import ChatHuggingFace, HuggingFacePipeline

        llm = HuggingFacePipeline.from_model_id("HuggingFaceTB/SmolLM2-135M-Instruct", "text-generation")
        answer = ChatHuggingFace(llm=llm).invoke("What is the capital of France?")
        print(answer.content, answer.usage_metadata)
        ```

    Attributes:
        llm: LLM whose engine answers, such as a `HuggingFacePipeline`.
        tokenizer: Tokenizer of Transformers whose chat template takes the place of the model's.
        model_id: Name of the model, that of the LLM by default.
        stop: Texts that end an answer.
        streaming: Whether `invoke` streams to the callbacks.
        stream_usage: Whether a stream ends with the token counts. It does unless this is False.
        model_kwargs: Further settings for generating text.
    """

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True, populate_by_name=True, protected_namespaces=())

    llm: EngineLLM
    tokenizer: Any = Field(default=None, repr=False)
    model_id: str | None = None
    temperature: float | None = None
    stop: str | list[str] | None = Field(default=None, alias="stop_sequences")
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    logit_bias: dict[int, int] | None = None
    streaming: bool = False
    stream_usage: bool | None = None
    n: int | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    model_kwargs: dict[str, Any] = Field(default_factory=dict)

    def __init__(self, **kwargs: Any) -> None:
        """Make a chat model of an LLM, and check its settings."""
        llm = kwargs.get("llm")
        if not isinstance(llm, EngineLLM):
            raise SettingsError(f"`llm` must be an LLM of this library, got {type(llm)!r}. Use a HuggingFacePipeline.")
        super().__init__(**kwargs)
        self.model_id = self.model_id or llm._model_name
        llm.read_call(self._settings)

    @classmethod
    def from_model_id(cls, model_id: str, task: str | None = None, backend: str = "pipeline", **kwargs: Any) -> Self:
        """Load a model and return the chat model on it.

        Args:
            model_id: Hub id or folder of the model.
            task: Task of the model, "text-generation" by default.
            backend: "pipeline" for PyTorch, or a backend of `HuggingFacePipeline.from_model_id`.
            kwargs: Arguments of `HuggingFacePipeline.from_model_id`, of this class, and settings for generating text.

        Raises:
            SettingsError: If an argument is unknown, or does not go with another one.
            EngineError: If the model cannot be loaded.
        """
        for_llm = {name: kwargs.pop(name) for name in LLM_ARGUMENTS if name in kwargs}
        own = {name: kwargs.pop(name) for name in list(kwargs) if name in {*cls.model_fields, "stop_sequences"}}
        for_llm["pipeline_kwargs"] = {**(for_llm.get("pipeline_kwargs") or {}), **kwargs}
        backend = "default" if backend == "pipeline" else backend
        llm = HuggingFacePipeline.from_model_id(model_id, task or "text-generation", backend, **for_llm)
        return cls(llm=llm, **own)

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: dict[str, Any] | str | bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Return the chat model with tools that it may call.

        Args:
            tools: Tools in any form that LangChain knows.
            tool_choice: "auto", "none", "any" or "required", True, or the name of a tool. A tool that must be called
                is the grammar of the answer, so that the call is always valid.
            kwargs: Further settings of the calls.

        Raises:
            SettingsError: If the choice is none of the tools.
        """
        formatted = [convert_to_openai_tool(tool) for tool in tools]
        choose_tools(formatted, tool_choice)
        choice = {} if tool_choice is None else {"tool_choice": tool_choice}
        return self.bind(tools=formatted, **choice, **kwargs)

    def with_structured_output(
        self, schema: Any = None, *, method: Method = "function_calling", include_raw: bool = False, **kwargs: Any
    ) -> Runnable[LanguageModelInput, Any]:
        """Return the chat model with answers that have the form of a schema, as its values.

        Args:
            schema: Pydantic class, typed dictionary, function in the form of OpenAI, or JSON schema.
            method: All methods constrain the engine by the schema; "json_mode" by nothing but JSON.
            include_raw: Whether to return `raw`, `parsed` and `parsing_error` in place of the value.
            kwargs: `strict` is accepted, it is always so.

        Raises:
            SettingsError: If there is no schema, or an argument is unknown.
        """
        unknown = set(kwargs) - {"strict"}
        if unknown:
            raise SettingsError(f"{sorted(unknown)!r} are no known arguments. Remove them.")
        return bind_schema(self, schema, method, include_raw)

    def batch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[AIMessage]:
        """Return one answer for each input; with `return_exceptions`, a bad input gives its own exception."""
        configs = concurrent_configs(config, len(inputs), self.llm.concurrency)
        return super().batch(inputs, configs, return_exceptions=return_exceptions, **kwargs)

    def get_num_tokens(self, text: str) -> int:
        """Return the number of tokens of a text, without special tokens."""
        return self.llm.get_num_tokens(text)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        engine = self.llm.get_engine()
        request, tools = self._make_request(engine, messages, stop, kwargs)
        return chat_result(complete(engine, [request])[0], tools, str(self.model_id))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        engine = await asyncio.to_thread(self.llm.get_engine)
        request, tools = self._make_request(engine, messages, stop, kwargs)
        return chat_result(await acomplete(engine, request), tools, str(self.model_id))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        engine = self.llm.get_engine()
        request, tools = self._make_request(engine, messages, stop, kwargs)
        with_usage = kwargs.get("stream_usage", self.stream_usage) is not False
        for piece in stream_completion(engine, request):
            for chunk in chat_chunks(piece, tools, str(self.model_id), with_usage):
                if run_manager:
                    run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        engine = await asyncio.to_thread(self.llm.get_engine)
        request, tools = self._make_request(engine, messages, stop, kwargs)
        with_usage = kwargs.get("stream_usage", self.stream_usage) is not False
        async for piece in astream_completion(engine, request):
            for chunk in chat_chunks(piece, tools, str(self.model_id), with_usage):
                if run_manager:
                    await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    def _make_request(
        self, engine: Engine, messages: list[BaseMessage], stop: list[str] | None, call: Mapping[str, Any]
    ) -> ChatRequest:
        stops = [*([self.stop] if isinstance(self.stop, str) else self.stop or ()), *(stop or ())]
        return chat_request(self.llm, engine, messages, {**self._settings, **call}, stops, self.tokenizer)

    def _to_chat_prompt(self, messages: list[BaseMessage]) -> str:
        """Return the prompt that messages come to."""
        engine = self.llm.get_engine()
        read = read_messages(messages)
        prompt = written_prompt(engine, read, tokenizer=self.tokenizer)
        return render_messages(engine, read) if prompt is None else prompt

    @property
    def _settings(self) -> dict[str, Any]:
        """Settings for generating text that are set here, over those of the LLM."""
        set_here = {name: getattr(self, name) for name in SETTING_FIELDS}
        return {**{name: value for name, value in set_here.items() if value is not None}, **self.model_kwargs}

    @property
    def _llm_type(self) -> str:
        return "huggingface-chat-wrapper"

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        return {**self.llm._identifying_params, **self._settings, "stop": self.stop, "model_id": self.model_id}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop, **kwargs)
        return LangSmithParams(**{**params, "ls_provider": "huggingface", "ls_model_name": str(self.model_id)})
