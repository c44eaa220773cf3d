"""A Hub address that belongs to somebody hostile: nothing is written outside the store, and nothing unsafe inside."""

from __future__ import annotations

import json
import time

import pytest

from prefect_huggingface.tasks.hub_errors import CorruptFileError, HubError, NoWeightsError, UntrustedHubError
from prefect_huggingface.tasks.storage.hub.download import fetch_snapshot
from support.hub_models import check_snapshot, hub_model, model_files
from support.hub_repositories import Repository, store_file

EVIL_PATHS = [
    "../../evil.txt", "/tmp/evil.json", "a/../../evil.json", "..\\evil.json", "C:\\evil.json", "./config.json",
    "a//b.json", "evil\x00.json", "evil\n.json", "..", "", "a/./b.json", "x" * 300 + ".json",
    "runs/10:00:00/evil.json", "runs/a\\evil.json",
]  # fmt: skip
EVIL_ETAGS = ['"../../../../evil"', '"/tmp/evil"', '"abc"', '"' + "g" * 40 + '"', '"' + "A" * 64 + '"', 'W/"x"', '""']


def everything(folder):
    return sorted(p.relative_to(folder) for p in folder.rglob("*"))


@pytest.mark.parametrize("path", EVIL_PATHS)
def test_a_file_with_an_unsafe_path_is_never_fetched(hub, tmp_path, path):
    """Such names are often innocent, those of logs for instance, and the rest of the repository is of use."""
    repository = hub.create("org/model", model_files(1000))
    repository.commits[repository.references["main"]][path] = store_file("evil.json", b"{}")
    store = tmp_path / "a" / "b" / "store"
    check_snapshot(fetch_snapshot(hub_model(hub, store)).path, model_files(1000))
    assert not [p for p in everything(tmp_path) if "evil" in str(p)]
    assert {p.parts[:3] for p in everything(tmp_path) if len(p.parts) > 2} == {("a", "b", "store")}
    assert not [r for r in hub.journal.requests if "evil" in r.path]


@pytest.mark.parametrize("path", ["../evil.safetensors", "evil\n.safetensors"])
def test_a_part_of_the_weights_with_an_unsafe_path_is_refused_before_anything_is_written(hub, tmp_path, path):
    index = json.dumps({"weight_map": {"weight": path}}).encode()
    files = {**model_files(1000), "model.safetensors.index.json": index}
    del files["model.safetensors"]
    repository = hub.create("org/model", files)
    repository.commits[repository.references["main"]][path] = store_file("evil.safetensors", b"{}")
    with pytest.raises(NoWeightsError, match="lacks"):
        fetch_snapshot(hub_model(hub, tmp_path / "a" / "b" / "store"))
    assert not [p for p in everything(tmp_path) if "evil" in str(p) or "models--" in str(p)]


@pytest.mark.parametrize("name", ["smile\U0001f468\u200d\U0001f4bb.json", "no\u00a0break.json"])
def test_a_name_with_characters_that_are_not_printable_is_one_as_any_other(hub, tmp_path, name):
    files = {**model_files(1000), name: b"{}"}
    hub.create("org/model", files)
    check_snapshot(fetch_snapshot(hub_model(hub, tmp_path)).path, files)


@pytest.mark.parametrize("etag", EVIL_ETAGS)
@pytest.mark.parametrize("listed", [True, False])
def test_an_unsafe_hash_is_refused(hub, tmp_path, etag, listed):
    hub.create("org/model", model_files(1000), lists_hashes=listed)
    headers = {"etag": etag, "x-linked-etag": etag}
    hub.fault("headers", "resolve", path="safetensors", headers=headers, times=None)
    with pytest.raises(UntrustedHubError):
        fetch_snapshot(hub_model(hub, tmp_path / "a" / "b" / "store"))
    assert not list(tmp_path.rglob("*evil*"))
    assert not list(tmp_path.rglob("manifests/*.json"))


class LyingRepository(Repository):
    """A repository whose description is changed on its way out."""

    changes: dict[str, object] = {}

    def describe(self, commit: str, blobs: bool) -> dict[str, object]:
        return {**super().describe(commit, blobs), **self.changes}


@pytest.mark.parametrize(
    "changes",
    [
        {"sha": "../../../../evil"},
        {"sha": None},
        {"sha": "f" * 39},
        {"siblings": [{"rfilename": "config.json", "size": -5, "blobId": "a" * 40}]},
        {"siblings": [{"rfilename": "config.json", "size": 5, "blobId": "../../evil"}]},
        {"siblings": [{"rfilename": 7}]},
        {"siblings": 3},
        {"siblings": [{"rfilename": "a.json", "lfs": {"sha256": "../evil", "size": 1, "pointerSize": 1}}]},
    ],
)  # fmt: skip
def test_an_unsafe_description_is_refused(hub, tmp_path, changes):
    repository = hub.repositories["org/model"] = LyingRepository("org/model")
    repository.commit(model_files(1000))
    repository.changes = changes
    with pytest.raises(UntrustedHubError):
        fetch_snapshot(hub_model(hub, tmp_path / "a" / "b" / "store"))
    assert not [p for p in everything(tmp_path) if "evil" in str(p) or "models--" in str(p)]


def test_another_commit_than_the_pinned_one_is_refused(hub, tmp_path):
    repository = hub.repositories["org/model"] = LyingRepository("org/model")
    commit = repository.commit(model_files(1000))
    repository.changes = {"sha": "e" * 40}
    with pytest.raises(UntrustedHubError):
        fetch_snapshot(hub_model(hub, tmp_path, revision=commit))


def test_a_file_of_another_commit_is_refused(hub, tmp_path):
    hub.create("org/model", model_files(1000))
    hub.fault("headers", "resolve", path="safetensors", headers={"x-repo-commit": "e" * 40}, times=None)
    with pytest.raises(UntrustedHubError, match="another commit"):
        fetch_snapshot(hub_model(hub, tmp_path))


@pytest.mark.parametrize("header", [{"x-linked-size": "999"}, {"x-linked-etag": '"' + "0" * 64 + '"'}])
def test_a_file_that_is_not_as_listed_is_refused(hub, tmp_path, header):
    hub.create("org/model", model_files(1000))
    hub.fault("headers", "resolve", path="safetensors", headers=header, times=None)
    with pytest.raises(UntrustedHubError, match="contradicts itself"):
        fetch_snapshot(hub_model(hub, tmp_path))


@pytest.mark.parametrize("location", ["http://127.0.0.1:1/x", "file:///etc/passwd", "ftp://127.0.0.1/x", "/loop", "//"])
def test_a_redirect_to_anywhere_ends_in_an_error_in_time(hub, tmp_path, location):
    hub.create("org/model", model_files(1000))
    hub.fault("headers", "resolve", path="safetensors", headers={"location": location}, times=None)
    started = time.monotonic()
    with pytest.raises(HubError):
        fetch_snapshot(hub_model(hub, tmp_path))
    assert time.monotonic() - started < 15
    assert not list(tmp_path.rglob("manifests/*.json"))


def test_redirects_in_a_circle_end_in_an_error(hub, tmp_path):
    hub.create("org/model", model_files(1000))
    circle = {"location": f"{hub.endpoint}/api/models/org/model/revision/main?again=1"}
    hub.fault("status", "api", status=307, headers=circle, times=None)
    with pytest.raises(HubError):
        fetch_snapshot(hub_model(hub, tmp_path))
    assert len(hub.journal.requests) < 100


def test_more_bytes_than_announced_are_not_written(hub, tmp_path):
    repository = hub.create("org/model", model_files(1000))
    announced = repository.commits[repository.references["main"]]["model.safetensors"]
    hub.contents[announced.sha256] = store_file("model.safetensors", bytes(50_000))
    with pytest.raises(CorruptFileError):
        fetch_snapshot(hub_model(hub, tmp_path))
    assert max(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file()) <= 1000


def test_redirects_of_a_file_in_a_circle_end_in_an_error(hub, tmp_path):
    repository = hub.create("org/model", model_files(1000))
    circle = f"/org/model/resolve/{repository.references['main']}/model.safetensors"
    hub.fault("headers", "resolve", path="safetensors", headers={"location": circle}, times=None)
    with pytest.raises(UntrustedHubError, match="circle"):
        fetch_snapshot(hub_model(hub, tmp_path))
    assert len([r for r in hub.journal.requests if r.path == circle]) < 10
