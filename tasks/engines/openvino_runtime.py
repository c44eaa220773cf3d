"""OpenVINO GenAI underneath the engines: devices, options of a generation, the continuous batch, and found settings.

What OpenVINO GenAI cannot do is refused, never ignored. Its penalties of presence and frequency are those of other
engines as long as the scores of a model are above zero; scores below zero it moves the other way (2026.4).
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prefect.logging import get_logger

from prefect_huggingface.blocks import EngineOptions, GenerationOptions, LocalModel, ResponseFormat
from prefect_huggingface.tasks.engines.base import RequestError
from prefect_huggingface.tasks.engines.chat_templates import read_json
from prefect_huggingface.tasks.engines.cores import allowed_cores
from prefect_huggingface.tasks.engines.inputs import refuse_options
from prefect_huggingface.tasks.engines.openvino_scheduler import SchedulerSizes
from prefect_huggingface.tasks.engines.structured import genai_grammar
from prefect_huggingface.tasks.errors import EngineError
from prefect_huggingface.tasks.storage.adapters import LoraAdapter
from prefect_huggingface.tasks.storage.exports.exporter import EXACT_PROPERTIES
from prefect_huggingface.tasks.storage.files import write_file

logger = get_logger(__name__)

# The size that OpenVINO GenAI takes for speculative decoding by default.
DRAFT_TOKENS = 5
LOOKUP_NGRAM = 3
NO_TOKEN = 2**31 - 1
# A failed step leaves its requests half scheduled. Once they are cancelled, one step frees them.
CLEARING_STEPS = 4
# Settings that `tune_engine` finds for one model on one machine.
TUNINGS_FOLDER = "tunings"
ENGINE_SETTINGS = ("max_num_seqs", "max_num_batched_tokens", "prompt_lookup_tokens", "instances")


def compile_properties(model: LocalModel) -> dict[str, Any]:
    """Return the properties to compile a model with.

    Full precision that is asked for (`INFERENCE_PRECISION_HINT` of f32, or `EXECUTION_MODE_HINT` of ACCURACY) is meant
    for all of the model, so that the properties of `EXACT_PROPERTIES` go with it unless they are given.
    """
    return {**EXACT_PROPERTIES, **model.ov_config} if wants_full_precision(model.ov_config) else dict(model.ov_config)


def wants_full_precision(properties: Mapping[str, Any]) -> bool:
    """Return whether properties ask for full precision."""
    precision, mode = properties.get("INFERENCE_PRECISION_HINT"), properties.get("EXECUTION_MODE_HINT")
    return str(precision).lower() in ("f32", "fp32", "float32") or str(mode).upper() == "ACCURACY"


def choose_device(model: LocalModel) -> str:
    """Return OpenVINO's name of the device of a model.

    Raises:
        EngineError: If there is no such device.
    """
    device = "CPU" if model.device is None else model.device.upper()
    if device.lstrip("-").isdigit():
        device = "CPU" if int(device) < 0 else f"GPU.{device}"
    if device == "CPU":
        return device
    from openvino import Core

    available = Core().available_devices
    first = device.split(":")[0].split(".")[0]
    known = {name.split(".")[0] for name in available} | {"AUTO", "HETERO", "MULTI"}
    if first not in known or (device.startswith("GPU.") and device not in available):
        raise EngineError(
            f"`device` must be one of {', '.join(available)} here, got {model.device!r}. Choose one of them.",
            device=model.device,
        )
    return device


def kv_cache_precision(device: str, properties: dict[str, Any]) -> str:
    """Return the precision that keys and values are kept in, "u8" for instance."""
    given = properties.get("KV_CACHE_PRECISION")
    if given is not None:
        return str(given).lower()
    return "u8" if device == "CPU" else "f16"


def load_optimum_model(path: Path, model: LocalModel, auto_class: str) -> Any:
    """Load a model of Optimum on OpenVINO.

    Raises:
        EngineError: If OpenVINO cannot load the model with these settings.
    """
    device, properties = choose_device(model), compile_properties(model)
    try:
        from optimum import intel

        return getattr(intel, auto_class).from_pretrained(
            path,
            device=device,
            ov_config=properties,
            trust_remote_code=model.trust_remote_code,
            local_files_only=True,
            export=False,
            compile=True,
        )
    except ImportError as exc:
        raise EngineError(f"OpenVINO models of this kind need optimum-intel: {last_line(exc)}. Install it.") from exc
    except Exception as exc:
        raise loading_error(path, device, exc) from exc


def check_options(options: GenerationOptions, engine: EngineOptions, vocabulary: int = NO_TOKEN) -> None:
    """Refuse options that OpenVINO GenAI cannot honour. `vocabulary` is the number of tokens that have a score.

    Raises:
        RequestError: With the option and what to do instead.
    """
    unknown = [token for token in options.stop_token_ids if not 0 <= token < vocabulary]
    if unknown:
        raise RequestError(
            "invalid_option",
            f"`stop_token_ids` must be tokens of the model, below {vocabulary}, got {unknown[0]}. Correct it.",
        )
    if options.num_beams > 1:
        remedy = "Use `ignore_eos`, one beam, or the torch backend."
        refuse_options(options, ["min_new_tokens"], "does not work with beam search on OpenVINO", remedy)
    else:
        remedy = "Use `repetition_penalty`, `num_beams`, or the torch backend."
        refuse_options(options, ["no_repeat_ngram_size"], "works with beam search only on OpenVINO", remedy)
    # OpenVINO GenAI 2026.4 adds these to scores below zero instead of taking them off.
    names = [name for name in ("presence_penalty", "frequency_penalty") if getattr(options, name) < 0]
    remedy = "Use `repetition_penalty` below 1, or the torch backend."
    refuse_options(options, names, "below zero does not work on OpenVINO", remedy)
    if engine.prompt_lookup_tokens:
        remedy = "Load the model with `prompt_lookup_tokens=0` in its engine options."
        refuse_options(options, ["num_beams"], "does not work with `prompt_lookup_tokens`", remedy)
    if engine.draft_model is not None:
        # With a draft, OpenVINO GenAI 2026.4 draws from a wrong distribution and cuts formed answers short.
        # https://github.com/openvinotoolkit/openvino.genai/issues/4190 and 4081
        remedy = "Load the model without the draft, or with `prompt_lookup_tokens`."
        names = ["do_sample", "response_format", "num_beams"]
        refuse_options(options, names, "does not work with a `draft_model`", remedy)


def generation_config(
    options: GenerationOptions,
    end_ids: Collection[int],
    engine: EngineOptions,
    *,
    seed: int,
    new_tokens: int,
    least_tokens: int,
    response_format: ResponseFormat | None,
) -> Any:
    """Return the settings of OpenVINO GenAI for one sequence, or for all sequences of a beam search.

    Args:
        options: Options of the request, checked.
        end_ids: Tokens that end a sequence.
        engine: Options of the engine, for speculative decoding.
        seed: Seed of the sequence.
        new_tokens: Greatest number of tokens to come.
        least_tokens: Number of tokens before an end token is allowed.
        response_format: Form of what is to come.
    """
    from openvino_genai import GenerationConfig

    config = GenerationConfig()
    config.max_new_tokens = new_tokens
    # Where nothing ends the answer, there is nothing to hold off: GenAI 2026.4 would write outside of the scores. And a
    # form that is complete allows nothing but its end.
    config.min_new_tokens = 0 if options.ignore_eos or response_format is not None else least_tokens
    # Templates are applied before, exactly once.
    config.apply_chat_template = False
    config.ignore_eos = options.ignore_eos
    # Where none is given, the pipeline takes the end tokens of the model, which end beams all the same.
    ends = {NO_TOKEN} if options.ignore_eos else set(end_ids)
    if ends:
        config.eos_token_id, config.stop_token_ids = min(ends), ends
    config.repetition_penalty = options.repetition_penalty
    config.presence_penalty = options.presence_penalty
    config.frequency_penalty = options.frequency_penalty
    config.logprobs = 1 if options.logprobs else 0
    _set_search(config, options, seed)
    if response_format is not None:
        config.structured_output_config = genai_grammar(response_format)
    if engine.prompt_lookup_tokens:
        config.num_assistant_tokens = engine.prompt_lookup_tokens
        config.max_ngram_size = LOOKUP_NGRAM
    elif engine.draft_model is not None:
        config.num_assistant_tokens = DRAFT_TOKENS
    return config


def scoring_config() -> Any:
    """Return the settings that have OpenVINO GenAI give the log probability of every token of a prompt.

    It gives wrong ones beside requests without these settings, and none of what is cached (2026.4).
    """
    from openvino_genai import GenerationConfig

    config = GenerationConfig()
    config.max_new_tokens, config.logprobs = 1, 1
    config.echo = config.ignore_eos = True
    config.apply_chat_template = False
    return config


def _set_search(config: Any, options: GenerationOptions, seed: int) -> None:
    """Set how tokens are chosen: at random, by beams, or else the likeliest."""
    if options.do_sample:
        config.do_sample = True
        config.rng_seed = seed
        config.temperature = 1.0 if options.temperature is None else options.temperature
        for name in ("top_p", "top_k", "min_p"):
            if (value := getattr(options, name)) is not None:
                setattr(config, name, value)
    elif options.num_beams > 1:
        # Stop strings stay out: with them a beam search of OpenVINO GenAI 2026.4 fails or loses its best beams. Its
        # answers are cut afterwards.
        config.num_beams = options.num_beams
        config.num_return_sequences = options.n
        if options.no_repeat_ngram_size:
            config.no_repeat_ngram_size = options.no_repeat_ngram_size


class GenaiPipeline:
    """One `ContinuousBatchingPipeline`. Only one thread may use it."""

    def __init__(
        self,
        folder: Path,
        device: str,
        properties: dict[str, Any],
        sizes: SchedulerSizes,
        options: EngineOptions,
        adapters: Sequence[LoraAdapter] = (),
    ) -> None:
        """Load the OpenVINO model of a folder, with LoRA adapters that fit it.

        Raises:
            EngineError: If OpenVINO cannot load the model.
        """
        self._folder, self._device, self._properties = folder, device, properties
        self._sizes, self._options, self._adapters = sizes, options, adapters
        self._next_id = 0
        self._pipeline: Any = self._load()

    @property
    def tokenizer(self) -> Any:
        """Tokenizer of OpenVINO GenAI."""
        return self._pipeline.get_tokenizer()

    @property
    def has_work(self) -> bool:
        """Whether a step has something to do."""
        return self._pipeline is not None and bool(self._pipeline.has_non_finished_requests())

    @property
    def cache_usage(self) -> float:
        """Share of the KV cache that the last step used, 0 to 1."""
        return float(self._pipeline.get_metrics().cache_usage) / 100

    def add(self, tokens: Sequence[int], config: Any) -> Any:
        """Add a prompt and return its handle."""
        import numpy as np
        from openvino import Tensor

        self._next_id += 1
        return self._pipeline.add_request(self._next_id, Tensor(np.asarray([tokens], dtype=np.int64)), config)

    def add_with_images(self, text: str, images: Sequence[Any], config: Any) -> Any:
        """Add a prompt with the tags of images and return its handle.

        Args:
            text: Prompt with a tag in the place of each image.
            images: Tensors of [1, height, width, 3].
            config: How to generate.
        """
        self._next_id += 1
        return self._pipeline.add_request(self._next_id, text, list(images), config)

    def step(self) -> None:
        """Do one step of the model for everything that was added."""
        self._pipeline.step()

    def drain(self) -> bool:
        """Have the pipeline let go of all requests, whose handles must be cancelled, and return whether it did."""
        for _ in range(CLEARING_STEPS):
            with suppress(RuntimeError):
                if not self.has_work:
                    return True
                self._pipeline.step()
        return False

    def clear(self) -> None:
        """Make the pipeline usable again after a failed step. All handles must be cancelled before."""
        if self.drain():
            return
        logger.warning("The pipeline of %s cannot be cleared; loading the model again.", self._folder)
        self._pipeline = None  # which stays so where it cannot be loaded
        self._pipeline = self._load()

    def _load(self) -> Any:
        from openvino_genai import ContinuousBatchingPipeline

        config = self._sizes.scheduler_config(self._options)
        try:
            return ContinuousBatchingPipeline(self._folder, config, self._device, self._all_properties())
        except Exception as exc:
            raise loading_error(self._folder, self._device, exc) from exc

    def _all_properties(self) -> dict[str, Any]:
        properties = dict(self._properties)
        if self._adapters:
            properties["adapters"] = self._adapter_config()
        if self._options.draft_model is not None:
            from openvino_genai import draft_model

            properties["draft_model"] = draft_model(self._options.draft_model, self._device)
        elif self._options.prompt_lookup_tokens:
            properties["prompt_lookup"] = True
        return properties

    def _adapter_config(self) -> Any:
        """Return the adapters for OpenVINO GenAI.

        Its static mode keeps the weights of the model as they are, 4 or 8 bits, and adds the small products beside
        them. Its other modes fail on such weights, or do nothing in a continuous batch (2026.4).
        """
        import numpy as np
        from openvino import Tensor
        from openvino_genai import Adapter, AdapterConfig
        from safetensors.numpy import save

        config = AdapterConfig(AdapterConfig.Mode.MODE_STATIC)
        for adapter in self._adapters:
            # The scalings of single layers go into the matrices: OpenVINO GenAI has one for a whole adapter.
            tensors = {}
            for name, layer in adapter.read_layers().items():
                tensors[f"base_model.model.{name}.lora_A.weight"] = layer.a
                tensors[f"base_model.model.{name}.lora_B.weight"] = layer.b * np.float32(layer.scaling)
            config.add(Adapter(Tensor(np.frombuffer(save(tensors), dtype=np.uint8))), 1.0)
        return config


def loading_error(folder: Path, device: str, error: Exception) -> EngineError:
    """Return the error for a model that OpenVINO cannot load."""
    return EngineError(
        f"OpenVINO cannot load {str(folder)!r} on {device}: {last_line(error)} "
        "Check that the folder is complete and holds a model for this task, `device` and `ov_config`."
    )


def last_line(error: Exception) -> str:
    """Return what an exception of OpenVINO says, without the places in its sources."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = re.sub(r"^(\[[0-9:]+\] )?\S+\.[ch](pp|c|h)?:\d+:? ?", "", lines[-1]) if lines else ""
    said = said or type(error).__name__
    return said if said.endswith((".", "!", "?")) else said + "."


def machine_name() -> str:
    """Return what tells machines apart that are fast in different ways."""
    facts = [platform.machine(), _processor(), str(os.cpu_count()), version("openvino"), version("openvino-genai")]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def tuning_file(model: LocalModel, folder: Path) -> Path:
    """Return the file for the settings of a model folder on this machine."""
    weights = sorted((file.name, file.stat().st_size) for file in folder.glob("*.bin"))
    mark = hashlib.sha256(json.dumps([folder.name, model.device, weights]).encode()).hexdigest()[:16]
    return model.store_path / TUNINGS_FOLDER / f"{mark}-{machine_name()}.json"


def read_settings(model: LocalModel, folder: Path) -> dict[str, Any]:
    """Return the settings that were found, empty where there are none."""
    found = read_json(tuning_file(model, folder)).get("settings")
    return found if isinstance(found, dict) else {}


def write_settings(model: LocalModel, folder: Path, settings: Mapping[str, Any], facts: Mapping[str, Any]) -> Path:
    """Keep settings for this machine, with the facts that they rest on."""
    path = tuning_file(model, folder)
    write_file(path, (json.dumps({"settings": settings, **facts}, indent=2) + "\n").encode())
    return path


def with_settings(model: LocalModel, settings: Mapping[str, Any]) -> LocalModel:
    """Return a model with settings put under what its user gives.

    Where the user asks for full precision, only the sizes are taken over. Guessing from the prompt is left out where it
    would rule out what the user wants: beams, or a draft; and several processes where this one may use fewer cores.
    """
    sizes = {name: settings[name] for name in ENGINE_SETTINGS if name in settings}
    if model.engine.draft_model is not None or model.options.num_beams > 1:
        sizes.pop("prompt_lookup_tokens", None)
    if sizes.get("instances", 1) > len(allowed_cores()):
        del sizes["instances"]
    properties = {name: value for name, value in settings.items() if name not in ENGINE_SETTINGS}
    if wants_full_precision(model.ov_config):
        properties = {}
    given = {name: getattr(model.engine, name) for name in model.engine.model_fields_set}
    given = {name: value for name, value in given.items() if value is not None or name not in ENGINE_SETTINGS}
    return model.model_copy(
        update={"engine": EngineOptions(**{**sizes, **given}), "ov_config": {**properties, **model.ov_config}}
    )


def apply_tuning(model: LocalModel, folder: Path) -> LocalModel:
    """Return a model with what was found for it on this machine, unless it is told not to use it."""
    if model.backend != "openvino" or model.task != "text-generation" or not model.engine.tuned:
        return model
    settings = read_settings(model, folder)
    return with_settings(model, settings) if settings else model


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    facts = sorted({line for line in lines if line.startswith(("model name", "flags"))})
    return "\n".join(facts)
