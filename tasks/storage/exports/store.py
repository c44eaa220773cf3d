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

import json
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from prefect_huggingface.blocks import LocalModel
from prefect_huggingface.tasks.errors import ExportError
from prefect_huggingface.tasks.records import Export, Snapshot
from prefect_huggingface.tasks.run_logs import run_log
from prefect_huggingface.tasks.storage.eviction import make_room
from prefect_huggingface.tasks.storage.exports.child import run_export
from prefect_huggingface.tasks.storage.exports.plan import (
    ExportPlan,
    check_openvino_folder,
    check_plan,
    describe_snapshot,
    describe_source,
    known_source,
    make_plan,
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
    gigabytes,
    hash_file,
    not_writable,
    open_staging,
    publish,
    sweep_staging,
    write_file,
)
from prefect_huggingface.tasks.storage.folders import is_openvino_folder
from prefect_huggingface.tasks.storage.hub.cache import known_licence
from prefect_huggingface.tasks.storage.hub.download import plan_snapshot
from prefect_huggingface.tasks.storage.locks import hold_export, note_use
from prefect_huggingface.tasks.storage.snapshots import get_snapshot, hash_files
from prefect_huggingface.tasks.waiting import WaitNotice, file_held, holder_of

KEY_DIGITS = 16
CARD = "README.md"
"""Model card of an export. It is for people, so that it may change: it is not in the manifest."""
HASHES = ".hashes.json"
"""Hashes of the files of an export, remembered in its folder."""
Run = Callable[[Snapshot, Recipe, Path, int], Mapping[str, Any]]
"""Makes an export of a snapshot by a recipe in a work folder; the last argument is the lock that a child inherits."""


def lock_path(store: Path, key: str) -> Path:
    """Return the path of the lock of one export."""
    return exports_folder(store) / ".locks" / f"{key[:KEY_DIGITS]}.lock"


def export_name(model_name: str, weight_format: str, key: str) -> str:
    """Return the name of the folder of an export; the repository id or folder of its source is for people to read."""
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
    """Everything that is known about one export: the fields of `Export`, and more.

    Attributes:
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

    def export(self, folder: Path, reused: bool) -> Export:
        """Return the record of the export in a folder."""
        return Export(
            key=self.key, path=folder, recipe=self.recipe, source=self.source, commit=self.commit,
            versions=self.versions, size_bytes=sum(int(entry["size"]) for entry in self.files.values()),
            seconds=float(self.seconds.get("total", 0.0)), reused=reused,
        )  # fmt: skip


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Return size and sha256 of each file of a folder, in the order of the paths. Hidden files are left out."""
    paths = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    names = [path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts)]
    hashes = hash_files(folder, [name for name in names if name not in (MANIFEST, CARD)], folder / HASHES)
    return {name: {"size": state[0], "sha256": digest} for name, (state, digest) in hashes.items()}


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
    name = str(export.source).rstrip("/").rsplit("/", 1)[-1]
    return "\n".join((
        "---", *head, "---", "", f"# {name} for OpenVINO, {export.recipe.get('weight_format')}", "",
        f"Made by prefect-huggingface from `{export.source}` at commit `{export.commit}`.",
        f"Licence of the source: {licence or 'see its model card'}.", "",
        "## Quality", "", _measured(quality), "", "## Recipe", "", "| Setting | Value |", "|---|---|", *rows, "",
        f"Versions: {versions}.", "",
    ))  # fmt: skip


def _measured(quality: Mapping[str, Any] | None) -> str:
    if quality is None:
        return "Not measured yet: `compare_export` compares it with its source and writes the numbers here."
    if quality.get("ranking") is not None:
        least = quality.get("cosine")
        cosine = "" if least is None else f"the least cosine of a vector is {least:.5f}, and "
        return f"Compared with the source: {cosine}the rank correlation of similarities is {quality['ranking']:.4f}."
    return (
        f"Compared with the source on {quality['positions']} positions, through the engine that answers: the most "
        f"likely next token is the same on {quality['agreement']:.1%}, the perplexity is "
        f"{quality['perplexity_ratio']:.3f} times the source's, and {quality['exact_matches']:.0%} of the greedy "
        "answers are the same."
    )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of an export into its folder."""
    (folder / MANIFEST).write_text(json.dumps(asdict(manifest), indent=1, sort_keys=True) + "\n", encoding="utf-8")


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

    A file is read for its hash where it is not as it was when it was read last: on first use, after a copy, or when
    somebody wrote to it; with `verify`, in any case.
    """
    for name, entry in manifest.files.items():
        try:
            size = os.stat(folder / name).st_size
        except OSError:
            return f"File {name!r} is missing."
        if size != entry["size"]:
            return f"File {name!r} has {size} bytes instead of {entry['size']}."
    try:
        hashes = {} if verify else hash_files(folder, list(manifest.files), folder / HASHES)
        for name, entry in manifest.files.items():
            digest = hashes[name][1] if name in hashes else hash_file(folder / name)
            if digest != entry["sha256"]:
                return f"File {name!r} does not have the content that was exported."
    except OSError as exc:  # another process may just have removed it
        return f"File {exc.filename!r} cannot be read: {exc.strerror}."
    return None


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
    recipe, commit = resolve_recipe(model, None if model.is_local else model.model_id), known_source(model)
    planned = plan_snapshot(model) if commit is None and not model.is_local else None
    commit = planned.commit if planned else commit
    if planned and planned.access == "refused":
        get_snapshot(model)  # it may be here because somebody else fetched it; this user gets the error of the Hub
    # The source may have been evicted since; what was made from it is enough.
    found = None if commit is None else find_export(model.store_path, export_key(commit, recipe), verify)
    if found is not None:
        return found
    source = describe_source(model, planned)
    if source.commit != commit:
        found = find_export(model.store_path, export_key(source.commit, recipe), verify)
    if found is not None:
        return found
    # What the Hub refuses has an error of its own, in the next step.
    is_refused = source.problem is not None and not model.is_gguf
    if source.snapshot is None and not is_refused and not is_openvino_folder(source.files):
        check_plan(make_plan(model, recipe, source))
    snapshot = source.snapshot or get_snapshot(model)
    if snapshot is not source.snapshot:
        source = describe_snapshot(snapshot)
    if is_openvino_folder(source.files):
        return use_openvino_folder(model, snapshot)
    return make_once(model, snapshot, recipe, partial(make_plan, model, recipe, source), run_export, verify)


def make_once(
    model: LocalModel,
    snapshot: Snapshot,
    recipe: Recipe,
    make: Callable[[], ExportPlan],
    run: Run,
    verify: bool = False,
) -> Export:
    """Make an export of a snapshot with `run`, or wait for the process that is making it.

    The plan that `make` returns is checked when nobody else is at it, who would take the memory and the disk. With
    `verify`, an export that somebody has made meanwhile is checked by its hashes.

    Raises:
        PlanError: If the export cannot succeed; nothing was started.
        ExportError: If the export failed, or another process takes too long.
    """
    store, key = model.store_path, export_key(snapshot.commit, recipe)
    path = lock_path(store, key)
    if not path.exists():  # else somebody may be making it, who takes the memory and the disk meanwhile
        plan = make()
        if not _lacks_only_disk(model, plan):
            check_plan(plan)
    longest = model.get_store().lock_timeout_seconds
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        notice = WaitNotice(run_log(), f"Waiting for {holder_of(path)}, which makes the same export {key[:16]}")
        with file_held(FileLock(path), longest, notice), hold_export(snapshot.path):
            found = find_export(store, key, verify)
            if found is not None:
                return found
            plan = make()
            if _lacks_only_disk(model, plan):
                make_room(model.get_store(), snapshot.path, plan.disk_bytes)
                plan = make()
            check_plan(plan)
            made = make_export(store, snapshot, recipe, plan, run)
            make_room(model.get_store(), made.path)
            return made
    except Timeout:
        raise ExportError(
            f"Another process has been making the export {key[:16]} for {longest:g} seconds. "
            "Wait for it, or set a longer `lock_timeout_seconds` of the store."
        ) from None
    except OSError as error:
        raise not_writable(store, error) from None


def _lacks_only_disk(model: LocalModel, plan: ExportPlan) -> bool:
    """Return whether nothing but disk is missing, in a store with a limit, which may make room."""
    is_short = plan.disk_bytes > plan.free_disk_bytes and len(plan.problems) == 1
    return is_short and model.get_store().max_size_gb is not None


def use_openvino_folder(model: LocalModel, snapshot: Snapshot) -> Export:
    """Return the record of an OpenVINO model that is used as it is.

    Raises:
        PlanError: If it would have to be quantized once more for the weight format of the model.
    """
    check_openvino_folder(model, snapshot)
    source, size = snapshot.repo_id or str(snapshot.path), sum(file.size for file in snapshot.files)
    commit = snapshot.commit
    return Export(commit, snapshot.path, source=source, commit=commit, size_bytes=size, reused=True)


def find_export(store: Path, key: str, verify: bool = False) -> Export | None:
    """Return an export of the store, or None if it is not there or is damaged; note its use.

    With `verify`, its hashes are checked in any case.
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
    return manifest.export(folder, reused=True)


def make_export(store: Path, snapshot: Snapshot, recipe: Recipe, plan: ExportPlan, run: Run) -> Export:
    """Make an export and publish it. The caller holds the lock of its key.

    Raises:
        ExportError: If the export failed; nothing was published.
    """
    log, started, source = run_log(), time.monotonic(), plan.source
    sweep_staging(store)
    # One line, with the notes in it: an export has one line for each step, and these two.
    into = "a checkpoint" if recipe.task == "checkpoint" else f"OpenVINO in {recipe.weight_format}"
    log.info("%s", " ".join((f"Exporting {source} to {into}.", *plan.notes)))
    for warning in plan.warnings:
        log.warning("%s", warning)
    with open_staging(store) as staging:
        report = run(snapshot, recipe, staging.path, staging.descriptor)
        seconds = {**report["seconds"], "total": time.monotonic() - started}
        output = staging.path / "output"
        manifest = Manifest(
            plan.key, source, snapshot.commit, recipe.as_dict(), export_versions(), describe_files(output),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds={name: round(value, 3) for name, value in seconds.items()},
            peak_memory_bytes=report["peak_memory_bytes"], weights=report["weights"], notes=plan.notes,
        )  # fmt: skip
        write_manifest(output, manifest)
        card = model_card(manifest.export(output, reused=False), known_licence(snapshot.path))
        write_file(output / CARD, card.encode())
        folder = exports_folder(store) / export_name(source, recipe.weight_format, plan.key)
        old = find_export_folder(store, plan.key)
        if old is not None:
            discard(store, old)
        publish(output, folder)
    made = manifest.export(folder, reused=False)
    log.info("Exported %s in %.1f s: %s in %s", source, manifest.seconds["total"], gigabytes(made.size_bytes), folder)
    return made
