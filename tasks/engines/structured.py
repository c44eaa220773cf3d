"""Forms of answers before the model: checked, and as grammars. `answer_forms` checks what came out."""

from __future__ import annotations

import json
import re
from typing import Any

from prefect_huggingface.blocks import ResponseFormat
from prefect_huggingface.tasks.engines.failures import RequestError

# Indented JSON of any sensible depth stays below this.
LONGEST_WHITE_SPACE = 100


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


def check_format(response_format: ResponseFormat) -> None:
    """Refuse a form that no answer can have.

    Raises:
        RequestError: If the JSON schema is not one.
    """
    if response_format.json_schema is None:
        return
    from jsonschema import SchemaError
    from jsonschema.validators import validator_for

    schema = response_format.json_schema
    try:
        validator_for(schema).check_schema(schema)
    except SchemaError as exc:
        place = "/".join(str(part) for part in exc.absolute_path) or "its top"
        raise RequestError(
            "invalid_option", f"`json_schema` is not a JSON schema, at {place}: {exc.message}. Correct it."
        ) from exc


def structured_output(response_format: ResponseFormat) -> Any:
    """Return the grammar for a form in the terms of OpenVINO GenAI."""
    from openvino_genai import StructuredOutputConfig

    if response_format.json_schema is not None:
        return StructuredOutputConfig(json_schema=json.dumps(response_format.json_schema))
    if response_format.regex is not None:
        return StructuredOutputConfig(regex=response_format.regex)
    choices = "|".join(_escape(choice) for choice in response_format.choices or ())
    return StructuredOutputConfig(regex=f"({choices})")


def _escape(text: str) -> str:
    # The grammar engine knows fewer escapes than Python.
    return re.sub(r"([\\.^$*+?{}\[\]|()/])", r"\\\1", text)
