"""Answers in the form of a JSON schema: the schema is the grammar of the engine, and the parser checks again."""

from __future__ import annotations

from operator import itemgetter
from typing import Any, Literal

from langchain_core.language_models import BaseChatModel
from langchain_core.output_parsers import BaseOutputParser, JsonOutputParser, PydanticOutputParser
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.utils.function_calling import convert_to_json_schema
from pydantic import BaseModel

from prefect_huggingface.blocks import ResponseFormat
from prefect_huggingface.tasks.errors import SettingsError

Method = Literal["function_calling", "json_mode", "json_schema"]


def bind_schema(chat: BaseChatModel, schema: Any, method: Method, include_raw: bool) -> Runnable[Any, Any]:
    """Return the chat model with answers that have the form of a schema, parsed.

    Args:
        chat: Chat model that understands `response_format`.
        schema: Pydantic class, typed dictionary, function in the form of OpenAI, or JSON schema. None means any JSON
            object, with the method "json_mode".
        method: All methods constrain the engine by the schema; "json_mode" by nothing but JSON.
        include_raw: Whether to return `raw`, `parsed` and `parsing_error` in place of the value.

    Raises:
        SettingsError: If there is no schema, or the method is unknown.
    """
    if method not in ("function_calling", "json_mode", "json_schema"):
        raise SettingsError(f"`method` must be 'function_calling', 'json_schema' or 'json_mode', got {method!r}.")
    if schema is None and method != "json_mode":
        raise SettingsError(f"`schema` must be given with method {method!r}, got None. Give a schema.")
    json_schema = {"type": "object"} if method == "json_mode" else schema_of(schema)
    bound = chat.bind(
        response_format=ResponseFormat(json_schema=json_schema),
        ls_structured_output_format={"kwargs": {"method": method}, "schema": json_schema},
    )
    parser = parser_of(schema)
    if not include_raw:
        return bound | parser
    parsed = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
    failed = RunnablePassthrough.assign(parsed=lambda _: None)
    return RunnableMap(raw=bound) | parsed.with_fallbacks([failed], exception_key="parsing_error")


def schema_of(schema: Any) -> dict[str, Any]:
    """Return the JSON schema of a schema in any of its forms."""
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        return schema.model_json_schema()
    return dict(convert_to_json_schema(schema))


def parser_of(schema: Any) -> BaseOutputParser[Any]:
    """Return the parser that makes the value of a schema from text."""
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        return PydanticOutputParser(pydantic_object=schema)
    return JsonOutputParser()
