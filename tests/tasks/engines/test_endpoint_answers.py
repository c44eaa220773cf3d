"""How answers in the form of OpenAI are read, also those that leave out what is optional or add what is usual."""

from __future__ import annotations

import threading

import pytest

from prefect_huggingface.blocks import GenerationOptions, InferenceEndpoint
from prefect_huggingface.tasks import load_engine, unload_engines
from prefect_huggingface.tasks.engines.tool_calls import find_calls
from prefect_huggingface.tasks.records import Completion, Request
from support.scripted_server import ScriptedServer

CALL = {"name": "get_weather", "arguments": '{"city": "Paris"}'}
PLAIN = {"choices": [{"message": {"role": "assistant", "content": "Hi"}}]}
STREAMED = {"stream": True, "stream_options": {"include_usage": True}}
EVERY_EXTRA = ["top_k", "min_p", "repetition_penalty", "min_new_tokens", "ignore_eos", "stop_token_ids"]


@pytest.fixture(autouse=True)
def no_engines():
    yield
    unload_engines()


def ask(server: ScriptedServer, request: Request | None = None, on_text=None, **fields) -> Completion:
    endpoint = InferenceEndpoint(url=server.url, outage_timeout_seconds=2, max_attempts=2, **fields)
    return load_engine(endpoint).submit(request or Request("Hello", id=1), on_text).result(timeout=30)


def read(answer, on_text=None, prompt: str = "Hello", **options) -> Completion:
    with ScriptedServer(answer) as server:
        return ask(server, Request(prompt, options=GenerationOptions(**{"max_new_tokens": 8, **options})), on_text)


def delta(finish_reason: str | None = None, **fields) -> dict:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": finish_reason}]}


def test_the_least_answer_is_read():
    found = read(PLAIN)
    assert (found.text, found.finish_reason, found.prompt_tokens, found.generated_tokens) == ("Hi", "stop", 0, 1)


def test_past_tool_calls_go_to_the_server_with_their_arguments_as_text():
    calls = [{"type": "function", "id": "1", "function": {"name": "get_weather", "arguments": arguments}}
             for arguments in ({"city": "Zürich"}, '{"city": "Paris"}', None)]  # fmt: skip
    messages = [
        {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "Sunny", "tool_call_id": "1"},
    ]  # fmt: skip
    with ScriptedServer(PLAIN) as server:
        assert ask(server, Request(messages=messages)).error is None
        [body] = server.bodies
    sent = [call["function"]["arguments"] for call in body["messages"][1]["tool_calls"]]
    assert sent == ['{"city": "Zürich"}', '{"city": "Paris"}', "{}"]
    assert calls[0]["function"]["arguments"] == {"city": "Zürich"}, "the caller's own is as it was"


def test_several_answers_are_each_cut_at_their_stop_string():
    choices = [{"message": {"content": text}, "finish_reason": "length"} for text in ("one! two", "three! four")]
    usage = {"prompt_tokens": 3, "completion_tokens": 9, "total_tokens": 12}
    found = read({"choices": choices, "usage": usage}, n=2, do_sample=True, stop=["!"])
    assert (found.text, found.alternatives, found.finish_reason) == ("one", ("three",), "stop")
    assert (found.prompt_tokens, found.generated_tokens) == (3, 9)


def test_calls_of_tools_are_written_as_models_write_them():
    message = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": CALL}]}
    found = read({"choices": [{"message": message, "finish_reason": "tool_calls"}]})
    calls = find_calls(found.text, [{"function": {"name": "get_weather"}}]).calls
    assert [(call.name, call.arguments) for call in calls] == [("get_weather", {"city": "Paris"})]
    assert found.finish_reason == "stop"


def test_text_before_the_calls_of_tools_is_the_same_whole_and_streamed():
    call = {"index": 0, "id": "1", "type": "function", "function": CALL}
    whole = {"choices": [{"message": {"content": "Let me see.", "tool_calls": [call]}, "finish_reason": "tool_calls"}]}
    events = [delta(content="Let me "), delta(content="see."), delta(tool_calls=[call]), delta("tool_calls")]
    told: list[str] = []
    texts = [read(whole).text, read(events).text, read(events, told.append).text, "".join(told)]
    assert set(texts) == {texts[0]}
    assert texts[0].startswith("Let me see.\n<tool_call>")


def test_calls_of_tools_come_together_from_the_pieces_of_a_stream():
    parts = [("get_", None), ("weather", '{"city"'), (None, ': "Paris"}')]
    events = [delta(tool_calls=[{"index": 0, "function": {"name": a, "arguments": b}}]) for a, b in parts]
    found = read([*events, delta("tool_calls")], on_text=[].append)
    calls = find_calls(found.text, [{"function": {"name": "get_weather"}}]).calls
    assert [(call.name, call.arguments) for call in calls] == [("get_weather", {"city": "Paris"})]


def test_the_servers_count_of_tokens_counts_where_it_comes_with_a_piece_of_text():
    usage = [{"prompt_tokens": 3, "completion_tokens": count} for count in (2, 4)]
    events = [{**delta(content="one "), "usage": usage[0]}, {**delta("stop", content="two"), "usage": usage[1]}]
    found = read(events, on_text=[].append)
    assert (found.text, found.prompt_tokens, found.generated_tokens) == ("one two", 3, 4)


def test_images_are_sent_however_they_are_named(tmp_path, monkeypatch):
    (tmp_path / "one.png").write_bytes(b"image")
    monkeypatch.setenv("HOME", str(tmp_path))
    names = [str(tmp_path / "one.png"), (tmp_path / "one.png").as_uri(), "~/one.png", "https://example.org/one.png"]
    with ScriptedServer(PLAIN) as server:
        assert ask(server, Request("Hello", images=names)).error is None
        [*images, text] = server.bodies[0]["messages"][0]["content"]
    sent = "data:image/png;base64,aW1hZ2U="
    assert [image["image_url"]["url"] for image in images] == [sent, sent, sent, names[3]]
    assert text == {"type": "text", "text": "Hello"}


@pytest.mark.parametrize("cut", [1, 2, 3, 5])
def test_the_pieces_of_a_stream_do_not_change_where_it_is_cut(cut):
    text = "one two STOP three"
    told: list[str] = []
    events = [delta(content=text[start : start + cut]) for start in range(0, len(text), cut)]
    found = read([*events, delta("stop")], told.append, stop=["STOP"])
    assert found.text == "one two " == "".join(told)


def test_a_second_attempt_delivers_only_what_is_new():
    told: list[str] = []
    broken = [delta(content="one "), delta(content="two ")]
    whole = [delta(content=piece) for piece in ("on", "e t", "wo three")]
    with ScriptedServer(broken, [*whole, delta("stop")]) as server:
        found = ask(server, Request("P:", options=GenerationOptions(echo=True)), told.append)
    assert found.text == "P:one two three" == "".join(told)
    assert len(server.bodies) == 2


def test_a_second_attempt_that_differs_is_an_error():
    with ScriptedServer([delta(content="one ")], [delta(content="two "), delta("stop")]) as server:
        found = ask(server, on_text=[].append)
    assert (found.error_code, found.text) == ("unavailable", "")


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_reasoning_that_the_server_keeps_apart_is_the_reasoning_of_the_completion(name):
    message = {"content": "Paris", name: "It is the capital of France."}
    found = read({"choices": [{"message": message, "finish_reason": "stop"}]})
    assert (found.text, found.reasoning) == ("Paris", "It is the capital of France.")
    told: list[str] = []
    events = [delta(**{name: "It is "}), delta(**{name: "known."}), delta(content="Pa"), delta(content="ris")]
    found = read([*events, delta("stop")], told.append)
    assert (found.text, found.reasoning, told) == ("Paris", "It is known.", ["Pa", "ris"])


def test_reasoning_in_the_text_is_kept_apart():
    found = read({"choices": [{"message": {"content": "<think>\nFrance?\n</think>\n\nParis"}}]})
    assert (found.text, found.reasoning) == ("Paris", "France?")


def test_a_separator_of_lines_within_a_text_is_text():
    text = "one\u2028two\x85three\x0cfour"
    assert read([delta(content=text), delta("stop")], on_text=[].append).text == text


@pytest.mark.parametrize(
    ("error", "code"),
    [
        ({"error": "out of memory", "error_type": "generation"}, "engine_error"),
        ({"error": {"message": "prompt is too long", "code": 400}}, "too_long"),
        ({"error": {"message": "slow down", "code": 429}}, "rate_limited"),
        ({"error": "something", "error_type": "unheard"}, "engine_error"),
    ],
)
def test_an_error_in_a_stream_is_the_error_of_the_request(error, code):
    found = read([delta(content="Hi"), error], on_text=[].append)
    assert (found.error_code, found.text) == (code, "")


def test_every_option_is_sent_under_the_name_that_servers_give_it():
    options = GenerationOptions(
        max_new_tokens=8, do_sample=True, temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, seed=3,
        repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=-0.5, min_new_tokens=2, stop_token_ids=[5],
        ignore_eos=True, template_options={"enable_thinking": False}, stop=["!"],
    )  # fmt: skip
    with ScriptedServer(PLAIN) as server:
        request = Request("Hello", options=options)
        refused = ask(server, request)
        assert (refused.error_code, server.bodies) == ("invalid_option", [])
        assert "extra_options" in refused.error
        extra = [*EVERY_EXTRA, "template_options"]
        assert ask(server, request, extra_options=extra, extra_parameters={"typical_p": 0.3}).text == "Hi"
    assert server.bodies[0] == {
        "messages": [{"role": "user", "content": "Hello"}], "model": "dummy", "max_tokens": 8, "stop": ["!"],
        "temperature": 0.5, "top_p": 0.9, "seed": 3, "presence_penalty": 0.5, "frequency_penalty": -0.5, "top_k": 7,
        "min_p": 0.1, "repetition_penalty": 1.2, "min_tokens": 2, "ignore_eos": True, "stop_token_ids": [5],
        "chat_template_kwargs": {"enable_thinking": False}, "typical_p": 0.3, **STREAMED,
    }  # fmt: skip


@pytest.mark.parametrize("given", [{}, {"presence_penalty": 0.0, "template_options": {}, "stop_token_ids": []}])
def test_options_that_say_nothing_are_not_sent(given):
    with ScriptedServer(PLAIN) as server:
        assert ask(server, Request("Hello", options=GenerationOptions(max_new_tokens=8, **given))).error is None
    message = {"role": "user", "content": "Hello"}
    assert server.bodies == [{"messages": [message], "model": "dummy", "max_tokens": 8, "temperature": 0.0, **STREAMED}]


@pytest.mark.parametrize(
    ("models", "fields", "expected"),
    [((), {}, "dummy"), (("tiny",), {}, "tiny"), (("a", "b"), {}, "dummy"), (("a", "b"), {"model_id": "b"}, "b")],
)
def test_the_only_model_of_a_server_needs_no_name(models, fields, expected):
    with ScriptedServer(PLAIN, models=models) as server:
        assert ask(server, **fields).text == "Hi"
    assert server.bodies[0]["model"] == expected


@pytest.mark.parametrize("content", [7, ["x"], {"text": "x"}])
def test_an_answer_of_another_form_is_an_error(content):
    found = read({"choices": [{"message": {"content": content}}]})
    assert (found.error_code, found.text) == ("bad_answer", "")


def test_an_engine_that_is_closed_before_a_request_begins_leaves_no_future_open():
    with ScriptedServer(PLAIN) as server:
        for _ in range(4):
            engine = load_engine(InferenceEndpoint(url=server.url))
            futures = [engine.submit(Request("Hello")) for _ in range(20)]
            closing = threading.Thread(target=unload_engines)
            closing.start()
            futures += [engine.submit(Request("Hello")) for _ in range(20)]
            for future in futures:
                found = future.result(timeout=10)
                assert (found.error_code, found.text) in ((None, "Hi"), ("cancelled", ""))
                assert (found.error is None) == (found.text == "Hi")
            closing.join()


@pytest.mark.parametrize("streamed", [False, True])
def test_log_probabilities_come_with_the_texts_of_their_tokens(streamed):
    said = [
        {"token": "Hi", "logprob": -0.5, "bytes": [72, 105]},
        {"token": "\\xf0\\x9f", "logprob": -1.5, "bytes": [240, 159]},
    ]
    if streamed:
        answer = [delta(content="Hi"), delta("length")]
        answer[0]["choices"][0]["logprobs"] = {"content": said[:1]}
        answer[1]["choices"][0]["logprobs"] = {"content": said[1:]}
    else:
        answer = {"choices": [{**PLAIN["choices"][0], "logprobs": {"content": said}, "finish_reason": "length"}]}
    found = read(answer, on_text=(lambda text: None) if streamed else None, logprobs=True)
    assert (found.tokens, found.logprobs) == (("Hi", "\\xf0\\x9f"), (-0.5, -1.5))


def test_tags_of_reasoning_hold_for_endpoints_too():
    def said(text: str, **options) -> tuple[str, str | None]:
        found = read({"choices": [{"message": {"content": text}}]}, **options)
        return found.text, found.reasoning

    thought = "<think>Two</think>It is 4."
    assert said(thought) == ("It is 4.", "Two")
    assert said(thought, reasoning_tags=[]) == (thought, None)
    assert said("[THINK]Two[/THINK]It is 4.", reasoning_tags=["[THINK]", "[/THINK]"]) == ("It is 4.", "Two")
