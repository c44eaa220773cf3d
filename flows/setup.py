"""The flow that saves the blocks and variables to begin with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast
from urllib.parse import urlsplit

from prefect.blocks.core import Block
from prefect.logging import get_run_logger
from prefect.variables import Variable
from pydantic import SecretStr

from prefect_huggingface.blocks import (
    GenerationOptions,
    HuggingFaceCredentials,
    InferenceEndpoint,
    LocalModel,
    ModelStore,
)
from prefect_huggingface.flows.forms import form_flow, titled

B = TypeVar("B", bound=Block)

NAME = "default"
QUESTIONS = "hugging_face_questions"
ANSWERS = "hugging_face_answers"
EXAMPLES: dict[str, dict[str, Any]] = {
    "example-torch": {"backend": "torch"},
    "example-int8": {"weight_format": "int8"},
    "example-int4": {"weight_format": "int4"},
}


@form_flow(name="save-default-blocks")
def save_default_blocks(
    model: Annotated[str, titled("Model")],
    questions: Annotated[str, titled("Sample questions")],
    answers: Annotated[str, titled("Output file")],
    server: Annotated[str, titled("Address of the model server")] = "http://127.0.0.1:8000/v1",
    overwrite: Annotated[bool, titled("Overwrite what is there")] = False,
    example_model: Annotated[str | None, titled("Model of the examples")] = None,
) -> dict[str, bool]:
    """Save the default blocks, and the variables that the deployments use.

    What is there already stays as it is, since a person may have changed it. A token is taken from HF_TOKEN if it is
    set where this runs, and is stored encrypted by the Prefect server.

    Args:
        model: Folder or Hub id of the model of the block 'default'.
        questions: File with a column 'question' for the nightly batch.
        answers: Output file of the nightly batch, with a date in its name such as 'answers-{date}.jsonl'.
        server: Address of the model server, for the endpoint 'default'.
        overwrite: Replace blocks and variables that are there, with the changes that somebody made to them. A saved
            token is replaced by another one only.
        example_model: Model of the blocks 'example-torch', 'example-int8' and 'example-int4', for a first comparison.

    Returns:
        Whether each was saved, by its name. What was not was there already.
    """
    token = SecretStr(os.environ["HF_TOKEN"]) if os.environ.get("HF_TOKEN") else None
    saved = {
        # A saved token is never replaced by none.
        "credentials": _save(HuggingFaceCredentials(token=token), overwrite and token is not None),
        "store": _save(ModelStore(), overwrite),
    }
    block = LocalModel(
        model_id=model,
        options=GenerationOptions(max_new_tokens=64),
        credentials=_load(HuggingFaceCredentials),
        store=_load(ModelStore),
    )
    saved["model"] = _save(block, overwrite)
    for name, settings in EXAMPLES.items() if example_model else ():
        example = LocalModel(model_id=str(example_model), options=block.options, store=block.store, **settings)
        saved[f"model {name}"] = _save(example, overwrite, name)
    endpoint = InferenceEndpoint(url=server, model_id=NAME, options=block.options)
    saved["endpoint"] = _save(endpoint, overwrite or _has_moved(endpoint))
    saved[QUESTIONS] = _set(QUESTIONS, questions, overwrite)
    saved[ANSWERS] = _set(ANSWERS, answers, overwrite)
    _warn_of_missing_places()
    return saved


def _save(block: Block, overwrite: bool, name: str = NAME) -> bool:
    kind = type(block)._block_type_name
    try:
        block.save(name, overwrite=overwrite)
    except ValueError:
        get_run_logger().info("The %s block %r is there already, it stays as it is.", kind, name)
        return False
    get_run_logger().info("Saved the %s block %r.", kind, name)
    return True


def _has_moved(endpoint: InferenceEndpoint) -> bool:
    """Return whether the saved endpoint is a model server of this machine that now has another port."""
    try:
        saved = urlsplit(_load(InferenceEndpoint).base_url)
    except ValueError:
        return False
    now = urlsplit(endpoint.base_url)
    return saved.hostname == now.hostname == "127.0.0.1" and saved.port != now.port


def _load(kind: type[B]) -> B:
    return cast(B, kind.load(NAME))


def _set(name: str, value: str, overwrite: bool) -> bool:
    try:
        Variable.set(name, value, overwrite=overwrite)
    except ValueError:
        get_run_logger().info("The variable %r is there already, it stays as it is.", name)
        return False
    get_run_logger().info("Set the variable %r to %s.", name, value)
    return True


def _warn_of_missing_places() -> None:
    """Say what refers to a place that is gone, a clone that was moved for instance."""
    places = {"the model block": _load(LocalModel).model_id, f"the variable {QUESTIONS!r}": Variable.get(QUESTIONS)}
    remedy = "Correct it in the UI, or with `make blocks OVERWRITE=1`."
    for what, place in places.items():
        if isinstance(place, str) and os.path.isabs(place) and not Path(place).exists():
            get_run_logger().warning("%s is not there, but %s names it. %s", place, what, remedy)
