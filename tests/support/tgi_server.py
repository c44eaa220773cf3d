"""A server of the tests that speaks the protocol of TGI over a real small model. Nothing of its text is canned.

It is not TGI itself, which is no Python package. Its routes, fields, limits and errors follow the router of TGI: the
text of an answer includes the stop string, `/` answers with a list and with the prompt unless told otherwise, errors
are `{"error", "error_type"}`. It makes the faults that it is told to make, logs every request, and can be stopped and
started again on the same port.

To try it, start it from the folder `tests`:

    python -m support.tgi_server MODEL_FOLDER [--port 8091]
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import socket
import threading
import time
from pathlib import Path
from typing import Any

import uvicorn
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from support.endpoint_faults import Fault, Hangup, LoggedRequest, refuse
from support.ports import free_port
from support.text_models import TextModel
from support.tgi_protocol import Refusal, TgiProtocol

CHAT = "/v1/chat/completions"


class TgiServer:
    """One server in a thread of this process.

    Attributes:
        url: Its address.
        token: Token that a request must have, or None.
        faults: Faults to make; the first one that matches a request is made with it.
        requests: Every request that was seen, in order.
    """

    def __init__(self, model: TextModel, token: str | None = None) -> None:
        self.protocol, self.token = TgiProtocol(model), token
        self.faults: list[Fault] = []
        self.requests: list[LoggedRequest] = []
        self.most_at_once = self._at_once = 0
        self._server: uvicorn.Server | None = None
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def fault(self, kind: Any, **options: Any) -> Fault:
        """Tell the server to make a fault; see `Fault` for the options."""
        fault = Fault(kind, **options)
        self.faults.append(fault)
        return fault

    def start(self) -> None:
        """Listen on the port of the server, and return when it answers."""
        logging.getLogger("uvicorn.error").addFilter(_is_unexpected)
        listener = socket.create_server(("127.0.0.1", self.port), backlog=512)
        self._server = uvicorn.Server(
            uvicorn.Config(
                self._app,
                interface="asgi3",
                log_config=None,
                access_log=False,
                lifespan="off",
                timeout_graceful_shutdown=0,
            )
        )
        self._thread = threading.Thread(target=self._server.run, args=([listener],), daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.005)

    def stop(self) -> None:
        """Stop at once. Connections are refused until the next start, and those that are open are ended."""
        assert self._server is not None
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(timeout=10)

    def clear(self) -> None:
        """Forget all faults and requests."""
        self.faults.clear()
        self.requests.clear()
        self.protocol.step_seconds = self.protocol.seed_offset = self.most_at_once = 0
        self.token = None

    def posts(self) -> list[LoggedRequest]:
        """Return the requests for text, in order."""
        return [entry for entry in self.requests if entry.method == "POST"]

    def __enter__(self) -> TgiServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        body = await request.json() if request.method == "POST" and await request.body() else {}
        entry = LoggedRequest(request.method, request.url.path, dict(request.headers), body)
        self.requests.append(entry)
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            fault = next((fault for fault in self.faults if fault.matches(entry)), None)
            early = await refuse(fault) if fault is not None else None
            if early is not None:
                entry.status = early.status_code
                await early(scope, receive, send)
                return
            await self._answer(entry, body, fault)(scope, receive, send)
        finally:
            self._at_once -= 1

    def _answer(self, entry: LoggedRequest, body: dict[str, Any], fault: Fault | None) -> Any:
        try:
            return self._route(entry, body, fault)
        except Refusal as refusal:
            entry.status = refusal.status
            return JSONResponse({"error": refusal.message, "error_type": refusal.kind}, refusal.status)

    def _route(self, entry: LoggedRequest, body: dict[str, Any], fault: Fault | None) -> Any:
        entry.status = 200
        if self.token is not None and entry.headers.get("authorization") != f"Bearer {self.token}":
            raise Refusal(401, "Unauthorized", "unauthorized")
        match entry.method, entry.path:
            case "GET", "/info":
                return JSONResponse(
                    {"model_id": "tiny", "max_total_tokens": self.protocol.context_length, "version": "3"}
                )
            case "GET", "/health":
                return Response()
            case "POST", "/tokenize":
                return JSONResponse(self.protocol.tokens(body["inputs"]))
            case "POST", "/" | "/generate" | "/generate_stream":
                return self.protocol.text(entry.path, body, fault)
            case "POST", path if path == CHAT:
                return self.protocol.chat(body, fault)
        entry.status = 404
        return Response("Not Found", 404)


def _is_unexpected(record: logging.LogRecord) -> bool:
    if "graceful shutdown" in record.getMessage():
        return False
    # Requests that are under way when the server stops are ended.
    return not (record.exc_info and isinstance(record.exc_info[1], Hangup | asyncio.CancelledError))


def main() -> None:
    """Serve until the process is ended."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int)
    arguments = parser.parse_args()
    server = TgiServer(TextModel(arguments.folder))
    server.port = arguments.port or server.port
    server.start()
    print(f"http://127.0.0.1:{server.port}", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
