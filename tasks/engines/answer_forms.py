"""Checks whether an answer has the form that was asked for, where the server was only asked to give it that form."""

from __future__ import annotations

import json
import re
from typing import Any

from prefect_huggingface.blocks import ResponseFormat
from prefect_huggingface.tasks.engines.failures import RequestError

SHOWN_CHARACTERS = 200


def check_form(text: str, form: ResponseFormat) -> Any:
    """Return the value of an answer: what its JSON means, or the text itself.

    Raises:
        RequestError: If the answer does not have the form.
    """
    if form.json_schema is not None:
        return _check_json(text, form.json_schema)
    if form.regex is not None and re.fullmatch(form.regex, text) is None:
        raise _refusal(text, f"it does not match {form.regex!r}")
    if form.choices is not None and text not in form.choices:
        raise _refusal(text, f"it is none of {form.choices!r}")
    return text


def _check_json(text: str, schema: dict[str, Any]) -> Any:
    import jsonschema

    try:
        value = json.loads(text)
    except ValueError:
        raise _refusal(text, "it is no JSON") from None
    try:
        jsonschema.validate(value, schema)
    except jsonschema.SchemaError as exc:
        raise RequestError("invalid_option", f"`json_schema` is no JSON schema: {exc.message}. Correct it.") from None
    except jsonschema.ValidationError as exc:
        raise _refusal(text, exc.message) from None
    return value


def _refusal(text: str, reason: str) -> RequestError:
    shown = text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."
    action = "Ask for the form in the prompt, or raise `max_new_tokens`"
    return RequestError("schema_invalid", f"The answer {shown!r} does not have the form asked for: {reason}. {action}.")
