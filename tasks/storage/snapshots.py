"""Snapshots: where the files of a model are, whether they come from a folder or from the Hub."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from contextlib import suppress
from pathlib import Path

from prefect_huggingface.blocks import LocalModel
from prefect_huggingface.tasks.errors import ModelSourceError
from prefect_huggingface.tasks.hub_errors import PickleOnlyError, UnusableRepositoryError
from prefect_huggingface.tasks.records import Snapshot, SnapshotFile
from prefect_huggingface.tasks.storage.files import hash_file, write_file
from prefect_huggingface.tasks.storage.folders import find_pointer, is_openvino_folder, list_files
from prefect_huggingface.tasks.storage.hub.cache import Selection
from prefect_huggingface.tasks.storage.hub.client import RepositoryFile

FileState = tuple[int, int, int, int]
"""Size in bytes, times of the last change of content and of inode in nanoseconds, and number of the inode."""
# A file that was written this short a time ago may be written again without a new time of change.
SETTLED_SECONDS = 2.0
_HASHES: dict[Path, dict[str, tuple[FileState, str]]] = {}
_LOCK = threading.Lock()


def get_snapshot(model: LocalModel) -> Snapshot:
    """Return the snapshot of a model; download it first where needed.

    Raises:
        ModelSourceError: If the model is a folder that is missing or holds no model.
        DownloadError: If the model is on the Hub and cannot be had.
    """
    if model.is_gguf:
        from prefect_huggingface.tasks.storage.gguf_files import snapshot_gguf

        return snapshot_gguf(model)
    if model.is_local:
        return snapshot_folder(model)
    from prefect_huggingface.tasks.storage.hub.download import fetch_snapshot

    return fetch_snapshot(model)


def snapshot_folder(model: LocalModel) -> Snapshot:
    """Return the snapshot of a local folder. Its commit is `local-<sha256>` of what the files contain.

    The hashes are remembered, so asking again reads no file that has not changed.

    Args:
        model: Model whose id is a folder, with a checkpoint or an OpenVINO model.

    Raises:
        ModelSourceError: If the folder is missing or holds no model that the backend can load.
    """
    folder = Path(model.model_id)
    if not folder.is_dir():
        raise ModelSourceError(f"Model folder {model.model_id!r} does not exist. Correct `model_id` of the block.")
    names = _choose_files(model, folder)
    if missing := [name for name in names if not (folder / name).exists()]:
        raise ModelSourceError(
            f"File {missing[0]!r} in folder {model.model_id!r} is a link to nothing. Download the model again."
        )
    pointer = find_pointer(folder, names)
    if pointer is not None:
        raise ModelSourceError(
            f"File {pointer!r} in folder {model.model_id!r} is a pointer of Git LFS in place of its content. "
            "Run `git lfs pull` there, or give the id of the repository as `model_id`."
        )
    hashes = hash_files(folder, names, hash_cache_path(model.store_path, folder))
    files = tuple(SnapshotFile(name, state[0], sha256=digest) for name, (state, digest) in hashes.items())
    content = json.dumps([[file.path, file.size, file.sha256] for file in files])
    commit = f"local-{hashlib.sha256(content.encode()).hexdigest()}"
    return Snapshot(repo_id=None, commit=commit, path=folder, files=files)


def _choose_files(model: LocalModel, folder: Path) -> list[str]:
    """Return the files that the model needs, by the same rules as those of a repository of the Hub.

    Raises:
        ModelSourceError: If the folder holds no model, or not the kind that the backend loads.
    """

    def read(name: str) -> bytes:
        with suppress(OSError):
            return (folder / name).read_bytes()
        return b""

    names, where = list_files(folder), f"Folder {model.model_id!r}"
    backend = model.backend if is_openvino_folder(names) else "torch"
    selection = Selection(model.model_id, backend, model.allow_pickle, model.trust_remote_code)
    try:
        chosen = [file.path for file in selection.choose([RepositoryFile(name) for name in names], read)]
    except PickleOnlyError:
        raise ModelSourceError(
            f"{where} holds weights in pickle format only, and loading those can run any code. "
            "Convert them to safetensors, or set `allow_pickle=True` if you trust them."
        ) from None
    except UnusableRepositoryError as error:
        raise ModelSourceError(f"Folder {error.message}") from None
    if "config.json" not in chosen and not is_openvino_folder(chosen):
        raise ModelSourceError(f"{where} holds no model, `config.json` is missing. Correct `model_id` of the block.")
    return chosen


def hash_cache_path(store: Path, folder: Path) -> Path:
    """Return the path of the remembered hashes of a local folder."""
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()
    return store / "hashes" / f"{digest[:32]}.json"


def hash_files(folder: Path, names: list[str], cache_path: Path) -> dict[str, tuple[FileState, str]]:
    """Return state and sha256 of each file; read only the files that are not remembered as they are now.

    Args:
        folder: Folder of the files.
        names: Their names.
        cache_path: File in the store that remembers the hashes of these files.
    """
    with _LOCK:
        known = _HASHES.get(cache_path)
    if known is None:
        known = _read_cache(cache_path)
    hashes = {}
    for name in names:
        state = _file_state(folder / name)
        remembered = known.get(name)
        if remembered is not None and remembered[0] == state:
            hashes[name] = remembered
        else:
            hashes[name] = (state, hash_file(folder / name))
    newest_safe = time.time_ns() - int(SETTLED_SECONDS * 1e9)
    settled = {name: entry for name, entry in hashes.items() if max(entry[0][1:3]) < newest_safe}
    if settled != known:
        with _LOCK:
            _HASHES[cache_path] = settled
        _write_cache(cache_path, settled)
    return hashes


def _file_state(path: Path) -> FileState:
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def _read_cache(path: Path) -> dict[str, tuple[FileState, str]]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return {name: ((*state,), digest) for name, (state, digest) in data.items()}
    except (OSError, ValueError, TypeError):
        return {}


def _write_cache(path: Path, hashes: dict[str, tuple[FileState, str]]) -> None:
    # Without the cache the files are read again; a store that cannot be written to is not an error here.
    with suppress(OSError):
        write_file(path, json.dumps(hashes).encode())
