"""What LangChain code puts into `model_kwargs` and `pipeline_kwargs` keeps its meaning, or is refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from prefect_huggingface.blocks import QuantizationOptions
from prefect_huggingface.tasks.errors import SettingsError
from prefect_huggingface.tasks.langchain.kwargs import read_settings

TOKEN = "hf_CanaryTokenOfTheSettings"


def read(**arguments: Any) -> Any:
    return read_settings("gpt2", arguments.pop("task", "text-generation"), **arguments)


def test_the_default_backend_is_torch_and_prompts_are_plain_text() -> None:
    model = read().model
    assert (model.backend, model.weight_format, model.chat_template) == ("torch", None, "never")


def test_settings_of_the_batch_tutorial() -> None:
    settings = read(device=0, model_kwargs={"temperature": 0, "max_length": 64})
    assert settings.model.device == "0"
    assert settings.model.model_kwargs == {}
    assert settings.generation.max_length == 64
    assert settings.generation.options.do_sample is False


def test_settings_of_the_openvino_tutorial() -> None:
    ov_config = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1", "CACHE_DIR": ""}
    settings = read(
        backend="openvino",
        model_kwargs={"device": "CPU", "ov_config": ov_config},
        pipeline_kwargs={"max_new_tokens": 10},
    )
    assert (settings.model.backend, settings.model.device, settings.model.ov_config) == ("openvino", "CPU", ov_config)
    assert settings.model.options.max_new_tokens == 10


def test_settings_of_the_gated_tutorial(tmp_path: Path) -> None:
    model = read(
        model_kwargs={"token": TOKEN + "\n", "cache_dir": str(tmp_path), "revision": "main", "local_files_only": True}
    ).model
    assert model.get_credentials().get_token() == TOKEN
    assert (model.store_path, model.revision, model.offline) == (tmp_path, "main", True)


@pytest.mark.parametrize("token", [TOKEN, False, True, ""])
def test_a_token_is_shown_nowhere(token: Any) -> None:
    model = read(model_kwargs={"token": token}).model
    assert TOKEN not in repr(model)
    assert model.get_credentials().use_ambient_token is (token if isinstance(token, bool) else None)


@pytest.mark.parametrize(
    "places",
    [
        {"device": 0, "device_map": "auto"},
        {"device": -1, "model_kwargs": {"device_map": "auto"}},
        {"device_map": "auto", "model_kwargs": {"device": "cpu"}},
        {"model_kwargs": {"device": "CPU", "device_map": "auto"}},
        {"device": 0, "pipeline_kwargs": {"device_map": "auto"}},
        {"device": 0, "pipeline_kwargs": {"model_kwargs": {"device_map": "auto"}}},
    ],
)
def test_device_and_device_map_exclude_each_other_wherever_they_hide(places: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=r"`device` \(.*\) and `device_map` \('auto'\) exclude each other"):
        read(**places)


def test_a_setting_given_twice_with_two_values_is_refused() -> None:
    with pytest.raises(SettingsError, match="`device_map` is given twice"):
        read(device_map="auto", model_kwargs={"device_map": "balanced"})
    assert read(device_map="auto", model_kwargs={"device_map": "auto"}).model.device_map == "auto"


def test_a_setting_of_generation_in_pipeline_kwargs_wins() -> None:
    settings = read(model_kwargs={"max_new_tokens": 5}, pipeline_kwargs={"max_new_tokens": 7})
    assert settings.generation.options.max_new_tokens == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "openvinno"}, "`backend` must be one of .* got 'openvinno'"),
        ({"task": "text-generatoin"}, "`task` must be one of .* got 'text-generatoin'"),
        ({"model_kwargs": {"max_tokkens": 3}}, "'max_tokkens'"),
        ({"pipeline_kwargs": {"top_q": 3}}, "'top_q'"),
        ({"model_kwargs": {"quantization_config": {"bits": 3}}, "backend": "openvino"}, "must be 8 or 4, got 3"),
        ({"model_kwargs": {"quantization_config": {"bitss": 4}}, "backend": "openvino"}, "'bitss'"),
        ({"model_kwargs": {"quantization_config": 4}}, "must be a configuration or a dictionary, got 4"),
    ],
)
def test_what_is_unknown_is_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        read(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"pipeline_kwargs": {"temperature": -1}},
        {"pipeline_kwargs": {"top_p": 2}},
        {"pipeline_kwargs": {"max_new_tokens": 0}},
        {"model_kwargs": {"ov_config": {"NUM_STREAMS": "1"}}},
        {"backend": "openvino", "device_map": "auto"},
    ],
)
def test_values_out_of_range_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        read(**arguments)


def test_ipex_is_the_default_backend_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="ipex"):
        assert read(backend="ipex").model.backend == "torch"


def test_arguments_for_loading_a_torch_model() -> None:
    import torch

    model = read(
        model_kwargs={"torch_dtype": torch.bfloat16, "attn_implementation": "sdpa", "max_memory": {"cpu": "1GiB"}},
        pipeline_kwargs={"pad_token_id": 0, "batch_size": 3, "device": torch.device("cpu")},
    ).model
    assert (model.dtype, model.attn_implementation, model.device) == ("bfloat16", "sdpa", "cpu")
    assert model.model_kwargs == {"max_memory": {"cpu": "1GiB"}}


def test_quantization_of_the_chat_tutorial() -> None:
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype="float16",
        bnb_4bit_use_double_quant=True,
    )
    given = read(model_kwargs={"quantization_config": config}).model.model_kwargs["quantization_config"]
    # It is plain, so that it can be saved, and Transformers makes the same configuration of it.
    assert BitsAndBytesConfig.from_dict(json.loads(json.dumps(given))).to_dict() == config.to_dict()
    assert read(model_kwargs={"load_in_4bit": True}).model.load_in == "4bit"


@pytest.mark.parametrize(
    ("model_kwargs", "weight_format", "quantization"),
    [
        ({}, None, None),
        ({"load_in_8bit": True}, "int8", None),
        ({"load_in_8bit": False}, "fp32", None),
        ({"load_in_4bit": True}, "int4", None),
        ({"quantization_config": {"bits": 4}}, "int4", None),
        (
            {"quantization_config": {"bits": 4, "ratio": 0.8, "sym": True, "group_size": 64}},
            "int4",
            QuantizationOptions(ratio=0.8, sym=True, group_size=64),
        ),
        ({"quantization_config": {"bits": 4, "quant_method": "awq"}}, "int4", QuantizationOptions(awq=True)),
    ],
)
def test_weights_of_an_openvino_export(
    model_kwargs: dict[str, Any], weight_format: str | None, quantization: Any
) -> None:
    model = read(backend="openvino", model_kwargs=model_kwargs).model
    assert (model.weight_format, model.quantization) == (weight_format, quantization)


def test_a_configuration_object_of_optimum_means_the_same_as_its_values() -> None:
    from optimum.intel import OVWeightQuantizationConfig

    config = OVWeightQuantizationConfig(bits=4, ratio=0.8, sym=True, group_size=64)
    model = read(backend="openvino", model_kwargs={"quantization_config": config, "export": True}).model
    assert (model.weight_format, model.quantization) == (
        "int4",
        QuantizationOptions(ratio=0.8, sym=True, group_size=64),
    )
    model = read(backend="openvino", model_kwargs={"quantization_config": OVWeightQuantizationConfig(bits=8)}).model
    assert (model.weight_format, model.quantization) == ("int8", None)


def test_settings_travel_to_other_processes() -> None:
    settings = read(model_kwargs={"token": TOKEN}, pipeline_kwargs={"max_length": 20, "stop": "x"})
    assert pickle.loads(pickle.dumps(settings)) == settings
