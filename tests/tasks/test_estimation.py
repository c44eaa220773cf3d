"""An estimate of a batch is near the truth, also where the rows are sorted by their length."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prefect_huggingface.blocks import LocalModel
from prefect_huggingface.tasks.batching.job import BatchOptions, describe_models, plan_job
from prefect_huggingface.tasks.errors import BatchCancelledError
from prefect_huggingface.tasks.estimation import describe_estimate, measure_batch, measure_job

ROWS = 2000


def test_a_measurement_that_is_stopped_says_so(tmp_path: Path, bundled_model: Path) -> None:
    source, model = tmp_path / "in.jsonl", LocalModel(model_id=str(bundled_model))
    source.write_text('{"number": 1}\n' * 1000)
    more, job = BatchOptions(), plan_job(str(source), "{number}")
    with pytest.raises(BatchCancelledError, match="while it was measured"):
        measure_job(describe_models(job, [model]), [model], more, should_stop=lambda: True)


def test_rows_that_cannot_be_asked_take_no_time(tmp_path: Path, bundled_model: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"number": null}\n' * 1000)
    estimate = measure_batch(LocalModel(model_id=str(bundled_model)), str(source), "{number}")
    assert estimate.seconds < 60
    assert (estimate.prompt_tokens, estimate.generated_tokens) == (0, 0)


# Also where the time is up at once: those that end first are the shortest, and no measure of all.
@pytest.mark.parametrize(("seconds", "measured"), [(60.0, 256), (0.0, 64)])
def test_tokens_of_rows_of_mixed_lengths(tmp_path: Path, bundled_model: Path, seconds: float, measured: int) -> None:
    source = tmp_path / "in.jsonl"
    # Row by row longer, so that the first rows would tell little.
    lengths = [1 + 15 * row // ROWS for row in range(ROWS)]
    lines = [{"number": row, "max_new_tokens": length} for row, length in enumerate(lengths)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    model = LocalModel(model_id=str(bundled_model), options={"ignore_eos": True})
    more = BatchOptions(option_columns=["max_new_tokens"], max_concurrency=64)
    prompt = "What is the number {number} in French?"
    estimate = measure_batch(model, str(source), prompt, more=more, max_seconds=seconds)

    assert (estimate.rows, estimate.measured_rows) == (ROWS, measured)
    assert estimate.generated_tokens == pytest.approx(sum(lengths), rel=0.25)
    assert estimate.prompt_tokens > 5 * ROWS
    assert estimate.seconds > 0
    assert estimate.disk_bytes > source.stat().st_size
    assert f"2,000, of which {measured} were measured" in describe_estimate(estimate)
