"""Sizes come from the model and the memory, and rows run beside each other as the sizes allow."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from prefect_huggingface.blocks import EngineOptions, GenerationOptions
from prefect_huggingface.tasks.engines import memory
from prefect_huggingface.tasks.engines.memory import available_bytes, kv_bytes_per_token, resident_bytes, total_bytes
from prefect_huggingface.tasks.engines.openvino_scheduler import (
    BLOCK_TOKENS,
    SHARED_TOKENS,
    ScheduledRequest,
    Scheduler,
    choose_sizes,
)
from prefect_huggingface.tasks.engines.request_state import RequestState
from prefect_huggingface.tasks.records import Request

GIB = 2**30


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    settings = {
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576,
        "max_position_embeddings": 2048,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(settings))
    return tmp_path


def test_the_cache_has_room_for_the_rows_and_leaves_most_of_the_memory(folder):
    sizes = choose_sizes(folder, EngineOptions(), "u8")
    assert sizes.cache_tokens >= 64 * 2048 or sizes.cache_bytes >= 0.25 * available_bytes()
    assert sizes.cache_bytes < 0.5 * total_bytes()
    token_bytes = kv_bytes_per_token(json.loads((folder / "config.json").read_text()), 1.125)
    assert sizes.cache_bytes >= sizes.kv_blocks * BLOCK_TOKENS * token_bytes


def test_what_the_user_gives_is_taken(folder):
    sizes = choose_sizes(folder, EngineOptions(max_num_seqs=3, max_num_batched_tokens=77, cache_size_gb=0.5), "f16")
    assert (sizes.sequences, sizes.batched_tokens, sizes.cache_bytes) == (3, 77, GIB // 2)
    assert sizes.cache_tokens == pytest.approx(GIB / 2 / (2 * 30 * 3 * 64 * 2), abs=BLOCK_TOKENS)


def test_a_step_takes_less_than_the_cache_holds(folder):
    sizes = choose_sizes(folder, EngineOptions(cache_size_gb=0.001, max_num_batched_tokens=4096), "f16")
    assert sizes.batched_tokens < sizes.cache_tokens


def test_a_model_that_does_not_say_its_shape_has_no_blocks(tmp_path):
    sizes = choose_sizes(tmp_path, EngineOptions(), "u8")
    assert sizes.cache_tokens is None
    assert sizes.cache_bytes > 0


def test_memory_is_measured():
    assert 0 < resident_bytes() < total_bytes()
    assert 0 < available_bytes() <= total_bytes()


def make_request(tokens: Sequence[int] = (1, 2, 3), new: int = 10, **options) -> ScheduledRequest:
    state = RequestState(Request("x"))
    state.begin(GenerationOptions(max_new_tokens=new, **options), tokens, None)
    return ScheduledRequest(state)


def fill(scheduler: Scheduler, rows: list[ScheduledRequest]) -> list[ScheduledRequest]:
    for row in rows:
        scheduler.append(row)
    return scheduler.admit()


def test_rows_run_in_their_order_as_places_get_free():
    scheduler, rows = Scheduler(2), [make_request() for _ in range(4)]
    assert fill(scheduler, rows) == rows[:2]
    assert scheduler.admit() == []
    scheduler.remove(rows[0])
    assert scheduler.admit() == [rows[2]]


def test_a_row_with_several_answers_takes_several_places():
    scheduler = Scheduler(4)
    rows = [make_request(do_sample=True, n=3), make_request(), make_request(num_beams=8), make_request()]
    assert fill(scheduler, rows) == rows[:2]
    scheduler.remove(rows[0])
    scheduler.remove(rows[1])
    assert scheduler.admit() == [rows[2]]


def test_rows_reserve_the_cache_that_they_can_need():
    scheduler = Scheduler(64, cache_tokens=10 * BLOCK_TOKENS)
    rows = [make_request(range(BLOCK_TOKENS), new=2 * BLOCK_TOKENS) for _ in range(5)]
    assert fill(scheduler, rows) == rows[:2]


def test_a_row_that_is_larger_than_the_cache_runs_alone():
    scheduler = Scheduler(64, cache_tokens=BLOCK_TOKENS)
    rows = [make_request(range(100), new=100), make_request()]
    assert fill(scheduler, rows) == rows[:1]


def test_rows_that_share_a_beginning_wait_for_the_first_of_them():
    shared = list(range(SHARED_TOKENS))
    rows = [make_request([*shared, 1, number]) for number in range(3)]
    other = make_request([*range(500, 500 + SHARED_TOKENS), 1])
    scheduler = Scheduler(64)
    assert fill(scheduler, [*rows, other]) == [rows[0], other]
    assert scheduler.admit() == []
    rows[0].state.sequences[0].tokens.append(5)
    assert scheduler.admit() == rows[1:]
    assert fill(Scheduler(64, shares_prefixes=False), [*rows, other]) == [*rows, other]


def test_a_row_that_ends_in_its_first_step_leaves_its_beginning():
    rows = [make_request([*range(SHARED_TOKENS), 1, number]) for number in range(3)]
    scheduler = Scheduler(64)
    assert fill(scheduler, rows) == rows[:1]
    rows[0].state.sequences[0].finish("stop")
    scheduler.remove(rows[0])
    assert scheduler.admit() == rows[1:]


def test_suspects_make_their_first_step_one_at_a_time():
    scheduler, rows = Scheduler(64), [make_request() for _ in range(4)]
    fill(scheduler, rows)
    scheduler.put_back(rows)
    scheduler.quarantine(rows[:2])
    assert scheduler.admit() == [rows[0]]
    assert scheduler.admit() == []
    rows[0].stepped_once = True
    assert scheduler.admit() == [rows[1]]
    scheduler.remove(rows[1])
    assert scheduler.admit() == rows[2:]


def test_a_row_that_must_be_alone_is_alone():
    scheduler, rows = Scheduler(64), [make_request() for _ in range(3)]
    rows[1].runs_alone = True
    assert fill(scheduler, rows) == [rows[0]]
    scheduler.remove(rows[0])
    assert scheduler.admit() == [rows[1]]
    assert scheduler.admit() == []
    scheduler.remove(rows[1])
    assert scheduler.admit() == [rows[2]]


def test_the_work_for_one_waiting_request_does_not_grow_with_the_running_ones():
    """Counts the looks at running requests, which no machine makes slower or faster."""
    looks = []

    class Watched(ScheduledRequest):
        @property
        def reserved_tokens(self):
            looks.append(self)
            return super().reserved_tokens

    def looks_for(running):
        scheduler = Scheduler(running + 64, cache_tokens=10**9)
        for count in (running, 64):
            for number in range(count):
                state = RequestState(Request("x"))
                state.begin(GenerationOptions(max_new_tokens=4), [number], None)
                scheduler.append(Watched(state))
            looks.clear()
            assert len(scheduler.admit()) == count
        return len(looks)

    assert looks_for(1024) == looks_for(1)


def make_group(folder: Path, names: Sequence[str], limit: int | str, used: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, used), strict=True):
        (folder / name).write_text(f"{value}\n")
    return folder / "memory.stat"


@pytest.mark.parametrize(
    ("line", "top", "names", "prefix"),
    [
        ("0::/a/b", "", memory.CGROUP_FILES, ""),
        ("9:cpu,cpuacct:/\n4:memory:/a/b\n0::/", "memory", memory.OLD_CGROUP_FILES, "total_"),
    ],
    ids=["second version", "first version"],
)
def test_the_least_limit_of_all_groups_holds_and_files_that_they_read_are_free(
    tmp_path, monkeypatch, folder, line, top, names, prefix
):
    (tmp_path / "cgroup").write_text(line + "\n")
    monkeypatch.setattr(memory, "CGROUPS_OF_PROCESS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "CGROUP_ROOT", tmp_path)
    machine = total_bytes()
    top = tmp_path / top
    # A container sees its own group as the top one, and the path of the machine outside.
    stat = make_group(top, names, 8 * GIB, 8 * GIB)
    stat.write_text(f"anon 5\n{prefix}inactive_file {GIB}\n{prefix}active_file {GIB // 2}\n")
    assert available_bytes() == 3 * GIB // 2
    # A service of the system has a group below, and the limit may stand at either.
    make_group(top / "a" / "b", names, 2 * GIB, GIB)
    make_group(top / "a", names, "max", GIB)
    assert available_bytes() == GIB
    assert total_bytes() == 2 * GIB
    make_group(top / "a", names, GIB, GIB)
    assert available_bytes() == 0
    assert total_bytes() == GIB < machine
    assert choose_sizes(folder, EngineOptions(), "u8").cache_bytes >= GIB // 4
