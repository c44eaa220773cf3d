"""Several processes answer as one engine: each on its part of the cores, all behind one queue, none left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path

import psutil
import pytest
from pydantic import ValidationError

from prefect_huggingface.blocks import EngineOptions, GenerationOptions, LocalModel
from prefect_huggingface.tasks import load_engine, unload_engines
from prefect_huggingface.tasks.engines.cores import divide_cores, read_nodes
from prefect_huggingface.tasks.engines.engine_group import EngineGroup
from prefect_huggingface.tasks.engines.openvino_engine import OpenVINOTextEngine
from prefect_huggingface.tasks.engines.registry import list_engines, set_memory_budget
from prefect_huggingface.tasks.errors import EngineError, HuggingFaceTaskError
from prefect_huggingface.tasks.records import Request
from support.engine_families import wait_until
from support.openvino_engines import complete, openvino_model

PROMPTS = [f"The number {number} is" for number in range(30)]
LONG = GenerationOptions(max_new_tokens=400, ignore_eos=True)
needs_two_cores = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="one core cannot be divided"
)
pytestmark = needs_two_cores


def group_model(folder: Path, **settings) -> LocalModel:
    return openvino_model(folder, engine=EngineOptions(cache_size_gb=0.5, instances=2), **settings)


@pytest.fixture(scope="module")
def group(tiny_openvino: Path) -> Iterator[EngineGroup]:
    with EngineGroup(tiny_openvino, group_model(tiny_openvino)) as loaded:
        yield loaded


def simulate_nodes(folder: Path, *lists: str) -> Path:
    for number, cores in enumerate(lists):
        (folder / f"node{number}").mkdir()
        (folder / f"node{number}" / "cpulist").write_text(cores + "\n")
    return folder


def cores_of(process_id: int) -> set[frozenset[int]]:
    """Return what the threads of a process are bound to."""
    return {frozenset(os.sched_getaffinity(thread.id)) for thread in psutil.Process(process_id).threads()}


def test_a_node_is_what_shares_a_memory_and_may_be_used(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(2, 40)))
    nodes = simulate_nodes(tmp_path, "0-3,16-19", "4-7,20", "", "0", *["12"] * 7)
    assert read_nodes(nodes)[:3] == [[2, 3, 16, 17, 18, 19], [4, 5, 6, 7, 20], [12]]
    for core in range(4):
        for sibling in (core, core + 16):
            topology = nodes / "node0" / f"cpu{sibling}" / "topology"
            topology.mkdir(parents=True)
            (topology / "thread_siblings_list").write_text(f"{core},{core + 16}\n")
    # Threads of one physical core go to one process.
    assert read_nodes(nodes)[0] == [16, 17, 2, 18, 3, 19]


def test_where_nothing_is_told_all_cores_are_one_node(tmp_path):
    assert read_nodes(tmp_path / "missing") == [sorted(os.sched_getaffinity(0))]


@pytest.mark.parametrize(
    ("count", "parts"),
    [
        (1, [[0, 1, 8, 9, 4, 5, 12, 13]]),
        (2, [[0, 1, 8, 9], [4, 5, 12, 13]]),
        (4, [[0, 1], [8, 9], [4, 5], [12, 13]]),
        (3, [[0, 1], [8, 9, 4], [5, 12, 13]]),
    ],
)
def test_each_process_gets_as_many_cores_of_as_few_nodes_as_can_be(count, parts):
    assert divide_cores([[0, 1, 8, 9], [4, 5, 12, 13]], count) == parts


def test_more_processes_than_cores_are_refused(tiny_openvino):
    model = openvino_model(tiny_openvino, engine=EngineOptions(instances=4097))
    with pytest.raises(EngineError, match=r"`instances` must be at most .*got 4097\. Lower it"):
        load_engine(model)


@pytest.mark.parametrize(
    "settings", [{"backend": "torch"}, {"task": "feature-extraction"}, {"task": "translation"}], ids=str
)
@pytest.mark.parametrize(
    ("options", "rule"),
    [({"instances": 2}, "`instances` must be 1 with"), ({"draft_model": "draft"}, "`draft_model` must be empty with"),
     ({"prompt_lookup_tokens": 3}, "`prompt_lookup_tokens` must be empty with")],
)  # fmt: skip
def test_what_an_engine_does_not_do_is_refused_in_the_block(tiny_llama, settings, options, rule):
    with pytest.raises(ValidationError, match=rule):
        LocalModel(model_id=str(tiny_llama), engine=EngineOptions(**options), **settings)
    LocalModel(model_id=str(tiny_llama), engine=EngineOptions(instances=1, prompt_lookup_tokens=0), **settings)


def test_no_two_processes_have_a_core_in_common(group):
    first, second = (cores_of(number) for number in group.process_ids)
    assert len(first) == len(second) == 1
    assert not next(iter(first)) & next(iter(second))


def test_greedy_text_is_that_of_one_engine_and_every_process_answers(group, tiny_openvino):
    with OpenVINOTextEngine(tiny_openvino, openvino_model(tiny_openvino)) as alone:
        expected = [completion.text for completion in complete(alone, PROMPTS)]
    before = [sum(psutil.Process(number).cpu_times()[:2]) for number in group.process_ids]
    assert [completion.text for completion in complete(group, PROMPTS)] == expected
    assert [completion.text for completion in complete(group, PROMPTS * 4)][:30] == expected
    after = [sum(psutil.Process(number).cpu_times()[:2]) for number in group.process_ids]
    assert all(later > earlier for earlier, later in zip(before, after, strict=True))


def test_what_the_processes_do_not_take_waits_and_goes_to_the_first_that_is_free(group):
    count = group.in_flight + 40
    options = GenerationOptions(max_new_tokens=48, ignore_eos=True)
    futures = [group.submit(Request("The", options=options)) for _ in range(count)]
    assert group._waiting
    assert not wait(futures, timeout=120).not_done
    assert all(future.result().error is None for future in futures)
    group.check_integrity()


def test_a_request_that_waits_can_be_cancelled_and_never_reaches_a_process(group):
    first = [group.submit(Request("The", options=LONG)) for _ in range(group.in_flight)]
    sent = [instance._last_number for instance in group._instances]
    late = group.submit(Request("The", options=LONG))
    assert late.cancel()
    for future in first:
        future.cancel()
    wait_until(lambda: not any(instance.states for instance in group._instances))
    # The next that waits is looked for when one has ended.
    group.submit(Request("The", options=GenerationOptions(max_new_tokens=1))).result(60)
    assert not group._waiting
    assert sum(instance._last_number for instance in group._instances) == sum(sent) + 1


def test_a_deadline_counts_from_the_submission_also_where_all_are_busy(group):
    busy = [group.submit(Request("The", options=LONG)) for _ in range(group.in_flight + 5)]
    late = LONG.merged(GenerationOptions(deadline_seconds=0.5))
    completion = group.submit(Request("The", options=late)).result(60)
    for future in busy:
        future.cancel()
    assert completion.finish_reason == "deadline"
    assert completion.seconds < 5  # all that is before it takes several times as long
    wait_until(lambda: not any(instance.states for instance in group._instances))


def test_a_process_that_is_killed_fails_all_requests_and_the_next_caller_gets_new_ones(tiny_openvino):
    model = group_model(tiny_openvino)
    engine = load_engine(model)
    futures = [engine.submit(Request("The", options=LONG)) for _ in range(engine.in_flight + 5)]
    numbers = engine.unshared.process_ids
    os.kill(numbers[0], signal.SIGKILL)
    done = wait(futures, timeout=60)
    assert not done.not_done
    errors = {future.result().error for future in futures}
    assert len(errors) == 1
    assert errors.pop() == (
        "The engine failed: a process of it ended with status -9, probably because memory ran out. Load it again."
    )
    assert engine.submit(Request("The")).result(60).error_code == "engine_error"
    again = load_engine(model)
    assert again.submit(Request("The")).result(60).error is None
    assert not any(psutil.pid_exists(number) for number in numbers)
    unload_engines()


def test_a_model_that_does_not_load_is_refused_with_the_reason_and_leaves_no_process(tiny_openvino, tmp_path):
    for file in tiny_openvino.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "openvino_model.bin").write_bytes(b"")
    before = set(psutil.Process().children())
    with pytest.raises(EngineError, match="OpenVINO cannot load"):
        EngineGroup(tmp_path, group_model(tmp_path))
    assert set(psutil.Process().children()) <= before


@pytest.mark.parametrize("file", ["tokenizer.json", "openvino_tokenizer.xml", "config.json"])
def test_an_incomplete_folder_is_refused_as_by_one_engine(tiny_openvino, tmp_path, file):
    for each in tiny_openvino.iterdir():
        if each.is_file() and each.name != file:
            (tmp_path / each.name).write_bytes(each.read_bytes())
    found = []
    for engine, model in ((OpenVINOTextEngine, openvino_model(tmp_path)), (EngineGroup, group_model(tmp_path))):
        try:
            with engine(tmp_path, model) as loaded:
                found.append(loaded.submit(Request("The")).result(60).text)
        except HuggingFaceTaskError as exc:
            found.append((type(exc), str(exc)))
    assert found[0] == found[1]


def test_requests_that_end_at_once_are_all_completed(group):
    for options in (GenerationOptions(max_new_tokens=100_000), GenerationOptions(max_new_tokens=1)):
        futures = [group.submit(Request("The", options=options)) for _ in range(300)]
        assert not wait(futures, timeout=60).not_done
    group.check_integrity()


def test_requests_that_wait_are_handed_on_by_the_callbacks_of_others(group):
    """A callback that asks again, in the thread of a reader, finds no lock held."""
    found: list[str | None] = []

    def ask_again(future):
        if len(found) < 500:
            found.append(future.result().error)
            group.submit(Request("The", options=GenerationOptions(max_new_tokens=1))).add_done_callback(ask_again)

    for _ in range(group.in_flight + 40):
        group.submit(Request("The", options=GenerationOptions(max_new_tokens=1))).add_done_callback(ask_again)
    wait_until(lambda: len(found) >= 500, 60)
    wait_until(lambda: not group._waiting and not any(instance.states for instance in group._instances))
    assert set(found) == {None}


def test_no_process_outlives_the_one_that_loaded_it(tiny_openvino, tmp_path):
    program = (
        "import sys, time\n"
        "from prefect_huggingface.blocks import EngineOptions, LocalModel\n"
        "from prefect_huggingface.tasks import load_engine\n"
        "engine = load_engine(LocalModel(model_id=sys.argv[1], engine=EngineOptions(instances=2)))\n"
        "print(*engine.unshared.process_ids, flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tiny_openvino)], stdout=subprocess.PIPE, text=True
    ) as one:
        numbers = [int(number) for number in one.stdout.readline().split()]
        assert len(numbers) == 2
        one.kill()
    wait_until(lambda: not any(psutil.pid_exists(number) for number in numbers))


def test_the_memory_of_the_processes_counts_against_the_budget(tiny_openvino):
    unload_engines()
    handle = load_engine(group_model(tiny_openvino))
    try:
        state = list_engines()[0]
        assert state.memory_bytes >= handle.unshared.outside_bytes > 0
        del handle
        # What this process takes by itself is within the budget, with the others it is not.
        set_memory_budget((psutil.Process().memory_info().rss + state.memory_bytes / 2) / 2**30)
        load_engine(openvino_model(tiny_openvino))
        assert [engine.engine for engine in list_engines()] == ["OpenVINOTextEngine"]
    finally:
        set_memory_budget(None)
        unload_engines()


def test_the_seconds_of_a_request_are_those_since_its_submission(group):
    busy = [group.submit(Request("The", options=LONG)) for _ in range(group.in_flight)]
    started = time.perf_counter()
    late = group.submit(Request("The", options=GenerationOptions(max_new_tokens=1)))
    wait(busy, return_when="FIRST_COMPLETED", timeout=60)
    waited = time.perf_counter() - started
    assert waited <= late.result(60).seconds <= time.perf_counter() - started
    wait(busy, timeout=60)


def test_a_request_that_cannot_travel_is_an_error_and_harms_no_other(group):
    odd = GenerationOptions(template_options={"call": lambda: None})
    lost, kept = group.submit(Request("The", options=odd)), group.submit(Request("The"))
    assert "cannot be sent" in lost.result(60).error
    assert kept.result(60).error is None
    group.check_integrity()


def test_a_request_that_cannot_be_read_in_a_process_is_an_error_and_harms_no_other(tiny_openvino, tmp_path):
    """What is defined in the script that asks is unknown to the processes, though it can be sent."""
    program = tmp_path / "script.py"
    program.write_text(
        "import enum, sys\n"
        "from prefect_huggingface.blocks import EngineOptions, LocalModel\n"
        "from prefect_huggingface.tasks import load_engine, unload_engines\n"
        "from prefect_huggingface.tasks.records import Request\n"
        "class Role(str, enum.Enum):\n"
        "    USER = 'user'\n"
        "engine = load_engine(LocalModel(model_id=sys.argv[1], engine=EngineOptions(instances=2)))\n"
        "odd, plain = ([{'role': role, 'content': 'Hello'}] for role in (Role.USER, 'user'))\n"
        "futures = [engine.submit(Request(messages=each, id=place)) for place, each in enumerate([odd, plain] * 4)]\n"
        "for completion in [future.result(60) for future in futures]:\n"
        "    print(completion.request_id, completion.error_code, (completion.error or '')[-25:])\n"
        "print(engine.failure)\n"
        "unload_engines()\n"
    )
    done = subprocess.run(
        [sys.executable, str(program), str(tiny_openvino)], capture_output=True, text=True, timeout=120
    )
    found = done.stdout.splitlines()
    expected = [f"{number} {None if number % 2 else 'invalid_prompt'}" for number in range(8)]
    assert [" ".join(line.split()[:2]) for line in found[:-1]] == expected, done.stderr[-2000:]
    assert all(line.endswith("Give it plain values.") for line in found[:-1:2])
    assert found[-1] == "None"
