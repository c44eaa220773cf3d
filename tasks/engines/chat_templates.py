"""The chat template of a model: where it is found, how it is applied, and which text has been through it already.

Templates come with the model, so they run in a sandbox of Jinja, with the helpers that Transformers gives them.
Transformers itself is not needed. What a conversation needs beyond that is in `conversations`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect_huggingface.tasks.engines.reasoning import find_reasoning_format

if TYPE_CHECKING:
    from jinja2 import Environment
    from jinja2.runtime import Macro

TOKEN_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
TEMPLATE_FILES = ("chat_template.json", "processor_config.json", "tokenizer_config.json")
# What the caller of a template gives in any case, so that nobody sets it by an option.
RESERVED_NAMES = frozenset({"messages", "tools", "add_generation_prompt", *TOKEN_NAMES})
# Marks of turns by their looks, for tokenizers that do not tell their special tokens.
MARK = r"<[|｜][^<>\s]{1,60}?[|｜]>|<\|turn>|<turn\|>|<(?:start|end)_of_turn>|\[/?(?:INST|SYSTEM_PROMPT)\]|<</?SYS>>"
USER, ANSWER, SYSTEM = "PROBE-5d1c", "PROBE-a7e2", "PROBE-c3a9"
USER_TURN = {"role": "user", "content": USER}
THREE_TURNS = [USER_TURN, {"role": "assistant", "content": ANSWER}, USER_TURN]
SYSTEM_TURNS = [{"role": "system", "content": SYSTEM}, USER_TURN]

Message = Mapping[str, Any]


class ChatTemplateError(ValueError):
    """A conversation does not go into the chat template of a model. The message says what to change."""


class LostTextError(ChatTemplateError):
    """The chat template of a model leaves out something of a conversation."""


class ChatTemplate:
    """Template of a model together with its special tokens.

    Attributes:
        sources: Texts of the templates by their names; a model with one template has it under `default`.
        tokens: Special tokens by their names: `bos_token`, `eos_token` and so on.
        special_texts: Texts of all special tokens of the tokenizer.
        added_texts: Texts of all tokens that the tokenizer finds before it splits a text into words.
    """

    def __init__(
        self,
        source: str | Mapping[str, str],
        tokens: Mapping[str, str] | None = None,
        special_texts: Iterable[str] = (),
        added_texts: Iterable[str] = (),
    ) -> None:
        self.sources = {"default": source} if isinstance(source, str) else dict(source)
        self.tokens = dict(tokens or {})
        self.special_texts = frozenset((*special_texts, *self.tokens.values())) - {""}
        self.added_texts = self.special_texts | frozenset(added_texts)

    @classmethod
    def of_folder(cls, folder: Path) -> ChatTemplate:
        """Return the template of a model folder, without sources where it has none."""
        return cls(read_templates(folder), read_special_tokens(folder), *read_added_texts(folder))

    def choose(self, tools: Sequence[Any] = (), name: str | None = None) -> str:
        """Return the text of the template for a conversation, chosen as Transformers does.

        Raises:
            ChatTemplateError: If there is no template of that name, or no default one.
        """
        if name is None:
            name = "tool_use" if tools and "tool_use" in self.sources else "default"
        if name not in self.sources:
            raise ChatTemplateError(
                f"The model has no chat template named {name!r}. Choose one of {sorted(self.sources)!r} as "
                "`chat_template` of `template_options`."
            )
        return self.sources[name]

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        options: Mapping[str, Any] | None = None,
        answer: bool = True,
    ) -> str:
        """Return the text that the template makes of a conversation, as it is.

        Args:
            messages: Messages in order.
            tools: Functions that the model may call, as JSON schemas.
            options: Variables of the template such as `enable_thinking`, `documents`, and the name of a template as
                `chat_template`.
            answer: Whether the text ends where the model's answer begins.

        Raises:
            ChatTemplateError: If the template refuses the messages, or is broken.
        """
        from jinja2 import TemplateError

        variables = dict(options or {})
        source = self.choose(tools, variables.pop("chat_template", None))
        values = {"documents": None, **self.tokens, **variables}
        try:
            rendered: str = _compile(source).render(
                messages=[dict(message) for message in messages],
                tools=[dict(tool) for tool in tools] or None,
                add_generation_prompt=answer,
                **values,
            )
            return rendered
        except TemplateError as exc:
            raise ChatTemplateError(
                f"The chat template of the model refuses the messages: {exc}. Change their roles or their order."
            ) from exc
        except Exception as exc:
            # A template is a program of somebody else's and may raise anything.
            raise ChatTemplateError(
                f"The chat template of the model cannot be filled in: {type(exc).__name__}: {exc}. Check the messages."
            ) from exc

    def check_options(self, options: Mapping[str, Any], tools: Sequence[Any] = ()) -> None:
        """Refuse variables that a template does not have.

        Raises:
            ChatTemplateError: With the name of the first one, and those that the template has.
        """
        source = self.choose(tools, options.get("chat_template"))
        known = (find_variables(source) | {"documents", "chat_template"}) - RESERVED_NAMES
        unknown = sorted(set(options) - known)
        if unknown:
            raise ChatTemplateError(
                f"The chat template of the model has no variable {unknown[0]!r}. "
                f"Remove it from `template_options`; the template knows {sorted(known)!r}."
            )

    def is_templated(self, text: str) -> bool:
        """Return whether a text has been through the template already, by hand or by a tokenizer.

        It begins with a turn of the system or the user, with or without the start token, and shows that the turn of
        the user ends. A text that has marks further on only is a message.
        """
        turns = self._turns
        body = turns.without_start(text)
        if not turns.openings:
            return bool(turns.frame) and all(part in text for part in turns.frame)
        ends = any(mark in body for mark in turns.closings)
        if body.startswith(turns.openings):
            return ends or not turns.closes
        # The system may have a mark that the template does not know, or none at all.
        speaks = any(mark in body for mark in turns.openings)
        if self._mark_pattern.match(body):
            return speaks and ends
        return turns.plain_system and speaks and (ends or body != text.lstrip())

    @cached_property
    def writes_start_token(self) -> bool:
        """Whether the template writes the start token itself."""
        start = self.tokens.get("bos_token")
        return bool(start) and self._try([USER_TURN]).startswith(start or "")

    @cached_property
    def end_text(self) -> str | None:
        """Token that the template writes after a turn of the assistant, or None where it writes none.

        A token that also ends the reasoning does not end the answer.
        """
        between = self._between_turns.lstrip()
        token = next(iter(self._marks(between)), None)
        reasoning = find_reasoning_format(self.sources.values())
        ends_reasoning = reasoning is not None and reasoning.end == token
        return token if token and between.startswith(token) and not ends_reasoning else None

    @cached_property
    def plain_marks(self) -> tuple[str, ...]:
        """Marks of turns that are ordinary text to the tokenizer, so that a message can contain them."""
        return tuple(mark for mark in sorted(self._turn_marks) if self.added_texts and mark not in self.added_texts)

    @cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """Pattern of what must be text in a message and would be special in a prompt."""
        texts = sorted(self.special_texts | self._turn_marks, key=len, reverse=True)
        # A pattern without alternatives would match everywhere.
        return re.compile("|".join(re.escape(text) for text in texts if len(text) > 1) or r"(?!)")

    @cached_property
    def _turn_marks(self) -> frozenset[str]:
        """Marks that the template puts around messages of the system, the user and the assistant."""
        return frozenset(self._marks(self._try(THREE_TURNS) + self._try(SYSTEM_TURNS)))

    @cached_property
    def _turns(self) -> _Turns:
        before, _, after = self._try([USER_TURN]).partition(USER)
        closed = self._marks(self._try(THREE_TURNS[:2], answer=False).partition(ANSWER)[2])
        between = self._marks(self._between_turns)
        while between and closed and between[0] == closed[0]:
            between, closed = between[1:], closed[1:]
        start = [self.tokens.get("bos_token", "")]
        openings = [mark for mark in between if mark not in start][:1] or self._marks(before)[-1:]
        system = self._try(SYSTEM_TURNS)
        system_marks = self._marks(system.partition(SYSTEM)[0]) if SYSTEM in system else openings
        lead = self._marks(before)
        start += lead[: lead.index(openings[0])] if openings and openings[0] in lead else []
        start = [mark for mark in start if mark and mark not in openings]
        system_openings = [mark for mark in system_marks if mark not in start]
        frame = [lines[-1].strip() for part in (before, after) if (lines := part.strip().splitlines())]
        return _Turns(
            openings=tuple(dict.fromkeys([*openings, *system_openings[:1]])),
            closings=tuple(self._marks(after)[:1]),
            closes=bool(self._marks(self._try([USER_TURN], answer=False).partition(USER)[2])),
            plain_system=not system_openings,
            start=tuple(start),
            frame=tuple(frame) if len(frame) == 2 else (),
        )

    @cached_property
    def _between_turns(self) -> str:
        """Text that the template writes between an answer and the next message of the user."""
        return self._try(THREE_TURNS).rpartition(ANSWER)[2].partition(USER)[0]

    def _marks(self, text: str) -> list[str]:
        return self._mark_pattern.findall(text)

    @cached_property
    def _mark_pattern(self) -> re.Pattern[str]:
        known = sorted(map(re.escape, self.special_texts), key=len, reverse=True)
        return re.compile("|".join((*known, MARK)))

    def _try(self, messages: Sequence[Message], *, answer: bool = True) -> str:
        try:
            return self.render(messages, answer=answer)
        except ChatTemplateError:
            return ""


@dataclass(frozen=True, slots=True)
class _Turns:
    """How a text looks that has been through a template.

    Attributes:
        openings: First marks of a turn of the user or the system.
        closings: Marks that end the turn of the user or begin that of the assistant.
        closes: Whether the turn of the user has a mark of its own at its end.
        plain_system: Whether a message of the system has no mark before it.
        start: Marks before the first turn.
        frame: Last lines before and after a message, for templates without marks.
    """

    openings: tuple[str, ...]
    closings: tuple[str, ...]
    closes: bool
    plain_system: bool
    start: tuple[str, ...]
    frame: tuple[str, ...]

    def without_start(self, text: str) -> str:
        text = text.lstrip()
        while self.start and text.startswith(self.start):
            mark = next(mark for mark in self.start if text.startswith(mark))
            text = text[len(mark) :].lstrip()
        return text


def read_templates(folder: Path) -> dict[str, str]:
    """Return the templates of a model folder by their names, from the files that Transformers reads."""
    found: dict[str, str] = {}
    single = folder / "chat_template.jinja"
    if single.is_file():
        found["default"] = single.read_text(encoding="utf-8")
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        found[path.stem] = path.read_text(encoding="utf-8")
    for name in TEMPLATE_FILES:
        if "default" in found:
            break
        template = read_json(folder / name).get("chat_template")
        if isinstance(template, str):
            found["default"] = template
        elif isinstance(template, list):
            entries = [entry for entry in template if isinstance(entry, dict) and {"name", "template"} <= set(entry)]
            found = {**{str(entry["name"]): entry["template"] for entry in entries}, **found}
    return {name: source for name, source in found.items() if source}


def read_special_tokens(folder: Path) -> dict[str, str]:
    """Return the special tokens of a model folder by their names."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        settings = read_json(folder / name)
        for key in TOKEN_NAMES:
            value = settings.get(key)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                found[key] = text
    return found


def read_added_texts(folder: Path) -> tuple[list[str], list[str]]:
    """Return the texts of the special tokens of a model folder, and of all its added tokens."""
    settings = read_json(folder / "tokenizer_config.json")
    added = [*(read_json(folder / "tokenizer.json").get("added_tokens") or [])]
    decoder = settings.get("added_tokens_decoder")
    added += decoder.values() if isinstance(decoder, dict) else []
    tokens = [token for token in added if isinstance(token, dict) and token.get("content")]
    extra = settings.get("extra_special_tokens") or []
    extra = extra.values() if isinstance(extra, dict) else extra  # by the names that a processor has for them
    more = [*(settings.get("additional_special_tokens") or []), *extra]
    special = [token["content"] for token in tokens if token.get("special")]
    special += [one["content"] if isinstance(one, dict) else one for one in more if isinstance(one, (str, dict))]
    return special, [token["content"] for token in tokens]


def read_json(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file, empty where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


@lru_cache(maxsize=64)
def find_variables(source: str) -> frozenset[str]:
    """Return the names that a template takes from outside: those it reads and never sets, and those it tests for."""
    from jinja2 import TemplateSyntaxError, meta, nodes

    environment = _environment()
    try:
        tree = environment.parse(source)
    except TemplateSyntaxError:
        return frozenset()
    tested = {
        test.node.name
        for test in tree.find_all(nodes.Test)
        if test.name in ("defined", "undefined") and isinstance(test.node, nodes.Name)
    }
    return frozenset((meta.find_undeclared_variables(tree) | tested) - set(environment.globals))


@lru_cache(maxsize=64)
def _compile(source: str) -> Any:
    return _environment().from_string(source)


@lru_cache(maxsize=1)
def _environment() -> Environment:
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationBlocks(Extension):
        """Accepts `{% generation %}` blocks, which only mark the text of the assistant for training."""

        tags = {"generation"}

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.CallBlock(self.call_method("_write"), [], [], body).set_lineno(line)

        def _write(self, caller: Macro) -> str:
            return caller()

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlocks, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # The filter of Jinja escapes characters for HTML, which would change the prompt.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)
