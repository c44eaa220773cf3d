"""One request while it is worked on, on every backend: its sequences, their text, and what it comes to.

A backend says which tokens (or which text, from an endpoint) came, and asks whether a sequence still runs. All else is
decided here: stop strings, echo, reasoning, deadline, cancellation, streaming, response formats and the completion.

A model that reasons may need *phases*: the thoughts are free, or limited by `max_reasoning_tokens`, and only the answer
keeps to a grammar. At the border of two phases `Sequence.must_resubmit` is set: the backend takes the sequence out and
goes on from its `context_ids`, which may end with tokens that were put there and not generated.
"""

from __future__ import annotations

import math
import re
import secrets
import time
from collections.abc import Collection, Iterable, Mapping
from collections.abc import Sequence as Items
from concurrent.futures import Future, InvalidStateError
from typing import Any, Literal

from prefect.logging import get_logger

from prefect_huggingface.blocks import GenerationOptions, ResponseFormat
from prefect_huggingface.tasks.engines.base import OnText, RequestError
from prefect_huggingface.tasks.engines.detokenizer import REPLACEMENT, StopStrings, Tokenizer, split_text
from prefect_huggingface.tasks.engines.reasoning import ReasoningFormat, ReasoningSplitter
from prefect_huggingface.tasks.engines.structured import WhiteSpaceGuard, validate_output
from prefect_huggingface.tasks.engines.tool_calls import TOOL_MARKS
from prefect_huggingface.tasks.records import Completion, ErrorCode, FinishReason, Request

logger = get_logger(__name__)

SEED_LIMIT = 2**63


class RequestState:
    """A request from its submission to its completion. Only the thread of its engine changes it.

    Attributes:
        future: Future of the completion. It is never marked as running, so that it can be cancelled at any time.
        options: Options of the request over those of the model, once `begin` was called.
        prompt_ids: Tokens of the prompt, as the model sees them; empty where a server makes them.
        prompt_tokens: Number of tokens of the prompt, with those of images where known.
        end_ids: Tokens that end a sequence.
        sequences: The answers that are asked for, the first one first.
        counted_tokens: Number of generated tokens as a server counts them, None to count here.
        error: Why the request failed, or None.
        restart_error: Code of the error when a second attempt differs from what was streamed already.
        multimodal: What a reader of images has prepared for the engine, or None.
        needs_choice_scores: Whether the backend has still to score the choices, where the answer begins.
        encoded: Tokens of a text for a vector or a score, or None.
        vector: The vector or the score, once it is there.
    """

    def __init__(self, request: Request, on_text: OnText | None = None, on_reasoning: OnText | None = None) -> None:
        self.request = request
        self.on_text, self.on_reasoning = on_text, on_reasoning
        self.future: Future[Completion] = Future()
        self.submitted_at = time.perf_counter()
        self.options = GenerationOptions()
        self.prompt_ids: list[int] = []
        self.prompt_tokens = 0
        self.end_ids: frozenset[int] = frozenset()
        self.tokenizer: Tokenizer | None = None
        self.echo = ""
        self.reasoning: ReasoningFormat | None = None
        self.tags: dict[int, str] = {}
        self.sequences: list[Sequence] = []
        self.counted_tokens: int | None = None
        self.error: RequestError | None = None
        self.restart_error: ErrorCode = "engine_error"
        self.multimodal: Any = None
        self.needs_choice_scores = False
        self._choice_probabilities: dict[str, float] | None = None
        self.encoded: Any = None
        self.vector: Any = None
        self._ended: FinishReason | None = None
        self._deadline = float("inf")
        self._set_deadline(request.options)

    def _set_deadline(self, options: Any) -> None:
        """Take the deadline of options, which may not be checked yet."""
        given = options if isinstance(options, Mapping) else getattr(options, "__dict__", {})
        seconds = given.get("deadline_seconds")
        if isinstance(seconds, (int, float)):
            self._deadline = self.submitted_at + seconds

    def begin(
        self,
        options: GenerationOptions,
        prompt_ids: Items[int],
        tokenizer: Tokenizer | None,
        end_ids: Collection[int] = (),
        echo: str = "",
        reasoning: ReasoningFormat | None = None,
    ) -> None:
        """Make the sequences of a request that is understood.

        Args:
            options: Options of the request over those of the model.
            prompt_ids: Tokens of the prompt.
            tokenizer: Gives the text of tokens; None for an endpoint, which gives text.
            end_ids: Tokens that end a sequence.
            echo: Text to put before every answer.
            reasoning: How the model marks its reasoning, None where it shows none.
        """
        self.options, self.prompt_ids, self.tokenizer = options, list(prompt_ids), tokenizer
        self.prompt_tokens = len(self.prompt_ids)
        self.end_ids, self.echo, self.reasoning = frozenset(end_ids), echo, reasoning
        self.needs_choice_scores = bool(self.choices)
        # A request that is started again must draw the same tokens, so that every request has a seed.
        self.seed = secrets.randbelow(SEED_LIMIT) if options.seed is None else options.seed
        self._set_deadline(options)
        # Special tokens have no text of their own; those that are, or make up, one of these marks are kept.
        marks = [*(TOOL_MARKS if self.request.tools else ()), *(reasoning.visible_marks if reasoning else ())]
        parts = {part for mark in marks for part in (mark, *re.findall(r"<[^<>]+>|\[[^\[\]]+\]", mark))}
        ids = {part: tokenizer.special_id(part) for part in parts} if tokenizer is not None else {}
        self.tags = {token: part for part, token in ids.items() if token is not None}
        self.sequences = [Sequence(self, index) for index in range(options.n)]
        for sequence in self.sequences:
            sequence.begin()

    @property
    def seconds_left(self) -> float:
        """Seconds until the deadline, infinite where there is none."""
        return self._deadline - time.perf_counter()

    @property
    def abort_reason(self) -> FinishReason | None:
        """Why the request must end now, however far it is, or None."""
        if self.future.cancelled():
            return "cancelled"
        return "deadline" if self.seconds_left < 0 else None

    @property
    def is_done(self) -> bool:
        """Whether there is nothing more to generate."""
        if self.error is not None or self._ended is not None:
            return True
        if self.needs_choice_scores and self.sequences and self.sequences[0].phase == "answer":
            return False
        # Asked for every request in every step: a loop is half the price of `all`.
        for sequence in self.sequences:
            if sequence.finish_reason is None:
                return False
        return bool(self.sequences)

    @property
    def seconds(self) -> float:
        """Seconds since the submission."""
        return time.perf_counter() - self.submitted_at

    @property
    def generated_tokens(self) -> int:
        """Number of tokens of all sequences."""
        if self.counted_tokens is not None:
            return self.counted_tokens
        return sum(sequence.generated_tokens for sequence in self.sequences)

    @property
    def choices(self) -> list[str]:
        """Choices whose probabilities are asked for."""
        form = self.options.response_format
        return list(form.choices or ()) if form is not None and self.options.choice_probabilities else []

    @property
    def choice_ids(self) -> list[list[int]]:
        """Tokens of the choices."""
        assert self.tokenizer is not None
        return [self.tokenizer.encode(choice, add_special_tokens=False) for choice in self.choices]

    def set_choice_scores(self, scores: Iterable[float]) -> None:
        """Take the log probability (nats) of each choice: the sum over its tokens."""
        scores = list(scores)
        best = max(scores)
        weights = [math.exp(score - best) for score in scores]
        shares = (weight / sum(weights) for weight in weights)
        self._choice_probabilities = dict(zip(self.choices, shares, strict=True))
        self.needs_choice_scores = False

    @property
    def num_seqs(self) -> int:
        """Number of sequences that the request takes in a batch."""
        return max(self.options.num_beams, self.options.n)

    def fail(self, code: ErrorCode, message: str) -> None:
        """End the request with an error. The first error counts."""
        self.error = self.error or RequestError(code, message)
        for sequence in self.sequences:
            sequence.finish_reason = "error"

    def fail_with(self, exc: Exception, problem: str, remedy: str) -> None:
        """End the request with an exception; a problem and its remedy go with one that is no `RequestError`."""
        if isinstance(exc, RequestError):
            self.prompt_tokens = self.prompt_tokens or exc.prompt_tokens
            self.fail(exc.code, str(exc))
        else:
            logger.warning("Request %r failed. %s.", self.request.id, problem, exc_info=exc)
            self.fail("engine_error", f"{problem}: {type(exc).__name__}: {exc}. {remedy}")

    def end(self, reason: FinishReason) -> None:
        """End the sequences that still run."""
        self._ended = reason
        for sequence in self.sequences:
            sequence.finish(reason)

    def skip(self, prompt_tokens: int) -> None:
        """End the request, whose prompt is too long and is to be skipped."""
        self._ended, self.prompt_tokens = "skipped", prompt_tokens

    def restart(self) -> None:
        """Go back to the beginning, after the backend had to let go of the request.

        What was streamed is not streamed again.
        """
        for sequence in self.sequences:
            sequence.begin()

    def complete(self, completion: Completion | None = None) -> None:
        """Set the result of the future, unless the caller cancelled it. It always gets one.

        Args:
            completion: What another process has made of the request; None to make it here.
        """
        if self.future.cancelled():
            return
        try:
            completion = completion or (self._completed() if self.error is None else None)
        except Exception as exc:
            self.fail_with(exc, "The completion cannot be made", "Change its options.")
        try:
            self.future.set_result(completion or self._failed())
        except InvalidStateError:
            if not self.future.cancelled():
                raise

    def _failed(self) -> Completion:
        assert self.error is not None
        return self._completion("", "error", error=str(self.error), error_code=self.error.code)

    def _completed(self) -> Completion:
        first = self.sequences[0] if self.sequences else None
        return self._completion(
            self.echo + first.text if first else "",
            (first.finish_reason if first else self._ended) or "stop",
            alternatives=tuple(self.echo + sequence.text for sequence in self.sequences[1:]),
            logprobs=tuple(first.logprobs) if first and self.options.logprobs else None,
            tokens=tuple(first.token_texts) if first and self.options.logprobs else None,
            parsed=self._parse(),
            reasoning=first.reasoning if first else None,
            choice_probabilities=self._choice_probabilities,
            vector=self.vector,
        )

    def _completion(self, text: str, reason: FinishReason, **more: Any) -> Completion:
        counts = (self.prompt_tokens, self.generated_tokens, self.seconds)
        return Completion(text, reason, *counts, request_id=self.request.id, **more)

    def _parse(self) -> Any:
        """Check the form of the answers, and return the value of the first where it is JSON."""
        form = self.options.response_format
        if form is None or not self.sequences or self.sequences[0].finish_reason in ("deadline", "cancelled"):
            return None
        try:
            values = [validate_output(sequence.text, form) for sequence in self.sequences]
        except RequestError:
            if self.request.check_form:
                raise
            return None
        return values[0] if form.json_schema is not None else None


class Sequence:
    """One answer while it is generated. No method raises: what goes wrong is the error of the request.

    Attributes:
        tokens: Tokens that were generated, without the end token, and those that were put between two phases.
        logprobs: Log probability (nats) of each generated one, where asked for.
        given_texts: Texts of the tokens, where the backend gives no tokens but tells these.
        finish_reason: Why it ended, or None while it goes on.
        must_resubmit: Whether the backend must take it out and go on from `context_ids`, and set this back.
        text: The answer, once it has ended.
        reasoning: Reasoning of the model once the sequence has ended, None where it shows none.
        sampler: What a backend that samples itself keeps for this phase.
    """

    sampler: Any = None

    def __init__(self, state: RequestState, index: int) -> None:
        self.state, self.index = state, index
        # Several answers cannot share one stream of text, so the first one has it.
        self._text_out = _Delivery(state, state.on_text if index == 0 else None)
        self._reasoning_out = _Delivery(state, state.on_reasoning if index == 0 else None)
        self.finish_reason: FinishReason | None = None

    def begin(self) -> None:
        """Start from the prompt, for the first time or again."""
        options, reasoning = self.state.options, self.state.reasoning
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.given_texts: list[str] = []
        self.finish_reason = None if self.state.error is None else "error"
        self.must_resubmit = False
        self.text = ""
        self.reasoning: str | None = None
        self._inserted = self._inserted_at = 0
        has_phases = options.response_format is not None or options.max_reasoning_tokens is not None
        is_split = reasoning is not None and self.state.tokenizer is not None and options.num_beams == 1
        self.phase: Literal["reasoning", "answer"] = "reasoning" if has_phases and is_split else "answer"
        self._guarded(self._begin_text)
        if self.phase == "reasoning" and options.max_reasoning_tokens == 0:
            self._guarded(self._end_reasoning, 0)
            self.must_resubmit = False

    @property
    def is_running(self) -> bool:
        """Whether the backend goes on with it as it is."""
        return self.finish_reason is None and not self.must_resubmit

    @property
    def seed(self) -> int:
        """Seed of what comes next."""
        phase = 2**32 if self._inserted or self.phase == "reasoning" else 0
        return (self.state.seed + self.index + phase) % SEED_LIMIT

    @property
    def context_ids(self) -> list[int]:
        """Tokens to go on from: the prompt and the sequence so far."""
        return [*self.state.prompt_ids, *self.tokens]

    @property
    def length(self) -> int:
        """Number of the tokens to go on from."""
        return len(self.state.prompt_ids) + len(self.tokens)

    @property
    def generated_tokens(self) -> int:
        """Number of tokens that the model generated."""
        return len(self.tokens) - self._inserted

    @property
    def token_texts(self) -> list[str]:
        """Texts of the generated tokens, where their log probabilities are known."""
        if self.state.tokenizer is None:
            return self.given_texts
        begin, end = self._inserted_at, self._inserted_at + self._inserted
        return split_text(self.state.tokenizer, [*self.tokens[:begin], *self.tokens[end:]])

    @property
    def tokens_left(self) -> int:
        """Greatest number of tokens that are still to come."""
        return self.state.options.max_new_tokens - self.generated_tokens

    @property
    def least_tokens_left(self) -> int:
        """Number of tokens that are still to come before an end token may."""
        return max(self.state.options.min_new_tokens - self.generated_tokens, 0)

    @property
    def response_format(self) -> ResponseFormat | None:
        """Form of what comes next, None where it is free."""
        return None if self.phase == "reasoning" else self.state.options.response_format

    def append(self, token: int, logprob: float | None = None) -> bool:
        """Go on with the next token.

        Returns:
            Whether the sequence still runs. Tokens after its end are ignored.
        """
        if not self.is_running:
            return False
        if token in self.state.end_ids and not self.state.options.ignore_eos:
            self.finish("stop")
            return False
        self.tokens.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        if self._is_watched:
            self._guarded(self._read, token)
        if self.finish_reason is None and self.tokens_left <= 0:
            self.must_resubmit = False  # the thoughts have taken all
            self.finish("length")
        return self.is_running

    def append_text(self, text: str) -> bool:
        """Go on with a piece of text, where the backend gives no tokens.

        Returns:
            Whether the sequence still runs.
        """
        if self.finish_reason is None and text:
            self._guarded(self._read_text, text)
            if self._stops.found:
                self.finish("stop")
        return self.finish_reason is None

    def append_reasoning(self, text: str) -> None:
        """Go on with a piece of reasoning that the backend keeps apart itself."""
        if self.finish_reason is None:
            self._guarded(self._add, text, "")

    def finish(self, reason: FinishReason) -> None:
        """End the sequence."""
        if self.finish_reason is not None:
            return
        self._guarded(self._read_rest, reason)
        if self.finish_reason is None:
            # The end of the text, held back until now, may hold a stop string.
            self.finish_reason = "stop" if self._stops.found else reason
            self.text = "".join(self._answer)
            self.reasoning = "".join(self._reasoning).strip() if self._reasoning else None

    def _guarded(self, call: Any, *arguments: Any) -> None:
        try:
            call(*arguments)
        except Exception as exc:
            self.state.fail_with(exc, "The text cannot be made", "Report it.")

    def _begin_text(self) -> None:
        options, tokenizer, reasoning = self.state.options, self.state.tokenizer, self.state.reasoning
        self._detokenizer = None if tokenizer is None else tokenizer.open_stream()
        self._splitter = None if reasoning is None else ReasoningSplitter(reasoning)
        self._stops = StopStrings(options.stop)
        is_json = options.response_format is not None and options.response_format.json_schema is not None
        self._guard = WhiteSpaceGuard() if is_json else None
        self._raw: list[str] = []
        self._answer: list[str] = []
        self._reasoning: list[str] = []
        # Tokens that went into the detokenizer, those whose text came out, and those before the answer began.
        self._fed = self._decoded = self._settled = 0
        self._text_out.restart()
        self._reasoning_out.restart()
        # Where nobody looks at the text before its end, it is cheaper to decode all of it at once.
        is_streamed = bool(self._text_out or self._reasoning_out)
        self._is_watched = bool(options.stop or is_streamed or is_json or self.state.tags or self.phase == "reasoning")
        self._text_out.push(self.state.echo)

    def _read(self, token: int) -> None:
        assert self._detokenizer is not None
        self._fed += 1
        text = self._detokenizer.step(token)
        text = self.state.tags.get(token, text)
        if text:
            self._decoded = self._fed
            began = self._read_text(text)
            if self._stops.found:
                self.finish("stop")
        if self.phase == "reasoning":
            self._follow_reasoning(bool(text), bool(text) and began)

    def _read_text(self, text: str) -> bool:
        """Take in a piece of text, and return whether there is something of the answer in it."""
        self._raw.append(text)
        reasoning, answer = self._splitter.feed(text) if self._splitter is not None else ("", text)
        # An answer with a form begins again in its own phase, where it keeps to it.
        begins_again = self.phase == "reasoning" and self.state.options.response_format is not None
        self._add(reasoning, "" if begins_again else answer)
        return bool(answer.strip())

    def _add(self, reasoning: str, answer: str) -> None:
        if reasoning:
            self._reasoning.append(reasoning)
            self._reasoning_out.push(reasoning)
        self._emit(self._stops.feed(answer))

    def _emit(self, text: str) -> None:
        if not text:
            return
        self._answer.append(text)
        self._text_out.push(text)
        if self._guard is None:
            return
        try:
            self._guard.feed(text)
        except RequestError:
            if self.state.request.check_form:
                raise
            self._guard = None
            self.finish("length")

    def _read_rest(self, reason: FinishReason) -> None:
        """Take in the end of the text, which was held back."""
        if not self._stops.found:
            self._decode_rest()
            if self._splitter is not None:
                self._add(*self._splitter.finish())
            if not self._stops.found:
                self._emit(self._stops.finish())
        if reason in ("deadline", "cancelled") and self._text_out.is_behind:
            # An attempt that was ended early has not come as far as the one before it.
            self._answer = [self._text_out.delivered[len(self.state.echo) :]]

    def _decode_rest(self) -> None:
        """Take in the text of the tokens that have none yet."""
        tokenizer = self.state.tokenizer
        if tokenizer is None or self._decoded == len(self.tokens):
            return
        whole = tokenizer.decode(self.tokens)
        if not self._is_watched and REPLACEMENT in whole:
            # The text of invalid bytes must not depend on whether somebody looks at it.
            for token in self.tokens:
                self._read(token)
        known = "".join(self._raw)
        rest = whole[len(known) :] if whole.startswith(known) else tokenizer.decode(self.tokens[self._decoded :])
        if rest and not self._stops.found:
            self._read_text(rest)

    def _follow_reasoning(self, has_text: bool, answer_began: bool) -> None:
        options = self.state.options
        if answer_began and options.response_format is None:
            self.phase = "answer"
        elif answer_began:
            self._end_reasoning(self._settled)
        elif options.max_reasoning_tokens is not None and len(self.tokens) >= options.max_reasoning_tokens:
            self._end_reasoning(len(self.tokens))
        elif has_text:
            self._settled = len(self.tokens)

    def _end_reasoning(self, count: int) -> None:
        """Begin the phase of the answer after so many tokens; the reasoning is closed where it is still open."""
        form, tokenizer = self.state.reasoning, self.state.tokenizer
        assert form is not None
        assert tokenizer is not None
        kept = self.tokens[:count]
        text = "".join(self._raw) if count == len(self.tokens) else "".join(self._raw[:-1])
        is_open = form.starts_open or form.start in text
        closing = ""
        if form.end not in text and (is_open or count == len(self.tokens)):
            closing = ("" if is_open else form.start) + (form.closing or f"\n{form.end}\n\n")
        inserted = tokenizer.encode(closing, add_special_tokens=False) if closing else []
        self.tokens, self.logprobs = [*kept, *inserted], self.logprobs[:count]
        self._inserted, self._inserted_at = len(inserted), count
        self.phase, self.must_resubmit = "answer", True
        self._begin_text()
        self._is_watched = True
        for token in self.tokens:
            self._read(token)


class _Delivery:
    """Gives text to a receiver piece by piece, and each piece once, also when it comes again after a restart.

    Attributes:
        delivered: Text that was given out.
    """

    def __init__(self, state: RequestState, receiver: OnText | None) -> None:
        self._state = state
        self._receiver = receiver
        self._position = 0
        self.delivered = ""

    def __bool__(self) -> bool:
        return self._receiver is not None

    @property
    def is_behind(self) -> bool:
        """Whether less has come since a restart than was given out before it."""
        return self._position < len(self.delivered)

    def restart(self) -> None:
        """Expect the text from its beginning."""
        self._position = 0

    def push(self, text: str) -> None:
        """Go on with a piece.

        Raises:
            RequestError: If it is not what was given out before, or the receiver fails.
        """
        if self._receiver is None or not text or self._state.future.done():
            return
        begin, self._position = self._position, self._position + len(text)
        known = self.delivered[begin : self._position]
        if not text.startswith(known):
            raise RequestError(
                self._state.restart_error,
                "The answer had to be made a second time and came differently. Set a seed, or do not stream it.",
            )
        if len(text) == len(known):
            return
        self.delivered += text[len(known) :]
        try:
            self._receiver(text[len(known) :])
        except Exception as exc:
            raise RequestError("engine_error", f"`on_text` failed: {type(exc).__name__}: {exc}. Correct it.") from exc
