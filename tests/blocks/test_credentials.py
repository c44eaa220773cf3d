from __future__ import annotations

import cloudpickle
import pytest
from pydantic import ValidationError

from prefect_huggingface.blocks import HuggingFaceCredentials, LocalModel


@pytest.mark.parametrize("token", ["", " hf_x", "hf_x\n", "hf x", "hf_ä", "hf_\x07"])
def test_a_token_that_no_header_can_hold_is_refused_without_showing_it(token):
    with pytest.raises(ValidationError) as caught:
        HuggingFaceCredentials(token=token)
    with pytest.raises(ValidationError) as nested:
        LocalModel(model_id="a/b", credentials={"token": token})
    message = caught.value.errors()[0]["msg"]
    assert "`token` must" in message
    assert not token.strip() or token.strip() not in f"{caught.value}{nested.value}"


@pytest.mark.parametrize("endpoint", ["huggingface.co", "ftp://hub", "http://", "https://u:p@hub", "https://hub?x=1"])
def test_an_address_that_is_none_is_refused(endpoint):
    with pytest.raises(ValidationError, match="`endpoint`"):
        HuggingFaceCredentials(endpoint=endpoint)


def test_an_address_of_the_environment_is_checked_too(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "hf-mirror.com")
    with pytest.raises(ValidationError, match="HF_ENDPOINT .* got 'hf-mirror.com'"):
        LocalModel(model_id="a/b").get_credentials()


def test_the_ambient_token_goes_only_to_the_default_hub(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_ambient")
    assert HuggingFaceCredentials().get_token() == "hf_ambient"
    assert HuggingFaceCredentials(use_ambient_token=False).get_token() is None
    assert HuggingFaceCredentials(endpoint="http://127.0.0.1:1").get_token() is None
    assert HuggingFaceCredentials(endpoint="http://127.0.0.1:1", use_ambient_token=True).get_token() == "hf_ambient"
    assert HuggingFaceCredentials(token="hf_own").get_token() == "hf_own"


def test_the_client_is_bound_to_the_address_and_sends_no_other_token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_ambient")
    client = HuggingFaceCredentials(endpoint="http://127.0.0.1:1/").get_client()
    assert client.endpoint == "http://127.0.0.1:1"
    assert client.token is False


def test_the_token_is_hidden():
    credentials = HuggingFaceCredentials(token="hf_canary")
    assert "hf_canary" not in f"{credentials!r}{credentials}{credentials.model_dump_json()}"
    assert cloudpickle.loads(cloudpickle.dumps(credentials)).get_token() == "hf_canary"
