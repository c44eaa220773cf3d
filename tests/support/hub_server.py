"""A local Hugging Face Hub: a real HTTP server that the unmodified `huggingface_hub` client accepts.

It runs on two loopback ports, one for the Hub and one for the CDN, which is another host for the client. It knows users
and their tokens, public, private and gated repositories, branches and tags, ranges and signed addresses that expire,
repositories of data that take small files, and it makes the faults that it is told to make (see `hub_faults`).

To try it, put checkpoints into folders FOLDER/organisation/name and start it from the folder `tests`:

    python -m support.hub_server FOLDER [--port 8090] [--token TOKEN] [--gated REPOSITORY] [--private REPOSITORY]

Then use `HuggingFaceCredentials(endpoint="http://127.0.0.1:8090")`.
"""

from __future__ import annotations

import argparse
import logging
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import uvicorn
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from support.hub_faults import Fault, Journal, LoggedRequest
from support.hub_repositories import Repository
from support.hub_routes import RESOLVE, HubRoutes
from support.hub_transfers import ConnectionCut, FileResponse, make_fault


class LocalHub(HubRoutes):
    """The Hub and its CDN, each a uvicorn server in a thread of this process.

    Attributes:
        journal: Faults to make and requests that were seen.
    """

    def __init__(self, port: int = 0) -> None:
        super().__init__()
        self.journal = Journal()
        self._sockets = [_listen(port), _listen(0)]
        self.endpoint, self.cdn = (f"http://127.0.0.1:{s.getsockname()[1]}" for s in self._sockets)
        self._servers: list[uvicorn.Server] = []
        self._threads: list[threading.Thread] = []

    def create(self, name: str, files: Mapping[str, bytes | Path] | None = None, **options: Any) -> Repository:
        """Add a repository with one commit on `main`."""
        repository = self.repositories[name] = Repository(name, **options)
        repository.commit(files or {})
        return repository

    def clear(self) -> None:
        """Forget repositories, users, faults and requests."""
        self.repositories.clear()
        self.users.clear()
        self.signatures.clear()
        self.contents.clear()
        self.journal.clear()
        self.signature_seconds, self.page_size = 3600.0, 1000

    def fault(self, kind: Any, place: Any = "cdn", **options: Any) -> Fault:
        """Tell the server to make a fault; see `Fault` for the options."""
        fault = Fault(kind, place, **options)
        self.journal.faults.append(fault)
        return fault

    def __enter__(self) -> LocalHub:
        logging.getLogger("uvicorn.error").addFilter(_is_unexpected)
        for listener, app in zip(self._sockets, (self._hub_app, self._cdn_app), strict=True):
            config = uvicorn.Config(
                app, interface="asgi3", log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=1
            )
            server = uvicorn.Server(config)
            thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
            thread.start()
            self._servers.append(server)
            self._threads.append(thread)
        while not all(server.started for server in self._servers):
            time.sleep(0.005)
        return self

    def __exit__(self, *_: object) -> None:
        self.journal.clear()
        for server in self._servers:
            server.should_exit = True
        for thread in self._threads:
            thread.join(timeout=5)
        for listener in self._sockets:
            listener.close()

    async def _hub_app(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Starlette decodes the path, but a branch `feature/x` is one part of it, `feature%2Fx`.
        path = scope["raw_path"].decode()
        place = "resolve" if RESOLVE.match(path) and not path.startswith("/api/") else "api"
        await self._serve(place, path, scope, receive, send)

    async def _cdn_app(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._serve("cdn", scope["raw_path"].decode(), scope, receive, send)

    async def _serve(self, place: str, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        authorization = request.headers.get("authorization")
        token = authorization.removeprefix("Bearer ") if authorization else None
        entry = LoggedRequest(place, request.method, unquote(path), request.headers.get("range"), token)
        fault = self.journal.note(entry)
        if fault is not None and fault.kind == "stall":
            await fault.stall()
            raise ConnectionCut
        if fault is not None and fault.kind == "status":
            response: Response | FileResponse = Response(status_code=fault.status, headers=dict(fault.headers))
        else:
            response = await self.answer(place, path, request, token)
        entry.status = response.status_code
        await make_fault(response, fault, entry)(scope, receive, send)


def _is_unexpected(record: logging.LogRecord) -> bool:
    return record.levelno > logging.INFO and not (record.exc_info and isinstance(record.exc_info[1], ConnectionCut))


def _listen(port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    return listener


def serve_folder(hub: LocalHub, folder: Path, gated: list[str], private: list[str]) -> None:
    """Add each folder FOLDER/organisation/name as a repository."""
    for place in sorted(p for p in folder.glob("*/*") if p.is_dir()):
        name = place.relative_to(folder).as_posix()
        files: dict[str, bytes | Path] = {
            f.relative_to(place).as_posix(): f for f in sorted(place.rglob("*")) if f.is_file()
        }
        readers = set(hub.users.values())
        hub.create(name, files, gated="manual" if name in gated else False, private=name in private, readers=readers)


def main() -> None:
    """Serve a folder until the process is interrupted."""
    parser = argparse.ArgumentParser(description="Serve folders of models as a local Hugging Face Hub.")
    parser.add_argument("folder", type=Path, help="folder that holds organisation/name/files")
    parser.add_argument("--port", type=int, default=8090, help="port of the Hub")
    parser.add_argument("--token", action="append", default=[], help="token that may read everything")
    parser.add_argument("--gated", action="append", default=[], help="repository that needs a token for its content")
    parser.add_argument("--private", action="append", default=[], help="repository that only tokens can see")
    options = parser.parse_args()
    hub = LocalHub(options.port)
    hub.users.update({token: f"user{number}" for number, token in enumerate(options.token, 1)})
    serve_folder(hub, options.folder, options.gated, options.private)
    with hub:
        print(f"Hub at {hub.endpoint} with {sorted(hub.repositories)}", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
