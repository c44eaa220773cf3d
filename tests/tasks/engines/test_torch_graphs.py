"""Slots of fixed memory say the same as the dense batch: here without a GPU, so that nothing is recorded."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prefect_huggingface.blocks import EngineOptions, GenerationOptions, LocalModel
from prefect_huggingface.tasks.engines.torch_batch import DenseBatch
from prefect_huggingface.tasks.engines.torch_engine import TorchTextEngine
from prefect_huggingface.tasks.engines.torch_graphs import EXACT_GAP, LEAST_COLUMNS, GraphBatch, bucket, make_batch
from prefect_huggingface.tasks.records import Request
from support.export_models import make_model
from support.tiny_models import SAMPLE_TEXTS

# Windows of 8 tokens, alone and beside layers without one; positions that are learned; tables that are shared.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen3": {}, "gemma3": {}, "gemma2": {}, "mistral": {"sliding_window": 8}, "gpt2": {},
}  # fmt: skip
PROMPTS = [text[start : start + 12 + 5 * start] for text in SAMPLE_TEXTS for start in range(7)]
REQUESTS = [
    Request(prompt, id=index, options=GenerationOptions(max_new_tokens=4 + index % 5 * 9, ignore_eos=True))
    for index, prompt in enumerate(PROMPTS)
]


def load(folder: Path, **settings: Any) -> TorchTextEngine:
    model = LocalModel(
        model_id=str(folder), backend="torch", dtype="float32", device="cpu", chat_template="never", **settings
    )
    return TorchTextEngine(folder, model)


def in_slots(engine: TorchTextEngine) -> TorchTextEngine:
    engine._batch = GraphBatch(engine._model, engine._sizes)
    return engine


def texts(engine: TorchTextEngine, requests: list[Request], in_flight: int | None = None) -> list[str]:
    completions = sorted(engine.generate(requests, in_flight), key=lambda completion: completion.request_id)
    assert all(completion.error is None for completion in completions)
    return [completion.text for completion in completions]


@pytest.fixture(scope="module", params=FAMILIES)
def engines(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[tuple[TorchTextEngine, ...]]:
    """An engine with the dense batch, and one with slots."""
    folder = make_model(tmp_path_factory.mktemp("graphs") / request.param, request.param, **FAMILIES[request.param])
    with load(folder) as dense, in_slots(load(folder)) as slots:
        yield dense, slots


@pytest.mark.parametrize("in_flight", [1, 3, 64])
def test_requests_that_come_and_go_say_the_same_in_slots(engines: tuple[TorchTextEngine, ...], in_flight: int) -> None:
    dense, slots = engines
    assert texts(slots, REQUESTS, in_flight) == texts(dense, REQUESTS, in_flight)
    slots.check_integrity()


def test_a_request_that_is_cancelled_leaves_its_slot_to_another(tiny_llama: Path) -> None:
    options = GenerationOptions(max_new_tokens=200, ignore_eos=True)
    requests = [Request(prompt, id=index, options=options) for index, prompt in enumerate(PROMPTS[:4])]
    with load(tiny_llama) as dense, in_slots(load(tiny_llama)) as slots:
        expected, begun = texts(dense, requests), threading.Event()
        first = slots.submit(requests[0], on_text=lambda _: begun.set())
        others = [slots.submit(request) for request in requests[1:]]
        assert begun.wait(30)
        first.cancel()
        assert [other.result(60).text for other in others] == expected[1:]
        assert texts(slots, requests) == expected


def test_a_model_passes_its_check(engines: tuple[TorchTextEngine, ...]) -> None:
    assert GraphBatch(engines[1]._model, engines[1]._sizes).check() < EXACT_GAP


def test_a_window_that_nobody_sees_fails_the_check(tmp_path: Path) -> None:
    with load(make_model(tmp_path / "mistral", "mistral", sliding_window=8)) as engine:
        batch = GraphBatch(engine._model, engine._sizes)
        batch._window = None
        assert batch.check() > 10 * EXACT_GAP


def test_slots_grow_with_rows_and_columns_and_shrink_where_the_memory_ends(tiny_llama: Path) -> None:
    long = Request(" ".join(SAMPLE_TEXTS * 3)[:600], id=0, options=GenerationOptions(max_new_tokens=8))
    with load(tiny_llama) as dense, in_slots(load(tiny_llama)) as slots:
        batch = slots._batch
        for requests in ([long], REQUESTS[:5], [long], REQUESTS):
            assert texts(slots, requests) == texts(dense, requests)
        assert batch._slots.layers[0].keys.shape[0] == 32
        assert batch._slots.layers[0].keys.shape[2] > LEAST_COLUMNS
        slots._sizes.cache_bytes = 32 * LEAST_COLUMNS * batch.bytes_per_token
        batch.clear()
        for requests in ([long], REQUESTS):
            assert texts(slots, requests) == texts(dense, requests)
        assert batch._slots.layers[0].keys.shape[2] == LEAST_COLUMNS


def test_what_there_must_be_room_for_is_never_less_than_what_is_allocated(tiny_llama: Path) -> None:
    with in_slots(load(tiny_llama, engine=EngineOptions(max_num_seqs=6))) as slots:
        assert len(texts(slots, REQUESTS)) == len(REQUESTS)
        rows, _, columns, _ = slots._batch._slots.layers[0].keys.shape
        assert rows * columns <= slots._batch.tokens_for(6, LEAST_COLUMNS)
    assert [bucket(number, step=32) for number in (1, 3, 32, 33, 97)] == [1, 4, 32, 64, 128]
    assert [bucket(number, 128) for number in (1, 128, 129, 700)] == [128, 128, 256, 1024]


def test_only_a_gpu_has_slots(tiny_llama: Path) -> None:
    with load(tiny_llama) as engine:
        assert type(make_batch(engine._model, engine._sizes)) is DenseBatch
