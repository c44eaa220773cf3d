"""How answers in the form of OpenAI and TGI are read, also those that leave out what is optional."""

from __future__ import annotations

import asyncio

import pytest
from huggingface_hub.inference._generated.types import ChatCompletionOutput, ChatCompletionStreamOutput

from prefect_huggingface.blocks import GenerationOptions
from prefect_huggingface.tasks.engines.endpoints.answers import EndpointAnswer, read_chat, read_chat_stream
from prefect_huggingface.tasks.engines.tool_calls import find_calls
from prefect_huggingface.tasks.records import Request

OPTIONS = GenerationOptions(max_new_tokens=8)
CALL = {"name": "get_weather", "arguments": '{"city": "Paris"}'}


def read(body, options=OPTIONS):
    answer = EndpointAnswer(Request("Hello", id=1), options, None)
    read_chat(ChatCompletionOutput.parse_obj_as_instance(body), answer, options)
    return answer.completion()


def read_stream(bodies, on_text=None):
    async def events():
        for body in bodies:
            yield ChatCompletionStreamOutput.parse_obj_as_instance(body)

    answer = EndpointAnswer(Request("Hello", id=1), OPTIONS, on_text)
    asyncio.run(read_chat_stream(events(), answer))
    return answer.completion()


def test_the_least_answer_is_read():
    found = read({"choices": [{"message": {"role": "assistant", "content": "Hi"}}]})
    assert (found.text, found.finish_reason, found.prompt_tokens, found.generated_tokens) == ("Hi", "stop", 0, 1)


def test_several_answers_are_each_cut_at_their_stop_string():
    options = GenerationOptions(n=2, do_sample=True, stop=["!"])
    choices = [{"message": {"content": text}, "finish_reason": "length"} for text in ("one! two", "three! four")]
    found = read(
        {"choices": choices, "usage": {"prompt_tokens": 3, "completion_tokens": 9, "total_tokens": 12}}, options
    )
    assert (found.text, found.alternatives, found.finish_reason) == ("one", ("three",), "stop")
    assert (found.prompt_tokens, found.generated_tokens) == (3, 9)


def test_calls_of_tools_are_written_as_models_write_them():
    message = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": CALL}]}
    found = read({"choices": [{"message": message, "finish_reason": "tool_calls"}]})
    calls = find_calls(found.text, [{"function": {"name": "get_weather"}}]).calls
    assert [(call.name, call.arguments) for call in calls] == [("get_weather", {"city": "Paris"})]
    assert found.finish_reason == "stop"


def test_calls_of_tools_come_together_from_the_pieces_of_a_stream():
    parts = [("get_", None), ("weather", '{"city"'), (None, ': "Paris"}')]
    bodies = [
        {"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0, "function": {"name": a, "arguments": b}}]}}]}
        for a, b in parts
    ]
    found = read_stream([*bodies, {"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]}])
    calls = find_calls(found.text, [{"function": {"name": "get_weather"}}]).calls
    assert [(call.name, call.arguments) for call in calls] == [("get_weather", {"city": "Paris"})]


@pytest.mark.parametrize("cut", [1, 2, 3, 5])
def test_the_pieces_of_a_stream_do_not_change_where_it_is_cut(cut):
    text = "one two STOP three"
    told: list[str] = []
    pieces = [text[i : i + cut] for i in range(0, len(text), cut)]
    answer = EndpointAnswer(Request("Hello"), GenerationOptions(stop=["STOP"]), told.append)
    assert any([answer.push(piece) for piece in pieces])
    assert answer.completion().text == "one two " == "".join(told)


def test_a_second_attempt_delivers_only_what_is_new():
    told: list[str] = []
    answer = EndpointAnswer(Request("P:"), GenerationOptions(echo=True), told.append)
    answer.push("one ")
    answer.push("two ")
    answer.begin()
    for piece in ("on", "e t", "wo three"):
        answer.push(piece)
    assert answer.completion().text == "P:one two three" == "".join(told)
