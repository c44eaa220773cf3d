"""What the block of an endpoint refuses, where it points, and whom it gives the token."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from prefect_huggingface.blocks import HuggingFaceCredentials, InferenceEndpoint

URL = "https://name.endpoints.huggingface.cloud"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "`url` or `model_id` must be given"),
        ({"url": "localhost:8080"}, "with its scheme"),
        ({"url": "ftp://host"}, "http or https"),
        ({"url": "https://"}, "http or https"),
        ({"url": "http://host:99999"}, "http or https"),
        ({"url": "https://user:pw@host"}, "no user, password"),
        ({"url": "https://host/?key=1"}, "no user, password, query"),
        ({"model_id": "not a model"}, "Hub id"),
        ({"url": URL, "provider": "novita"}, "for serverless models"),
        ({"model_id": "a/b", "protocol": "tgi"}, "must be 'openai'"),
        ({"url": URL, "protocol": "openai", "send_prompts_as": "text"}, "must be 'chat'"),
        ({"url": URL, "headers": {"Authorization": "Bearer x"}}, "Put a token into `credentials`"),
        ({"url": URL, "headers": {"X-Key": "a\nb"}}, "plain ASCII"),
        ({"url": URL, "extra_parameters": {"temperature": 1}}, "Use `options`"),
        ({"url": URL, "extra_parameters": {"stream": True}}, "Use `options`"),
        ({"url": URL, "max_concurrency": 0}, "greater than"),
        ({"url": URL, "timeout_seconds": 0}, "greater than"),
        ({"url": URL, "max_attempts": 0}, "greater than"),
        ({"model_id": "a/b", "router": "router"}, "http or https"),
    ],
)
def test_wrong_values_are_refused_with_the_remedy(fields, words):
    with pytest.raises(ValidationError, match=words):
        InferenceEndpoint(**fields)


@pytest.mark.parametrize("form", ["", "/", "/v1/", "/v1/chat/completions", "/v1/chat/completions/"])
def test_the_address_is_that_of_the_server(form):
    assert InferenceEndpoint(url=URL + form).base_url in (URL, f"{URL}/v1")


def test_serverless_models_are_at_the_router():
    assert InferenceEndpoint(model_id="a/b").base_url == "https://router.huggingface.co/v1"
    assert InferenceEndpoint(model_id="a/b").model_name == "a/b"
    assert InferenceEndpoint(model_id="a/b", provider="auto").model_name == "a/b"
    assert InferenceEndpoint(model_id="a/b", provider="novita").model_name == "a/b:novita"
    direct = InferenceEndpoint(model_id="a/b", provider="hf-inference", protocol="tgi")
    assert direct.base_url == "https://router.huggingface.co/hf-inference/models/a/b"


def test_only_a_token_that_is_configured_is_given_out(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_ambient")
    assert InferenceEndpoint(url=URL).get_token() is None
    assert InferenceEndpoint(model_id="a/b").get_token() is None
    for credentials in (HuggingFaceCredentials(), HuggingFaceCredentials(use_ambient_token=True)):
        assert InferenceEndpoint(url=URL, credentials=credentials).get_token() is None
    assert InferenceEndpoint(model_id="a/b", credentials=HuggingFaceCredentials()).get_token() is None
    own = HuggingFaceCredentials(token="hf_own")
    assert InferenceEndpoint(url=URL, credentials=own).get_token() == "hf_own"


@pytest.mark.usefixtures("prefect_server")
def test_secrets_are_hidden_and_come_back_from_the_server():
    endpoint = InferenceEndpoint(
        url=URL, credentials=HuggingFaceCredentials(token="hf_canary"), headers={"X-Key": "key-4711"}
    )
    endpoint.save("test-endpoint", overwrite=True)
    loaded = InferenceEndpoint.load("test-endpoint")
    assert (loaded.get_token(), loaded.get_headers()) == ("hf_canary", {"X-Key": "key-4711"})
    for text in (repr(loaded), str(loaded), loaded.model_dump_json()):
        assert "hf_canary" not in text
        assert "key-4711" not in text
