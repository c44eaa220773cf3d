"""Rows to requests: templates over the columns, chat messages, chains of prompts, and whole requests as OpenAI's.

In a chain, named steps use the columns of a row and the outputs of its earlier steps: each under its name, the fields
of a JSON object also under `<step>_<field>`. Nothing is generated before the whole chain has been checked.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prefect_huggingface.blocks import GenerationOptions, InferenceEndpoint, LocalModel
from prefect_huggingface.blocks.model import VECTOR_TASKS
from prefect_huggingface.tasks.artifacts import shorten
from prefect_huggingface.tasks.errors import BatchError, ChainError
from prefect_huggingface.tasks.openai_protocol import CHAT_URL, COMPLETIONS_URL, BodyError, OpenAICall, read_call
from prefect_huggingface.tasks.records import Message, Request
from prefect_huggingface.tasks.storage.tables.readers import is_deep
from prefect_huggingface.tasks.vector_protocol import EMBEDDINGS_URL, VectorCall, read_embedding_call

OPENAI_COLUMNS = ("custom_id", "url", "body")
# Fields of requests besides the prompt and the options.
OPENAI_FIELDS = ("messages", "tools", "chat_template", "input_type", "embedding", "check_form")
NO_VECTORS = "The model writes text and makes no vectors. Use a model for embeddings."
MAX_KNOWN_OPTIONS = 10_000

Parser = Literal["text", "json", "list"]


class RowProblem(Exception):
    """Why a row cannot be asked: a status, and a sentence that says what to do."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


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


class Template:
    """An f-string template over columns, with the rules of `langchain_core`, rendered fast.

    "What is the capital of {country}?" is one. Braces that are no field are doubled.

    Raises:
        BatchError: If it is no template.
    """

    def __init__(self, text: str) -> None:
        try:
            self.columns = _names_in(text)
        except ValueError as exc:
            raise BatchError(f"`prompt` must be a template, got {text!r:.200}: {exc}. Correct it.") from None
        if "" in self.columns:
            raise BatchError(
                f"`prompt` must be a template that names the columns, got {text!r:.200}. Write {{column}}."
            )
        is_odd = any(set(name) & set(".[]") or name.isdigit() for name in self.columns)
        self._render = partial(_render_parts, text) if is_odd else text.format_map

    def render(self, row: Mapping[str, Any]) -> str:
        """Return the text for a row.

        Raises:
            RowProblem: With what the row lacks.
        """
        for name in self.columns:
            value = row.get(name)
            if value is None or value != value:  # NaN is not equal to itself
                what = "null" if value is None and name in row else "not there" if value is None else "NaN"
                raise RowProblem("missing_value", f"Column {name!r} is {what}. Fill it in, or leave the row out.")
        try:
            return self._render(row)
        except (ValueError, TypeError) as exc:
            message = f"The prompt cannot be made of the row: {exc}. Correct its value."
            raise RowProblem("missing_value", message) from None


def _render_parts(text: str, row: Mapping[str, Any]) -> str:
    """Return a text as `format_map` does, but "a.b", "0" and "a[0]" are columns, and not parts of others."""
    write = Formatter()
    return "".join(
        literal + ("" if name is None else write.format_field(write.convert_field(row[name], conversion), form or ""))
        for literal, name, form, conversion in write.parse(text)
    )


def _names_in(text: str) -> tuple[str, ...]:
    """Return the names in a template. Importing `langchain_core` for this alone would take a second."""
    fields = [(name, form or "") for _, name, form, _ in Formatter().parse(text) if name is not None]
    for _, form in fields:
        if set(form) & set("{}"):
            raise ValueError(f"the format {form!r} holds a field")
    return tuple(sorted({name for name, _ in fields}))


class PromptRows:
    """Makes requests of a template or of a column of messages.

    `greedy` says whether equal prompts have equal answers; each of the `option_columns` holds the generation option of
    the same name, put over the `options` of the batch, and over those of the model, which `defaults` hold as well.
    `pair` is the template of a text that is scored for the prompt.
    """

    def __init__(
        self,
        prompt: str | Template | None,
        system: str | None = None,
        messages_column: str | None = None,
        option_columns: tuple[str, ...] = (),
        options: GenerationOptions | None = None,
        greedy: bool = True,
        input_type: Literal["query", "document"] | None = None,
        pair: str | None = None,
        defaults: GenerationOptions | None = None,
    ) -> None:
        self._prompt = Template(prompt) if isinstance(prompt, str) else prompt
        self._pair = Template(pair) if pair is not None else None
        self._system = Template(system) if system is not None else None
        self._messages, self._option_columns, self._greedy = messages_column, option_columns, greedy
        self._options = options or GenerationOptions()
        self._defaults = defaults or self._options
        self._values: dict[str, Any] = {"options": self._options, "input_type": input_type}
        self._row_options = lru_cache(MAX_KNOWN_OPTIONS)(self._read_options)

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that every row must have."""
        templates = [
            name for template in (self._prompt, self._system, self._pair) if template for name in template.columns
        ]
        own = (self._messages,) if self._messages else ()
        return tuple(dict.fromkeys([*templates, *own, *self._option_columns]))

    def __call__(self, number: int, row: Mapping[str, Any], step: int = 0) -> RowRequest:
        """Return the request of a row.

        Raises:
            RowProblem: If it cannot be asked.
        """
        options, suffix = self._options, ""
        if self._option_columns:
            given = {name: row[name] for name in self._option_columns if row.get(name) not in (None, "")}
            suffix = json.dumps(given, sort_keys=True, default=str)
            options = self._row_options(suffix)
        greedy = self._greedy and not options.do_sample
        if self._prompt is not None and self._system is None:
            prompt = self._prompt.render(row)
            values = self._values if options is self._options else {**self._values, "options": options}
            if self._pair is not None:
                values = {**values, "pair": self._pair.render(row)}
                suffix = f"\0{len(prompt)}\0{values['pair']}{suffix}"
            return RowRequest(number, prompt + suffix, prompt, values, greedy)
        messages = self._conversation(row)
        text = json.dumps(messages, ensure_ascii=False, default=str) + suffix
        return RowRequest(number, text, None, {"messages": messages, "options": options}, greedy)

    def _conversation(self, row: Mapping[str, Any]) -> list[Message]:
        system = [{"role": "system", "content": self._system.render(row)}] if self._system else []
        if self._prompt is not None:
            return [*system, {"role": "user", "content": self._prompt.render(row)}]
        given = _read_messages(row.get(self._messages or ""))
        if given is None:
            raise RowProblem(
                "invalid_prompt",
                f"Column {self._messages!r} holds no list of messages. "
                "Write [{'role': 'user', 'content': '...'}], or its JSON.",
            )
        return [*system, *given]

    def _read_options(self, given: str) -> GenerationOptions:
        options = json.loads(given)
        try:
            if "do_sample" in options:  # a text in CSV
                options["do_sample"] = GenerationOptions(do_sample=options["do_sample"]).do_sample
            if not self._defaults.model_fields_set:
                return GenerationOptions(**options)
            return self._defaults.merged(GenerationOptions.model_construct(set(options), **options))
        except ValidationError as exc:
            raise RowProblem("invalid_option", f"{describe_clash(exc)} Correct the row.") from None


def describe_clash(error: ValidationError) -> str:
    """Return which option is not valid, and why, in a sentence."""
    first = error.errors(include_url=False)[0]
    where, what = ".".join(map(str, first["loc"])), str(first["msg"]).removeprefix("Value error, ").rstrip(".")
    return f"Option {where!r}: {what}."


def _read_messages(value: Any) -> list[Message] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    if not isinstance(value, list) or not value:
        return None
    return value if all(isinstance(item, dict) and "role" in item for item in value) else None


class ChainStep(BaseModel):
    """One step of a prompt chain."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] = Field(title="Name")
    """Name of the step, under which later prompts can use its output."""
    prompt: str = Field(min_length=1, title="Prompt")
    """Prompt template with the names of inputs and of earlier steps in braces."""
    parser: Parser = Field(default="text", title="Parser")
    """What the output is: text, a JSON value, or a comma-separated list."""
    options: GenerationOptions | None = Field(default=None, title="Generation")
    """Options of this step, put over those of the chain."""
    model: LocalModel | InferenceEndpoint | None = Field(default=None, title="Model of the step")
    """Model or endpoint of this step, where it is another one."""


def check_chain(steps: Sequence[ChainStep], inputs: Iterable[str]) -> None:
    """Check that every prompt can be filled in when its turn comes, from the inputs, or columns, and earlier steps.

    Raises:
        ChainError: If there is no step, a name occurs twice, a template is broken, or it uses a name that is neither
            an input nor an earlier step.
    """
    if not steps:
        raise ChainError("`steps` must hold at least one step, got []. Add a step with a name and a prompt.")
    known: dict[str, Parser | None] = dict.fromkeys(inputs)
    for step in steps:
        if step.name in known:
            raise ChainError(f"The name {step.name!r} is used twice in the chain. Rename the step or the input.")
        for name in _template_of(step).columns:
            if not _is_known(name, known):
                raise ChainError(
                    f"Step {step.name!r} uses {{{name}}}, which is neither an input nor an earlier step. "
                    f"Use one of {sorted(known)!r}, or write {{{{{name}}}}} for the braces themselves."
                )
        known[step.name] = step.parser


def _is_known(name: str, known: Mapping[str, Parser | None]) -> bool:
    # The fields of a JSON output are not known before it is there, so any `<step>_<field>` is accepted.
    return name in known or any(
        parser == "json" and name.startswith(f"{step}_") and len(name) > len(step) + 1 for step, parser in known.items()
    )


def _template_of(step: ChainStep) -> Template:
    try:
        return Template(step.prompt)
    except BatchError as exc:
        raise ChainError(f"The prompt of step {step.name!r} is not a prompt template. {shorten(exc.message)}") from None


def parse_output(step: ChainStep, text: str) -> Any:
    """Return the output of a step as its parser says.

    Raises:
        ChainError: If the text is not of that form.
    """
    if step.parser == "text":
        return text
    from langchain_core.exceptions import OutputParserException
    from langchain_core.output_parsers import CommaSeparatedListOutputParser, JsonOutputParser

    parser: Any = JsonOutputParser() if step.parser == "json" else CommaSeparatedListOutputParser()
    try:
        value = parser.parse(text.strip())
        # Of brackets that do not match, the parser of LangChain makes None.
        has_value = value is not None or text.strip("` \n").removeprefix("json").strip() == "null"
        if has_value and not is_deep(value):
            return value
    except (OutputParserException, RecursionError):
        pass
    raise ChainError(
        f"The output of step {step.name!r} is not {step.parser}: {shorten(repr(text))}. "
        "Ask for the form in the prompt, or give the step a `response_format`."
    )


class ChainRows:
    """Makes the requests of a chain, one step of one row at a time.

    `greedy` says for each step whether equal prompts have equal answers, as they have if it is left out, and `engines`
    the number of its engine, 0 if it is left out.
    """

    def __init__(
        self,
        steps: Sequence[ChainStep],
        options: GenerationOptions | None = None,
        system: str | None = None,
        greedy: Sequence[bool] = (),
        engines: Sequence[int] = (),
    ) -> None:
        self.steps = tuple(steps)
        self._engines = engines or [0] * len(steps)
        every = options or GenerationOptions()
        self._prompts = [
            PromptRows(_template_of(step), system, options=every.merged(step.options), greedy=is_greedy)
            for step, is_greedy in zip(steps, greedy or [True] * len(steps), strict=True)
        ]

    def __call__(self, number: int, row: Mapping[str, Any], step: int = 0) -> RowRequest:
        """Return the request of a step, given the columns of a row and the outputs of its earlier steps.

        Raises:
            RowProblem: If it cannot be asked.
        """
        fields = {
            f"{name}_{field}": content
            for name, value in row.items()
            if isinstance(value, Mapping)
            for field, content in value.items()
        }
        values = {**fields, **row}
        try:
            made = self._prompts[step](number * len(self.steps) + step, values)
        except RowProblem as exc:
            reason = self._lacking_field(step, values) or exc.message
            raise RowProblem(exc.status, f"Step {self.steps[step].name!r}: {reason}") from None
        # Steps share answers with nothing but the same step of other rows.
        made.text, made.engine = f"{made.text}\0{step}", self._engines[step]
        return made

    def _lacking_field(self, step: int, values: Mapping[str, Any]) -> str | None:
        json_steps = {each.name: each.parser for each in self.steps[:step] if each.parser == "json"}
        for name in self._prompts[step].columns:
            if name not in values and _is_known(name, json_steps):
                return (
                    f"{{{name}}} is not there, since the JSON of the step before has no such field. There are: "
                    f"{sorted(values)!r}. Correct the prompt, or ask the model for the field."
                )
        return None


class OpenAIRows:
    """Makes requests of the lines of an OpenAI batch file: chat completions, completions and embeddings.

    The lines may call the model by its `served_names`, or any where there are none. `duplicate_rows` have the id of an
    earlier row, `task` is what the model is for, None for an endpoint, and `defaults` hold for what a line leaves out.
    """

    def __init__(
        self,
        options: GenerationOptions | None = None,
        served_names: tuple[str, ...] = (),
        duplicate_rows: tuple[int, ...] = (),
        greedy: bool = True,
        task: str | None = None,
        defaults: GenerationOptions | None = None,
    ) -> None:
        self._options, self._defaults = options or GenerationOptions(), defaults
        self._names, self._greedy, self._duplicates = served_names, greedy, frozenset(duplicate_rows)
        self._makes_vectors = task in VECTOR_TASKS

    def __call__(self, number: int, row: Mapping[str, Any], step: int = 0) -> RowRequest:
        """Return the request of a line.

        Raises:
            RowProblem: If it cannot be asked.
        """
        try:
            return self._make(number, row)
        except BodyError as exc:
            raise RowProblem(exc.code, str(exc)) from None

    def _make(self, number: int, row: Mapping[str, Any]) -> RowRequest:
        name, body = row.get("custom_id"), row.get("body")
        if not isinstance(name, str) or not name:
            raise RowProblem("malformed", f"`custom_id` must be a text, got {name!r}. Give one.")
        if number in self._duplicates:
            raise RowProblem("duplicate_id", f"`custom_id` {name!r} occurred before. Rename it.")
        if row.get("method", "POST") != "POST" or not isinstance(body, Mapping):
            raise RowProblem("malformed", "The line must have the method POST and a body. Correct it.")
        if self._names and (model := body.get("model")) not in self._names:
            raise RowProblem("unknown_model", f"The model {model!r} is not here. Use {' or '.join(self._names)}.")
        call = read_line(str(row.get("url")), body, self._defaults)
        if isinstance(call, VectorCall) and not self._makes_vectors:
            raise RowProblem("invalid_option", NO_VECTORS)
        if call.stream:
            raise RowProblem("invalid_option", "`stream` is not supported in a batch, got True. Leave it out.")
        if len(call.requests) > 1:
            raise RowProblem("invalid_prompt", "`prompt` must be one text. Write a line for each prompt.")
        [asked] = call.requests
        options = self._options.merged(asked.options)
        given = options.model_dump(exclude_unset=True)  # what is set to its default is put over that of the model
        vector = [] if asked.input_type is None else [asked.input_type, repr(asked.embedding)]
        text = json.dumps([asked.prompt, asked.messages, asked.tools, given, *vector], default=str)
        greedy = self._greedy if "do_sample" not in options.model_fields_set else not options.do_sample
        values = {name: getattr(asked, name) for name in OPENAI_FIELDS}
        return RowRequest(number, text, asked.prompt, {**values, "options": options}, greedy)


RequestMaker = PromptRows | ChainRows | OpenAIRows


def read_line(url: str, body: Mapping[str, Any], defaults: GenerationOptions | None = None) -> OpenAICall | VectorCall:
    """Return what the body of a line asks for, put over the options of the model.

    Raises:
        BodyError: If it asks for what cannot be done, or its route is not known.
    """
    if url == EMBEDDINGS_URL:
        return read_embedding_call(body)
    if url not in (CHAT_URL, COMPLETIONS_URL):
        known = f"{CHAT_URL!r}, {COMPLETIONS_URL!r} or {EMBEDDINGS_URL!r}"
        raise BodyError("malformed", f"`url` must be {known}, got {url!r}.")
    return read_call(body, url == CHAT_URL, defaults)
