"""What the local Hub answers: its routes, its rules of access, and its signed addresses."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import secrets
import time
from collections.abc import Mapping
from urllib.parse import parse_qs, quote, unquote

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from support.hub_repositories import Repository, StoredFile
from support.hub_transfers import FileResponse

_API = re.compile(
    # An id may lack its organisation, so that a word of the API is no name after a first part.
    r"^/api/(?:models/|(?=datasets/))"
    r"((?:datasets/)?(?:[^/]+/(?!(?:revision|tree|paths-info|refs|auth-check|preupload|commit)(?:/|$)))?[^/]+?)"
    r"(?:/(revision|tree|paths-info|refs|auth-check|preupload|commit)(?:/([^/]+))?)?(?:/(.*))?$"
)
RESOLVE = re.compile(r"^/((?:datasets/)?(?:[^/]+/)?[^/]+)/resolve/([^/]+)/(.+)$")
_CDN = re.compile(r"^/lfs/([0-9a-f]{64})/(.+)$")


class HubRoutes:
    """The Hub and its CDN as answers to requests.

    Attributes:
        repositories: The repositories by name.
        users: User of each token.
        signature_seconds: How long a signed address of the CDN is valid.
        signatures: Every signature that was given out.
        contents: What the CDN sends for each sha256.
        page_size: Number of entries on a page of a file tree.
    """

    endpoint: str
    cdn: str

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.users: dict[str, str] = {}
        self.signature_seconds = 3600.0
        self.signatures: set[str] = set()
        self.contents: dict[str, StoredFile] = {}
        self.page_size = 1000
        self._secret = secrets.token_bytes(16)

    async def answer(self, place: str, path: str, request: Request, token: str | None) -> Response | FileResponse:
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
        if verb in ("preupload", "commit"):
            return await self._write(repository, user, verb, request)
        commit = repository.find(unquote(revision or "main"))
        if commit is None:
            return _refusal(404, "RevisionNotFound", f"Invalid rev id: {unquote(revision or 'main')}")
        if verb == "tree":
            return self._tree(repository, commit, unquote(rest or ""), request)
        if verb == "paths-info":
            wanted = parse_qs((await request.body()).decode()).get("paths", [])
            return JSONResponse([entry for entry in repository.tree(commit) if entry["path"] in wanted])
        return JSONResponse(repository.describe(commit, "blobs" in request.query_params))

    async def _write(self, repository: Repository, user: str | None, verb: str, request: Request) -> Response:
        """Take files on the branch `main` as they stand in the request, none of them as a large one."""
        if user not in repository.writers:
            return _refusal(403, None, "You have no right to write to this repository")
        body = await request.body()
        if verb == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            return JSONResponse(
                {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}
            )
        files = {name: file.content for name, file in repository.commits[repository.references["main"]].items()}
        for entry in map(json.loads, body.splitlines()):
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "deletedFile":
                del files[entry["value"]["path"]]
        commit = repository.commit(files)
        address = f"{self.endpoint}/{repository.name}/commit/{commit}"
        return JSONResponse({"success": True, "commitOid": commit, "commitUrl": address})

    def _tree(self, repository: Repository, commit: str, folder: str, request: Request) -> Response:
        start = int(request.query_params.get("cursor", 0))
        entries = [entry for entry in repository.tree(commit) if str(entry["path"]).startswith(folder and f"{folder}/")]
        if folder and not entries:
            return _refusal(404, "EntryNotFound", f"{folder} does not exist")
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
        name, revision, file_path = RESOLVE.match(path).groups()  # type: ignore[union-attr]
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
