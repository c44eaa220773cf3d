"""Tasks and flows take an endpoint where they take a local model, and give the same text."""

from __future__ import annotations

import json

import pytest
from prefect import flow

from prefect_huggingface.blocks import GenerationOptions, HuggingFaceCredentials, InferenceEndpoint, LocalModel
from prefect_huggingface.flows import batch_inference, prompt_chain
from prefect_huggingface.tasks import generate_chat, generate_text, stream_text
from prefect_huggingface.tasks.errors import ChainError

pytestmark = pytest.mark.usefixtures("prefect_server")

OPTIONS = GenerationOptions(max_new_tokens=6)
PROMPTS = ["The capital of France is", "One, two,"]
TOKEN = "hf_CanaryOfTheFlow"


@pytest.fixture
def models(tgi, tiny_llama):
    """The same model behind an endpoint and on this machine, both with plain prompts."""
    credentials = HuggingFaceCredentials(token=TOKEN)
    remote = InferenceEndpoint(url=tgi.url, options=OPTIONS, credentials=credentials)
    return remote, LocalModel(model_id=str(tiny_llama), backend="torch", chat_template="never", options=OPTIONS)


def test_the_generation_tasks_give_the_same_text_for_either_block(models):
    @flow
    def ask(model: LocalModel | InferenceEndpoint):
        conversations = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
        texts = [row.text for row in generate_text(model, PROMPTS)]
        chats = [row.text for row in generate_chat(model, conversations)]
        return texts, chats, "".join(stream_text(model, PROMPTS[0]))

    remote, local = (ask(model) for model in models)
    assert remote == local
    assert remote[2] == remote[0][0]


def test_the_wait_for_a_sleeping_endpoint_shows_in_the_log_of_the_run(models, tgi, caplog):
    tgi.fault("status", status=503, path="", method=None, times=6)

    @flow
    def ask(model: InferenceEndpoint):
        return generate_text(model, PROMPTS)

    with caplog.at_level("INFO"):
        assert [row.error for row in ask(models[0])] == [None, None]
    lines = [record for record in caplog.records if "Waiting for" in record.getMessage()]
    assert lines
    assert {record.name for record in lines} == {"prefect.task_runs"}


def test_a_chain_runs_on_an_endpoint(models, tgi):
    steps = [{"name": "one", "prompt": "Begin: {topic}"}, {"name": "two", "prompt": "Go on: {one}"}]
    remote, local = (prompt_chain(model, steps, {"topic": "Paris"}) for model in models)
    assert remote == local
    tgi.fault("status", status=401, path="^/$", times=None)
    with pytest.raises(ChainError, match="does not accept the token"):
        prompt_chain(models[0], steps, {"topic": "Paris"})


def test_a_batch_runs_on_an_endpoint_and_rows_keep_their_own_errors(models, tgi, tmp_path):
    rows = [{"id": i, "city": "" if i == 7 else f"city {i}"} for i in range(30)]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tgi.fault("status", status=429, path="^/$", times=None, share=0.2)
    tgi.fault("status", status=422, path="^/$", times=None, contains="city 11")
    found = []
    for number, model in enumerate(models):
        destination = tmp_path / f"out-{number}.jsonl"
        summary = batch_inference(model, str(source), str(destination), "{city}", show_progress=False)
        assert summary.rows == 30
        found.append([json.loads(line) for line in destination.read_text().splitlines()])
    remote, local = found
    assert [row["status"] for row in remote if row["id"] in (7, 11)] == ["empty_prompt", "invalid_option"]
    compared = [(mine, here) for mine, here in zip(remote, local, strict=True) if mine["id"] not in (7, 11)]
    assert all(mine["completion"] == here["completion"] for mine, here in compared)
    assert [row["id"] for row in remote] == list(range(30))
    assert TOKEN not in "".join(path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file())


def test_a_saved_endpoint_is_used_by_its_reference(models):
    models[0].save("flow-endpoint", overwrite=True)
    loaded = InferenceEndpoint.load("flow-endpoint")
    assert loaded.get_token() == TOKEN
    outputs = prompt_chain.with_options(name="by-reference")(loaded, [{"name": "one", "prompt": PROMPTS[0]}])
    assert outputs == prompt_chain(models[1], [{"name": "one", "prompt": PROMPTS[0]}])


def test_the_form_of_a_flow_offers_both_blocks():
    from prefect.utilities.callables import parameter_schema

    kinds = ["LocalModel", "InferenceEndpoint"]
    for deployed, wanted in ((prompt_chain, kinds), (batch_inference, kinds)):
        schema = parameter_schema(deployed.fn).model_dump_for_openapi()
        offered = [choice["$ref"].rpartition("/")[2] for choice in schema["properties"]["model"]["anyOf"]]
        assert offered == wanted
