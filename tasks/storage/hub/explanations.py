"""Turns exceptions and answers of the Hub into the errors of this library, without anything secret.

The words of the server are never repeated: a hostile one could put the token or a signed address into them.
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

from prefect_huggingface.tasks import hub_errors
from prefect_huggingface.tasks.hub_errors import HubError

Result = TypeVar("Result")
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LONGEST_ANNOUNCED_WAIT_SECONDS = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Subject:
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


def attempt(call: Callable[[], Result], about: Subject) -> Result | HubError:
    """Return the result of a call, or the error of this library that explains what it raised.

    The error is returned, not raised, so that it keeps no reference to the exception with its request and headers.
    """
    try:
        return call()
    except Exception as exc:
        return explain(exc, about)


def explain(exc: Exception, about: Subject) -> HubError:
    """Return the error of this library for an exception of a client or of the disk."""
    if isinstance(exc, HubError):
        return exc
    response = getattr(exc, "response", None)
    if response is not None:
        return explain_status(response.status_code, response.headers, about)
    # By name: the classes come from `httpx` or, with newer clients, from `httpx2`.
    names = {kind.__name__ for kind in type(exc).__mro__}
    if "OfflineModeIsEnabled" in names:
        text = f"{about.repo_id!r} is not here and HF_HUB_OFFLINE is set. Unset it, or set `offline` on the block."
        return hub_errors.OfflineError(text, **about.fields())
    if "HFValidationError" in names:
        text = f"{about.repo_id!r} is not the id of a repository. Use 'organisation/name'."
        return hub_errors.RepositoryNotFoundError(text, **about.fields())
    if "TransportError" in names:
        return _explain_transport(exc, names, about)
    if isinstance(exc, OSError) and exc.errno is not None:
        return explain_disk(exc, about)
    text = f"{about.endpoint!r} does not answer as a Hub does ({type(exc).__name__}). Check the Hub address."
    return hub_errors.UntrustedHubError(text, **about.fields())


def _explain_transport(exc: Exception, names: set[str], about: Subject) -> HubError:
    if _is_unknown_host(exc):
        text = f"The host of {about.endpoint!r} does not exist. Correct the Hub address, or check the name server."
        return hub_errors.HubAddressError(text, **about.fields())
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
    return hub_errors.HubUnavailableError(text, **about.fields())


def _is_unknown_host(exc: BaseException | None) -> bool:
    while exc is not None:
        if isinstance(exc, socket.gaierror):
            return exc.errno == socket.EAI_NONAME
        exc = exc.__cause__ or exc.__context__
    return False


def explain_disk(exc: OSError, about: Subject) -> HubError:
    """Return the error of this library for an error of the file system."""
    if exc.errno in NO_SPACE:
        text = (
            f"The disk is full while {about.path or about.repo_id!r} is downloaded. Make room; it goes on from there."
        )
        return hub_errors.DiskFullError(text, **about.fields())
    reason = exc.strerror or type(exc).__name__
    text = f"The store cannot be written: {reason} ({exc.filename!r}). Choose another folder in the block's store."
    return hub_errors.StoreNotWritableError(text, **about.fields())


def explain_status(status: int, headers: Mapping[str, str], about: Subject) -> HubError:
    """Return the error of this library for the answer of a Hub."""
    code = headers.get("X-Error-Code")
    words = headers.get("X-Error-Message") or ""
    fields = about.fields(status=status)
    if code == "RevisionNotFound":
        text = (
            f"{about.repo_id!r} has no revision {about.revision or 'main'!r}. See {about.page}/tree/main for its names."
        )
        return hub_errors.RevisionNotFoundError(text, **fields)
    if code == "EntryNotFound":
        text = f"{about.repo_id!r} has no file {about.path!r} at this commit. Try again, it may have been changed."
        return hub_errors.MissingFileError(text, **fields)
    if code == "GatedRepo":
        return _explain_gate(about, status)
    if status in (401, 403) or code == "RepoNotFound" or words == "Access to this resource is disabled.":
        return _explain_refusal(status, code, words, about)
    if status == 404:
        text = f"There is no repository {about.repo_id!r} at {about.endpoint!r}. Correct the id or the Hub address."
        return hub_errors.RepositoryNotFoundError(text, **fields)
    if status in (408, 429) or status >= 500:
        return explain_busy(status, headers, about)
    text = f"{about.endpoint!r} refuses the request with status {status}. Check the Hub address."
    return hub_errors.UntrustedHubError(text, **fields)


def _explain_gate(about: Subject, status: int) -> HubError:
    fields = about.fields(status=status, page=about.page)
    if about.has_token:
        text = f"{about.repo_id!r} is gated and this token has no access. Accept its terms on {about.page}."
    else:
        text = (
            f"{about.repo_id!r} is gated and no token is given. Accept its terms on {about.page} "
            "and put a token into the block's `credentials`."
        )
    return hub_errors.GatedRepositoryError(text, **fields)


def _explain_refusal(status: int, code: str | None, words: str, about: Subject) -> HubError:
    fields = about.fields(status=status)
    if words == "Access to this resource is disabled.":
        text = f"{about.repo_id!r} is disabled on the Hub. Choose another model."
        return hub_errors.AccessDeniedError(text, **fields)
    if status == 401 and about.has_token and code != "RepoNotFound":
        text = (
            f"{about.endpoint!r} does not accept the token. Make a new one and put it into the block's `credentials`."
        )
        return hub_errors.InvalidTokenError(text, **fields)
    if status == 403 and code != "RepoNotFound":
        text = f"The token may not read {about.repo_id!r}. Give it read access to that repository."
        if not about.has_token:
            text = f"{about.repo_id!r} may not be read without a token. Put one into the block's `credentials`."
        return hub_errors.AccessDeniedError(text, **fields)
    action = "Correct the id, or give the token access to it" if about.has_token else "Correct the id, or give a token"
    text = f"{about.repo_id!r} does not exist at {about.endpoint!r}, or it is private. {action}."
    return hub_errors.RepositoryNotFoundError(text, **fields)


def explain_busy(status: int, headers: Mapping[str, str], about: Subject) -> HubError:
    """Return the error for an answer that says to try again."""
    wait = announced_wait(headers)
    fields = about.fields(status=status, wait_seconds=wait)
    if status == 429:
        when = f"in {math.ceil(wait)} seconds" if wait else "later"
        text = f"{about.endpoint!r} limits the rate of requests. Try again {when}; a token raises the limit."
        return hub_errors.RateLimitedError(text, **fields)
    text = f"{about.endpoint!r} fails with status {status}. Try again later."
    return hub_errors.HubUnavailableError(text, **fields)


def announced_wait(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that `Retry-After` or `RateLimit` ask to wait, the longer of both."""
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
    if limit is not None:
        # The window ends within that second, so one more is needed.
        waits.append(limit.reset_in_seconds + 1.0)
    return min(max(0.0, *waits), LONGEST_ANNOUNCED_WAIT_SECONDS) if waits else None
