"""The connection to one Hub: requests with finite waits and retries, and what a repository holds at a commit.

The requests are those of `huggingface_hub`, whose own client waits without limit, follows redirects in circles, keeps
the token in its exceptions and asks huggingface.co also when another Hub is meant.
"""

from __future__ import annotations

import json
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, urljoin, urlsplit

import httpx

from prefect_huggingface.blocks import HuggingFaceCredentials
from prefect_huggingface.tasks.hub_errors import (
    EmptyRepositoryError,
    HubError,
    HubUnavailableError,
    InvalidTokenError,
    RequestContext,
    RevisionNotFoundError,
    UntrustedHubError,
    attempt,
    explain_status,
)
from prefect_huggingface.tasks.run_logs import redact_client_logs

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

ETAG = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")
LARGEST_REDIRECTION_COUNT = 5
LARGEST_ANSWER_BYTES = 256 << 20
ANSWER_TIMEOUTS = 10
"""How many timeouts an answer of the API may take altogether."""

USER_AGENT = "prefect-huggingface"
Result = TypeVar("Result")
FIRST_WAIT_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 30.0
LONGEST_OBEYED_WAIT_SECONDS = 120.0
"""A server that asks for a longer wait than this gets it from Prefect's retries, not from a sleeping download."""
LEAST_BYTES_PER_SECOND = 1024.0
"""A server that sends more slowly than this has stalled, although it sends something now and then."""
COMMIT = re.compile(r"[0-9a-f]{40}")
DEFAULT_REVISION = "main"
LARGEST_PAGE_COUNT = 1000
# What Git allows in the name of a branch or tag; it becomes part of a path.
_REVISION = re.compile(r"(?![/.-])(?!.*(?:\.\.|//|/\.|@\{))[^\s\x00-\x1f\x7f\\~^:?*\[]{1,200}(?<![/.])(?<!\.lock)")
# Control characters, halves of characters, and what separates folders and drives on Windows.
_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\\:]")
_UNIMPORTANT = (".gitattributes", ".gitignore", "README.md")


@dataclass(frozen=True, slots=True)
class Location:
    """Where one file can be read now, and what it is.

    Attributes:
        url: Address, often a signed one that expires soon. A secret.
        etag: sha256 of a large file, git blob sha1 of a small one.
        size: Size in bytes.
    """

    url: str = field(repr=False)
    etag: str
    size: int


class HubConnection:
    """Requests to one Hub, with finite waits and with the token for no other host.

    Args:
        credentials: Token and address of the Hub. The token is read here, at the moment of use.
        repo_id: Repository that all requests are about.

    Raises:
        InvalidTokenError: If the token is malformed.
    """

    def __init__(self, credentials: HuggingFaceCredentials, repo_id: str) -> None:
        redact_client_logs()
        self.endpoint = credentials.endpoint
        self.repo_id = repo_id
        self.timeout = credentials.timeout_seconds
        self.attempts = credentials.max_attempts
        self._token = _check_token(credentials.get_token(), repo_id)
        self._client = httpx.Client(
            timeout=self.timeout,
            follow_redirects=True,
            max_redirects=LARGEST_REDIRECTION_COUNT,
            event_hooks={"request": [self._refuse_plain_http]},
            limits=httpx.Limits(max_connections=None),
        )

    def __enter__(self) -> HubConnection:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def about(self, revision: str | None = None, path: str | None = None) -> RequestContext:
        """Return the subject of a request, for the words of an error."""
        return RequestContext(self.repo_id, self.endpoint, revision, self._token is not None, path)

    def model_info(self, revision: str) -> ModelInfo:
        """Ask what the repository holds at a revision, with sizes and hashes."""
        from huggingface_hub import ModelInfo
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

        validate_repo_id(self.repo_id)
        address = f"{self.endpoint}/api/models/{self.repo_id}/revision/{quote(revision, safe='')}?blobs=true"
        content, _ = self._ask(address, self.about(revision))
        return ModelInfo(**content)  # type: ignore[no-untyped-call]

    def tree_page(self, commit: str, address: str | None) -> tuple[list[dict[str, Any]], str | None]:
        """Ask for one page of the file tree; return its entries and the address of the next page."""
        first = f"{self.endpoint}/api/models/{self.repo_id}/tree/{commit}?recursive=true"
        return self._ask(address or first, self.about(commit))

    def _ask(self, address: str, about: RequestContext) -> tuple[Any, str | None]:
        """Return the JSON of an answer, and the address of the next page if there is one.

        Raises:
            HubError: If the Hub refuses, or its answer does not end.
        """
        deadline, content = time.monotonic() + ANSWER_TIMEOUTS * self.timeout, bytearray()
        with self._client.stream("GET", address, headers=self._headers(address)) as answer:
            if answer.status_code != 200:
                raise explain_status(answer.status_code, answer.headers, about)
            for block in answer.iter_bytes():
                content += block
                if len(content) > LARGEST_ANSWER_BYTES or time.monotonic() > deadline:
                    text = f"The answer of {self.endpoint!r} about {self.repo_id!r} does not end. Try again later."
                    raise HubUnavailableError(text, **about.fields())
            return json.loads(content), answer.links.get("next", {}).get("url")

    def locate(self, path: str, commit: str) -> Location:
        """Ask where a file can be read now. The answer of an unsafe server is refused.

        Raises:
            UntrustedHubError: If the server names no safe hash, no size, or another commit.
        """
        from huggingface_hub import hf_hub_url

        about = self.about(commit, path)
        answer = self._head(hf_hub_url(self.repo_id, path, revision=commit, endpoint=self.endpoint), about)
        etag = (answer.headers.get("X-Linked-Etag") or answer.headers.get("ETag") or "").removeprefix("W/").strip('"')
        size = answer.headers.get("X-Linked-Size") or answer.headers.get("Content-Length") or ""
        if not ETAG.fullmatch(etag) or not re.fullmatch(r"[0-9]{1,18}", size):
            raise UntrustedHubError(
                f"{self.endpoint!r} names no usable hash or size for {path!r}. Use another Hub address.",
                **about.fields(),
            )
        if answer.headers.get("X-Repo-Commit", commit) != commit:
            raise UntrustedHubError(
                f"{self.endpoint!r} answers with another commit than {commit!r}. Use another Hub address.",
                **about.fields(),
            )
        return Location(answer.headers.get("Location") or str(answer.request.url), etag, int(size))

    def _head(self, url: str, about: RequestContext) -> httpx.Response:
        """Ask about a file. Only redirects within the Hub are followed, and not in circles."""
        for _ in range(LARGEST_REDIRECTION_COUNT):
            headers = {**self._headers(url), "Accept-Encoding": "identity"}
            answer = self._client.head(url, headers=headers, follow_redirects=False)
            if answer.status_code >= 400:
                raise explain_status(answer.status_code, answer.headers, about)
            target = answer.headers.get("Location")
            if not answer.is_redirect or target is None or urlsplit(target).netloc:
                return answer
            url = urljoin(url, target)
        raise UntrustedHubError(f"{self.endpoint!r} redirects in a circle. Use another Hub address.", **about.fields())

    @contextmanager
    def read(self, location: Location, start: int) -> Iterator[httpx.Response]:
        """Open the content of a file from byte `start` on. The status of the answer is the caller's to check."""
        headers = {**self._headers(location.url), "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        with self._client.stream("GET", location.url, headers=headers) as response:
            yield response

    def read_small(self, path: str, commit: str, largest: int = LARGEST_ANSWER_BYTES) -> bytes:
        """Return the content of a small file, or the first bytes of a large one.

        Raises:
            HubError: If the Hub refuses.
        """
        location, content = self.locate(path, commit), bytearray()
        with self.read(location, 0) as response:
            if response.status_code != 200:
                raise explain_status(response.status_code, response.headers, self.about(commit, path))
            for block in response.iter_raw():
                content += block
                if len(content) >= largest:
                    break
        return bytes(content[:largest])

    def is_own(self, url: str) -> bool:
        """Tell whether an address is of the Hub itself, and not of its storage or of anybody else."""
        return _origin(url) == _origin(self.endpoint)

    def _headers(self, url: str) -> dict[str, str]:
        headers = {"User-Agent": USER_AGENT}
        if self._token is not None and self.is_own(url):
            headers["Authorization"] = f"Bearer {self._token}"
        return headers

    def _refuse_plain_http(self, request: httpx.Request) -> None:
        if self.endpoint.startswith("https:") and request.url.scheme != "https":
            raise UntrustedHubError(
                f"{self.endpoint!r} sends files over plain http. Use another Hub address.", **self.about().fields()
            )


def _origin(url: str) -> tuple[str, str | None, int]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)


def _check_token(token: str | None, repo_id: str) -> str | None:
    """Return the token, or None. A token of the machine was not checked by the block."""
    if token is None:
        return None
    if not token or not token.isascii() or any(c.isspace() or not c.isprintable() for c in token):
        raise InvalidTokenError(
            "The token of this machine is empty or holds white space or characters that are not ASCII. "
            "Correct HF_TOKEN or log in again.",
            repo_id=repo_id,
        )
    return token


class DownloadStopped(BaseException):
    """Raised in the threads of a download that has failed elsewhere. It never leaves the download.

    It is no `Exception`, so that nothing takes it for a failure of the Hub.
    """


class Pace:
    """Watches that bytes come in at a least rate, taken over periods of some seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._started = time.monotonic()
        self._bytes = 0

    def is_too_slow(self, size: int) -> bool:
        """Count bytes that came in, and tell whether they come too slowly."""
        self._bytes += size
        taken = time.monotonic() - self._started
        if taken < self.seconds:
            return False
        slow = self._bytes < LEAST_BYTES_PER_SECOND * taken
        self._started, self._bytes = time.monotonic(), 0
        return slow


class RetryPolicy:
    """The attempts at one thing: how many may fail in a row, as long as `stop` is not set."""

    def __init__(self, attempts: int, stop: threading.Event) -> None:
        self.attempts = attempts
        self.stop = stop
        self.failures = 0

    def backoff(self, problem: HubError) -> None:
        """Wait before the next attempt, as long as the server asks.

        Raises:
            HubError: The problem, if a further attempt is of no use.
            DownloadStopped: If the download was stopped.
        """
        self.failures += 1
        wait = min(FIRST_WAIT_SECONDS * 2 ** (self.failures - 1), LONGEST_WAIT_SECONDS) * random.uniform(0.75, 1.25)
        wait = max(wait, problem.wait_seconds or 0.0)
        if not problem.transient or self.failures >= self.attempts or wait > LONGEST_OBEYED_WAIT_SECONDS:
            raise problem
        if self.stop.wait(wait):
            raise DownloadStopped

    def call(self, call: Callable[[], Result], about: RequestContext) -> Result:
        """Return the result of a call, after as many attempts as it needs.

        Raises:
            HubError: If the call cannot succeed, or every attempt failed.
        """
        while True:
            result = attempt(call, about)
            if not isinstance(result, HubError):
                self.failures = 0
                return result
            self.backoff(result)


@dataclass(frozen=True, slots=True)
class RepositoryFile:
    """One file as the Hub lists it. Some mirrors leave out size and hash.

    `blob_name` is the hash of the content: sha256 of a large file, git blob sha1 of a small one.
    """

    path: str
    size: int | None = None
    blob_name: str | None = None


@dataclass(frozen=True, slots=True)
class RepositoryState:
    """What a repository holds at one commit, and who may read it."""

    commit: str
    files: tuple[RepositoryFile, ...]
    gated: str | None = None
    private: bool = False
    licence: str | None = None

    @property
    def is_restricted(self) -> bool:
        """Whether the content is not for everybody."""
        return self.private or self.gated is not None


def check_revision(revision: str | None, repo_id: str) -> str:
    """Return the name of the revision; a missing one means the default branch.

    Raises:
        RevisionNotFoundError: If it cannot be the name of a branch, tag or commit.
    """
    if revision is None:
        return DEFAULT_REVISION
    if not _REVISION.fullmatch(revision):
        raise RevisionNotFoundError(
            f"`revision` {revision!r} is no name of a branch, tag or commit. Correct it.",
            repo_id=repo_id,
            revision=revision,
        )
    return revision


def resolve(hub: HubConnection, revision: str, retry: RetryPolicy) -> RepositoryState:
    """Ask which commit a revision is and what it holds. Files whose names could lead out of the store are left out.

    Raises:
        HubError: If the Hub cannot tell, or its answer is unsafe.
    """
    about = hub.about(revision)
    info = retry.call(lambda: hub.model_info(revision), about)
    commit = info.sha or ""
    if not COMMIT.fullmatch(commit) or (COMMIT.fullmatch(revision) and commit != revision):
        text = f"{hub.endpoint!r} names {commit!r} as the commit of {revision!r}. Use another Hub address."
        raise UntrustedHubError(text, **about.fields())
    listed = tuple(_listed_files(info)) or tuple(_tree_files(hub, commit, retry))
    for file in listed:
        _check_file(file, about)
    files = tuple(file for file in listed if _is_safe(file.path))
    if all(file.path in _UNIMPORTANT for file in files):
        text = f"{hub.repo_id!r} holds no files at {revision!r}. Choose another model or revision."
        raise EmptyRepositoryError(text, **about.fields())
    gated = str(info.gated) if info.gated else None
    return RepositoryState(commit, files, gated, bool(info.private), _licence(info))


def _listed_files(info: ModelInfo) -> Iterator[RepositoryFile]:
    for entry in info.siblings or ():
        yield RepositoryFile(entry.rfilename, entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id)


def _tree_files(hub: HubConnection, commit: str, retry: RetryPolicy) -> Iterator[RepositoryFile]:
    """Yield the files of the tree, for a repository that has too many for a list."""
    address: str | None = None
    for _ in range(LARGEST_PAGE_COUNT):
        entries, following = retry.call(lambda here=address: hub.tree_page(commit, here), hub.about(commit))  # type: ignore[misc]
        for entry in entries:
            if entry.get("type") == "file":
                yield RepositoryFile(entry["path"], entry.get("size"), (entry.get("lfs") or entry).get("oid"))
        if following is None or not hub.is_own(following):
            return
        address = following


def _check_file(file: RepositoryFile, about: RequestContext) -> None:
    """Refuse a description that no Hub gives; a hash could lead out of the store."""
    size_is_sane = file.size is None or (isinstance(file.size, int) and file.size >= 0)
    hash_is_sane = file.blob_name is None or ETAG.fullmatch(file.blob_name)
    if not isinstance(file.path, str) or not size_is_sane or not hash_is_sane:
        text = f"{about.endpoint!r} lists a file with a wrong size or hash: {file.path!r}. Use another Hub address."
        raise UntrustedHubError(text, **about.fields())


def _is_safe(path: str) -> bool:
    """Return whether a path stays within the store and can be written by every system. Logs of runs often cannot."""
    parts = PurePosixPath(path).parts
    return (
        bool(parts)
        and "/".join(parts) == path
        and ".." not in parts
        and not path.startswith("/")
        and not _UNSAFE.search(path)
        and all(len(part.encode()) <= 255 for part in parts)
    )


def _licence(info: ModelInfo) -> str | None:
    named = getattr(info.card_data, "license", None)
    if isinstance(named, str):
        return named
    tags = (tag.removeprefix("license:") for tag in info.tags or () if tag.startswith("license:"))
    return next(tags, None)
