"""Measures the time from the start of a process to its first token, beside its peers, in turns.

    python tests/benchmarks/benchmark_start.py [--model real] [--repeats 5] [--output build/benchmarks]

The model is exported before in int8. Every figure is of a process of its own.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from benchmark_engines import install_peer
from benchmark_models import add_model, make_export, work_folder
from report import show, store

PROMPT = "The capital of France is"
BARE = f"""
import sys
from openvino_genai import GenerationConfig, LLMPipeline, StreamingStatus
config = GenerationConfig()
config.max_new_tokens, config.ignore_eos, config.apply_chat_template = 8, True, False
def show(piece):
    print(repr(piece), flush=True)
    return StreamingStatus.STOP
LLMPipeline(sys.argv[1], "CPU").generate({PROMPT!r}, config, show)
"""
SCRIPTS = {
    "ours": f"""
import sys
from prefect_huggingface.blocks import LocalModel
from prefect_huggingface.tasks import load_engine
from prefect_huggingface.tasks.records import Request
engine = load_engine(LocalModel(model_id=sys.argv[1], chat_template="never", engine=dict(tuned=False)))
stream = engine.stream(Request({PROMPT!r}, options=dict(max_new_tokens=8, ignore_eos=True)))
print(repr(next(stream)), flush=True)
stream.close()
assert not {{"torch", "transformers"}} & set(sys.modules)
""",
    "bare OpenVINO GenAI": BARE,
    # What this library needs of Prefect: blocks and tasks.
    "bare OpenVINO GenAI after Prefect's import": f"import prefect.blocks.core, prefect.tasks{BARE}",
    "langchain-huggingface, openvino": f"""
import sys
from langchain_huggingface import HuggingFacePipeline
settings = dict(max_new_tokens=8, do_sample=False)
llm = HuggingFacePipeline.from_model_id(
    sys.argv[1], task="text-generation", backend="openvino", pipeline_kwargs=settings
)
print(repr(next(iter(llm.stream({PROMPT!r})))), flush=True)
""",
}


def start(name: str, export: Path, peers: Path | None) -> tuple[float, float]:
    """Run a script; return the seconds to its first token, and the processor's seconds to its end."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(peers or "")}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-c", SCRIPTS[name], str(export)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        seconds = time.perf_counter() - began
        _, errors = process.communicate()
    if not line or process.returncode:
        raise RuntimeError(f"{name} failed:\n{errors[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure in turns, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="how often each script is started")
    add_model(parser)
    arguments = parser.parse_args()
    export = make_export(work_folder(arguments))
    peers = None if arguments.model == "quick" else install_peer(arguments.output.absolute() / "peers")
    names = [name for name in SCRIPTS if peers is not None or not name.startswith("langchain")]
    figures: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for repeat in range(arguments.repeats + 1):
        for name in names:
            seconds = start(name, export, peers)
            if repeat:
                figures[name].append(seconds)
    shown = []
    own = median(seconds for seconds, _ in figures["ours"])
    for name, rows in figures.items():
        clock, processor = [seconds for seconds, _ in rows], median(seconds for _, seconds in rows)
        cells = (f"{median(clock):.2f}", f"{min(clock):.2f}", f"{max(clock):.2f}", f"{processor:.2f}")
        shown.append([name, *cells, f"{own / median(clock):.2f} times its time"])
    headings = ["script", "seconds to the first token", "lowest", "highest", "processor seconds", "ours takes"]
    show("From the start of a process to its first token", headings, shown)
    bars = {name: median(seconds for seconds, _ in rows) for name, rows in figures.items()}
    store(work_folder(arguments) / "start.json", figures, {"first token": bars}, "seconds")


if __name__ == "__main__":
    main()
