"""Every block passes Prefect's standard suite, and one saved block nests in another."""

from __future__ import annotations

import uuid
from io import BytesIO
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from PIL import Image
from prefect.blocks.core import Block
from prefect.client.orchestration import get_client
from prefect.testing.standard_test_suites import BlockStandardTestSuite
from prefect.utilities.dispatch import get_registry_for_type
from prefect.utilities.importtools import to_qualified_name
from pydantic import SecretStr, ValidationError
from pydantic.json_schema import GenerateJsonSchema

import prefect_huggingface.blocks
from prefect_huggingface.blocks import (
    EngineOptions,
    HuggingFaceCredentials,
    LocalModel,
    ModelStore,
    QuantizationOptions,
)
from prefect_huggingface.tasks.engines.openvino_runtime import with_settings
from prefect_huggingface.tasks.langchain import HuggingFacePipeline
from prefect_huggingface.tasks.storage.exports.recipes import resolve_recipe

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
        # They share one picture, which is looked at below where there is internet.
        assert str(block._logo_url).startswith("https://avatars.githubusercontent.com/u/")


def test_the_picture_of_the_blocks_is_square():
    try:
        with urlopen(str(LocalModel._logo_url), timeout=10) as answer:
            picture = Image.open(BytesIO(answer.read()))
    except URLError:
        pytest.skip("no internet")
    assert picture.width == picture.height
    assert 45 < picture.width < 1000


@pytest.mark.usefixtures("prefect_server")
def test_the_server_knows_the_picture():
    LocalModel.register_type_and_schema()
    with get_client(sync_client=True) as client:
        assert client.read_block_type_by_slug("hugging-face-local-model").logo_url == LocalModel._logo_url


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


def test_a_schema_is_made_once_and_its_caller_may_change_it():
    made = []

    class Counting(GenerateJsonSchema):
        def generate(self, *args, **kwargs):
            made.append(args)
            return super().generate(*args, **kwargs)

    for _ in range(3):
        schema = LocalModel.model_json_schema(schema_generator=Counting)
        assert schema.pop("properties")["model_id"]["title"]
    assert len(made) == 1


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


@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize("is_saved", [True, False], ids=["saved", "from a form"])
def test_a_block_with_every_field_set_means_what_it_means_in_code(is_saved):
    """Prefect saves every field, and a form gives all fields of an opened group, also those that have their default."""
    model = LocalModel(
        model_id="a/b", weight_format="int4", quantization=QuantizationOptions(group_size_fallback="error"),
        engine=EngineOptions(cache_size_gb=1),
    )  # fmt: skip
    if is_saved:
        name = f"test-{uuid.uuid4().hex[:8]}"
        model.model_copy().save(name)
        full = LocalModel.load(name)
    else:
        full = LocalModel(**model.model_dump())
    assert full.quantization.model_fields_set > model.quantization.model_fields_set
    assert resolve_recipe(full, None) == resolve_recipe(model, None)
    tuned = {"max_num_seqs": 8, "prompt_lookup_tokens": 3, "NUM_STREAMS": 1}
    assert with_settings(full, tuned).engine == with_settings(model, tuned).engine
    for settings in ({}, {"max_length": 50}, {"max_new_tokens": 5}, {"temperature": 0.5}):
        llms = [HuggingFacePipeline(model=each, pipeline_kwargs=settings) for each in (full, model)]
        assert llms[0].read_call({}, ["x"]) == llms[1].read_call({}, ["x"])
        assert llms[0].model.chat_template == llms[1].model.chat_template
