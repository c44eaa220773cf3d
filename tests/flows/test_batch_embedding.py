"""Vectors and scores of tables: the flows from the input to their columns, and lines of OpenAI's batch format."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import csv

from prefect_huggingface.blocks import GenerationOptions, LocalModel
from prefect_huggingface.flows import batch_embedding, batch_inference, batch_rerank
from prefect_huggingface.tasks import embed_texts, plan_batch, rerank_texts
from prefect_huggingface.tasks.errors import BatchError
from prefect_huggingface.tasks.estimation import measure_batch
from prefect_huggingface.tasks.storage.tables.inputs import inspect_table, read_chunks
from support.batch_runs import read_answers, start_batch
from support.flow_logs import read_artifacts
from support.prefect_services import wait_until
from support.vector_models import TEXTS, make_embedder, make_ranker

pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.fixture(scope="module")
def model(session_folder: Path) -> LocalModel:
    folder = make_embedder(session_folder / "batches" / "embedder", "xlm-roberta")
    return LocalModel(model_id=str(folder), task="feature-extraction", backend="torch", dtype="float32")


@pytest.fixture(scope="module")
def reranker(session_folder: Path) -> LocalModel:
    folder = make_ranker(session_folder / "batches" / "reranker", "bge-reranker")
    return LocalModel(model_id=str(folder), task="text-ranking", backend="torch", dtype="float32")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    rows: list[dict[str, Any]] = [{"id": number, "text": text} for number, text in enumerate(TEXTS)]
    rows += [{"id": 6, "text": None}, {"id": 7, "text": TEXTS[0]}, {"id": 8, "text": "One, two. " * 90}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_vectors_stand_beside_the_rows(tmp_path: Path, source: Path, model: LocalModel) -> None:
    destination = tmp_path / "out.parquet"

    summary = batch_embedding(model, str(source), str(destination), "{text}", show_progress=False)

    table = pq.read_table(destination)
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 64)
    assert table["id"].to_pylist() == list(range(9))
    assert table["status"].to_pylist() == ["ok"] * 6 + ["missing_value", "ok", "too_long"]
    assert [value is None for value in table["embedding"].to_pylist()] == [
        status != "ok" for status in table["status"].to_pylist()
    ]
    expected = embed_texts.fn(model, [*TEXTS, TEXTS[0]])
    found = np.array([value for value in table["embedding"].to_pylist() if value is not None])
    assert np.allclose(found, expected.vectors, atol=1e-6)
    assert table["prompt_tokens"].to_pylist()[:6] == list(expected.tokens[:6])
    assert (summary.rows, summary.succeeded, summary.failed, summary.shared) == (9, 7, 2, 1)


@pytest.mark.parametrize("form", ["parquet", "arrow", "jsonl"])
def test_a_table_without_any_vector_is_written(tmp_path: Path, model: LocalModel, form: str) -> None:
    source, destination = tmp_path / "in.jsonl", tmp_path / f"out.{form}"
    source.write_text('{"text": null}\n' + json.dumps({"text": "One, two. " * 90}) + "\n")

    summary = batch_embedding(model, str(source), str(destination), "{text}", show_progress=False)

    assert summary.failed == 2
    rows = [row for chunk in read_chunks(inspect_table(str(destination))) for row in chunk.rows]
    assert [row["embedding"] for row in rows] == [None, None]


def test_queries_have_their_prompt_and_long_texts_are_cut(tmp_path: Path, source: Path, model: LocalModel) -> None:
    destination = tmp_path / "out.jsonl"
    options = GenerationOptions(context_overflow="truncate_right")

    batch_embedding(model, str(source), str(destination), "{text}", "query", options, show_progress=False)

    rows = [json.loads(line) for line in destination.read_text().splitlines()]
    assert [row["status"] for row in rows] == ["ok"] * 6 + ["missing_value", "ok", "ok"]
    expected = embed_texts.fn(model, TEXTS, input_type="query").vectors
    assert np.allclose([row["embedding"] for row in rows[:6]], expected, atol=1e-6)


def test_a_model_and_an_output_that_do_not_fit_are_refused(tmp_path: Path, source: Path, model: LocalModel) -> None:
    with pytest.raises(BatchError, match="batch_embedding"):
        batch_inference(model, str(source), str(tmp_path / "out.jsonl"), "{text}", show_progress=False)
    with pytest.raises(BatchError, match=".parquet"):
        batch_embedding(model, str(source), str(tmp_path / "out.csv"), "{text}", show_progress=False)
    other = model.model_copy(update={"task": "text-generation"})
    with pytest.raises(BatchError, match="feature-extraction"):
        batch_embedding(other, str(source), str(tmp_path / "out.parquet"), "{text}", show_progress=False)


def test_lines_of_the_openai_format_are_embedded(tmp_path: Path, model: LocalModel) -> None:
    source, destination = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    bodies = [{"input": TEXTS[0]}, {"input": TEXTS[1], "dimensions": 8, "encoding_format": "base64"}, {"input": " "}]
    lines = [
        {"custom_id": str(number), "method": "POST", "url": "/v1/embeddings", "body": {"model": "m", **body}}
        for number, body in enumerate(bodies)
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))

    batch_inference(model, str(source), str(destination), served_names=["m"], show_progress=False)

    answers = [json.loads(line)["response"] for line in destination.read_text().splitlines()]
    vector = embed_texts.fn(model, TEXTS[:1]).vectors[0]
    assert np.allclose(answers[0]["body"]["data"][0]["embedding"], vector, atol=1e-6)
    assert isinstance(answers[1]["body"]["data"][0]["embedding"], str)
    assert answers[0]["body"]["usage"]["prompt_tokens"] > 0
    [error] = (tmp_path / "out.errors.jsonl").read_text().splitlines()
    assert json.loads(error)["response"]["status_code"] == 400


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_scores_stand_beside_the_rows(tmp_path: Path, source: Path, reranker: LocalModel, form: str) -> None:
    destination = tmp_path / f"out.{form}"

    state = batch_rerank(
        reranker, str(source), str(destination), "Row?", "{text}", show_progress=False, return_state=True
    )

    summary = state.result()
    table = pq.read_table(destination) if form == "parquet" else csv.read_csv(destination)
    assert table["status"].to_pylist() == ["ok"] * 6 + ["missing_value", "ok", "too_long"]
    expected = [score.score for score in rerank_texts.fn(reranker, "Row?", [*TEXTS, TEXTS[0]])]
    scores = table["score"].to_pylist()
    assert [score is None for score in scores] == [status != "ok" for status in table["status"].to_pylist()]
    assert np.allclose([score for score in scores if score is not None], expected, atol=1e-6)
    assert len(set(scores[:6])) == 6
    artifacts = read_artifacts(state.state_details.flow_run_id)
    assert '"score": ' in str(artifacts["batch-samples"].data)
    assert "completion" not in str(artifacts["batch-samples"].data)
    assert "Lengths of the answers" not in str(artifacts["batch-summary"].data)
    assert (summary.rows, summary.succeeded, summary.failed, summary.shared) == (9, 7, 2, 1)


def test_pairs_are_the_same_only_with_the_same_query(tmp_path: Path, reranker: LocalModel) -> None:
    source, destination = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    pairs = [("One?", "Two"), ("Two?", "Two"), ("One?", "Two"), ("a\0b", "c"), ("a", "b\0c")]
    rows = [json.dumps({"asked": query, "answer": text}) + "\n" for query, text in pairs]
    source.write_text("".join(rows))

    summary = batch_rerank(reranker, str(source), str(destination), "{asked}", "{answer}", show_progress=False)

    found = [json.loads(line)["score"] for line in destination.read_text().splitlines()]
    assert found[0] == found[2] != found[1]
    assert summary.shared == 1


def test_a_batch_of_scores_that_cannot_be_is_refused(
    tmp_path: Path, source: Path, model: LocalModel, reranker: LocalModel
) -> None:
    out = str(tmp_path / "out.csv")
    with pytest.raises(BatchError, match="text-ranking"):
        batch_rerank(model, str(source), out, "One?", "{text}", show_progress=False)
    with pytest.raises(BatchError, match="batch_rerank"):
        batch_inference(reranker, str(source), out, "{text}", show_progress=False)
    with pytest.raises(BatchError, match="`system`"):
        plan_batch.fn(reranker, str(source), out, "One?", system="Be short.", pair="{text}")
    with pytest.raises(BatchError, match="no column 'body'"):
        batch_rerank(reranker, str(source), out, "{text}", "{body}", show_progress=False)


def test_estimates_of_vectors_and_scores(tmp_path: Path, source: Path, model: LocalModel, reranker: LocalModel) -> None:
    state = batch_embedding(
        model, str(source), str(tmp_path / "a.parquet"), "{text}", estimate=True, show_progress=False, return_state=True
    )
    tokens = sum(pq.read_table(tmp_path / "a.parquet")["prompt_tokens"].to_pylist())
    artifact = str(read_artifacts(state.state_details.flow_run_id)["batch-estimate"].data)
    assert f"| Prompt tokens | {tokens} |" in artifact
    assert "9, of which 9 were measured" in artifact

    batch_rerank(reranker, str(source), str(tmp_path / "b.parquet"), "Row?", "{text}", show_progress=False)
    tokens = sum(pq.read_table(tmp_path / "b.parquet")["prompt_tokens"].to_pylist())
    estimate = measure_batch(reranker, str(source), "Row?", pair="{text}")
    assert (estimate.prompt_tokens, estimate.generated_tokens) == (tokens, 0)
    assert estimate.seconds > 0


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, model: LocalModel) -> None:
    source = tmp_path / "in.jsonl"
    rows = [{"id": number, "text": f"{number} {TEXTS[number % 6]}"} for number in range(20_000)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings: dict[str, Any] = {"source": str(source), "text": "{text}", "flow": "batch_embedding"}
    fields = model.model_dump(mode="json", exclude_unset=True, exclude={"block_type_slug"})
    whole, killed = tmp_path / "whole.parquet", tmp_path / "killed.parquet"

    first = start_batch(tmp_path, 1, fields, destination=str(killed), **settings)
    segments = Path(f"{killed}.journal") / "segments"
    wait_until(lambda: segments.is_dir() and len(list(segments.iterdir())) > 2, 240, "finished rows")
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not killed.exists()
    assert start_batch(tmp_path, 2, fields, destination=str(killed), **settings).wait(280) == 0
    batch_embedding(model, str(source), str(whole), "{text}", show_progress=False)

    assert 0 < len(read_answers(tmp_path, 2)) < len(rows)
    one, other = pq.read_table(killed), pq.read_table(whole)
    assert one["id"].to_pylist() == other["id"].to_pylist()
    assert np.allclose(one["embedding"].to_pylist(), other["embedding"].to_pylist(), atol=1e-5)
