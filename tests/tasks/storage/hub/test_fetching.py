"""Fetching without faults: which commit, which bytes, and a cache that other Hugging Face tools find."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
from huggingface_hub import HfApi, scan_cache_dir, snapshot_download, try_to_load_from_cache
from pydantic import ValidationError

from prefect_huggingface.tasks.hub_errors import (
    EmptyRepositoryError,
    HubAddressError,
    HubUnavailableError,
    NotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StoreNotWritableError,
    UntrustedHubError,
)
from prefect_huggingface.tasks.storage.hub.cache import RepositoryFolder
from prefect_huggingface.tasks.storage.hub.download import fetch_snapshot
from prefect_huggingface.tasks.storage.snapshots import get_snapshot
from support.hub_models import MEGABYTE, check_snapshot, hub_model, model_files, random_bytes


@pytest.mark.parametrize("model_id", ["org/model", "model", "Org-1.5/Model_2.5-B"])
def test_a_snapshot_holds_the_right_files_with_their_hashes(hub, tmp_path, model_id):
    repository = hub.create(model_id, files := model_files())
    snapshot = get_snapshot(hub_model(hub, tmp_path, model_id))
    assert (snapshot.repo_id, snapshot.commit) == (model_id, repository.references["main"])
    check_snapshot(snapshot.path, files)
    stored = repository.commits[snapshot.commit]
    assert {f.path: (f.size, f.sha256 or f.git_sha1) for f in snapshot.files} == {
        name: (file.size, file.etag) for name, file in stored.items()
    }


def test_other_hugging_face_tools_find_the_files(hub, tmp_path):
    repository = hub.create("org/model", model_files())
    commit = repository.references["main"]
    model = hub_model(hub, tmp_path)
    snapshot, root = fetch_snapshot(model), RepositoryFolder.of(model).root
    asked = len(hub.journal.requests)
    assert snapshot_download("org/model", cache_dir=root, local_files_only=True) == str(snapshot.path)
    assert try_to_load_from_cache("org/model", "config.json", root, commit) == str(snapshot.path / "config.json")
    assert len(hub.journal.requests) == asked
    checked = HfApi(endpoint=hub.endpoint, token=False).verify_repo_checksums("org/model", cache_dir=root)
    assert (checked.mismatches, checked.missing_paths) == ([], [])
    scan = scan_cache_dir(root)
    assert scan.warnings == []
    assert [r.refs for repo in scan.repos for r in repo.revisions] == [frozenset({"main"})]


def test_transformers_loads_the_chosen_files(hub, tmp_path, tiny_llama):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    content = {p.name: p for p in tiny_llama.iterdir()}
    hub.create("org/tiny", {**content, "pytorch_model.bin": b"\x80", "README.md": b"# Tiny", "modeling.py": b"1/0"})
    path = fetch_snapshot(hub_model(hub, tmp_path, "org/tiny")).path
    here, there = (AutoModelForCausalLM.from_pretrained(p, use_safetensors=True) for p in (path, tiny_llama))
    assert all((a == b).all() for a, b in zip(here.parameters(), there.parameters(), strict=True))
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tiny_llama).chat_template
    assert len(tokenizer("The capital of France")["input_ids"]) > 2


def test_the_real_client_downloads_nothing_again_after_us(hub, tmp_path):
    hub.create("org/model", model_files())
    model = hub_model(hub, tmp_path)
    snapshot = fetch_snapshot(model)
    hub.journal.clear()
    root = RepositoryFolder.of(model).root
    assert snapshot_download("org/model", cache_dir=root, endpoint=hub.endpoint, token=False) == str(snapshot.path)
    assert hub.journal.sent(place="cdn") == hub.journal.sent(place="resolve") == 0


@pytest.mark.parametrize("revision", [None, "main", "feature/x", "v1.0", "short", "full"])
def test_every_kind_of_revision_becomes_a_commit(hub, tmp_path, revision):
    repository = hub.create("org/model", model_files(1000))
    first = repository.references["main"]
    repository.tag("v1.0", first)
    other = repository.commit(model_files(1000, seed=1), branch="feature/x")
    wanted = other if revision == "feature/x" else first
    name = {"short": first[:8], "full": first}.get(revision, revision)
    model = hub_model(hub, tmp_path, revision=name)
    assert fetch_snapshot(model).commit == wanted
    assert {r.path.split("/")[4] for r in hub.journal.requests if r.place == "resolve"} == {wanted}


def test_a_moved_branch_costs_only_the_changed_files(hub, tmp_path):
    files = model_files(other := 2 * MEGABYTE)
    repository = hub.create("org/model", files)
    model = hub_model(hub, tmp_path)
    before = fetch_snapshot(model)
    changed = {**files, "config.json": b'{"model_type": "llama", "changed": true}'}
    repository.commit(changed)
    hub.journal.clear()
    after = fetch_snapshot(model)
    assert after.commit != before.commit
    check_snapshot(after.path, changed)
    check_snapshot(before.path, files)
    assert hub.journal.sent("config.json", "resolve") == len(changed["config.json"]) < other
    assert hub.journal.sent(place="cdn") == 0


def test_an_unchanged_branch_costs_one_request(hub, tmp_path):
    hub.create("org/model", model_files(1000))
    fetch_snapshot(hub_model(hub, tmp_path))
    hub.journal.clear()
    fetch_snapshot(hub_model(hub, tmp_path))
    assert [r.path for r in hub.journal.requests] == ["/api/models/org/model/revision/main"]


def test_a_folder_that_exists_is_not_complete(hub, tmp_path):
    repository = hub.create("org/model", files := model_files())
    model = hub_model(hub, tmp_path, revision=repository.references["main"])
    root = RepositoryFolder.of(model).root
    snapshot_download("org/model", cache_dir=root, endpoint=hub.endpoint, token=False, allow_patterns=["config.json"])
    check_snapshot(fetch_snapshot(model).path, files)


def test_a_corrupt_content_of_another_client_is_replaced(hub, tmp_path):
    hub.create("org/model", files := model_files())
    model = hub_model(hub, tmp_path)
    root = RepositoryFolder.of(model).root
    hub.fault("corrupt", path="model.safetensors", after=1_000_000)
    there = Path(snapshot_download("org/model", cache_dir=root, endpoint=hub.endpoint, token=False))
    assert (there / "model.safetensors").read_bytes() != files["model.safetensors"]
    check_snapshot(fetch_snapshot(model).path, files)


@pytest.mark.parametrize("damage", ["removed", "cut", "changed"])
def test_a_damaged_snapshot_is_repaired(hub, tmp_path, damage):
    repository = hub.create("org/model", files := model_files())
    model = hub_model(hub, tmp_path, revision=repository.references["main"])
    blob = (fetch_snapshot(model).path / "model.safetensors").resolve()
    content = bytearray(blob.read_bytes())
    blob.unlink()
    if damage == "cut":
        blob.write_bytes(content[:-1])
    elif damage == "changed":
        content[77] ^= 1
        blob.write_bytes(content)
    check_snapshot(fetch_snapshot(model).path, files)


def test_a_copied_store_is_hashed_once_and_not_downloaded_again(hub, tmp_path):
    repository = hub.create("org/model", files := model_files())
    commit = repository.references["main"]
    fetch_snapshot(hub_model(hub, tmp_path / "a", revision=commit))
    shutil.copytree(tmp_path / "a", tmp_path / "b", symlinks=True, copy_function=shutil.copyfile)
    hub.journal.clear()
    check_snapshot(fetch_snapshot(hub_model(hub, tmp_path / "b", revision=commit)).path, files)
    assert hub.journal.requests == []


def test_a_mirror_that_lists_no_hashes_is_good_enough(hub, tmp_path):
    hub.create("org/model", files := model_files(), lists_hashes=False)
    check_snapshot(fetch_snapshot(hub_model(hub, tmp_path)).path, files)


def test_a_repository_with_too_many_files_for_a_list_is_read_from_its_tree(hub, tmp_path):
    hub.page_size = 2
    repository = hub.create("org/model", files := model_files())
    repository.lists_files = False
    check_snapshot(fetch_snapshot(hub_model(hub, tmp_path)).path, files)
    assert len(hub.journal.gets("/tree/")) == 2


def test_two_hubs_share_no_snapshot(hub, tmp_path):
    from support.hub_server import LocalHub

    repository = hub.create("org/model", model_files(1000))
    commit = repository.references["main"]
    fetch_snapshot(hub_model(hub, tmp_path, revision=commit))
    with LocalHub() as other:
        copy = other.create("org/model", model_files(1000, seed=9))
        copy.commits = {commit: next(iter(copy.commits.values()))}
        snapshot = fetch_snapshot(hub_model(other, tmp_path, revision=commit))
        assert (snapshot.path / "model.safetensors").read_bytes() == random_bytes(1000, 9)


def test_an_empty_file_is_a_file(hub, tmp_path):
    hub.create("org/model", files := {**model_files(1000), "merges.txt": b""})
    check_snapshot(fetch_snapshot(hub_model(hub, tmp_path)).path, files)


@pytest.mark.parametrize(
    ("model_id", "revision", "expected"),
    [
        ("org/none", None, RepositoryNotFoundError),
        ("org/model", "none", RevisionNotFoundError),
        ("org/model", "f" * 40, RevisionNotFoundError),
        ("org/model", "../../../etc", RevisionNotFoundError),
        ("org/model", "", RevisionNotFoundError),
        ("org/empty", None, EmptyRepositoryError),
        ("org/readme", None, EmptyRepositoryError),
        ("org/model.git", None, NotFoundError),
    ],
)
def test_what_does_not_exist_is_said_early(hub, tmp_path, model_id, revision, expected):
    hub.create("org/model", model_files(1000))
    hub.create("org/empty")
    hub.create("org/readme", {".gitattributes": b"*", "README.md": b"# Model"})
    with pytest.raises(expected) as caught:
        fetch_snapshot(hub_model(hub, tmp_path, model_id, revision=revision))
    assert repr(model_id if revision is None or "model" not in model_id else revision) in str(caught.value)
    assert not list(tmp_path.rglob("models--*"))


@pytest.mark.parametrize("model_id", ["org/", "a/b/c", "org model", "org/mo..del", "org--x/model", ".org/model", ""])
def test_a_malformed_id_is_refused_by_the_block(hub, tmp_path, model_id):
    with pytest.raises(ValidationError, match="must be a Hub id") as caught:
        hub_model(hub, tmp_path, model_id)
    assert repr(model_id) in str(caught.value)


@pytest.mark.parametrize(
    ("endpoint", "expected", "seconds"),
    [
        ("http://no-such-host.invalid", HubAddressError, 5),
        ("http://127.0.0.1:9", HubUnavailableError, 8),
    ],
)
def test_an_unknown_hub_address_is_said_early(hub, tmp_path, endpoint, expected, seconds):
    model = hub_model(hub, tmp_path)
    model.credentials.endpoint = endpoint
    started = time.monotonic()
    with pytest.raises(expected) as caught:
        fetch_snapshot(model)
    assert time.monotonic() - started < seconds
    assert endpoint in str(caught.value)


@pytest.mark.parametrize("status", [200, 302, 400, 404, 418])
def test_a_server_that_is_no_hub_is_not_trusted(hub, tmp_path, status):
    hub.fault("status", "api", status=status, times=None)
    with pytest.raises((UntrustedHubError, NotFoundError)) as caught:
        fetch_snapshot(hub_model(hub, tmp_path))
    assert hub.endpoint in str(caught.value)
    assert len(hub.journal.requests) == 1


@pytest.mark.parametrize("place", ["file/store", "/proc/store"])
def test_a_store_that_cannot_be_written_is_said_before_the_hub_is_asked(hub, tmp_path, place):
    hub.create("org/model", model_files(1000))
    (tmp_path / "file").write_text("a file, not a folder")
    with pytest.raises(StoreNotWritableError) as caught:
        fetch_snapshot(hub_model(hub, tmp_path / place))
    assert "store" in str(caught.value)
    assert hub.journal.requests == []
