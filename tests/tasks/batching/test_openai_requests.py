"""The OpenAI batch format in and out: every line gives a response or an error, in the form that its clients read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prefect_huggingface.tasks.batching.job import BatchOptions, plan_job, plan_output
from prefect_huggingface.tasks.batching.output import publish_output
from prefect_huggingface.tasks.batching.run import open_run
from prefect_huggingface.tasks.batching.shard import process_shard
from prefect_huggingface.tasks.errors import BatchError
from prefect_huggingface.tasks.openai_protocol import BodyError, read_options
from prefect_huggingface.tasks.storage.journals.journal import Journal
from support.instant_engines import InstantEngine
from support.journals import claim_journal

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
    from dataclasses import replace

    source, destination = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(f"{each}\n" for each in LINES))
    job = replace(plan_job(str(source), None), served_names=("/models/small", "small"))
    journal, engine = Journal.beside(str(destination)), InstantEngine()
    engine.prompts = []
    for shard in open_run(claim_journal(journal), job).shards:
        process_shard([engine], journal, shard)
    publication = publish_output(job, claim_journal(journal), plan_output(str(source), str(destination)))
    responses = [json.loads(each) for each in destination.read_text().splitlines()]
    errors = [json.loads(each) for each in (tmp_path / "out.errors.jsonl").read_text().splitlines()]

    assert job.table.format == "openai"
    assert publication.errors_destination == str(tmp_path / "out.errors.jsonl")
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
    }
    assert found["other"]["response"]["status_code"] == 404
    assert {name for name, each in found.items() if each["response"] is None} == {None, "path", "read", 7}
    assert len({each["id"] for each in responses + errors}) == len(LINES)


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
