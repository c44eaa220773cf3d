"""A local folder is known by its content; its name, its place and links change nothing."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from prefect_huggingface.blocks import LocalModel, ModelStore
from prefect_huggingface.tasks.errors import ModelSourceError
from prefect_huggingface.tasks.records import Snapshot
from prefect_huggingface.tasks.storage import snapshots as local_snapshots
from prefect_huggingface.tasks.storage.exports import store as manifests
from prefect_huggingface.tasks.storage.snapshots import snapshot_folder


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "model"
    shutil.copytree(tiny_llama, copy)
    return copy


def snapshot_of(folder: Path, **settings: object) -> Snapshot:
    store = ModelStore(path=folder.parent / "store")
    return snapshot_folder(LocalModel(model_id=str(folder), store=store, **settings))


def settle(folder: Path) -> None:
    """Make all files look as if they were written a while ago."""
    time.sleep(local_snapshots.SETTLED_SECONDS + 0.1)


def test_the_commit_is_the_content(folder: Path) -> None:
    before = snapshot_of(folder)
    assert before.repo_id is None
    assert before.commit.startswith("local-")
    assert len(before.commit) == len("local-") + 64
    assert before.path == folder
    other = folder.with_name("another-name")
    folder.rename(other)
    assert snapshot_of(other).commit == before.commit
    with open(other / "model.safetensors", "r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\x55")
    assert snapshot_of(other).commit != before.commit


def test_documentation_changes_nothing(folder: Path) -> None:
    before = snapshot_of(folder)
    (folder / "README.md").write_text("# Hello")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    assert snapshot_of(folder).commit == before.commit


@pytest.mark.parametrize("backend", ["torch", "openvino"])
def test_what_is_never_loaded_is_neither_counted_nor_read(folder: Path, backend: str) -> None:
    before = snapshot_of(folder, backend=backend)
    never = ["consolidated.safetensors", "model.fp16.safetensors", "model-00001-of-00009.safetensors", "model.onnx"]
    for name in [*never, "tf_model.h5", "optimizer.pt", "trainer_state.json", "modeling_own.py"]:
        (folder / name).write_bytes(b"x" * 1000)
    (folder / "consolidated.00.pth").symlink_to(folder / "nothing")
    after = snapshot_of(folder, backend=backend)
    assert after == before
    trusted = snapshot_of(folder, backend=backend, trust_remote_code=True)
    assert {file.path for file in trusted.files} - {file.path for file in after.files} == {"modeling_own.py"}


def test_code_of_another_repository_is_asked_for_before_anything_is_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "org/code--configuration.Own", "AutoTokenizer": [None, "org/code--own.Fast"]}
    (folder / "config.json").write_text(json.dumps(config))
    assert snapshot_of(folder).files, "an architecture that Transformers has needs no code"
    with pytest.raises(ModelSourceError, match="another repository, 'org/code', .* run `hf download org/code"):
        snapshot_of(folder, trust_remote_code=True)
    (tmp_path / "cache" / "models--org--code").mkdir(parents=True)
    assert snapshot_of(folder, trust_remote_code=True).files


def test_links_are_followed(folder: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in folder.iterdir():
        (linked / path.name).symlink_to(path)
    assert snapshot_of(linked).commit == snapshot_of(folder).commit
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelSourceError, match="link to nothing"):
        snapshot_of(linked)


def test_asking_again_reads_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(folder)
    first = snapshot_of(folder)
    read: list[Path] = []

    def note(path: Path) -> str:
        read.append(path)
        return manifests.hash_file(path)

    monkeypatch.setattr(local_snapshots, "hash_file", note)
    assert snapshot_of(folder) == first
    local_snapshots._HASHES.clear()
    assert snapshot_of(folder) == first, "another process knows the hashes too"
    assert read == []
    stat = (folder / "config.json").stat()
    (folder / "config.json").write_text((folder / "config.json").read_text().replace("512", "511"))
    os.utime(folder / "config.json", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert snapshot_of(folder).commit != first.commit, "a change is seen in spite of the same size and time"
    assert [path.name for path in read] == ["config.json"]


@pytest.mark.parametrize(
    ("missing", "words"), [("config.json", "holds no model"), ("model.safetensors", "holds no safetensors weights")]
)
def test_a_folder_without_a_model_is_refused(folder: Path, missing: str, words: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(ModelSourceError, match=words):
        snapshot_of(folder)


def test_pickles_need_permission(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelSourceError, match="allow_pickle"):
        snapshot_of(folder)
    assert "pytorch_model.bin" in [file.path for file in snapshot_of(folder, allow_pickle=True).files]


def test_an_openvino_folder_is_not_for_torch(tmp_path: Path) -> None:
    folder = tmp_path / "ov"
    folder.mkdir()
    for name in ("openvino_model.xml", "openvino_model.bin", "config.json"):
        (folder / name).write_text("{}")
    assert len(snapshot_of(folder).files) == 3
    with pytest.raises(ModelSourceError, match="backend='openvino'"):
        snapshot_of(folder, backend="torch")


def test_a_broken_configuration_is_named(folder: Path) -> None:
    from prefect_huggingface.tasks.exports import plan_model

    (folder / "config.json").write_text("{")
    with pytest.raises(ModelSourceError, match=r"config\.json.*cannot be read"):
        plan_model(LocalModel(model_id=str(folder), store=ModelStore(path=folder.parent / "store")))
