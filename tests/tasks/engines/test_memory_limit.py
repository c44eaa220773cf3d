"""In a group of processes with a memory limit, as a service or a container has it, an engine keeps within the limit."""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefect_huggingface.blocks import LocalModel, ModelStore
from prefect_huggingface.tasks.storage.exports.store import get_export
from support.export_models import make_model

pytestmark = pytest.mark.slow

MIB = 2**20
LIMIT = 1100 * MIB
MEMORY_GROUPS = Path("/sys/fs/cgroup/memory")
# Keys and values of all rows together take 1.5 GB where nothing holds them back.
SHAPE = {
    "hidden_size": 64, "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256, "num_hidden_layers": 2,
    "max_position_embeddings": 2048,
}  # fmt: skip
PROGRAM = """
import os, sys
group, folder = sys.argv[1:]
open(group + "/cgroup.procs", "w").write(str(os.getpid()))
from prefect_huggingface.blocks import EngineOptions, GenerationOptions, LocalModel
from prefect_huggingface.tasks import load_engine
from prefect_huggingface.tasks.records import Request

engine = load_engine(LocalModel(model_id=folder, chat_template="never"))
options = GenerationOptions(max_new_tokens=600, ignore_eos=True)
found = [completion.error for completion in engine.generate(Request(f"{row} is", options=options) for row in range(64))]
assert found == [None] * 64, found
"""


@pytest.fixture
def group() -> Iterator[Path]:
    """A group with a limit, below the one that this process is in."""
    lines = Path("/proc/self/cgroup").read_text().splitlines() if MEMORY_GROUPS.is_dir() else []
    paths = [line.split(":", 2)[2] for line in lines if line.split(":")[1] == "memory"]
    if not paths:
        pytest.skip("no groups of the first version with a memory limit here")
    folder = MEMORY_GROUPS / paths[0].lstrip("/") / f"limit-{uuid.uuid4().hex}"
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("no rights to make a group")
    (folder / "memory.limit_in_bytes").write_text(str(LIMIT))
    yield folder
    folder.rmdir()


def test_a_full_batch_stays_within_the_limit_of_its_group(group, tmp_path):
    source = make_model(tmp_path / "wide", "llama", **SHAPE)
    store = ModelStore(path=tmp_path / "store")
    folder = get_export(LocalModel(model_id=str(source), weight_format="fp32", store=store)).path
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(group), str(folder)], capture_output=True, text=True, timeout=600
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert int((group / "memory.max_usage_in_bytes").read_text()) <= LIMIT
