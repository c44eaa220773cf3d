"""Lines of the OpenAI batch format to requests: chat completions and completions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from prefect_huggingface.blocks import GenerationOptions
from prefect_huggingface.tasks.batching.jobs import BatchJob
from prefect_huggingface.tasks.batching.prompts import RowProblem, RowRequest
from prefect_huggingface.tasks.openai_protocol import CHAT_URL, COMPLETIONS_URL, BodyError, read_call


class OpenAIRows:
    """Makes requests of the lines of an OpenAI batch file.

    Args:
        job: What to do with the rows.
    """

    columns = ("custom_id", "url", "body")

    def __init__(self, job: BatchJob) -> None:
        self._names, self._greedy = job.served_names, job.greedy
        self._options = GenerationOptions(**job.options)
        self._duplicates = frozenset(job.duplicate_rows)

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
        if row.get("url") not in (CHAT_URL, COMPLETIONS_URL):
            raise BodyError("malformed", f"`url` must be {CHAT_URL!r} or {COMPLETIONS_URL!r}, got {row.get('url')!r}.")
        call = read_call(body, chat=row.get("url") == CHAT_URL)
        if call.stream:
            raise BodyError("invalid_option", "`stream` is not supported in a batch, got True. Leave it out.", "stream")
        if len(call.requests) > 1:
            raise BodyError("invalid_prompt", "`prompt` must be one text. Write a line for each prompt.", "prompt")
        [asked] = call.requests
        options = asked.options or GenerationOptions()
        request = replace(asked, options=self._options.merged(options), id=number)
        text = json.dumps([request.prompt, request.messages, request.tools, options.model_dump()], default=str)
        greedy = self._greedy if "do_sample" not in options.model_fields_set else not options.do_sample
        return RowRequest(request, text, shareable=greedy)
