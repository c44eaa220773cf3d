"""What the engines on Transformers do with a request before and after the model: prompt, tokens, checks, completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefect.logging import get_logger

from prefect_huggingface.blocks import GenerationOptions
from prefect_huggingface.tasks.engines.answers import Answer, Job, Submission
from prefect_huggingface.tasks.engines.failures import RequestError
from prefect_huggingface.tasks.engines.prompts import PromptWriter, fit_context, refuse_images, resolve_options
from prefect_huggingface.tasks.engines.transformers.grammars import GrammarMaker
from prefect_huggingface.tasks.engines.transformers.sampling import TokenChooser
from prefect_huggingface.tasks.engines.transformers.tokenization import (
    TransformersTokenizer,
    context_length_of,
    end_tokens,
)

logger = get_logger(__name__)


class TextJobs:
    """Makes jobs of requests, and completions of jobs.

    Attributes:
        prompts: Writes the prompts of the model.
        tokenizer: Tokenizer of the model.
        end_ids: Tokens that end an answer.
        context_length: Number of tokens of prompt and answer together, or None where it is not known.
        prefix: Words that the model wants before a prompt.
        is_continued: Whether the answer goes on where the prompt ends. Otherwise the context and the repetition penalty
            count them apart.
    """

    prefix = ""
    is_continued = True

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
        text = prompt.text if prompt.text.startswith(self.prefix) else self.prefix + prompt.text
        ids = self.tokenizer.encode(text, add_special_tokens=prompt.add_special_tokens)
        fitted = options if self.is_continued else options.model_copy(update={"max_new_tokens": 0})
        fitting = fit_context(ids, fitted, self.context_length)
        if fitting is None:
            submission.skip(len(ids))
            return None
        return self.job_of(submission, options, fitting, echo=prompt.text if options.echo else "")

    def job_of(
        self,
        submission: Submission,
        options: GenerationOptions,
        prompt_ids: Sequence[int],
        echo: str = "",
    ) -> Job:
        """Return a job with its answers.

        Args:
            submission: Request with its future.
            options: Options of the request over those of the model.
            prompt_ids: Tokens of the prompt.
            echo: Text to put before each answer.

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
            seen = prompt_ids if self.is_continued else ()
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
            submission.fail(job.error.code, str(job.error), **counts)
        elif submission.closed.is_set() and job.answers[0].finish_reason == "cancelled":
            submission.cancel()
        else:
            try:
                submission.complete(job.completion())
            except RequestError as exc:
                submission.fail(exc.code, str(exc), **counts)
