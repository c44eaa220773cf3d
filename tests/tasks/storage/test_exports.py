"""The export store: one export for many, whole or not at all, reused for nothing, and never damaged."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from prefect_huggingface.blocks import LocalModel, ModelStore, QuantizationOptions
from prefect_huggingface.tasks.errors import ExportError, ModelSourceError, PlanError
from prefect_huggingface.tasks.exports import plan_model
from prefect_huggingface.tasks.records import Snapshot
from prefect_huggingface.tasks.storage import snapshots
from prefect_huggingface.tasks.storage.exports.plan import describe_snapshot, make_plan
from prefect_huggingface.tasks.storage.exports.recipes import Recipe, resolve_recipe
from prefect_huggingface.tasks.storage.exports.store import HASHES, find_export, get_export, make_once, read_manifest
from prefect_huggingface.tasks.storage.snapshots import get_snapshot
from support.export_requests import flip_byte, published, staged


def copy_of(model: LocalModel, store: Path) -> LocalModel:
    """Return the model with a copy of its store."""
    shutil.copytree(model.store_path, store)
    return model.model_copy(update={"store": ModelStore(path=store)})


def test_an_export_has_a_model_card(exported: LocalModel) -> None:
    export = get_export(exported)
    card = (export.path / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: openvino\n")
    assert all(text in card for text in (str(export.commit), "| weight_format | `int8` |", "Licence", "## Quality"))
    (export.path / "README.md").write_text(card + "A note of a person.\n", encoding="utf-8")
    assert get_export(exported).reused, "a card may be changed"


def test_processes_that_ask_at_once_make_one_export(crowd: tuple[Path, list[dict[str, Any]]]) -> None:
    store, answers = crowd
    assert len({answer["path"] for answer in answers}) == 1
    assert sum(not answer["reused"] for answer in answers) == 1
    assert len([folder for folder in published(store) if "int8" in folder.name]) == 1
    assert staged(store) == []


def test_an_export_is_complete_and_described(exported: LocalModel) -> None:
    export = get_export(exported)
    manifest = read_manifest(export.path)
    assert manifest is not None
    assert manifest.key == export.key
    assert manifest.commit.startswith("local-")
    assert manifest.recipe["quantization"] == {
        "dtype": "int8", "bits": 8, "sym": False, "group_size": -1, "ratio": 1.0,
    }  # fmt: skip
    assert {"optimum-intel", "nncf", "openvino", "transformers", "torch"} <= set(manifest.versions)
    needed = {"openvino_model.xml", "openvino_tokenizer.xml", "openvino_detokenizer.xml", "chat_template.jinja"}
    assert needed <= set(manifest.files)
    assert manifest.weights["u8"] > 0.9
    assert manifest.peak_memory_bytes > 1e8
    assert {"export", "quantize", "verify", "total"} == set(manifest.seconds)
    assert export.size_bytes == sum(entry["size"] for entry in manifest.files.values())
    for path in export.path.glob("*.json"):
        assert ".staging" not in path.read_text(), f"{path.name} names the place where the export was made"


def test_the_second_request_is_fast_and_silent(exported: LocalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    get_export(exported)

    def refuse(*_: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    started = time.thread_time()
    assert get_export(exported).reused
    assert time.thread_time() - started < 0.05


def test_reuse_imports_nothing_heavy(exported: LocalModel) -> None:
    program = (
        "import sys\n"
        "from prefect_huggingface.blocks import LocalModel, ModelStore\n"
        "from prefect_huggingface.tasks.storage.exports.store import get_export\n"
        f"model = LocalModel(model_id={exported.model_id!r}, store=ModelStore(path={str(exported.store_path)!r}))\n"
        "assert get_export(model).reused\n"
        "print([name for name in ('torch', 'transformers', 'optimum', 'nncf', 'openvino') if name in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"


def test_the_name_of_a_folder_changes_nothing(exported: LocalModel, tmp_path: Path) -> None:
    renamed = tmp_path / "Phi-3-mini-4k-instruct"
    shutil.copytree(exported.model_id, renamed)
    again = get_export(exported.model_copy(update={"model_id": str(renamed)}))
    assert again.reused
    assert again.path == get_export(exported).path


def test_a_truncated_file_is_refused(exported: LocalModel, tmp_path: Path) -> None:
    model = copy_of(exported, tmp_path / "store")
    export = get_export(model)
    with open(export.path / "openvino_model.bin", "r+b") as stream:
        stream.truncate(1000)
    assert find_export(model.store_path, export.key) is None


def test_a_flipped_byte_is_refused(exported: LocalModel, tmp_path: Path) -> None:
    model = copy_of(exported, tmp_path / "store")
    export = get_export(model)
    flip_byte(export.path / "openvino_model.bin")
    assert find_export(model.store_path, export.key) is None, "a changed file is noticed without being asked"


def test_hidden_damage_is_found_when_asked_for(exported: LocalModel, tmp_path: Path) -> None:
    """A disk that rots changes a file without a new time of change."""
    model = copy_of(exported, tmp_path / "store")
    export = get_export(model)
    damaged = export.path / "config.json"
    flip_byte(damaged)
    remembered = json.loads((export.path / HASHES).read_text()) if (export.path / HASHES).exists() else {}
    stat = damaged.stat()
    good = json.loads((export.path / "export.json").read_text())["files"]["config.json"]["sha256"]
    remembered["config.json"] = [[stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino], good]
    (export.path / HASHES).write_text(json.dumps(remembered))
    snapshots._HASHES.clear()
    assert find_export(model.store_path, export.key) is not None
    assert find_export(model.store_path, export.key, verify=True) is None
    made: list[Path] = []

    def make(snapshot: Snapshot, recipe: Recipe, work: Path, descriptor: int) -> dict[str, Any]:
        made.append(work)
        raise ExportError("Another one is made.")

    snapshot, recipe = get_snapshot(exported), resolve_recipe(exported, None)
    plan = partial(make_plan, model, recipe, describe_snapshot(snapshot))
    with pytest.raises(ExportError, match="Another one is made"):
        make_once(model, snapshot, recipe, plan, make, verify=True)
    assert len(made) == 1


def test_a_copy_is_checked_when_it_is_first_used(exported: LocalModel, tmp_path: Path) -> None:
    """What a machine has not checked itself, it checks: a byte that was lost on the way is found."""
    export = get_export(exported)
    model = copy_of(exported, tmp_path / "store")
    damaged = model.store_path / "exports" / export.path.name / "openvino_tokenizer.bin"
    times = damaged.stat()
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(damaged, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert find_export(model.store_path, export.key) is None
    damaged.write_bytes(content)
    assert find_export(model.store_path, export.key) is not None


def test_an_openvino_folder_is_used_as_it_is(exported: LocalModel, tmp_path: Path) -> None:
    folder = tmp_path / "given"
    shutil.copytree(get_export(exported).path, folder)
    (folder / "export.json").unlink()
    model = LocalModel(model_id=str(folder), store=ModelStore(path=tmp_path / "store"))
    export = get_export(model)
    assert export.path == folder
    assert export.reused
    assert published(model.store_path) == []


def test_int4_of_an_int8_export_is_refused(exported: LocalModel, tmp_path: Path) -> None:
    model = LocalModel(
        model_id=str(get_export(exported).path), weight_format="int4", store=ModelStore(path=tmp_path / "store")
    )
    with pytest.raises(PlanError, match="8 bits.*not converted to 'int4'"):
        get_export(model)


AWQ = QuantizationOptions(awq=True)
ALL_DEFAULTS = QuantizationOptions(**QuantizationOptions().model_dump())


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        ("u4", {"weight_format": "int4"}, None),
        ("u4", {"weight_format": "int8"}, None),
        ("u4", {"weight_format": None, "quantization": ALL_DEFAULTS}, None),
        ("i4", {"weight_format": "cb4"}, None),
        ("nf4", {"weight_format": "nf4"}, None),
        ("f4e2m1", {"weight_format": "mxfp4"}, None),
        ("f32", {"weight_format": "fp16"}, None),
        ("u4", {"weight_format": "fp32"}, "4 bits.*not converted to 'fp32'"),
        ("u4", {"weight_format": "mxfp4"}, "4 bits.*not converted to 'mxfp4'"),
        ("nf4", {"weight_format": "int4"}, "nf4.*not converted to 'int4'"),
        ("u8", {"weight_format": "fp16"}, "8 bits.*not converted to 'fp16'"),
        ("f32", {"weight_format": "int4"}, "full precision.*not converted to 'int4'"),
        ("u4", {"weight_format": "int4", "quantization": AWQ}, "not quantized again, got `quantization` with awq"),
    ],
)
def test_an_openvino_folder_is_what_the_block_says_or_refused(
    tmp_path: Path, kind: str, settings: dict[str, Any], said: str | None
) -> None:
    graph = f'<net><data element_type="{kind}"/></net>'
    files = {"openvino_model.xml": graph, "config.json": '{"model_type": "llama"}'}
    files |= dict.fromkeys(("openvino_model.bin", "openvino_tokenizer.xml", "openvino_tokenizer.bin"), "")
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    model = LocalModel(model_id=str(tmp_path), store=ModelStore(path=tmp_path / "store"), **settings)
    if said is None:
        assert get_export(model).path == tmp_path
    else:
        with pytest.raises(PlanError, match=said):
            get_export(model)
        with pytest.raises(PlanError, match=said):
            plan_model(model)


def test_a_store_that_cannot_be_written_to_is_an_error(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "exports").write_text("in the way")
    model = LocalModel(model_id=str(tiny_llama), store=ModelStore(path=tmp_path))
    with pytest.raises(ExportError, match="cannot be written to"):
        get_export(model)


def test_a_lock_that_is_held_too_long_is_an_error(tiny_llama: Path, tmp_path: Path) -> None:
    from filelock import FileLock

    from prefect_huggingface.tasks.storage.exports.store import lock_path

    model = LocalModel(model_id=str(tiny_llama), store=ModelStore(path=tmp_path, lock_timeout_seconds=0.2))
    path = lock_path(tmp_path, plan_model(model).key)
    path.parent.mkdir(parents=True)
    with FileLock(path), pytest.raises(ExportError, match="lock_timeout_seconds"):
        get_export(model)


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelSourceError, match="does not exist"):
        get_export(LocalModel(model_id=str(tmp_path / "none")))
