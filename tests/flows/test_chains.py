from __future__ import annotations

import pytest

from prefect_huggingface.blocks import GenerationOptions, LocalModel
from prefect_huggingface.flows import prompt_chain
from prefect_huggingface.tasks.errors import ChainError

pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.fixture
def model(bundled_model) -> LocalModel:
    return LocalModel(model_id=str(bundled_model), options=GenerationOptions(max_new_tokens=32))


def test_steps_use_inputs_and_the_fields_of_earlier_outputs(model):
    steps = [
        {"name": "person", "prompt": "Extract the name and the age: {sentence}", "parser": "json"},
        {"name": "french", "prompt": "What is the number {person_age} in french?"},
    ]
    outputs = prompt_chain(model, steps, {"sentence": "Maria is 34 years old."})
    assert list(outputs) == ["person", "french"]
    assert outputs["person"] == {"name": "Maria", "age": 34}
    assert outputs["french"] == "trente-quatre"


def test_a_wrong_chain_fails_before_the_model_is_looked_at(tmp_path):
    nowhere = LocalModel(model_id=str(tmp_path / "nowhere"))
    with pytest.raises(ChainError, match=r"\{city\}.*neither an input nor an earlier step"):
        prompt_chain(nowhere, [{"name": "a", "prompt": "{city}"}], {})


def test_a_failed_step_names_itself(model):
    with pytest.raises(ChainError, match="'first'"):
        prompt_chain(model, [{"name": "first", "prompt": "{text}"}], {"text": " "})


@pytest.mark.parametrize("parser", ["text", "json"])
def test_a_step_that_is_skipped_is_told(model, parser):
    steps = [
        {"name": "first", "prompt": "{text}", "parser": parser, "options": {"context_overflow": "skip"}},
        {"name": "second", "prompt": "{first}"},
    ]
    with pytest.raises(ChainError, match="Step 'first' was not answered: its prompt is too long"):
        prompt_chain(model, steps, {"text": "One, two. " * 2000})


def test_a_step_has_options_of_its_own(model):
    steps = [{"name": "a", "prompt": "What is the number 99 in french?", "options": {"max_new_tokens": 1}}]
    short = prompt_chain(model, steps, {})["a"]
    assert "quatre-vingt-dix-neuf".startswith(short)
    assert len(short) < 21


def test_the_chain_leaves_a_table(model):
    from prefect.artifacts import Artifact

    prompt_chain(model, [{"name": "a", "prompt": "What is the capital of {country}?"}], {"country": "France"})
    artifact = Artifact.get("prompt-chain")
    assert "What is the capital of France?" in str(artifact.data)
    assert "Paris" in str(artifact.data)
