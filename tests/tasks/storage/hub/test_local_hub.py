"""The local Hub itself: the unmodified client accepts it, and it can be started from the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from support.hub_models import check_snapshot, model_files

TESTS = Path(__file__).parents[3]


@pytest.fixture
def client(hub):
    hub.users["hf_alice"] = "alice"
    return HfApi(endpoint=hub.endpoint, token="hf_alice")


def test_the_client_knows_who_it_is(hub, client):
    assert client.whoami()["name"] == "alice"
    with pytest.raises(HfHubHTTPError, match="Invalid"):
        HfApi(endpoint=hub.endpoint, token="hf_unknown").whoami()


def test_the_client_reads_info_tree_and_references(hub, client):
    repository = hub.create("org/model", files := model_files(1000))
    repository.tag("v1", first := repository.references["main"])
    second = repository.commit(model_files(1000, seed=1), branch="feature/x")
    hub.page_size = 2
    assert {s.rfilename: s.size for s in client.model_info("org/model", files_metadata=True).siblings} == {
        name: len(content) for name, content in files.items()
    }
    assert {f.path for f in client.list_repo_tree("org/model", revision="v1")} == set(files)
    assert client.get_paths_info("org/model", ["config.json"])[0].size == len(files["config.json"])
    references = client.list_repo_refs("org/model")
    assert {b.name: b.target_commit for b in references.branches} == {"main": first, "feature/x": second}
    assert {t.name: t.target_commit for t in references.tags} == {"v1": first}
    assert client.model_info("org/model", revision="feature/x").sha == second


@pytest.mark.parametrize("revision", ["main", "v1", "feature/x"])
def test_the_client_downloads_and_verifies(hub, client, tmp_path, revision):
    repository = hub.create("org/model", model_files(1000))
    repository.tag("v1", repository.references["main"])
    repository.commit(model_files(1000, seed=1), branch="feature/x")
    folder = client.snapshot_download("org/model", revision=revision, cache_dir=tmp_path)
    check_snapshot(Path(folder), model_files(1000, seed=1 if revision == "feature/x" else 0))
    assert not client.verify_repo_checksums("org/model", revision=revision, cache_dir=tmp_path).mismatches


def test_the_client_gets_its_own_errors(hub, client, tmp_path):
    hub.create("org/gated", model_files(1000), gated="auto", readers={"bob"})
    hub.create("org/private", model_files(1000), private=True, readers={"bob"})
    hub.create("org/model", model_files(1000))
    with pytest.raises(GatedRepoError):
        client.auth_check("org/gated")
    with pytest.raises(GatedRepoError):
        hf_hub_download("org/gated", "config.json", endpoint=hub.endpoint, token=False, cache_dir=tmp_path)
    with pytest.raises(RepositoryNotFoundError):
        client.model_info("org/private")
    with pytest.raises(RevisionNotFoundError):
        client.model_info("org/model", revision="none")
    hub.users["hf_bob"] = "bob"
    for name in ("org/gated", "org/private"):
        snapshot_download(name, endpoint=hub.endpoint, token="hf_bob", cache_dir=tmp_path)


def test_ranges_and_signatures_are_real(hub):
    hub.create("org/model", files := model_files(1000))
    answer = httpx.head(f"{hub.endpoint}/org/model/resolve/main/model.safetensors")
    address = answer.headers["Location"]
    assert httpx.get(address, headers={"Range": "bytes=990-"}).content == files["model.safetensors"][990:]
    assert httpx.get(address, headers={"Range": "bytes=5-9"}).headers["Content-Range"] == "bytes 5-9/1000"
    assert httpx.get(address, headers={"Range": "bytes=1000-"}).status_code == 416
    assert httpx.get(address.replace("Signature=", "Signature=0")).status_code == 403
    hub.signature_seconds = -1.0
    expired = httpx.head(f"{hub.endpoint}/org/model/resolve/main/model.safetensors").headers["Location"]
    assert httpx.get(expired).status_code == 403


def test_a_folder_is_served_from_the_command_line(tmp_path):
    place = tmp_path / "hub" / "org" / "model"
    place.mkdir(parents=True)
    (place / "config.json").write_text("{}")
    command = [
        sys.executable,
        "-m",
        "support.hub_server",
        str(tmp_path / "hub"),
        "--port",
        "0",
        "--private",
        "org/model",
    ]
    process = subprocess.Popen([*command, "--token", "hf_own"], stdout=subprocess.PIPE, text=True, cwd=TESTS)
    try:
        endpoint = process.stdout.readline().split()[2]
        path = hf_hub_download("org/model", "config.json", endpoint=endpoint, token="hf_own", cache_dir=tmp_path)
        assert Path(path).read_text() == "{}"
        with pytest.raises(RepositoryNotFoundError):
            HfApi(endpoint=endpoint, token=False).model_info("org/model")
    finally:
        process.terminate()
        process.wait(10)
        process.stdout.close()
