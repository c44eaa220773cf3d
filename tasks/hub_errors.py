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

from prefect_huggingface.tasks.errors import DownloadError


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
