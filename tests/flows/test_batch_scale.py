"""The machinery alone, with an engine that answers at once: memory and requests do not grow with the rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "benchmark_batches.py"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_memory_and_requests_stay(tmp_path: Path) -> None:
    small, large = (measure(tmp_path, rows) for rows in (10_000, 300_000))

    print(small, large)
    assert large["peak_mib"] <= 1.1 * small["peak_mib"]
    assert large["requests"] <= small["requests"] + 3 * large["seconds"]
    # Seconds of the processor, since tests share the machine with others.
    assert 290_000 / (large["cpu_seconds"] - small["cpu_seconds"]) >= 20_000


def measure(folder: Path, rows: int) -> dict[str, Any]:
    """Run the benchmark in a process of its own."""
    command = [sys.executable, str(BENCHMARK), "scale", "--rows", str(rows), "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures
