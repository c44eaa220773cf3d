"""Answers about images with OpenVINO. Requests share one continuous batch, as those of the text engine do.

The number of prompt tokens is that of the text; OpenVINO GenAI does not tell how many tokens an image becomes.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect_huggingface.blocks import GenerationOptions, LocalModel
from prefect_huggingface.tasks.engines.answers import Submission
from prefect_huggingface.tasks.engines.chat_templates import ChatTemplate, ChatTemplateError, read_json
from prefect_huggingface.tasks.engines.image_engine import ImageReader, fits_context, write_scene
from prefect_huggingface.tasks.engines.images import check_pillow
from prefect_huggingface.tasks.engines.openvino.genai_options import check_options, generation_config
from prefect_huggingface.tasks.engines.openvino.genai_rows import Row, Start
from prefect_huggingface.tasks.engines.openvino.text import OpenVINOTextEngine
from prefect_huggingface.tasks.engines.prompts import resolve_options

PREPROCESSOR_FILE = "preprocessor_config.json"


@dataclass(frozen=True, slots=True)
class ImagePrompt:
    """Text with the places of images, and the images as tensors of [1, height, width, 3]."""

    text: str
    tensors: list[Any]


class ImageRow(Row):
    """A row whose prompt has images."""

    prompt: ImagePrompt

    def start(self, add: Start) -> None:
        """Put the answers into the pipeline."""
        super().start(lambda _, options, seed: add(self.prompt, options, seed))  # type: ignore[arg-type]


class OpenVINOImageEngine(ImageReader, OpenVINOTextEngine):
    """Model for images and text in one continuous batch."""

    def __init__(self, path: Path, model: LocalModel) -> None:
        """Load a model.

        Args:
            path: Folder of the OpenVINO model.
            model: Settings.

        Raises:
            EngineError: If OpenVINO cannot load the model with these settings, or Pillow is missing.
        """
        check_pillow()
        self._view = with_preprocessor(path)
        super().__init__(self._view or path, model)

    def _free(self) -> None:
        super()._free()
        if self._view is not None:
            shutil.rmtree(self._view, ignore_errors=True)

    def _accept(self, submission: Submission) -> None:
        scene = self._scenes.pop(submission, None)
        if scene is None:
            return
        options = resolve_options(self._model.options, submission.request)
        check_options(options)
        assert self.prompts is not None
        prompt = write_scene(self.prompts, scene, render_tagged)
        tokens = self._codec.encode(prompt.text, add_special_tokens=prompt.add_special_tokens)
        if not fits_context(tokens, options, self.context_length):
            submission.skip(len(tokens))
            return
        echo = prompt.text if options.echo else ""
        row = ImageRow(submission, options, tokens, frozenset(self._end_tokens), self._codec, echo)
        row.prompt = ImagePrompt(prompt.text, [_tensor(image) for image in scene.images])
        self._queue.append(row)

    def _add(self, prompt: Any, options: GenerationOptions, seed: int) -> Any:
        config = generation_config(options, self._end_tokens, self._model.engine, seed)
        return self._pipeline.add_with_images(prompt.text, prompt.tensors, config)


def render_tagged(template: ChatTemplate, messages: list[dict[str, Any]], tools: Any) -> str:
    """Return the text of messages with the tags of OpenVINO GenAI in the places of the images.

    Raises:
        ChatTemplateError: If the template refuses them.
    """
    tagged = _tagged(messages)
    try:
        text = template.render(tagged, tools)
        complete = all(part["text"] in text for message in tagged for part in message["content"])
    except ChatTemplateError:
        complete = False
    if not complete:
        # Some templates want parts, and some want plain text.
        joined = [{**message, "content": "".join(part["text"] for part in message["content"])} for message in tagged]
        text = template.render(joined, tools)
    return text


def _tagged(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages with a tag as text for each image."""
    tagged, count = [], 0
    for message in messages:
        parts = []
        for part in message["content"]:
            is_image = part["type"] == "image"
            # OpenVINO GenAI writes the line end after an image itself, for the models that want one.
            parts.append({"type": "text", "text": f"<ov_genai_image_{count}>"} if is_image else part)
            count += is_image
        tagged.append({**message, "content": parts})
    return tagged


def with_preprocessor(path: Path) -> Path | None:
    """Return a folder of links with the settings for images where OpenVINO GenAI looks for them, None where they are.

    Newer versions of Transformers write them into the settings of the whole processor.
    """
    settings = read_json(path / "processor_config.json").get("image_processor")
    if (path / PREPROCESSOR_FILE).is_file() or not settings:
        return None
    view = Path(tempfile.mkdtemp(prefix="prefect-huggingface-images-"))
    for file in path.iterdir():
        (view / file.name).symlink_to(file.resolve())
    (view / PREPROCESSOR_FILE).write_text(json.dumps(settings), encoding="utf-8")
    return view


def _tensor(image: Any) -> Any:
    import numpy as np
    from openvino import Tensor

    return Tensor(np.asarray(image, dtype=np.uint8)[None])
