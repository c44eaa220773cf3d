"""References to blocks pass the checks of a new deployment, of a changed one and of a run."""

from __future__ import annotations

import pytest
from prefect.utilities.schema_tools.validation import ValidationError, validate

from prefect_huggingface.flows import batch_inference, prepare_model, prune_models

# How the server checks the parameters of a new deployment, of a changed one, and of a run.
CHECKS = [{"preprocess": False, "ignore_required": True}, {"ignore_required": True}, {}]
BY_ID = {"$ref": {"block_document_id": "677ff7e8-fb28-40da-b410-0aa579d3a979"}}
BY_NAME = {"$ref": {"block_document_slug": "hugging-face-local-model/default"}}
FILES = {"source": "a.jsonl", "destination": "b.jsonl"}


@pytest.mark.parametrize("check", CHECKS, ids=["new deployment", "changed deployment", "run"])
@pytest.mark.parametrize("reference", [BY_ID, BY_NAME, None], ids=["id", "name", "value"])
def test_a_block_is_given_by_reference_or_by_value(check, reference):
    for flow, parameter, value in [
        (prune_models, "store", {"path": "/models"}),
        (prune_models, "store", {}),
        (prepare_model, "model", {"model_id": "a/b"}),
        (batch_inference, "model", {"model_id": "a/b"}),
        (batch_inference, "model", {"url": "http://127.0.0.1:1"}),
    ]:
        schema = flow.parameters.model_dump_for_openapi()
        files = FILES if flow is batch_inference else {}
        validate({parameter: reference or value, **files}, schema, raise_on_error=True, **check)


@pytest.mark.parametrize("check", CHECKS, ids=["new deployment", "changed deployment", "run"])
def test_a_text_is_no_block(check):
    with pytest.raises(ValidationError, match="'store'"):
        validate({"store": "default"}, prune_models.parameters.model_dump_for_openapi(), raise_on_error=True, **check)
