"""Encoder-decoder models: text to text, summaries and translations, with Transformers or with OpenVINO.

Requests are worked on in whole batches of similar length. Streaming, stop strings, deadlines and the rest mean the same
as for text generation. The prompt is what the encoder reads; the context length counts the prompt only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect_huggingface.blocks import LocalModel
from prefect_huggingface.tasks.engines.inputs import InputProcessor
from prefect_huggingface.tasks.engines.torch_batch import padded_inputs
from prefect_huggingface.tasks.engines.torch_engine import TorchEngine
from prefect_huggingface.tasks.engines.torch_loading import load_tokenizer, load_torch_model
from prefect_huggingface.tasks.errors import EngineError


class Seq2SeqEngine(TorchEngine):
    """Encoder-decoder model in one thread."""

    def _load(self, path: Path, model: LocalModel) -> tuple[Any, Any]:
        raise EngineError("A pipeline brings its own model. Use `of_loaded`.")

    def _start(self, loaded: Any, tokenizer: Any, inputs: InputProcessor, model: LocalModel) -> None:
        inputs.is_continued = False
        inputs.prefix = task_prefix(loaded.config, model.task)
        super()._start(loaded, tokenizer, inputs, model)

    def step(self) -> None:
        """Run a beam search, and a whole batch of what waits."""
        if self._searches:
            self._search()
        if not self._waiting:
            return
        sequences = [self._waiting.popleft() for _ in range(self._sizes.room([], self._waiting))]
        inputs = padded_inputs([sequence.state.prompt_ids for sequence in sequences], self._model, left=False)
        self._run_whole(sequences, inputs)


class TorchSeq2SeqEngine(Seq2SeqEngine):
    """Encoder-decoder model of Transformers."""

    def _load(self, path: Path, model: LocalModel) -> tuple[Any, Any]:
        return load_torch_model(path, model, "AutoModelForSeq2SeqLM"), load_tokenizer(path, model)


class OpenVINOSeq2SeqEngine(Seq2SeqEngine):
    """Encoder-decoder model of Optimum on OpenVINO."""

    def _load(self, path: Path, model: LocalModel) -> tuple[Any, Any]:
        from prefect_huggingface.tasks.engines.openvino_runtime import load_optimum_model

        return load_optimum_model(path, model, "OVModelForSeq2SeqLM"), load_tokenizer(path, model)


def task_prefix(config: Any, task: str) -> str:
    """Return the words that a model such as T5 wants before the prompt of a task, empty where it says nothing.

    A model that was trained for several translations has no prefix for "translation" alone: the prompt must say which.
    """
    settings = getattr(config, "task_specific_params", None) or {}
    found = [
        str(values.get("prefix") or "")
        for name, values in settings.items()
        if isinstance(values, dict) and (name == task or (task == "translation" and name.startswith("translation_")))
    ]
    return found[0] if len(found) == 1 else ""
