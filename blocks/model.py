"""Which model runs, on what, and how."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, HttpUrl, ValidationInfo, field_validator

from prefect_huggingface.blocks.base import ConfigurationBlock
from prefect_huggingface.blocks.credentials import HuggingFaceCredentials
from prefect_huggingface.blocks.embedding import EmbeddingOptions
from prefect_huggingface.blocks.options import GenerationOptions
from prefect_huggingface.blocks.quantization import QuantizationOptions, WeightFormat
from prefect_huggingface.blocks.store import ModelStore

Task = Literal[
    "text-generation", "text2text-generation", "summarization", "translation", "image-text-to-text",
    "feature-extraction", "text-ranking",
]  # fmt: skip
Backend = Literal["openvino", "torch"]
AttentionImplementation = Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"]
Dtype = Literal["auto", "float32", "float16", "bfloat16"]

REPO_ID = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)?$")
PLACEMENT_KEYS = ("device", "device_map")
TASKS: tuple[str, ...] = get_args(Task)
# Options of an engine that guesses tokens before the model computes them.
GUESSING = ("draft_model", "prompt_lookup_tokens")
VECTOR_TASKS: tuple[str, ...] = ("feature-extraction", "text-ranking")


class EngineOptions(BaseModel):
    """Sizes of a loaded model. What is left empty is chosen from the model and the free memory."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_num_seqs: int | None = Field(
        default=None, ge=1, title="Sequences", description="Number of prompts that one process generates side by side."
    )
    max_num_batched_tokens: int | None = Field(
        default=None, ge=1, title="Batched tokens", description="Number of tokens that one step of the model handles."
    )
    cache_size_gb: float | None = Field(
        default=None, gt=0, title="KV cache (GB)",
        description="Room for the KV cache in units of 2^30 bytes, of all processes together.",
    )  # fmt: skip
    enable_prefix_caching: bool = Field(
        default=True, title="Prefix caching", description="Compute a beginning that several prompts share once."
    )
    instances: int | None = Field(
        default=None, ge=1, title="Processes",
        description="Number of processes that share the cores and the requests, each with the model in its memory: one "
        "for each NUMA node of a large machine. For text generation with OpenVINO on a CPU.",
    )  # fmt: skip
    draft_model: str | None = Field(
        default=None,
        title="Draft model",
        description="Folder of a small OpenVINO model with the same tokenizer, for speculative decoding.",
    )
    tuned: bool = Field(
        default=True,
        title="Tuned settings",
        description="Use what `tune_engine` found for this model on this machine, where nothing else is given.",
    )
    prompt_lookup_tokens: int | None = Field(
        default=None, ge=0, title="Prompt lookup",
        description="Number of tokens to guess from the prompt in each step, 0 for none also where tuning found some.",
    )  # fmt: skip

    @property
    def processes(self) -> int:
        """Number of processes with the model in their memory."""
        return self.instances or 1


class Adapter(BaseModel):
    """LoRA adapter of PEFT, put onto a model while it is loaded."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    repo_or_folder: str = Field(
        title="Adapter", description="Hub id or folder with `adapter_config.json` and `adapter_model.safetensors`."
    )
    revision: str | None = Field(
        default=None, title="Revision", description="Branch, tag or commit of the Hub repository."
    )
    scale: float = Field(default=1.0, title="Scale", description="Factor of what the adapter adds.")

    @field_validator("repo_or_folder")
    @classmethod
    def _check_place(cls, value: str) -> str:
        if _is_path(value):
            return os.path.abspath(os.path.expanduser(value))
        if not is_repo_id(value):
            raise ValueError(
                f"`repo_or_folder` must be a Hub id such as 'organisation/name' or an existing folder, got {value!r}. "
                "Correct it."
            )
        return value

    @property
    def is_local(self) -> bool:
        """Whether it is a folder on this machine."""
        return os.path.isabs(self.repo_or_folder)

    @property
    def name(self) -> str:
        """Last part of its id or folder."""
        return self.repo_or_folder.rstrip("/").rpartition("/")[2]


class LocalModel(ConfigurationBlock):
    """Hugging Face model that runs on this machine, with its backend, device and generation defaults.

    Example:
        Load a saved model and ask it:
        ```python
        from prefect_huggingface.blocks import LocalModel

        model = LocalModel.load("BLOCK_NAME")
        print(model.model_id, model.backend)
        ```
    """

    _block_type_name = "Hugging Face Local Model"
    _block_type_slug = "hugging-face-local-model"
    _documentation_url = HttpUrl("https://huggingface.co/docs/optimum-intel/openvino/export")

    model_id: str = Field(
        title="Model",
        description=(
            "Hub id, 'HuggingFaceTB/SmolLM2-135M-Instruct' say, a folder with a model or an OpenVINO IR, or a GGUF "
            "file."
        ),
    )
    revision: str | None = Field(
        default=None,
        title="Revision",
        description="Branch, tag or commit of the Hub repository. A full commit needs no network once it is here.",
    )
    task: Task = Field(default="text-generation", title="Task", description="What the model is for.")
    backend: Backend = Field(
        default="openvino", title="Backend", description="What runs the model: OpenVINO, or PyTorch with Transformers."
    )
    weight_format: WeightFormat | None = Field(
        default=None,
        title="Weight format",
        description="Format of the weights of the OpenVINO export, int8 when left empty. The torch backend has none.",
    )
    quantization: QuantizationOptions | None = Field(
        default=None, title="Quantization", description="How the weights are quantized, where the defaults do not fit."
    )
    adapters: list[Adapter] = Field(
        default_factory=list,
        title="Adapters",
        description="LoRA adapters of PEFT that are put onto the model when it is loaded; no export holds them.",
    )
    device: str | None = Field(
        default=None,
        title="Device",
        description="Device such as 'CPU', 'GPU', 'cuda:0' or 'cpu'; -1 is the CPU and n the n-th GPU.",
    )
    device_map: str | dict[str, Any] | None = Field(
        default=None,
        title="Device map",
        description="How Accelerate spreads a torch model over devices, 'auto' for instance. Excludes the device.",
    )
    dtype: Dtype | None = Field(
        default=None, title="Data type", description="Data type of the weights of the torch backend."
    )
    load_in: Literal["8bit", "4bit"] | None = Field(
        default=None, title="Load in", description="Quantize a torch model with bitsandbytes while it is loaded."
    )
    attn_implementation: AttentionImplementation | None = Field(
        default=None, title="Attention", description="Implementation of the attention of the torch backend."
    )
    ov_config: dict[str, Any] = Field(
        default_factory=dict,
        title="OpenVINO properties",
        description="Properties for compiling the OpenVINO model, such as 'KV_CACHE_PRECISION'.",
    )
    engine: EngineOptions = Field(
        default_factory=EngineOptions, title="Engine", description="Sizes of the loaded model."
    )
    model_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        title="More arguments",
        description="Further arguments for loading a torch model with Transformers.",
    )
    chat_template: Literal["auto", "always", "never"] = Field(
        default="auto",
        title="Chat template",
        description=(
            "Whether a plain prompt is put into the model's chat template: when the model has one and the prompt does "
            "not contain it yet, always, or never."
        ),
    )
    trust_remote_code: bool = Field(
        default=False, title="Trust remote code", description="Run Python code that comes with the model. A risk."
    )
    allow_pickle: bool = Field(
        default=False,
        title="Allow pickle",
        description="Load weights in pickle format where there are no others. A risk.",
    )
    offline: bool = Field(
        default=False, title="Offline", description="Use what is on this machine and never ask the Hub."
    )
    options: GenerationOptions = Field(
        default_factory=GenerationOptions, title="Generation", description="Defaults for generating text."
    )
    embedding: EmbeddingOptions = Field(
        default_factory=EmbeddingOptions,
        title="Vectors and scores",
        description="How texts become vectors or scores, where the files of the model should not decide it.",
    )
    credentials: HuggingFaceCredentials | None = Field(
        default=None, title="Credentials", description="Token and Hub address."
    )
    store: ModelStore | None = Field(
        default=None, title="Store", description="Where models lie. When left empty, in the user's caches."
    )

    @field_validator("model_id")
    @classmethod
    def _check_model_id(cls, model_id: str) -> str:
        if _is_path(model_id):
            return os.path.abspath(os.path.expanduser(model_id))
        if not is_repo_id(model_id):
            raise ValueError(
                f"`model_id` must be a Hub id such as 'organisation/name' or an existing folder or GGUF file, "
                f"got {model_id!r}. Correct it."
            )
        return model_id

    @field_validator("weight_format")
    @classmethod
    def _weight_format_fits(cls, weight_format: Any, info: ValidationInfo) -> Any:
        if info.data.get("backend") == "torch" and weight_format is not None:
            raise ValueError(
                f"`weight_format` is for the OpenVINO backend, got {weight_format!r} with backend 'torch'. "
                "Leave it empty (None), and use `dtype` or `load_in`."
            )
        return weight_format

    @field_validator("quantization")
    @classmethod
    def _quantization_fits(cls, value: QuantizationOptions | None, info: ValidationInfo) -> QuantizationOptions | None:
        weight_format = info.data.get("weight_format")
        if value and info.data.get("backend") == "torch" and (given := value.model_dump(exclude_defaults=True)):
            raise ValueError(
                f"`quantization` is for the OpenVINO backend, got {given!r} with backend 'torch'. "
                "Leave it out, and use `load_in`."
            )
        if value is None or weight_format not in (None, "fp32", "fp16", "int8"):
            return value
        if value.quant_mode is None and value.ratio not in (None, 1.0):
            raise ValueError(
                f"`ratio` is for 4-bit formats, got {value.ratio!r} with weight format {weight_format or 'int8'!r}. "
                "Leave it out."
            )
        return value

    @field_validator("adapters")
    @classmethod
    def _adapters_fit(cls, value: list[Adapter], info: ValidationInfo) -> list[Adapter]:
        names = [adapter.name for adapter in value]
        if len(set(names)) < len(names):
            raise ValueError(f"`adapters` must have different names, got {names!r}. Rename a folder.")
        task = info.data.get("task")
        if value and info.data.get("backend") == "openvino" and task != "text-generation":
            raise ValueError(
                f"`adapters` work with task 'text-generation' on OpenVINO, got task {task!r}. Set `backend='torch'`."
            )
        return value

    @field_validator("device", mode="before")
    @classmethod
    def _number_is_an_index(cls, device: Any) -> Any:
        return str(device) if isinstance(device, int) and not isinstance(device, bool) else device

    # A field validator and not a model validator: Prefect's `load(validate=False)` needs errors with a location.
    @field_validator("device_map")
    @classmethod
    def _one_placement(cls, device_map: Any, info: ValidationInfo) -> Any:
        if device_map is not None and info.data.get("device") is not None:
            raise ValueError(
                f"`device` ({info.data['device']!r}) and `device_map` ({device_map!r}) exclude each other. Remove one."
            )
        if device_map is not None and info.data.get("backend") == "openvino":
            raise ValueError(
                f"`device_map` is for the torch backend, got {device_map!r}. Use `device`, 'CPU' or 'GPU' for instance."
            )
        return device_map

    @field_validator("dtype", "load_in", "attn_implementation")
    @classmethod
    def _only_for_torch(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None and info.data.get("backend") == "openvino":
            raise ValueError(
                f"`{info.field_name}` is for the torch backend, got {value!r}. "
                "Use `weight_format` and `ov_config`, or set `backend='torch'`."
            )
        return value

    @field_validator("load_in")
    @classmethod
    def _adapters_are_merged(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("adapters"):
            raise ValueError(f"`load_in` ({value!r}) does not work with `adapters`. Leave one of them out.")
        return value

    @field_validator("ov_config")
    @classmethod
    def _only_for_openvino(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if value and info.data.get("backend") == "torch":
            raise ValueError(f"`ov_config` is for the OpenVINO backend, got {value!r}. Leave it empty.")
        return value

    @field_validator("engine")
    @classmethod
    def _engine_fits(cls, value: EngineOptions, info: ValidationInfo) -> EngineOptions:
        backend, task = info.data.get("backend"), info.data.get("task")
        fits = backend == "openvino" and task in ("text-generation", "image-text-to-text")
        asked = {"instances": value.processes > 1, **{name: getattr(value, name) for name in GUESSING}}
        wrong = next((name for name, is_set in asked.items() if is_set), None)
        if wrong is not None and not fits:
            raise ValueError(
                f"`{wrong}` must be {'empty' if wrong in GUESSING else 1} with backend {backend!r} and task {task!r}, "
                f"got {getattr(value, wrong)!r}. Only text generation with OpenVINO has it."
            )
        return value

    @field_validator("model_kwargs")
    @classmethod
    def _no_hidden_placement_or_token(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        for key in (*PLACEMENT_KEYS, "token", "use_auth_token", "trust_remote_code", "revision", "cache_dir"):
            if key in value:
                raise ValueError(f"`model_kwargs` must not hold {key!r}. Use the field of the block for it.")
        if value and info.data.get("backend") == "openvino":
            raise ValueError(f"`model_kwargs` is for the torch backend, got {sorted(value)!r}. Use `ov_config`.")
        return value

    @property
    def is_local(self) -> bool:
        """Whether the model is a folder or a GGUF file on this machine and not a repository of the Hub."""
        return os.path.isabs(self.model_id)

    @property
    def is_gguf(self) -> bool:
        """Whether the model is a GGUF file on this machine."""
        return self.model_id.lower().endswith(".gguf") and not os.path.isdir(self.model_id)

    @property
    def store_path(self) -> Path:
        """Folder of the exports of the store."""
        return self.get_store().folder

    def get_store(self) -> ModelStore:
        """Return the store of the block, or the default store."""
        return self.store or ModelStore()

    def get_credentials(self) -> HuggingFaceCredentials:
        """Return the credentials of the block, or those of the default Hub without a token of their own."""
        return self.credentials or HuggingFaceCredentials()


def is_repo_id(text: str) -> bool:
    """Tell whether a text has the form of the id of a Hub repository."""
    return bool(REPO_ID.match(text)) and ".." not in text and "--" not in text


def _is_path(model_id: str) -> bool:
    """Tell places on this machine from Hub ids: those are not absolute, relative to a dot, a folder or a GGUF file."""
    if model_id.startswith(("/", "./", "../", "~")) or model_id.lower().endswith(".gguf"):
        return True
    return bool(model_id) and Path(model_id).is_dir()
