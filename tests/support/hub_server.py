"""A local Hugging Face Hub: a real HTTP server that the unmodified `huggingface_hub` client accepts.

It runs on two loopback ports, one for the Hub and one for the CDN, which is another host for the client. It knows users
and their tokens, public, private and gated repositories, branches and tags, ranges and signed addresses that expire,
and it makes the faults that it is told to make (see `hub_faults`). Uploads are not supported.

To try it, put checkpoints into folders FOLDER/organisation/name and start it from the folder `tests`:

    python -m support.hub_server FOLDER [--port 8090] [--token TOKEN] [--gated REPOSITORY] [--private REPOSITORY]

Then use `HuggingFaceCredentials(endpoint="http://127.0.0.1:8090")`.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import logging
import re
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote

import uvicorn
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from support.hub_faults import Fault, Journal, LoggedRequest
from support.hub_repositories import Repository, StoredFile
from support.hub_transfers import ConnectionCut, FileResponse, make_fault

_API = re.compile(
    # An id may lack its organisation, so that a word of the API is no name after a first part.
    r"^/api/models/((?:[^/]+/(?!(?:revision|tree|paths-info|refs|auth-check)(?:/|$)))?[^/]+?)"
    r"(?:/(revision|tree|paths-info|refs|auth-check)(?:/([^/]+))?)?(?:/(.*))?$"
)
_RESOLVE = re.compile(r"^/((?:[^/]+/)?[^/]+)/resolve/([^/]+)/(.+)$")
_CDN = re.compile(r"^/lfs/([0-9a-f]{64})/(.+)$")


class LocalHub:
    """The Hub and its CDN, each a uvicorn server in a thread of this process.

    Attributes:
        repositories: The repositories by name; make them with `create`.
        users: User of each token.
        journal: Faults to make and requests that were seen.
        signature_seconds: How long a signed address of the CDN is valid.
        signatures: Every signature that was given out.
        contents: What the CDN sends for each sha256.
    """

    def __init__(self, port: int = 0) -> None:
        self.repositories: dict[str, Repository] = {}
        self.users: dict[str, str] = {}
        self.journal = Journal()
        self.signature_seconds = 3600.0
        self.signatures: set[str] = set()
        self.page_size = 1000
        self._secret = secrets.token_bytes(16)
        self.contents: dict[str, StoredFile] = {}
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
        place = "resolve" if _RESOLVE.match(path) and not path.startswith("/api/") else "api"
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
            response = await self._answer(place, path, request, token)
        entry.status = response.status_code
        await make_fault(response, fault, entry)(scope, receive, send)

    async def _answer(self, place: str, path: str, request: Request, token: str | None) -> Response | FileResponse:
        if place == "cdn":
            return self._blob(path, request)
        if token is not None and token not in self.users:
            return _refusal(401, None, "Invalid credentials in Authorization header")
        user = self.users.get(token) if token else None
        if place == "resolve":
            return self._resolve(path, request, user)
        if path == "/api/whoami-v2":
            if user is None:
                return _refusal(401, None, "Invalid username or password.")
            return JSONResponse({"type": "user", "name": user, "auth": {"accessToken": {"role": "read"}}})
        match = _API.match(path)
        return await self._api(match, request, user) if match else _refusal(404, None, "Not found")

    def _find(self, name: str, user: str | None) -> Repository | Response:
        repository = self.repositories.get(unquote(name))
        if repository is None or (repository.private and (user is None or user not in repository.readers)):
            return _refusal(401 if user is None else 404, "RepoNotFound", "Repository not found")
        return repository

    async def _api(self, match: re.Match[str], request: Request, user: str | None) -> Response:
        name, verb, revision, rest = match.groups()
        repository = self._find(name, user)
        if isinstance(repository, Response):
            return repository
        if verb == "refs":
            return JSONResponse(_references(repository))
        if verb == "auth-check":
            return self._gate(repository, user) or JSONResponse({})
        commit = repository.find(unquote(revision or "main"))
        if commit is None:
            return _refusal(404, "RevisionNotFound", f"Invalid rev id: {unquote(revision or 'main')}")
        if verb == "tree":
            return self._tree(repository, commit, request)
        if verb == "paths-info":
            wanted = parse_qs((await request.body()).decode()).get("paths", [])
            return JSONResponse([entry for entry in repository.tree(commit) if entry["path"] in wanted])
        return JSONResponse(repository.describe(commit, "blobs" in request.query_params))

    def _tree(self, repository: Repository, commit: str, request: Request) -> Response:
        start = int(request.query_params.get("cursor", 0))
        entries = repository.tree(commit)
        page, headers = entries[start : start + self.page_size], {}
        if start + self.page_size < len(entries):
            address = (
                f"{self.endpoint}{request.scope['raw_path'].decode()}?recursive=True&cursor={start + self.page_size}"
            )
            headers["Link"] = f'<{address}>; rel="next"'
        return JSONResponse(page, headers=headers)

    def _gate(self, repository: Repository, user: str | None) -> Response | None:
        if not repository.gated or (user is not None and user in repository.readers):
            return None
        words = "Access to model is restricted. You must have access to it and be authenticated to access it."
        return _refusal(401 if user is None else 403, "GatedRepo", words)

    def _resolve(self, path: str, request: Request, user: str | None) -> Response | FileResponse:
        name, revision, file_path = _RESOLVE.match(path).groups()  # type: ignore[union-attr]
        repository = self._find(name, user)
        if isinstance(repository, Response):
            return repository
        gate = self._gate(repository, user)
        if gate is not None:
            return gate
        commit = repository.find(unquote(revision))
        if commit is None:
            return _refusal(404, "RevisionNotFound", f"Invalid rev id: {unquote(revision)}")
        file = repository.commits[commit].get(unquote(file_path))
        if file is None:
            return _refusal(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        headers = {"X-Repo-Commit": commit}
        if not file.large:
            return FileResponse(file, request, {**headers, "ETag": f'"{file.git_sha1}"'})
        headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
        return Response(status_code=302, headers={**headers, "Location": self._sign(file, unquote(file_path))})

    def _sign(self, file: StoredFile, name: str) -> str:
        self.contents.setdefault(file.sha256, file)
        expires = f"{time.time() + self.signature_seconds:.3f}"
        signature = self._signature(file.sha256, expires)
        self.signatures.add(signature)
        return f"{self.cdn}/lfs/{file.sha256}/{quote(name)}?Expires={expires}&Signature={signature}&Key-Pair-Id=K1"

    def _signature(self, sha256: str, expires: str) -> str:
        return hmac.new(self._secret, f"{sha256} {expires}".encode(), hashlib.sha256).hexdigest()

    def _blob(self, path: str, request: Request) -> Response | FileResponse:
        match, query = _CDN.match(path), request.query_params
        sha256, expires = match.group(1) if match else "", query.get("Expires", "0")
        file = self.contents.get(sha256)
        if file is None or not hmac.compare_digest(query.get("Signature", ""), self._signature(sha256, expires)):
            return Response("<Error><Code>SignatureDoesNotMatch</Code></Error>", 403)
        if time.time() > float(expires):
            return Response("<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>", 403)
        return FileResponse(file, request, {"ETag": f'"{sha256}"'})


def _references(repository: Repository) -> dict[str, object]:
    def entry(kind: str, name: str) -> dict[str, str]:
        return {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": repository.references[name]}

    branches = [entry("heads", name) for name in repository.references if name not in repository.tags]
    return {"branches": branches, "tags": [entry("tags", name) for name in sorted(repository.tags)], "converts": []}


def _refusal(status: int, code: str | None, words: str, headers: Mapping[str, str] | None = None) -> Response:
    shown = {"X-Error-Message": words, **(headers or {})}
    if code:
        shown["X-Error-Code"] = code
    return JSONResponse({"error": words}, status, shown)


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
