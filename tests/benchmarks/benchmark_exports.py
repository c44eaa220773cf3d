"""What the export store costs over the plain call of Optimum, and what it saves.

Run it by itself, with nothing else on the machine:

    python tests/benchmarks/benchmark_exports.py [--runs 3] [--model smollm2 | FOLDER] [--format int8]

It times the plain call (a process of its own that exports and quantizes with Optimum) and the store side by side, in
turns, and then the second request. Times are wall seconds and CPU seconds; memory is the largest resident memory of the
process that exports.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

PLAIN = """
import json, resource, sys
from pathlib import Path
from optimum.exporters.openvino.__main__ import _main_quantize, main_export
from optimum.intel import OVConfig, OVWeightQuantizationConfig

source, output, settings = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
task = "text-generation-with-past"
config = OVWeightQuantizationConfig(**settings)
main_export(
    source, output, task=task, library_name="transformers", convert_tokenizer=True,
    ov_config=OVConfig(quantization_config=config),
)
_main_quantize(source, task, "transformers", OVWeightQuantizationConfig(**settings), output, None)
print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and its children so far."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def run_plain(source: Path, work: Path, settings: dict[str, Any]) -> tuple[float, float, int]:
    """Return wall seconds, CPU seconds and peak memory (bytes) of the plain call of Optimum."""
    started, cpu = time.perf_counter(), cpu_seconds()
    arguments = [sys.executable, "-c", PLAIN, str(source), str(work / "plain"), json.dumps(settings)]
    result = subprocess.run(arguments, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    seconds, cpu = time.perf_counter() - started, cpu_seconds() - cpu
    if result.returncode != 0:
        raise SystemExit(result.stderr)
    shutil.rmtree(work / "plain")
    return seconds, cpu, int(result.stdout.rsplit("PEAK ", 1)[1])


def run_store(source: Path, work: Path, weight_format: str) -> tuple[float, float, int, float]:
    """Return wall seconds, CPU seconds and peak memory (bytes) of the first request, and seconds of the second."""
    from prefect_huggingface.blocks import LocalModel, ModelStore
    from prefect_huggingface.tasks.storage.exports.store import get_export, read_manifest

    model = LocalModel(model_id=str(source), weight_format=weight_format, store=ModelStore(path=work / "store"))
    started, cpu = time.perf_counter(), cpu_seconds()
    export = get_export(model)
    first, cpu = time.perf_counter() - started, cpu_seconds() - cpu
    manifest = read_manifest(export.path)
    started = time.perf_counter()
    get_export(model)
    second = time.perf_counter() - started
    shutil.rmtree(work / "store")
    return first, cpu, manifest.peak_memory_bytes if manifest else 0, second


def make_source(name: str, work: Path) -> Path:
    """Return the checkpoint to export; make one of random weights if it is not a folder."""
    if Path(name).is_dir():
        return Path(name)
    from support.smollm_models import make_smollm

    return make_smollm(work / "source")


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--format", default="int8", choices=["int8", "int4"])
    options = parser.parse_args()
    from prefect_huggingface.blocks import LocalModel
    from prefect_huggingface.tasks.storage.exports.recipes import resolve_recipe

    recipe = resolve_recipe(LocalModel(model_id="/source", weight_format=options.format), None)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        source = make_source(options.model, work)
        plain, store = [], []
        for _ in range(options.runs):
            plain.append(run_plain(source, work, dict(recipe.quantization or {})))
            store.append(run_store(source, work, options.format))
    print(json.dumps(summarise(plain, store), indent=1))


def summarise(plain: list[tuple[float, float, int]], store: list[tuple[float, float, int, float]]) -> dict[str, float]:
    """Return medians and ratios."""
    plain_seconds, plain_cpu, plain_memory = (statistics.median(column) for column in zip(*plain, strict=True))
    first, cpu, memory, second = (statistics.median(column) for column in zip(*store, strict=True))
    return {
        "plain_seconds": round(plain_seconds, 2),
        "first_request_seconds": round(first, 2),
        "time_ratio": round(first / plain_seconds, 3),
        "plain_cpu_seconds": round(plain_cpu, 2),
        "first_request_cpu_seconds": round(cpu, 2),
        "cpu_ratio": round(cpu / plain_cpu, 3),
        "plain_peak_mb": round(plain_memory / 1e6, 1),
        "store_peak_mb": round(memory / 1e6, 1),
        "memory_ratio": round(memory / plain_memory, 3),
        "second_request_ms": round(second * 1000, 2),
    }


if __name__ == "__main__":
    main()
