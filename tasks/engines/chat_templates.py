"""The chat template of a model: where it is found, and how messages are put into it.

Templates come with the model, so they run in a sandbox of Jinja. Transformers is not needed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect_huggingface.tasks.engines.base import RequestError

if TYPE_CHECKING:
    from jinja2 import Environment
    from jinja2.runtime import Macro

TOKEN_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "processor_config.json", "tokenizer_config.json")


class ChatTemplate:
    """Template of a model together with its special tokens.

    Attributes:
        source: Text of the template.
        tokens: Special tokens by their names: `bos_token`, `eos_token` and so on.
    """

    def __init__(self, source: str, tokens: Mapping[str, str] | None = None) -> None:
        self.source = source
        self.tokens = dict(tokens or {})

    @classmethod
    def of_folder(cls, folder: Path) -> ChatTemplate | None:
        """Return the template of a model folder, or None where it has none."""
        for name in TEMPLATE_FILES:
            source = _read_template(folder / name)
            if source:
                return cls(source, read_special_tokens(folder))
        return None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        answer: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the prompt for a conversation.

        Args:
            messages: Messages in order.
            tools: Functions that the model may call, as JSON schemas.
            answer: Whether the prompt ends where the model's answer begins.
            variables: Further variables of the template, `enable_thinking` for instance.

        Raises:
            RequestError: If the template refuses the messages, or is broken.
        """
        from jinja2 import TemplateError

        try:
            rendered: str = _compile(self.source).render(
                messages=[dict(message) for message in messages],
                tools=[dict(tool) for tool in tools] or None,
                documents=None,
                add_generation_prompt=answer,
                **{**self.tokens, **(variables or {})},
            )
            return rendered
        except TemplateError as exc:
            raise RequestError(
                "invalid_prompt",
                f"The chat template of the model refuses the messages: {exc}. Change their roles or their order.",
            ) from exc
        except Exception as exc:
            # A template is a program of somebody else's and may raise anything.
            raise RequestError(
                "invalid_prompt",
                f"The chat template of the model cannot be filled in: {type(exc).__name__}: {exc}. Check the messages.",
            ) from exc


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


def read_json(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file, empty where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _read_template(path: Path) -> str | None:
    if path.suffix == ".jinja":
        return path.read_text(encoding="utf-8") if path.is_file() else None
    template = read_json(path).get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


@lru_cache(maxsize=16)
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
