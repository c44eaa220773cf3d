"""Measures this library's OpenVINO engine beside its peers, interleaved, on one model of random or real weights.

    python tests/benchmarks/benchmark_engines.py [--model real] [--repeats 5] [--formats int8 int4] [--engines ...]

Every engine has a process of its own; only one works at a time. The figures are medians over the repeats: tokens per
second by the clock, and per second of one processor core, which says more on a machine that others use too.
langchain-huggingface and llama.cpp are put into a folder of their own with pip; where that fails their rows are left
out. llama.cpp needs the real model, of which it has the same weights at the same number of bits.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import platform
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from benchmark_contenders import CONTENDERS
from benchmark_models import add_model, make_eight_bits, make_export, make_real_checkpoint, make_source, work_folder
from benchmark_workloads import Workload, make_workloads
from machine import Machine, cache_bytes, measure_machine, share_of_bandwidth, share_of_products, weight_facts
from report import show, store

PEERS = {"langchain_huggingface": "langchain-huggingface==1.2.3", "xllamacpp": "xllamacpp==2026.10.11549"}
ON_TORCH = ("langchain-huggingface, torch", "transformers pipeline", "transformers generate_batch")
# These take minutes for a whole workload, so that they get a part of its rows.
SLOW = (*ON_TORCH, "langchain-huggingface, openvino")
SLOW_ROWS = 4
WARM_UP_ROWS = 8
OURS = ("ours", "ours, tuned", "ours, a process per core")
CONTINUOUS = (*OURS, "continuous batching, tuned by hand", "continuous batching, defaults")
LISTS = tuple(name for name in CONTENDERS if name != "ours, one list")
# Which engines do which workload: those that it tells apart.
CONTENDERS_OF = {
    "mixed": LISTS,
    "shared": CONTINUOUS,
    "skewed": (*CONTINUOUS, "llama.cpp", "LLMPipeline, batches of 8", "optimum, batches of 8"),
    "alone": LISTS,
    "threads": (*OURS, "ours, one list"),
}
HERE = Path(__file__).parent


Figures = dict[str, dict[str, list[tuple[float, float]]]]
Peaks = dict[str, float]


class Worker:
    """One engine in a process of its own, bound to some cores where they are given, with properties of OpenVINO."""

    def __init__(
        self, name: str, folder: Path, peers: Path = HERE, cores: set[int] | None = None, **properties: Any
    ) -> None:
        command = [sys.executable, str(HERE / "benchmark_contenders.py"), name, str(folder), json.dumps(properties)]
        environment = {
            **os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(peers),
        }  # fmt: skip
        self.name = name
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=environment,
        )  # fmt: skip
        # After an interruption, and when somebody ends the benchmark.
        atexit.register(self.close)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        if cores is not None:
            os.sched_setaffinity(self._process.pid, cores)
        self._read()

    def run(self, workload: Workload) -> tuple[float, float]:
        """Do a workload and return its tokens per second, by the clock and of one processor core."""
        self.begin(workload)
        answer = self.finish()
        return answer["tokens"] / answer["seconds"], answer["tokens"] / answer["processor_seconds"]

    def begin(self, workload: Workload) -> None:
        """Begin a workload."""
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        print(json.dumps(asdict(workload)), file=self._process.stdin, flush=True)

    def finish(self) -> dict[str, float]:
        """Wait for the end of a workload and return its `seconds`, `processor_seconds` and `tokens`."""
        figures = self._read()
        # Some engines keep a core busy while they wait.
        self._process.send_signal(signal.SIGSTOP)
        return figures

    def peak_mib(self) -> float:
        """Return the greatest resident memory of the process, and of those that it has started."""
        import psutil

        children = psutil.Process(self._process.pid).children(recursive=True)
        statuses = [Path(f"/proc/{pid}/status") for pid in (self._process.pid, *(child.pid for child in children))]
        return sum(int(status.read_text().split("VmHWM:")[1].split()[0]) for status in statuses) / 1024

    def close(self) -> None:
        """End the process, which may be stopped."""
        assert self._process.stdin is not None
        atexit.unregister(self.close)
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with status {self._process.wait()}.")
        return dict(json.loads(line))


def install_peer(folder: Path, package: str = "langchain_huggingface") -> Path | None:
    """Put a peer beside the project and return its folder, or None where it cannot be had."""
    if not (folder / package).is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        if subprocess.run([*command, PEERS[package]], check=False, capture_output=True).returncode != 0:
            print(f"{PEERS[package]} cannot be installed, so its rows are left out.")
            return None
    return folder


def tune(export: Path) -> None:
    """Find the best settings for this machine, for the contender that uses them. What was found once is kept."""
    from prefect_huggingface.blocks import LocalModel
    from prefect_huggingface.tasks.engines.openvino_runtime import read_settings
    from prefect_huggingface.tasks.tuning import find_settings

    model = LocalModel(model_id=str(export))
    settings = read_settings(model, export) or find_settings(model).settings
    print(f"Tuned: {settings}.")


def measure(folders: dict[str, Path], peers: Path, workloads: list[Workload], repeats: int, limits: Limits) -> Figures:
    """Run all workloads on all engines, one after the other, again and again.

    Args:
        folders: Model folder by engine.
        peers: Folder with the peers that were installed.
        workloads: What to do.
        repeats: How often each engine does each workload, after some of its rows to warm up.
        limits: What the machine can do with this model.

    Returns:
        Figures of every repeat, by workload and engine.
    """
    figures: Figures = {workload.name: {} for workload in workloads}
    for workload in workloads:
        names = [name for name in folders if name in CONTENDERS_OF[workload.name]]
        workers = [Worker(name, folders[name], peers) for name in names]
        for repeat in range(repeats + 1):
            # Each is as often before the others as after them, since the machine's speed drifts.
            for worker in workers if repeat % 2 else reversed(workers):
                rows = workload.sample(SLOW_ROWS) if worker.name in SLOW else workload
                rates = worker.run((rows if repeat else rows.sample(WARM_UP_ROWS)).fresh(repeat))
                if repeat:
                    figures[workload.name].setdefault(worker.name, []).append(rates)
        peaks = {worker.name: worker.peak_mib() for worker in workers}
        for worker in workers:
            worker.close()
        print_table(workload, figures[workload.name], limits, peaks)
    return figures


def print_table(
    workload: Workload, figures: dict[str, list[tuple[float, float]]], limits: Limits, peaks: Peaks
) -> None:
    """Print the medians of one workload, how many times slower than this library each engine is, and shares of limits.

    The memory is the greatest resident memory of the process, in MiB.

    The limit of one stream is the read bandwidth over the bytes of the weights and of the keys and values, that of a
    batch the rate of products for its new tokens and those of its prompts, in the fastest precision of this machine.
    The products of attention are left out, so that the shares of batches are a little too small.
    """
    headings = ("engine", "tokens/s", "lowest", "highest", "ours is", "tokens/core s", "ours is", "of the limit", "MiB")
    rows = []
    own, own_core = medians(figures["ours"])
    for name, rates in figures.items():
        (clock, core), by_clock = medians(rates), [rate for rate, _ in rates]
        cells = (clock, min(by_clock), max(by_clock), own / clock, core, own_core / core)
        shown = [f"{cell:.2f}x" if place in (3, 5) else f"{cell:.1f}" for place, cell in enumerate(cells)]
        rows.append([name, *shown, f"{limits.share(workload, clock):.2f}", f"{peaks[name]:.0f}"])
    show(workload.name, headings, rows)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a machine can do with one model.

    Attributes:
        machine: Limits of the machine, measured in this run.
        weight_bytes: Bytes of the weights, which every token reads.
        parameters: Number of parameters.
        cache_bytes: Bytes of the keys and values of one token, which every later one reads.
    """

    machine: Machine
    weight_bytes: int
    parameters: int
    cache_bytes: float

    def share(self, workload: Workload, tokens_per_second: float) -> float:
        """Return the share of the limit of a workload."""
        if workload.name == "alone":
            context = workload.read_tokens + workload.tokens / 2
            return share_of_bandwidth(self.machine, tokens_per_second, self.weight_bytes + context * self.cache_bytes)
        tokens = tokens_per_second * (1 + workload.read_tokens / workload.tokens)
        products = self.machine.products
        return share_of_products(self.machine, tokens, self.parameters, max(products, key=products.__getitem__))


def medians(rates: list[tuple[float, float]]) -> tuple[float, float]:
    """Return the medians by the clock and by the processor core."""
    return median(rate for rate, _ in rates), median(rate for _, rate in rates)


def write_figures(path: Path, figures: dict[str, Any], repeats: int, machine: Machine) -> None:
    """Write the raw figures with the machine and the versions."""
    packages = ("openvino", "openvino-genai", "optimum-intel", "transformers", "torch")
    facts = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"processor": platform.processor() or platform.machine(), **asdict(machine)},
        "versions": {name: version(name) for name in packages},
        "repeats": repeats,
        "tokens_per_second_and_core_second": figures,
    }
    panels = {
        f"{form}, {name}": {engine: medians(values)[0] for engine, values in rates.items()}
        for form, by_name in figures.items()
        for name, rates in by_name.items()
    }
    store(path, facts, panels, "tokens per second")


def prepare(work: Path, formats: list[str], names: list[str]) -> tuple[dict[str, Path], dict[str, dict[str, Path]]]:
    """Make the models and return the folder of the export by format, and what each engine runs by format and engine.

    Args:
        work: Folder of the model.
        formats: Weight formats.
        names: Engines that are wanted; those that cannot run these weights are left out.
    """
    source, real = make_source(work), work.name == "real"
    exports = {weight_format: make_export(work, weight_format) for weight_format in formats}
    on_torch = make_real_checkpoint(work) if real and set(names) & set(ON_TORCH) else source
    folders: dict[str, dict[str, Path]] = {}
    for weight_format, export in exports.items():
        places = {name: on_torch if name in ON_TORCH else export for name in names}
        if not real:
            places.pop("llama.cpp", None)
        elif "llama.cpp" in places:
            places["llama.cpp"] = make_eight_bits(source, work / "Q8_0.gguf") if weight_format == "int8" else source
        folders[weight_format] = places
    return exports, folders


def main() -> None:
    """Read the arguments, measure, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model(parser)
    parser.add_argument("--repeats", type=int, default=5, help="how often each engine does each workload")
    parser.add_argument("--formats", nargs="+", default=["int8", "int4"], help="weight formats")
    parser.add_argument("--engines", nargs="+", default=list(CONTENDERS), help="which engines")
    parser.add_argument("--workloads", nargs="+", default=None, help="which workloads")
    parser.add_argument("--rows", type=int, help="how many rows of a workload, for large models")
    arguments = parser.parse_args()
    work = work_folder(arguments)
    names, peers = arguments.engines, arguments.output.absolute() / "peers"
    for package, beginning in (("langchain_huggingface", "langchain"), ("xllamacpp", "llama.cpp")):
        wanted = any(name.startswith(beginning) for name in names)
        if not wanted or install_peer(peers, package) is None:
            names = [name for name in names if not name.startswith(beginning)]
    exports, folders = prepare(work, arguments.formats, names)
    workloads = make_workloads(next(iter(exports.values())) / "tokenizer.json", quick=arguments.model == "quick")
    workloads = [one for one in workloads if arguments.workloads is None or one.name in arguments.workloads]
    if arguments.rows is not None:
        workloads = [workload.sample(arguments.rows) for workload in workloads]
    machine = measure_machine()
    print(f"The machine: {json.dumps(asdict(machine))}")
    figures = {}
    for weight_format, export in exports.items():
        print(f"Weights in {weight_format}:")
        if "ours, tuned" in names:
            tune(export)
        limits = Limits(machine, *weight_facts(export), cache_bytes(export))
        figures[weight_format] = measure(folders[weight_format], peers, workloads, arguments.repeats, limits)
    write_figures(work / f"engines-{'-'.join(exports)}.json", figures, arguments.repeats, machine)


if __name__ == "__main__":
    main()
