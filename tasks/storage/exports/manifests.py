"""Manifests: what an export consists of, and the checks that it still does.

A folder is an export if its manifest is there and fits. The manifest is written last, before the folder gets its name.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from prefect_huggingface.tasks.records import Export
from prefect_huggingface.tasks.storage.exports.layout import MANIFEST

SCHEMA = 1
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything that is known about one export.

    Attributes:
        key: Key of the export, 64 hexadecimal digits.
        source: Repository id, or the folder, that the export was made from.
        commit: Commit of the source, or `local-<sha256>`.
        recipe: Every setting of the export.
        versions: Versions of the packages that made it.
        files: Size in bytes and sha256 of each file, by its path in the folder.
        created: Time of the publication in UTC, ISO 8601.
        seconds: Times of the steps: `export`, `quantize`, `verify`, `total`.
        peak_memory_bytes: Largest resident memory of the process that made it.
        weights: Share of the weights in each data type, between 0 and 1.
        notes: What was decided for the model, in sentences.
    """

    key: str
    source: str
    commit: str
    recipe: Mapping[str, Any]
    versions: Mapping[str, str]
    files: Mapping[str, Mapping[str, Any]]
    created: str
    seconds: Mapping[str, float] = field(default_factory=dict)
    peak_memory_bytes: int = 0
    weights: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    schema: int = SCHEMA

    @property
    def size_bytes(self) -> int:
        """Size of all files of the export."""
        return sum(int(entry["size"]) for entry in self.files.values())


def hash_file(path: Path) -> str:
    """Return the sha256 of a file as hexadecimal digits."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Return size and sha256 of each file of a folder, in the order of the paths. Hidden files are left out."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST and not any(part.startswith(".") for part in name.split("/")):
            found[name] = {"size": path.stat().st_size, "sha256": hash_file(path)}
    return found


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of an export into its folder."""
    text = json.dumps(asdict(manifest), indent=1, sort_keys=True)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a folder, or None if it has none that can be read."""
    try:
        data = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        manifest = Manifest(**{**data, "notes": tuple(data.get("notes", ()))})
    except (OSError, ValueError, TypeError):
        return None
    return manifest if manifest.schema == SCHEMA else None


def find_damage(folder: Path, manifest: Manifest, verify: bool = False) -> str | None:
    """Return a sentence that says what is wrong with an export, or None.

    The sizes are checked always. The hashes are checked when asked for, and when a file is not as this machine has
    seen it when it checked the hashes last: on first use, after a copy, or when somebody wrote to a file.

    Args:
        folder: Folder of the export.
        manifest: Its manifest.
        verify: Check the hashes in any case.
    """
    state: dict[str, list[int]] = {}
    for name, entry in manifest.files.items():
        try:
            stat = os.stat(folder / name)
        except OSError:
            return f"File {name!r} is missing."
        if stat.st_size != entry["size"]:
            return f"File {name!r} has {stat.st_size} bytes instead of {entry['size']}."
        state[name] = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    if not verify and _seen_state(folder) == state:
        return None
    for name, entry in manifest.files.items():
        if hash_file(folder / name) != entry["sha256"]:
            return f"File {name!r} does not have the content that was exported."
    remember_state(folder, state)
    return None


def file_state(folder: Path, manifest: Manifest) -> dict[str, list[int]]:
    """Return size, times of change and inode of each file of an export."""
    state = {}
    for name in manifest.files:
        stat = os.stat(folder / name)
        state[name] = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    return state


# What this process has checked, for stores that it cannot write to.
_CHECKED: dict[Path, dict[str, list[int]]] = {}


def remember_state(folder: Path, state: dict[str, list[int]]) -> None:
    """Note that the hashes of an export are right on this machine with the files as they are."""
    _CHECKED[folder] = state
    path = folder / f".checked-{machine_id()}.json"
    temporary = path.with_suffix(f".{os.getpid()}")
    with suppress(OSError):
        temporary.write_text(json.dumps(state), encoding="utf-8")
        os.replace(temporary, path)


def _seen_state(folder: Path) -> Any:
    if folder in _CHECKED:
        return _CHECKED[folder]
    try:
        return json.loads((folder / f".checked-{machine_id()}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@cache
def machine_id() -> str:
    """Return some digits that tell this machine from others."""
    identity = platform.node()
    with suppress(OSError):
        identity += Path("/etc/machine-id").read_text(encoding="utf-8")
    return hashlib.sha256(identity.encode()).hexdigest()[:12]


def as_export(folder: Path, manifest: Manifest, reused: bool) -> Export:
    """Return the record of an export."""
    return Export(
        key=manifest.key,
        path=folder,
        recipe=manifest.recipe,
        source=manifest.source,
        commit=manifest.commit,
        versions=manifest.versions,
        size_bytes=manifest.size_bytes,
        seconds=float(manifest.seconds.get("total", 0.0)),
        reused=reused,
    )
