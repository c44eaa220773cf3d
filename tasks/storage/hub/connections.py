"""The connection to one Hub: whom to ask, with which token, and how long to wait for an answer.

The requests are those of `huggingface_hub`, whose own client waits without limit, follows redirects in circles, keeps
the token in its exceptions and asks huggingface.co also when another Hub is meant.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urljoin, urlsplit

import httpx

from prefect_huggingface.blocks import HuggingFaceCredentials
from prefect_huggingface.tasks.hub_errors import HubUnavailableError, InvalidTokenError, OfflineError, UntrustedHubError
from prefect_huggingface.tasks.storage.hub.explanations import Subject, explain_status
from prefect_huggingface.tasks.storage.hub.redaction import redact_client_logs

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

ETAG = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")
LARGEST_REDIRECTION_COUNT = 5
LARGEST_ANSWER_BYTES = 256 << 20
ANSWER_TIMEOUTS = 10
"""How many timeouts an answer of the API may take altogether."""

USER_AGENT = "prefect-huggingface"


@dataclass(frozen=True, slots=True)
class Location:
    """Where one file can be read now, and what it is.

    Attributes:
        url: Address, often a signed one that expires soon. A secret.
        etag: sha256 of a large file, git blob sha1 of a small one.
        size: Size in bytes.
    """

    url: str
    etag: str
    size: int

    def __repr__(self) -> str:
        return f"Location(etag={self.etag!r}, size={self.size})"


class HubConnection:
    """Requests to one Hub, with finite waits and with the token for no other host.

    Args:
        credentials: Token and address of the Hub. The token is read here, at the moment of use.
        repo_id: Repository that all requests are about.

    Raises:
        InvalidTokenError: If the token is malformed.
        OfflineError: If HF_HUB_OFFLINE is set.
    """

    def __init__(self, credentials: HuggingFaceCredentials, repo_id: str) -> None:
        redact_client_logs()
        _check_online(repo_id)
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

    def about(self, revision: str | None = None, path: str | None = None) -> Subject:
        """Return the subject of a request, for the words of an error."""
        return Subject(self.repo_id, self.endpoint, revision, self._token is not None, path)

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

    def _ask(self, address: str, about: Subject) -> tuple[Any, str | None]:
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

    def _head(self, url: str, about: Subject) -> httpx.Response:
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


def _check_online(repo_id: str) -> None:
    from huggingface_hub.constants import is_offline_mode

    if is_offline_mode():
        raise OfflineError(
            f"{repo_id!r} is not complete here and HF_HUB_OFFLINE is set. Unset it, or set `offline` on the block.",
            repo_id=repo_id,
        )


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
