"""One small model of every kind of engine, asked only through the public functions.

Tests over these families say what must hold on every backend, and nothing about how a backend is built.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from prefect_huggingface.blocks import EngineOptions, GenerationOptions, InferenceEndpoint, LocalModel
from prefect_huggingface.tasks import load_engine
from prefect_huggingface.tasks.engines.registry import list_engines
from prefect_huggingface.tasks.records import Completion, Request

__all__ = ["FAMILY_NAMES", "LOCAL_FAMILY_NAMES", "Family", "list_engines", "texts_of", "wait_until"]

EXACT = {"INFERENCE_PRECISION_HINT": "f32"}
# Long enough for a loaded machine, and short against the time limit of one test.
PATIENCE_SECONDS = 120
PROMPTS = [
    "The capital of France is", "One, two, three,", "What is the number", "A small model of random weights",
    "Madrid and Paris", "It always says the same", "in French?", "nothing that makes sense, but", "Quarante-deux",
    "four, five.", "Spain", "says",
]  # fmt: skip

LOCAL_FAMILY_NAMES = [
    "openvino-text", "torch-text", "openvino-seq2seq", "torch-seq2seq", "torch-images",
    pytest.param("openvino-images", marks=pytest.mark.slow),
]  # fmt: skip
FAMILY_NAMES = [*LOCAL_FAMILY_NAMES, "endpoint"]


@dataclass(frozen=True)
class Family:
    """One kind of engine.

    Attributes:
        name: Backend and kind of task.
        model: Settings of a tiny model of this kind, whose greedy text does not depend on its neighbours.
        images: Images that every request has.
    """

    name: str
    model: LocalModel | InferenceEndpoint
    images: tuple[str, ...] = ()

    @property
    def is_local(self) -> bool:
        """Whether the model runs on this machine."""
        return isinstance(self.model, LocalModel)

    @property
    def is_seq2seq(self) -> bool:
        """Whether the model has an encoder."""
        return "seq2seq" in self.name

    def with_settings(self, **changes: Any) -> Family:
        """Return the family with other settings of its model."""
        values = {name: getattr(self.model, name) for name in self.model.model_fields_set}
        return Family(self.name, type(self.model)(**{**values, **changes}), self.images)

    def request(self, prompt: str, id: Any = None, **options: Any) -> Request:
        """Return a request with options of its own."""
        chosen = GenerationOptions(**options) if options else None
        return Request(prompt, id=id, options=chosen, images=self.images)

    def submit(self, prompt: str, on_text: Callable[[str], None] | None = None, **options: Any) -> Future[Completion]:
        """Hand a request to the engine of the family."""
        return load_engine(self.model).submit(self.request(prompt, **options), on_text)

    def ask(self, prompt: str, **options: Any) -> Completion:
        """Return the completion of one prompt."""
        return self.submit(prompt, **options).result(PATIENCE_SECONDS)

    def text(self, prompt: str, **options: Any) -> str:
        """Return the text of one prompt that must not fail."""
        return texts_of([self.submit(prompt, **options)])[0]


def texts_of(futures: Iterable[Future[Completion]]) -> list[str]:
    """Return the texts of requests that must not fail."""
    texts = []
    for future in futures:
        completion = future.result(PATIENCE_SECONDS)
        assert completion.error is None, completion
        texts.append(completion.text)
    return texts


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"it did not come to hold within {seconds} s"
        gc.collect()
        time.sleep(0.02)


def engine_threads() -> set[threading.Thread]:
    """Return the threads that run now, but for those of progress bars."""
    return {thread for thread in threading.enumerate() if type(thread).__name__ != "TMonitor"}


def family_model(name: str, folder: Path, **more: Any) -> LocalModel:
    """Return the settings of a tiny model, in full precision and without a chat template."""
    backend, kind = name.split("-")
    tasks = {"seq2seq": "text2text-generation", "images": "image-text-to-text"}
    if backend == "openvino":
        engine = EngineOptions(cache_size_gb=0.5, instances=2) if kind == "group" else EngineOptions()
        more = {"weight_format": "fp32", "ov_config": EXACT, "engine": engine, **more}
    else:
        more = {"dtype": "float32", **more}
    return LocalModel(
        model_id=str(folder), backend=backend, task=tasks.get(kind, "text-generation"), device="cpu",
        chat_template="auto" if kind == "images" else "never",
        options=GenerationOptions(max_new_tokens=16), **more,
    )  # fmt: skip
