"""`HuggingFacePipeline` keeps its word on every backend: stop strings, batches, counts, streams, bad rows."""

from __future__ import annotations

import asyncio
import pickle
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.load import dumps
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import PromptTemplate

from prefect_huggingface.blocks import GenerationOptions, LocalModel
from prefect_huggingface.tasks.errors import GenerationError, HuggingFaceTaskError, SettingsError
from prefect_huggingface.tasks.langchain import HuggingFacePipeline

# At a lower precision, rows beside it may change a text of random weights.
EXACT = {"INFERENCE_PRECISION_HINT": "f32"}
TOKEN = "hf_CanaryTokenOfThePipeline"
PROMPTS = ["The capital of France", "One, two, three", "A small model", "What is the number 42 in French?"]


def load(folder: Path, backend: str, **arguments: Any) -> HuggingFacePipeline:
    settings = {"max_new_tokens": 12, **arguments.pop("pipeline_kwargs", {})}
    if backend == "openvino":
        arguments["model_kwargs"] = {"ov_config": EXACT}
    return HuggingFacePipeline.from_model_id(
        str(folder), "text-generation", backend, pipeline_kwargs=settings, **arguments
    )


def engine_of(llm: HuggingFacePipeline) -> Any:
    """Engine behind the face that each caller gets."""
    return llm.get_engine().unshared


@pytest.fixture(params=["default", "openvino"])
def llm(request: pytest.FixtureRequest, tiny_llama_int8: Path) -> HuggingFacePipeline:
    return load(tiny_llama_int8, request.param)


@pytest.fixture
def torch_llm(tiny_llama: Path) -> HuggingFacePipeline:
    return load(tiny_llama, "default")


def test_the_prompt_is_not_in_the_text_unless_asked_for(llm: HuggingFacePipeline) -> None:
    text = llm.invoke(PROMPTS[0])
    assert text
    assert not text.startswith(PROMPTS[0])
    assert llm.bind(skip_prompt=True).invoke(PROMPTS[0]) == text
    assert llm.bind(skip_prompt=False).invoke(PROMPTS[0]) == PROMPTS[0] + text
    assert "".join(llm.bind(skip_prompt=False).stream(PROMPTS[0])) == PROMPTS[0] + text
    assert llm.invoke(PROMPTS[0], pipeline_kwargs={"return_full_text": True}) == PROMPTS[0] + text


def test_every_way_of_calling_gives_the_same_text(llm: HuggingFacePipeline) -> None:
    async def awaited() -> list[Any]:
        streamed = "".join([piece async for piece in llm.astream(PROMPTS[0])])
        return [[streamed], [await llm.ainvoke(PROMPTS[0])], await llm.abatch(PROMPTS)]

    texts = llm.batch(PROMPTS)
    assert [llm.invoke(prompt) for prompt in PROMPTS] == texts
    assert "".join(llm.stream(PROMPTS[0])) == texts[0]
    assert asyncio.run(awaited()) == [texts[:1], texts[:1], texts]
    assert llm.batch(PROMPTS, return_exceptions=True) == texts
    assert llm.batch(PROMPTS, config={"max_concurrency": 2}) == texts
    assert (PromptTemplate.from_template("{text}") | llm | StrOutputParser()).batch(
        [{"text": t} for t in PROMPTS]
    ) == texts


def test_a_stop_string_ends_the_text_early_everywhere(llm: HuggingFacePipeline) -> None:
    long = {"max_new_tokens": 60}
    # Plain letters, so that the tokens that end them are not part of a longer character.
    texts = dict(zip(PROMPTS, llm.batch(PROMPTS, **long), strict=True))
    prompt, stop = next((prompt, run) for prompt, text in texts.items() for run in re.findall(r"[a-z]{2,}", text[1:]))
    text = texts[prompt]
    cut = text[: text.index(stop)]
    stopping = llm.bind(stop=[stop], **long)
    assert stopping.invoke(prompt) == cut
    assert "".join(stopping.stream(prompt)) == cut
    assert stopping.batch(PROMPTS)[PROMPTS.index(prompt)] == cut
    assert asyncio.run(stopping.ainvoke(prompt)) == cut
    assert llm.invoke(prompt, pipeline_kwargs={"stop_sequence": stop, **long}) == cut
    info = llm.generate([prompt], stop=[stop], **long).generations[0][0].generation_info or {}
    assert info["finish_reason"] == "stop"
    assert info["token_usage"]["completion_tokens"] < 60


def test_token_counts_and_finish_reason(llm: HuggingFacePipeline, tiny_llama: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    counts = [len(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    result = llm.generate(PROMPTS)
    infos = [row[0].generation_info or {} for row in result.generations]
    assert [info["token_usage"]["prompt_tokens"] for info in infos] == counts
    assert {info["finish_reason"] for info in infos} <= {"length", "stop"}
    assert all(
        (info["token_usage"]["completion_tokens"] == 12) == (info["finish_reason"] == "length") for info in infos
    )
    assert result.llm_output is not None
    assert result.llm_output["token_usage"]["prompt_tokens"] == sum(counts)
    assert llm.get_num_tokens(PROMPTS[0]) == counts[0]


def test_only_the_bad_row_is_an_exception(llm: HuggingFacePipeline) -> None:
    good = llm.batch(PROMPTS)
    rows = [PROMPTS[0], "", PROMPTS[1], "much too long " * 300, PROMPTS[2], " \n", PROMPTS[3]]
    answers = llm.batch(rows, return_exceptions=True)
    assert [answers[place] for place in (0, 2, 4, 6)] == good
    errors = [answers[place] for place in (1, 3, 5)]
    assert all(isinstance(error, GenerationError) for error in errors)
    assert [error.fields["error_code"] for error in errors] == ["empty_prompt", "too_long", "empty_prompt"]
    assert asyncio.run(llm.abatch(rows, return_exceptions=True))[4] == good[2]
    with pytest.raises(GenerationError):
        llm.batch(rows)
    assert llm.batch(PROMPTS) == good


def test_callbacks_see_tokens_results_and_the_error_of_the_bad_row(llm: HuggingFacePipeline) -> None:
    class Recorder(BaseCallbackHandler):
        def __init__(self) -> None:
            self.tokens: list[str] = []
            self.ends: list[Any] = []
            self.errors: list[BaseException] = []

        def on_llm_new_token(self, token: str, **_: Any) -> None:
            self.tokens.append(token)

        def on_llm_end(self, response: Any, **_: Any) -> None:
            self.ends.append(response)

        def on_llm_error(self, error: BaseException, **_: Any) -> None:
            self.errors.append(error)

    recorder = Recorder()
    text = "".join(llm.stream(PROMPTS[0], config={"callbacks": [recorder]}))
    assert "".join(recorder.tokens) == text
    assert recorder.ends[0].generations[0][0].generation_info["finish_reason"] in ("length", "stop")
    llm.batch([PROMPTS[0], "", PROMPTS[1]], config={"callbacks": [recorder]}, return_exceptions=True)
    assert (len(recorder.ends), len(recorder.errors)) == (3, 1)


def test_an_error_in_a_stream_arrives_at_once(llm: HuggingFacePipeline) -> None:
    async def streamed() -> None:
        async for _ in llm.astream("much too long " * 300):
            pass

    started = time.process_time()
    with pytest.raises(GenerationError, match="tokens"):
        list(llm.stream("much too long " * 300))
    with pytest.raises(GenerationError, match="tokens"):
        asyncio.run(streamed())
    assert time.process_time() - started < 2


def test_a_stream_that_nobody_reads_on_is_cancelled(llm: HuggingFacePipeline) -> None:
    stream = llm.bind(max_new_tokens=400).stream(PROMPTS[0])
    next(iter(stream))
    stream.close()
    # The engine is free at once: a short request does not wait for the rest of the long one.
    assert llm.invoke(PROMPTS[0])


def test_many_threads_share_one_engine(llm: HuggingFacePipeline) -> None:
    texts = llm.batch(PROMPTS)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(llm.invoke, PROMPTS * 8))
    assert answers == texts * 8


def test_total_length_counts_the_prompt(llm: HuggingFacePipeline, tiny_llama: Path) -> None:
    short = HuggingFacePipeline.from_model_id(
        str(tiny_llama), "text-generation", llm.model.backend, model_kwargs={"temperature": 0, "max_length": 16}
    )
    info = short.generate([PROMPTS[0]]).generations[0][0].generation_info or {}
    assert info["token_usage"]["total_tokens"] == 16
    answers = short.batch([PROMPTS[0], PROMPTS[0] * 8], return_exceptions=True)
    assert isinstance(answers[0], str)
    assert isinstance(answers[1], GenerationError)
    assert "`max_length` (16)" in str(answers[1])


def test_the_llm_travels_and_loads_by_itself(llm: HuggingFacePipeline) -> None:
    copy = pickle.loads(pickle.dumps(llm))
    assert engine_of(copy) is engine_of(llm)
    assert copy.invoke(PROMPTS[0]) == llm.invoke(PROMPTS[0])


def test_the_llm_of_a_pickle_answers_the_same_in_another_process(
    torch_llm: HuggingFacePipeline, tmp_path: Path
) -> None:
    (tmp_path / "llm.pickle").write_bytes(pickle.dumps(torch_llm.bind(stop=["xyzzy"])))
    code = (
        f"import pickle; print(repr(pickle.load(open({str(tmp_path / 'llm.pickle')!r}, 'rb')).invoke({PROMPTS[0]!r})))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip().splitlines()[-1] == repr(torch_llm.invoke(PROMPTS[0]))


@pytest.mark.parametrize(
    "arguments",
    [
        {"model_kwargs": {"token": TOKEN}},
        {"pipeline_kwargs": {"token": TOKEN}},
        {"pipeline_kwargs": {"model_kwargs": {"use_auth_token": TOKEN}}},
    ],
)
def test_a_token_is_shown_nowhere(tiny_llama: Path, arguments: dict[str, Any]) -> None:
    llm = load(tiny_llama, "default", **arguments)
    assert llm.model is not None
    assert llm.model.get_credentials().get_token() == TOKEN
    shown = [repr(llm), str(llm), dumps(llm), str(llm._identifying_params), str(llm.model_dump()), str(llm.__dict__)]
    assert [text for text in shown if TOKEN in text] == []
    with pytest.raises(ValueError) as caught:
        HuggingFacePipeline(model_id=str(tiny_llama), model_kwargs={"token": TOKEN}, batch_size=0)
    assert TOKEN not in str(caught.value)


def test_a_block_is_all_it_needs(tiny_llama: Path, torch_llm: HuggingFacePipeline) -> None:
    model = LocalModel(model_id=str(tiny_llama), backend="torch", options=GenerationOptions(max_new_tokens=12))
    llm = HuggingFacePipeline(model=model)
    assert llm.invoke(PROMPTS[0]) == torch_llm.invoke(PROMPTS[0])
    assert engine_of(llm) is engine_of(torch_llm)
    assert HuggingFacePipeline(model=model, pipeline_kwargs={"max_new_tokens": 3}).get_num_tokens("a b") > 0


def test_the_defaults_of_two_llms_on_one_engine_do_not_mix(tiny_llama: Path, torch_llm: HuggingFacePipeline) -> None:
    text = torch_llm.invoke(PROMPTS[0])
    other = load(tiny_llama, "default", pipeline_kwargs={"max_new_tokens": 3, "stop": [text[:2]], "temperature": 0.9})
    assert engine_of(other) is engine_of(torch_llm)
    assert other.invoke(PROMPTS[0]) != text
    assert torch_llm.invoke(PROMPTS[0]) == text


def test_several_answers_and_log_probabilities(torch_llm: HuggingFacePipeline) -> None:
    result = torch_llm.generate([PROMPTS[0]], n=3, do_sample=True, seed=1, logprobs=True)
    assert len({row.text for row in result.generations[0]}) > 1
    assert len(result.generations[0]) == 3
    info = result.generations[0][0].generation_info or {}
    assert all(value <= 0 for value in info["logprobs"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"max_tokkens": 3}, "'max_tokkens'"),
        ({"pipeline_kwargs": {"top_q": 3}}, "'top_q'"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 2.0}, "top_p"),
    ],
)
def test_bad_settings_of_a_call_are_errors_at_once(
    torch_llm: HuggingFacePipeline, call: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        torch_llm.invoke(PROMPTS[0], **call)
    answers = torch_llm.bind(**call).batch(PROMPTS, return_exceptions=True)
    assert all(isinstance(answer, ValueError) for answer in answers)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"model_kwargs": {"temperature": 0}}, {"pipeline": "text-generation"}, {"pipeline": object()}],
)
def test_an_llm_needs_one_source(arguments: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        HuggingFacePipeline(**arguments)


def test_a_block_excludes_a_pipeline(tiny_llama: Path) -> None:
    model = LocalModel(model_id=str(tiny_llama), backend="torch")
    with pytest.raises(SettingsError):
        HuggingFacePipeline(model=model, pipeline="text-generation")


def test_settings_within_settings_count(tiny_llama: Path) -> None:
    nested = {"model_kwargs": {"temperature": 0, "max_new_tokens": 3}}
    llm = HuggingFacePipeline.from_model_id(str(tiny_llama), "text-generation", pipeline_kwargs=nested)
    assert llm.generate(PROMPTS[:1]).generations[0][0].generation_info["token_usage"]["completion_tokens"] == 3
    direct = HuggingFacePipeline(model_id=str(tiny_llama), model_kwargs={"batch_size": 2})
    assert direct.batch_size == 2


def test_unknown_arguments_are_refused(tiny_llama: Path) -> None:
    with pytest.raises(ValueError, match="devise"):
        HuggingFacePipeline(model_id=str(tiny_llama), devise=0)


def test_a_gpu_that_is_not_there_is_an_error_at_once(tiny_llama: Path) -> None:
    import torch

    missing = torch.cuda.device_count()
    with pytest.raises(HuggingFaceTaskError, match=str(missing)):
        load(tiny_llama, "default", device=missing)


@pytest.mark.parametrize("device", [-1, "-1", "CPU", None])
def test_the_device_is_that_of_the_engine_however_it_is_named(tiny_llama: Path, device: Any) -> None:
    llm = HuggingFacePipeline.from_model_id(str(tiny_llama), "text-generation", device=device)
    assert llm.pipeline.device == llm.pipeline.model.device == engine_of(llm)._model.device
