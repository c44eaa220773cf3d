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
from prefect_huggingface.tasks.storage.exports.evaluator import Seq2SeqSource, compare
from prefect_huggingface.tasks.storage.exports.exporter import log_softmax
from support.export_requests import LoggedExport

PROMPTS = ["The capital of France is", "One, two, three,", "What is the number 42 in French?"]


class Candidate:
    """A model that is the source itself, with the logits changed by a factor."""

    def __init__(self, logits: np.ndarray, factor: float) -> None:
        self._logits = logits
        self._factor = factor

    def logits(self, tokens: list[int], answer: list[int]) -> np.ndarray:
        return self._logits * self._factor

    def answer(self, prompts: list[list[int]]) -> list[list[int]]:
        return [[3, 4] for _ in prompts]


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


def test_an_encoder_decoder_model_reads_each_prompt_as_if_it_were_alone(tiny_llama: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoTokenizer, BartConfig, BartForConditionalGeneration

    # Its encoder counts positions from the left, those of what is filled in too.
    sizes = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_layers": 2, "decoder_layers": 2}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    torch.manual_seed(0)
    BartForConditionalGeneration(BartConfig(vocab_size=99, init_std=0.5, **sizes, **heads)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path)
    settings = {"source": str(tmp_path), "dtype": "float32", "trust_remote_code": False, "max_new_tokens": 6}
    source, prompts = Seq2SeqSource(settings), [[5, 6, 7], [8, 9], [5, 6, 7, 8, 9, 10], [13, 14]]
    found = dict(source.answer_all(prompts))
    for index, prompt in enumerate(prompts):
        answer, logits = found[index]
        with torch.inference_mode():
            alone = source.model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([answer[:-1]]))
        assert np.allclose(logits, alone.logits[0].numpy(), atol=1e-4)


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
