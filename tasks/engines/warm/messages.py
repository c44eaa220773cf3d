"""What travels between a caller and a warm worker: plain values, no blocks and no secrets."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Any

from prefect_huggingface.blocks import GenerationOptions
from prefect_huggingface.tasks.records import Completion, Request

RUN_NAME_MARK = " on "


def pack_request(request: Request) -> dict[str, Any]:
    """Return a request as plain values. Only the options that are set travel, so that the model's own stand below."""
    return {
        "prompt": request.prompt,
        "messages": None if request.messages is None else [dict(message) for message in request.messages],
        "options": None if request.options is None else request.options.model_dump(mode="json", exclude_unset=True),
        "images": [str(image) for image in request.images],
        "tools": [dict(tool) for tool in request.tools],
        "chat_template": request.chat_template,
    }


def unpack_request(record: Mapping[str, Any], place: int) -> Request:
    """Return the request of plain values, with its place as its id.

    Raises:
        pydantic.ValidationError: If an option is unknown here.
    """
    options = record["options"]
    return Request(**{**record, "id": place, "options": None if options is None else GenerationOptions(**options)})


def pack_completion(completion: Completion) -> dict[str, Any]:
    """Return a completion as plain values."""
    return completion.as_dict()


def unpack_completion(record: Mapping[str, Any], request: Request, seconds: float) -> Completion:
    """Return the completion of plain values for the request that it belongs to."""
    logprobs = record["logprobs"]
    return Completion(
        **{
            **record,
            "request_id": request.id,
            "seconds": seconds,
            "alternatives": tuple(record["alternatives"]),
            "logprobs": None if logprobs is None else tuple(logprobs),
        }
    )


def worker_name() -> str:
    """Return the name under which Prefect knows this process as a worker of background tasks."""
    return f"{socket.gethostname()}-{os.getpid()}"


def run_name(requests: int) -> str:
    """Return the name of a background run here, which tells the caller who works on it."""
    return f"{requests} request{'s' * (requests != 1)}{RUN_NAME_MARK}{worker_name()}"


def worker_of(name: str) -> str | None:
    """Return the worker in the name of a background run, or None if none has begun with it."""
    return name.rpartition(RUN_NAME_MARK)[2] if RUN_NAME_MARK in name else None
