"""Rows to requests: templates over the columns, columns of chat messages, and whole requests in OpenAI's format."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from string import Formatter
from typing import Any, Literal

from pydantic import ValidationError

from prefect_huggingface.blocks import GenerationOptions
from prefect_huggingface.blocks.model import VECTOR_TASKS
from prefect_huggingface.tasks.errors import BatchError
from prefect_huggingface.tasks.openai_protocol import CHAT_URL, COMPLETIONS_URL, BodyError, OpenAICall, read_call
from prefect_huggingface.tasks.records import Request
from prefect_huggingface.tasks.vector_protocol import EMBEDDINGS_URL, VectorCall, read_embedding_call

OPENAI_COLUMNS = ("custom_id", "url", "body")
OPENAI_FIELDS = (
    "messages",
    "tools",
    "chat_template",
    "input_type",
    "embedding",
    "check_form",
)  # of requests, besides the prompt
NO_VECTORS = "The model writes text and makes no vectors. Use a model for embeddings."


@dataclass(frozen=True, slots=True)
class RowProblem:
    """Why a row cannot be asked: a status, and a sentence that says what to do."""

    status: str
    message: str


@dataclass(slots=True)
class RowRequest:
    """The request of a row, or of one step of it.

    Many of them wait for their turn, so that the request itself is made when it is needed.

    Attributes:
        number: Number of the row, times the number of steps, plus that of the step.
        text: What tells whether two requests are the same.
        prompt: Prompt of the request, or None where it has messages.
        values: Further fields of the request.
        shareable: Whether requests with the same text have the same answer.
        engine: Number of the engine that answers it.
    """

    number: int
    text: str
    prompt: str | None
    values: Mapping[str, Any]
    shareable: bool = True
    engine: int = 0

    @property
    def request(self) -> Request:
        """What to generate; its id is the number."""
        return Request(self.prompt, id=self.number, **self.values)


RequestMaker = Callable[[int, Mapping[str, Any]], RowRequest | RowProblem]
"""Makes the request of a row, given its number and its values."""


class Template:
    """An f-string template over columns, with the rules of `langchain_core`, rendered fast.

    Args:
        text: Template such as "What is the capital of {country}?". Braces that are no field are doubled.

    Raises:
        BatchError: If it is no template.
    """

    def __init__(self, text: str) -> None:
        try:
            plain, self._odd = _replace_odd_names(text)
            names = _names_in(plain)
        except ValueError as exc:
            raise BatchError(f"`prompt` must be a template, got {text!r:.200}: {exc}. Correct it.") from None
        if "" in names:
            raise BatchError(
                f"`prompt` must be a template that names the columns, got {text!r:.200}. Write {{column}}."
            )
        self.columns = tuple(self._odd.get(name, name) for name in names)
        self._render = plain.format_map

    def render(self, row: Mapping[str, Any]) -> str | RowProblem:
        """Return the text for a row, or what the row lacks."""
        for name in self.columns:
            value = row.get(name)
            if value is None or value != value:  # NaN is not equal to itself
                what = "null" if value is None and name in row else "not there" if value is None else "NaN"
                return RowProblem("missing_value", f"Column {name!r} is {what}. Fill it in, or leave the row out.")
        try:
            return self._render(
                {**row, **{name: row[column] for name, column in self._odd.items()}} if self._odd else row
            )
        except (ValueError, TypeError) as exc:
            return RowProblem("missing_value", f"The prompt cannot be made of the row: {exc}. Correct its value.")


def _names_in(text: str) -> list[str]:
    """Return the names in a template. Importing `langchain_core` for this alone would take a second."""
    fields = [(name, form or "") for _, name, form, _ in Formatter().parse(text) if name is not None]
    for name, form in fields:
        if set(name) & set(".[]") or name.isdigit():
            raise ValueError(f"{name!r} cannot be a name")
        if set(form) & set("{}"):
            raise ValueError(f"the format {form!r} holds a field")
    return sorted({name for name, _ in fields})


def _replace_odd_names(text: str) -> tuple[str, dict[str, str]]:
    """Return a template with other names for columns such as "a.b", "0" and "a[0]", and the column of each.

    In an f-string they would ask for an attribute, a place or an item, which `langchain_core` refuses.
    """
    fields = list(Formatter().parse(text))
    odd = list(dict.fromkeys(name for _, name, _, _ in fields if name and (set(name) & set(".[]") or name.isdigit())))
    taken = {name for _, name, _, _ in fields}
    new = dict(zip((f"column{number}" for number in count() if f"column{number}" not in taken), odd, strict=False))
    for alias, column in new.items():
        text = re.sub(rf"(?<!{{)((?:{{{{)*){{{re.escape(column)}(?=[!:}}])", rf"\g<1>{{{alias}", text)
    return text, new


class PromptRows:
    """Makes requests of a template or of a column of messages.

    Args:
        prompt: Template over the columns, or None where a column holds messages.
        system: Template of the system message, or None.
        messages_column: Column with chat messages, or None.
        option_columns: Columns that hold a generation option of the same name.
        options: Options that were given for the batch.
        greedy: Whether equal prompts have equal answers.
        input_type: Whether the texts are queries or documents, for vectors.
    """

    def __init__(
        self,
        prompt: str | None,
        system: str | None = None,
        messages_column: str | None = None,
        option_columns: tuple[str, ...] = (),
        options: Mapping[str, Any] | None = None,
        greedy: bool = True,
        input_type: Literal["query", "document"] | None = None,
    ) -> None:
        self._prompt = Template(prompt) if prompt is not None else None
        self._system = Template(system) if system is not None else None
        self._messages = messages_column
        self._options = GenerationOptions(**options) if options else None
        self._values = {"options": self._options, "input_type": input_type}
        self._greedy = greedy
        self._option_columns = option_columns
        self._known: dict[str, GenerationOptions | None | RowProblem] = {}

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that every row must have."""
        templates = [template.columns for template in (self._prompt, self._system) if template]
        own = (self._messages,) if self._messages else ()
        return tuple(dict.fromkeys([*(name for names in templates for name in names), *own, *self._option_columns]))

    def __call__(self, number: int, row: Mapping[str, Any]) -> RowRequest | RowProblem:
        """Return the request of a row."""
        options, suffix = self._options, ""
        if self._option_columns:
            given = {name: row[name] for name in self._option_columns if row.get(name) not in (None, "")}
            suffix = json.dumps(given, sort_keys=True, default=str)
            found = self._row_options(given, suffix)
            if isinstance(found, RowProblem):
                return found
            options = found
        greedy = self._greedy and not (options is not None and options.do_sample)
        if self._prompt is not None and self._system is None:
            prompt = self._prompt.render(row)
            if isinstance(prompt, RowProblem):
                return prompt
            values = self._values if options is self._options else {**self._values, "options": options}
            return RowRequest(number, prompt + suffix, prompt, values, greedy)
        messages = self._conversation(row)
        if isinstance(messages, RowProblem):
            return messages
        text = json.dumps(messages, ensure_ascii=False, default=str) + suffix
        return RowRequest(number, text, None, {"messages": messages, "options": options}, greedy)

    def _conversation(self, row: Mapping[str, Any]) -> list[Mapping[str, Any]] | RowProblem:
        messages: list[Mapping[str, Any]] = []
        if self._system is not None:
            system = self._system.render(row)
            if isinstance(system, RowProblem):
                return system
            messages.append({"role": "system", "content": system})
        if self._prompt is not None:
            prompt = self._prompt.render(row)
            if isinstance(prompt, RowProblem):
                return prompt
            return [*messages, {"role": "user", "content": prompt}]
        given = _read_messages(row.get(self._messages or ""))
        if given is None:
            return RowProblem(
                "invalid_prompt",
                f"Column {self._messages!r} holds no list of messages. "
                "Write [{'role': 'user', 'content': '...'}], or its JSON.",
            )
        return [*messages, *given]

    def _row_options(self, given: dict[str, Any], key: str) -> GenerationOptions | None | RowProblem:
        if key not in self._known:
            if len(self._known) > 10_000:
                self._known.clear()
            try:
                own = GenerationOptions(**given)
                self._known[key] = self._options.merged(own) if self._options else own
            except ValidationError as exc:
                first = exc.errors(include_url=False)[0]
                where = ".".join(map(str, first["loc"]))
                self._known[key] = RowProblem("invalid_option", f"Option {where!r}: {first['msg']}. Correct the row.")
        return self._known[key]


def _read_messages(value: Any) -> list[Mapping[str, Any]] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    if not isinstance(value, list) or not value:
        return None
    return value if all(isinstance(item, dict) and "role" in item for item in value) else None


class OpenAIRows:
    """Makes requests of the lines of an OpenAI batch file: chat completions, completions and embeddings.

    Args:
        options: Options that were given for the batch.
        served_names: Names under which the lines may call the model; any where there are none.
        duplicate_rows: Rows whose id an earlier row has.
        greedy: Whether equal prompts have equal answers.
        task: What the model is for, where that is known.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        served_names: tuple[str, ...] = (),
        duplicate_rows: tuple[int, ...] = (),
        greedy: bool = True,
        task: str | None = None,
    ) -> None:
        self._writes_text = task is not None and task not in VECTOR_TASKS
        self._names, self._greedy = served_names, greedy
        self._options = GenerationOptions(**options)
        self._duplicates = frozenset(duplicate_rows)

    def __call__(self, number: int, row: Mapping[str, Any]) -> RowRequest | RowProblem:
        """Return the request of a line."""
        try:
            return self._make(number, row)
        except BodyError as exc:
            return RowProblem(exc.code, str(exc))

    def _make(self, number: int, row: Mapping[str, Any]) -> RowRequest:
        if not isinstance(row.get("custom_id"), str) or not row["custom_id"]:
            raise BodyError("malformed", f"`custom_id` must be a text, got {row.get('custom_id')!r}. Give one.")
        if number in self._duplicates:
            raise BodyError("duplicate_id", f"`custom_id` {row['custom_id']!r} occurred before. Rename it.")
        body = row.get("body")
        if row.get("method", "POST") != "POST" or not isinstance(body, Mapping):
            raise BodyError("malformed", "The line must have the method POST and a body. Correct it.")
        if self._names and body.get("model") not in self._names:
            raise BodyError(
                "unknown_model", f"The model {body.get('model')!r} is not here. Use {' or '.join(self._names)}."
            )
        call = read_line(str(row.get("url")), body)
        if isinstance(call, VectorCall) and self._writes_text:
            raise BodyError("invalid_option", NO_VECTORS, "model")
        if call.stream:
            raise BodyError("invalid_option", "`stream` is not supported in a batch, got True. Leave it out.", "stream")
        if len(call.requests) > 1:
            raise BodyError("invalid_prompt", "`prompt` must be one text. Write a line for each prompt.", "prompt")
        [asked] = call.requests
        options = asked.options or GenerationOptions()
        vector = [] if asked.input_type is None else [asked.input_type, repr(asked.embedding)]
        text = json.dumps([asked.prompt, asked.messages, asked.tools, options.model_dump(), *vector], default=str)
        greedy = self._greedy if "do_sample" not in options.model_fields_set else not options.do_sample
        values = {name: getattr(asked, name) for name in OPENAI_FIELDS}
        return RowRequest(number, text, asked.prompt, {**values, "options": self._options.merged(options)}, greedy)


def read_line(url: str, body: Mapping[str, Any]) -> OpenAICall | VectorCall:
    """Return what the body of a line asks for.

    Raises:
        BodyError: If it asks for what cannot be done, or its route is not known.
    """
    if url == EMBEDDINGS_URL:
        return read_embedding_call(body)
    if url not in (CHAT_URL, COMPLETIONS_URL):
        known = f"{CHAT_URL!r}, {COMPLETIONS_URL!r} or {EMBEDDINGS_URL!r}"
        raise BodyError("malformed", f"`url` must be {known}, got {url!r}.")
    return read_call(body, chat=url == CHAT_URL)
