"""Every block passes Prefect's standard suite, and one saved block nests in another."""

from __future__ import annotations

import uuid

import pytest
from prefect.blocks.core import Block
from prefect.testing.standard_test_suites import BlockStandardTestSuite
from prefect.utilities.dispatch import get_registry_for_type
from prefect.utilities.importtools import to_qualified_name
from pydantic import SecretStr, ValidationError

import prefect_huggingface.blocks
from prefect_huggingface.blocks import HuggingFaceCredentials, LocalModel, ModelStore

BLOCKS = [
    block
    for block in (get_registry_for_type(Block) or {}).values()
    if to_qualified_name(block).startswith("prefect_huggingface.blocks") and block.__name__ != "ConfigurationBlock"
]


@pytest.mark.parametrize("block", sorted(BLOCKS, key=to_qualified_name), ids=lambda block: block.__name__)
class TestStandards(BlockStandardTestSuite):
    @pytest.fixture
    def block(self, block):
        return block

    def test_has_a_valid_image(self, block):
        # A logo would have to be an address on the internet, which a worker may not reach. There is none.
        assert block._logo_url is None


def test_every_public_block_is_checked():
    public = {
        value
        for value in vars(prefect_huggingface.blocks).values()
        if isinstance(value, type) and issubclass(value, Block)
    }
    assert public == set(BLOCKS)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.__name__)
def test_every_field_has_a_title(block):
    for name, field in block.model_fields.items():
        assert field.title, f"{block.__name__}.{name}"


@pytest.mark.usefixtures("prefect_server")
def test_nested_blocks_round_trip_and_refer():
    name = f"test-{uuid.uuid4().hex[:8]}"
    credentials = HuggingFaceCredentials(token=SecretStr("hf_canary"), endpoint="http://127.0.0.1:9")
    credentials.save(name)
    LocalModel(model_id="a/b", backend="torch", credentials=credentials, store=ModelStore(path="/tmp/x")).save(name)

    loaded = LocalModel.load(name)

    assert loaded.weight_format is None
    assert loaded.get_credentials().get_token() == "hf_canary"
    assert loaded.ref() == {"$ref": {"block_document_slug": f"hugging-face-local-model/{name}"}}
    assert "hf_canary" not in repr(loaded) + loaded.model_dump_json()


def test_a_reference_needs_a_saved_block():
    with pytest.raises(ValueError, match="not saved"):
        ModelStore().ref()


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.__name__)
def test_unknown_fields_are_refused(block):
    with pytest.raises(ValidationError, match="no_such_field"):
        block(no_such_field=1)


@pytest.mark.usefixtures("prefect_server")
def test_a_wrong_saved_value_has_an_error_with_its_location():
    name = f"test-{uuid.uuid4().hex[:8]}"
    # The server stores what it is given; the block finds the mistake when it is loaded.
    LocalModel.model_construct(model_id="a/b", backend="torch", device="cpu", device_map="auto").save(name)
    with pytest.raises(RuntimeError, match="validation"):
        LocalModel.load(name)
