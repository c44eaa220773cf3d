"""The Hugging Face cache: where the files of a repository lie, which of them are complete, and which of them are ours.

    models--organisation--name/
        blobs/<hash>                 content of each file, named by its hash
        snapshots/<commit>/<path>    links to the blobs
        refs/<branch or tag>         commit that it was at the last download
        partials/<hash>              content that is not complete yet (ours)
        manifests/<commit>-<key>.json    proof that a snapshot is complete (ours)
        downloaded/<commit>/<hash>   mark of a content that this library has downloaded for a snapshot, and may remove
        leases/<commit>              held by those who use a snapshot (ours)
    .locks/models--organisation--name/

The layout is that of the Hub's own client, and by default the cache is the one that every other tool uses. A Hub other
than the default one gets a folder in the store, `hub@<host>_<port>`: it could give any content the name of any commit.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock, Timeout
from prefect.logging import get_logger

from prefect_huggingface.blocks import LocalModel, ModelStore
from prefect_huggingface.blocks.credentials import DEFAULT_ENDPOINT, default_endpoint
from prefect_huggingface.blocks.store import hugging_face_cache
from prefect_huggingface.tasks.hub_errors import (
    HubError,
    NoWeightsError,
    PickleOnlyError,
    StoreBusyError,
    UnusableRepositoryError,
)
from prefect_huggingface.tasks.records import Snapshot, SnapshotFile
from prefect_huggingface.tasks.storage.files import has_content, write_file
from prefect_huggingface.tasks.storage.folders import foreign_code
from prefect_huggingface.tasks.storage.hub.client import COMMIT, ETAG, DownloadStopped, RepositoryFile
from prefect_huggingface.tasks.storage.locks import LEASE, last_used, lease_path, note_use, take_free
from prefect_huggingface.tasks.waiting import WaitNotice, file_held, holder_of

logger = get_logger(__name__)
REPOSITORY_LOCK = "repository"
"""Held while a snapshot is downloaded or removed."""

FORMAT = 1
# Configuration, tokenizer and chat template: small files at the top of the repository.
_SMALL = re.compile(
    r"[^/]+\.(json|model|txt|jinja|tiktoken|spm)|additional_chat_templates/[^/]+\.jinja"
    r"|\d+_[A-Za-z]+/(config\.json|model\.safetensors)"  # steps after the model, as of Sentence Transformers
)
_USELESS = re.compile(r"trainer_state\.json|(all|train|eval|predict)_results\.json|.*\.index\.json|requirements.*\.txt")
_TOKENIZERS = {
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "source.spm", "vocab.json", "vocab.txt", "openvino_tokenizer.xml",
}  # fmt: skip
_OPENVINO = re.compile(r"openvino_[^/]+\.(xml|bin)")
_OPENVINO_MODEL = re.compile(r"openvino_(model|language_model|encoder_model|decoder_model)\.xml")
_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
_PICKLE = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_ANY_PICKLE = re.compile(r"[^/]+\.(bin|pt|pth|pkl|ckpt)")
_SHARD = re.compile(r"(?:pytorch_)?model[-_.](?:safetensors-)?(\d+)-of-(\d+)\.(safetensors|bin)")
RULES = 4  # raised when other files are chosen than before, so that old manifests are not taken for complete
ADAPTER = "adapter"  # in place of a backend, for a repository that holds no model but an adapter of PEFT
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def hub_folder(store: ModelStore, endpoint: str) -> Path:
    """Return the cache folder for the repositories of a Hub."""
    if endpoint in (DEFAULT_ENDPOINT, default_endpoint()):
        return store.hub_cache
    parts = urlsplit(endpoint)
    name = f"{parts.netloc}{parts.path}" if parts.scheme == "https" else f"{parts.scheme}_{parts.netloc}{parts.path}"
    return store.folder / f"hub@{re.sub(r'[^A-Za-z0-9.-]', '_', name)}"


def works_offline(model: LocalModel) -> bool:
    """Return whether the Hub must not be asked, by the block or by the variables of the Hub's own client."""
    variable = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return model.offline or variable.upper() in ("1", "ON", "YES", "TRUE")


class _LockNotice(WaitNotice):
    """Says who downloads the same, and ends the waiting for it when the download has failed elsewhere."""

    stop: threading.Event | None = None

    def tell(self) -> None:
        if self.stop is not None and self.stop.is_set():
            raise DownloadStopped
        super().tell()


@dataclass(frozen=True, slots=True)
class RepositoryFolder:
    """The folder of one repository in the cache folder `root`."""

    root: Path
    repo_id: str

    @classmethod
    def of(cls, model: LocalModel) -> RepositoryFolder:
        """Return the folder of a model's repository."""
        return cls(hub_folder(model.get_store(), model.get_credentials().endpoint), model.model_id)

    @property
    def path(self) -> Path:
        """Folder of the repository."""
        return self.root / self.name

    @property
    def name(self) -> str:
        """Name of the folder."""
        return "models--" + self.repo_id.replace("/", "--")

    def blob(self, name: str) -> Path:
        """Return the place of a content by its hash."""
        return self.path / "blobs" / name

    def partial(self, name: str) -> Path:
        """Return the place of a content that is not complete yet."""
        return self.path / "partials" / name

    def mark(self, commit: str, name: str) -> Path:
        """Return the mark that says that this library has downloaded a content for a snapshot, and may remove it."""
        return self.path / "downloaded" / commit / name

    def snapshot(self, commit: str) -> Path:
        """Return the folder of a snapshot."""
        return self.path / "snapshots" / commit

    def reference(self, revision: str) -> Path:
        """Return the file that holds the commit of a branch or tag. The revision is a checked one."""
        return self.path / "refs" / revision

    def manifest(self, commit: str, key: str) -> Path:
        """Return the place of the manifest of a selection of files at a commit."""
        return self.path / "manifests" / f"{commit}-{key}.json"

    @property
    def is_writable(self) -> bool:
        """Whether this process may write into the cache folder, or make it."""
        place = next(place for place in (self.path, *self.path.parents) if place.exists())
        return os.access(place, os.W_OK)

    def check_writable(self) -> None:
        """Write something into the cache folder and remove it. The error of the system says why it cannot be done."""
        self.root.mkdir(parents=True, exist_ok=True)
        probe = self.root / f".probe-{uuid.uuid4().hex}"
        probe.touch()
        probe.unlink()

    def make(self, commit: str) -> None:
        """Make the folders for a snapshot, and the file by which its users hold it."""
        for name in ("blobs", "partials", "manifests", f"downloaded/{commit}", "refs", f"snapshots/{commit}"):
            (self.path / name).mkdir(parents=True, exist_ok=True)
        note_use(self.snapshot(commit), create=True)

    @contextmanager
    def lock(self, name: str, timeout_seconds: float, stop: threading.Event | None = None) -> Iterator[None]:
        """Hold the lock of a blob or a snapshot. The standard client uses the same locks for blobs.

        Raises:
            StoreBusyError: If another process holds it for longer than the timeout.
            DownloadStopped: If the download was stopped meanwhile.
        """
        place = self.root / ".locks" / self.name / f"{name}.lock"
        place.parent.mkdir(parents=True, exist_ok=True)
        notice = _LockNotice(logger, f"Waiting for {holder_of(place)}, which downloads {self.repo_id}")
        notice.stop = stop
        try:
            with file_held(FileLock(place), timeout_seconds, notice):
                yield
        except Timeout:
            raise StoreBusyError(
                f"Another process has been downloading {self.repo_id!r} for {timeout_seconds:g} seconds. "
                "Wait for it, or raise the store's `lock_timeout_seconds`.",
                repo_id=self.repo_id,
            ) from None

    def link(self, commit: str, path: str, blob_name: str) -> None:
        """Make a content appear as a file of a snapshot, in one step. A link that is right stays whose it is."""
        target = self.snapshot(commit) / path
        with suppress(OSError):
            if target.exists() and Path(os.readlink(target)).name == blob_name:
                return
        if any((self.path / "downloaded").glob(f"*/{blob_name}")):
            self.mark(commit, blob_name).touch()
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path / "partials" / f".link-{uuid.uuid4().hex}"
        try:
            os.symlink(os.path.relpath(self.blob(blob_name), target.parent), temporary)
        except OSError:
            # Some file systems have no links; the standard client copies there as well.
            shutil.copyfile(self.blob(blob_name), temporary)
        os.replace(temporary, target)

    def write(self, place: Path, text: str) -> None:
        """Write a small file atomically. The temporary file must not lie among the references."""
        partials = self.path / "partials"
        partials.mkdir(exist_ok=True)
        write_file(place, text.encode(), folder=partials)


@dataclass(frozen=True, slots=True)
class Selection:
    """Which files of a repository a model needs. Never pickles or code, unless the block asks for them."""

    repo_id: str
    backend: str
    allow_pickle: bool
    trust_remote_code: bool

    @classmethod
    def of(cls, model: LocalModel) -> Selection:
        """Return the selection of a model."""
        return cls(model.model_id, model.backend, model.allow_pickle, model.trust_remote_code)

    @property
    def key(self) -> str:
        """Name of the selection in the names of manifests."""
        text = json.dumps({"rules": RULES, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def choose(
        self, files: Sequence[RepositoryFile], read: Callable[[str], bytes] | None = None
    ) -> tuple[RepositoryFile, ...]:
        """Return the files that the model needs, in the order of their paths.

        Args:
            files: Files of the repository.
            read: Returns the content of a small file of it, for the index of the weights.

        Raises:
            NoWeightsError: If there are no weights that the backend can load.
            PickleOnlyError: If there are, but in pickle format, and the block does not allow it.
            UnusableRepositoryError: If its Python code is in another repository, and not here.
        """
        names = {file.path for file in files}
        if self.backend == ADAPTER:
            self._refuse_missing(set(ADAPTER_FILES) - names)
            return tuple(sorted((file for file in files if file.path in ADAPTER_FILES), key=lambda file: file.path))
        chosen = {n for n in names if _SMALL.fullmatch(n) and not _USELESS.fullmatch(n)} | self._weights(names, read)
        if self.trust_remote_code:
            chosen |= {n for n in names if n.endswith(".py")}
            if read is not None and "config.json" in names and not any(map(_OPENVINO_MODEL.fullmatch, chosen)):
                self._check_code(read("config.json"))
        return tuple(sorted((file for file in files if file.path in chosen), key=lambda file: file.path))

    def _weights(self, names: set[str], read: Callable[[str], bytes] | None) -> set[str]:
        if self.backend == "openvino" and any(_OPENVINO_MODEL.fullmatch(n) for n in names):
            return self._openvino(names)
        weights = self._one_format(names, *_SAFETENSORS, read)
        if not weights and self.allow_pickle:
            weights = self._one_format(names, *_PICKLE, read)
        if not weights:
            raise self._no_weights(names)
        return weights

    def _openvino(self, names: set[str]) -> set[str]:
        chosen = {n for n in names if _OPENVINO.fullmatch(n)}
        self._refuse_missing({n.removesuffix(".xml") + ".bin" for n in chosen if n.endswith(".xml")} - chosen)
        return chosen

    def _one_format(self, names: set[str], whole: str, index: str, read: Callable[[str], bytes] | None) -> set[str]:
        """Return the file with all weights, or all its shards with their index, without which nothing loads them."""
        if whole in names:
            return {whole}
        if index not in names:
            return set()
        if read is not None and (named := set(read_index(read(index)).values())):
            self._refuse_missing(named - names)
            return named | {index}
        # Who has no access yet may not read the index: the names of the shards tell how many there are.
        shards = {n for n in names if _SHARD.fullmatch(n) and n.endswith(Path(whole).suffix)}
        for match in filter(None, map(_SHARD.fullmatch, sorted(shards))):
            first, last = match.span(1)
            for number in range(1, min(int(match[2]), 10_000) + 1):
                wanted = f"{match.string[:first]}{number:0{last - first}d}{match.string[last:]}"
                self._refuse_missing({wanted} - names)
        return shards | {index} if shards else set()

    def _check_code(self, config: bytes) -> None:
        """Refuse code of another repository that is not here: Transformers would only look for it in its cache."""
        for other in foreign_code(config):
            if not RepositoryFolder(hugging_face_cache(), other).path.is_dir():
                text = (
                    f"{self.repo_id!r} needs the Python code of another repository, {other!r}, which is not here. If "
                    f"you trust it, run `hf download {other} --include '*.py'` once."
                )
                raise UnusableRepositoryError(text, repo_id=self.repo_id)

    def _refuse_missing(self, missing: set[str]) -> None:
        if missing:
            text = f"{self.repo_id!r} lacks {sorted(missing)[:3]!r}, a part of its weights. Choose another revision."
            raise NoWeightsError(text, repo_id=self.repo_id)

    def _no_weights(self, names: set[str]) -> HubError:
        if not self.allow_pickle and any(_ANY_PICKLE.fullmatch(n) and not _OPENVINO.fullmatch(n) for n in names):
            text = (
                f"{self.repo_id!r} holds weights in pickle format only, which can run code. "
                "Choose a revision with safetensors, or set `allow_pickle` on the block."
            )
            return PickleOnlyError(text, repo_id=self.repo_id)
        return NoWeightsError(f"{self.repo_id!r} {describe_weights(names, self.backend)}", repo_id=self.repo_id)


def describe_weights(names: set[str], backend: str) -> str:
    """Return what a repository or folder holds in place of weights that can be loaded, and what to do."""
    found = sorted(names)
    other = [name for name in found if name.endswith(".safetensors")]
    if "adapter_config.json" in names or "adapter_model.safetensors" in names:
        return "is an adapter and holds no model. Set `model_id` to its base model and `adapters` to this."
    if backend == "torch" and any(_OPENVINO_MODEL.fullmatch(name) for name in names):
        return "holds an OpenVINO model. Set `backend='openvino'` to run it."
    if gguf := [name for name in found if name.lower().endswith(".gguf")]:
        return f"holds GGUF files. Set `model_id` to one of them: {', '.join(gguf[:5])}. It must be on this machine."
    if any(name.startswith("consolidated") for name in other):
        return (
            f"holds its weights in Mistral's own format only ({other[0]!r}), which Transformers does not load. "
            "Choose a repository with 'model.safetensors'."
        )
    if other:
        return (
            f"holds no 'model.safetensors' and no index of its parts, only {other[:3]!r}. Choose a repository with "
            "weights that Transformers loads without a variant."
        )
    suffixes = sorted({name.rsplit(".", 1)[-1] for name in names if "." in name})[:8]
    wanted = "OpenVINO or safetensors" if backend == "openvino" else "safetensors"
    return f"holds no {wanted} weights for the backend {backend!r}, only {suffixes!r}. Choose another model."


def read_index(content: bytes) -> dict[str, str]:
    """Return the file of each weight that an index of weights names; nothing if it cannot be understood."""
    try:
        named = json.loads(content)["weight_map"].items()
        return {weight: file for weight, file in named if isinstance(file, str)}
    except (ValueError, KeyError, AttributeError, TypeError):
        return {}


@dataclass(frozen=True, slots=True)
class ManifestFile:
    """One verified file, with the time of its last change (ns) when it was verified."""

    path: str
    size: int
    blob_name: str
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """All files of a selection at a commit: the proof that a snapshot is complete. It holds no secret."""

    repo_id: str
    commit: str
    key: str
    files: tuple[ManifestFile, ...]
    gated: str | None = None
    licence: str | None = None

    def snapshot(self, folder: RepositoryFolder) -> Snapshot:
        """Return the snapshot that the manifest describes."""
        files = tuple(
            SnapshotFile(
                path=file.path,
                size=file.size,
                sha256=file.blob_name if len(file.blob_name) == 64 else None,
                git_sha1=file.blob_name if len(file.blob_name) == 40 else None,
            )
            for file in self.files
        )
        return Snapshot(self.repo_id, self.commit, folder.snapshot(self.commit), files)


def make_manifest(
    folder: RepositoryFolder, commit: str, key: str, files: Sequence[RepositoryFile], **facts: str | None
) -> Manifest:
    """Return the manifest of files of a snapshot that are there and have their hashes."""
    place = folder.snapshot(commit)
    entries = (
        ManifestFile(file.path, file.size or 0, str(file.blob_name), (place / file.path).stat().st_mtime_ns)
        for file in sorted(files, key=lambda file: file.path)
    )
    return Manifest(folder.repo_id, commit, key, tuple(entries), **facts)


def write_manifest(folder: RepositoryFolder, manifest: Manifest) -> None:
    """Publish a manifest. From then on its snapshot is complete."""
    text = json.dumps({"format": FORMAT, **asdict(manifest)}, indent=1)
    folder.write(folder.manifest(manifest.commit, manifest.key), text)


def read_manifest(place: Path) -> Manifest | None:
    """Return the manifest at a place, or None if there is none that can be read."""
    try:
        values: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
        if values.pop("format") != FORMAT:
            return None
        return Manifest(**{**values, "files": tuple(ManifestFile(**file) for file in values["files"])})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def find_complete(folder: RepositoryFolder, commit: str, key: str) -> Manifest | None:
    """Return the manifest of a selection if each of its files is there unchanged, and note that it was used."""
    manifest = read_manifest(folder.manifest(commit, key))
    if manifest is None or manifest.commit != commit or not manifest.files:
        return None
    found = (_check_file(folder.snapshot(commit) / file.path, file) for file in manifest.files)
    files = tuple(file for file in found if file is not None)
    if len(files) < len(manifest.files):
        return None
    with suppress(OSError):
        # A store that is only readable is good enough to read from.
        if files != manifest.files:
            write_manifest(folder, replace(manifest, files=files))
    note_use(folder.snapshot(commit))
    return manifest


def _check_file(place: Path, file: ManifestFile) -> ManifestFile | None:
    """Return the entry of a file with the time of its change as it is now, or None if its content is another."""
    try:
        found = place.stat()
    except OSError:
        return None
    if found.st_mtime_ns == file.mtime_ns and found.st_size == file.size:
        return file
    # Copied or changed since it was verified.
    return replace(file, mtime_ns=found.st_mtime_ns) if has_content(place, file.size, file.blob_name) else None


def adopt_snapshot(folder: RepositoryFolder, commit: str, selection: Selection) -> Manifest | None:
    """Return the manifest of a snapshot that another tool has downloaded, once its files have their hashes.

    It is for work offline: what the repository holds is not known then, so weights, configuration and tokenizer must
    be there. The names of the blobs are the hashes.
    """
    place = folder.snapshot(commit)
    found = _files_of(folder, place).items()
    files = [RepositoryFile(path, size, name) for path, (name, size) in found if ETAG.fullmatch(name)]
    try:
        chosen = selection.choose(files, lambda path: (place / path).read_bytes())
    except HubError:
        return None
    paths = {file.path for file in chosen}
    if selection.backend != ADAPTER and not ("config.json" in paths and paths & _TOKENIZERS):
        return None
    if selection.trust_remote_code and not any(path.endswith(".py") for path in paths):
        with suppress(OSError, ValueError):
            if "auto_map" in json.loads((place / "config.json").read_text(encoding="utf-8")):
                return None
    return verify_files(folder, commit, selection.key, chosen)


def verify_files(
    folder: RepositoryFolder, commit: str, key: str, chosen: Sequence[RepositoryFile], **facts: str | None
) -> Manifest | None:
    """Return the manifest of files of a snapshot that are there and have their hashes; None if one has not.

    It is kept where the cache can be written, so that the files are read once.
    """
    try:  # before they are read, since a copy may be written to meanwhile
        manifest = make_manifest(folder, commit, key, chosen, **facts)
    except OSError:
        return None
    for file in chosen:
        if not has_content(folder.snapshot(commit) / file.path, file.size or 0, str(file.blob_name)):
            logger.warning("%s of %s does not have its hash. Download the model again.", file.path, folder.repo_id)
            return None
    logger.info("Verified %d files of %s at %s that were in the cache.", len(chosen), folder.repo_id, commit)
    with suppress(OSError):
        write_manifest(folder, manifest)
    return manifest


def manifests_of(folder: RepositoryFolder) -> Iterator[Manifest]:
    """Yield all manifests of a repository."""
    for place in sorted((folder.path / "manifests").glob("*.json")):
        manifest = read_manifest(place)
        if manifest is not None:
            yield manifest


def known_licence(snapshot: Path) -> str | None:
    """Return the licence of a snapshot of the cache as its model card names it, if that is known."""
    places = (snapshot.parent.parent / "manifests").glob(f"{snapshot.name}-*.json")
    return next((found.licence for found in map(read_manifest, places) if found and found.licence), None)


def verified_blobs(folder: RepositoryFolder) -> dict[str, int]:
    """Return the time of the last change (ns) of each blob when it was verified."""
    return {file.blob_name: file.mtime_ns for manifest in manifests_of(folder) for file in manifest.files}


def known_commit(folder: RepositoryFolder, revision: str) -> str | None:
    """Return the commit of a branch, a tag or the beginning of a commit as far as this machine knows it."""
    with suppress(OSError):
        return folder.reference(revision).read_text(encoding="utf-8").strip()
    if COMMIT.fullmatch(revision):
        return revision
    if len(revision) < 7:
        return None
    matching = {place.name for place in (folder.path / "snapshots").glob(f"{revision}*")}
    return matching.pop() if len(matching) == 1 else None


@dataclass(frozen=True, slots=True)
class StoredSnapshot:
    """One snapshot with files that this library has downloaded, complete or not.

    Attributes:
        repo_id: Repository.
        commit: Commit.
        path: Folder of the snapshot.
        root: Cache folder that it is in; each Hub has its own.
        size_bytes: Size of its files.
        contents: Sizes of the blobs that this library has downloaded and that are in it, by their places.
        freed_bytes: What its removal would free; files that other snapshots share stay, and those of other tools.
        last_used: Time of its last use (seconds since 1970).
        complete: Whether it has a manifest.
    """

    repo_id: str
    commit: str
    path: Path
    root: Path
    size_bytes: int
    contents: dict[Path, int]
    freed_bytes: int
    last_used: float
    complete: bool


def list_snapshots(store: ModelStore) -> list[StoredSnapshot]:
    """Return the snapshots of all Hubs that this library has downloaded, the least recently used first."""
    found = [snapshot for folder in _repositories(store) for snapshot in _snapshots(folder)]
    return sorted(found, key=lambda snapshot: snapshot.last_used)


def _repositories(store: ModelStore) -> Iterator[RepositoryFolder]:
    for root in sorted({store.hub_cache, store.folder / "hub", *store.folder.glob("hub@*")}):
        for path in sorted(root.glob("models--*")):
            yield RepositoryFolder(root, path.name.removeprefix("models--").replace("--", "/"))


def _snapshots(folder: RepositoryFolder) -> Iterator[StoredSnapshot]:
    if not (folder.path / "downloaded").is_dir():
        return
    contents = {place: _files_of(folder, place) for place in sorted((folder.path / "snapshots").glob("*"))}
    with_manifest = {manifest.commit for manifest in manifests_of(folder)}
    for place, files in contents.items():
        others = {name for other, more in contents.items() if other != place for name, _ in more.values()}
        marks = _marks(folder, place.name)
        own = {name: size for name, size in files.values() if name in marks}
        if not own:
            continue
        yield StoredSnapshot(
            repo_id=folder.repo_id,
            commit=place.name,
            path=place,
            root=folder.root,
            size_bytes=sum(size for _, size in files.values()),
            contents={folder.blob(name): size for name, size in own.items()},
            freed_bytes=sum(size for name, size in own.items() if name not in others),
            last_used=last_used(place),
            complete=place.name in with_manifest,
        )


def _marks(folder: RepositoryFolder, commit: str) -> set[str]:
    """Return the names of the contents that this library has downloaded for a snapshot."""
    return {mark.name for mark in (folder.path / "downloaded" / commit).glob("*")}


def _files_of(folder: RepositoryFolder, place: Path) -> dict[str, tuple[str, int]]:
    """Return the name of the blob and the size of each file of a snapshot. Copies have the names of a manifest.

    A file that is neither, of another tool or a person, has an empty name.
    """
    found: dict[str, tuple[str, int]] = {}
    known: dict[str, str] | None = None
    for file in sorted(place.rglob("*")):
        with suppress(OSError):
            if not file.is_file() or file.name == LEASE:
                continue
            path, size = file.relative_to(place).as_posix(), file.stat().st_size
            if file.is_symlink():
                found[path] = (Path(os.readlink(file)).name, size)
                continue
            if known is None:
                own = (manifest for manifest in manifests_of(folder) if manifest.commit == place.name)
                known = {entry.path: entry.blob_name for manifest in own for entry in manifest.files}
            found[path] = (known.get(path, ""), size)
    return found


def remove_snapshot(snapshot: StoredSnapshot) -> int:
    """Remove what this library has downloaded of a snapshot and no other one shares; return the freed bytes.

    Raises:
        StoreBusyError: If it is in use or being downloaded. Nothing is removed then.
    """
    folder = RepositoryFolder(snapshot.root, snapshot.repo_id)
    text = f"Snapshot {snapshot.commit[:12]!r} of {snapshot.repo_id!r} is in use. Remove it when its users have ended."
    in_use = StoreBusyError(text, repo_id=snapshot.repo_id)
    lease = take_free(lease_path(snapshot.path))
    if lease is None:
        raise in_use
    try:
        with lease, folder.lock(REPOSITORY_LOCK, timeout_seconds=0.0):
            return _remove(folder, snapshot)
    except StoreBusyError:
        raise in_use from None


def _remove(folder: RepositoryFolder, snapshot: StoredSnapshot) -> int:
    """Remove the proof of completeness first and the contents last, so that no state between is taken for whole."""
    files, marks = _files_of(folder, snapshot.path), _marks(folder, snapshot.commit)
    own = {path: name for path, (name, _) in files.items() if name in marks}
    for manifest in (folder.path / "manifests").glob(f"{snapshot.commit}-*.json"):
        manifest.unlink(missing_ok=True)
    if len(own) == len(files):
        # Of other tools, nothing is in it.
        for reference in (folder.path / "refs").rglob("*"):
            if reference.is_file() and reference.read_text(encoding="utf-8").strip() == snapshot.commit:
                reference.unlink(missing_ok=True)
        shutil.rmtree(snapshot.path, ignore_errors=True)
    for path in own:
        (snapshot.path / path).unlink(missing_ok=True)
    others = (place for place in (folder.path / "snapshots").glob("*") if place != snapshot.path)
    shared = {name for place in others for name, _ in _files_of(folder, place).values()}
    freed = sum(_remove_blob(folder, name) for name in set(own.values()) - shared)
    shutil.rmtree(folder.path / "downloaded" / snapshot.commit, ignore_errors=True)
    lease_path(snapshot.path).unlink(missing_ok=True)
    return freed


def _remove_blob(folder: RepositoryFolder, name: str) -> int:
    with suppress(OSError):
        size = folder.blob(name).stat().st_size
        folder.blob(name).unlink()
        return size
    return 0


def remove_partials(store: ModelStore, unused_seconds: float = 7 * 24 * 3600.0) -> int:
    """Remove contents that were never completed and have not grown for so long; return the number of freed bytes.

    So do blobs that this library has downloaded for a snapshot that it never finished. Those of other tools stay.
    """
    freed, oldest = 0, time.time() - unused_seconds
    for folder in _repositories(store):
        for place in (folder.path / "partials").glob("*"):
            with suppress(OSError):
                found = place.lstat()
                if found.st_mtime < oldest:
                    place.unlink()
                    freed += found.st_size
        with suppress(OSError, StoreBusyError):
            if _old_marks(folder, oldest):
                with folder.lock(REPOSITORY_LOCK, timeout_seconds=0.0):
                    freed += _remove_unfinished(folder, oldest)
    return freed


def _old_marks(folder: RepositoryFolder, oldest: float) -> list[Path]:
    return [mark for mark in (folder.path / "downloaded").glob("*/*") if mark.stat().st_mtime < oldest]


def _remove_unfinished(folder: RepositoryFolder, oldest: float) -> int:
    """Remove blobs that were downloaded before a time for a snapshot that was never finished, nor is now."""
    marks = _old_marks(folder, oldest)
    places = (folder.path / "snapshots").glob("*") if marks else ()
    used = {name for place in places for name, _ in _files_of(folder, place).values()}
    freed = 0
    for mark in marks:
        if mark.name not in used:
            freed += _remove_blob(folder, mark.name)
            mark.unlink(missing_ok=True)
    return freed
