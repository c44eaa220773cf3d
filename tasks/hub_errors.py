"""What can go wrong with the Hub. Plain and picklable: no response, header, token or signed address is in any of them.

DownloadError
└── HubError
    ├── HubUnavailableError        no answer, or one that says to try again (transient)
    │   ├── RateLimitedError       too many requests; `wait_seconds` says how long to wait (transient)
    │   └── HubAddressError        no such host
    ├── OfflineError               not on this machine, and the Hub must not be asked
    ├── AccessError
    │   ├── GatedRepositoryError   the licence must be accepted on `page`
    │   ├── AccessDeniedError      the token may not read it
    │   └── InvalidTokenError      the token is malformed, or the Hub does not know it
    ├── NotFoundError
    │   ├── RepositoryNotFoundError
    │   ├── RevisionNotFoundError
    │   └── MissingFileError
    ├── UnusableRepositoryError
    │   ├── EmptyRepositoryError
    │   ├── NoWeightsError         nothing that the backend can load
    │   └── PickleOnlyError        weights in pickle format only
    ├── CorruptFileError           the content does not have the hash that the Hub names
    ├── UntrustedHubError          the server does not answer as a Hub does, or answers something unsafe
    └── StoreError
        ├── DiskFullError
        ├── StoreLimitError     larger than the store may become
        ├── StoreNotWritableError
        └── StoreBusyError         another process holds the lock (transient)
"""

from __future__ import annotations

import email.utils
import errno
import math
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from prefect_huggingface.tasks.errors import DownloadError

Result = TypeVar("Result")
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LONGEST_ANNOUNCED_WAIT_SECONDS = 24 * 3600.0


class HubError(DownloadError):
    """Base of the errors of the Hub.

    `fields` holds, where known: repo_id, revision, path, endpoint, page, status, wait_seconds, needed_bytes and
    free_bytes.
    """

    transient = False
    """Whether the same call may succeed later without any change."""

    @property
    def repo_id(self) -> str | None:
        """Repository that the error is about."""
        return self.fields.get("repo_id")

    @property
    def status(self) -> int | None:
        """Status code of the answer, where there was one."""
        return self.fields.get("status")

    @property
    def wait_seconds(self) -> float | None:
        """How long the server asks to wait before the next attempt."""
        return self.fields.get("wait_seconds")

    @property
    def page(self) -> str | None:
        """Web page where a person can remove the cause."""
        return self.fields.get("page")


class HubUnavailableError(HubError):
    """The Hub or its storage cannot be reached or fails."""

    transient = True


class RateLimitedError(HubUnavailableError):
    """The Hub refuses requests for a while."""


class HubAddressError(HubUnavailableError):
    """The host of the Hub address does not exist."""

    transient = False


class OfflineError(HubError):
    """The snapshot is not on this machine, and the Hub must not be asked."""


class AccessError(HubError):
    """The repository may not be read."""


class GatedRepositoryError(AccessError):
    """The repository is gated and the user has no access to it."""


class AccessDeniedError(AccessError):
    """The Hub denies access."""


class InvalidTokenError(AccessError):
    """The token is malformed or the Hub does not accept it."""


class NotFoundError(HubError):
    """What was asked for does not exist."""


class RepositoryNotFoundError(NotFoundError):
    """The repository does not exist, or it is private."""


class RevisionNotFoundError(NotFoundError):
    """The branch, tag or commit does not exist."""


class MissingFileError(NotFoundError):
    """A file of the repository is missing."""


class UnusableRepositoryError(HubError):
    """The repository holds nothing that can be used."""


class EmptyRepositoryError(UnusableRepositoryError):
    """The repository holds no files."""


class NoWeightsError(UnusableRepositoryError):
    """The repository holds no weights for the backend."""


class PickleOnlyError(NoWeightsError):
    """The repository holds weights in pickle format only."""


class CorruptFileError(HubError):
    """The content of a file does not have its hash, even after it was downloaded again."""


class UntrustedHubError(HubError):
    """The server does not answer as a Hub does, or its answer is unsafe."""


class StoreError(HubError):
    """The store on this machine cannot take the files."""


class DiskFullError(StoreError):
    """There is not enough room."""


class StoreLimitError(StoreError):
    """The snapshot alone is larger than the size limit of the store."""


class StoreNotWritableError(StoreError):
    """The folder of the store cannot be written."""


class StoreBusyError(StoreError):
    """Another process has been downloading the same files for too long."""

    transient = True


@dataclass(frozen=True, slots=True)
class RequestContext:
    """What a request is about, for the words of an error."""

    repo_id: str
    endpoint: str
    revision: str | None = None
    has_token: bool = False
    path: str | None = None

    @property
    def page(self) -> str:
        """Web page of the repository."""
        return f"{self.endpoint}/{self.repo_id}"

    def fields(self, **more: Any) -> dict[str, Any]:
        """Return the fields of an error about this."""
        known = {"repo_id": self.repo_id, "endpoint": self.endpoint, "revision": self.revision, "path": self.path}
        return {name: value for name, value in (known | more).items() if value is not None}


def attempt(call: Callable[[], Result], about: RequestContext) -> Result | HubError:
    """Return the result of a call, or the error of this library that explains what it raised.

    The error is returned, not raised, so that it keeps no reference to the exception with its request and headers.
    """
    try:
        return call()
    except Exception as exc:
        return explain(exc, about)


def explain(exc: Exception, about: RequestContext) -> HubError:
    """Return the error of this library for an exception of a client or of the disk."""
    if isinstance(exc, HubError):
        return exc
    response = getattr(exc, "response", None)
    if response is not None:
        return explain_status(response.status_code, response.headers, about)
    # By name: the classes come from `httpx` or, with newer clients, from `httpx2`.
    names = {kind.__name__ for kind in type(exc).__mro__}
    if "HFValidationError" in names:
        text = f"{about.repo_id!r} is not the id of a repository. Use 'organisation/name'."
        return RepositoryNotFoundError(text, **about.fields())
    if "TransportError" in names:
        return _explain_transport(exc, names, about)
    if isinstance(exc, OSError) and exc.errno is not None:
        return explain_disk(exc, about)
    text = f"{about.endpoint!r} does not answer as a Hub does ({type(exc).__name__}). Check the Hub address."
    return UntrustedHubError(text, **about.fields())


def _explain_transport(exc: Exception, names: set[str], about: RequestContext) -> HubError:
    if _is_unknown_host(exc):
        text = f"The host of {about.endpoint!r} does not exist. Correct the Hub address, or check the name server."
        return HubAddressError(text, **about.fields())
    if "TimeoutException" in names:
        what = "did not answer in time"
    elif "ConnectError" in names:
        what = "cannot be reached"
    else:
        what = "ended the connection early"
    text = (
        f"{about.endpoint!r} {what} ({type(exc).__name__}). "
        "Try again later, or set `offline` on the block to use what is here."
    )
    return HubUnavailableError(text, **about.fields())


def _is_unknown_host(exc: BaseException | None) -> bool:
    while exc is not None:
        if isinstance(exc, socket.gaierror):
            return exc.errno == socket.EAI_NONAME
        exc = exc.__cause__ or exc.__context__
    return False


def explain_disk(exc: OSError, about: RequestContext) -> HubError:
    """Return the error of this library for an error of the file system."""
    if exc.errno in NO_SPACE:
        text = (
            f"The disk is full while {about.path or about.repo_id!r} is downloaded. Make room; it goes on from there."
        )
        return DiskFullError(text, **about.fields())
    reason = exc.strerror or type(exc).__name__
    text = f"The store cannot be written: {reason} ({exc.filename!r}). Choose another folder in the block's store."
    return StoreNotWritableError(text, **about.fields())


def explain_status(status: int, headers: Mapping[str, str], about: RequestContext) -> HubError:
    """Return the error of this library for the answer of a Hub."""
    code = headers.get("X-Error-Code")
    words = headers.get("X-Error-Message") or ""
    fields = about.fields(status=status)
    if code == "RevisionNotFound":
        text = (
            f"{about.repo_id!r} has no revision {about.revision or 'main'!r}. See {about.page}/tree/main for its names."
        )
        return RevisionNotFoundError(text, **fields)
    if code == "EntryNotFound":
        text = f"{about.repo_id!r} has no file {about.path!r} at this commit. Try again, it may have been changed."
        return MissingFileError(text, **fields)
    if code == "GatedRepo":
        return _explain_gate(about, status)
    if status in (401, 403) or code == "RepoNotFound" or words == "Access to this resource is disabled.":
        return _explain_refusal(status, code, words, about)
    if status == 404:
        text = f"There is no repository {about.repo_id!r} at {about.endpoint!r}. Correct the id or the Hub address."
        return RepositoryNotFoundError(text, **fields)
    if status in (408, 429) or status >= 500:
        return explain_busy(status, headers, about)
    text = f"{about.endpoint!r} refuses the request with status {status}. Check the Hub address."
    return UntrustedHubError(text, **fields)


def _explain_gate(about: RequestContext, status: int) -> HubError:
    fields = about.fields(status=status, page=about.page)
    if about.has_token:
        text = f"{about.repo_id!r} is gated and this token has no access. Accept its terms on {about.page}."
    else:
        text = (
            f"{about.repo_id!r} is gated and no token is given. Accept its terms on {about.page} "
            "and put a token into the block's `credentials`."
        )
    return GatedRepositoryError(text, **fields)


def _explain_refusal(status: int, code: str | None, words: str, about: RequestContext) -> HubError:
    fields = about.fields(status=status)
    if words == "Access to this resource is disabled.":
        text = f"{about.repo_id!r} is disabled on the Hub. Choose another model."
        return AccessDeniedError(text, **fields)
    if status == 401 and about.has_token and code != "RepoNotFound":
        text = (
            f"{about.endpoint!r} does not accept the token. Make a new one and put it into the block's `credentials`."
        )
        return InvalidTokenError(text, **fields)
    if status == 403 and code != "RepoNotFound":
        text = f"The token may not read {about.repo_id!r}. Give it read access to that repository."
        if not about.has_token:
            text = f"{about.repo_id!r} may not be read without a token. Put one into the block's `credentials`."
        return AccessDeniedError(text, **fields)
    action = "Correct the id, or give the token access to it" if about.has_token else "Correct the id, or give a token"
    text = f"{about.repo_id!r} does not exist at {about.endpoint!r}, or it is private. {action}."
    return RepositoryNotFoundError(text, **fields)


def explain_busy(status: int, headers: Mapping[str, str], about: RequestContext) -> HubError:
    """Return the error for an answer that says to try again."""
    wait = announced_wait(headers)
    fields = about.fields(status=status, wait_seconds=wait)
    if status == 429:
        when = f"in {math.ceil(wait)} seconds" if wait else "later"
        text = f"{about.endpoint!r} limits the rate of requests. Try again {when}; a token raises the limit."
        return RateLimitedError(text, **fields)
    text = f"{about.endpoint!r} fails with status {status}. Try again later."
    return HubUnavailableError(text, **fields)


def announced_wait(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that `Retry-After` or a used up `RateLimit` ask to wait, the longer of both."""
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    waits = []
    after = (headers.get("Retry-After") or "").strip()
    if after.isascii() and after.isdigit():
        waits.append(float(after[:9]))
    elif after:
        date = email.utils.parsedate_tz(after)
        if date is not None:
            waits.append(email.utils.mktime_tz(date) - time.time())
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:  # every answer of the Hub has the header
        # The window ends within that second, so one more is needed.
        waits.append(limit.reset_in_seconds + 1.0)
    return min(max(0.0, *waits), LONGEST_ANNOUNCED_WAIT_SECONDS) if waits else None
