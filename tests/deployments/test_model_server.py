"""The model server as its clients see it: the official client, LangChain's, curl, and the endpoint block."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

from prefect_huggingface.blocks import GenerationOptions, HuggingFaceCredentials, InferenceEndpoint, LocalModel
from prefect_huggingface.tasks.engines.registry import load_engine
from prefect_huggingface.tasks.generation import complete_prompts, stream_completion
from prefect_huggingface.tasks.records import Request
from support.model_servers import USER, ModelServerProcess, model_server
from support.prefect_services import wait_until
from support.scripted_models import make_scripted_model

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"enum": ["Lima", "Oslo"]}}, "required": ["city"]},
    },
}
# Greedily, a random model would go on with white space for ever.
SAMPLED: dict[str, Any] = {"max_tokens": 120, "temperature": 1.0, "seed": 2}
CITY = {
    "type": "object", "properties": {"city": {"enum": ["Lima", "Oslo"]}}, "required": ["city"],
    "additionalProperties": False,
}  # fmt: skip


TALK = "Let me look out of the window, and then ask for it: 1 < 2."


@pytest.fixture(scope="module")
def client(guarded_server: ModelServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=guarded_server.url, api_key=guarded_server.key, max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def name(long_model: Path) -> str:
    return long_model.name


def test_the_official_client_lists_and_asks(client: openai.OpenAI, name: str) -> None:
    assert [model.id for model in client.models.list()] == [name]
    assert client.models.retrieve(name).owned_by == "prefect-huggingface"
    answer = client.chat.completions.create(model=name, messages=USER, max_tokens=5)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5
    text = client.completions.create(model=name, prompt=["One, two", "The capital"], max_tokens=5, echo=True)
    assert [choice.index for choice in text.choices] == [0, 1]
    assert text.choices[0].text.startswith("One, two")
    assert text.choices[1].text.startswith("The capital")


def test_streams_say_the_same_as_whole_answers(client: openai.OpenAI, name: str) -> None:
    whole = client.chat.completions.create(model=name, messages=USER, max_tokens=30)
    chunks = list(
        client.chat.completions.create(
            model=name, messages=USER, max_tokens=30, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert len(chunks) > 5
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1
    text = client.completions.create(model=name, prompt="One", max_tokens=9).choices[0].text
    pieces = client.completions.create(model=name, prompt="One", max_tokens=9, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == text


def test_several_sampled_answers_whole_and_streamed(client: openai.OpenAI, name: str) -> None:
    def ask(**more):
        return client.chat.completions.create(
            model=name, messages=USER, max_tokens=12, n=3, temperature=1.5, seed=7, **more
        )

    whole = [choice.message.content for choice in ask().choices]
    assert whole == [choice.message.content for choice in ask().choices]
    assert len(set(whole)) == 3
    texts = ["", "", ""]
    for chunk in ask(stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == whole


def test_stop_strings_and_log_probabilities(client: openai.OpenAI, name: str) -> None:
    whole = client.chat.completions.create(model=name, messages=USER, max_tokens=20, logprobs=True)
    text = whole.choices[0].message.content
    assert text is not None
    assert whole.choices[0].logprobs is not None
    assert len(whole.choices[0].logprobs.content or ()) == 20
    stop = text[len(text) // 2 :][:3]
    cut = client.chat.completions.create(model=name, messages=USER, max_tokens=20, stop=stop)
    assert cut.choices[0].message.content == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


def test_log_probabilities_have_the_texts_of_their_tokens(client: openai.OpenAI, name: str) -> None:
    asked: dict[str, Any] = {"model": name, "messages": USER, "max_tokens": 20, "logprobs": True}
    whole = client.chat.completions.create(**asked).choices[0]
    assert whole.logprobs is not None
    tokens = whole.logprobs.content or []
    assert b"".join(bytes(token.bytes or ()) for token in tokens).decode() == whole.message.content
    assert all(token.token.encode() == bytes(token.bytes or ()) for token in tokens if "\\x" not in token.token)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert [token for chunk in chunks if (said := chunk.choices[0].logprobs) for token in said.content or ()] == tokens

    plain: dict[str, Any] = {"model": name, "prompt": "One", "max_tokens": 20, "logprobs": 0, "echo": True}
    text = client.completions.create(**plain).choices[0]
    assert text.logprobs is not None
    named = list(zip(text.logprobs.tokens or (), text.logprobs.text_offset or (), strict=True))
    assert len(named) == len(text.logprobs.token_logprobs or ()) == 20
    assert named[0][1] == len("One")
    assert all(text.text[place:].startswith(token) for token, place in named if not token.startswith("bytes:"))
    streamed = [piece.choices[0].logprobs for piece in client.completions.create(**plain, stream=True)]
    assert [said for said in streamed if said] == [text.logprobs]


@pytest.mark.parametrize(
    "form",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}},
        {"tools": [WEATHER], "tool_choice": "required"},
    ],
    ids=["form", "call"],
)
def test_a_form_that_is_cut_off_is_the_same_whole_and_streamed(
    client: openai.OpenAI, name: str, form: dict[str, Any]
) -> None:
    asked = {"model": name, "messages": USER, "max_tokens": 4, **form}
    whole = client.chat.completions.create(**asked).choices[0]
    choices = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, stream=True)]
    assert whole.finish_reason == choices[-1].finish_reason == "length"
    assert (whole.message.content or "").startswith("{")
    assert whole.message.content == "".join(choice.delta.content or "" for choice in choices)


def test_answers_of_a_form(client: openai.OpenAI, name: str) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
    answer = client.chat.completions.create(model=name, messages=USER, response_format=form, **SAMPLED)
    assert json.loads(answer.choices[0].message.content or "")["city"] in ("Lima", "Oslo")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_tool_that_must_be_called_is_called(client: openai.OpenAI, name: str, choice) -> None:
    asked = {"model": name, "messages": USER, "tools": [WEATHER], "tool_choice": choice, **SAMPLED}
    answer = client.chat.completions.create(**asked).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content is None
    [call] = answer.message.tool_calls or ()
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments)["city"] in ("Lima", "Oslo")
    # The history of a call goes back as clients send it.
    history = [*USER, answer.message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "Sunny"}]
    assert client.chat.completions.create(model=name, messages=history, max_tokens=3).choices[0].message.role
    deltas = [c.choices[0] for c in client.chat.completions.create(**asked, stream=True) if c.choices]
    [streamed] = [call for each in deltas for call in each.delta.tool_calls or ()]
    assert (streamed.function.name, streamed.function.arguments) == (call.function.name, call.function.arguments)
    assert deltas[-1].finish_reason == "tool_calls"


def test_errors_have_the_form_and_the_status_of_openai(client: openai.OpenAI, name: str) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-4o", messages=USER)
    assert unknown.value.code == "model_not_found"
    assert name in unknown.value.message
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as long:
            client.chat.completions.create(model=name, messages=USER, max_tokens=9000, stream=stream)
        assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as option:
        client.chat.completions.create(model=name, messages=USER, logit_bias={"5": 1})
    assert option.value.param == "logit_bias"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.BadRequestError, match="is for text-generation") as other:
        client.embeddings.create(model=name, input="x", encoding_format="float")
    assert other.value.code == "model_not_supported"
    with pytest.raises(openai.NotFoundError) as nowhere:
        client.images.generate(model=name, prompt="x")
    assert nowhere.value.code == "unknown_url"


def test_chat_openai_of_langchain(guarded_server: ModelServerProcess, name: str) -> None:
    key = SecretStr(guarded_server.key or "")
    chat = ChatOpenAI(model=name, base_url=guarded_server.url, api_key=key, max_retries=0, temperature=0, max_tokens=16)
    whole = chat.invoke("What is the capital of Spain?")
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] == 16
    chunks = list(chat.stream("What is the capital of Spain?"))
    assert "".join(str(chunk.content) for chunk in chunks) == whole.content
    careful = chat.model_copy(update=SAMPLED)
    structured = careful.with_structured_output({"title": "City", **CITY}, method="json_schema")
    assert structured.invoke("Which city?")["city"] in ("Lima", "Oslo")
    called = careful.bind_tools([WEATHER], tool_choice="required").invoke("Which city?")
    assert called.tool_calls[0]["name"] == "get_weather"
    assert len(chat.batch(["One", "Two", "Three"])) == 3


def test_curl(guarded_server: ModelServerProcess) -> None:
    body = json.dumps({"messages": USER, "max_tokens": 4, "stream": True})
    done = subprocess.run(
        ["curl", "-sN", f"{guarded_server.url}/chat/completions", "-H", "Content-Type: application/json",
         "-H", f"Authorization: Bearer {guarded_server.key}", "-d", body],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    events = [line for line in done.stdout.splitlines() if line]
    assert all(line.startswith("data: ") for line in events)
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[0].removeprefix("data: "))["object"] == "chat.completion.chunk"


def test_the_endpoint_block_gets_what_the_engine_gives(
    guarded_server: ModelServerProcess, long_model: Path, name: str
) -> None:
    credentials = HuggingFaceCredentials(token=SecretStr(guarded_server.key or ""))
    extra = ["top_k", "repetition_penalty", "min_new_tokens", "ignore_eos"]
    endpoint = InferenceEndpoint(url=guarded_server.url, model_id=name, credentials=credentials, extra_options=extra)
    local = LocalModel(model_id=str(long_model))
    options = GenerationOptions(max_new_tokens=20, repetition_penalty=1.2, ignore_eos=True)
    prompts = ["One, two", "The capital of France", "Three"]
    there, here = (complete_prompts(model, prompts, options) for model in (endpoint, local))
    assert [(each.text, each.finish_reason, each.generated_tokens) for each in there] == [
        (each.text, each.finish_reason, each.generated_tokens) for each in here
    ]
    assert [each.prompt_tokens for each in there] == [each.prompt_tokens for each in here]
    assert "".join(stream_completion(endpoint, "One, two", options)) == here[0].text
    failed = load_engine(endpoint).submit(Request("One", options=GenerationOptions(max_new_tokens=9000))).result(60)
    assert failed.error_code == "too_long"


def test_tokens_health_and_metrics(guarded_server: ModelServerProcess, long_model: Path) -> None:
    counted = guarded_server.post("/tokenize", prompt="One, two, three").json()
    assert counted["count"] > 3
    assert counted["max_model_len"] == 8192
    assert httpx.get(f"{guarded_server.origin}/health").json() == {"status": "ok"}
    before = guarded_server.read_metric("vllm:generation_tokens_total")
    guarded_server.chat(max_tokens=7)
    guarded_server.chat(max_tokens=7, stream=True)
    assert guarded_server.read_metric("vllm:generation_tokens_total") == before + 14
    assert guarded_server.read_metric("vllm:time_to_first_token_seconds_count") > 0
    assert guarded_server.read_metric("vllm:num_requests_running") == 0
    assert guarded_server.read_metric("vllm:kv_cache_usage_perc") == 0
    body = {"messages": USER, "max_tokens": 3000, "stream": True, "ignore_eos": True}
    headers = {"Authorization": f"Bearer {guarded_server.key}"}
    with httpx.stream("POST", f"{guarded_server.url}/chat/completions", json=body, headers=headers):
        wait_until(lambda: 0 < guarded_server.read_metric("vllm:kv_cache_usage_perc") < 1, 30, "a filled cache")


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """A server of models that think first: one then answers, one calls a tool, and one talks before it calls it."""
    folder = tmp_path_factory.mktemp("thinker")
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    thinker = make_scripted_model(folder / "thinker", "<think>\nHm.\n</think>\n\nLima")
    caller = make_scripted_model(folder / "caller", f"<think>\nA tool.\n</think>\n\n{call}")
    talker = make_scripted_model(folder / "talker", f"<think>\nHm.\n</think>\n\n{TALK}\n{call}")
    models = [argument for model in (thinker, caller, talker) for argument in ("--model", str(model))]
    with model_server(folder, *models, "--backend", "torch", "--device", "cpu") as server:
        yield openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=120)


def test_reasoning_is_kept_apart(thinker: openai.OpenAI) -> None:
    asked = {"model": "thinker", "messages": USER, "max_tokens": 60}
    message = thinker.chat.completions.create(**asked).choices[0].message
    assert (message.content, message.reasoning_content.strip()) == ("Lima", "Hm.")
    deltas = [chunk.choices[0].delta for chunk in thinker.chat.completions.create(**asked, stream=True)]
    assert "".join(delta.content or "" for delta in deltas) == "Lima"
    assert "".join(getattr(delta, "reasoning_content", "") for delta in deltas).strip() == "Hm."


def test_a_tool_that_may_be_called_is_found_behind_the_thoughts(thinker: openai.OpenAI) -> None:
    question = [{"role": "user", "content": "What is the weather?"}]
    asked = {"model": "caller", "messages": question, "tools": [WEATHER], "max_tokens": 200}
    choice = thinker.chat.completions.create(**asked).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert choice.message.tool_calls[0].function.arguments == '{"city": "Oslo"}'
    assert choice.message.reasoning_content.strip() == "A tool."
    deltas = [chunk.choices[0].delta for chunk in thinker.chat.completions.create(**asked, stream=True)]
    [call] = [call for delta in deltas for call in delta.tool_calls or ()]
    assert (call.function.name, call.function.arguments) == ("get_weather", '{"city": "Oslo"}')
    assert not any(delta.content for delta in deltas)


def test_text_streams_although_a_tool_may_be_called(thinker: openai.OpenAI) -> None:
    asked = {"model": "talker", "messages": USER, "tools": [WEATHER], "max_tokens": 200}
    whole = thinker.chat.completions.create(**asked).choices[0]
    choices = [chunk.choices[0] for chunk in thinker.chat.completions.create(**asked, stream=True)]
    pieces = [choice.delta.content for choice in choices if choice.delta.content]
    assert len(pieces) > 3
    assert "".join(pieces).strip() == (whole.message.content or "").strip() == TALK
    streamed = [call.function for choice in choices for call in choice.delta.tool_calls or ()]
    calls = [call.function for call in whole.message.tool_calls or ()]
    assert [(call.name, call.arguments) for call in streamed] == [(call.name, call.arguments) for call in calls]
    assert [call.arguments for call in calls] == ['{"city": "Oslo"}']
    assert choices[-1].finish_reason == whole.finish_reason == "tool_calls"
    # All of the text comes before the call.
    assert [bool(choice.delta.tool_calls) for choice in choices][-2:] == [True, False]


def test_options_beyond_openai_s(thinker: openai.OpenAI) -> None:
    def ask(**more: Any) -> Any:
        return thinker.chat.completions.create(model="thinker", messages=USER, max_tokens=4, extra_body=more)

    plain = ask().usage.prompt_tokens
    assert ask(chat_template_kwargs={"enable_thinking": False}).usage.prompt_tokens > plain
    assert ask(presence_penalty=0.5, frequency_penalty=0.5, min_tokens=2).usage.completion_tokens == 4
    with pytest.raises(openai.BadRequestError, match="`unknown` is not known"):
        ask(unknown=3)
