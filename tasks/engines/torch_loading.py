"""Loads Transformers models and tokenizers from a snapshot: safe sources only, on the device that was asked for."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Any

from prefect.logging import get_logger

from prefect_huggingface.blocks import LocalModel
from prefect_huggingface.tasks.engines.inputs import vocabulary_of
from prefect_huggingface.tasks.errors import EngineError, HuggingFaceTaskError, ModelSourceError
from prefect_huggingface.tasks.storage.adapters import LoraAdapter, check_fit, get_adapters
from prefect_huggingface.tasks.storage.exports.child import find_conflict

logger = get_logger(__name__)


def load_torch_model(path: Path, model: LocalModel, auto_class: str) -> Any:
    """Load the model of a snapshot, in evaluation mode, with a class of Transformers (`AutoModelForCausalLM`).

    Raises:
        ModelSourceError: If an adapter does not fit.
        EngineError: If the settings do not fit this machine or this model, or the folder holds no weights that may be
            loaded.
    """
    adapters = get_adapters(model)
    check_fit(adapters, path)
    arguments = _placement(model) | _quantization(model)
    started = time.perf_counter()
    try:
        import transformers

        source = _source(model)
        config = transformers.AutoConfig.from_pretrained(path, **source)
        if not model.allow_pickle:
            source["use_safetensors"] = True
        arguments["dtype"] = _data_type(model, config, arguments)
        if model.attn_implementation is not None:
            arguments["attn_implementation"] = model.attn_implementation
        device = arguments.pop("device", None)
        loaded, found = getattr(transformers, auto_class).from_pretrained(
            path, output_loading_info=True, **source, **{**arguments, **model.model_kwargs}
        )
        # Nothing is computed with the pooler of an encoder.
        unused = "pooler." if model.task == "feature-extraction" else None
        missing = sorted(name for name in found["missing_keys"] if not (unused and name.startswith(unused)))
        if missing:  # Transformers would make them up
            raise EngineError(
                f"{model.model_id!r} lacks {len(missing)} weights of the model, {', '.join(missing[:3])} for instance. "
                "Download it again, or choose another model."
            )
        for adapter in adapters:
            _merge(loaded, adapter)
        loaded = loaded if device is None else loaded.to(device)
        avoid_attention_plans(loaded)
    except HuggingFaceTaskError:
        raise
    except Exception as exc:
        raise EngineError(_loading_message(path, model, exc)) from exc
    logger.info(
        "Loaded %s with torch on %s in %s in %.1f s.",
        model.model_id, loaded.device, loaded.dtype, time.perf_counter() - started,
    )  # fmt: skip
    return loaded.eval()


def load_tokenizer(path: Path, model: LocalModel, auto_class: str = "AutoTokenizer") -> Any:
    """Load the tokenizer of a snapshot, or its processor with another class of Transformers.

    Raises:
        EngineError: If there is none that can be loaded.
    """
    try:
        import transformers

        return getattr(transformers, auto_class).from_pretrained(path, **_source(model))
    except Exception as exc:
        raise EngineError(_loading_message(path, model, exc)) from exc


def resolve_device(device: str | None) -> str:
    """Return the torch device for a device of a block: `-1` is the CPU, `n` the n-th GPU, None the best there is.

    Raises:
        EngineError: If the device is unknown or not there. The message names those that are.
    """
    import torch

    there = available_devices()
    if device is None:
        return there[1] if len(there) > 1 else there[0]
    name = device.strip().lower()
    if name == "-1":
        return "cpu"
    accelerator = getattr(torch.accelerator.current_accelerator(), "type", "cuda")
    if name.isdecimal():
        name = f"{accelerator}:{name}"
    elif name in ("gpu", "cuda", "xpu"):
        name = f"{accelerator if name == 'gpu' else name}:0"
    elif name.startswith("gpu."):
        name = f"{accelerator}:{name[4:]}"
    if name not in there:
        raise EngineError(
            f"`device` must be one of {', '.join(there)} (or -1 for the CPU, n for the n-th GPU), got {device!r}. "
            "Choose one of them."
        )
    return name


def available_devices() -> list[str]:
    """Return the torch devices of this machine, the CPU first."""
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return ["cpu"]
    if accelerator.type == "mps":
        return ["cpu", "mps"]
    return ["cpu", *(f"{accelerator.type}:{index}" for index in range(torch.accelerator.device_count()))]


def input_device(loaded: Any) -> Any:
    """Return the device that takes the token ids of a model, which may be spread over several or kept on disk."""
    # Models of Optimum have no embeddings of torch.
    embeddings = loaded.get_input_embeddings() if hasattr(loaded, "hf_device_map") else None
    hook = getattr(embeddings, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    if device is not None:
        import torch

        return torch.device(device)
    return loaded.device if embeddings is None else embeddings.weight.device


def input_tokens(loaded: Any) -> int | None:
    """Return how many tokens a model takes, or None where it does not say."""
    try:
        return int(loaded.get_input_embeddings().num_embeddings)
    except (AttributeError, NotImplementedError):  # models of Optimum
        return vocabulary_of(loaded.config.to_dict())


def check_device(loaded: Any) -> None:
    """Raise the error of a GPU that answers nobody any more, as after a failed assertion on it."""
    if (device := input_device(loaded)).type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def avoid_attention_plans(loaded: Any) -> None:
    """Keep torch from the attention of cuDNN in this process, where a model runs on a GPU of NVIDIA.

    It makes a plan for every length that it never saw, which took 1.6 ms per layer on an H200, and each step of a batch
    has a new length. The other kernels of torch need none.
    """
    if input_device(loaded).type == "cuda":
        import torch

        torch.backends.cuda.enable_cudnn_sdp(False)


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end an answer, by the generation settings of the model or else by its tokenizer."""
    for source in (getattr(model, "generation_config", None), getattr(model, "config", None), tokenizer):
        ends = getattr(source, "eos_token_id", None)
        if ends is not None:
            return frozenset([ends] if isinstance(ends, int) else ends)
    return frozenset()


def pad_token(tokenizer: Any, ends: frozenset[int]) -> int:
    """Return a token to fill up rows with. The attention never sees it."""
    pad = getattr(tokenizer, "pad_token_id", None)
    return pad if isinstance(pad, int) else min(ends, default=0)


def _merge(loaded: Any, adapter: LoraAdapter) -> None:
    """Add an adapter to the weights of a model."""
    import torch

    for name, layer in adapter.read_layers().items():
        try:
            weight = loaded.get_submodule(name).weight
        except AttributeError:
            raise ModelSourceError(
                f"Adapter {adapter.name!r} changes {name!r}, which {type(loaded).__name__} lacks. "
                "Use it with the class of model that it was made for."
            ) from None
        if weight.is_meta:
            raise EngineError(
                f"{name!r} is kept on disk by `device_map`, and an adapter cannot change it there. Use `device`."
            )
        added = torch.from_numpy(layer.b).to(weight.device) @ torch.from_numpy(layer.a).to(weight.device)
        # Layers of GPT-2 keep their weights as [inputs, outputs].
        added = added.T if adapter.config.get("fan_in_fan_out") else added
        with torch.no_grad():
            weight.copy_(weight.float() + layer.scaling * added)


def _source(model: LocalModel) -> dict[str, Any]:
    # The files are here already; nothing may be asked of the Hub.
    return {"local_files_only": True, "trust_remote_code": model.trust_remote_code}


def _require(package: str, setting: str, way_out: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise EngineError(
            f"{setting} needs {package}, which is not installed. Install it with pip install {package}, or {way_out}."
        )


def _placement(model: LocalModel) -> dict[str, Any]:
    if model.device_map is not None:
        _require("accelerate", f"`device_map` ({model.device_map!r})", "use `device`")
        return {"device_map": model.device_map}
    device = resolve_device(model.device)
    # Quantized weights are placed while they are loaded and cannot be moved afterwards.
    return {"device": device} if model.load_in is None else {"device_map": {"": device}}


def _quantization(model: LocalModel) -> dict[str, Any]:
    if model.load_in is None:
        return {}
    _require("bitsandbytes", f"`load_in` ({model.load_in!r})", "leave `load_in` out")
    from transformers import BitsAndBytesConfig

    bits = BitsAndBytesConfig(load_in_4bit=model.load_in == "4bit", load_in_8bit=model.load_in == "8bit")
    return {"quantization_config": bits}


def _data_type(model: LocalModel, config: Any, arguments: dict[str, Any]) -> Any:
    """Return the data type: the one asked for, or that of the checkpoint."""
    import torch

    if model.dtype is not None:
        return model.dtype if model.dtype == "auto" else getattr(torch, model.dtype)
    is_half = getattr(config, "dtype", None) in (torch.float16, "float16")
    # Many operations have no fast float16 kernel on a CPU.
    return torch.float32 if is_half and arguments.get("device") == "cpu" else "auto"


def _loading_message(path: Path, model: LocalModel, exc: Exception) -> str:
    cause = f"{type(exc).__name__}: {exc}"
    if "trust_remote_code" in cause:
        return (
            f"The model in {str(path)!r} needs Python code that comes with it, and that is not allowed. "
            "Set `trust_remote_code=True` if you trust the source."
        )
    # A package that cannot be imported has nothing to do with the model.
    conflict = find_conflict() if isinstance(exc, (ImportError, RuntimeError)) else None
    if conflict is not None:
        return conflict
    return (
        f"The model in {str(path)!r} could not be loaded for task {model.task!r}: {cause}. "
        "Check that the folder is complete and that the model is one for this task."
    )
