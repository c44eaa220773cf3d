"""Encoder-decoder models: text to text, summaries and translations, with Transformers or with OpenVINO.

Requests are worked on in whole batches of similar length. Streaming, stop strings, deadlines and the rest mean the same
as for text generation. The prompt is what the encoder reads; the context length counts the prompt only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect.logging import get_logger

from prefect_huggingface.blocks import GenerationOptions, LocalModel
from prefect_huggingface.tasks.engines.answers import Answer
from prefect_huggingface.tasks.engines.failures import RequestError
from prefect_huggingface.tasks.engines.openvino.devices import choose_device, compile_properties
from prefect_huggingface.tasks.engines.prompts import PromptWriter
from prefect_huggingface.tasks.engines.transformers.answer_engine import AnswerEngine
from prefect_huggingface.tasks.engines.transformers.loading import load_tokenizer, load_torch_model
from prefect_huggingface.tasks.engines.transformers.sizes import EngineSizes, free_cached_memory, is_out_of_memory
from prefect_huggingface.tasks.engines.transformers.text_jobs import TextJobs
from prefect_huggingface.tasks.engines.transformers.tokenization import pad_token
from prefect_huggingface.tasks.engines.transformers.whole_batches import (
    padded_inputs,
    prepare_model,
    run_beams,
    run_whole_batch,
)
from prefect_huggingface.tasks.errors import EngineError

logger = get_logger(__name__)


class Seq2SeqEngine(AnswerEngine):
    """Encoder-decoder model in one thread."""

    def _start(self, loaded: Any, tokenizer: Any, writer: PromptWriter, model: LocalModel) -> None:
        jobs = Seq2SeqJobs(loaded, tokenizer, writer, model.options, task_prefix(loaded.config, model.task))
        self._model = prepare_model(loaded, pad_token(tokenizer, jobs.end_ids))
        super().__init__(jobs, EngineSizes.of(loaded, model.engine))

    def _free(self) -> None:
        del self._model

    def _turn(self) -> None:
        self._end_what_must()
        if not self._waiting:
            return
        if self._waiting[0].job.options.num_beams > 1:
            job = self._waiting[0].job
            inputs = padded_inputs([job.prompt_ids], self._model, left=False)
            run_beams(self._model, job, inputs, self._jobs.take, self._jobs.tokenizer.decode)
        else:
            self._run_rows([self._waiting.popleft() for _ in range(self._sizes.room([], self._waiting))])
        self._leave()

    def _run_rows(self, answers: list[Answer]) -> None:
        try:
            inputs = padded_inputs([answer.job.prompt_ids for answer in answers], self._model, left=False)
            run_whole_batch(self._model, answers, inputs, self._jobs.take)
        except RuntimeError as exc:
            if not is_out_of_memory(exc):
                raise
            self._make_room(answers)

    def _make_room(self, answers: list[Answer]) -> None:
        """Go on with fewer answers at once after the memory ran out."""
        free_cached_memory()
        self._sizes.lower(len(answers))
        # An answer that has begun may have been streamed, and a decoder cannot be fed with its tokens again.
        untouched = [answer for answer in answers if not answer.tokens and answer.finish_reason is None]
        if len(answers) > 1:
            self._waiting.extendleft(reversed(untouched))
        for answer in answers:
            if answer.finish_reason is None and answer not in self._waiting:
                answer.job.fail(
                    RequestError(
                        "out_of_cache",
                        "The memory of the device ran out. Shorten the prompt, lower `max_new_tokens`, or set "
                        "`EngineOptions(max_num_seqs=...)` to fewer requests at once.",
                    )
                )


class TorchSeq2SeqEngine(Seq2SeqEngine):
    """Encoder-decoder model of Transformers."""

    def __init__(self, path: Path, model: LocalModel) -> None:
        """Load a model.

        Args:
            path: Folder of the snapshot.
            model: Settings.

        Raises:
            ModelSourceError: If the folder holds no weights that may be loaded.
            EngineError: If the settings do not fit this machine or this model.
        """
        loaded = load_torch_model(path, model, "AutoModelForSeq2SeqLM")
        self._start(loaded, load_tokenizer(path, model), PromptWriter.of_folder(path, model.chat_template), model)


class OpenVINOSeq2SeqEngine(Seq2SeqEngine):
    """Encoder-decoder model of Optimum on OpenVINO."""

    def __init__(self, path: Path, model: LocalModel) -> None:
        """Load a model.

        Args:
            path: Folder of the OpenVINO model.
            model: Settings.

        Raises:
            EngineError: If OpenVINO cannot load the model with these settings.
        """
        loaded = _load_openvino(path, model)
        self._start(loaded, load_tokenizer(path, model), PromptWriter.of_folder(path, model.chat_template), model)


class Seq2SeqJobs(TextJobs):
    """Jobs whose prompt goes through an encoder, with the prefix of the task before it."""

    is_continued = False

    def __init__(
        self, loaded: Any, tokenizer: Any, writer: PromptWriter, defaults: GenerationOptions, prefix: str
    ) -> None:
        super().__init__(loaded, tokenizer, writer, defaults)
        self.prefix = prefix
        # With relative positions a model reads prompts of any length.
        if hasattr(loaded.config, "relative_attention_num_buckets"):
            self.context_length = None


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


def _load_openvino(path: Path, model: LocalModel) -> Any:
    device, properties = choose_device(model), compile_properties(model)
    try:
        from optimum.intel import OVModelForSeq2SeqLM

        return OVModelForSeq2SeqLM.from_pretrained(
            path,
            device=device,
            ov_config=properties,
            trust_remote_code=model.trust_remote_code,
            local_files_only=True,
            export=False,
            compile=True,
        )
    except Exception as exc:
        raise EngineError(
            f"The OpenVINO model in {str(path)!r} could not be loaded for task {model.task!r}: "
            f"{type(exc).__name__}: {exc}. Check the device, `ov_config`, and that the folder is complete."
        ) from exc
