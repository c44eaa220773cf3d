"""The quality of an export: numbers that are right, a gate that holds, a table and a plot that stay."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from prefect import flow
from prefect.artifacts import Artifact

from prefect_huggingface.blocks import LocalModel
from prefect_huggingface.tasks.errors import PlanError, QualityError
from prefect_huggingface.tasks.evaluation import compare_export, compare_formats
from prefect_huggingface.tasks.quality import ExportQuality, FormatQuality, quality_rows
from prefect_huggingface.tasks.storage.exports.evaluator import compare, log_softmax
from support.export_requests import LoggedExport

PROMPTS = ["The capital of France is", "One, two, three,", "What is the number 42 in French?"]


class Candidate:
    """A model that is the source itself, with the logits changed by a factor."""

    def __init__(self, logits: np.ndarray, factor: float) -> None:
        self._logits = logits
        self._factor = factor

    def logits(self, tokens: list[int], answer: list[int]) -> np.ndarray:
        return self._logits * self._factor

    def answer_tokens(self, tokens: list[int]) -> list[int]:
        return [3, 4]


@pytest.fixture
def expected(tmp_path: Path) -> tuple[np.ndarray, list[dict[str, object]]]:
    logits = np.random.default_rng(0).normal(size=(5, 11)).astype(np.float32)
    np.save(tmp_path / "0.npy", log_softmax(logits))
    entry = {"tokens": [0, 1, 2], "answer": [3, 4], "place": str(tmp_path / "0.npy"), "targets": [1, 2, 3, 4, 5]}
    return logits, [entry]


def test_the_same_model_agrees_wholly(expected: tuple[np.ndarray, list[dict[str, object]]]) -> None:
    logits, entries = expected
    found = compare(Candidate(logits, 1.0), entries, [])
    assert found["agreement"] == found["exact_matches"] == 1.0
    assert found["positions"] == 5
    assert found["divergence"] == pytest.approx(0.0, abs=1e-6)
    assert found["perplexity_ratio"] == pytest.approx(1.0, abs=1e-5)


def test_the_divergence_is_that_of_the_definition(expected: tuple[np.ndarray, list[dict[str, object]]]) -> None:
    logits, entries = expected
    found = compare(Candidate(logits, 0.5), entries, [])
    source = np.exp(logits.astype(np.float64))
    source /= source.sum(-1, keepdims=True)
    other = np.exp(0.5 * logits.astype(np.float64))
    other /= other.sum(-1, keepdims=True)
    assert found["divergence"] == pytest.approx((source * np.log(source / other)).sum(-1).mean(), rel=1e-4)
    rows, targets = np.arange(5), np.array([1, 2, 3, 4, 5])
    ratio = np.exp(np.log(source[rows, targets] / other[rows, targets]).mean())
    assert found["perplexity_ratio"] == pytest.approx(ratio, rel=1e-4)
    assert found["agreement"] == 1.0


def test_exports_are_compared_with_their_source(logged_export: LoggedExport) -> None:
    model = logged_export.model

    @flow
    def compare_both() -> ExportQuality:
        return compare_export(model, PROMPTS, formats=["int8", "int4"])

    quality = compare_both()
    eight, four = quality.formats
    assert quality.prompts == len(PROMPTS)
    assert quality.agreement == eight.agreement > 0.8
    assert 0.0 <= eight.divergence < four.divergence < 0.1
    assert 0.9 < eight.perplexity_ratio < 1.1
    assert four.agreement > 0.3
    assert eight.size_bytes > four.size_bytes > 0
    assert eight.tokens_per_second > 0
    assert quality.source_tokens_per_second > 0
    assert Artifact.get("export-quality-tiny-llama") is not None

    started = time.monotonic()
    passed = compare_formats(model, PROMPTS, formats=["int8", "int4"], min_agreement=0.1)
    assert time.monotonic() - started < 2.0, "the comparison was made again"
    assert passed == quality
    with pytest.raises(QualityError, match=r"in int\d agrees .* less than 99\.9%.*`min_agreement`"):
        compare_formats(model, PROMPTS, formats=["int8", "int4"], min_agreement=0.999)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prompts": []}, "`prompts` must be"),
        ({"prompts": "one text"}, "`prompts` must be"),
        ({"prompts": [""]}, "not empty"),
        ({"formats": []}, "`formats` must be"),
    ],
)
def test_what_cannot_be_compared_is_refused(tiny_llama: Path, settings: dict[str, object], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        compare_formats(LocalModel(model_id=str(tiny_llama)), **settings)


def test_a_torch_model_is_not_compared(tiny_llama: Path) -> None:
    with pytest.raises(PlanError, match="backend 'openvino'"):
        compare_formats(LocalModel(model_id=str(tiny_llama), backend="torch"))


def test_the_table_shows_every_format() -> None:
    entries = tuple(
        FormatQuality(name, "k", agreement, 0.01, 1.02, 0.5, 100, speed, size)
        for name, agreement, speed, size in [("int8", 0.99, 20.0, 10**8), ("int4", 0.8, 30.0, 6 * 10**7)]
    )
    quality = ExportQuality("org/<b>", "c" * 40, 3, 5.0, 4 * 10**8, entries)
    assert [row["format"] for row in quality_rows(quality)] == ["source (torch)", "int8", "int4"]
    assert ExportQuality.from_dict(quality.as_dict()) == quality
