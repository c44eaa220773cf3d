"""The plan of a download: what it would take, without writing anything."""

from __future__ import annotations

import pytest

from prefect_huggingface.tasks.hub_errors import NoWeightsError, RepositoryNotFoundError
from prefect_huggingface.tasks.storage.hub.download import fetch_snapshot, plan_snapshot
from support.hub_models import MEGABYTE, hub_model, model_files


def test_a_plan_tells_files_sizes_room_and_licence_and_writes_nothing(hub, tmp_path):
    repository = hub.create("org/model", files := model_files(MEGABYTE), licence="mit")
    plan = plan_snapshot(hub_model(hub, tmp_path / "store", revision="main"))
    assert {f.path: f.size for f in plan.files} == {name: len(content) for name, content in files.items()}
    assert (plan.commit, plan.revision, plan.licence) == (repository.references["main"], "main", "mit")
    assert plan.total_bytes == plan.missing_bytes == sum(map(len, files.values()))
    assert (plan.cached_bytes, plan.complete, plan.access, plan.gated, plan.problem) == (0, False, "open", None, None)
    assert plan.free_bytes > MEGABYTE
    assert plan.fits
    assert not (tmp_path / "store").exists()
    assert {r.place for r in hub.journal.requests} == {"api"}


def test_a_plan_counts_what_is_here_already(hub, tmp_path):
    hub.create("org/model", files := model_files(3 * MEGABYTE))
    hub.fault("cut", after=2 * MEGABYTE)
    hub.fault("status", status=404, times=None)
    with pytest.raises(Exception, match="404"):
        fetch_snapshot(hub_model(hub, tmp_path))
    hub.journal.clear()
    plan = plan_snapshot(hub_model(hub, tmp_path))
    assert plan.cached_bytes >= 2 * MEGABYTE
    assert plan.missing_bytes == plan.total_bytes - plan.cached_bytes
    fetch_snapshot(hub_model(hub, tmp_path))
    assert hub.journal.sent(place="cdn") == MEGABYTE
    assert plan_snapshot(hub_model(hub, tmp_path)).complete
    assert plan_snapshot(hub_model(hub, tmp_path)).missing_bytes == 0
    assert plan.path == fetch_snapshot(hub_model(hub, tmp_path)).path
    assert len(files) == len(plan.files)


def test_a_plan_after_the_download_needs_no_network_for_a_pinned_model(hub, tmp_path):
    repository = hub.create("org/model", model_files(1000), licence="mit")
    model = hub_model(hub, tmp_path, revision=repository.references["main"])
    fetch_snapshot(model)
    hub.journal.clear()
    plan = plan_snapshot(model)
    assert (plan.complete, plan.missing_bytes, plan.licence, plan.access) == (True, 0, "mit", "not asked")
    assert hub.journal.requests == []


@pytest.mark.parametrize(("token", "access"), [(None, "refused"), ("hf_bob", "refused"), ("hf_alice", "granted")])
def test_a_plan_tells_whether_the_gate_is_open(hub, tmp_path, token, access):
    hub.users.update({"hf_alice": "alice", "hf_bob": "bob"})
    hub.create("org/model", model_files(1000), gated="auto", readers={"alice"})
    plan = plan_snapshot(hub_model(hub, tmp_path, token=token))
    assert (plan.gated, plan.access) == ("auto", access)
    assert (plan.problem is None) == (access == "granted")
    assert access == "granted" or f"{hub.endpoint}/org/model" in plan.problem


@pytest.mark.parametrize(
    ("model_id", "expected"), [("org/none", RepositoryNotFoundError), ("org/gguf", NoWeightsError)]
)
def test_there_is_no_plan_for_what_cannot_be_had(hub, tmp_path, model_id, expected):
    hub.create("org/gguf", {"model.gguf": b"GGUF"})
    with pytest.raises(expected):
        plan_snapshot(hub_model(hub, tmp_path, model_id))
