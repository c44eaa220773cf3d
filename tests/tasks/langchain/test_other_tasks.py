"""The tasks that Transformers 5 has no pipelines for any more, and images, behind the same class."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from langchain_core.messages import HumanMessage

from prefect_huggingface.tasks.errors import GenerationError, SettingsError
from prefect_huggingface.tasks.langchain import ChatHuggingFace, HuggingFacePipeline
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


def test_images_in_messages_and_beside_prompts(session_folder: Path) -> None:
    pytest.importorskip("PIL", reason="the extra `vision` is not installed")
    from support.tiny_vision_model import draw_image, make_tiny_llava

    folder = make_tiny_llava(session_folder / "models" / "langchain-llava")
    pictures = [draw_image(session_folder / f"langchain picture {seed}.png", seed) for seed in range(2)]
    llm = HuggingFacePipeline.from_model_id(
        str(folder), "image-text-to-text", device=-1, pipeline_kwargs={"max_new_tokens": 12}
    )
    chat = ChatHuggingFace(llm=llm)

    def ask(picture: Path) -> str:
        image = {"type": "image_url", "image_url": {"url": str(picture)}}
        return str(chat.invoke([HumanMessage([image, {"type": "text", "text": "What is this?"}])]).content)

    answers = [ask(picture) for picture in pictures]
    assert answers[0] != answers[1]
    assert [llm.invoke("What is this?", images=[str(picture)]) for picture in pictures] == answers
    encoded = base64.b64encode(pictures[0].read_bytes()).decode()
    image = {"type": "image", "base64": encoded, "mime_type": "image/png"}
    assert chat.invoke([HumanMessage([image, {"type": "text", "text": "What is this?"}])]).content == answers[0]
    with pytest.raises(GenerationError):
        ask(session_folder / "no such picture.png")
