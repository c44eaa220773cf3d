"""The tasks that Transformers 5 has no pipelines for any more, and images, behind the same class."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefect_huggingface.tasks.errors import SettingsError
from prefect_huggingface.tasks.langchain import HuggingFacePipeline
from support.export_models import make_model

TEXTS = ["The capital of France is Paris and the capital of Spain is Madrid.", "One, two, three, four, five."]


@pytest.fixture(scope="module")
def tiny_t5(session_folder: Path) -> Path:
    return make_model(session_folder / "models" / "langchain-t5", "t5")


@pytest.mark.parametrize("task", ["summarization", "translation", "text2text-generation"])
@pytest.mark.parametrize("backend", ["default", pytest.param("openvino", marks=pytest.mark.slow)])
def test_seq2seq_tasks(tiny_t5: Path, task: str, backend: str) -> None:
    llm = HuggingFacePipeline.from_model_id(
        str(tiny_t5), task, backend, model_kwargs={"max_length": 20, "min_length": 5}, batch_size=2
    )
    texts = llm.batch(TEXTS)
    assert [llm.invoke(text) for text in TEXTS] == texts
    assert "".join(llm.stream(TEXTS[0])) == texts[0]
    info = llm.generate(TEXTS[:1]).generations[0][0].generation_info or {}
    # The total length of these models is that of the answer alone.
    assert 5 <= info["token_usage"]["completion_tokens"] <= 20
    bad, good = llm.batch(["", TEXTS[1]], return_exceptions=True)
    assert isinstance(bad, Exception)
    assert good == texts[1]


def test_a_pipeline_task_that_is_unknown_is_named(tiny_t5: Path) -> None:
    with pytest.raises(SettingsError, match="'question-answering'"):
        HuggingFacePipeline.from_model_id(str(tiny_t5), "question-answering")
