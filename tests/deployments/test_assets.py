"""Assets in the event feed of a real server: what was made, of what, by which run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from support.prefect_services import PrefectServices, wait_until

MADE, READ = "prefect.asset.materialization.succeeded", "prefect.asset.referenced"
PROGRAM = """
import sys
from prefect_huggingface.blocks import LocalModel, ModelStore
from prefect_huggingface.flows.batches import batch_inference
from prefect_huggingface.flows.preparation import prepare_model
model = LocalModel(model_id=sys.argv[1], store=ModelStore(path=sys.argv[2]), options={"max_new_tokens": 4})
prepare_model(model)
prepare_model(model)
batch_inference(model, sys.argv[3], sys.argv[4], "{text}", show_progress=False)
"""


def read_events(services: PrefectServices, start: str) -> list[dict[str, Any]]:
    """Events whose names begin so, the earliest first."""
    chosen = {"event": {"prefix": [start]}, "order": "ASC"}
    return services.post("events/filter", filter=chosen, limit=50)["events"]


def test_lineage_from_the_model_to_the_output(services: PrefectServices, tiny_llama: Path, tmp_path: Path) -> None:
    store, folder = tmp_path / "store", tmp_path / "rows of 100% <b>"
    folder.mkdir()
    source, destination = folder / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"text": "Hello"}\n')
    arguments = [str(tiny_llama), str(store), str(source), str(destination)]
    subprocess.run([sys.executable, "-c", PROGRAM, *arguments], env=services.environment, check=True, timeout=240)
    model, output = f"file://{tiny_llama}", f"file://{destination}"

    wait_until(lambda: len(read_events(services, MADE)) > 1, 30, "the events")
    made = {event["resource"]["prefect.resource.id"]: event for event in read_events(services, MADE)}
    (export,) = (store / "exports").glob("tiny-llama-*")
    assert set(made) == {f"file://{export}", output}
    assert len(read_events(services, MADE)) == 2, "an export that was there already was not made"

    def related(event: dict[str, Any], role: str) -> set[str]:
        return {each["prefect.resource.id"] for each in event["related"] if each["prefect.resource.role"] == role}

    assert related(made[f"file://{export}"], "asset") == {model}
    upstream = related(made[output], "asset")
    assert {model, f"file://{export}"} < upstream
    (read,) = upstream - {model, f"file://{export}"}
    assert read.startswith(f"file://{tmp_path}/rows_of_100___b_/in.jsonl~")
    assert made[output]["payload"] == {"rows": 1, "failed": 0, "generated_tokens": 4}
    assert related(made[output], "asset-materialized-by") == {"prefect-huggingface"}
    assert related(made[output], "flow-run")
    assert model in {event["resource"]["prefect.resource.id"] for event in read_events(services, READ)}
    assert "Hello" not in json.dumps(made)
