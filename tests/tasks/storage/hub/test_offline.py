"""Without a network: a pinned and complete snapshot needs none, and nothing else is handed out by accident."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download

from prefect_huggingface.blocks import LocalModel
from prefect_huggingface.tasks.hub_errors import HubUnavailableError, OfflineError, StoreError
from prefect_huggingface.tasks.storage.hub.download import fetch_snapshot, plan_snapshot
from support.hub_models import check_snapshot, hub_model, model_files


@pytest.fixture
def repository(hub):
    return hub.create("org/model", model_files(1000))


@pytest.fixture
def no_network(monkeypatch):
    """Return a context in which each attempt to open a socket or to look up a name is an error of the test."""

    def refuse(*_, **__):
        pytest.fail("the network was used")

    @contextmanager
    def blocked():
        with monkeypatch.context() as context:
            for name in ("socket", "create_connection", "getaddrinfo"):
                context.setattr(socket, name, refuse)
            yield

    return blocked


def test_a_pinned_and_complete_snapshot_needs_no_network(hub, repository, tmp_path, no_network):
    model = hub_model(hub, tmp_path, revision=repository.references["main"])
    first = fetch_snapshot(model)
    with no_network():
        assert fetch_snapshot(model) == first
        assert plan_snapshot(model).complete
    check_snapshot(first.path, model_files(1000))


def test_a_pinned_and_complete_snapshot_needs_no_network_namespace(hub, repository, tmp_path):
    commit = repository.references["main"]
    snapshot = fetch_snapshot(hub_model(hub, tmp_path, revision=commit))
    code = (
        "import sys, socket; sys.addaudithook(lambda name, _: name.startswith('socket.connect') and sys.exit(7))\n"
        "from prefect_huggingface.blocks import *\n"
        "from prefect_huggingface.tasks.storage.snapshots import get_snapshot\n"
        f"model = LocalModel(model_id='org/model', revision={commit!r}, backend='torch',\n"
        f"    store=ModelStore(path={str(tmp_path)!r}),\n"
        f"    credentials=HuggingFaceCredentials(endpoint={hub.endpoint!r}))\n"
        "print(get_snapshot(model).path)\n"
        "assert 'huggingface_hub' not in sys.modules\n"
    )
    alone = ["unshare", "--net", "--map-root-user"]
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        alone = []
    done = subprocess.run([*alone, sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(snapshot.path)


@pytest.mark.parametrize("revision", [None, "main", "v1", "short"])
def test_an_unpinned_snapshot_is_used_offline_when_the_block_says_so(
    hub, repository, tmp_path, no_network, caplog, revision
):
    commit = repository.references["main"]
    repository.tag("v1", commit)
    revision = commit[:8] if revision == "short" else revision
    fetch_snapshot(hub_model(hub, tmp_path, revision=revision))
    repository.commit(model_files(1000, seed=1))
    with caplog.at_level(logging.INFO), no_network():
        snapshot = fetch_snapshot(hub_model(hub, tmp_path, revision=revision, offline=True))
    assert snapshot.commit == commit
    assert commit in caplog.text


def test_without_offline_an_outage_is_an_error_and_no_old_snapshot_is_handed_out(hub, repository, tmp_path):
    fetch_snapshot(hub_model(hub, tmp_path))
    hub.fault("status", "api", status=503, times=None)
    with pytest.raises(HubUnavailableError):
        fetch_snapshot(hub_model(hub, tmp_path))


@pytest.mark.parametrize("revision", [None, "main", "f" * 40])
def test_offline_without_a_snapshot_is_an_error(hub, repository, tmp_path, no_network, revision):
    with no_network(), pytest.raises(OfflineError, match="Download it once without `offline`"):
        fetch_snapshot(hub_model(hub, tmp_path, revision=revision, offline=True))


def test_offline_with_a_part_of_a_snapshot_is_an_error(hub, repository, tmp_path, no_network):
    snapshot = fetch_snapshot(hub_model(hub, tmp_path))
    (snapshot.path / "config.json").unlink()
    with no_network(), pytest.raises(OfflineError):
        fetch_snapshot(hub_model(hub, tmp_path, offline=True))


def test_offline_with_the_files_of_another_choice_is_an_error(hub, repository, tmp_path):
    config = b'{"auto_map": {"AutoModel": "modeling_own.Own"}}'
    repository.commit({**model_files(1000), "config.json": config, "modeling_own.py": b"class Own: pass"})
    fetch_snapshot(hub_model(hub, tmp_path))
    with pytest.raises(OfflineError):
        fetch_snapshot(hub_model(hub, tmp_path, offline=True, trust_remote_code=True))


@contextmanager
def only_readable(folder: Path) -> Iterator[None]:
    """Let nobody write into a folder, the superuser neither."""
    if subprocess.run(["mount", "--bind", folder, folder], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
        with pytest.raises(OSError, match="Read-only"):
            (folder / "probe").touch()
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("revision", ["pinned", "main"])
@pytest.mark.parametrize("tool", ["ours", "client"])
def test_a_store_that_is_only_readable_is_good_enough(hub, repository, tmp_path, monkeypatch, revision, tool):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PREFECT_HUGGINGFACE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    model = LocalModel(
        model_id="org/model", backend="torch",
        revision=repository.references["main"] if revision == "pinned" else revision,
    )  # fmt: skip
    if tool == "ours":
        fetch_snapshot(model)
    else:
        snapshot_download("org/model", endpoint=hub.endpoint, cache_dir=tmp_path / "cache", token=False)
    hub.journal.clear()
    with only_readable(tmp_path / "cache"):
        check_snapshot(fetch_snapshot(model).path, model_files(1000))
        assert hub.journal.gets(place="cdn") == []
        check_snapshot(fetch_snapshot(model.model_copy(update={"offline": True})).path, model_files(1000))


def test_a_store_that_is_only_readable_and_lacks_a_file_says_so(hub, repository, tmp_path):
    model = hub_model(hub, tmp_path / "store")
    (fetch_snapshot(model).path / "config.json").unlink()
    with only_readable(tmp_path / "store"), pytest.raises(StoreError, match="store"):
        fetch_snapshot(model)


def test_the_variable_of_the_client_is_said_in_the_error(hub, repository, tmp_path):
    code = (
        "from prefect_huggingface.blocks import *\n"
        "from prefect_huggingface.tasks.storage.snapshots import get_snapshot\n"
        f"model = LocalModel(model_id='org/model', store=ModelStore(path={str(tmp_path)!r}),\n"
        f"    credentials=HuggingFaceCredentials(endpoint={hub.endpoint!r}))\n"
        "try:\n    get_snapshot(model)\nexcept Exception as exc:\n    print(type(exc).__name__, exc)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert done.stdout.startswith("OfflineError"), done.stderr
    assert "HF_HUB_OFFLINE" in done.stdout
    assert hub.journal.requests == []
