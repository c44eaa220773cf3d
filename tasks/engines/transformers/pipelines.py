"""An engine of a pipeline object of Transformers that somebody made already."""

from __future__ import annotations

from typing import Any

from prefect_huggingface.blocks import LocalModel
from prefect_huggingface.tasks.engines.chat_templates import TOKEN_NAMES, ChatTemplate
from prefect_huggingface.tasks.engines.prompts import PromptWriter
from prefect_huggingface.tasks.engines.protocol import Engine
from prefect_huggingface.tasks.errors import SettingsError


def engine_of_pipeline(pipeline: Any) -> Engine:
    """Return an engine that runs the model of a pipeline, with its tokenizer and on its device.

    The weights are shared. The pipeline itself is neither used nor changed; its settings for generation are not taken
    over. Plain prompts are taken as they are, messages go through the chat template of the tokenizer.

    Args:
        pipeline: Pipeline of Transformers for text, or for images and text. Its model is one of torch, or one of
            Optimum for OpenVINO.

    Raises:
        SettingsError: If it is no such pipeline.
    """
    loaded, tokenizer = getattr(pipeline, "model", None), getattr(pipeline, "tokenizer", None)
    if loaded is None or tokenizer is None or not hasattr(loaded, "generate"):
        raise SettingsError(
            f"`pipeline` must be a text pipeline of Transformers, got {type(pipeline)!r}. "
            "Make one with transformers.pipeline('text-generation', ...)."
        )
    # The block only carries the settings of the engine; the model is there already.
    name = str(getattr(loaded, "name_or_path", None) or "").rstrip("/").rpartition("/")[2]
    model = LocalModel.model_construct(model_id=name or "pipeline", backend="torch", task=pipeline.task)
    writer = prompt_writer(tokenizer)
    processor = getattr(pipeline, "processor", None)
    if pipeline.task == "image-text-to-text" and processor is not None:
        from prefect_huggingface.tasks.engines.transformers.images import TorchImageEngine

        return TorchImageEngine.of_loaded(loaded, processor, prompt_writer(processor), model.options)
    if loaded.config.is_encoder_decoder:
        from prefect_huggingface.tasks.engines.transformers.seq2seq import Seq2SeqEngine

        return Seq2SeqEngine.of_loaded(loaded, tokenizer, writer, model)
    from prefect_huggingface.tasks.engines.transformers.text import TorchTextEngine

    return TorchTextEngine.of_loaded(loaded, tokenizer, writer, model)


def prompt_writer(tokenizer: Any) -> PromptWriter:
    """Return what writes the prompts of a tokenizer or processor: plain ones as they are, messages by template."""
    named = getattr(tokenizer, "tokenizer", tokenizer)
    tokens = {name: str(value) for name in TOKEN_NAMES if (value := getattr(named, name, None))}
    source = getattr(tokenizer, "chat_template", None)
    if isinstance(source, dict):
        source = source.get("default")
    return PromptWriter(ChatTemplate(source, tokens) if source else None, tokens, "never")
