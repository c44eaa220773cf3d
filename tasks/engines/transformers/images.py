"""Answers about images with a model of Transformers. Requests run one by one, in one thread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect_huggingface.blocks import GenerationOptions, LocalModel
from prefect_huggingface.tasks.engines.chat_templates import ChatTemplate
from prefect_huggingface.tasks.engines.failures import RequestError
from prefect_huggingface.tasks.engines.image_engine import ImageEngine, Scene, fits_context, write_scene
from prefect_huggingface.tasks.engines.images import check_pillow
from prefect_huggingface.tasks.engines.prompts import Prompt, PromptWriter, resolve_options
from prefect_huggingface.tasks.engines.transformers.loading import input_device, load_processor, load_torch_model
from prefect_huggingface.tasks.engines.transformers.text_jobs import TextJobs
from prefect_huggingface.tasks.engines.transformers.tokenization import pad_token
from prefect_huggingface.tasks.engines.transformers.whole_batches import prepare_model, run_beams, run_whole_batch


class TorchImageEngine(ImageEngine):
    """Model for images and text in one thread."""

    prompts: PromptWriter

    def __init__(self, path: Path, model: LocalModel) -> None:
        """Load a model and its processor.

        Args:
            path: Folder of the snapshot.
            model: Settings.

        Raises:
            ModelSourceError: If the folder holds no weights that may be loaded.
            EngineError: If the settings do not fit this machine or this model, or Pillow is missing.
        """
        check_pillow()
        loaded = load_torch_model(path, model, "AutoModelForImageTextToText")
        processor = load_processor(path, model, "AutoProcessor")
        self._start(loaded, processor, PromptWriter.of_folder(path, model.chat_template), model.options)

    @classmethod
    def of_loaded(
        cls, loaded: Any, processor: Any, prompts: PromptWriter, defaults: GenerationOptions
    ) -> TorchImageEngine:
        """Return an engine of a model and a processor of Transformers that are loaded already.

        They are not changed.
        """
        check_pillow()
        engine = cls.__new__(cls)
        engine._start(loaded, processor, prompts, defaults)
        return engine

    def _start(self, loaded: Any, processor: Any, prompts: PromptWriter, defaults: GenerationOptions) -> None:
        self._processor = processor
        self.prompts = prompts
        self._defaults = defaults
        self._jobs = TextJobs(loaded, processor.tokenizer, prompts, defaults)
        self._model = prepare_model(loaded, pad_token(processor.tokenizer, self._jobs.end_ids))
        ImageEngine.__init__(self)

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of a text, without special tokens."""
        return self._jobs.tokenizer.count(text)

    @property
    def context_length(self) -> int | None:
        """Number of tokens that prompt, images and answer may have together, or None where it is not known."""
        return self._jobs.context_length

    def _free(self) -> None:
        del self._model, self._processor

    def _show(self, scene: Scene) -> None:
        options = resolve_options(self._defaults, scene.submission.request)
        prompt = write_scene(self.prompts, scene, ChatTemplate.render)
        inputs = self._inputs(prompt, scene)
        ids = inputs["input_ids"][0].tolist()
        if not fits_context(ids, options, self.context_length):
            scene.submission.skip(len(ids))
            return
        job = self._jobs.job_of(scene.submission, options, ids, echo=prompt.text if options.echo else "")
        if options.num_beams > 1:
            run_beams(self._model, job, inputs, self._jobs.take, self._jobs.tokenizer.decode)
        else:
            for answer in job.answers:
                run_whole_batch(self._model, [answer], inputs, self._jobs.take)
        self._jobs.complete(job)

    def _inputs(self, prompt: Prompt, scene: Scene) -> dict[str, Any]:
        try:
            inputs = self._processor(
                text=[prompt.text],
                images=scene.images or None,
                add_special_tokens=prompt.add_special_tokens,
                return_tensors="pt",
            )
        except Exception as exc:
            raise RequestError(
                "invalid_prompt",
                f"The processor of the model refuses the text with {len(scene.images)} images: "
                f"{type(exc).__name__}: {exc}. Check that the prompt has a place for each image.",
            ) from exc
        return dict(inputs.to(input_device(self._model), self._model.dtype))
