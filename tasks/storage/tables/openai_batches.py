"""The output of the OpenAI batch format: a file of responses and, beside it, a file of errors.

Ids and times are made of the job and the line, so that the same batch gives the same bytes however often it was
interrupted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from prefect_huggingface.tasks.storage.places import Place
from prefect_huggingface.tasks.storage.tables.inputs import Chunk
from prefect_huggingface.tasks.storage.tables.writers import to_json

HTTP_STATUS = {"unknown_model": 404, "deadline": 408, "engine_error": 500, "out_of_cache": 503}
CODES = {"unknown_model": "model_not_found", "too_long": "context_length_exceeded"}


def errors_place(destination: Place) -> Place:
    """Return where the errors of a batch go: `out.jsonl` has them in `out.errors.jsonl`."""
    stem, dot, suffix = destination.name.rpartition(".")
    return destination.parent.child(f"{stem}.errors.{suffix}" if dot else f"{suffix}.errors")


class OpenAIBatchWriter:
    """Writes the two files.

    Args:
        responses: Local file for the lines with an answer.
        errors: Local file for the others.
        job: Key of the job.
        created: Time of all answers, in seconds since 1970.
    """

    def __init__(self, responses: Path, errors: Path, job: str, created: int) -> None:
        self._job, self._created = job, created
        self._responses: IO[bytes] = open(responses, "wb")
        self._errors: IO[bytes] = open(errors, "wb")

    def write(self, chunk: Chunk, answers: Any) -> None:
        """Write the lines of a chunk. `answers` is a `pyarrow.Table` of the journal's rows."""
        for line, answer in zip(chunk.rows, answers.to_pylist(), strict=True):
            file = self._responses if answer["error"] is None else self._errors
            file.write(to_json(self._line(line, answer)) + b"\n")

    def close(self) -> None:
        """Finish both files."""
        self._responses.close()
        self._errors.close()

    def _line(self, line: Mapping[str, Any], answer: Mapping[str, Any]) -> dict[str, Any]:
        name = hashlib.sha256(f"{self._job} {answer['row']}".encode()).hexdigest()[:24]
        record: dict[str, Any] = {"id": f"batch_req_{name}", "custom_id": line.get("custom_id")}
        if answer["status"] == "malformed":
            return {**record, "response": None, "error": {"code": "malformed", "message": answer["error"]}}
        if answer["error"] is not None:
            code = HTTP_STATUS.get(answer["status"], 400)
            body = {"error": _error_body(answer, code)}
        else:
            code, body = 200, self._body(line, answer, name)
        return {**record, "response": {"status_code": code, "request_id": f"req_{name}", "body": body}, "error": None}

    def _body(self, line: Mapping[str, Any], answer: Mapping[str, Any], name: str) -> dict[str, Any]:
        chat = line["url"].endswith("/chat/completions")
        details = json.loads(answer["details"]) if answer["details"] else {}
        reason = "length" if answer["status"] == "length" else "stop"
        texts = [answer["completion"], *details.get("alternatives", ())]
        return {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{name}",
            "object": "chat.completion" if chat else "text_completion",
            "created": self._created,
            "model": line["body"].get("model"),
            "choices": [
                _choice(index, text, reason, chat, None if index else details.get("reasoning"))
                for index, text in enumerate(texts)
            ],
            "usage": {
                "prompt_tokens": answer["prompt_tokens"],
                "completion_tokens": answer["generated_tokens"],
                "total_tokens": answer["prompt_tokens"] + answer["generated_tokens"],
            },
        }


def _choice(index: int, text: str, reason: str, chat: bool, thoughts: str | None) -> dict[str, Any]:
    content: dict[str, Any] = {"text": text}
    if chat:
        content = {"message": {"role": "assistant", "content": text, "refusal": None}}
        if thoughts:
            content["message"]["reasoning_content"] = thoughts
    return {"index": index, **content, "logprobs": None, "finish_reason": reason}


def _error_body(answer: Mapping[str, Any], code: int) -> dict[str, Any]:
    kind = "server_error" if code >= 500 else "invalid_request_error"
    return {
        "message": answer["error"],
        "type": kind,
        "param": None,
        "code": CODES.get(answer["status"], answer["status"]),
    }
