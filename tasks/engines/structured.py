"""Response formats: checked before the model, enforced by a grammar while it writes, and validated in what came out."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

from prefect_huggingface.blocks import ResponseFormat
from prefect_huggingface.tasks.engines.base import RequestError

if TYPE_CHECKING:
    from torch import Tensor

# Indented JSON of any sensible depth stays below this.
LONGEST_WHITE_SPACE = 100
SHOWN_CHARACTERS = 200
# A model that may write any white space between two values can go on with it for ever.
JSON_SETTINGS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def check_format(response_format: ResponseFormat) -> None:
    """Refuse a form that no answer can have.

    Raises:
        RequestError: If the JSON schema is invalid, or refers to a schema outside of it.
    """
    schema = response_format.json_schema
    if schema is None:
        return
    from jsonschema import Draft202012Validator, SchemaError
    from jsonschema.validators import validator_for
    from referencing.exceptions import CannotDetermineSpecification, Unresolvable

    reference = str(schema.get("$schema"))
    validator = validator_for(schema, default=None) if "$schema" in schema else Draft202012Validator
    if validator is None:
        raise RequestError("invalid_option", f"`json_schema` has an unknown `$schema`, {reference!r}. Leave it out.")
    try:
        validator.check_schema(schema)
        for reference, resolver in _references(schema):
            resolver.lookup(reference)
    except SchemaError as exc:
        place = "/".join(str(part) for part in exc.absolute_path) or "its top"
        raise RequestError(
            "invalid_option", f"`json_schema` is not a JSON schema, at {place}: {exc.message}. Correct it."
        ) from exc
    except (Unresolvable, CannotDetermineSpecification) as exc:
        under = f" (under the `$id` {schema['$id']!r})" if "$id" in schema else ""
        raise RequestError(
            "invalid_option",
            f"`json_schema` refers to {reference!r}{under}, which is not in it, and nothing is fetched from elsewhere. "
            "Put the schema under `$defs` and refer to it as '#/$defs/NAME'.",
        ) from exc


def validate_output(text: str, response_format: ResponseFormat) -> Any:
    """Return the value of an answer: what its JSON means, or the text itself.

    Raises:
        RequestError: If the answer does not have the form.
    """
    if response_format.json_schema is not None:
        return _validate_json(text, response_format.json_schema)
    if response_format.regex is not None and re.fullmatch(response_format.regex, text) is None:
        raise _invalid(text, f"it does not match {response_format.regex!r}")
    if response_format.choices is not None and text not in response_format.choices:
        raise _invalid(text, f"it is none of {response_format.choices!r}")
    return text


def _validate_json(text: str, schema: dict[str, Any]) -> Any:
    from jsonschema.exceptions import best_match
    from jsonschema.validators import validator_for
    from jsonschema_specifications import REGISTRY

    try:
        value = json.loads(text)
    except ValueError:
        raise _invalid(text, "it is not JSON") from None
    # A registry of one's own never fetches anything.
    error = best_match(validator_for(schema)(schema, registry=REGISTRY).iter_errors(value))
    if error is not None:
        raise _invalid(text, error.message)
    return value


def _references(schema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield every reference in a schema, with what resolves it inside of the schema."""
    from jsonschema_specifications import REGISTRY
    from referencing import Resource
    from referencing.jsonschema import DRAFT202012

    top = Resource.from_contents(schema, default_specification=DRAFT202012)
    base = top.id() or "urn:schema"
    pending = [(top, REGISTRY.with_resource(base, top).resolver(base))]
    while pending:
        resource, resolver = pending.pop()
        if isinstance(resource.contents, dict):
            for name in ("$ref", "$dynamicRef"):
                if isinstance(reference := resource.contents.get(name), str):
                    yield reference, resolver
        pending += [(inner, resolver.in_subresource(inner)) for inner in resource.subresources()]


def _invalid(text: str, reason: str) -> RequestError:
    shown = text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."
    action = "Ask for the form in the prompt, or raise `max_new_tokens`"
    return RequestError("schema_invalid", f"The answer {shown!r} does not have the form asked for: {reason}. {action}.")


class WhiteSpaceGuard:
    """Ends an answer in JSON that has run away into white space, which a grammar of JSON allows without end."""

    def __init__(self) -> None:
        self._in_string = False
        self._escaped = False
        self._length = 0

    def feed(self, text: str) -> None:
        """Go on with a piece of the answer.

        Raises:
            RequestError: If there is too much white space between two parts of the JSON.
        """
        for character in text:
            if self._in_string:
                self._in_string = self._escaped or character != '"'
                self._escaped = not self._escaped and character == "\\"
            elif character.isspace():
                self._length += 1
            else:
                self._length, self._in_string = 0, character == '"'
        if self._length > LONGEST_WHITE_SPACE:
            raise RequestError(
                "schema_invalid",
                f"The answer ran away into white space: {self._length} characters of it in a row. "
                "Ask for compact JSON in the prompt, or use a `repetition_penalty`.",
            )


def genai_grammar(response_format: ResponseFormat) -> Any:
    """Return the grammar for a form in the terms of OpenVINO GenAI."""
    from openvino_genai import StructuredOutputConfig

    if response_format.json_schema is not None:
        return StructuredOutputConfig(json_schema=json.dumps(response_format.json_schema))
    if response_format.regex is not None:
        return StructuredOutputConfig(regex=response_format.regex)
    # The grammar engine knows fewer escapes than Python.
    choices = [re.sub(r"([\\.^$*+?{}\[\]|()/])", r"\\\1", choice) for choice in response_format.choices or ()]
    return StructuredOutputConfig(regex=f"({'|'.join(choices)})")


class Grammar:
    """State of one answer within a grammar of llguidance."""

    def __init__(self, matcher: Any, end_ids: Collection[int]) -> None:
        self._matcher = matcher
        self._end_ids = sorted(end_ids)

    def mask(self, scores: Tensor) -> Tensor:
        """Return the scores with those of the tokens taken out that the grammar does not allow now.

        Args:
            scores: One per token of the vocabulary.
        """
        import numpy as np
        import torch

        kept = torch.full_like(scores, float("-inf"))
        if self._matcher.is_stopped():
            kept[self._end_ids] = scores[self._end_ids]
            return kept
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed = torch.from_numpy(np.unpackbits(bits, bitorder="little")[: scores.shape[-1]].astype(bool))
        allowed = allowed.to(scores.device)
        kept[: len(allowed)] = scores[: len(allowed)].masked_fill(~allowed, float("-inf"))
        return kept

    def accept(self, token: int) -> None:
        """Go on by a token."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)


class GrammarCompiler:
    """Makes the grammars of one tokenizer, with llguidance (the extra `structured`)."""

    def __init__(self, tokenizer: Any, vocabulary: int, end_ids: Collection[int]) -> None:
        """Take a tokenizer of Transformers, and the number of scores and the end tokens of the model."""
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._end_ids = end_ids

    def compile(self, response_format: ResponseFormat) -> Grammar:
        """Return the grammar for one answer.

        Raises:
            RequestError: If the form cannot be made a grammar, or what is needed for it is not installed.
        """
        try:
            from llguidance import LLMatcher
        except ImportError as exc:
            raise RequestError(
                "invalid_option",
                "`response_format` needs llguidance on the torch backend, which is not installed. "
                'Install it with pip install "prefect-huggingface[structured]".',
            ) from exc
        matcher = LLMatcher(self._prepared, _grammar_text(response_format))
        if matcher.is_error():
            raise RequestError(
                "invalid_option",
                f"The form of the answer cannot be made a grammar: {matcher.get_error()}. Write it in simpler terms.",
            )
        return Grammar(matcher, self._end_ids)

    @cached_property
    def _prepared(self) -> Any:
        """The tokenizer of llguidance; it takes about a second for a large vocabulary."""
        from llguidance.hf import from_tokenizer

        try:
            return from_tokenizer(self._tokenizer, n_vocab=self._vocabulary, eos_token=sorted(self._end_ids) or None)
        except ValueError as exc:
            raise RequestError(
                "invalid_option", f"`response_format` does not work with the tokenizer of this model: {exc}."
            ) from exc


def _grammar_text(response_format: ResponseFormat) -> str:
    from llguidance import LLMatcher

    if response_format.json_schema is not None:
        return str(LLMatcher.grammar_from_json_schema(json.dumps(response_format.json_schema), overrides=JSON_SETTINGS))
    if response_format.regex is not None:
        return str(LLMatcher.grammar_from_regex(response_format.regex))
    choices = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in response_format.choices or ())
    return str(LLMatcher.grammar_from_lark(f"start: {choices}"))
