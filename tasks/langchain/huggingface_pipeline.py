"""`HuggingFacePipeline`: the LangChain LLM of a model on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field

from prefect_huggingface.blocks import LocalModel
from prefect_huggingface.tasks.engines.base import Engine
from prefect_huggingface.tasks.errors import SettingsError
from prefect_huggingface.tasks.langchain.generation_settings import Generation, merge_generation, read_generation
from prefect_huggingface.tasks.langchain.llms import EngineLLM
from prefect_huggingface.tasks.langchain.settings import TOKEN_NAMES, read_settings, template_use
from prefect_huggingface.tasks.langchain.transformers_pipelines import pipeline_settings

IDENTIFYING_FIELDS = ("task", "backend", "revision", "weight_format", "device", "device_map", "dtype")


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
        pipeline: Pipeline of Transformers to use. Excludes `model`.
        model: Model to load. Its engine is shared with all other users of the same model in this process.
        model_id: Id or folder of the model.
        model_kwargs: What was given for loading the model, without any token.
        pipeline_kwargs: What was given for generating text.
    """

    pipeline: Any = Field(default=None, repr=False, exclude=True)
    model: LocalModel | None = None
    model_id: str | None = None
    model_kwargs: dict[str, Any] | None = None
    pipeline_kwargs: dict[str, Any] | None = None

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
        """Make an LLM of a pipeline of Transformers, of a block, or of the id of a model for text generation."""
        if pipeline is None and model is None and model_id:
            settings = read_settings(model_id, "text-generation", model_kwargs=model_kwargs)
            model, generation = settings.model, settings.generation
        else:
            _check_one_source(pipeline, model, model_id, model_kwargs)
            generation = pipeline_settings(pipeline) if model is None else Generation(model.options)
            kwargs.setdefault("batch_size", getattr(pipeline, "_batch_size", None))
        if model is not None and "chat_template" not in model.model_fields_set:
            model = model.model_copy(update={"chat_template": template_use(model.task)})
        fields = {
            "pipeline": pipeline,
            "model": model,
            "model_id": model_id or (str(pipeline.model.name_or_path) if model is None else model.model_id),
            "model_kwargs": _without_token(model_kwargs),
            "pipeline_kwargs": _without_token(pipeline_kwargs),
        }
        super().__init__(**fields, **kwargs)
        self._generation = merge_generation(generation, read_generation(pipeline_kwargs or {}, self.task))

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
        llm = cls(model=settings.model, batch_size=batch_size or settings.batch_size, **kwargs)
        llm.model_id, llm._generation = model_id, settings.generation
        llm.model_kwargs, llm.pipeline_kwargs = _without_token(model_kwargs), _without_token(pipeline_kwargs or {})
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
    def _llm_type(self) -> str:
        return "huggingface_pipeline"

    @property
    def _model_name(self) -> str:
        return str(self.model_id)

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        options = self._generation.options.model_dump(mode="json", exclude_unset=True)
        lengths = {"max_length": self._generation.max_length, "min_length": self._generation.min_length}
        fields = {} if self.model is None else {name: getattr(self.model, name) for name in IDENTIFYING_FIELDS}
        return {
            "model_id": self.model_id,
            "model_kwargs": self.model_kwargs,
            "pipeline_kwargs": self.pipeline_kwargs,
            **{name: value for name, value in {**fields, **lengths, **options}.items() if value is not None},
        }

    def __getstate__(self) -> dict[Any, Any]:
        if self.pipeline is not None and type(self.pipeline.model).__module__.startswith("optimum."):
            raise SettingsError(
                "A pipeline with an OpenVINO model cannot be pickled. Use `from_model_id` with `backend='openvino'`."
            )
        return super().__getstate__()


def _check_one_source(pipeline: Any, model: LocalModel | None, model_id: str | None, model_kwargs: Any) -> None:
    if (pipeline is None) == (model is None):
        raise SettingsError("Exactly one of `pipeline`, `model` and `model_id` must be given. Give one of them.")
    if model is not None and (model_kwargs or model_id not in (None, model.model_id)):
        raise SettingsError("`model` excludes `model_id` and `model_kwargs`. Set the fields of the block instead.")


def _without_token(given: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return what was given, for the record; a token may also be in a dictionary inside."""
    if given is None:
        return None
    return {
        name: _without_token(value) if isinstance(value, Mapping) else value
        for name, value in given.items()
        if name not in TOKEN_NAMES
    }
