"""A request inside the OpenVINO engine: its answers, each with a handle of the pipeline and a stream of text.

A row can be started again from its beginning, after the pipeline had to be cleared: the text that was streamed already
is not streamed twice.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any

from prefect_huggingface.blocks import GenerationOptions
from prefect_huggingface.tasks.engines.answer_forms import check_form
from prefect_huggingface.tasks.engines.answers import Submission
from prefect_huggingface.tasks.engines.failures import RequestError, failed
from prefect_huggingface.tasks.engines.openvino.codec import TextCodec
from prefect_huggingface.tasks.engines.stopping import TextStream
from prefect_huggingface.tasks.engines.structured import WhiteSpaceGuard
from prefect_huggingface.tasks.records import Completion, FinishReason

Start = Callable[[Sequence[int], GenerationOptions, int], Any]
"""Adds an answer to the pipeline, by prompt tokens, options and seed, and returns its handle."""

SEED_LIMIT = 2**63


class CacheExhausted(Exception):
    """The KV cache is full and the pipeline has given a row up."""


class Strand:
    """One answer of a row.

    Attributes:
        tokens: Tokens that were generated, without the end token.
        logprobs: Log probability of each of them, where asked for.
        finish_reason: Why it ended, or None while it goes on.
        text: Text of the answer, once it has ended.
        seed: Seed of the answer.
    """

    def __init__(self, row: Row, index: int) -> None:
        self._row = row
        self._streams = index == 0 and row.submission.on_text is not None
        self._delivered = 0
        self.seed = (row.seed + index) % SEED_LIMIT
        self.restart()

    def restart(self) -> None:
        """Go back to the beginning."""
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.finish_reason: FinishReason | None = None
        self.text = ""
        self._repeated = self._delivered
        form = self._row.options.response_format
        self._guard = WhiteSpaceGuard() if form is not None and form.json_schema is not None else None
        on_text = self._deliver if self._streams or self._guard is not None else None
        self._text = TextStream(self._row.codec.decode, self._row.options.stop, on_text)

    def take(self, tokens: Sequence[int], logprobs: Sequence[float]) -> None:
        """Go on with the next tokens, up to the end of the answer."""
        for place, token in enumerate(tokens):
            if self.finish_reason is not None:
                return
            if token in self._row.end_tokens and not self._row.options.ignore_eos:
                self.end("stop")
                return
            self.tokens.append(token)
            self.logprobs += logprobs[place : place + 1]
            if self._text.push((token,)):
                self.end("stop")

    def end(self, reason: FinishReason) -> None:
        """End the answer."""
        if self.finish_reason is None:
            self.text = self._text.finish()
            # The end of the text, held back until now, may hold a stop string.
            self.finish_reason = "stop" if self._text.stopped else reason

    def _deliver(self, text: str) -> None:
        """Stream a piece, but for what was streamed before a restart."""
        if self._guard is not None:
            self._guard.feed(text)
        if not self._streams:
            return
        skipped = min(self._repeated, len(text))
        self._repeated -= skipped
        if len(text) > skipped:
            self._delivered += len(text) - skipped
            self._row.stream(text[skipped:])


class Row:
    """A request that is understood: its prompt's tokens, its options and its answers.

    Attributes:
        proven: Whether the pipeline has made a step with it, so that it is not what makes a step fail.
        alone: Whether it is to run with no other beside it.
    """

    def __init__(
        self,
        submission: Submission,
        options: GenerationOptions,
        prompt_tokens: Sequence[int],
        end_tokens: frozenset[int],
        codec: TextCodec,
        echo: str = "",
    ) -> None:
        """Start without handles.

        Args:
            submission: Request with its future.
            options: Options of the request over those of the model.
            prompt_tokens: Tokens of the prompt, as the model sees them.
            end_tokens: Tokens that end an answer.
            codec: Tokenizer.
            echo: Text to put before every answer.
        """
        self.submission = submission
        self.options = options
        self.prompt_tokens = list(prompt_tokens)
        self.end_tokens = end_tokens
        self.codec = codec
        self.echo = echo
        # A row that is started again must draw the same tokens, so that every row has a seed.
        self.seed = secrets.randbelow(SEED_LIMIT) if options.seed is None else options.seed
        self.proven = False
        self.alone = False
        self.strands = [Strand(self, index) for index in range(options.n)]
        self._handles: list[Any] = []
        self._echoed = False
        if options.deadline_seconds is not None:
            submission.deadline = submission.submitted_at + options.deadline_seconds

    @property
    def width(self) -> int:
        """Number of sequences that the row takes in a batch."""
        return max(self.options.num_beams, self.options.n)

    @property
    def most_tokens(self) -> int:
        """Number of tokens in the KV cache that the row can come to need, its answers together."""
        return self.width * (len(self.prompt_tokens) + self.options.max_new_tokens)

    @property
    def is_done(self) -> bool:
        """Whether all answers have ended."""
        return all(strand.finish_reason is not None for strand in self.strands)

    @property
    def generated_tokens(self) -> int:
        """Number of tokens of all answers so far."""
        return sum(len(strand.tokens) for strand in self.strands)

    @property
    def has_begun(self) -> bool:
        """Whether the prompt is computed and the first token is there."""
        return any(strand.tokens or strand.finish_reason for strand in self.strands)

    def start(self, add: Start) -> None:
        """Put the answers into the pipeline."""
        if self.echo and not self._echoed:
            self._echoed = True
            self.stream(self.echo)
        for strand in self.strands[:1] if self.options.num_beams > 1 else self.strands:
            self._handles.append(add(self.prompt_tokens, self.options, strand.seed))

    def collect(self) -> None:
        """Take what the pipeline has made since the last step.

        Raises:
            CacheExhausted: If the pipeline gave the row up because its cache is full.
        """
        for place, handle in enumerate(self._handles):
            strands = self.strands if self.options.num_beams > 1 else self.strands[place : place + 1]
            if all(strand.finish_reason is not None for strand in strands):
                continue
            _read(handle, strands)
            status = handle.get_status().name
            if status == "IGNORED":
                raise CacheExhausted
            if all(strand.finish_reason is not None for strand in strands):
                # A stop string was found; the handle gives its room back in the next step.
                handle.cancel()

    def leave(self) -> None:
        """Take the answers out of the pipeline, which frees them in its next step."""
        for handle in self._handles:
            handle.cancel()
        self._handles = []

    def restart(self) -> None:
        """Go back to the beginning, out of the pipeline."""
        self.leave()
        for strand in self.strands:
            strand.restart()
        self.proven = False

    def stream(self, text: str) -> None:
        """Give a piece of text to the caller."""
        if self.submission.on_text is None or self.submission.future.done():
            return
        try:
            self.submission.on_text(text)
        except Exception as exc:
            raise RequestError("engine_error", f"`on_text` failed: {type(exc).__name__}: {exc}. Correct it.") from exc

    def end(self, reason: FinishReason) -> None:
        """End the answers that still go on."""
        self.leave()
        for strand in self.strands:
            strand.end(reason)

    def completion(self) -> Completion:
        """Return what the request came to."""
        first = self.strands[0]
        counts: dict[str, Any] = {
            "prompt_tokens": len(self.prompt_tokens),
            "generated_tokens": self.generated_tokens,
            "seconds": self.submission.seconds,
        }
        try:
            parsed = self._parse(first)
        except RequestError as exc:
            return failed(self.submission.request, exc.code, str(exc), **counts)
        return Completion(
            text=self.echo + first.text,
            finish_reason=first.finish_reason or "stop",
            request_id=self.submission.request.id,
            alternatives=tuple(self.echo + strand.text for strand in self.strands[1:]),
            logprobs=tuple(first.logprobs) if self.options.logprobs else None,
            parsed=parsed,
            **counts,
        )

    def _parse(self, first: Strand) -> Any:
        form = self.options.response_format
        if form is None or first.finish_reason == "deadline":
            return None
        values = [check_form(strand.text, form) for strand in self.strands]
        return values[0] if form.json_schema is not None else None


def _read(handle: Any, strands: Sequence[Strand]) -> None:
    """Give the strands what a handle holds, the best answer first."""
    while handle.can_read():
        outputs = sorted(handle.read().values(), key=lambda output: -output.score)
        for strand, output in zip(strands, outputs, strict=False):
            strand.take(output.generated_ids, output.generated_log_probs)
            if output.finish_reason.name == "LENGTH":
                strand.end("length")
            elif output.finish_reason.name != "NONE":
                strand.end("stop")
