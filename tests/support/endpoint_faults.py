"""Faults that the server of the endpoint tests can be told to make, and its log of requests."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response, StreamingResponse

Kind = Literal[
    "status", "html", "text", "redirect", "stall", "large", "hang_up", "cut", "end_early", "stall_stream", "error"
]
IN_STREAM = ("cut", "end_early", "stall_stream", "error")


class Hangup(Exception):
    """Raised inside the server so that it drops the connection."""


@dataclass
class LoggedRequest:
    """What the server saw of one request, and the status of its answer."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: Mapping[str, Any]
    status: int = 0

    @property
    def token(self) -> str | None:
        """Token of the request."""
        return self.headers.get("authorization", "").removeprefix("Bearer ") or None


@dataclass
class Fault:
    """One thing that goes wrong with the requests that it matches.

    Attributes:
        kind: "status" refuses with `status`; "html" answers a web page, "text" a plain text; "redirect" sends to
            `location`; "stall" answers nothing for `seconds`; "large" answers `size` bytes of JSON; "hang_up" drops the
            connection. In a stream, after `after` tokens: "cut" drops the connection, "end_early" ends as if it were
            whole, "stall_stream" says nothing more, "error" sends an error of TGI.
        path: Regular expression that the path must contain.
        method: Method of the request, or None for all.
        times: How often it happens, or None for always.
        skip: How many matching requests pass before.
        contains: Text that the body must contain.
        share: Share of the matching requests that it happens to, drawn with `seed`.
        words: Body of a refusal; when None, an error in the form of TGI.
    """

    kind: Kind
    path: str = ""
    method: str | None = "POST"
    times: int | None = 1
    skip: int = 0
    contains: str = ""
    share: float = 1.0
    seed: int = 0
    status: int = 500
    headers: Mapping[str, str] = field(default_factory=dict)
    words: str | None = None
    location: str = ""
    after: int = 0
    seconds: float = 600.0
    size: int = 0
    made: int = 0

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def matches(self, entry: LoggedRequest) -> bool:
        """Tell whether the fault is for a request, and count it."""
        if self.method not in (None, entry.method) or not re.search(self.path, entry.path):
            return False
        if self.contains not in json.dumps(entry.body):
            return False
        if self.skip:
            self.skip -= 1
            return False
        if self.made == self.times or self._random.random() >= self.share:
            return False
        self.made += 1
        return True


async def refuse(fault: Fault) -> Response | None:
    """Return the answer of a fault, or None where it happens in a stream."""
    if fault.kind in ("stall", "hang_up"):
        await asyncio.sleep(fault.seconds if fault.kind == "stall" else 0)
        raise Hangup
    if fault.kind == "status":
        if fault.words is not None:
            return Response(fault.words, fault.status, dict(fault.headers))
        names = {422: "validation", 424: "generation", 429: "overloaded", 500: "incomplete_generation"}
        body = {"error": f"Made on purpose, {fault.status}", "error_type": names.get(fault.status)}
        return JSONResponse(body, fault.status, dict(fault.headers))
    if fault.kind == "html":
        return HTMLResponse("<html><body>Welcome</body></html>")
    if fault.kind == "text":
        return Response(fault.words or "hello", media_type="application/json")
    if fault.kind == "redirect":
        return RedirectResponse(fault.location, fault.status)
    if fault.kind == "large":
        return StreamingResponse(_large(fault.size), media_type="application/json")
    return None


async def _large(size: int) -> AsyncIterator[bytes]:
    yield b'[{"generated_text":"'
    for _ in range(size // 65536 + 1):
        yield b"a" * 65536
        # The client may be gone.
        await asyncio.sleep(0.001)
    yield b'"}]'


def send_events(events: Any, fault: Fault | None, end: str | None = None) -> Response:
    """Return the response that streams events, with the fault in its place."""

    async def lines() -> AsyncIterator[str]:
        count = 0
        async for event in events:
            if fault is not None and fault.kind in IN_STREAM and count >= fault.after:
                if fault.kind == "error":
                    words = {"error": "Request failed during generation", "error_type": "generation"}
                    yield f"data:{json.dumps(words)}\n\n"
                    return
                if fault.kind == "end_early":
                    return
                await asyncio.sleep(fault.seconds if fault.kind == "stall_stream" else 0.02)
                raise Hangup
            yield f"data:{json.dumps(event)}\n\n"
            count += 1
        if end is not None:
            yield f"data: {end}\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream")
