"""Models whose positions change at a border (longrope): a text depends on its own prompt alone, on both sides of it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from prefect_huggingface.blocks import EngineOptions, GenerationOptions
from prefect_huggingface.tasks import unload_engines
from prefect_huggingface.tasks.engines.torch_engine import TorchTextEngine
from prefect_huggingface.tasks.records import Completion, Request
from support.engine_families import Family, family_model
from support.export_models import make_model
from support.tiny_models import SAMPLE_TEXTS

BORDER = 64
LONGEST = 256
WORDS = " ".join(SAMPLE_TEXTS).split()
# Prompts that stay below the border, come to it while they are answered, and are past it from the start. Some begin
# alike, so that a prefix cache has something to share across the border.
BEGINNING = " ".join(WORDS[:8])


def prompts() -> list[str]:
    choose = random.Random(5)
    made = []
    for words in (1, 3, 6, 10, 14, 18, 24, 32, 40):
        made.append(" ".join(choose.choices(WORDS, k=words)))
        made.append(f"{BEGINNING} {' '.join(choose.choices(WORDS, k=words))}")
    return made


PROMPTS = prompts()


@pytest.fixture(scope="session")
def tiny_longrope(session_folder: Path) -> Path:
    """Checkpoint folder of a random Phi-3 with longrope."""
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8,
        "long_factor": [1.0 + 2 * step for step in range(8)], "original_max_position_embeddings": BORDER,
    }  # fmt: skip
    return make_model(
        session_folder / "models" / "tiny-longrope", "phi3", max_position_embeddings=LONGEST,
        original_max_position_embeddings=BORDER, rope_parameters=rope, pad_token_id=2,
    )  # fmt: skip


@pytest.fixture(scope="session")
def tiny_longrope_openvino(tiny_longrope: Path) -> Path:
    """OpenVINO folder of the same model, with its weights in full precision."""
    from prefect_huggingface.tasks.storage.exports.store import get_export

    return get_export(family_model("openvino-text", tiny_longrope)).path


@pytest.fixture(params=["torch-text", "openvino-text"])
def longrope(request: pytest.FixtureRequest) -> Family:
    """The model on each backend. Its engine is closed after the test."""
    name = "tiny_longrope" if request.param == "torch-text" else "tiny_longrope_openvino"
    yield Family(request.param, family_model(request.param, request.getfixturevalue(name)))
    unload_engines()


def meaning(completion: Completion) -> tuple[object, ...]:
    """Return the text, or the kind of the error that says that the border cannot be crossed."""
    if completion.error_code is not None:
        assert completion.error_code in ("too_long", "invalid_option"), completion
        assert str(BORDER) in completion.error
    return completion.text, completion.error_code, completion.finish_reason, completion.generated_tokens


ALONE: dict[tuple[str, str], list[tuple[object, ...]]] = {}


def alone(family: Family, **options) -> list[tuple[object, ...]]:
    """Return what each prompt comes to when nothing runs beside it and nothing ran before it with its beginning."""
    key = (family.name, str(options))
    if key not in ALONE:
        unshared = family.with_settings(engine=EngineOptions(max_num_seqs=1, enable_prefix_caching=False))
        ALONE[key] = [meaning(unshared.ask(prompt, **options)) for prompt in PROMPTS]
    return ALONE[key]


def test_the_border_is_within_the_prompts(longrope):
    lengths = [longrope.ask(prompt, max_new_tokens=1).prompt_tokens for prompt in PROMPTS]
    assert min(lengths) + 24 < BORDER < max(lengths)
    assert any(length < BORDER < length + 24 for length in lengths)


ORDERS = ["shuffled", *(pytest.param(order, marks=pytest.mark.slow) for order in ("as they are", "reversed"))]


@pytest.mark.parametrize("order", ORDERS)
def test_a_text_does_not_depend_on_the_rows_beside_it_or_on_the_prefix_cache(longrope, order):
    options = {"max_new_tokens": 24, "ignore_eos": True}
    expected = alone(longrope, **options)
    rows = {"as they are": list(range(len(PROMPTS))), "reversed": list(range(len(PROMPTS)))[::-1],
            "shuffled": random.Random(2).sample(range(len(PROMPTS)), len(PROMPTS))}[order]  # fmt: skip
    for _ in range(2):
        futures = [longrope.submit(PROMPTS[row], **options) for row in rows]
        assert [meaning(future.result(120)) for future in futures] == [expected[row] for row in rows]


def test_both_backends_give_the_same_text(tiny_longrope, tiny_longrope_openvino):
    openvino = Family("openvino-text", family_model("openvino-text", tiny_longrope_openvino))
    torch = Family("torch-text", family_model("torch-text", tiny_longrope))
    options = {"max_new_tokens": 24, "ignore_eos": True}
    for mine, other in zip(alone(openvino, **options), alone(torch, **options), strict=True):
        # A backend may refuse to cross the border where the other can.
        assert mine == other or None not in (mine[1], other[1]) or (mine[1] or other[1])


def test_beams_on_both_sides_of_the_border_stay_apart(longrope):
    options = {"max_new_tokens": 24, "num_beams": 3}
    expected = alone(longrope, **options)
    futures = [longrope.submit(prompt, **options) for prompt in PROMPTS]
    assert [meaning(future.result(120)) for future in futures] == expected


def test_groups_that_cannot_be_joined_end_one_by_one(tiny_longrope: Path) -> None:
    engine = TorchTextEngine(tiny_longrope, family_model("torch-text", tiny_longrope))
    left: list[int] = []
    options = GenerationOptions(max_new_tokens=24, ignore_eos=True)
    with engine:
        count = 3 * engine.in_flight
        futures = [engine.submit(Request("One, two,", options=options)) for _ in range(count)]
        # In the thread of the engine, when the first request is completed.
        futures[0].add_done_callback(lambda _: left.append(sum(not future.done() for future in futures)))
        assert all(future.result(120).error is None for future in futures)
    assert left[0] > engine.in_flight, "all groups were done before the first was completed"
