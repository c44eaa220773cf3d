"""The Hugging Face cache is the cache: what others have downloaded is used, and they find what is downloaded here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import hf_hub_download, scan_cache_dir, snapshot_download

from prefect_huggingface.blocks import Adapter, LocalModel, ModelStore
from prefect_huggingface.tasks.hub_errors import NoWeightsError, OfflineError, UnusableRepositoryError
from prefect_huggingface.tasks.storage.adapters import pin_adapters
from prefect_huggingface.tasks.storage.eviction import evict, list_models
from prefect_huggingface.tasks.storage.hub.cache import list_snapshots
from prefect_huggingface.tasks.storage.hub.download import fetch_snapshot
from support.hub_models import MEGABYTE, check_snapshot, model_files


@pytest.fixture
def cache(hub, tmp_path, monkeypatch) -> Path:
    """Folder of the shared cache; the local Hub is the default one."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PREFECT_HUGGINGFACE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    return tmp_path / "cache"


@pytest.fixture
def repository(hub):
    return hub.create("org/model", model_files(MEGABYTE))


def model(**settings) -> LocalModel:
    return LocalModel(model_id="org/model", backend="torch", **settings)


def download_elsewhere(hub, cache: Path, **settings) -> Path:
    return Path(snapshot_download("org/model", endpoint=hub.endpoint, cache_dir=cache, token=False, **settings))


def test_what_the_client_has_downloaded_is_not_downloaded_again(hub, cache, repository):
    path = download_elsewhere(hub, cache)
    hub.journal.clear()
    snapshot = fetch_snapshot(model())
    assert snapshot.path == path
    assert hub.journal.gets(place="cdn") == []
    assert {request.place for request in hub.journal.requests} == {"api"}, "one question which commit it is"


def test_what_the_client_has_downloaded_is_verified_once_and_used_offline(hub, cache, repository, caplog):
    path = download_elsewhere(hub, cache)
    hub.journal.clear()
    with caplog.at_level("INFO"):
        first = fetch_snapshot(model(offline=True))
        second = fetch_snapshot(model(offline=True, revision=repository.references["main"]))
    assert first.path == second.path == path
    assert caplog.text.count("Verified") == 1
    assert hub.journal.requests == []


def test_an_adapter_that_the_client_has_downloaded_is_used_offline(hub, cache, tmp_path):
    hub.create(
        "org/adapter", {"adapter_config.json": b'{"peft_type": "LORA"}', "adapter_model.safetensors": b"weights"}
    )
    snapshot_download("org/adapter", endpoint=hub.endpoint, cache_dir=cache, token=False)
    hub.journal.clear()
    base = LocalModel(model_id=str(tmp_path), offline=True, adapters=[Adapter(repo_or_folder="org/adapter")])
    [pinned] = pin_adapters(base).adapters
    assert len(pinned.revision) == 40
    assert hub.journal.requests == []


@pytest.mark.parametrize("own_code", [False, True])
def test_code_is_asked_for_only_where_the_model_is_code(hub, cache, own_code):
    config = {"auto_map": {"AutoModel": "modeling_own.Own"}} if own_code else {}
    hub.create("org/model", {**model_files(1000), "config.json": json.dumps(config).encode()})
    download_elsewhere(hub, cache)
    asked = model(offline=True, trust_remote_code=True)
    if own_code:
        with pytest.raises(OfflineError):
            fetch_snapshot(asked)
    else:
        assert fetch_snapshot(asked).files


def test_code_of_another_repository_is_asked_for_before_anything_is_downloaded(hub, cache):
    config = {"auto_map": {"AutoModel": "org/code--modeling_own.Own"}}
    hub.create("org/model", {**model_files(1000), "config.json": json.dumps(config).encode()})
    hub.create("org/code", {"modeling_own.py": b"x = 1"})
    asked = model(trust_remote_code=True)
    with pytest.raises(UnusableRepositoryError, match="'org/code', .* run `hf download org/code --include"):
        fetch_snapshot(asked)
    assert not list(cache.glob("models--*"))
    snapshot_download("org/code", endpoint=hub.endpoint, cache_dir=cache, token=False, allow_patterns="*.py")
    assert fetch_snapshot(asked).files


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_the_offline_variables_of_the_client_mean_offline(hub, cache, repository, monkeypatch, variable):
    path = download_elsewhere(hub, cache)
    hub.journal.clear()
    monkeypatch.setenv(variable, "1")
    assert fetch_snapshot(model()).path == path
    assert hub.journal.requests == []


def test_a_damaged_file_of_the_client_is_not_used_offline_and_replaced_online(hub, cache, repository):
    path = download_elsewhere(hub, cache)
    weights = (path / "model.safetensors").resolve()
    weights.write_bytes(b"x" * weights.stat().st_size)
    with pytest.raises(OfflineError):
        fetch_snapshot(model(offline=True))
    check_snapshot(fetch_snapshot(model()).path, model_files(MEGABYTE))


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json", "tokenizer*"])
def test_a_part_of_a_model_is_not_taken_for_the_whole_offline(hub, cache, repository, missing):
    download_elsewhere(hub, cache, ignore_patterns=[missing])
    with pytest.raises(OfflineError, match="not complete"):
        fetch_snapshot(model(offline=True))


def test_the_client_finds_what_is_downloaded_here(hub, cache, tiny_llama, tmp_path):
    from transformers import AutoTokenizer

    hub.create("org/model", {file.name: file.read_bytes() for file in tiny_llama.iterdir() if file.is_file()})
    snapshot = fetch_snapshot(model())
    # Transformers has read HF_HUB_CACHE when it was imported.
    assert (
        AutoTokenizer.from_pretrained("org/model", local_files_only=True, cache_dir=cache).name_or_path == "org/model"
    )
    assert (
        Path(hf_hub_download("org/model", "config.json", cache_dir=cache, local_files_only=True)).parent
        == snapshot.path
    )
    assert scan_cache_dir(cache).warnings == []
    (repository,) = scan_cache_dir(cache).repos
    assert {file.file_name for revision in repository.revisions for file in revision.files} == {
        path.name for path in snapshot.path.iterdir()
    }, "the snapshot holds nothing but files of the model"


def test_a_store_with_a_folder_keeps_its_own(hub, cache, repository, tmp_path):
    snapshot = fetch_snapshot(model(store=ModelStore(path=tmp_path / "own")))
    assert snapshot.path.is_relative_to(tmp_path / "own" / "hub" / "models--org--model" / "snapshots")
    assert not cache.exists()


def test_another_hub_does_not_share_the_cache(hub, cache, repository, monkeypatch):
    monkeypatch.delenv("HF_ENDPOINT")
    snapshot = fetch_snapshot(model(credentials={"endpoint": hub.endpoint}))
    assert not snapshot.path.is_relative_to(cache)


def test_only_what_was_downloaded_here_is_listed_and_removed(hub, cache, repository):
    store = ModelStore(max_size_gb=1)
    path = download_elsewhere(hub, cache, allow_patterns=["tokenizer*", "config.json"])
    foreign = {file.name for file in path.iterdir()}
    assert list_models(store) == []
    fetch_snapshot(model(store=store))
    (entry,) = list_models(store)
    assert entry.size_bytes == MEGABYTE
    report = evict(store, 0)
    assert report.freed_bytes == MEGABYTE
    assert {file.name for file in path.iterdir()} == foreign
    assert all(file.exists() for file in path.iterdir())
    assert scan_cache_dir(cache).warnings == []
    assert download_elsewhere(hub, cache, allow_patterns=["config.json"], local_files_only=True) == path


def test_a_file_that_somebody_puts_into_a_snapshot_stays(hub, cache, repository):
    notes = fetch_snapshot(model()).path / "notes.txt"
    notes.write_text("of a person")
    assert evict(ModelStore(), 0).freed_bytes > MEGABYTE
    assert [file.name for file in notes.parent.iterdir()] == ["notes.txt"]
    assert notes.read_text() == "of a person"


def test_a_snapshot_of_another_tool_keeps_the_blob_that_it_shares(hub, cache, repository):
    fetch_snapshot(model())
    repository.commit({**model_files(MEGABYTE), "config.json": b"{}"})
    path = download_elsewhere(hub, cache)
    evict(ModelStore(), 0)
    check_snapshot(path, {**model_files(MEGABYTE), "config.json": b"{}"})
    assert list_snapshots(ModelStore()) == []


@pytest.mark.parametrize("count", [2, 3])
def test_a_blob_that_snapshots_share_counts_once_and_goes_with_the_last(hub, cache, repository, count):
    store = ModelStore()
    files = model_files(MEGABYTE)
    for number in range(count):
        fetch_snapshot(model())
        repository.commit({**files, "config.json": json.dumps({"commit": number}).encode()})
    assert evict(store, 2 * MEGABYTE).removed == (), "the weights count once"
    report = evict(store, MEGABYTE // 2)
    assert len(report.removed) == count
    assert report.freed_bytes > MEGABYTE
    assert report.kept_bytes == 0
    assert not list(cache.rglob("blobs/*"))


def test_a_weekly_refresh_stays_within_the_limit(hub, cache, repository):
    limit = 2.5 * MEGABYTE / 1e9
    for week in range(5):
        repository.commit(model_files(MEGABYTE, seed=week))
        fetch_snapshot(model(store=ModelStore(max_size_gb=limit)))
    assert sum(blob.stat().st_size for blob in cache.rglob("blobs/*")) <= limit * 1e9


def test_names_of_weights_come_from_the_index(hub, cache):
    shards = [f"part-{letter}.safetensors" for letter in "ab"]
    index = {"weight_map": {"one": shards[0], "two": shards[1]}}
    files = model_files(1000)
    del files["model.safetensors"]
    files |= {name: b"weights of " + name.encode() for name in shards}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    hub.create("org/model", files)
    assert set(shards) < {file.path for file in fetch_snapshot(model()).files}
    shutil.rmtree(cache)
    hub.repositories.clear()
    del files[shards[1]]
    hub.create("org/model", files)
    with pytest.raises(NoWeightsError, match="part-b"):
        fetch_snapshot(model())
    assert not list(cache.glob("models--*"))
