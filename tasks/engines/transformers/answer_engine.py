"""What the engines on top of Transformers have in common: jobs that wait, run and end, in one thread."""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from typing import TYPE_CHECKING, Any, Self

from prefect_huggingface.blocks import LocalModel
from prefect_huggingface.tasks.engines.answers import Answer, Job, Submission
from prefect_huggingface.tasks.engines.prompts import PromptWriter
from prefect_huggingface.tasks.engines.threads import ThreadedEngine
from prefect_huggingface.tasks.engines.transformers.text_jobs import TextJobs

if TYPE_CHECKING:
    from prefect_huggingface.tasks.engines.transformers.sizes import EngineSizes


class AnswerEngine(ThreadedEngine):
    """Jobs in the order of their submission, and their answers that no model works on yet."""

    def __init__(self, jobs: TextJobs, sizes: EngineSizes) -> None:
        """Start the thread. Everything that `_turn` needs must be there already.

        Args:
            jobs: Makes jobs of requests.
            sizes: Limits of the batches.
        """
        self._jobs = jobs
        self.prompts = jobs.prompts
        self._sizes = sizes
        self._waiting: deque[Answer] = deque()
        self._running: dict[Job, None] = {}
        self.in_flight = max(2 * sizes.sequences, 16)
        super().__init__()

    @classmethod
    def of_loaded(cls, loaded: Any, tokenizer: Any, writer: PromptWriter, model: LocalModel) -> Self:
        """Return an engine of a model and a tokenizer of Transformers that are loaded already.

        They are not changed.
        """
        engine = cls.__new__(cls)
        engine._start(loaded, tokenizer, writer, model)
        return engine

    @abstractmethod
    def _start(self, loaded: Any, tokenizer: Any, writer: PromptWriter, model: LocalModel) -> None:
        """Take what is loaded, and start as `__init__` of this class does."""

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of a text, without special tokens."""
        return self._jobs.tokenizer.count(text)

    @property
    def context_length(self) -> int | None:
        """Number of tokens that prompt and answer may have together, or None where it is not known."""
        return self._jobs.context_length

    def _accept(self, submission: Submission) -> None:
        job = self._jobs.make(submission)
        if job is not None:
            self._running[job] = None
            self._waiting.extend(job.answers)

    def _under_way(self) -> list[Submission]:
        return [job.submission for job in self._running]

    def _forget(self) -> None:
        self._waiting.clear()
        self._running.clear()

    def _end_what_must(self) -> None:
        """End the answers of requests that were cancelled or are past their deadline."""
        for job in list(self._running):
            reason = job.submission.must_end
            if reason is not None:
                job.end(reason)
        self._leave()

    def _leave(self) -> None:
        """Complete the jobs that are done."""
        if any(answer.finish_reason is not None for answer in self._waiting):
            self._waiting = deque(answer for answer in self._waiting if answer.finish_reason is None)
        for job in [job for job in self._running if job.is_done]:
            del self._running[job]
            self._jobs.complete(job)
