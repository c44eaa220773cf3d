"""Places: files and folders on this machine or behind any fsspec URL, with one small set of operations.

A place is its URL and nothing else, so that it travels between processes. Credentials come from the environment or from
fsspec's own configuration, never from the URL's user.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from prefect_huggingface.tasks.artifacts import shorten
from prefect_huggingface.tasks.errors import TableError
from prefect_huggingface.tasks.run_logs import redact
from prefect_huggingface.tasks.storage.files import move_file, scratch_file, write_file

AHEAD_BYTES = 2**20  # read from a file at once
HTTP_VERSIONS = ("size", "ETag", "Last-Modified", "Content-MD5", "Digest")
BLOCK_BYTES = 32 * 2**20  # fetched from a remote file at once, while the block before is looked at
_hub: ContextVar[dict[str, Any]] = ContextVar("hub", default={})  # noqa: B039  # nobody changes it


@dataclass(frozen=True, slots=True)
class Place:
    """A file or a folder, local or remote.

    Attributes:
        url: Absolute path of the local file system, or a URL with its protocol.
    """

    url: str

    @classmethod
    def of(cls, location: str | os.PathLike[str]) -> Place:
        """Return the place of a path or URL. A relative path counts from the current folder."""
        text = os.fspath(location)
        protocol, separator, rest = text.partition("://")
        if separator and protocol not in ("file", "local"):
            return cls(text.rstrip("/"))
        return cls(os.path.abspath(os.path.expanduser(rest if separator else text)))

    @property
    def is_local(self) -> bool:
        """Whether the place is on the local file system."""
        return "://" not in self.url

    @property
    def is_on_hub(self) -> bool:
        """Whether the place is in a repository of the Hub, where each write is a commit; buckets have none."""
        return self.url.startswith("hf://") and not self.url.startswith("hf://buckets/")

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.url.rstrip("/").rpartition("/")[2]

    @property
    def parent(self) -> Place:
        """Folder of the place."""
        return Place(self.url.rpartition("/")[0] or "/")

    def beside(self, suffix: str) -> Place:
        """Return the place whose name has a suffix more."""
        return Place(self.url + suffix)

    def child(self, name: str) -> Place:
        """Return a place in this folder."""
        return Place(f"{self.url.rstrip('/')}/{name}")

    def exists(self) -> bool:
        """Return whether there is a file or folder."""
        if self.is_local:
            return os.path.lexists(self.url)
        return bool(self._ask("exists", is_fresh=True))

    def is_folder(self) -> bool:
        """Return whether there is a folder."""
        return bool(self._ask("isdir"))

    def info(self) -> dict[str, Any]:
        """Return what the file system says about the file, at least its size in bytes."""
        return dict(self._ask("info"))

    def open(self, ahead: bool = False) -> IO[bytes]:
        """Open the file for reading bytes.

        Args:
            ahead: Whether it is read from one end to the other: then the next part of a remote file is fetched while
                the current one is looked at.
        """
        if self.is_local:
            return open(self.url, "rb", buffering=AHEAD_BYTES if ahead else -1)
        options = {"block_size": BLOCK_BYTES, "cache_type": "background"} if ahead else {"block_size": AHEAD_BYTES}
        # Without a buffer, each line would be a request to the file system's own cache.
        file: Any = _RemoteFile(self.url, self._ask("open", "rb", **options))
        return io.BufferedReader(file, AHEAD_BYTES)

    def read(self) -> bytes:
        """Return the whole content. A remote file that is being replaced is read as it was or as it will be."""
        return bytes(self._ask("cat_file"))

    def digest(self) -> str:
        """Return the sha256 of the content as it lies there."""
        with self.open(ahead=True) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]

    def version(self) -> str:
        """Return what a store says of the content, such as an ETag; of a local file its size and its time.

        Raises:
            FileNotFoundError: If there is no file.
        """
        if self.is_local:
            found = os.stat(self.url)  # the inode is not the same on all machines that share a folder
            return f"{found.st_size} bytes, {found.st_mtime_ns // 1000}"
        if self.url.startswith(("http://", "https://")):  # fsspec takes what is there for unchangeable
            found = self._ask("info", is_fresh=True)
            return str({name: found.get(name) for name in HTTP_VERSIONS})
        return str(self._ask("ukey", is_fresh=True))

    def write(self, content: bytes) -> None:
        """Write the whole content at once: a reader sees all of it or nothing.

        Locally it is written to a temporary name, made durable and renamed; elsewhere it is put as a single object.
        """
        self._put(content, replace=True)

    def create(self, content: bytes) -> bool:
        """Write the whole content unless there is a file already, and return whether it was written.

        Of several processes that do so at once one succeeds, on local file systems with links and where fsspec has
        conditional writes (S3, GCS, Azure, memory). Elsewhere the file is looked for first and then written.
        """
        try:
            self._put(content, replace=False)
        except FileExistsError:
            return False
        return True

    def _put(self, content: bytes, replace: bool) -> None:
        if not self.is_local:
            self._ask("pipe_file", content, mode="overwrite" if replace else "create")
            return
        write_file(Path(self.url), content, replace)

    def names(self) -> list[str]:
        """Return the sorted names in this folder; a folder that does not exist has none."""
        if self.is_local:
            return sorted(os.listdir(self.url)) if os.path.isdir(self.url) else []
        try:
            found = [str(name).strip("/") for name in self._ask("ls", detail=False, is_fresh=True)]
        except FileNotFoundError:
            return []
        # S3 lists the marker of a folder, made by its console for instance, within the folder.
        own = _file_system(self.url)[1].strip("/")
        return sorted(name.rpartition("/")[2] for name in found if name != own)

    def remove(self) -> None:
        """Remove the file, or the folder with all that is in it, if it is there."""
        if self.is_local:
            if os.path.isdir(self.url):
                shutil.rmtree(self.url, ignore_errors=True)
            else:
                Path(self.url).unlink(missing_ok=True)
            return
        if self.exists():
            self._ask("rm", recursive=True)

    @contextmanager
    def published(self, replace: bool = False) -> Iterator[Path]:
        """Yield a local file to write to, and publish it at this place when the block ends without an error.

        Args:
            replace: Whether a file that is there may be replaced.

        Raises:
            TableError: If the place was taken meanwhile.
        """
        folder = os.path.dirname(self.url) if self.is_local else None
        if folder:
            os.makedirs(folder, exist_ok=True)
        with scratch_file(folder or tempfile.gettempdir(), self.name) as temporary:
            yield temporary
            self._publish(temporary, replace)

    def _publish(self, temporary: Path, replace: bool) -> None:
        try:
            if not self.is_local:  # in parts, and as a whole for those who read
                mode = "overwrite" if replace else "create"
                system, path = _file_system(self.url, is_fresh=True)
                _reach(self.url, system.put_file, str(temporary), path, mode=mode)
                return
            move_file(temporary, Path(self.url), replace)
        except FileExistsError:
            raise TableError(
                f"{redact(self.url)!r} exists already. Choose another destination, or move the file away."
            ) from None

    def _ask(self, operation: str, *arguments: Any, is_fresh: bool = False, **options: Any) -> Any:
        """Return what the file system answers to one of its operations on the place."""
        system, path = _file_system(self.url, is_fresh)
        return _reach(self.url, getattr(system, operation), path, *arguments, **options)


def find_places(source: str) -> list[Place]:
    """Return the files that a path, folder, glob pattern or URL of one stands for, sorted by name.

    Files whose name starts with a dot or an underscore are left out of folders and patterns. Of the folders within a
    folder, only those of a partitioned table are looked into, whose names are `column=value`.
    """
    place = Place.of(source)
    if not is_pattern(source):
        return list(_files_in(place)) if place.is_folder() else [place]
    system, path = _file_system(place.url)
    found = sorted(map(str, _reach(place.url, system.glob, path)))
    places = [Place(name if place.is_local else str(system.unstrip_protocol(name))) for name in found]
    return [each for each in places if _is_data(each) and not each.is_folder()]


def is_pattern(source: str) -> bool:
    """Return whether a path or URL is a glob pattern, and not a file that is named like one."""
    place = Place.of(source)
    return any(character in place.url for character in "*?[") and not place.exists()


def _files_in(folder: Place) -> Iterator[Place]:
    for place in filter(_is_data, map(folder.child, folder.names())):
        if not place.is_folder():
            yield place
        elif "=" in place.name:
            yield from _files_in(place)


def _is_data(place: Place) -> bool:
    return not place.name.startswith((".", "_"))


@contextmanager
def reach_hub(endpoint: str, token: str | None) -> Iterator[None]:
    """Read and write `hf://` of a Hub with its own token, or with none, for the time of the block.

    It holds for this thread and for the tasks that it begins. A token never goes to another Hub.
    """
    used = _hub.set({"endpoint": endpoint, "token": token or False})
    try:
        yield
    finally:
        _hub.reset(used)


class _RemoteFile:
    """A file of a store, whose errors are those of `_reach` when it is read."""

    def __init__(self, url: str, file: Any) -> None:
        self._url, self._file = url, file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def readinto(self, buffer: Any) -> Any:
        return _reach(self._url, self._file.readinto, buffer)

    def read(self, size: int = -1) -> Any:
        return _reach(self._url, self._file.read, size)

    readall = read


def _reach(url: str, operation: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Return what a file system answers.

    What the client of a store raises never goes on, nor stays behind an error: its request may hold a token.

    Raises:
        FileExistsError: If there is a file already.
        FileNotFoundError: If there is none.
        TableError: If the store does not answer as it should.
    """
    if "://" not in url:
        return operation(*arguments, **options)
    try:
        return operation(*arguments, **options)
    except FileExistsError:
        error: Exception = FileExistsError(f"{redact(url)!r} exists already.")
    except FileNotFoundError as exc:
        error = FileNotFoundError(f"{redact(url)!r} is not there: {shorten(redact(str(exc)))}")
    except Exception as exc:
        error = _explain(url, exc)
    raise error


def _explain(url: str, exc: Exception) -> TableError:
    kind, status = type(exc).__name__, getattr(getattr(exc, "response", exc), "status_code", getattr(exc, "status", 0))
    remedy = "Check the URL, the network and the store, then start it again."
    if re.search("Credential|Auth|Permission", kind) or status in (401, 403):
        remedy = "Give credentials that its store accepts, in the block or as its client reads them."
    return TableError(f"{redact(url)!r} cannot be reached ({shorten(redact(f'{kind}: {exc}'))}). {remedy}")


def _file_system(url: str, is_fresh: bool = False) -> tuple[Any, str]:
    """Return the file system of a URL and the path in it; a fresh one knows what other processes have written."""
    import fsspec

    if "://" not in url:
        return fsspec.filesystem("file"), url
    try:
        system, path = fsspec.url_to_fs(url, **(_hub.get() if url.startswith("hf://") else {}))
    except (ImportError, ValueError) as exc:
        raise TableError(
            f"{redact(url)!r} cannot be opened: {redact(str(exc))}. Install its package, or correct it."
        ) from exc
    if is_fresh:
        system.invalidate_cache()
    return system, path
