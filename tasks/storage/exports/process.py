"""The making of one export from a snapshot, in a child process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prefect_huggingface.tasks.records import Snapshot
from prefect_huggingface.tasks.storage.exports import exporter
from prefect_huggingface.tasks.storage.exports.child_process import ChildProgram, run_child
from prefect_huggingface.tasks.storage.exports.recipes import Recipe
from prefect_huggingface.tasks.storage.places import link_file

STEPS = {
    "export": "converting the model to OpenVINO",
    "quantize": "quantizing the weights",
    "verify": "loading the export and generating from it",
}


def run_export(snapshot: Snapshot, recipe: Recipe, work: Path, descriptor: int) -> dict[str, Any]:
    """Make an export in a child process, without network and without a token.

    Only where the recipe names a public data set to calibrate with, the process may use the network.

    Args:
        snapshot: Files of the source.
        recipe: Every setting.
        work: Empty folder for everything that the process writes. The export is in its folder `output`.
        descriptor: Open file that the child inherits, so that its lock lives as long as the child.

    Returns:
        What the child reports at its end: `seconds`, `peak_memory_bytes`, `weights`.

    Raises:
        ExportOutOfMemoryError: If the child was killed, most likely for want of memory.
        ExportError: If the child failed.
    """
    dataset = (recipe.quantization or {}).get("dataset")
    program = ChildProgram(
        path=Path(exporter.__file__),
        purpose=f"export of {snapshot.repo_id or str(snapshot.path)!r}",
        steps={step: text for step, text in STEPS.items() if step != "quantize" or recipe.quantization is not None},
        network=isinstance(dataset, str) and dataset != "auto",
    )
    source = link_source(snapshot, recipe, work / "model")
    job = {"source": str(source), "output": str(work / "output"), "recipe": recipe.as_dict()}
    return run_child(program, job, work, descriptor)


def link_source(snapshot: Snapshot, recipe: Recipe, folder: Path) -> Path:
    """Make a folder of links to the files of a snapshot, under a name that says nothing.

    Optimum chooses settings by the name of the folder and by the name in `config.json`. The name in `config.json` is
    that of the repository where the recipe has such settings, and else there is none.
    """
    folder.mkdir()
    for file in snapshot.files:
        target = folder / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        link_file((snapshot.path / file.path).resolve(), target)
    config_path = folder / "config.json"
    if config_path.exists():
        config = json.loads(config_path.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        if (recipe.quantization or {}).get("ignored_scopes"):
            config["_name_or_path"] = snapshot.repo_id
        config_path.unlink()
        config_path.write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folder
