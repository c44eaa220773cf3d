"""The endpoint engine against the real `transformers serve`, which speaks OpenAI's chat protocol."""

from __future__ import annotations

import pytest

from prefect_huggingface.blocks import GenerationOptions, InferenceEndpoint, LocalModel, ResponseFormat
from prefect_huggingface.tasks.engines.endpoint_engine import EndpointEngine
from prefect_huggingface.tasks.engines.registry import load_engine
from prefect_huggingface.tasks.errors import EngineError
from prefect_huggingface.tasks.records import Request

PROMPTS = ["The capital of France is", "One, two,", "A small model", "Quarante-deux"]


def options(**fields):
    return GenerationOptions(**{"max_new_tokens": 12, **fields})


@pytest.fixture(params=["", "/v1", "/v1/chat/completions"], ids=["root", "v1", "route"])
def any_url(serve_url, request):
    return serve_url + request.param


@pytest.fixture
def engine(serve_url):
    with EndpointEngine(InferenceEndpoint(url=serve_url, max_concurrency=4)) as engine:
        yield engine


@pytest.fixture
def local(tiny_llama):
    return load_engine(LocalModel(model_id=str(tiny_llama), backend="torch"))


def test_any_form_of_the_address_is_understood(any_url):
    with EndpointEngine(InferenceEndpoint(url=any_url)) as engine:
        found = engine.submit(Request(PROMPTS[0], options=options())).result(timeout=60)
    assert (found.error, found.finish_reason) == (None, "length")


def test_greedy_text_and_counts_are_those_of_the_local_engine(engine, local):
    requests = [Request(prompt, options=options(), id=prompt) for prompt in PROMPTS]
    requests += [Request(messages=[{"role": "user", "content": p}], options=options(), id=f"chat {p}") for p in PROMPTS]
    remote = {row.request_id: row for row in engine.generate(requests)}
    for here in local.generate(requests):
        there = remote[here.request_id]
        assert (there.text, there.finish_reason, there.prompt_tokens, there.generated_tokens) == (
            here.text, here.finish_reason, here.prompt_tokens, here.generated_tokens,
        )  # fmt: skip


def test_a_stream_is_the_same_text_with_the_same_counts(engine):
    request = Request(PROMPTS[0], options=options())
    whole = engine.submit(request).result(timeout=60)
    pieces: list[str] = []
    streamed = engine.submit(request, pieces.append).result(timeout=60)
    assert "".join(pieces) == streamed.text == whole.text
    assert len(pieces) > 1
    assert (streamed.prompt_tokens, streamed.generated_tokens) == (whole.prompt_tokens, whole.generated_tokens)
    assert whole.generated_tokens == 12


@pytest.mark.parametrize("streamed", [False, True])
def test_a_stop_string_is_cut_as_by_the_local_engine(engine, local, streamed):
    whole = engine.submit(Request(PROMPTS[0], options=options(max_new_tokens=24))).result(timeout=60).text
    # The server streams no incomplete characters, so none is in the stop string.
    stop = next(part for part in whole.split("\ufffd") if len(part) > 2)[1:]
    request = Request(PROMPTS[0], options=options(max_new_tokens=24, stop=[stop]))
    pieces: list[str] = []
    found = engine.submit(request, pieces.append if streamed else None).result(timeout=60)
    assert (found.text, found.finish_reason) == (local.submit(request).result().text, "stop")
    assert not streamed or "".join(pieces) == found.text


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": 5, "do_sample": True},
        {"repetition_penalty": 1.2},
        {"min_new_tokens": 3},
        {"ignore_eos": True},
        {"num_beams": 2},
        {"context_overflow": "truncate_left"},
        {"response_format": ResponseFormat(regex="[a-z]+")},
        # The server takes these and does not do them, which shows in its answer.
        {"n": 2, "do_sample": True},
        {"logprobs": True},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_what_the_server_cannot_honour_is_the_error_of_that_request(engine, fields):
    found = engine.submit(Request(PROMPTS[0], options=options(**fields), id=3)).result(timeout=60)
    assert (found.error_code, found.request_id, found.text) == ("invalid_option", 3, "")


def test_an_answer_that_is_not_in_the_form_asked_for_is_an_error(engine):
    # This server ignores the form.
    form = ResponseFormat(json_schema={"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
    found = engine.submit(Request(PROMPTS[0], options=options(response_format=form))).result(timeout=60)
    assert found.error_code == "schema_invalid"


def test_the_server_does_not_count_tokens(engine):
    assert engine.context_length is None
    with pytest.raises(EngineError, match="does not count tokens"):
        engine.count_tokens("Hello")
