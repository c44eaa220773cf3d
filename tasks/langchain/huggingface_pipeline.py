"""`HuggingFacePipeline`: the LangChain LLM of a model on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field, PrivateAttr

from prefect_huggingface.blocks import GenerationOptions, LocalModel
from prefect_huggingface.tasks.engines.base import Engine
from prefect_huggingface.tasks.errors import EngineError, SettingsError
from prefect_huggingface.tasks.langchain.base_llm import EngineLLM
from prefect_huggingface.tasks.langchain.kwargs import (
    GENERATION_NAMES,
    TOKEN_NAMES,
    Generation,
    Settings,
    flat_settings,
    merge_generation,
    pipeline_settings,
    read_generation,
    read_settings,
    template_use,
)

# Fields of the block that do not change what the model says, or are secret.
NOT_IDENTIFYING = {"credentials", "store", "offline", "options"}


class HuggingFacePipeline(EngineLLM):
    """LangChain LLM of a Hugging Face model that runs on this machine.

    It has the arguments and methods of the class of the same name in `langchain-huggingface`. Text is greedy unless
    sampling is asked for, stop strings end it early and are cut off, and the prompt is not part of it.

    Example:
        Load a model by its id, and ask it in a chain:
        ```python
        from langchain_core.prompts import PromptTemplate
        from prefect_huggingface.tasks.langchain import HuggingFacePipeline

        llm = HuggingFacePipeline.from_model_id(
            model_id="gpt2", task="text-generation", pipeline_kwargs={"max_new_tokens": 10}
        )
        chain = PromptTemplate.from_template("Question: {question}") | llm
        print(chain.invoke({"question": "What is the capital of France?"}))
        ```

    Attributes:
        pipeline: Pipeline of Transformers to use, or one that shows the tokenizer and the settings of `model`.
        model: Model to load. Its engine is shared with all other users of the same model in this process.
        model_id: Id or folder of the model.
        model_kwargs: What was given for loading the model, without any token.
        pipeline_kwargs: Settings for generating text. What is set later counts from the next call on.
    """

    pipeline: Any = Field(default=None, repr=False, exclude=True)
    model: LocalModel | None = None
    model_id: str | None = None
    model_kwargs: dict[str, Any] | None = None
    pipeline_kwargs: dict[str, Any] | None = None

    _base: Generation = PrivateAttr()
    _images: tuple[str, ...] = PrivateAttr(default=())
    _known: tuple[dict[str, Any], Generation] | None = PrivateAttr(default=None)

    def __init__(
        self,
        *,
        pipeline: Any = None,
        model: LocalModel | None = None,
        model_id: str | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        pipeline_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Make an LLM of a pipeline of Transformers, of a block, or of the id of a model for text generation.

        With a block, a `model_id` and `model_kwargs` change its fields, as the configurable fields of LangChain do.
        """
        # A copy with other fields, which LangChain makes, gets the view of the first one.
        pipeline = None if isinstance(pipeline, LoadedPipeline) else pipeline
        images: tuple[str, ...] = ()
        if pipeline is not None:
            if model is not None or model_kwargs:
                raise SettingsError("`pipeline` excludes `model` and `model_kwargs`. Give one of them.")
            base = pipeline_settings(pipeline)
            kwargs.setdefault("batch_size", getattr(pipeline, "_batch_size", None))
            model_id = model_id or str(pipeline.model.name_or_path)
        elif model is None and not model_id:
            raise SettingsError("One of `pipeline`, `model` and `model_id` must be given. Give one of them.")
        else:
            model, base, settings = _read_model(model, model_id, model_kwargs, pipeline_kwargs)
            images, model_id = settings.images, model_id or model.model_id
            kwargs.setdefault("batch_size", settings.batch_size)
        fields = {
            "pipeline": pipeline,
            "model": model,
            "model_id": model_id,
            "model_kwargs": _without_token(model_kwargs),
            "pipeline_kwargs": _without_token(pipeline_kwargs),
        }
        super().__init__(**fields, **kwargs)
        self._base, self._images = base, images
        if model is not None:
            self.pipeline = LoadedPipeline(self)
        assert self.generation  # wrong settings are an error here, not at the first call

    @classmethod
    def from_model_id(
        cls,
        model_id: str,
        task: str,
        backend: str = "default",
        device: int | str | None = None,
        device_map: str | dict[str, Any] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        pipeline_kwargs: Mapping[str, Any] | None = None,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a model and return the LLM on it.

        Args:
            model_id: Hub id, folder of a checkpoint, or folder of an OpenVINO model.
            task: What the model is for.
            backend: "default" or "torch" for PyTorch, or "openvino".
            device: -1 for the CPU, n for the n-th GPU, or a name such as "cpu" or "GPU".
            device_map: How Accelerate spreads the model, "auto" for instance. Excludes `device`.
            model_kwargs: Arguments for loading the model. Settings for generating text are understood here too.
            pipeline_kwargs: Settings for generating text.
            batch_size: Number of prompts of one call that are generated side by side.
            kwargs: Arguments of every LangChain LLM, such as `callbacks`.

        Raises:
            SettingsError: If an argument is unknown, or does not go with another one. It is a `ValueError`.
            EngineError: If the model cannot be loaded.
        """
        settings = read_settings(model_id, task, backend, device, device_map, model_kwargs, pipeline_kwargs)
        _check_device(settings.model)
        llm = cls(
            model=settings.model.model_copy(update={"options": GenerationOptions()}),
            model_id=model_id,
            model_kwargs=model_kwargs,
            pipeline_kwargs=pipeline_kwargs or {},
            batch_size=batch_size or settings.batch_size,
            **kwargs,
        )
        llm.get_engine()
        return llm

    def get_engine(self) -> Engine:
        """Return the engine of the model; load it first where needed."""
        from prefect_huggingface.tasks.engines.registry import load_engine, load_pipeline

        return load_pipeline(self.pipeline) if self.model is None else load_engine(self.model)

    @property
    def task(self) -> str:
        """Task of the model."""
        return str(self.pipeline.task if self.model is None else self.model.task)

    @property
    def generation(self) -> Generation:
        """Settings for generating text, as `model_kwargs` and `pipeline_kwargs` say them now."""
        given = dict(flat_settings({**(self.model_kwargs or {}), **(self.pipeline_kwargs or {})}))
        if self._known is None or self._known[0] != given:
            # What loads a model was checked when it was loaded.
            names = GENERATION_NAMES if self.model is not None else set(given)
            settings = read_generation({name: given[name] for name in given if name in names}, self.task)
            self._known = (dict(given), merge_generation(self._base, settings))
        return self._known[1]

    @property
    def request_defaults(self) -> dict[str, Any]:
        """Fields of every request: images that were given for all, and a template set on the tokenizer."""
        fields: dict[str, Any] = {"images": self._images} if self._images else {}
        template = self.pipeline.new_template if isinstance(self.pipeline, LoadedPipeline) else None
        return {**fields, "template": template} if template else fields

    @property
    def _llm_type(self) -> str:
        return "huggingface_pipeline"

    @property
    def _model_name(self) -> str:
        return str(self.model_id)

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        generation = self.generation
        values: dict[str, Any] = {
            "model_id": self.model_id,
            "model_kwargs": self.model_kwargs,
            "pipeline_kwargs": self.pipeline_kwargs,
            "max_length": generation.max_length,
            "min_length": generation.min_length,
            **generation.options.model_dump(mode="json", exclude_unset=True),
            **self.request_defaults,
        }
        if self.model is not None:
            values |= self.model.model_dump(mode="json", exclude=NOT_IDENTIFYING)
        else:
            loaded = self.pipeline.model
            template = getattr(self.pipeline.tokenizer, "chat_template", None)
            values |= {"task": self.task, "dtype": str(loaded.dtype), "chat_template": template}
            values["config"] = loaded.config.to_json_string(use_diff=True)
        return {name: value for name, value in values.items() if value is not None}

    def __getstate__(self) -> dict[Any, Any]:
        if self.model is None and type(self.pipeline.model).__module__.startswith("optimum."):
            raise SettingsError(
                "A pipeline with an OpenVINO model cannot be pickled. Use `from_model_id` with `backend='openvino'`."
            )
        return super().__getstate__()


class LoadedPipeline:
    """What code for pipelines of Transformers reads of a model: it is loaded when it is first asked for.

    Attributes:
        task: Task of the model.
        device: Where the model runs.
        model: `config`, `generation_config`, `device` and `name_or_path` of the model.
        tokenizer: Tokenizer of Transformers. A chat template that is set on it is used.
    """

    def __init__(self, llm: HuggingFacePipeline) -> None:
        assert llm.model is not None
        self._llm = llm
        self.task = str(llm.model.task)
        self._parts: dict[str, Any] = {}

    def __call__(self, texts: str | list[str], **kwargs: Any) -> list[Any]:
        """Return what a pipeline returns: for each text a list with one answer."""
        rows = self._llm.generate([texts] if isinstance(texts, str) else list(texts), **kwargs).generations
        name = "generated_text"
        found = [[{name: generation.text} for generation in row] for row in rows]
        return found[0] if isinstance(texts, str) else found

    @property
    def device(self) -> Any:
        """Where the model runs."""
        import torch

        from prefect_huggingface.tasks.engines.torch_loading import resolve_device

        block = self._llm.model
        assert block is not None
        return torch.device(resolve_device(block.device) if block.backend == "torch" else "cpu")

    @property
    def model(self) -> LoadedModel:
        """Configuration of the model."""
        if "model" not in self._parts:
            self._parts["model"] = LoadedModel(self._folder, self.device, str(self._llm.model_id))
        return self._parts["model"]  # type: ignore[no-any-return]

    @property
    def tokenizer(self) -> Any:
        """Tokenizer of the model, as Transformers loads it."""
        if "tokenizer" not in self._parts:
            from transformers import AutoTokenizer

            self._parts["tokenizer"] = AutoTokenizer.from_pretrained(self._folder, local_files_only=True)
            self._parts["template"] = self._parts["tokenizer"].chat_template
        return self._parts["tokenizer"]

    @property
    def new_template(self) -> str | None:
        """Chat template that was set on the tokenizer, None where it is still the model's."""
        if "tokenizer" not in self._parts:
            return None
        template = self._parts["tokenizer"].chat_template
        return str(template) if template and template != self._parts["template"] else None

    @property
    def _folder(self) -> Any:
        from prefect_huggingface.tasks.engines.registry import model_folder

        assert self._llm.model is not None
        return model_folder(self._llm.model)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_parts": {}}


class LoadedModel:
    """What code for models of Transformers reads of one."""

    def __init__(self, folder: Any, device: Any, name_or_path: str) -> None:
        from transformers import AutoConfig, GenerationConfig

        self.config = AutoConfig.from_pretrained(folder, local_files_only=True)
        self.device, self.name_or_path = device, name_or_path
        has_settings = (folder / "generation_config.json").is_file()
        self.generation_config = (
            GenerationConfig.from_pretrained(folder)
            if has_settings
            else GenerationConfig.from_model_config(self.config)
        )


def _read_model(
    model: LocalModel | None,
    model_id: str | None,
    model_kwargs: Mapping[str, Any] | None,
    pipeline_kwargs: Mapping[str, Any] | None,
) -> tuple[LocalModel, Generation, Settings]:
    """Return the block with what is given beside it, its settings for generating text, and all that was given."""
    if model is None:
        settings = read_settings(str(model_id), "text-generation", "default", None, None, model_kwargs, pipeline_kwargs)
        model = settings.model.model_copy(update={"options": GenerationOptions()})
        return model, Generation(model.options), settings
    settings = read_settings(
        model_id or model.model_id, model.task, model.backend, None, None, model_kwargs, pipeline_kwargs
    )
    given = {name: getattr(settings.model, name) for name in settings.model.model_fields_set}
    kept = {"task", "backend", "options", "chat_template", *(name for name, value in given.items() if value is None)}
    changed = {name: value for name, value in given.items() if name not in kept and value != getattr(model, name)}
    if model.chat_template == "auto":  # the default, which a saved block sets as well
        changed["chat_template"] = template_use(model.task)
    if changed:
        model = model.model_copy(update=changed)
    return model, Generation(model.options), settings


def _check_device(model: LocalModel) -> None:
    """Refuse a device of torch that is not there as LangChain does, before anything is fetched."""
    if model.backend == "torch" and model.device is not None:
        from prefect_huggingface.tasks.engines.torch_loading import resolve_device

        try:
            resolve_device(str(model.device))
        except EngineError as exc:
            raise SettingsError(str(exc)) from None


def _without_token(given: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return what was given, for the record; a token may also be in a dictionary inside."""
    if given is None:
        return None
    return {
        name: _without_token(value) if isinstance(value, Mapping) else value
        for name, value in given.items()
        if name not in TOKEN_NAMES
    }
