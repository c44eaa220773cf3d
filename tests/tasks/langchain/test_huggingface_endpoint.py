"""`HuggingFaceEndpoint` has the arguments and methods of LangChain's class, and keeps what that one only promises."""

from __future__ import annotations

import asyncio
import pickle

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import PromptTemplate

from prefect_huggingface.blocks import GenerationOptions, HuggingFaceCredentials, InferenceEndpoint
from prefect_huggingface.tasks.errors import GenerationError, SettingsError
from prefect_huggingface.tasks.langchain import ChatHuggingFace, HuggingFaceEndpoint
from support.tgi_server import TgiServer

PROMPT = "The capital of France is"
TOKEN = "hf_CanaryTokenOfTheEndpoint"


@pytest.fixture
def other(tgi_server):
    """A second host."""
    with TgiServer(tgi_server.protocol.model) as server:
        yield server


@pytest.fixture
def llm(tgi):
    return HuggingFaceEndpoint(endpoint_url=tgi.url, max_new_tokens=12)


def test_invoke_stream_batch_and_their_async_twins_agree(llm):
    text = llm.invoke(PROMPT)
    assert text
    assert "".join(llm.stream(PROMPT)) == text
    assert llm.batch([PROMPT, "One, two,", PROMPT])[::2] == [text, text]
    assert asyncio.run(llm.ainvoke(PROMPT)) == text
    chain = PromptTemplate.from_template("The capital of {country} is") | llm | StrOutputParser()
    assert chain.invoke({"country": "France"}) == text
    result = llm.generate([PROMPT])
    assert result.generations[0][0].generation_info["finish_reason"] == "length"
    assert result.llm_output["token_usage"]["completion_tokens"] == 12


def test_the_arguments_of_the_documentation_reach_the_server(tgi):
    llm = HuggingFaceEndpoint(
        endpoint_url=tgi.url, max_new_tokens=8, top_k=10, top_p=0.95, typical_p=0.95, temperature=0.01,
        repetition_penalty=1.03, huggingfacehub_api_token="my-api-key", stop_sequences=["x1"], seed=3,
        truncate=100, watermark=True, server_kwargs={"headers": {"X-Team": "a"}, "bill_to": "my-org"},
    )  # fmt: skip
    llm.invoke(PROMPT, stop=["x2"])
    sent = tgi.posts()[-1]
    assert sent.body["parameters"] == {
        "details": True, "return_full_text": False, "do_sample": True, "max_new_tokens": 8, "top_k": 10, "top_p": 0.95,
        "typical_p": 0.95, "temperature": 0.01, "repetition_penalty": 1.03, "stop": ["x1", "x2"], "seed": 3,
        "truncate": 100, "watermark": True,
    }  # fmt: skip
    assert sent.token == "my-api-key"
    assert (sent.headers["x-team"], sent.headers["x-hf-bill-to"]) == ("a", "my-org")


def test_text_is_greedy_unless_sampling_is_asked_for(tgi, llm):
    llm.invoke(PROMPT)
    assert not {"temperature", "top_p", "typical_p", "do_sample"} & set(tgi.posts()[-1].body["parameters"])
    HuggingFaceEndpoint(endpoint_url=tgi.url, temperature=0.3, do_sample=False).invoke(PROMPT, max_new_tokens=2)
    assert "temperature" not in tgi.posts()[-1].body["parameters"]
    HuggingFaceEndpoint(endpoint_url=tgi.url, do_sample=True).invoke(PROMPT, max_new_tokens=2)
    sent = tgi.posts()[-1].body["parameters"]
    assert (sent["do_sample"], sent["temperature"], sent["top_p"]) == (True, 0.8, 0.95)


def test_stop_strings_of_several_tokens_end_the_stream_too(llm):
    whole = llm.invoke(PROMPT)
    stop = whole[len(whole) // 2 - 1 : len(whole) // 2 + 2]
    expected = whole[: whole.index(stop)]
    assert llm.invoke(PROMPT, stop=[stop]) == expected
    assert "".join(llm.stream(PROMPT, stop=[stop])) == expected
    assert llm.bind(stop=[stop]).invoke(PROMPT) == expected


def test_streaming_shows_the_tokens_to_the_callbacks(tgi):
    class Listener(BaseCallbackHandler):
        def __init__(self):
            self.tokens = []

        def on_llm_new_token(self, token, **kwargs):
            self.tokens.append(token)

    listener = Listener()
    llm = HuggingFaceEndpoint(endpoint_url=tgi.url, max_new_tokens=12, streaming=True, callbacks=[listener])
    text = llm.invoke(PROMPT)
    assert "".join(listener.tokens) == text
    assert len(listener.tokens) > 2
    listener.tokens.clear()
    assert asyncio.run(llm.ainvoke(PROMPT)) == text == "".join(listener.tokens)


@pytest.mark.parametrize("present", [(), ("HF_TOKEN",), ("HUGGINGFACEHUB_API_TOKEN",)], ids=str)
def test_the_given_token_goes_to_the_url_and_no_ambient_one(tgi, other, monkeypatch, present):
    for name in present:
        monkeypatch.setenv(name, "hf_ambient")
    HuggingFaceEndpoint(endpoint_url=tgi.url, max_new_tokens=2).invoke(PROMPT)
    assert {entry.token for entry in tgi.requests} == {None}
    tgi.clear()
    HuggingFaceEndpoint(endpoint_url=tgi.url, max_new_tokens=2, huggingfacehub_api_token=TOKEN).invoke(PROMPT)
    assert {entry.token for entry in tgi.requests} == {TOKEN}
    tgi.fault("redirect", status=307, location=other.url, path="^/$")
    HuggingFaceEndpoint(endpoint_url=tgi.url, max_new_tokens=2, huggingfacehub_api_token=TOKEN).invoke(PROMPT)
    assert {entry.token for entry in other.requests} == {None}


def test_no_token_is_shown_or_traced(tgi):
    llm = HuggingFaceEndpoint(endpoint_url=tgi.url, huggingfacehub_api_token=f"{TOKEN}\n")
    assert llm.endpoint.get_token() == TOKEN
    for text in (
        repr(llm),
        str(llm),
        repr(llm.model_dump()),
        repr(llm._identifying_params),
        repr(llm._get_ls_params()),
    ):
        assert TOKEN not in text


def test_a_passing_failure_is_tried_again_and_a_lasting_one_is_typed(tgi, llm):
    text = llm.invoke(PROMPT)
    tgi.fault("status", status=429, path="^/$", times=2)
    assert llm.invoke(PROMPT) == text
    tgi.fault("status", status=401, path="^/$")
    with pytest.raises(GenerationError, match="asks for a token"):
        llm.invoke(PROMPT)
    tgi.faults.clear()
    tgi.fault("status", status=422, path="^/$", contains="poison", times=None)
    rows = llm.batch([PROMPT, "poison", PROMPT], return_exceptions=True)
    assert [rows[0], rows[2]] == [text, text]
    assert isinstance(rows[1], GenerationError)


def test_a_chat_model_on_an_endpoint_has_counts_and_streams(tgi, serve_url):
    for url in (tgi.url, serve_url):
        chat = ChatHuggingFace(llm=HuggingFaceEndpoint(endpoint_url=url, max_new_tokens=8))
        answer = chat.invoke(PROMPT)
        assert answer.usage_metadata["output_tokens"] == 8
        assert answer.response_metadata["finish_reason"] == "length"
        assert "".join(chunk.content for chunk in chat.stream(PROMPT)) == answer.content
    assert tgi.posts()[0].path == "/v1/chat/completions"


def test_a_block_takes_the_place_of_the_arguments(tgi):
    block = InferenceEndpoint(
        url=tgi.url, options=GenerationOptions(max_new_tokens=3), credentials=HuggingFaceCredentials(token=TOKEN)
    )
    llm = HuggingFaceEndpoint(endpoint=block)
    assert llm.generate([PROMPT]).llm_output["token_usage"]["completion_tokens"] == 3
    assert tgi.posts()[-1].token == TOKEN
    assert HuggingFaceEndpoint(endpoint=block, max_new_tokens=5)._generation.options.max_new_tokens == 5
    copy = pickle.loads(pickle.dumps(llm))
    assert copy.invoke(PROMPT) == llm.invoke(PROMPT)


def test_a_sampling_setting_leaves_the_rest_of_a_block_as_it_is():
    block = InferenceEndpoint(url="http://a", options=GenerationOptions(max_new_tokens=64, do_sample=True, top_p=0.5))
    options = HuggingFaceEndpoint(endpoint=block, temperature=0.3).generation.options
    assert (options.max_new_tokens, options.top_p, options.temperature) == (64, 0.5, 0.3)


def test_a_total_length_is_kept_beside_a_sampling_setting():
    generation = HuggingFaceEndpoint(endpoint_url="http://a", max_length=128, temperature=0.5).generation
    assert (generation.max_length, "max_new_tokens" in generation.options.model_fields_set) == (128, False)
    assert (generation.options.temperature, generation.options.top_p) == (0.5, 0.95)


def test_penalties_go_to_the_server(tgi):
    HuggingFaceEndpoint(endpoint_url=tgi.url, max_new_tokens=3, frequency_penalty=0.5).invoke(PROMPT)
    assert tgi.posts()[-1].body["parameters"]["frequency_penalty"] == 0.5


def test_settings_that_are_set_later_count(tgi):
    llm = HuggingFaceEndpoint(endpoint_url=tgi.url, max_new_tokens=12)
    llm.max_new_tokens, llm.stop_sequences = 3, ["xyzzy"]
    assert llm.generate([PROMPT]).llm_output["token_usage"]["completion_tokens"] == 3
    assert llm.generation.options.stop == ["xyzzy"]
    llm.stop_sequences, llm.temperature = ["plugh"], 0.5
    options = llm.generation.options
    assert (options.stop, options.do_sample, options.temperature, options.top_p) == (["plugh"], True, 0.5, 0.95)
    llm.temperature, llm.typical_p = None, 0.9
    assert llm.generation.options.do_sample is False
    with pytest.raises(ValueError, match="max_new_tokens"):
        llm.max_new_tokens = -1
    assert (llm.max_new_tokens, llm.generation.options.max_new_tokens) == (3, 3)
    llm.temperature = 0.5
    llm.invoke(PROMPT)
    assert tgi.posts()[-1].body["parameters"]["typical_p"] == 0.9


def test_other_names_and_blocks_that_are_set_later():
    llm = HuggingFaceEndpoint(endpoint_url="http://a", max_tokens=5, stop=["a"], model_kwargs={"temperature": 0.3})
    assert llm.generation.options.max_new_tokens == 5
    llm.temperature, llm.stop_sequences = 0.9, ["b"]
    assert (llm.generation.options.temperature, llm.generation.options.stop) == (0.9, ["b"])
    with pytest.raises(SettingsError, match="nonsense"):
        llm.model_kwargs = {"nonsense": 1}
    llm.model_kwargs = None
    assert llm.generation.options.max_new_tokens == 512
    llm.endpoint = InferenceEndpoint(url="http://b", options=GenerationOptions(top_k=3, do_sample=True))
    llm.temperature = 0.5
    assert (llm.endpoint.url, llm.generation.options.top_k, llm.generation.options.temperature) == ("http://b", 3, 0.5)


def test_blocks_of_other_models_are_told_apart():
    blocks = [
        InferenceEndpoint(url="http://a", model_id="one"),
        InferenceEndpoint(url="http://a", model_id="two"),
        InferenceEndpoint(url="http://b", model_id="one"),
        InferenceEndpoint(url="http://a", model_id="one", extra_parameters={"adapter_id": "three"}),
    ]
    identities = [HuggingFaceEndpoint(endpoint=block).asdict() for block in blocks]
    assert all(one != other for place, one in enumerate(identities) for other in identities[:place])
    assert HuggingFaceEndpoint(endpoint=blocks[0]).asdict() == identities[0]


def test_serverless_models_go_to_the_router(monkeypatch):
    monkeypatch.setenv("HUGGINGFACEHUB_API_TOKEN", "hf_serverless")
    llm = HuggingFaceEndpoint(repo_id="organisation/name", provider="novita", task="conversational")
    assert llm.endpoint.base_url == "https://router.huggingface.co/v1"
    assert (llm.endpoint.model_name, llm.endpoint.get_token()) == ("organisation/name:novita", "hf_serverless")
    assert HuggingFaceEndpoint(model="organisation/name").repo_id == "organisation/name"


def test_the_address_may_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("HF_INFERENCE_ENDPOINT", "http://127.0.0.1:9")
    assert HuggingFaceEndpoint().endpoint_url == "http://127.0.0.1:9"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "must be given"),
        ({"endpoint_url": "http://a", "repo_id": "b/c"}, "Only one of"),
        ({"repo_id": "http://a"}, "endpoint_url"),
        ({"endpoint_url": "localhost:8080"}, "with its scheme"),
        ({"endpoint_url": "http://a", "max_tokns": 3}, "max_tokns"),
        ({"endpoint_url": "http://a", "temperature": 0.5, "model_kwargs": {"temperature": 0.6}}, "twice"),
        ({"endpoint_url": "http://a", "server_kwargs": {"cookies": {}}}, "cookies"),
        ({"endpoint_url": "http://a", "huggingfacehub_api_token": "a b"}, "white space"),
        ({"endpoint_url": "http://a", "provider": "novita"}, "serverless"),
    ],
)
def test_wrong_arguments_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        HuggingFaceEndpoint(**arguments)


def test_unknown_settings_of_a_call_are_refused(llm):
    with pytest.raises(SettingsError, match="max_tokns"):
        llm.invoke(PROMPT, max_tokns=3)
