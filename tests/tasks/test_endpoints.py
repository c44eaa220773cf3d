"""The life of a dedicated endpoint, through the client of the Hub against a server with the routes of its service."""

from __future__ import annotations

import pickle
import time

import pytest
from prefect import flow

from prefect_huggingface.blocks import HuggingFaceCredentials
from prefect_huggingface.tasks import endpoints
from prefect_huggingface.tasks.endpoints import (
    get_endpoint,
    pause_endpoint,
    resume_endpoint,
    scale_endpoint_to_zero,
    wait_for_endpoint,
)
from prefect_huggingface.tasks.errors import EndpointError
from support.endpoint_service import DedicatedEndpoint, EndpointServiceServer

TOKEN = "hf_CanaryOfTheService"


@pytest.fixture
def service(monkeypatch):
    with EndpointServiceServer({TOKEN: "ann", "hf_other": "bob"}) as service:
        service.endpoints["tiny"] = DedicatedEndpoint("tiny")
        # The client has no argument for this address.
        monkeypatch.setattr("huggingface_hub.constants.INFERENCE_ENDPOINTS_ENDPOINT", f"{service.url}/v2")
        yield service


@pytest.fixture
def credentials(service):
    return HuggingFaceCredentials(token=TOKEN, endpoint=service.url)


def test_an_endpoint_is_resumed_waited_for_scaled_to_zero_and_paused(service, credentials, caplog):
    assert get_endpoint.fn("tiny", credentials).status == "paused"
    assert resume_endpoint.fn("tiny", credentials).status == "pending"
    with caplog.at_level("INFO"):
        found = wait_for_endpoint.fn("tiny", credentials, "ann", poll_seconds=0.05)
    assert (found.status, found.url, found.repo_id) == ("running", service.url, "organisation/tiny")
    assert any("is initializing after" in line for line in caplog.messages)
    assert resume_endpoint.fn("tiny", credentials).status == "running"
    assert scale_endpoint_to_zero.fn("tiny", credentials, "ann").status == "scaledToZero"
    assert pause_endpoint.fn("tiny", credentials).status == "paused"
    assert set(service.tokens) == {TOKEN}


@pytest.mark.parametrize(("state", "words"), [("paused", "Resume it first"), ("scaledToZero", "Resume it first"),
                                              ("failed", "has failed"), ("updateFailed", "has failed")])  # fmt: skip
def test_waiting_for_what_never_runs_ends_at_once(service, credentials, state, words):
    service.endpoints["tiny"].state = state
    with pytest.raises(EndpointError, match=words):
        wait_for_endpoint.fn("tiny", credentials)


def test_waiting_is_bounded(service, credentials):
    service.endpoints["tiny"].state, service.endpoints["tiny"].looks_to_start = "pending", 10_000
    began = time.monotonic()
    with pytest.raises(EndpointError, match="not running after"):
        wait_for_endpoint.fn("tiny", credentials, timeout_seconds=1, poll_seconds=0.1)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_failure_that_passes_is_tried_again(service, credentials, status):
    service.failures = [status, status]
    assert get_endpoint.fn("tiny", credentials, "ann").status == "paused"


def test_silence_is_bounded(service, credentials, monkeypatch):
    monkeypatch.setattr(endpoints, "CALL_SECONDS", 0.2)
    monkeypatch.setattr(endpoints, "MAX_ATTEMPTS", 2)
    service.stall_seconds = 2
    with pytest.raises(EndpointError, match="did not answer in time"):
        get_endpoint.fn("tiny", credentials, "ann")


def test_refusals_are_typed_clear_and_hold_no_token(service, credentials, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_ambient")
    wrong = HuggingFaceCredentials(token="hf_wrongToken", endpoint=service.url)
    cases = [
        (credentials, "missing", "ann", "does not know it"),
        (credentials, "tiny", "bob", "no right"),
        (wrong, "tiny", "ann", "does not accept the token"),
        (HuggingFaceCredentials(endpoint=service.url), "tiny", "ann", "without a token"),
    ]
    for given, name, namespace, words in cases:
        with pytest.raises(EndpointError, match=words) as caught:
            get_endpoint.fn(name, given, namespace)
        dumped = pickle.dumps(caught.value) + repr(caught.value).encode()
        assert b"hf_" not in dumped
    assert "hf_ambient" not in service.tokens


def test_the_token_of_another_hub_is_not_sent_to_the_service():
    credentials = HuggingFaceCredentials(token=TOKEN, endpoint="http://127.0.0.1:9")
    with pytest.raises(EndpointError, match="is not sent to"):
        get_endpoint.fn("tiny", credentials, "ann")


@pytest.mark.usefixtures("prefect_server")
def test_the_tasks_run_in_a_flow(service, credentials):
    @flow
    def wake(credentials: HuggingFaceCredentials):
        resume_endpoint("tiny", credentials, "ann")
        return wait_for_endpoint("tiny", credentials, "ann", poll_seconds=0.05)

    assert wake(credentials).url == service.url
