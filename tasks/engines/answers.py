"""A request while it is worked on: its answers, their tokens and texts, and why each of them ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from prefect_huggingface.blocks import GenerationOptions
from prefect_huggingface.tasks.engines.answer_forms import check_form
from prefect_huggingface.tasks.engines.failures import RequestError, failed
from prefect_huggingface.tasks.engines.protocol import OnText
from prefect_huggingface.tasks.engines.stopping import Decode, TextStream
from prefect_huggingface.tasks.engines.transformers.sampling import TokenChooser
from prefect_huggingface.tasks.records import Completion, ErrorCode, FinishReason, Request


@dataclass(slots=True, eq=False)
class Submission:
    """A request as it was handed in.

    Attributes:
        submitted_at: Time of `time.perf_counter` in seconds.
        deadline: Time of `time.perf_counter` at which the answers are cut off, or None.
        closed: Set when the engine is closed.
    """

    request: Request
    future: Future[Completion]
    on_text: OnText | None = None
    submitted_at: float = field(default_factory=time.perf_counter)
    deadline: float | None = None
    closed: threading.Event = field(default_factory=threading.Event)

    @property
    def must_end(self) -> FinishReason | None:
        """Why the request must end now, however far it is, or None."""
        if self.future.cancelled() or self.closed.is_set():
            return "cancelled"
        return "deadline" if self.deadline is not None and time.perf_counter() > self.deadline else None

    @property
    def seconds(self) -> float:
        """Seconds since the submission."""
        return time.perf_counter() - self.submitted_at

    def complete(self, completion: Completion) -> None:
        """Set the result, unless the caller cancelled the future."""
        # The future is never marked as running, so that it can be cancelled at any time.
        if self.future.cancelled():
            return
        try:
            self.future.set_result(completion)
        except Exception:
            if not self.future.cancelled():
                raise

    def fail(self, code: ErrorCode, message: str, **counts: int) -> None:
        """Complete the request with an error. The counts are those of tokens, as a completion names them."""
        self.complete(failed(self.request, code, message, seconds=self.seconds, **counts))

    def cancel(self) -> None:
        """Complete the request as one that the closing of the engine has left undone."""
        self.fail("cancelled", "The engine was closed before the request was done. Load the engine again.")

    def skip(self, prompt_tokens: int) -> None:
        """Complete the request as one whose prompt is too long and is to be skipped."""
        self.complete(Completion("", "skipped", prompt_tokens, seconds=self.seconds, request_id=self.request.id))


class Answer:
    """One answer while it is generated.

    Attributes:
        job: The request that it belongs to.
        tokens: Tokens that were generated, without the end token.
        logprobs: Log probability of each of them, where asked for.
        finish_reason: Why it ended, or None while it goes on.
    """

    def __init__(self, job: Job, index: int, decode: Decode, chooser: TokenChooser) -> None:
        self.job = job
        self.chooser = chooser
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.finish_reason: FinishReason | None = None
        # Several answers cannot share one stream of text, so the first one has it.
        on_text = job.submission.on_text if index == 0 else None
        self._stream = TextStream(decode, job.options.stop, on_text)
        self.text = ""

    @property
    def wants_logprobs(self) -> bool:
        """Whether the log probabilities are asked for."""
        return self.job.options.logprobs

    @property
    def all_tokens(self) -> list[int]:
        """Tokens of the prompt and of the answer so far."""
        return [*self.job.prompt_ids, *self.tokens]

    @property
    def tokens_left(self) -> int:
        """Greatest number of tokens that are still to come."""
        return self.job.options.max_new_tokens - len(self.tokens)

    def take(self, token: int, logprob: float | None = None) -> bool:
        """Go on with the next token.

        Returns:
            Whether the answer is at its end.
        """
        if token in self.job.end_ids and not self.job.options.ignore_eos:
            self.finish("stop")
            return True
        self.tokens.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        if self._stream.push([token]):
            self.finish("stop")
        elif self.tokens_left <= 0:
            self.finish("length")
        return self.finish_reason is not None

    def finish(self, reason: FinishReason) -> None:
        """End the answer."""
        self.text = self._stream.finish()
        # The end of the text, held back until now, may hold a stop string.
        self.finish_reason = "stop" if self._stream.stopped else reason


class Job:
    """A request that is understood: its options, its prompt's tokens, and its answers."""

    def __init__(
        self,
        submission: Submission,
        options: GenerationOptions,
        prompt_ids: Sequence[int],
        end_ids: Collection[int],
        echo: str = "",
    ) -> None:
        """Start without answers.

        Args:
            submission: Request with its future.
            options: Options of the request over those of the model.
            prompt_ids: Tokens of the prompt, as the model sees them.
            end_ids: Tokens that end an answer.
            echo: Text to put before the answer.
        """
        self.submission = submission
        self.options = options
        self.prompt_ids = list(prompt_ids)
        self.end_ids = frozenset(end_ids)
        self.answers: list[Answer] = []
        self.echo = echo
        self.error: RequestError | None = None

    @property
    def is_done(self) -> bool:
        """Whether all answers are at their end."""
        return all(answer.finish_reason is not None for answer in self.answers)

    @property
    def generated_tokens(self) -> int:
        """Number of tokens of all answers."""
        return sum(len(answer.tokens) for answer in self.answers)

    def fail(self, error: RequestError) -> None:
        """End all answers because of an error."""
        self.error = error
        for answer in self.answers:
            answer.finish_reason = "error"

    def end(self, reason: FinishReason) -> None:
        """End the answers that still go on."""
        for answer in self.answers:
            if answer.finish_reason is None:
                try:
                    answer.finish(reason)
                except Exception as exc:
                    self.fail(RequestError("engine_error", f"`on_text` failed: {exc}. Correct it."))

    def completion(self) -> Completion:
        """Return what the request came to.

        Raises:
            RequestError: If an answer does not have the form that was asked for.
        """
        first = self.answers[0]
        return Completion(
            text=self.echo + first.text,
            finish_reason=first.finish_reason or "stop",
            prompt_tokens=len(self.prompt_ids),
            generated_tokens=self.generated_tokens,
            seconds=self.submission.seconds,
            request_id=self.submission.request.id,
            alternatives=tuple(self.echo + answer.text for answer in self.answers[1:]),
            logprobs=tuple(first.logprobs) if self.options.logprobs else None,
            parsed=self._parse(),
        )

    def _parse(self) -> Any:
        """Check the form of the answers, and return the value of the first where it is JSON."""
        form = self.options.response_format
        if form is None or self.answers[0].finish_reason in ("deadline", "cancelled"):
            return None
        values = [check_form(answer.text, form) for answer in self.answers]
        return values[0] if form.json_schema is not None else None
