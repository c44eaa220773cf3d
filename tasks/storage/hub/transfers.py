"""Brings one content into the store: resumed where it stopped, hashed while it is read, published when it is right."""

from __future__ import annotations

import re
import threading
from dataclasses import replace

import httpx

from prefect_huggingface.tasks.hub_errors import CorruptFileError, HubError, HubUnavailableError, UntrustedHubError
from prefect_huggingface.tasks.storage.hub.connections import HubConnection, Location
from prefect_huggingface.tasks.storage.hub.contents import PartialContent, has_content
from prefect_huggingface.tasks.storage.hub.explanations import attempt, explain_busy, explain_status
from prefect_huggingface.tasks.storage.hub.layout import RepositoryFolder
from prefect_huggingface.tasks.storage.hub.patience import DownloadStopped, Pace, Patience
from prefect_huggingface.tasks.storage.hub.progress import Progress
from prefect_huggingface.tasks.storage.hub.revisions import RepositoryFile

LARGEST_CORRUPT_COUNT = 2
SMALLEST_PROGRESS_BYTES = 1 << 20
"""An attempt that brings less than this, or than 1 % of the file, counts as a failure like one that brings nothing."""

_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


class Transfer:
    """The download of one file of a commit.

    Args:
        hub: Connection to the Hub.
        folder: Folder of the repository.
        commit: Commit that the file is of.
        progress: Told about each byte.
        stop: Set when the download has failed elsewhere.
    """

    def __init__(
        self, hub: HubConnection, folder: RepositoryFolder, commit: str, progress: Progress, stop: threading.Event
    ) -> None:
        self.hub, self.folder, self.commit, self.progress, self.stop = hub, folder, commit, progress, stop

    def fetch(self, file: RepositoryFile, verified: dict[str, int], lock_timeout_seconds: float) -> RepositoryFile:
        """Bring the content of a file into the store, and return the file with its size and hash.

        Args:
            file: File to fetch.
            verified: Blobs that are known to be right, with the time of their last change (ns).
            lock_timeout_seconds: How long another process may take for the same content.

        Raises:
            HubError: If it cannot be had.
            DownloadStopped: If the download was stopped.
        """
        whole = self._settle(file)
        name, size = whole.blob_name, whole.size
        assert name is not None
        assert size is not None
        with self.folder.lock(name, lock_timeout_seconds, self.stop):
            if self._is_there(name, size, verified):
                self.progress.advance(size)
            else:
                with PartialContent(self.folder.partial(name), name, size) as partial:
                    self.progress.advance(partial.length)
                    self._fill(whole, partial)
                    partial.publish(self.folder.blob(name))
        return whole

    def _settle(self, file: RepositoryFile) -> RepositoryFile:
        """Return the file with its size and hash; ask for them where the list does not have them."""
        if file.blob_name is not None and file.size is not None:
            return file
        found = self._patience().insist(lambda: self._locate(file), self.hub.about(self.commit, file.path))
        large = len(found.etag) == 64
        return replace(
            file, size=found.size, sha256=found.etag if large else None, git_sha1=None if large else found.etag
        )

    def _patience(self) -> Patience:
        return Patience(self.hub.attempts, self.stop)

    def _is_there(self, name: str, size: int, verified: dict[str, int]) -> bool:
        blob = self.folder.blob(name)
        if not blob.exists():
            return False
        if blob.stat().st_size == size and blob.stat().st_mtime_ns == verified.get(name):
            return True
        if has_content(blob, size, name):
            return True
        # Other clients check the size only; nothing may go on using such a content.
        blob.unlink()
        return False

    def _fill(self, file: RepositoryFile, partial: PartialContent) -> None:
        patience, corrupt = self._patience(), 0
        about = self.hub.about(self.commit, file.path)
        enough = max(SMALLEST_PROGRESS_BYTES, partial.size // 100)
        while not partial.is_right:
            if partial.is_full:
                self._forget(partial)
                corrupt += 1
                if corrupt == LARGEST_CORRUPT_COUNT:
                    text = (
                        f"{file.path!r} of {self.hub.repo_id!r} does not have its hash, twice. Use another Hub address."
                    )
                    raise CorruptFileError(text, **about.fields())
            before = partial.length
            problem = attempt(lambda: self._read_on(file, partial), about)
            if partial.length - before >= enough:
                patience.reset()
            if problem is None and not partial.is_full:
                text = f"{file.path!r} of {self.hub.repo_id!r} ended early. Try again later."
                problem = HubUnavailableError(text, **about.fields())
            if problem is not None:
                patience.rest(problem)

    def _forget(self, partial: PartialContent) -> None:
        self.progress.advance(-partial.length)
        partial.reset()

    def _locate(self, file: RepositoryFile) -> Location:
        location = self.hub.locate(file.path, self.commit)
        if (file.blob_name or location.etag) != location.etag or file.size not in (None, location.size):
            text = f"{self.hub.endpoint!r} contradicts itself about {file.path!r}. Use another Hub address."
            raise UntrustedHubError(text, **self.hub.about(self.commit, file.path).fields())
        return location

    def _read_on(self, file: RepositoryFile, partial: PartialContent) -> None:
        """Append what is missing, from an address that is asked for anew, as signed ones expire."""
        if partial.is_full:
            return
        location, pace = self._locate(file), Pace(self.hub.timeout)
        with self.hub.read(location, partial.length) as response:
            self._check_answer(response, location, file, partial)
            # Not in blocks of a fixed size: what has arrived before a cut must not be lost.
            for block in response.iter_raw():
                self._append(block, partial)
                if self.stop.is_set():
                    raise DownloadStopped
                if pace.is_too_slow(len(block)):
                    text = f"{file.path!r} of {self.hub.repo_id!r} comes too slowly. Try again later."
                    raise HubUnavailableError(text, **self.hub.about(self.commit, file.path).fields())

    def _append(self, block: bytes, partial: PartialContent) -> None:
        room = partial.size - partial.length
        if len(block) > room:
            # More than was announced: wrong from some byte on, so the hash of the whole decides.
            block = block[:room]
        partial.append(block)
        self.progress.advance(len(block))

    def _check_answer(
        self, response: httpx.Response, location: Location, file: RepositoryFile, partial: PartialContent
    ) -> None:
        if response.status_code == 206 and self._range_fits(response, partial):
            return
        if response.status_code in (200, 206, 416):
            # The server sends another part than was asked for; only the whole is of use then.
            self._forget(partial)
        if response.status_code != 200:
            raise self._refusal(response, location, file)

    @staticmethod
    def _range_fits(response: httpx.Response, partial: PartialContent) -> bool:
        match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        return match is not None and int(match[1]) == partial.length and match[2] in ("*", str(partial.size))

    def _refusal(self, response: httpx.Response, location: Location, file: RepositoryFile) -> HubError:
        about, status = self.hub.about(self.commit, file.path), response.status_code
        if status in (408, 429) or status >= 500:
            return explain_busy(status, response.headers, about)
        if self.hub.is_own(location.url) and status not in (206, 416):
            return explain_status(status, response.headers, about)
        # Most likely the signed address has expired; the next attempt asks for another one.
        text = f"The storage of {self.hub.endpoint!r} refuses {file.path!r} with status {status}. Try again later."
        return HubUnavailableError(text, **about.fields(status=status))
