"""The token of the block and only it goes to the origin of the endpoint, and nothing secret goes anywhere else."""

from __future__ import annotations

import itertools
import logging
import pickle
from pathlib import Path

import cloudpickle
import pytest
from huggingface_hub import constants

from prefect_huggingface.blocks import GenerationOptions, HuggingFaceCredentials, InferenceEndpoint
from prefect_huggingface.tasks.engines.endpoint_engine import EndpointEngine
from prefect_huggingface.tasks.records import Request
from support.tgi_server import TgiServer

SECRETS = {"env": "hf_fromEnvironment", "file": "hf_fromLoginFile", "block": "hf_fromTheBlock", "header": "key-4711"}
COMBINATIONS = [
    dict(zip(("env", "file", "block"), values, strict=True)) for values in itertools.product([False, True], repeat=3)
]


@pytest.fixture
def other(tgi_server):
    """A second host: another port is another origin."""
    with TgiServer(tgi_server.protocol.model) as server:
        yield server


@pytest.fixture
def ambient(monkeypatch):
    """Set or remove the token of the environment and that of the login file."""
    path = Path(constants.HF_TOKEN_PATH)

    def put(env=False, file=False, **_):
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACEHUB_API_TOKEN"):
            monkeypatch.setenv(name, SECRETS["env"]) if env else monkeypatch.delenv(name, raising=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(SECRETS["file"]) if file else path.unlink(missing_ok=True)

    yield put
    path.unlink(missing_ok=True)


def block_of(present, **fields):
    credentials = HuggingFaceCredentials(token=SECRETS["block"]) if present["block"] else None
    options = GenerationOptions(max_new_tokens=2)
    return InferenceEndpoint(
        credentials=credentials, options=options, headers={"X-Api-Key": SECRETS["header"]}, **fields
    )


def ask_everything(endpoint):
    """Use every route: look up, count, text and chat, whole and streamed."""
    with EndpointEngine(endpoint) as engine:
        rows = []
        for request in (Request("Hello"), Request(messages=[{"role": "user", "content": "Hello"}])):
            rows.append(engine.submit(request).result(timeout=30))
            rows.append(engine.submit(request, lambda text: None).result(timeout=30))
        assert engine.context_length in (512, None)
        return rows


def secrets_in(server):
    return {value for value in SECRETS.values() for entry in server.requests if value in repr(entry)}


@pytest.mark.parametrize(
    "present", COMBINATIONS, ids=lambda present: "+".join(k for k in present if present[k]) or "none"
)
def test_only_the_blocks_token_reaches_the_endpoint(tgi, ambient, present):
    ambient(**present)
    rows = ask_everything(block_of(present, url=tgi.url))
    assert [row.error for row in rows] == [None] * 4
    expected = SECRETS["block"] if present["block"] else None
    assert {entry.token for entry in tgi.requests} == {expected}
    assert {entry.headers["x-api-key"] for entry in tgi.requests} == {SECRETS["header"]}


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize(
    "present", COMBINATIONS, ids=lambda present: "+".join(k for k in present if present[k]) or "none"
)
def test_a_redirection_to_another_host_carries_no_secret(tgi, other, ambient, present, status):
    ambient(**present)
    tgi.fault("redirect", status=status, location=other.url, path="^/$", times=None)
    tgi.fault("redirect", status=status, location=f"{other.url}/v1/chat/completions", path="chat", times=None)
    tgi.fault("redirect", status=status, location=f"{other.url}/info", path="info", method="GET", times=None)
    rows = ask_everything(block_of(present, url=tgi.url))
    if status in (307, 308):
        assert [row.error for row in rows] == [None] * 4
    else:
        assert {row.error_code for row in rows} <= {"bad_answer", "not_found"}
    assert len(other.requests) >= 4
    assert secrets_in(other) == set()
    assert {entry.token for entry in other.requests} == {None}
    assert not any("cookie" in entry.headers for entry in other.requests)


def test_a_refusal_after_a_redirection_says_where_to(tgi, other):
    other.token = "wanted"
    tgi.fault("redirect", status=307, location=other.url, path="^/$", times=None)
    credentials = HuggingFaceCredentials(token="wanted")
    with EndpointEngine(InferenceEndpoint(url=tgi.url, credentials=credentials)) as engine:
        found = engine.submit(Request("Hello")).result(timeout=30)
    assert found.error_code == "unauthorized"
    assert other.url in found.error
    assert "wanted" not in found.error


@pytest.mark.parametrize(
    "present", COMBINATIONS, ids=lambda present: "+".join(k for k in present if present[k]) or "none"
)
def test_serverless_inference_gets_the_blocks_token_only(tgi, ambient, present):
    ambient(**present)
    ask_everything(block_of(present, model_id="organisation/tiny", provider="novita", router=tgi.url))
    assert {entry.token for entry in tgi.requests} == {SECRETS["block"] if present["block"] else None}
    assert {entry.body["model"] for entry in tgi.posts()} == {"organisation/tiny:novita"}
    assert {entry.path for entry in tgi.posts()} == {"/v1/chat/completions"}


def test_the_token_of_the_machine_is_used_for_serverless_inference_where_asked_for(tgi, ambient):
    ambient(env=True)
    credentials = HuggingFaceCredentials(use_ambient_token=True)
    serverless = InferenceEndpoint(model_id="organisation/tiny", router=tgi.url, credentials=credentials)
    assert serverless.get_token() == SECRETS["env"]
    assert InferenceEndpoint(url=tgi.url, credentials=credentials).get_token() is None


@pytest.mark.parametrize("status", [400, 401, 403, 404, 429, 500])
def test_no_secret_is_in_a_result_or_a_log(tgi, ambient, caplog, status):
    ambient(env=True, file=True)
    tgi.fault("status", status=status, words=f"no: {' '.join(SECRETS.values())}", path="", method=None, times=None)
    endpoint = block_of({"block": True}, url=tgi.url, max_attempts=2)
    with caplog.at_level(logging.DEBUG), EndpointEngine(endpoint) as engine:
        found = engine.submit(Request("Hello")).result(timeout=30)
    own = {SECRETS["block"], SECRETS["header"]}
    assert found.error is not None
    for text in (repr(found), caplog.text, repr(endpoint), endpoint.model_dump_json()):
        assert not [secret for secret in own if secret in text]
    for dumped in (pickle.dumps(found), cloudpickle.dumps(found)):
        assert not [secret for secret in own if secret.encode() in dumped]
