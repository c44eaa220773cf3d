"""The forms of the deployments: what they say, and which wrong values are refused before a run is made."""

from __future__ import annotations

import time
from typing import Any
from uuid import UUID

import httpx
import pytest
from prefect.client.orchestration import get_client
from prefect.flow_engine import run_flow
from prefect.settings import PREFECT_API_URL, temporary_settings

from prefect_huggingface.flows import batch_inference
from support.prefect_services import PrefectServices

# A better word does not exist for these.
PLAIN = {"model", "steps", "store"}
USES = {
    "batch-inference", "batch-embedding", "prompt-chain", "prompt-chain-warm", "prepare-model", "prune-models",
}  # fmt: skip
NOBODY = "00000000-0000-0000-0000-000000000000"


def slug(kind: str, name: str) -> dict[str, Any]:
    return {"$ref": {"block_document_slug": f"hugging-face-{kind}/{name}"}}


def create_run(server: PrefectServices, deployment: dict[str, Any], parameters: dict[str, Any]) -> httpx.Response:
    path = f"deployments/{deployment['id']}/create_flow_run"
    return server.request("POST", path, json={"parameters": parameters})


def test_there_is_one_deployment_for_each_use(deployments):
    assert set(deployments) >= USES
    for deployment in (deployments[name] for name in USES):
        assert deployment["description"].endswith(".")
        assert "hugging-face" in deployment["tags"]
        assert deployment["version"]
        assert deployment["concurrency_options"]["collision_strategy"] in ("ENQUEUE", "CANCEL_NEW")
        assert not deployment["pull_steps"]
    scheduled = {name for name, each in deployments.items() if any(s["active"] for s in each["schedules"])}
    assert scheduled == {"batch-inference", "prepare-model", "prune-models"}


def test_every_field_has_a_title_a_sentence_and_a_value_to_begin_with(deployments):
    for name, deployment in deployments.items():
        schema = deployment["parameter_openapi_schema"]
        for parameter, field in schema["properties"].items():
            where = f"{name}: {parameter}"
            assert field["title"] != parameter, where
            assert field["title"].lower() != parameter.replace("_", " ") or parameter in {*PLAIN, "options"}, where
            assert field["description"].endswith("."), where
            assert name not in USES or "default" in field or parameter in deployment["parameters"], where


def test_every_field_of_a_block_has_a_title_and_a_sentence(deployments):
    seen = set()
    for deployment in deployments.values():
        for name, definition in deployment["parameter_openapi_schema"].get("definitions", {}).items():
            for field, described in definition.get("properties", {}).items():
                assert described.get("title"), f"{name}.{field}"
                assert described.get("description", "").endswith("."), f"{name}.{field}"
                seen.add(name)
    assert {"LocalModel", "InferenceEndpoint", "GenerationOptions", "ChainStep", "ModelStore"} <= seen


def test_blocks_are_chosen_from_a_list(deployments):
    for name, parameter in [
        ("batch-inference", "model"), ("batch-embedding", "model"), ("prepare-model", "model"),
        ("prune-models", "store"),
    ]:  # fmt: skip
        UUID(deployments[name]["parameters"][parameter]["$ref"]["block_document_id"])
    definitions = deployments["batch-inference"]["parameter_openapi_schema"]["definitions"]
    assert definitions["LocalModel"]["block_type_slug"] == "hugging-face-local-model"


def test_limits_and_choices_reach_the_form(deployments):
    schema = deployments["batch-inference"]["parameter_openapi_schema"]
    assert list(schema["properties"]) == [
        "model", "source", "destination", "prompt", "options", "system", "rows", "more",
    ]  # fmt: skip
    assert {"minimum": 1, "type": "integer"} in schema["properties"]["rows"]["anyOf"]
    fields = schema["definitions"]["BatchOptions"]["properties"]
    assert (fields["shards"]["minimum"], fields["shards"]["maximum"]) == (1, 10_000)
    assert fields["keep_journal"]["enum"] == ["failed", "always", "never"]
    assert {"minimum": 1, "type": "integer"} in fields["max_concurrency"]["anyOf"]


@pytest.mark.parametrize(
    ("parameters", "status", "words"),
    [
        ({"more": {"shards": 0}}, 409, "'more.shards'. Failure reason: 0 is less than the minimum of 1"),
        ({"more": {"max_concurrency": -1}}, 409, "max_concurrency"),
        ({"rows": 0}, 409, "'rows'"),
        ({"more": {"keep_journal": "maybe"}}, 409, "'maybe' is not one of ['failed', 'always', 'never']"),
        ({"sources": "x.jsonl"}, 409, "'sources' was unexpected"),
        ({"source": [{"question": "a"}, {"question": "b"}]}, 409, "is not of type 'string'"),
        ({"source": "x" * 600_000}, 422, "must be less than 524,288 bytes"),
        ({"model": "hugging-face-local-model/default"}, 409, "'model'"),
        ({"model": None}, 409, "'model'"),
        ({"source": ""}, 409, "'source'. Failure reason: '' should be non-empty"),
        ({"destination": ""}, 409, "'destination'. Failure reason: '' should be non-empty"),
        ({"options": {"max_new_tokens": 0}}, 409, "'options.max_new_tokens'. Failure reason: 0 is less than"),
        ({"options": {"max_tokens": 5}}, 409, "'max_tokens' was unexpected"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_value_is_refused_before_a_run_is_made(deployed, deployments, parameters, status, words):
    answer = create_run(deployed, deployments["batch-inference"], parameters)
    assert answer.status_code == status
    assert words in answer.text


# The open-source server accepts these, so the flow refuses them before anything else.
@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"model": slug("local-model", "nobody")}, "block 'hugging-face-local-model/nobody', which is not there"),
        ({"model": {"$ref": {"block_document_id": NOBODY}}}, f"block '{NOBODY}', which is not there"),
        ({"model": slug("model-store", "default")}, "got one of type hugging-face-model-store"),
        ({"source": "/nowhere/rows.jsonl"}, "'/nowhere/rows.jsonl' holds no file to read. Correct the path"),
        ({"source": "{questions}.jsonl"}, "questions"),
        ({"more": {"time_zone": "Europe/Nowhere"}}, "Europe/Nowhere"),
        ({"prompt": "What is {nothing}?"}, "nothing"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_the_server_accepts_fails_in_its_first_second(deployed, deployments, parameters, sentence):
    made = create_run(deployed, deployments["batch-inference"], parameters)
    assert made.status_code == 201
    with temporary_settings({PREFECT_API_URL: deployed.url}), get_client(sync_client=True) as client:
        flow_run = client.read_flow_run(UUID(made.json()["id"]))
        began = time.process_time()
        state = run_flow(batch_inference, flow_run=flow_run, return_type="state")
        seconds = time.process_time() - began
    assert state.is_failed()
    assert sentence in state.message
    assert seconds < 1.5


def test_a_block_whose_fields_do_not_fit_says_which(deployed, deployments):
    kind = deployed.request("GET", "block_types/slug/hugging-face-local-model").json()
    schemas = deployed.post("block_schemas/filter", block_schemas={"block_type_id": {"any_": [kind["id"]]}})
    document = deployed.post(
        "block_documents/", name="both", block_type_id=kind["id"], block_schema_id=schemas[0]["id"],
        data={"model_id": "a/b", "backend": "torch", "weight_format": None, "device": "cpu", "device_map": "auto"},
    )  # fmt: skip
    with temporary_settings({PREFECT_API_URL: deployed.url}):
        with pytest.raises(Exception, match=r"`model` refers to block .*device_map.*exclude each other"):
            batch_inference.validate_parameters(
                {"model": {"$ref": {"block_document_id": document["id"]}}, "source": "a", "destination": "b.jsonl"}
            )


def test_rows_in_place_of_a_file_are_explained(prefect_server):
    state = batch_inference({"model_id": "a/b"}, [{"question": "a"}] * 3, "b.jsonl", return_state=True)
    assert "`source` must be a text, got a list of 3 rows. Write the rows to a file" in state.message


def test_a_schedule_in_an_unknown_time_zone_is_refused(deployed, deployments):
    path = f"deployments/{deployments['batch-inference']['id']}/schedules"
    schedule = {"active": True, "schedule": {"cron": "0 3 * * *", "timezone": "Europe/Nowhere"}}
    answer = deployed.request("POST", path, json=[schedule])
    assert answer.status_code == 422
    assert "timezone" in answer.text


def test_deploying_to_an_unknown_work_pool_is_refused(deployed, tmp_path):
    (tmp_path / "prefect.yaml").write_text(
        "pull: []\ndeployments:\n- name: lost\n  entrypoint: prefect_huggingface.flows.chains.prompt_chain\n"
        "  work_pool: {name: no-such-pool}\n"
    )
    with pytest.raises(AssertionError, match="no-such-pool"):
        deployed.run("deploy", "--all", cwd=tmp_path)
