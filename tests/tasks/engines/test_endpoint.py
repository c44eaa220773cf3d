"""The engine of an endpoint against a server with TGI's protocol over a real small model."""

from __future__ import annotations

import time

import pytest

from prefect_huggingface.blocks import GenerationOptions, InferenceEndpoint, LocalModel, ResponseFormat
from prefect_huggingface.tasks.engines.endpoint_engine import EndpointEngine
from prefect_huggingface.tasks.engines.registry import load_engine, unload_engines
from prefect_huggingface.tasks.errors import EngineError, GenerationError
from prefect_huggingface.tasks.records import Request
from support.text_models import TextModel
from support.tgi_server import TgiServer

PROMPTS = ["The capital of France is", "One, two,", "A small model", "Quarante-deux", "What is the number"]
MESSAGES = [{"role": "user", "content": "The capital of France is"}]


def options(**fields):
    return GenerationOptions(**{"max_new_tokens": 12, **fields})


@pytest.fixture
def engine(tgi):
    with EndpointEngine(InferenceEndpoint(url=tgi.url, max_concurrency=4)) as engine:
        yield engine


def answer(engine, prompt=PROMPTS[0], on_text=None, **fields):
    return engine.submit(Request(prompt, options=options(**fields), id=7), on_text).result(timeout=60)


@pytest.fixture
def local(tiny_llama):
    return load_engine(LocalModel(model_id=str(tiny_llama), backend="torch", chat_template="never"))


def test_greedy_text_and_counts_are_those_of_the_local_engine(engine, local, tgi):
    remote = list(engine.generate(Request(prompt, options=options(), id=prompt) for prompt in PROMPTS))
    here = {row.request_id: row for row in local.generate(Request(p, options=options(), id=p) for p in PROMPTS)}
    assert {row.request_id: row.text for row in remote} == {name: row.text for name, row in here.items()}
    for row in remote:
        mine = here[row.request_id]
        assert (row.finish_reason, row.prompt_tokens, row.generated_tokens) == (
            mine.finish_reason, mine.prompt_tokens, mine.generated_tokens,
        )  # fmt: skip
    sent = tgi.posts()[0].body["parameters"]
    assert not {"do_sample", "temperature", "top_p", "seed"} & set(sent)


def test_greedy_chat_is_that_of_the_local_engine(engine, local):
    request = Request(messages=MESSAGES, options=options())
    remote, here = engine.submit(request).result(), local.submit(request).result()
    assert (remote.text, remote.prompt_tokens, remote.generated_tokens) == (
        here.text, here.prompt_tokens, here.generated_tokens,
    )  # fmt: skip
    pieces = []
    assert engine.submit(request, pieces.append).result() == remote.__class__(
        **{**remote.as_dict(), "seconds": pytest.approx(0, abs=60)}
    )
    assert "".join(pieces) == remote.text
    assert len(pieces) > 1


def test_a_stream_is_the_same_text_in_pieces(engine):
    whole = answer(engine)
    pieces = list(engine.stream(Request(PROMPTS[0], options=options())))
    assert "".join(pieces) == whole.text
    assert len(pieces) > 1
    streamed = answer(engine, on_text=pieces.append)
    assert (streamed.text, streamed.finish_reason) == (whole.text, "length")
    assert (streamed.prompt_tokens, streamed.generated_tokens) == (whole.prompt_tokens, whole.generated_tokens)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_stop_string_over_several_tokens_is_cut_as_by_the_local_engine(engine, local, streamed):
    whole = answer(engine, max_new_tokens=24).text
    stop = whole[len(whole) // 2 - 2 : len(whole) // 2 + 3]
    expected = local.submit(Request(PROMPTS[0], options=options(max_new_tokens=24, stop=[stop]))).result()
    pieces = []
    found = answer(engine, on_text=pieces.append if streamed else None, max_new_tokens=24, stop=[stop])
    assert (found.text, found.finish_reason) == (expected.text, "stop")
    assert stop not in found.text
    assert not streamed or "".join(pieces) == found.text


def test_more_stop_strings_than_the_server_takes_still_end_the_text(engine, tgi):
    whole = answer(engine).text
    stops = ["no such 1", "no such 2", "no such 3", "no such 4", whole[4:7]]
    assert answer(engine, stop=stops).text == whole[: whole.index(whole[4:7])]
    assert len(tgi.posts()[-1].body["parameters"]["stop"]) == 4


def test_echo_and_log_probabilities(engine):
    found = answer(engine, echo=True, logprobs=True)
    assert found.text == PROMPTS[0] + answer(engine).text
    assert len(found.logprobs) == found.generated_tokens
    assert all(value < 0 for value in found.logprobs)
    pieces = []
    assert answer(engine, on_text=pieces.append, echo=True).text == "".join(pieces) == found.text


def test_a_seed_makes_sampling_repeatable(engine):
    texts = [answer(engine, do_sample=True, temperature=1.5, seed=seed).text for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


def test_a_choice_is_one_of_the_texts(engine):
    form = ResponseFormat(choices=["Paris", "Madrid"])
    found = answer(engine, response_format=form)
    assert found.text in form.choices
    assert (found.error, found.parsed) == (None, None)


def test_a_json_form_is_asked_for_and_the_answer_is_parsed(bundled_model):
    schema = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}}
    form = ResponseFormat(json_schema=schema | {"required": ["name", "age"]})
    prompt = "Extract the name and the age: Maria is 34 years old."
    with TgiServer(TextModel(bundled_model)) as server:
        with EndpointEngine(InferenceEndpoint(url=server.url, send_prompts_as="chat")) as engine:
            found = answer(engine, prompt, max_new_tokens=48, response_format=form)
            assert (found.error, found.parsed) == (None, {"name": "Maria", "age": 34})
            assert answer(engine, "What is the capital of France?", response_format=form).error_code == "schema_invalid"
    assert server.posts()[0].body["response_format"] == {"type": "json_object", "value": form.json_schema}


def test_the_json_form_of_openai_is_that_of_its_protocol(tgi):
    form = ResponseFormat(json_schema={"type": "object"})
    with EndpointEngine(InferenceEndpoint(url=tgi.url, protocol="openai", model_id="tiny")) as engine:
        assert answer(engine, response_format=form).error_code == "schema_invalid"
        parameters = {"n": 2, "do_sample": True, "top_p": 0.5, "seed": 5}
        assert answer(engine, **parameters).error_code == "invalid_option"
    sent = tgi.posts()[0].body
    schema = {"name": "answer", "schema": {"type": "object"}, "strict": True}
    assert sent["response_format"] == {"type": "json_schema", "json_schema": schema}
    assert (sent["model"], sent["temperature"], sent["max_tokens"]) == ("tiny", 0.0, 12)
    sampled = tgi.posts()[1].body
    assert (sampled["temperature"], sampled["top_p"], sampled["seed"], sampled["n"]) == (1.0, 0.5, 5, 2)


def test_extra_options_and_parameters_are_sent_where_the_block_says_so(tgi):
    fields = {"extra_options": ["top_k", "repetition_penalty", "min_new_tokens"], "extra_parameters": {"echo_id": 3}}
    sampling = {"do_sample": True, "top_k": 5, "repetition_penalty": 1.1, "min_new_tokens": 2}
    for protocol in ("openai", "tgi"):
        with EndpointEngine(InferenceEndpoint(url=tgi.url, protocol=protocol, **fields)) as engine:
            assert answer(engine, **(sampling if protocol == "openai" else {})).error is None
    chat, text = (entry.body for entry in tgi.posts())
    assert (chat["top_k"], chat["repetition_penalty"], chat["min_tokens"], chat["echo_id"]) == (5, 1.1, 2, 3)
    assert text["parameters"]["echo_id"] == 3


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"num_beams": 2}, "invalid_option"),
        ({"no_repeat_ngram_size": 2}, "invalid_option"),
        ({"trusted_text": True}, "invalid_option"),
        ({"min_new_tokens": 2}, "invalid_option"),
        ({"n": 2, "do_sample": True}, "invalid_option"),
        ({"context_overflow": "truncate_right"}, "invalid_option"),
        ({"response_format": ResponseFormat(json_schema={"type": "object"})}, "invalid_option"),
        ({"max_new_tokens": 4000}, "too_long"),
    ],
)
def test_what_the_endpoint_cannot_honour_is_the_error_of_that_request(engine, fields, code):
    found = answer(engine, **fields)
    assert (found.error_code, found.text, found.request_id) == (code, "", 7)
    assert found.error.endswith(".")
    assert answer(engine).error is None


def test_a_template_of_the_caller_is_refused_where_the_server_has_its_own(engine, tgi):
    request = Request(messages=[{"role": "user", "content": "Hello"}], template="{{ messages[0]['content'] }}")
    found = engine.submit(request).result()
    assert (found.error_code, tgi.posts()) == ("invalid_option", [])
    assert "`tokenizer`" in found.error


def test_bad_prompts_are_errors_of_their_own_and_are_not_sent(engine, tgi):
    requests = [Request(" "), Request(), Request(messages=[]), Request(messages=[{"role": "x", "content": "a"}])]
    codes = [engine.submit(request).result().error_code for request in requests]
    assert codes == ["empty_prompt", "invalid_prompt", "empty_prompt", "invalid_prompt"]
    assert tgi.posts() == []


def test_too_long_prompts_are_skipped_or_cut_where_asked_for(engine):
    prompt = "one two three " * 300
    assert answer(engine, prompt).error_code == "too_long"
    assert answer(engine, prompt, context_overflow="skip").finish_reason == "skipped"
    cut = answer(engine, prompt, context_overflow="truncate_left")
    assert (cut.error, cut.prompt_tokens) == (None, 512 - 12)


def test_the_block_limits_the_requests_at_once_and_callers_share_it(tgi):
    tgi.protocol.step_seconds = 0.02
    endpoint = InferenceEndpoint(url=tgi.url, max_concurrency=3, options=options(max_new_tokens=2))
    one, other = (
        load_engine(endpoint),
        load_engine(endpoint.model_copy(update={"options": options(max_new_tokens=2, echo=True)})),
    )
    futures = [engine.submit(Request(f"row {i}")) for i in range(12) for engine in (one, other)]
    texts = [future.result().text for future in futures]
    assert tgi.most_at_once == 3
    assert all(echoed == f"row {i}{text}" for i, (text, echoed) in enumerate(zip(texts[::2], texts[1::2], strict=True)))
    assert unload_engines() >= 1


def test_a_cancelled_request_frees_its_place_at_once(tgi):
    tgi.protocol.step_seconds = 0.05
    with EndpointEngine(InferenceEndpoint(url=tgi.url, max_concurrency=1)) as engine:
        slow = engine.submit(Request("a", options=options(max_new_tokens=200)), lambda text: None)
        time.sleep(0.3)
        began = time.monotonic()
        assert slow.cancel()
        assert answer(engine, max_new_tokens=2).error is None
        assert time.monotonic() - began < 3


def test_a_deadline_gives_what_came_until_then(tgi, engine):
    whole = answer(engine, max_new_tokens=40).text
    tgi.protocol.step_seconds = 0.05
    began = time.monotonic()
    found = answer(engine, max_new_tokens=40, deadline_seconds=0.8)
    assert time.monotonic() - began < 2
    assert (found.finish_reason, found.error) == ("deadline", None)
    assert found.text
    assert whole.startswith(found.text)


def test_closing_ends_what_is_not_done_as_cancelled(tgi):
    tgi.protocol.step_seconds = 0.1
    engine = EndpointEngine(InferenceEndpoint(url=tgi.url, max_concurrency=1))
    futures = [engine.submit(Request(f"row {i}", options=options(max_new_tokens=100))) for i in range(3)]
    time.sleep(0.3)
    engine.close()
    engine.close()
    for future in [*futures, engine.submit(Request("late"))]:
        found = future.result(timeout=5)
        assert (found.error_code, found.finish_reason, found.text) == ("cancelled", "error", "")
    with pytest.raises(EngineError, match="closed"):
        engine.count_tokens("late")


def test_tokens_are_counted_by_the_server(engine, local):
    assert engine.count_tokens(PROMPTS[0]) == local.count_tokens(PROMPTS[0])
    assert engine.context_length == 512


def test_a_failing_receiver_is_the_error_of_its_request(engine):
    def fail(text):
        raise ValueError("no room")

    found = answer(engine, on_text=fail)
    assert found.error_code == "engine_error"
    assert "no room" in found.error
    with pytest.raises(GenerationError):
        list(engine.stream(Request("")))
