"""What the engines on Transformers do with a request before and after the model: prompt, tokens, checks, completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefect.logging import get_logger

from prefect_huggingface.blocks import GenerationOptions
from prefect_huggingface.tasks.engines.answers import Answer, Job, Submission
from prefect_huggingface.tasks.engines.failures import RequestError
from prefect_huggingface.tasks.engines.prompts import PromptWriter, fit_context, refuse_images, resolve_options
from prefect_huggingface.tasks.engines.threads import fail
from prefect_huggingface.tasks.engines.transformers.grammars import GrammarMaker
from prefect_huggingface.tasks.engines.transformers.sampling import TokenChooser
from prefect_huggingface.tasks.engines.transformers.tokenization import (
    TransformersTokenizer,
    context_length_of,
    end_tokens,
)
from prefect_huggingface.tasks.records import Completion

logger = get_logger(__name__)


class TextJobs:
    """Makes jobs of requests, and completions of jobs.

    Attributes:
        prompts: Writes the prompts of the model.
        tokenizer: Tokenizer of the model.
        end_ids: Tokens that end an answer.
        context_length: Number of tokens of prompt and answer together, or None where it is not known.
    """

    def __init__(self, loaded: Any, tokenizer: Any, prompts: PromptWriter, defaults: GenerationOptions) -> None:
        self.prompts = prompts
        self._defaults = defaults
        self.tokenizer = TransformersTokenizer(tokenizer)
        self.end_ids = end_tokens(loaded, tokenizer)
        self.context_length = context_length_of(loaded.config)
        self._grammars = GrammarMaker(tokenizer, loaded.config.get_text_config(decoder=True).vocab_size, self.end_ids)

    def make(self, submission: Submission) -> Job | None:
        """Return the job of a request, or None where it is completed already.

        Raises:
            RequestError: If the request cannot be worked on.
        """
        options = resolve_options(self._defaults, submission.request)
        refuse_images(submission.request)
        prompt = self.prompts.write(submission.request)
        ids = self.tokenizer.encode(prompt.text, add_special_tokens=prompt.add_special_tokens)
        fitting = fit_context(ids, options, self.context_length)
        if fitting is None:
            skip(submission, len(ids))
            return None
        return self.job_of(submission, options, fitting, echo=prompt.text if options.echo else "")

    def job_of(
        self,
        submission: Submission,
        options: GenerationOptions,
        prompt_ids: Sequence[int],
        echo: str = "",
        seen_ids: Sequence[int] | None = None,
    ) -> Job:
        """Return a job with its answers.

        Args:
            submission: Request with its future.
            options: Options of the request over those of the model.
            prompt_ids: Tokens of the prompt.
            echo: Text to put before each answer.
            seen_ids: Tokens that the repetition penalty counts; those of the prompt where they are left out.

        Raises:
            RequestError: If the answers cannot have the form that is asked for.
        """
        form = options.response_format
        if form is not None and options.num_beams > 1:
            raise RequestError("invalid_option", "`response_format` does not go with beams. Set `num_beams` to 1.")
        if options.deadline_seconds is not None:
            submission.deadline = submission.submitted_at + options.deadline_seconds
        job = Job(submission, options, prompt_ids, self.end_ids, echo)
        for index in range(options.n):
            grammar = self._grammars.make(form) if form is not None else None
            seen = prompt_ids if seen_ids is None else seen_ids
            chooser = TokenChooser(options, seen, self.end_ids, index, grammar)
            job.answers.append(Answer(job, index, self.tokenizer.decode, chooser))
        if echo and submission.on_text is not None:
            submission.on_text(echo)
        return job

    def take(self, answer: Answer, token: int, logprob: float | None) -> None:
        """Give an answer its next token. An error of the receiver of its text ends this request alone."""
        try:
            answer.take(token, logprob)
        except Exception as exc:
            logger.warning("The receiver of the text of request %r failed.", answer.job.submission.request.id)
            answer.job.fail(RequestError("engine_error", f"`on_text` failed: {type(exc).__name__}: {exc}. Correct it."))

    def complete(self, job: Job) -> None:
        """Set the result of a job whose answers are at their end."""
        submission = job.submission
        counts = {"prompt_tokens": len(job.prompt_ids), "generated_tokens": job.generated_tokens}
        if job.error is not None:
            fail(submission, job.error.code, str(job.error), **counts)
        elif submission.closed.is_set() and job.answers[0].finish_reason == "cancelled":
            fail(submission, "cancelled", "The engine was closed before the request was done. Load the engine again.")
        else:
            try:
                submission.complete(job.completion())
            except RequestError as exc:
                fail(submission, exc.code, str(exc), **counts)


def skip(submission: Submission, prompt_tokens: int) -> None:
    """Complete a submission whose prompt is too long and is to be skipped."""
    submission.complete(
        Completion("", "skipped", prompt_tokens, seconds=submission.seconds, request_id=submission.request.id)
    )
