"""Gated and private repositories, and where the token goes: to its Hub, and to nobody else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from pydantic import ValidationError

from prefect_huggingface.tasks.hub_errors import GatedRepositoryError, InvalidTokenError, RepositoryNotFoundError
from prefect_huggingface.tasks.storage.exports.store import get_export
from prefect_huggingface.tasks.storage.hub.download import fetch_snapshot
from support.hub_models import check_snapshot, hub_model, model_files

TOKEN = "hf_alice"


@pytest.fixture
def guarded(hub):
    hub.users.update({TOKEN: "alice", "hf_bob": "bob"})
    hub.create("org/gated", model_files(1000), gated="manual", readers={"alice"})
    hub.create("org/private", model_files(1000), private=True, readers={"alice"})
    return hub


@pytest.mark.parametrize("model_id", ["org/gated", "org/private"])
def test_the_token_of_the_block_opens_the_repository(guarded, tmp_path, model_id):
    check_snapshot(fetch_snapshot(hub_model(guarded, tmp_path, model_id, token=TOKEN)).path, model_files(1000))


def test_a_gate_without_a_token_says_page_and_token(guarded, tmp_path):
    with pytest.raises(GatedRepositoryError) as caught:
        fetch_snapshot(hub_model(guarded, tmp_path, "org/gated"))
    assert caught.value.page == f"{guarded.endpoint}/org/gated"
    assert caught.value.page in str(caught.value)
    assert "no token is given" in str(caught.value)
    assert guarded.journal.sent(place="resolve") == 0


def test_a_gate_with_a_token_that_has_no_access_says_the_page(guarded, tmp_path):
    with pytest.raises(GatedRepositoryError, match="this token has no access") as caught:
        fetch_snapshot(hub_model(guarded, tmp_path, "org/gated", token="hf_bob"))
    assert caught.value.page in str(caught.value)


@pytest.mark.parametrize(("token", "words"), [(None, "give a token"), ("hf_bob", "give the token access")])
def test_a_private_repository_is_not_found(guarded, tmp_path, token, words):
    with pytest.raises(RepositoryNotFoundError, match=words):
        fetch_snapshot(hub_model(guarded, tmp_path, "org/private", token=token))


def test_what_another_user_has_fetched_is_not_handed_out(guarded, tmp_path):
    fetch_snapshot(hub_model(guarded, tmp_path, "org/gated", token=TOKEN))
    other = hub_model(guarded, tmp_path, "org/gated", token="hf_bob")
    with pytest.raises(GatedRepositoryError):
        fetch_snapshot(other)
    with pytest.raises(GatedRepositoryError):
        get_export(other.model_copy(update={"backend": "openvino"}))


def test_the_storage_never_sees_the_token(guarded, tmp_path):
    fetch_snapshot(hub_model(guarded, tmp_path, "org/gated", token=TOKEN))
    assert {r.token for r in guarded.journal.requests if r.place == "cdn"} == {None}
    assert {r.token for r in guarded.journal.requests if r.place != "cdn"} == {TOKEN}


def test_a_redirect_to_another_host_does_not_take_the_token_along(guarded, tmp_path):
    guarded.create("org/model", model_files(1000))
    elsewhere = f"{guarded.cdn}/elsewhere"
    guarded.fault("headers", "resolve", path="/config.json", method="HEAD", headers={"location": elsewhere}, times=None)
    guarded.fault("status", "resolve", path="tokenizer", method="GET", status=307, headers={"location": elsewhere})
    guarded.fault("status", "api", status=307, headers={"location": f"{guarded.cdn}/api"})
    for _ in range(3):
        with pytest.raises(Exception, match="org/model|127.0.0.1"):
            fetch_snapshot(hub_model(guarded, tmp_path, "org/model", token=TOKEN))
    assert {r.token for r in guarded.journal.requests if r.place == "cdn"} == {None}
    assert [r for r in guarded.journal.requests if r.path == "/elsewhere"]


@pytest.mark.parametrize("where", ["variable", "file"])
def test_the_token_of_the_machine_is_used_only_when_the_block_says_so(guarded, tmp_path, monkeypatch, where):
    if where == "variable":
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    else:
        import huggingface_hub.constants

        (tmp_path / "token").write_text(f"{TOKEN}\n")
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(GatedRepositoryError, match="no token is given"):
        fetch_snapshot(hub_model(guarded, tmp_path, "org/gated"))
    assert {r.token for r in guarded.journal.requests} == {None}
    fetch_snapshot(hub_model(guarded, tmp_path, "org/gated", settings={"use_ambient_token": True}))
    assert guarded.journal.requests[-1].token in (TOKEN, None)
    assert TOKEN in {r.token for r in guarded.journal.requests}


@pytest.mark.parametrize("token", ["", " ", "hf_a b", "hf_a\n", "hf_ü"])
def test_a_malformed_token_is_refused_without_showing_it(guarded, tmp_path, monkeypatch, token):
    with pytest.raises(ValidationError) as caught:
        hub_model(guarded, tmp_path, "org/gated", token=token)
    assert "`token` must" in str(caught.value)
    assert len(token) < 2 or token not in str(caught.value)


@pytest.mark.parametrize("token", ["hf_a b", "hf_ü"])
def test_a_malformed_token_of_the_machine_is_refused_before_any_request(guarded, tmp_path, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(InvalidTokenError, match="white space") as caught:
        fetch_snapshot(hub_model(guarded, tmp_path, "org/gated", settings={"use_ambient_token": True}))
    assert token not in str(caught.value)
    assert guarded.journal.requests == []


def test_no_other_host_is_asked(guarded, tmp_path):
    # The standard client asks huggingface.co for a list of agents, whichever Hub is meant.
    code = (
        "import sys, socket\n"
        "hosts = set()\n"
        "note = {'socket.connect': lambda a: hosts.add(a[1][1]), 'socket.getaddrinfo': lambda a: hosts.add(a[1])}\n"
        "sys.addaudithook(lambda name, args: name in note and note[name](args))\n"
        "from pathlib import Path\n"
        "from types import SimpleNamespace\n"
        "from support.hub_models import hub_model\n"
        "from prefect_huggingface.tasks.storage.hub.download import fetch_snapshot\n"
        f"hub = SimpleNamespace(endpoint={guarded.endpoint!r})\n"
        f"fetch_snapshot(hub_model(hub, Path({str(tmp_path)!r}), 'org/gated', token='hf_alice'))\n"
        "print(*sorted(map(str, hosts)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    environment.pop("HF_HUB_DISABLE_TELEMETRY")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    ports = {urlsplit(address).port for address in (guarded.endpoint, guarded.cdn)}
    assert set(done.stdout.split()) == {str(port) for port in ports}
