"""A server of the tests with the routes of Hugging Face's service for dedicated endpoints, as its client calls them."""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

STARTING = ("pending", "initializing")


@dataclass
class DedicatedEndpoint:
    """One endpoint: its state, and how many looks it takes to start."""

    name: str
    state: str = "paused"
    looks: int = 0
    looks_to_start: int = 4
    ends_as: str = "running"

    def look(self) -> None:
        """Go on with starting."""
        if self.state in STARTING:
            self.looks += 1
            self.state = "initializing" if self.looks < self.looks_to_start else self.ends_as

    def as_json(self, url: str) -> dict[str, Any]:
        model = {
            "repository": "organisation/tiny",
            "framework": "pytorch",
            "revision": "11c5",
            "task": "text-generation",
        }
        moment = "2026-01-01T00:00:00.000Z"
        status = {"state": self.state, "createdAt": moment, "updatedAt": moment}
        if self.state == "running":
            status["url"] = url
        return {"name": self.name, "type": "protected", "healthRoute": "/health", "model": model, "status": status}


@dataclass
class EndpointServiceServer:
    """The service, in a thread of this process, with users by their tokens."""

    users: dict[str, str]
    endpoints: dict[str, DedicatedEndpoint] = field(default_factory=dict)
    tokens: list[str | None] = field(default_factory=list)
    failures: list[int] = field(default_factory=list)
    stall_seconds: float = 0.0

    def __enter__(self) -> EndpointServiceServer:
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        app = Starlette(
            routes=[
                Route("/api/whoami-v2", self._who),
                Route("/v2/endpoint/{space}/{name}", self._look),
                Route("/v2/endpoint/{space}/{name}/{verb}", self._change, methods=["POST"]),
            ]
        )
        self._server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", timeout_graceful_shutdown=0))
        self._thread = threading.Thread(target=self._server.run, args=([listener],), daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.005)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(timeout=5)

    def _refuse(self, request: Request) -> JSONResponse | None:
        token = request.headers.get("authorization", "").removeprefix("Bearer ") or None
        self.tokens.append(token)
        time.sleep(self.stall_seconds)
        if self.failures:
            return JSONResponse({"error": "made on purpose"}, self.failures.pop(0))
        if token not in self.users:
            return JSONResponse({"error": "unauthorized"}, 401)
        space = request.path_params.get("space")
        if space is not None and space != self.users[token]:
            return JSONResponse({"error": "forbidden"}, 403)
        if space is not None and request.path_params["name"] not in self.endpoints:
            return JSONResponse({"error": "not found"}, 404)
        return None

    def _who(self, request: Request) -> JSONResponse:
        refusal = self._refuse(request)
        return refusal or JSONResponse({"type": "user", "name": self.users[str(self.tokens[-1])]})

    def _look(self, request: Request) -> JSONResponse:
        refusal = self._refuse(request)
        if refusal is not None:
            return refusal
        endpoint = self.endpoints[request.path_params["name"]]
        endpoint.look()
        return JSONResponse(endpoint.as_json(self.url))

    def _change(self, request: Request) -> JSONResponse:
        refusal = self._refuse(request)
        if refusal is not None:
            return refusal
        endpoint, verb = self.endpoints[request.path_params["name"]], request.path_params["verb"]
        if verb == "resume" and endpoint.state == "running":
            return JSONResponse({"error": "Bad request: endpoint is already running"}, 400)
        endpoint.state = {"resume": "pending", "pause": "paused", "scale-to-zero": "scaledToZero"}[verb]
        endpoint.looks = 0
        return JSONResponse(endpoint.as_json(self.url))
