"""The generation tasks: outside Prefect, inside a flow, with errors as completions and text in the log."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from prefect_huggingface.blocks import GenerationOptions, LocalModel
from prefect_huggingface.tasks.engines.base import checked
from prefect_huggingface.tasks.engines.registry import load_engine, unload_engines
from prefect_huggingface.tasks.errors import GenerationError
from prefect_huggingface.tasks.generation import generate_chat, generate_text, stream_text
from prefect_huggingface.tasks.records import Request
from support.instant_engines import InstantEngine
from support.openvino_engines import openvino_model
from support.scripted_models import make_scripted_model

PROMPTS = ["The capital of France", "", "What is the number 42", "One, two, three"]
CONVERSATION = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "What is the number 42?"}]


@pytest.fixture(scope="module")
def model(tiny_openvino: Path) -> Iterator[LocalModel]:
    yield openvino_model(tiny_openvino)
    unload_engines()


def test_prompts_give_completions_in_their_order(model):
    completions = generate_text.fn(model, PROMPTS * 20)
    alone = [generate_text.fn(model, [prompt])[0] for prompt in PROMPTS]
    assert [completion.text for completion in completions] == [completion.text for completion in alone] * 20
    assert [completion.status for completion in alone] == ["length", "empty_prompt", "length", "length"]
    assert {completion.request_id for completion in completions} == {None}


def test_no_prompts_load_no_model(tmp_path):
    assert generate_text.fn(LocalModel(model_id=str(tmp_path / "nowhere")), []) == []


def test_a_single_prompt_is_not_a_list(model):
    with pytest.raises(TypeError, match="'Hello'"):
        generate_text.fn(model, "Hello")
    with pytest.raises(TypeError, match="list of lists"):
        generate_chat.fn(model, CONVERSATION)


def test_options_go_over_those_of_the_model(model):
    (completion,) = generate_text.fn(model, PROMPTS[:1], GenerationOptions(max_new_tokens=3, ignore_eos=True))
    assert completion.generated_tokens == 3


def test_a_conversation_gets_the_template_once(model):
    templated = "<|system|>Be short.<|end|><|user|>What is the number 42?<|end|><|assistant|>"
    (chat,) = generate_chat.fn(model, [CONVERSATION])
    (text,) = generate_text.fn(model, [templated])
    (again,) = generate_text.fn(model.model_copy(update={"chat_template": "auto"}), [templated])
    assert chat.text == text.text == again.text
    assert chat.prompt_tokens == text.prompt_tokens == again.prompt_tokens


def test_a_template_that_loses_messages_is_found_before_the_first_conversation(tmp_path):
    folder = make_scripted_model(tmp_path / "model", "Yes.", "gemma-2")
    (folder / "chat_template.jinja").write_text("{{ messages[-1].content }}<start_of_turn>model\n")
    model = LocalModel(model_id=str(folder), backend="torch", weight_format=None, device="cpu")
    user = {"role": "user", "content": "Is it?"}
    system = {"role": "system", "content": "Be short."}
    options = GenerationOptions(max_new_tokens=1)
    alone, merged = generate_chat.fn(model, [[user], [system, user]], options)
    assert alone.text == merged.text
    asked: list[int] = []
    engine = load_engine(model)
    engine.inputs.check = lambda options: asked.append(1)
    lost = [user, {"role": "assistant", "content": "No."}, {**user, "content": "No?"}]
    with pytest.raises(GenerationError, match="^Conversation 1 cannot be asked.*leaves out a message"):
        generate_chat.fn(model, [[user], lost, ["no message"]], options)
    assert not asked
    # What is no conversation fails alone.
    rows = generate_chat.fn(model, [[user], ["no message"], [], [{"content": "no role"}]], options)
    assert [row.error_code for row in rows] == [None, "invalid_prompt", "empty_prompt", "invalid_prompt"]


def test_a_stream_gives_the_text_and_shows_it_in_the_log(model, caplog):
    caplog.set_level("INFO")
    pieces = list(stream_text.fn(model, PROMPTS[0]))
    text = generate_text.fn(model, PROMPTS[:1])[0].text
    assert "".join(pieces) == text
    logged = [record.getMessage() for record in caplog.records if record.name.startswith("prefect.prefect_huggingface")]
    assert "".join(logged) == text.replace("\n", "")


def test_a_stream_shows_its_text_in_the_log_of_the_run(model, prefect_server, caplog):
    from prefect import flow

    @flow
    def ask() -> str:
        return "".join(stream_text(model, PROMPTS[0]))

    caplog.set_level("INFO")
    text = ask()
    logged = [record.getMessage() for record in caplog.records if record.name == "prefect.task_runs"]
    assert text.replace("\n", "") in "".join(logged)


def test_an_error_ends_a_stream(model):
    with pytest.raises(GenerationError, match="prompt"):
        list(stream_text.fn(model, " "))


def test_the_tasks_run_in_a_flow(model, prefect_server):
    from prefect import flow, unmapped

    @flow
    def ask() -> tuple[list, list, list]:
        mapped = generate_text.map(unmapped(model), [[prompt] for prompt in PROMPTS])
        return (
            [future.result() for future in mapped],
            generate_chat(model, [CONVERSATION]),
            list(stream_text(model, "A")),
        )

    mapped, chat, streamed = ask()
    assert [completions[0].text for completions in mapped] == [one.text for one in generate_text.fn(model, PROMPTS)]
    assert chat == [
        type(chat[0])(**{**generate_chat.fn(model, [CONVERSATION])[0].as_dict(), "seconds": chat[0].seconds})
    ]
    assert "".join(streamed) == generate_text.fn(model, ["A"])[0].text


def test_answers_come_in_the_order_of_their_requests_with_their_ids_and_a_failed_check_ends_the_others():
    engine = InstantEngine()
    requests = [Request(f"prompt {number}", id=f"row {number}") for number in range(200)]
    seen: list[int] = []
    answers = engine.answer_all(requests, 7, lambda completion: seen.append(completion.request_id))
    assert [answer.request_id for answer in answers] == [request.id for request in requests]
    assert [answer.text for answer in answers] == [engine.submit(request).result().text for request in requests]
    assert sorted(seen) == list(range(200))
    engine.prompts = []
    with pytest.raises(GenerationError, match="The prompt is empty"):
        engine.answer_all([Request(""), *requests], 4, checked)
    assert len(engine.prompts) < 10
