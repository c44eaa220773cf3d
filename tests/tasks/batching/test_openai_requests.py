"""The OpenAI batch format in and out: every line gives a response or an error, in the form that its clients read."""

from __future__ import annotations

import json
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prefect_huggingface.blocks import GenerationOptions, InferenceEndpoint, LocalModel
from prefect_huggingface.tasks.batching.job import BatchOptions, describe_models, plan_job
from prefect_huggingface.tasks.batching.output import choose_columns, plan_output, publish_output
from prefect_huggingface.tasks.batching.requests import OpenAIRows, RowProblem
from prefect_huggingface.tasks.batching.run import open_run
from prefect_huggingface.tasks.batching.shard import process_shard
from prefect_huggingface.tasks.errors import BatchError
from prefect_huggingface.tasks.openai_protocol import AnswerStream, BodyError, read_call, read_options
from prefect_huggingface.tasks.records import Completion, Request
from prefect_huggingface.tasks.storage.journals.journal import Journal
from prefect_huggingface.tasks.storage.journals.ownership import hold_journal
from support.instant_engines import InstantEngine
from support.table_batches import answer_job

TEXT_MODEL = {"task": "text-generation"}
USER = [{"role": "user", "content": "Capital of Peru?"}]


def line(custom_id: Any, url: str = "/v1/chat/completions", method: str = "POST", **body: Any) -> str:
    body = {"model": "small", **body}
    return json.dumps({"custom_id": custom_id, "method": method, "url": url, "body": body})


LINES = [
    line("chat", messages=USER, max_tokens=5),
    line("text", "/v1/completions", prompt="Lima is", max_tokens=5, temperature=0),
    '{"custom_id": "torn", "met',
    line("chat", messages=USER),
    line("other", messages=USER, model="gpt-4o"),
    line("sampled", messages=USER, temperature=1.3),
    line("again", messages=USER, max_tokens=5),
    line("tools", messages=USER, logit_bias={"5": 1}),
    line("unknown", messages=USER, speed="fast"),
    line("nothing", messages=[]),
    line("path", "/v1/embeddings", input="x"),
    line("read", messages=USER, method="GET"),
    line(7, messages=USER),
    line("stream", messages=USER, stream=True),
]


def test_each_line_is_answered_in_one_of_two_files(tmp_path: Path) -> None:
    source, destination = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(f"{each}\n" for each in LINES))
    job = replace(plan_job(str(source), None), served_names=("/models/small", "small"), asked=(TEXT_MODEL,))
    engine = InstantEngine()
    engine.prompts = []
    publication = answer_job(job, plan_output(str(source), str(destination)), engine)
    responses = [json.loads(each) for each in destination.read_text().splitlines()]
    errors = [json.loads(each) for each in (tmp_path / "out.errors.jsonl").read_text().splitlines()]

    assert job.table.format == "openai"
    assert publication.summary.errors_destination == str(tmp_path / "out.errors.jsonl")
    assert [each["custom_id"] for each in responses] == ["chat", "text", "sampled", "again"]
    assert len(engine.prompts) == 3  # "again" shares the answer of "chat", which "sampled" must not
    chat, text = (each["response"] for each in responses[:2])
    assert chat["status_code"] == 200
    assert chat["body"]["object"] == "chat.completion"
    assert chat["body"]["choices"][0]["message"]["role"] == "assistant"
    assert chat["body"]["usage"] == {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
    assert text["body"]["object"] == "text_completion"
    assert text["body"]["choices"][0]["finish_reason"] == "stop"

    found = {each["custom_id"]: each for each in errors}
    assert found[None]["error"]["code"] == "malformed"
    assert "Line 3" in found[None]["error"]["message"]
    codes = {
        name: each["response"]["body"]["error"]["code"] for name, each in found.items() if each["response"] is not None
    }
    assert codes == {
        "chat": "duplicate_id",
        "other": "model_not_found",
        "tools": "invalid_option",
        "unknown": "invalid_option",
        "nothing": "invalid_prompt",
        "stream": "invalid_option",
        "path": "invalid_option",  # a model that writes text makes no vectors
    }
    assert found["other"]["response"]["status_code"] == 404
    assert {name for name, each in found.items() if each["response"] is None} == {None, "read", 7}
    assert len({each["id"] for each in responses + errors}) == len(LINES)


def test_what_is_set_to_its_default_is_another_line_than_what_is_left_out(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    lines = [line(str(number), messages=USER, **more) for number, more in enumerate((
        {}, {"max_tokens": 256}, {"repetition_penalty": 1.0}, {"stop": []}, {},
    ))]  # fmt: skip
    source.write_text("".join(f"{each}\n" for each in lines))
    make = plan_job(str(source), None, options=GenerationOptions(max_new_tokens=64)).make_requests()
    made = [make(number, json.loads(each)) for number, each in enumerate(source.read_text().splitlines())]
    assert len({each.text for each in made}) == 4
    assert made[0].text == made[4].text
    assert [each.request.options.max_new_tokens for each in made] == [64, 256, 64, 64, 64]


def test_names_of_the_model_are_those_of_the_present_call(tmp_path: Path) -> None:
    source, destination = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(line("a", messages=USER) + "\n" + line("b", messages=USER, model="gpt-4o") + "\n")
    model, output = LocalModel(model_id="/models/small", backend="torch"), plan_output(str(source), str(destination))
    plain = plan_job(str(source), None)
    before, after = (describe_models(plain, [model], names) for names in ((), ("gpt-4o",)))
    assert before.key == after.key  # so that the journal is continued,
    assert before.call_key(output) != after.call_key(output)  # and is not taken for finished
    assert answer_job(before, output, InstantEngine()).statuses == {"ok": 1, "unknown_model": 1}
    with hold_journal(Journal.beside(str(destination))) as owner:
        for shard in open_run(owner, after, BatchOptions(retry_failed=True)).shards:
            process_shard([InstantEngine()], shard)
        assert publish_output(after, owner, output, replaceable=True).statuses == {"ok": 2}


def test_what_a_line_leaves_out_is_that_of_the_model(tmp_path: Path) -> None:
    source, destination = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(line("a", messages=USER, n=2, top_k=40) + "\n")
    sampling = {**TEXT_MODEL, "options": {"do_sample": True, "temperature": 0.7}}
    job = replace(plan_job(str(source), None), asked=(sampling,))
    assert answer_job(job, plan_output(str(source), str(destination)), InstantEngine()).failed == 0


def test_bodies_become_options() -> None:
    body = {"max_completion_tokens": 9, "stop": "\n", "seed": 3, "n": 2, "temperature": 0.7, "top_p": 0.9}
    options = read_options(body, chat=True)
    assert (options.max_new_tokens, options.stop, options.seed, options.n) == (9, ["\n"], 3, 2)
    assert (options.do_sample, options.temperature, options.top_p) == (True, 0.7, 0.9)
    assert read_options({"temperature": 0, "top_p": 0.5}, chat=True).do_sample is False
    assert "do_sample" not in read_options({"top_p": 1, "stream": False, "user": "x"}, chat=True).model_fields_set

    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    options = read_options({"response_format": wanted}, chat=True)
    assert options.response_format is not None
    assert options.response_format.json_schema == schema
    assert read_options({"echo": True}, chat=False).echo


@pytest.mark.parametrize(
    "body",
    [{"logit_bias": {"5": 1}}, {"echo": True}, {"max_tokens": 0}, {"response_format": {"type": "xml"}}, {"n": 3}],
)
def test_what_cannot_be_done_is_refused(body: dict[str, Any]) -> None:
    with pytest.raises(BodyError):
        read_options(body, chat=True)


def test_a_table_without_a_prompt_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n')
    with pytest.raises(BatchError, match="say nothing to ask"):
        plan_job(str(path), None)
    with pytest.raises(BatchError, match="Only one of `prompt`"):
        plan_job(str(path), "{a}", more=BatchOptions(source_format="openai"))
    for name in ("rows.csv", "rows.parquet", "rows.tsv.gz", "part/rows.arrow", "part"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if name != "part":
            (tmp_path / name).write_text("PAR1")
        with pytest.raises(BatchError, match="say nothing to ask. Give a `prompt`"):
            plan_job(str(tmp_path / name), None)
    with pytest.raises(BatchError, match="say nothing to ask. Give a `prompt`"):
        plan_job(str(tmp_path / "*.parquet"), None)


# Lines as the documentation of OpenAI and the samples of vLLM have them, for models of their own names.
SAMPLES = [
    line("request-1", model="gpt-3.5-turbo-0125", max_tokens=1000, messages=[
        {"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": "Hello world!"},
    ]),
    line("request-2", model="gpt-3.5-turbo-0125", max_tokens=1000, messages=[
        {"role": "system", "content": "You are an unhelpful assistant."}, {"role": "user", "content": "Hello world!"},
    ]),
    line("request-3", model="meta-llama/Meta-Llama-3-8B-Instruct", max_completion_tokens=1000, messages=USER),
]  # fmt: skip
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def answer(
    folder: Path,
    lines: list[str],
    engine: InstantEngine | None = None,
    names: list[str] | None = None,
    model: LocalModel | InferenceEndpoint | None = None,
) -> list[dict[str, Any]]:
    """Put lines through an engine, and return the bodies, or errors, in order."""
    source, destination = folder / "in.jsonl", folder / "out.jsonl"
    source.write_text("".join(f"{each}\n" for each in lines))
    served = ["small", *(names or [])]
    models = [model or LocalModel(model_id="/none", backend="torch")]
    job = describe_models(plan_job(str(source), None), models, served)
    output = choose_columns(job, plan_output(str(source), str(destination)))
    answer_job(job, output, engine or InstantEngine("Hi"))
    files = (destination, folder / "out.errors.jsonl")
    return [json.loads(each)["response"]["body"] for file in files for each in file.read_text().splitlines()]


def test_samples_of_others_run_unchanged_under_their_names(tmp_path: Path) -> None:
    (other := tmp_path / "other").mkdir()
    bodies = answer(tmp_path, SAMPLES, names=["gpt-3.5-turbo-0125", "meta-llama/Meta-Llama-3-8B-Instruct"])
    assert [body["choices"][0]["message"]["content"] for body in bodies] == ["Hi"] * 3
    assert [body["model"] for body in bodies] == [json.loads(each)["body"]["model"] for each in SAMPLES]
    assert [body["error"]["code"] for body in answer(other, SAMPLES[:1])] == ["model_not_found"]


def test_tools_give_tool_calls(tmp_path: Path) -> None:
    text = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Lima"}}\n</tool_call>'
    (body,) = answer(tmp_path, [line("a", messages=USER, tools=[WEATHER])], InstantEngine(text))
    (choice,) = body["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": '{"city": "Lima"}'}
    past = [*USER, choice["message"], {"role": "tool", "tool_call_id": "1", "content": "Sunny"}]
    (other := tmp_path / "other").mkdir()
    (body,) = answer(other, [line("a", messages=past, tools=[WEATHER])], InstantEngine("It is sunny."))
    assert body["choices"][0]["message"]["content"] == "It is sunny."


def test_everything_that_a_line_asks_for_is_an_option(tmp_path: Path) -> None:
    wanted = {
        "n": 2, "temperature": 0.5, "presence_penalty": 0.5, "frequency_penalty": -0.5, "logprobs": True,
        "chat_template_kwargs": {"enable_thinking": False},
    }  # fmt: skip
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, image]}]
    made = OpenAIRows()(0, json.loads(line("a", messages=messages, **wanted)))
    assert made.request.check_form is False, "what is cut off in its form is an answer, as on the model server"
    options = made.request.options
    assert options is not None
    assert (options.n, options.presence_penalty, options.frequency_penalty) == (2, 0.5, -0.5)
    assert (options.logprobs, options.template_options) == (True, {"enable_thinking": False})
    assert made.request.messages == messages


@pytest.mark.parametrize(
    ("wrong", "field"),
    [({"max_tokens": 0}, "max_tokens"), ({"top_p": 3}, "top_p"), ({"presence_penalty": 9}, "presence_penalty")],
)
def test_a_wrong_field_is_named(wrong: dict[str, Any], field: str) -> None:
    with pytest.raises(RowProblem, match=f"`{field}`") as problem:
        OpenAIRows()(0, json.loads(line("a", messages=USER, **wrong)))
    assert problem.value.status == "invalid_option"


def test_a_line_may_have_further_fields(tmp_path: Path) -> None:
    asked = {**json.loads(SAMPLES[0]), "status": "new", "error": None}
    (body,) = answer(tmp_path, [json.dumps(asked)], names=[asked["body"]["model"]])
    assert body["choices"][0]["message"]["content"] == "Hi"


@pytest.mark.parametrize("more", [{"columns": ["custom_id"]}, {"output_prefix": "x_"}])
def test_settings_of_tables_are_refused_and_not_ignored(tmp_path: Path, more: dict[str, Any]) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(f"{SAMPLES[0]}\n")
    output = plan_output(str(source), str(tmp_path / "out.jsonl"))
    with pytest.raises(BatchError, match="do not go with requests in the OpenAI format. Leave them out"):
        choose_columns(plan_job(str(source), None), output, BatchOptions(**more))


def test_vectors_are_made_by_models_for_vectors_alone(tmp_path: Path) -> None:
    asked = line("a", "/v1/embeddings", input="x")
    for model in (LocalModel(model_id="/none", backend="torch"), InferenceEndpoint(url="http://127.0.0.1:1")):
        (folder := tmp_path / type(model).__name__).mkdir()
        engine = InstantEngine()
        engine.prompts = []
        (body,) = answer(folder, [asked], engine, model=model)
        assert body["error"]["code"] == "invalid_option"
        assert engine.prompts == []


class StoppingEngine(InstantEngine):
    """Ends every answer without an error: its time was up, or its prompt was too long and to be left out."""

    reason: Any = "deadline"

    def _answer(self, future: Future[Completion], request: Request) -> None:
        future.set_result(Completion("", self.reason, 5, 0, request_id=request.id))


@pytest.mark.parametrize(
    ("reason", "status", "words"),
    [("deadline", 408, "The time of the request was up"), ("skipped", 400, "more than the model takes. Shorten it.")],
)
def test_a_line_without_an_answer_says_why(tmp_path: Path, reason: str, status: int, words: str) -> None:
    engine, model = StoppingEngine(), LocalModel(model_id="/none", backend="torch", task="feature-extraction")
    engine.reason = reason
    (body,) = answer(tmp_path, [line("a", "/v1/embeddings", input="x")], engine, model=model)
    assert words in body["error"]["message"]
    assert json.loads((tmp_path / "out.jsonl").read_text())["response"]["status_code"] == status


@pytest.mark.parametrize("name", ["out.parquet", "out.csv"])
def test_answers_go_into_json_lines_or_are_refused(tmp_path: Path, name: str) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(f"{SAMPLES[0]}\n")
    job = plan_job(str(source), None)
    with pytest.raises(BatchError, match=r"are JSON lines, got .*\.(parquet|csv)'. Give it the ending .jsonl"):
        choose_columns(job, plan_output(str(source), str(tmp_path / name)))


@pytest.mark.parametrize(("parallel", "count"), [(None, 2), (True, 2), (False, 1)])
def test_one_call_of_a_tool_is_kept_where_several_are_not_wanted(parallel: bool | None, count: int) -> None:
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
    call = read_call({"messages": USER, "tools": [tool], "parallel_tool_calls": parallel}, chat=True)
    calls = [json.dumps({"name": "get_weather", "arguments": {"city": city}}) for city in ("Lima", "Oslo")]
    text = "Well.\n" + "\n".join(f"<tool_call>\n{each}\n</tool_call>" for each in calls)
    writer, completion = call.writer("name", 0, None), Completion(text, "stop", 1, 1, 0.1)
    [choice] = writer.write([completion])["choices"]
    stream = AnswerStream(call, writer)
    chunks = [*stream.write(0, text), *stream.write(0, completion)]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    streamed = [each["function"] for delta in deltas for each in delta.get("tool_calls", ())]
    assert [each["function"] for each in choice["message"]["tool_calls"]] == streamed
    assert [json.loads(each["arguments"])["city"] for each in streamed] == ["Lima", "Oslo"][:count]
    with pytest.raises(BodyError, match="`parallel_tool_calls` must be true or false"):
        read_call({"messages": USER, "parallel_tool_calls": "no"}, chat=True)
