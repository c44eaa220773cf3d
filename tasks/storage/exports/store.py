"""Where exports lie in a store, and what their folders are called.

```
<store>/exports/<name>-<format>-<first 16 digits of the key>/   one export, whole
<store>/exports/.staging/<random>/                              an export in the making, renamed when it is whole
<store>/exports/.locks/<first 16 digits of the key>.lock        held by the process that makes the export
<store>/exports/.logs/<what>-<when>.log                         output of a child process that failed
<store>/hashes/<digest of the folder's path>.json               hashes of the files of a local folder
```

The name and the format are for people. An export is found by its key alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from prefect_huggingface.blocks import LocalModel
from prefect_huggingface.tasks.errors import ExportError
from prefect_huggingface.tasks.records import Export, Snapshot
from prefect_huggingface.tasks.run_logs import run_log
from prefect_huggingface.tasks.storage.eviction import evict
from prefect_huggingface.tasks.storage.exports.child import run_export
from prefect_huggingface.tasks.storage.exports.plan import (
    ExportPlan,
    check_openvino_folder,
    check_plan,
    check_source,
    gigabytes,
    make_plan,
    plan_source,
)
from prefect_huggingface.tasks.storage.exports.recipes import (
    SCHEMA,
    Recipe,
    export_key,
    export_versions,
    resolve_recipe,
)
from prefect_huggingface.tasks.storage.files import (
    MANIFEST,
    discard,
    exports_folder,
    hash_file,
    not_writable,
    open_staging,
    publish,
    sweep_staging,
    write_text,
)
from prefect_huggingface.tasks.storage.folders import is_openvino_folder, measure_weights, read_json
from prefect_huggingface.tasks.storage.gguf_files import describe_gguf, gguf_commit
from prefect_huggingface.tasks.storage.hub.cache import known_licence
from prefect_huggingface.tasks.storage.locks import hold_export, note_use
from prefect_huggingface.tasks.storage.snapshots import get_snapshot
from prefect_huggingface.tasks.waiting import WaitNotice, file_held, holder_of

KEY_DIGITS = 16
CARD = "README.md"
"""Model card of an export. It is for people, so that it may change: it is not in the manifest."""
LEASE = ".lease"
# What this process has checked, for stores that it cannot write to.
_CHECKED: dict[Path, dict[str, list[int]]] = {}
Run = Callable[[Snapshot, Recipe, Path, int], Mapping[str, Any]]
"""Makes an export of a snapshot by a recipe in a work folder; the last argument is the lock that a child inherits."""


def lock_path(store: Path, key: str) -> Path:
    """Return the path of the lock of one export."""
    return exports_folder(store) / ".locks" / f"{key[:KEY_DIGITS]}.lock"


def export_name(model_name: str, weight_format: str, key: str) -> str:
    """Return the name of the folder of an export.

    Args:
        model_name: Repository id or folder of the source, for people to read.
        weight_format: Format of the weights.
        key: Key of the export, 64 hexadecimal digits.
    """
    last = model_name.rstrip("/").rsplit("/", 1)[-1]
    readable = re.sub(r"[^A-Za-z0-9_.]+", "-", last).strip("-.")[:48] or "model"
    return f"{readable}-{weight_format}-{key[:KEY_DIGITS]}"


def find_export_folder(store: Path, key: str) -> Path | None:
    """Return the folder of an export, or None if the store has none with the key."""
    ending = f"-{key[:KEY_DIGITS]}"
    try:
        names = os.listdir(exports_folder(store))
    except OSError:
        return None
    return next((exports_folder(store) / name for name in sorted(names) if name.endswith(ending)), None)


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


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Return size and sha256 of each file of a folder, in the order of the paths. Hidden files are left out."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if (
            path.is_file()
            and name not in (MANIFEST, CARD)
            and not any(part.startswith(".") for part in name.split("/"))
        ):
            found[name] = {"size": path.stat().st_size, "sha256": hash_file(path)}
    return found


def model_card(export: Export, licence: str | None = None, quality: Mapping[str, Any] | None = None) -> str:
    """Return the model card of an export: what it was made of, how, under which licence, and how good it is."""
    on_hub = export.source is not None and not Path(export.source).is_absolute()
    head = ["library_name: openvino", "tags: [openvino, nncf]"]
    head += [f"base_model: {export.source}"] if on_hub else []
    head += [f"license: {licence}"] if licence else []
    settings = {**export.recipe, **(export.recipe.get("quantization") or {})}
    settings.pop("quantization", None)
    rows = [f"| {name} | `{value}` |" for name, value in settings.items() if value is not None]
    versions = ", ".join(f"{package} {version}" for package, version in export.versions.items())
    measured = _measured(quality)
    name = str(export.source).rstrip("/").rsplit("/", 1)[-1]
    return "\n".join((
        "---", *head, "---", "", f"# {name} for OpenVINO, {export.recipe.get('weight_format')}", "",
        f"Made by prefect-huggingface from `{export.source}` at commit `{export.commit}`.",
        f"Licence of the source: {licence or 'see its model card'}.", "",
        "## Quality", "", measured, "", "## Recipe", "", "| Setting | Value |", "|---|---|", *rows, "",
        f"Versions: {versions}.", "",
    ))  # fmt: skip


def _measured(quality: Mapping[str, Any] | None) -> str:
    if quality is None:
        return "Not measured yet: `compare_export` compares it with its source and writes the numbers here."
    if quality.get("ranking") is not None:
        cosine = (
            "" if quality.get("cosine") is None else f"the least cosine of a vector is {quality['cosine']:.5f}, and "
        )
        return f"Compared with the source: {cosine}the rank correlation of similarities is {quality['ranking']:.4f}."
    return (
        f"Compared with the source on {quality['positions']} positions, through the engine that answers: the most "
        f"likely next token is the same on {quality['agreement']:.1%}, the perplexity is "
        f"{quality['perplexity_ratio']:.3f} times the source's, and {quality['exact_matches']:.0%} of the greedy "
        "answers are the same."
    )


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


def remember_state(folder: Path, state: dict[str, list[int]]) -> None:
    """Note that the hashes of an export are right on this machine with the files as they are."""
    _CHECKED[folder] = state
    with suppress(OSError):
        write_text(folder / f".checked-{machine_id()}.json", json.dumps(state))


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


def get_export(model: LocalModel, verify: bool = False) -> Export:
    """Return the OpenVINO export of a model; make it if it is not there.

    A folder or repository that holds an OpenVINO model is used as it is.

    Args:
        model: Model with backend "openvino".
        verify: Check the hashes of an export that is there, also if nothing seems to have changed.

    Raises:
        ModelSourceError: If the model is a folder that is missing or holds no model.
        DownloadError: If the model is on the Hub and cannot be had.
        PlanError: If the export cannot succeed; nothing was started.
        ExportError: If the export failed; nothing was published.
    """
    repo_id = None if model.is_local else model.model_id
    recipe, versions, store = resolve_recipe(model, repo_id), export_versions(), model.store_path
    if not model.is_local:
        planned = plan_source(model)
        # The source may have been evicted since; what was made from it is enough.
        if planned.commit is not None:
            found = find_export(store, export_key(planned.commit, recipe, versions, SCHEMA), verify=verify)
            if found is not None:
                return found
        check_source(model, recipe, planned)
    elif model.is_gguf:
        # What was made from the file is enough; its checkpoint may have been evicted since.
        commit = gguf_commit(model)
        found = find_export(store, export_key(commit, recipe, versions, SCHEMA), verify=verify)
        if found is not None:
            return found
        source = describe_gguf(model)
        check_plan(make_plan(model, recipe, commit, "", source.config, source.weights))
    snapshot = get_snapshot(model)
    if is_openvino_folder(file.path for file in snapshot.files):
        return use_openvino_folder(model, snapshot)
    key = export_key(snapshot.commit, recipe, versions, SCHEMA)
    found = find_export(store, key, verify=verify)
    if found is not None:
        return found
    names, config = [file.path for file in snapshot.files], read_json(snapshot.path / "config.json")
    weights = measure_weights(snapshot.path, names)
    plan = make_plan(model, recipe, snapshot.commit, key, config, weights, names)
    return make_once(model, snapshot, recipe, plan, run_export)


def make_once(model: LocalModel, snapshot: Snapshot, recipe: Recipe, plan: ExportPlan, run: Run) -> Export:
    """Make an export, or wait for the process that is making it.

    Args:
        model: Model with its store.
        snapshot: Source of the export.
        recipe: Every setting.
        plan: Plan of the export, with its key.
        run: Makes the export in a work folder.

    Raises:
        PlanError: If the export cannot succeed; nothing was started.
        ExportError: If the export failed, or another process takes too long.
    """
    store, key = model.store_path, plan.key
    path = lock_path(store, key)
    check_plan(plan)
    longest = model.get_store().lock_timeout_seconds
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        notice = WaitNotice(run_log(), f"Waiting for {holder_of(path)}, which makes the same export {key[:16]}")
        with file_held(FileLock(path), longest, notice), hold_export(snapshot.path):
            found = find_export(store, key)
            if found is not None:
                return found
            made = make_export(store, snapshot, recipe, plan, run)
            keep_within_budget(model, made)
            return made
    except Timeout:
        raise ExportError(
            f"Another process has been making the export {key[:16]} for {longest:g} seconds. "
            "Wait for it, or set a longer `lock_timeout_seconds` of the store."
        ) from None
    except OSError as error:
        raise not_writable(store, error) from None


def keep_within_budget(model: LocalModel, made: Export) -> None:
    """Remove the least recently used models beyond the size limit of the store, but not what was just made."""
    limit = model.get_store().max_size_gb
    if limit is None:
        return
    report = evict(model.get_store(), int(limit * 1e9), keep=[made.path])
    for entry in report.removed:
        run_log().info("Removed %s %s (%s) from the store.", entry.kind, entry.name, gigabytes(entry.size_bytes))
    if report.kept_bytes > limit * 1e9:
        run_log().warning("The store holds %s, more than its %g GB.", gigabytes(report.kept_bytes), limit)


def use_openvino_folder(model: LocalModel, snapshot: Snapshot) -> Export:
    """Return the record of an OpenVINO model that is used as it is.

    Raises:
        PlanError: If it would have to be quantized once more for the weight format of the model.
    """
    check_openvino_folder(model, snapshot)
    return Export(
        key=snapshot.commit,
        path=snapshot.path,
        source=snapshot.repo_id or str(snapshot.path),
        commit=snapshot.commit,
        size_bytes=sum(file.size for file in snapshot.files),
        reused=True,
    )


def find_export(store: Path, key: str, verify: bool = False) -> Export | None:
    """Return an export of the store, or None if it is not there or is damaged. Note its use.

    Args:
        store: Folder of the store.
        key: Key of the export.
        verify: Check the hashes in any case.
    """
    folder = find_export_folder(store, key)
    manifest = None if folder is None else read_manifest(folder)
    if folder is None or manifest is None or manifest.key != key:
        return None
    damage = find_damage(folder, manifest, verify=verify)
    if damage is not None:
        run_log().warning("The export %s is damaged and is made anew. %s", folder.name, damage)
        return None
    note_use(folder)
    return as_export(folder, manifest, reused=True)


def make_export(store: Path, snapshot: Snapshot, recipe: Recipe, plan: ExportPlan, run: Run) -> Export:
    """Make an export and publish it. The caller holds the lock of its key.

    Raises:
        ExportError: If the export failed; nothing was published.
    """
    log = run_log()
    started = time.monotonic()
    sweep_staging(store)
    source = plan.source
    # One line, with the notes in it: an export has one line for each step, and these two.
    into = "a checkpoint" if recipe.task == "checkpoint" else f"OpenVINO in {recipe.weight_format}"
    log.info("%s", " ".join((f"Exporting {source} to {into}.", *plan.notes)))
    for warning in plan.warnings:
        log.warning("%s", warning)
    with open_staging(store) as staging:
        report = run(snapshot, recipe, staging.path, staging.descriptor)
        output = staging.path / "output"
        manifest = Manifest(
            key=plan.key,
            source=source,
            commit=snapshot.commit,
            recipe=recipe.as_dict(),
            versions=export_versions(),
            files=describe_files(output),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=_rounded({**report["seconds"], "total": time.monotonic() - started}),
            peak_memory_bytes=report["peak_memory_bytes"],
            weights=report["weights"],
            notes=plan.notes,
        )
        write_manifest(output, manifest)
        card = model_card(as_export(output, manifest, reused=False), known_licence(snapshot.path))
        write_text(output / CARD, card)
        folder = exports_folder(store) / export_name(source, recipe.weight_format, plan.key)
        old = find_export_folder(store, plan.key)
        if old is not None:
            discard(store, old)
        publish(output, folder)
    remember_state(folder, file_state(folder, manifest))
    made = as_export(folder, manifest, reused=False)
    log.info("Exported %s in %.1f s: %s in %s", source, manifest.seconds["total"], gigabytes(made.size_bytes), folder)
    return made


def _rounded(seconds: Mapping[str, Any]) -> dict[str, float]:
    return {name: round(float(value), 3) for name, value in seconds.items()}
