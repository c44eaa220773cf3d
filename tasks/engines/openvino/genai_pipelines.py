"""The continuous batch of OpenVINO GenAI behind four calls, which can be cleared after a failure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect.logging import get_logger

from prefect_huggingface.blocks import EngineOptions
from prefect_huggingface.tasks.engines.openvino.scheduling import SchedulerSizes, scheduler_config
from prefect_huggingface.tasks.errors import EngineError

logger = get_logger(__name__)

# A failed step leaves its rows half scheduled. Once they are cancelled, one step frees them.
CLEARING_STEPS = 4


class GenaiPipeline:
    """One `ContinuousBatchingPipeline`. Only one thread may use it."""

    def __init__(
        self, folder: Path, device: str, properties: dict[str, Any], sizes: SchedulerSizes, options: EngineOptions
    ) -> None:
        """Load a model.

        Args:
            folder: Folder of the OpenVINO model.
            device: Device of OpenVINO.
            properties: Properties to compile the model with.
            sizes: Sizes of the batch.
            options: Further options of the engine.

        Raises:
            EngineError: If OpenVINO cannot load the model.
        """
        self._folder, self._device, self._properties = folder, device, properties
        self._sizes, self._options = sizes, options
        self._next_id = 0
        self._pipeline = self._load()

    @property
    def tokenizer(self) -> Any:
        """Tokenizer of OpenVINO GenAI."""
        return self._pipeline.get_tokenizer()

    @property
    def has_work(self) -> bool:
        """Whether a step has something to do."""
        return bool(self._pipeline.has_non_finished_requests())

    @property
    def cache_usage(self) -> float:
        """Percentage of the KV cache that is in use."""
        return float(self._pipeline.get_metrics().cache_usage)

    def add(self, tokens: Sequence[int], config: Any) -> Any:
        """Add a prompt and return its handle."""
        import numpy as np
        from openvino import Tensor

        self._next_id += 1
        return self._pipeline.add_request(self._next_id, Tensor(np.asarray([tokens], dtype=np.int64)), config)

    def add_with_images(self, text: str, images: Sequence[Any], config: Any) -> Any:
        """Add a prompt with the tags of images and return its handle.

        Args:
            text: Prompt with a tag in the place of each image.
            images: Tensors of [1, height, width, 3].
            config: How to generate.
        """
        self._next_id += 1
        return self._pipeline.add_request(self._next_id, text, list(images), config)

    def step(self) -> None:
        """Do one step of the model for everything that was added."""
        self._pipeline.step()

    def clear(self) -> None:
        """Make the pipeline usable again after a failed step. All handles must be cancelled before."""
        for _ in range(CLEARING_STEPS):
            try:
                if not self.has_work:
                    return
                self._pipeline.step()
            except RuntimeError:
                continue
        logger.warning("The pipeline of %s cannot be cleared; loading the model again.", self._folder)
        del self._pipeline
        self._pipeline = self._load()

    def _load(self) -> Any:
        from openvino_genai import ContinuousBatchingPipeline

        config = scheduler_config(self._sizes, self._options)
        try:
            return ContinuousBatchingPipeline(self._folder, config, self._device, self._all_properties())
        except Exception as exc:
            raise EngineError(
                f"OpenVINO cannot load {str(self._folder)!r} on {self._device}: {last_line(exc)} "
                "Check the folder, `device` and `ov_config`."
            ) from exc

    def _all_properties(self) -> dict[str, Any]:
        if self._options.draft_model is not None:
            from openvino_genai import draft_model

            return {**self._properties, "draft_model": draft_model(self._options.draft_model, self._device)}
        if self._options.prompt_lookup_tokens is not None:
            return {**self._properties, "prompt_lookup": True}
        return self._properties


def last_line(error: Exception) -> str:
    """Return what an exception of OpenVINO says, without the places in its sources."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = re.sub(r"^(\[[0-9:]+\] )?\S+\.[ch](pp|c|h)?:\d+:? ?", "", lines[-1]) if lines else ""
    said = said or type(error).__name__
    return said if said.endswith((".", "!", "?")) else said + "."
