"""Tuning keeps what is faster and as good, for this model on this machine, and `load_engine` uses it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from prefect_huggingface.blocks import EngineOptions, GenerationOptions, LocalModel, ModelStore
from prefect_huggingface.tasks import tuning
from prefect_huggingface.tasks.engines import openvino_runtime
from prefect_huggingface.tasks.engines.cores import allowed_cores
from prefect_huggingface.tasks.engines.openvino_runtime import read_settings, tuning_file, with_settings, write_settings
from prefect_huggingface.tasks.engines.registry import load_engine, unload_engines
from prefect_huggingface.tasks.errors import PlanError
from prefect_huggingface.tasks.records import Request


@pytest.fixture(autouse=True)
def _short_races(monkeypatch):
    monkeypatch.setattr(tuning, "ROWS", 16)
    monkeypatch.setattr(tuning, "COMPARED_ROWS", 8)
    monkeypatch.setattr(tuning, "REPEATS", 2)


@pytest.fixture
def model(tiny_openvino: Path, tmp_path: Path) -> Iterator[LocalModel]:
    yield LocalModel(model_id=str(tiny_openvino), store=ModelStore(path=tmp_path / "store"))
    unload_engines()


@pytest.fixture
def all_is_a_gain(monkeypatch):
    """Keep all that can be loaded, however busy the machine is."""
    for name in ("CLEAR_GAIN", "GAIN_OF_INSTANCES", "LEAST_GAIN"):
        monkeypatch.setattr(tuning, name, 0.01)
    monkeypatch.setattr(tuning, "TOLERANCE", 1.0)


def test_settings_are_tried_kept_and_used(model, tiny_openvino, monkeypatch, all_is_a_gain):
    grid = (("max_num_seqs", (64,)), ("KV_CACHE_PRECISION", ("u8", "nonsense")))
    monkeypatch.setattr(tuning, "GRID", grid)
    found = tuning.tune_engine.fn(model)
    assert [(trial.setting, trial.value, trial.kept) for trial in found.trials] == [
        ("max_num_seqs", 64, True),
        ("KV_CACHE_PRECISION", "u8", True),
        ("KV_CACHE_PRECISION", "nonsense", False),
    ]
    assert "nonsense" in found.trials[-1].problem
    assert all(0 <= trial.agreement <= 1 for trial in found.trials[:2])
    assert json.loads(Path(found.path).read_text())["settings"] == dict(found.settings)
    engine = load_engine(model).unshared
    assert engine.tuned(model, tiny_openvino).ov_config == {"KV_CACHE_PRECISION": "u8"}


def test_what_is_no_gain_is_not_kept(model, monkeypatch):
    monkeypatch.setattr(tuning, "GRID", (("max_num_seqs", (1,)),))
    found = tuning.find_settings(model, ["Hello there"])
    assert found.trials[0].speed_up < 1
    assert found.trials[0].agreement is None  # nobody needs its answers
    assert found.settings == {}
    assert found.speed_up == 1.0


@pytest.mark.skipif(len(allowed_cores()) < 2, reason="one core cannot be divided")
def test_several_processes_are_tried_where_there_are_cores_and_used_where_they_may_be(
    model, monkeypatch, all_is_a_gain
):
    monkeypatch.setattr(tuning, "GRID", (("instances", (2, 1000)),))
    expected = next(load_engine(model).generate([Request("Hello")])).text
    unload_engines()
    found = tuning.find_settings(model)
    assert [(trial.value, trial.kept) for trial in found.trials] == [(2, True)]
    engine = load_engine(model)
    assert len(engine.unshared.process_ids) == 2
    assert next(engine.generate([Request("Hello")])).text == expected
    alone = model.model_copy(update={"engine": EngineOptions(instances=1)})
    assert not hasattr(load_engine(alone).unshared, "process_ids")
    monkeypatch.setattr(openvino_runtime, "allowed_cores", lambda: [1])
    assert with_settings(model, found.settings).engine.instances is None


@pytest.mark.parametrize(
    ("trial", "defaults", "kept", "speed_up"),
    [
        # Seconds of each turn: of the one that runs first, which is the best so far in the first turn, and the other.
        ([(10, 5), (11, 10), (10, 5)], [], False, 1.0),  # slower in one turn of three
        ([(10, 5), (5, 10), (10, 5)], [(5, 10), (9, 5), (5, 15)], True, 2.0),
        ([(10, 5), (5, 10), (10, 5)], [(10, 5), (5, 10), (10, 5)], True, 1.0),  # together they gain nothing
    ],
)
def test_what_is_kept_is_faster_in_every_turn_and_over_the_defaults(
    model, monkeypatch, trial, defaults, kept, speed_up
):
    turns = [seconds for turn in trial for seconds in turn], [seconds for turn in defaults for seconds in turn]
    # Each time is taken between two looks at the clock; the trial as a whole is timed too, for the log.
    steps = iter([0.0, *(step for seconds in turns[0] for step in (0.0, seconds)), 0.0,
                  *(step for seconds in turns[1] for step in (0.0, seconds))])  # fmt: skip
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += next(steps)
        return now

    monkeypatch.setattr(tuning, "time", SimpleNamespace(perf_counter=clock))
    monkeypatch.setattr(tuning, "REPEATS", 3)
    monkeypatch.setattr(tuning, "TOLERANCE", 1.0)
    monkeypatch.setattr(tuning, "GRID", (("max_num_seqs", (8,)),))
    found = tuning.find_settings(model)
    assert [trial.kept for trial in found.trials] == [kept]
    assert found.speed_up == pytest.approx(speed_up)
    assert dict(found.settings) == ({"max_num_seqs": 8} if speed_up > 1 else {})
    assert next(steps, None) is None


@pytest.mark.skipif(len(allowed_cores()) < 2, reason="one core cannot be divided")
def test_as_many_threads_as_there_are_cores_are_the_default_and_not_tried(model, monkeypatch):
    cores = len(allowed_cores())
    monkeypatch.setattr(tuning, "GRID", (("INFERENCE_NUM_THREADS", (1, cores)),))
    assert [trial.value for trial in tuning.find_settings(model).trials] == [1]
    each = model.model_copy(update={"engine": EngineOptions(instances=cores)})
    assert not tuning.find_settings(each).trials


def test_guessing_from_the_prompt_is_tried_on_the_work_to_come_and_used(model, monkeypatch, all_is_a_gain):
    monkeypatch.setattr(tuning, "GRID", (("prompt_lookup_tokens", (3,)),))
    prompts = ["One two three one two three one two three"]
    # Steps of several tokens round differently than those of one.
    model = model.model_copy(update={"ov_config": {"INFERENCE_PRECISION_HINT": "f32"}})
    expected = [load_engine(model).generate([Request(prompt)]) for prompt in prompts]
    expected = [completion.text for answers in expected for completion in answers]
    unload_engines()
    found = tuning.find_settings(model, prompts, concurrency=1)
    assert dict(found.settings) == {"prompt_lookup_tokens": 3}
    engine = load_engine(model)
    assert engine.unshared.tuned(model, Path(model.model_id)).engine.prompt_lookup_tokens == 3
    assert [completion.text for completion in engine.generate(map(Request, prompts))] == expected
    unlike = model.model_copy(update={"options": GenerationOptions(num_beams=2)})
    assert not tuning.find_settings(unlike, prompts, concurrency=1).trials
    assert not tuning.find_settings(model, concurrency=1).trials
    drafted = model.model_copy(update={"engine": EngineOptions(draft_model=model.model_id)})
    assert not tuning.find_settings(drafted, prompts, concurrency=1).trials


@pytest.mark.parametrize(
    "wanted",
    [
        {"engine": EngineOptions(prompt_lookup_tokens=0)},
        {"engine": EngineOptions(draft_model="draft")},
        {"options": GenerationOptions(num_beams=2)},
    ],
)
def test_guessing_that_was_found_is_left_out_where_it_rules_out_what_is_wanted(model, tiny_openvino, wanted):
    write_settings(model, tiny_openvino, {"prompt_lookup_tokens": 3, "max_num_seqs": 7}, {})
    given = model.model_copy(update=wanted)
    if "draft_model" not in given.engine.model_fields_set:
        [found] = load_engine(given).generate([Request("One two three", options={"num_beams": 2})])
        assert found.error is None
    tuned = with_settings(given, read_settings(model, tiny_openvino))
    assert not tuned.engine.prompt_lookup_tokens
    assert tuned.engine.max_num_seqs == 7


def test_prompts_that_have_no_answer_are_refused(model):
    with pytest.raises(PlanError, match="prompts"):
        tuning.find_settings(model, ["word " * 5000])
    assert not tuning_file(model, Path(model.model_id)).exists()


@pytest.mark.parametrize(("concurrency", "count", "rows"), [(None, 5, 16), (None, 20, 20), (1, 20, 20), (3, 2, 9)])
def test_every_prompt_is_timed_and_as_many_at_a_time(model, concurrency, count, rows):
    search = tuning._Search(model, [f"Prompt {number}" for number in range(count)], concurrency)
    assert len(search._prompts) == rows
    assert {f"Prompt {number}" for number in range(count)} == set(search._prompts)


@pytest.mark.parametrize("asked", [{"do_sample": True, "n": 2, "seed": 1}, {"logprobs": True}, {"min_new_tokens": 8}])
def test_requests_are_answered_while_guessing(model, tiny_openvino, asked):
    request = Request("One two three one two three", options={"max_new_tokens": 8, **asked})
    [expected] = load_engine(model).generate([request])
    unload_engines()
    write_settings(model, tiny_openvino, {"prompt_lookup_tokens": 3}, {})
    [found] = load_engine(model).generate([request])
    assert (found.error, found.text) == (None, expected.text)
    assert len(found.logprobs or ()) == len(expected.logprobs or ())


def test_beams_and_guessing_exclude_each_other_by_name(model, tiny_openvino):
    write_settings(model, tiny_openvino, {"prompt_lookup_tokens": 3}, {})
    [found] = load_engine(model).generate([Request("One two three", options={"num_beams": 2})])
    assert found.error_code == "invalid_option"
    assert "`num_beams`" in found.error
    assert "prompt_lookup_tokens=0" in found.error


def test_no_prompts_at_a_time_are_refused(model):
    with pytest.raises(PlanError, match="concurrency.*0"):
        tuning.find_settings(model, concurrency=0)


def test_answers_that_are_worse_are_not_kept():
    good = [1.0] * 30
    assert tuning._is_worse([0.5] * 30, good)
    assert tuning._is_worse([0.0] * 5 + [1.0] * 25, good)
    assert not tuning._is_worse(good, good)
    assert not tuning._is_worse([0.95] + [1.0] * 29, good)
    assert tuning._agreements(["abcd", "", "x"], ["abxd", "", "y"]) == [0.5, 1.0, 0.0]


def test_what_the_user_gives_goes_over_what_was_found(model):
    settings = {"max_num_seqs": 16, "max_num_batched_tokens": 99, "KV_CACHE_PRECISION": "u4"}
    given = model.model_copy(
        update={"engine": EngineOptions(max_num_seqs=8), "ov_config": {"KV_CACHE_PRECISION": "u8"}}
    )
    tuned = with_settings(given, settings)
    assert (tuned.engine.max_num_seqs, tuned.engine.max_num_batched_tokens) == (8, 99)
    assert tuned.ov_config == {"KV_CACHE_PRECISION": "u8"}


def test_full_precision_stays_full(model):
    exact = model.model_copy(update={"ov_config": {"INFERENCE_PRECISION_HINT": "f32"}})
    tuned = with_settings(exact, {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 64, "max_num_seqs": 16})
    assert tuned.ov_config == {"INFERENCE_PRECISION_HINT": "f32"}
    assert tuned.engine.max_num_seqs == 16


def test_tuned_settings_can_be_left_out_and_forgotten(model, tiny_openvino):
    write_settings(model, tiny_openvino, {"max_num_seqs": 7}, {})
    assert read_settings(model, tiny_openvino) == {"max_num_seqs": 7}
    assert load_engine(model).unshared.sizes.sequences == 7
    untuned = model.model_copy(update={"engine": EngineOptions(tuned=False)})
    assert load_engine(untuned).unshared.sizes.sequences != 7
    assert tuning.forget_settings(model)
    assert not tuning.forget_settings(model)
    unload_engines()
    assert load_engine(model).unshared.sizes.sequences != 7


def test_a_broken_file_is_as_good_as_none(model, tiny_openvino):
    path = tuning_file(model, tiny_openvino)
    path.parent.mkdir(parents=True)
    path.write_text("{")
    assert read_settings(model, tiny_openvino) == {}


def test_other_engines_are_not_tuned(tiny_llama):
    with pytest.raises(PlanError, match="torch"):
        tuning.find_settings(LocalModel(model_id=str(tiny_llama), backend="torch"))
