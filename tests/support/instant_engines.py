"""An engine without a model, for the machinery around engines: its answers depend on the prompt alone."""

from __future__ import annotations

import hashlib
import threading
import time
from concurrent.futures import Future
from pathlib import Path

from prefect_huggingface.blocks import LocalModel
from prefect_huggingface.tasks.engines.base import Engine, OnText
from prefect_huggingface.tasks.records import Completion, Request


class InstantEngine(Engine):
    """Answers at once, or after a fixed time in a thread of its own.

    Args:
        answer: The answer to every prompt; None for one that depends on the prompt.
        seconds: How long each answer takes.
    """

    in_flight = 64

    def __init__(self, answer: str | None = None, seconds: float = 0.0) -> None:
        self.answer, self.seconds = answer, seconds
        self.prompts: list[str] | None = None

    def submit(
        self, request: Request, on_text: OnText | None = None, on_reasoning: OnText | None = None
    ) -> Future[Completion]:
        future: Future[Completion] = Future()
        if self.seconds:
            threading.Thread(target=self._answer_later, args=(future, request), daemon=True).start()
        else:
            self._answer(future, request)
        return future

    def close(self) -> None:
        pass

    def count_tokens(self, text: str) -> int:
        return len(text.split())

    @property
    def context_length(self) -> int | None:
        return None

    def _answer_later(self, future: Future[Completion], request: Request) -> None:
        time.sleep(self.seconds)
        if future.set_running_or_notify_cancel():
            self._answer(future, request)

    def _answer(self, future: Future[Completion], request: Request) -> None:
        prompt = request.prompt if request.prompt is not None else str(request.messages)
        if self.prompts is not None:
            self.prompts.append(prompt)
        if not prompt.strip():
            completion = Completion("", "error", 0, 0, 0.0, "The prompt is empty.", "empty_prompt", request.id)
        else:
            text = self.answer if self.answer is not None else hashlib.sha256(prompt.encode()).hexdigest()[:12]
            completion = Completion(text, "stop", 5, 3, 0.001, request_id=request.id)
        future.set_result(completion)


class ConstantEngine(InstantEngine):
    """Gives the same answer to everything, with the constructor that engines have."""

    def __init__(self, path: Path, model: LocalModel) -> None:
        super().__init__("Paris")
