"""`ChatHuggingFace`: the LangChain chat model on top of an LLM of this library."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, Literal, NamedTuple, Self

from langchain_core.exceptions import OutputParserException
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.language_models.base import LangSmithParams
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.output_parsers import BaseOutputParser, JsonOutputParser, PydanticOutputParser
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableLambda, RunnableMap, RunnablePassthrough
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import BaseModel, ConfigDict, Field

from prefect_huggingface.blocks import ResponseFormat
from prefect_huggingface.tasks.engines.base import Engine, RequestError, checked
from prefect_huggingface.tasks.engines.tool_calls import Tool, call_schema, choose_tools
from prefect_huggingface.tasks.errors import GenerationError, SettingsError
from prefect_huggingface.tasks.langchain.base_llm import (
    AsyncRun,
    Configs,
    EngineLLM,
    Run,
    Stop,
    acomplete,
    astream,
    concurrent_configs,
    llm_output,
)
from prefect_huggingface.tasks.langchain.huggingface_endpoint import HuggingFaceEndpoint
from prefect_huggingface.tasks.langchain.huggingface_pipeline import HuggingFacePipeline
from prefect_huggingface.tasks.langchain.messages import ChunkMaker, chat_result, read_messages
from prefect_huggingface.tasks.records import Message, Request

Method = Literal["function_calling", "json_mode", "json_schema"]
# Arguments of a call that are not for the engine.
STREAM_ARGUMENTS = ("stream", "stream_usage", "stream_options")
# Arguments of `from_model_id` that are for the LLM.
LLM_ARGUMENTS = ("device", "device_map", "model_kwargs", "pipeline_kwargs", "batch_size")
SETTING_FIELDS = (
    "temperature", "top_p", "max_tokens", "seed", "n", "logprobs", "presence_penalty", "frequency_penalty",
    "top_logprobs", "logit_bias", "chat_template_kwargs",
)  # fmt: skip


class _Call(NamedTuple):
    """A call as the engine gets it.

    Attributes:
        engine: Engine that answers.
        request: The request.
        tools: Tools whose calls are looked for in the answer.
        most_calls: Greatest number of calls of one answer, None for any number.
    """

    engine: Engine
    request: Request
    tools: list[Tool]
    most_calls: int | None


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
        chat_template_kwargs: Variables of the chat template, `enable_thinking` for instance.
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
    chat_template_kwargs: dict[str, Any] | None = None
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
            backend: "pipeline" for PyTorch, a backend of `HuggingFacePipeline.from_model_id`, or "endpoint" for a model
                that an inference provider serves.
            kwargs: Arguments of `HuggingFacePipeline.from_model_id`, or of `HuggingFaceEndpoint`, of this class, and
                settings for generating text.

        Raises:
            SettingsError: If an argument is unknown, or does not go with another one.
            EngineError: If the model cannot be loaded.
        """
        for_llm = {name: kwargs.pop(name) for name in LLM_ARGUMENTS if name in kwargs and backend != "endpoint"}
        names = {*cls.model_fields, "stop_sequences"} - {"model_kwargs"}
        own = {name: kwargs.pop(name) for name in list(kwargs) if name in names}
        if backend == "endpoint":
            return cls(llm=HuggingFaceEndpoint(repo_id=model_id, task=task, **kwargs), **own)
        for_llm["pipeline_kwargs"] = {**(for_llm.get("pipeline_kwargs") or {}), **kwargs}
        backend = "default" if backend == "pipeline" else backend
        llm = HuggingFacePipeline.from_model_id(model_id, task or "text-generation", backend, **for_llm)
        return cls(llm=llm, **own)

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: dict[str, Any] | str | bool | None = None,
        parallel_tool_calls: bool | None = None,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Return the chat model with tools that it may call.

        Args:
            tools: Tools in any form that LangChain knows.
            tool_choice: "auto", "none", "any" or "required", True, or the name of a tool. A tool that must be called
                is the grammar of the answer, so that the call is always valid.
            parallel_tool_calls: Whether one answer may have several calls; False keeps the first.
            strict: Whether the schemas of the arguments are closed: nothing is left out and nothing added.
            kwargs: Further settings of the calls.

        Raises:
            SettingsError: If the choice is none of the tools.
        """
        formatted = [convert_to_openai_tool(tool, strict=strict) for tool in tools]
        choose_tools(formatted, tool_choice)
        given = {"tool_choice": tool_choice, "parallel_tool_calls": parallel_tool_calls}
        return self.bind(tools=formatted, **{k: v for k, v in given.items() if v is not None}, **kwargs)

    def with_structured_output(
        self,
        schema: Any = None,
        *,
        method: Method = "function_calling",
        include_raw: bool = False,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """Return the chat model with answers that have the form of a schema, as its values.

        Args:
            schema: Pydantic class, typed dictionary, function in the form of OpenAI, or JSON schema. None means any
                JSON object, with the method "json_mode".
            method: All methods constrain the engine by the schema, if there is one.
            include_raw: Whether to return `raw`, `parsed` and `parsing_error` in place of the value, also for an answer
                that has not the form asked for.
            strict: Whether objects have all properties of the schema and no others.
            kwargs: Further settings of the calls.

        Raises:
            SettingsError: If there is no schema, or the method is unknown.
        """
        if method not in ("function_calling", "json_mode", "json_schema"):
            raise SettingsError(f"`method` must be 'function_calling', 'json_schema' or 'json_mode', got {method!r}.")
        if schema is None and method != "json_mode":
            raise SettingsError(f"`schema` must be given with method {method!r}, got None. Give a schema.")
        json_schema = {"type": "object"} if schema is None else schema_of(schema)
        traced = json_schema if schema is None else dict(convert_to_json_schema(schema))
        bound = self.bind(
            response_format=ResponseFormat(json_schema=_closed(json_schema) if strict else json_schema),
            ls_structured_output_format={"kwargs": {"method": method}, "schema": traced},
            **({"keep_invalid": True} if include_raw else {}),
            **kwargs,
        )
        parser = parser_of(schema)
        if not include_raw:
            return bound | parser
        parsed = RunnablePassthrough.assign(
            parsed=itemgetter("raw") | RunnableLambda(_require_json) | parser, parsing_error=lambda _: None
        )
        failed = RunnablePassthrough.assign(parsed=lambda _: None)
        return RunnableMap(raw=bound) | parsed.with_fallbacks([failed], exception_key="parsing_error")

    def batch(
        self,
        inputs: list[LanguageModelInput],
        config: Configs = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[AIMessage]:
        """Return one answer for each input; with `return_exceptions`, a bad input gives its own exception."""
        configs = concurrent_configs(config, len(inputs), self.llm.concurrency)
        return super().batch(inputs, configs, return_exceptions=return_exceptions, **kwargs)

    async def abatch(
        self,
        inputs: list[LanguageModelInput],
        config: Configs = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[AIMessage]:
        """Return one answer for each input; with `return_exceptions`, a bad input gives its own exception."""
        configs = concurrent_configs(config, len(inputs), await asyncio.to_thread(lambda: self.llm.concurrency))
        return await super().abatch(inputs, configs, return_exceptions=return_exceptions, **kwargs)

    def get_num_tokens(self, text: str) -> int:
        """Return the number of tokens of a text, without special tokens."""
        if self.custom_get_token_ids is not None:
            return len(self.custom_get_token_ids(text))
        return self.llm.get_num_tokens(text)

    def get_token_ids(self, text: str) -> list[int]:
        """Return the tokens of a text, without special tokens."""
        return (self.custom_get_token_ids or self.llm.get_token_ids)(text)

    def _generate(
        self, messages: list[BaseMessage], stop: Stop = None, run_manager: Run = None, **kwargs: Any
    ) -> ChatResult:
        call = self._make_call(self.llm.get_engine(), messages, stop, kwargs)
        [completion] = call.engine.answer_all([call.request], check=checked)
        return chat_result(completion, call.tools, str(self.model_id), call.most_calls)

    async def _agenerate(
        self, messages: list[BaseMessage], stop: Stop = None, run_manager: AsyncRun = None, **kwargs: Any
    ) -> ChatResult:
        call = self._make_call(await asyncio.to_thread(self.llm.get_engine), messages, stop, kwargs)
        return chat_result(await acomplete(call.engine, call.request), call.tools, str(self.model_id), call.most_calls)

    def _stream(
        self, messages: list[BaseMessage], stop: Stop = None, run_manager: Run = None, **kwargs: Any
    ) -> Iterator[ChatGenerationChunk]:
        call = self._make_call(self.llm.get_engine(), messages, stop, kwargs)
        maker = self._chunk_maker(call, kwargs)
        for piece in call.engine.stream_pieces(call.request):
            for chunk in maker.chunks(piece):
                if run_manager:
                    run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    async def _astream(
        self, messages: list[BaseMessage], stop: Stop = None, run_manager: AsyncRun = None, **kwargs: Any
    ) -> AsyncIterator[ChatGenerationChunk]:
        call = self._make_call(await asyncio.to_thread(self.llm.get_engine), messages, stop, kwargs)
        maker = self._chunk_maker(call, kwargs)
        async for piece in astream(call.engine, call.request):
            for chunk in maker.chunks(piece):
                if run_manager:
                    await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    def _chunk_maker(self, call: _Call, kwargs: Mapping[str, Any]) -> ChunkMaker:
        with_usage = kwargs.get("stream_usage", self.stream_usage) is not False
        return ChunkMaker(call.tools, str(self.model_id), with_usage, call.most_calls)

    def _make_call(
        self, engine: Engine, messages: list[BaseMessage], stop: list[str] | None, kwargs: Mapping[str, Any]
    ) -> _Call:
        """Return the request of a call, with its tools.

        Raises:
            SettingsError: If a setting or a message is unknown.
        """
        settings = {name: value for name, value in {**self._settings, **kwargs}.items() if name not in STREAM_ARGUMENTS}
        settings.pop("ls_structured_output_format", None)
        keeps_invalid = settings.pop("keep_invalid", False)
        most_calls = 1 if settings.pop("parallel_tool_calls", None) is False else None
        tools, choice = list(settings.pop("tools", None) or ()), settings.pop("tool_choice", None)
        tools = [] if choice == "none" else tools
        forced = choose_tools(tools, choice)
        if forced:
            # A call that must be made is the grammar of the answer.
            settings["response_format"] = ResponseFormat(json_schema=call_schema(forced))
        stops = [text for given in (self.stop, stop) for text in ([given] if isinstance(given, str) else given or ())]
        # A call that is cut off at the limit is an invalid call, whole and streamed.
        checks = not (keeps_invalid or forced)
        make = partial(self.llm.make_request, engine, call=settings, stop=stops, tools=tuple(tools), check_form=checks)
        read = read_messages(messages)
        if _is_templated(engine, read):
            request = make(str(read[0]["content"]), chat_template="never")
        else:
            request = make(None, messages=read, **self._template_of(tools))
        return _Call(engine, request, tools, most_calls)

    def _template_of(self, tools: Sequence[Tool]) -> dict[str, Any]:
        """Return the template of the tokenizer that was given, as a field of requests."""
        if self.tokenizer is None:
            return {}
        return {"template": self.tokenizer.get_chat_template(tools=list(tools) or None)}

    def _to_chat_prompt(self, messages: list[BaseMessage]) -> str:
        """Return the prompt that messages come to."""
        call = self._make_call(self.llm.get_engine(), messages, None, {})
        if call.request.prompt is not None:
            return call.request.prompt
        if call.engine.inputs is None:
            raise GenerationError("The chat template of the server is not known here. Ask it with messages.")
        try:
            return call.engine.inputs.write(call.request, call.request.options).text
        except RequestError as exc:
            raise GenerationError(str(exc), error_code=exc.code) from None

    def _combine_llm_outputs(self, llm_outputs: list[dict[str, Any] | None]) -> dict[str, Any]:
        usages = [output["token_usage"] for output in llm_outputs if output and "token_usage" in output]
        return llm_output(usages, str(self.model_id))

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
        given = {"stop": self.stop, "model_id": self.model_id, **self._template_of(())}
        return {**self.llm._identifying_params, **self._settings, **given}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop, **kwargs)
        return LangSmithParams(
            **{**params, "ls_provider": "huggingface", "ls_model_name": str(kwargs.get("model", self.model_id))}
        )


def schema_of(schema: Any) -> dict[str, Any]:
    """Return the JSON schema of a schema in any of its forms."""
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        return schema.model_json_schema()
    return dict(convert_to_json_schema(schema))


def parser_of(schema: Any) -> BaseOutputParser[Any]:
    """Return the parser that makes the value of a schema from text."""
    if is_basemodel_subclass(schema):
        return PydanticOutputParser(pydantic_object=schema)
    return JsonOutputParser()


def _require_json(message: BaseMessage) -> BaseMessage:
    """Return a message whose text is JSON. The parsers of LangChain complete text that was cut off."""
    try:
        json.loads(str(message.content))
    except ValueError as exc:
        text = f"The answer is not JSON: {exc}. Raise `max_new_tokens` if it was cut off."
        raise OutputParserException(text, llm_output=str(message.content)) from exc
    return message


def _closed(schema: Any) -> Any:
    """Return a JSON schema whose objects have all their properties and no others."""
    if isinstance(schema, list):
        return [_closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: _closed(value) for name, value in schema.items()}
    if isinstance(schema.get("properties"), dict):
        closed |= {"additionalProperties": False, "required": list(schema["properties"])}
    return closed


def _is_templated(engine: Engine, messages: Sequence[Message]) -> bool:
    """Return whether a conversation is one message that went through the template already."""
    template = engine.inputs.template if engine.inputs is not None else None
    if template is None or len(messages) != 1 or messages[0]["role"] != "user":
        return False
    content = messages[0]["content"]
    return isinstance(content, str) and template.is_templated(content)
