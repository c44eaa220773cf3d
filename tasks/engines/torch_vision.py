"""Answers about images with a model of Transformers. Requests run one by one, in one thread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect_huggingface.blocks import LocalModel
from prefect_huggingface.tasks.engines.base import RequestError
from prefect_huggingface.tasks.engines.chat_templates import ChatTemplate
from prefect_huggingface.tasks.engines.conversations import Prompt
from prefect_huggingface.tasks.engines.inputs import InputProcessor
from prefect_huggingface.tasks.engines.multimodal import MultimodalInputProcessor, check_pillow
from prefect_huggingface.tasks.engines.request_state import RequestState
from prefect_huggingface.tasks.engines.torch_engine import TorchEngine
from prefect_huggingface.tasks.engines.torch_loading import input_device, load_processor, load_torch_model
from prefect_huggingface.tasks.records import Request


class TorchVisionEngine(TorchEngine):
    """Model for images and text in one thread."""

    def _load(self, path: Path, model: LocalModel) -> tuple[Any, Any]:
        check_pillow()
        loaded = load_torch_model(path, model, "AutoModelForImageTextToText")
        return loaded, load_processor(path, model, "AutoProcessor")

    def _make_inputs(self, path: Path, model: LocalModel) -> InputProcessor:
        return TorchVisionInputs.of_folder(path, model.chat_template, model.options)

    def _start(self, loaded: Any, tokenizer: Any, inputs: InputProcessor, model: LocalModel) -> None:
        check_pillow()
        assert isinstance(inputs, TorchVisionInputs)
        inputs.processor = tokenizer
        inputs.place = (input_device(loaded), loaded.dtype)
        super()._start(loaded, tokenizer, inputs, model)
        self.in_flight = 8

    def step(self) -> None:
        """Run the sequence that waits longest, or a beam search."""
        if self._searches:
            self._search()
        if self._waiting:
            sequence = self._waiting.popleft()
            self._run_whole([sequence], self._inputs_of(sequence.state))

    def _inputs_of(self, state: RequestState) -> dict[str, Any]:
        inputs: dict[str, Any] = state.multimodal.prepared
        return inputs


class TorchVisionInputs(MultimodalInputProcessor):
    """Inputs that the processor of a model makes of text and images.

    Attributes:
        processor: Processor of Transformers.
        place: Device and data type of the model.
    """

    processor: Any
    place: tuple[Any, Any]

    def render(self, template: ChatTemplate, messages: list[dict[str, Any]], request: Request, **more: Any) -> str:
        """Put messages and tools into the template, with parts for the images."""
        return template.render(messages, request.tools, **more)

    def _tokenize(self, state: RequestState, prompt: Prompt) -> list[int]:
        images = state.multimodal.images
        place = getattr(self.processor, "image_token", None)
        if place and prompt.text.count(place) != len(images):
            # The model would fail in the middle of its work.
            raise RequestError(
                "invalid_prompt",
                f"The prompt has {prompt.text.count(place)} places for images ({place!r}), and there are "
                f"{len(images)} images. Give each a place, or send messages.",
            )
        try:
            inputs = self.processor(
                text=[prompt.text],
                images=images or None,
                add_special_tokens=prompt.add_special_tokens,
                return_tensors="pt",
            )
        except Exception as exc:
            raise RequestError(
                "invalid_prompt",
                f"The processor of the model refuses the text with {len(images)} images: "
                f"{type(exc).__name__}: {exc}. Check that the prompt has a place for each image.",
            ) from exc
        state.multimodal.prepared = dict(inputs.to(*self.place))
        ids: list[int] = inputs["input_ids"][0].tolist()
        return ids
