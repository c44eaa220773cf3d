"""Measures what this machine can do, so that every figure has a share of a limit beside it.

    python tests/benchmarks/machine.py

Run it in the same run as what it is compared with: shared machines change from hour to hour. One stream of tokens is
limited by how fast its weights and its keys and values can be read, a batch by the products of its layers.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

REPEATS = 5
GIB = 2**30
CACHED_NUMBER_BYTES = 1.125


@dataclass(frozen=True, slots=True)
class Machine:
    """Limits of one machine, each the best of some repeats.

    Attributes:
        cores: Number of processor cores.
        read_bandwidth: Bytes per second that all cores together read.
        copy_bandwidth: Bytes per second that they read and write.
        products: Operations per second of matrix products in OpenVINO by precision; a multiplication and an addition
            are two.
        call_seconds: Seconds of one call from Python into OpenVINO.
    """

    cores: int
    read_bandwidth: float
    copy_bandwidth: float
    products: dict[str, float]
    call_seconds: float


def measure_machine(size_bytes: int = GIB, width: int = 2048) -> Machine:
    """Measure this machine.

    Args:
        size_bytes: Size of the memory to read, much larger than the caches.
        width: Rows and columns of the matrices.
    """
    return Machine(
        os.cpu_count() or 1, *_bandwidths(size_bytes),
        {precision: _product_rate(precision, width) for precision in ("f32", "bf16", "int8")}, _call_seconds(),
    )  # fmt: skip


def share_of_bandwidth(machine: Machine, tokens_per_second: float, bytes_per_token: float) -> float:
    """Return the share of the read bandwidth that a stream of tokens takes."""
    return tokens_per_second * bytes_per_token / machine.read_bandwidth


def share_of_products(machine: Machine, tokens_per_second: float, parameters: float, precision: str) -> float:
    """Return the share of the products that a batch takes: two operations for each parameter and token."""
    return tokens_per_second * 2 * parameters / machine.products[precision]


def weight_facts(export: Path) -> tuple[int, int]:
    """Return the bytes that one token reads of the weights of an OpenVINO model, and its number of parameters.

    All weights are read for every token; embeddings that are tied are those of the head.
    """
    from openvino import Core

    count = size = 0
    for operation in Core().read_model(export / "openvino_model.xml").get_ordered_ops():
        if operation.get_type_name() == "Constant":
            elements = 1
            for length in operation.get_output_shape(0):
                elements *= length
            count += elements if len(operation.get_output_shape(0)) >= 2 else 0
            size += operation.get_byte_size()
    return size, count


def cache_bytes(export: Path) -> float:
    """Return the bytes that one token takes of the cache of keys and values: 8 bits each, and their scales."""
    from prefect_huggingface.tasks.engines.memory import kv_bytes_per_token

    settings = json.loads((export / "config.json").read_text(encoding="utf-8"))
    return kv_bytes_per_token(settings, CACHED_NUMBER_BYTES)


def _best(work: Callable[[], Any]) -> float:
    """Return the seconds of the fastest of some repeats."""
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _bandwidths(size_bytes: int) -> tuple[float, float]:
    import numpy as np

    cores = os.cpu_count() or 1
    parts = [np.ones(size_bytes // 4 // cores, np.float32) for _ in range(cores)]
    targets = [np.empty_like(part) for part in parts]
    total = sum(part.nbytes for part in parts)
    with ThreadPoolExecutor(cores) as pool:
        reading = _best(lambda: list(pool.map(lambda part: np.dot(part, part), parts)))
        copying = _best(lambda: list(pool.map(np.copyto, targets, parts)))
    return total / reading, 2 * total / copying


def _product_rate(precision: str, width: int) -> float:
    import numpy as np
    import openvino as ov
    from openvino import opset13 as ops

    random = np.random.default_rng(0)
    rows = ops.parameter([width, width], np.float32)
    weights: Any = ops.constant(random.uniform(-1, 1, (width, width)).astype(np.float32))
    left: Any = rows
    if precision == "int8":
        # What OpenVINO turns into products of 8-bit integers.
        left = ops.fake_quantize(rows, *(np.float32(limit) for limit in (-1, 1, -1, 1)), 256)
        weights = ops.fake_quantize(weights, *(np.float32(limit) for limit in (-1, 1, -1, 1)), 255)
    model = ov.Model([ops.matmul(left, weights, False, True)], [rows])
    hint = {"INFERENCE_PRECISION_HINT": "f32" if precision == "int8" else precision}
    request = ov.Core().compile_model(model, "CPU", hint).create_infer_request()
    request.set_input_tensor(ov.Tensor(random.uniform(-1, 1, (width, width)).astype(np.float32)))
    request.infer()
    return 2 * width**3 / _best(request.infer)


def _call_seconds(calls: int = 10_000) -> float:
    import numpy as np
    import openvino as ov

    array = np.zeros(8, np.int64)
    return _best(lambda: [ov.Tensor(array) for _ in range(calls)]) / calls


if __name__ == "__main__":
    print(json.dumps(asdict(measure_machine()), indent=2))
