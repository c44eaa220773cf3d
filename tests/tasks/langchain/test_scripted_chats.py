"""LangChain's classes on models that say a given text: thoughts, tools, structured answers, settings and identity."""

from __future__ import annotations

import asyncio
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from langchain_core.callbacks import UsageMetadataCallbackHandler
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage, ToolMessage
from langchain_core.runnables import ConfigurableField
from langchain_core.tools import tool
from pydantic import BaseModel

from prefect_huggingface.tasks.errors import GenerationError, SettingsError
from prefect_huggingface.tasks.langchain import ChatHuggingFace, HuggingFacePipeline
from support.scripted_models import make_scripted_model

THOUGHTS = '<think>\nA call? <tool_call>{"name": "add", "arguments": {"a": 9, "b": 9}}</tool_call>\n</think>\n\n'
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


class Answer(BaseModel):
    a: int


def llm_of(
    folder: Path, text: str, family: str = "qwen-3", *, script: Any = None, **kwargs: Any
) -> HuggingFacePipeline:
    make_scripted_model(folder, text, family, **(script or {}))
    return HuggingFacePipeline.from_model_id(str(folder), "text-generation", **kwargs)


def chat_of(folder: Path, text: str, family: str = "qwen-3", **kwargs: Any) -> ChatHuggingFace:
    return ChatHuggingFace(llm=llm_of(folder, text, family, **kwargs))


def joined(chunks: Any) -> AIMessageChunk:
    whole: Any = None
    for chunk in chunks:
        whole = chunk if whole is None else whole + chunk
    return whole


def test_thoughts_are_apart_whole_and_streamed(tmp_path: Path) -> None:
    chat = chat_of(tmp_path, THOUGHTS + "It is 3.").bind_tools([add])
    answer = chat.invoke("1 + 2?")
    assert (answer.content, answer.tool_calls) == ("It is 3.", [])
    assert "A call?" in answer.additional_kwargs["reasoning_content"]
    assert [block["type"] for block in answer.content_blocks] == ["reasoning", "text"]
    streamed = joined(chat.stream("1 + 2?"))
    assert (streamed.content, streamed.tool_calls) == ("It is 3.", [])
    assert streamed.additional_kwargs["reasoning_content"] == answer.additional_kwargs["reasoning_content"]
    # A conversation goes on with what it gave.
    assert chat.invoke([HumanMessage("1 + 2?"), answer, HumanMessage("Sure?")]).content == "It is 3."


def test_calls_and_text_stream(tmp_path: Path) -> None:
    chat = chat_of(tmp_path, f"{THOUGHTS}I will add them up.\n{CALL}\nand\n{CALL}").bind_tools([add])
    chunks = list(chat.stream("1 + 2?"))
    texts = [chunk.content for chunk in chunks if chunk.content]
    assert len(texts) > 2  # free text comes at once
    whole = joined(chunks)
    answer = chat.invoke("1 + 2?")
    for message in (whole, answer):
        assert message.content == "I will add them up.\nand"
        assert [call["args"] for call in message.tool_calls] == [{"a": 1, "b": 2}] * 2
        assert len({call["id"] for call in message.tool_calls}) == 2
        assert all(len(call["id"]) == 9 for call in message.tool_calls)
    one = chat.bound.bind_tools([add], parallel_tool_calls=False, strict=True)
    assert len(one.invoke("1 + 2?").tool_calls) == len(joined(one.stream("1 + 2?")).tool_calls) == 1


@pytest.mark.parametrize("first", ["broken", "right"])
def test_a_broken_call_takes_no_place_of_the_one_call(tmp_path: Path, first: str) -> None:
    broken = CALL.replace('"a": 1,', '"a": ,')
    calls = [broken, CALL] if first == "broken" else [CALL, broken]
    chat = chat_of(tmp_path, f"{THOUGHTS}{calls[0]}\nand\n{calls[1]}").bind_tools([add], parallel_tool_calls=False)
    for answer in (chat.invoke("1 + 2?"), joined(chat.stream("1 + 2?"))):
        assert [call["args"] for call in answer.tool_calls] == [{"a": 1, "b": 2}]
        assert len(answer.invalid_tool_calls) == 1


def test_streams_side_by_side_keep_to_their_own(tmp_path: Path) -> None:
    chat = chat_of(tmp_path, f"{THOUGHTS}I will.\n{CALL}\nand\n{CALL}", script={"after": {"rainbow": "It is three."}})
    chat = chat.bind_tools([add])
    plain, after = "1 + 2?", "A rainbow?"

    async def read(question: str) -> AIMessageChunk:
        return joined([chunk async for chunk in chat.astream(question)])

    async def ask() -> list[AIMessageChunk]:
        return await asyncio.gather(*(read(question) for question in [plain, after] * 6))

    with ThreadPoolExecutor(6) as pool:
        threads = list(pool.map(lambda question: joined(chat.stream(question)), [plain, after] * 6))
    for answers in (threads, asyncio.run(ask())):
        assert [len(answer.tool_calls) for answer in answers] == [2, 0] * 6
        assert {answer.content for answer in answers[::2]} == {"I will.\nand"}
        assert {answer.content for answer in answers[1::2]} == {"It is three."}
        ids = [call["id"] for answer in answers for call in answer.tool_calls]
        assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("family", ["llama-3", "mistral-v0.3", "gemma-2", "phi-4-mini", "hermes"])
def test_results_of_tools_reach_the_model(family: str, tmp_path: Path) -> None:
    script = {"after": {"rainbow": "It is three."}}
    chat = chat_of(tmp_path, CALL, family, script=script).bind_tools([add])
    messages: list[Any] = [SystemMessage("Be brief."), HumanMessage("1 + 2?")]
    call = chat.invoke(messages)
    assert call.tool_calls[0]["args"] == {"a": 1, "b": 2}
    result = ToolMessage("rainbow", tool_call_id=call.tool_calls[0]["id"])
    assert chat.invoke([*messages, call, result]).content == "It is three."


def test_variables_of_the_template(tmp_path: Path) -> None:
    script = {"after": {"</think>": "At once."}}
    chat = chat_of(tmp_path, "It thinks.", script=script)
    off = {"enable_thinking": False}
    assert chat.invoke("Hi").content == "It thinks."
    assert chat.invoke("Hi", chat_template_kwargs=off).content == "At once."
    assert ChatHuggingFace(llm=chat.llm, chat_template_kwargs=off).invoke("Hi").content == "At once."
    assert chat.bind(template_options=off).invoke("Hi").content == "At once."
    with pytest.raises(GenerationError, match="no variable 'enable_thinkin'"):
        chat.invoke("Hi", chat_template_kwargs={"enable_thinkin": False})


def test_raw_answers_are_kept_when_they_cannot_be_parsed(tmp_path: Path) -> None:
    chat = chat_of(tmp_path, "x", script={"letters": {": ": "3", " 3": "4", "34": "}"}})
    good = chat.with_structured_output(Answer, include_raw=True).invoke("Hi")
    assert (good["parsed"], good["parsing_error"]) == (Answer(a=34), None)
    cut = chat.with_structured_output(Answer, include_raw=True, max_tokens=4)
    for found in (cut.invoke("Hi"), asyncio.run(cut.ainvoke("Hi"))):
        assert found["parsed"] is None
        assert found["parsing_error"] is not None
        assert isinstance(found["raw"], AIMessage)
        assert found["raw"].content.startswith("{")
    with pytest.raises(GenerationError):
        chat.with_structured_output(Answer, max_tokens=4).invoke("Hi")


CUT_CALLS = {
    "forced": ("", {"tool_choice": "any"}),
    "free": ('Well.\n<tool_call>\n{"name": "add", "arguments": {"a": 1,', {}),
    "free and bare": ('{"name": "add", "arguments": {"a": 1,', {}),
    "broken": ('<tool_call>\n{"name": "add", "arguments": {"a": 1]}}\n</tool_call>', {}),
}


@pytest.mark.parametrize("case", CUT_CALLS)
def test_a_call_that_is_cut_off_is_the_same_whole_and_streamed(case: str, tmp_path: Path) -> None:
    text, choice = CUT_CALLS[case]
    chat = chat_of(tmp_path, text or "x", script={"letters": {": ": "1", " 1": "2", "12": "3"}, "ends": bool(text)})
    chat = chat.bind_tools([add], max_tokens=200 if text else 40, **choice)

    async def ask() -> list[Any]:
        return [await chat.ainvoke("1 + 2?"), joined([chunk async for chunk in chat.astream("1 + 2?")])]

    answers = [chat.invoke("1 + 2?"), joined(chat.stream("1 + 2?")), *asyncio.run(ask())]
    for answer in answers:
        assert answer.tool_calls == []
        [invalid] = answer.invalid_tool_calls
        assert '"name": "add"' in invalid["args"]
        assert answer.response_metadata["finish_reason"] == ("stop" if text else "length")
    assert len({(answer.content, answer.invalid_tool_calls[0]["args"]) for answer in answers}) == 1


def test_strict_closes_objects(tmp_path: Path) -> None:
    bound = chat_of(tmp_path, "x").with_structured_output(Answer, strict=True).first
    schema = bound.kwargs["response_format"].json_schema
    assert (schema["additionalProperties"], schema["required"]) == (False, ["a"])


def test_async_equals_sync(tmp_path: Path) -> None:
    llm = llm_of(tmp_path, "It is 3.", "phi-3", pipeline_kwargs={"max_new_tokens": 30}, batch_size=2)

    async def ask() -> list[Any]:
        with pytest.raises(GenerationError, match="must have some text"):
            await llm.ainvoke("")
        return await llm.abatch(["Hi", "", "Ho"], return_exceptions=True)

    with pytest.raises(GenerationError, match="must have some text"):
        llm.invoke("")
    waited, found = asyncio.run(ask()), llm.batch(["Hi", "", "Ho"], return_exceptions=True)
    assert [type(one) for one in waited] == [type(one) for one in found] == [str, GenerationError, str]
    assert str(waited[1]) == str(found[1])
    assert asyncio.run(llm.abatch(["Hi"] * 5)) == llm.batch(["Hi"] * 5)


def test_a_request_that_is_cancelled_while_it_is_submitted_does_not_run(tmp_path: Path) -> None:
    from concurrent.futures import Future

    from prefect_huggingface.tasks.langchain.base_llm import acomplete
    from prefect_huggingface.tasks.records import Request

    future: Future[Any] = Future()

    class SlowEngine:
        def submit(self, request: Any, *receivers: Any) -> Future[Any]:
            import time

            time.sleep(0.5)
            return future

    async def cancel_it() -> None:
        run = asyncio.create_task(acomplete(SlowEngine(), Request("Hi")))  # type: ignore[arg-type]
        await asyncio.sleep(0.1)
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        await asyncio.sleep(0.8)

    asyncio.run(cancel_it())
    assert future.cancelled()


def test_a_temperature_of_zero_is_greedy_with_one_warning(tmp_path: Path) -> None:
    make_scripted_model(tmp_path, "It is 3.", "phi-3")
    for given in (
        {"model_kwargs": {"temperature": 0, "max_length": 64, "do_sample": True}},
        {"pipeline_kwargs": {"temperature": 0.0, "do_sample": True}},
        {"model_kwargs": {"temperature": 0}, "pipeline_kwargs": {"do_sample": True}},
    ):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            llm = HuggingFacePipeline.from_model_id(str(tmp_path), "text-generation", **given)
            assert llm.invoke("Hi") == "It is 3."
            assert llm.invoke("Hi") == "It is 3."
        assert not llm.generation.options.do_sample
        assert len([one for one in found if "temperature" in str(one.message)]) == 1


def test_settings_that_are_set_later_count(tmp_path: Path) -> None:
    llm = llm_of(tmp_path, "One two three four five six.", "phi-3", pipeline_kwargs={"max_new_tokens": 50})
    whole = llm.invoke("Hi")
    llm.pipeline_kwargs = {"max_new_tokens": 3}
    assert whole.startswith(llm.invoke("Hi"))
    assert llm.invoke("Hi") != whole


def test_configurable_fields(tmp_path: Path) -> None:
    llm = llm_of(tmp_path, "One two three four five six.", "phi-3", model_kwargs={"max_length": 100})
    fields = llm.configurable_fields(
        pipeline_kwargs=ConfigurableField(id="settings"), model_id=ConfigurableField(id="model")
    )
    whole = fields.invoke("Hi")
    short = fields.with_config(configurable={"settings": {"max_new_tokens": 3}}).invoke("Hi")
    assert whole.startswith(short)
    assert short != whole
    other = make_scripted_model(tmp_path / "other", "Another.", "phi-3")
    assert fields.with_config(configurable={"model": str(other)}).invoke("Hi") == "Another."


def test_identity_tells_configurations_apart(tmp_path: Path) -> None:
    make_scripted_model(tmp_path, "x", "phi-3")
    base: dict[str, Any] = {"model_id": str(tmp_path), "task": "text-generation"}
    llm = HuggingFacePipeline.from_model_id(**base)
    params = [llm._identifying_params]
    assert llm.model is not None
    for update in ({"chat_template": "always"}, {"ov_config": {"A": "1"}}, {"load_in": "8bit"}, {"dtype": "bfloat16"}):
        other = HuggingFacePipeline(model=llm.model.model_copy(update=update))
        params.append(other._identifying_params)
    assert len({repr(sorted(one.items(), key=str)) for one in params}) == len(params)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = "{{ messages[0].content }}"
    chats = ChatHuggingFace(llm=llm), ChatHuggingFace(llm=llm, tokenizer=tokenizer)
    assert chats[0]._identifying_params != chats[1]._identifying_params


def test_tokens_are_those_of_the_model(tmp_path: Path) -> None:
    llm = llm_of(tmp_path, "x", "phi-3")
    chat = ChatHuggingFace(llm=llm)
    ids = llm.get_token_ids("Hi")
    assert ids == chat.get_token_ids("Hi")
    assert len(ids) == llm.get_num_tokens("Hi") == chat.get_num_tokens("Hi") == 2
    own = ChatHuggingFace(llm=llm, custom_get_token_ids=lambda text: [1, 2, 3])
    assert (own.get_token_ids("Hi"), own.get_num_tokens("Hi")) == ([1, 2, 3], 3)


def test_counts_of_a_call_add_up(tmp_path: Path) -> None:
    chat = chat_of(tmp_path, "It is 3.", "phi-3")
    one = chat.invoke("Hi").usage_metadata
    assert one is not None
    output = chat.generate([[HumanMessage("Hi")], [HumanMessage("Hi")]]).llm_output
    assert output is not None
    assert output["token_usage"] == {
        "prompt_tokens": 2 * one["input_tokens"],
        "completion_tokens": 2 * one["output_tokens"],
        "total_tokens": 2 * one["total_tokens"],
    }
    counter = UsageMetadataCallbackHandler()
    chat.invoke("Hi", config={"callbacks": [counter]})
    assert next(iter(counter.usage_metadata.values()))["total_tokens"] == one["total_tokens"]


def test_the_pipeline_can_be_looked_at(tmp_path: Path) -> None:
    llm = llm_of(tmp_path, "It is 3.", "phi-3")
    pipe = llm.pipeline
    assert (pipe.task, pipe.device.type, pipe.model.device.type) == ("text-generation", "cpu", "cpu")
    assert pipe.model.config.model_type == "llama"
    pipe.tokenizer.pad_token_id = pipe.model.config.eos_token_id
    assert pipe.tokenizer.pad_token_id == pipe.model.config.eos_token_id
    assert pipe("Hi") == [{"generated_text": "It is 3."}]
    chat = ChatHuggingFace(llm=llm)
    before = chat._to_chat_prompt([HumanMessage("Hi")])
    pipe.tokenizer.chat_template = "<|user|>{{ messages[0].content }}!<|end|><|assistant|>"
    assert chat._to_chat_prompt([HumanMessage("Hi")]) == "<|user|>Hi!<|end|><|assistant|>" != before


def test_devices_that_mean_the_same_are_one(tmp_path: Path) -> None:
    llm = llm_of(tmp_path, "It is 3.", "phi-3", device=-1, model_kwargs={"device": "CPU"})
    assert llm.invoke("Hi") == "It is 3."
    with pytest.raises(SettingsError, match="given twice"):
        HuggingFacePipeline.from_model_id(str(tmp_path), "text-generation", device=-1, model_kwargs={"device": "cuda"})


def test_settings_of_other_engines_are_honoured_or_refused(tmp_path: Path) -> None:
    from transformers import GenerationConfig

    llm = llm_of(tmp_path, "It is<|system|> 3.", "phi-3", pipeline_kwargs={"max_new_tokens": 30})
    inputs = llm.get_engine().inputs
    assert inputs is not None
    token = inputs.tokenizer.special_id("<|system|>")
    assert llm.invoke("Hi") == "It is 3."
    assert llm.invoke("Hi", eos_token_id=token) == "It is"
    assert llm.invoke("Hi", generation_config=GenerationConfig(eos_token_id=token)) == "It is"
    for name, value in (("bad_words_ids", [[1]]), ("suppress_tokens", [1])):
        with pytest.raises(SettingsError, match=name):
            llm.invoke("Hi", **{name: value})
        with pytest.raises(SettingsError, match=name):
            llm.invoke("Hi", generation_config=GenerationConfig(**{name: value}))
    assert llm.invoke("Hi", presence_penalty=0.1, frequency_penalty=0.1, min_p=0.1, seed=1).startswith("It is")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "call"),
    [
        ("qwen-2.5", CALL),
        ("hermes", CALL),
        ("llama-3", '{"name": "add", "parameters": {"a": 1, "b": 2}}'),
        ("mistral-v0.3", '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1, "b": 2}}]'),
    ],
)
def test_an_agent_calls_a_tool_and_answers(family: str, call: str, tmp_path: Path) -> None:
    from langchain.agents import create_agent

    @tool
    def add(a: int, b: int) -> str:
        """Add two numbers."""
        return f"rainbow {a + b}"

    chat = chat_of(tmp_path, call, family, script={"after": {"rainbow": "It is three."}})
    agent = create_agent(chat, [add], system_prompt="Be brief.")
    messages = agent.invoke({"messages": [("user", "1 + 2?")]})["messages"]
    assert [message.type for message in messages] == ["human", "ai", "tool", "ai"]
    assert messages[2].content == "rainbow 3"
    assert messages[-1].content == "It is three."
