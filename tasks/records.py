"""The small records that tasks take and return. They hold places and counts, never models or secrets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from prefect_huggingface.blocks import EmbeddingOptions, GenerationOptions

Message = Mapping[str, Any]
"""One chat message: `role` ("system", "user", "assistant" or "tool") and `content`."""

FinishReason = Literal["stop", "length", "cancelled", "deadline", "skipped", "error"]

ErrorCode = Literal[
    "empty_prompt", "too_long", "invalid_option", "invalid_prompt", "schema_invalid", "out_of_cache",
    "out_of_memory", "deadline", "cancelled", "engine_error", "unauthorized", "not_found", "rate_limited",
    "unavailable", "bad_answer",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class SnapshotFile:
    """One file of a snapshot: path within it, size in bytes, and its sha256 or, for small files, git blob sha1."""

    path: str
    size: int
    sha256: str | None = None
    git_sha1: str | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The files of one repository at one commit.

    A local folder has no repository; its commit is the hash of its content, `local-<sha256>`.
    """

    repo_id: str | None
    commit: str
    path: Path
    files: tuple[SnapshotFile, ...] = ()


@dataclass(frozen=True, slots=True)
class Export:
    """One OpenVINO model, made from one snapshot with one resolved recipe.

    Attributes:
        key: Name of the export by its content: source commit, task, recipe and versions.
        path: Folder with the OpenVINO model, its tokenizer and its manifest.
        recipe: Every setting of the export, explicit.
        source: Repository id, or the folder, that the export was made from.
        commit: Commit of the source, or `local-<sha256>` for a folder.
        versions: Versions of the packages that made it.
        size_bytes: Size of all files.
        seconds: How long it took to make.
        reused: Whether it was there already.
    """

    key: str
    path: Path
    recipe: Mapping[str, Any] = field(default_factory=dict)
    source: str | None = None
    commit: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    size_bytes: int = 0
    seconds: float = 0.0
    reused: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    """One thing to generate: a prompt or a conversation.

    Attributes:
        prompt: Text to go on from. Exactly one of `prompt` and `messages` is given.
        messages: Conversation, in order; the model's chat template makes it a prompt.
        options: Options of this request, put over the defaults of the model.
        id: Name of the request, returned with its completion.
        images: Paths or URLs of images, for image-text-to-text models.
        tools: Functions that the model may call, as JSON schemas in the form of OpenAI; the chat template shows them.
        chat_template: Whether a plain prompt is put into the chat template, where the model's setting does not fit.
        template: Text of a chat template in place of the model's.
        pair: Text that a reranker scores against the prompt, which is the query.
        input_type: Whether a text for a vector is a query or a document, which models may prompt differently.
        embedding: Options of a vector or a score, put over those of the model.
        check_form: Whether an answer without the form asked for, cut off at its limit for instance, is an error.
    """

    prompt: str | None = None
    messages: Sequence[Message] | None = None
    options: GenerationOptions | None = None
    id: int | str | None = None
    images: Sequence[str] = ()
    tools: Sequence[Mapping[str, Any]] = ()
    chat_template: Literal["auto", "always", "never"] | None = None
    template: str | None = None
    pair: str | None = None
    input_type: Literal["query", "document"] | None = None
    embedding: EmbeddingOptions | None = None
    check_form: bool = True


@dataclass(frozen=True, slots=True)
class Completion:
    r"""What one request came to.

    Attributes:
        text: Continuation only, without the stop string, unless echo was asked for. Empty with an error.
        finish_reason: Why the text ends, "error" if there is none.
        prompt_tokens: Number of tokens of the prompt, as the model saw it.
        generated_tokens: Number of tokens that were generated, all answers together.
        seconds: Time from the submission to the end.
        error: Sentence that says what went wrong and what to do, or None.
        error_code: Kind of the error, or None.
        request_id: Id of the request.
        alternatives: The further answers where several were asked for.
        logprobs: Log probability (nats) of each generated token of the text, where asked for.
        tokens: Texts of the tokens of `logprobs`. The bytes of a part of a character stand as `\xf0\x9f`.
        parsed: Value of the text where a JSON schema was asked for.
        reasoning: What the model thought before its answer, or None where it shows nothing of it.
        choice_probabilities: Probability of each choice of the response format, together 1, where asked for: the
            product over its tokens, from where the answer begins. It does not depend on which one was drawn.
        vector: Vector of the text, or the one score of the pair, as an array of float32; None for generated text.
    """

    text: str
    finish_reason: FinishReason
    prompt_tokens: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0
    error: str | None = None
    error_code: ErrorCode | None = None
    request_id: int | str | None = None
    alternatives: tuple[str, ...] = ()
    logprobs: tuple[float, ...] | None = None
    tokens: tuple[str, ...] | None = None
    parsed: Any = None
    reasoning: str | None = None
    choice_probabilities: Mapping[str, float] | None = None
    vector: Any = field(default=None, compare=False)

    @property
    def status(self) -> str:
        """Status of a row of a batch: the kind of the error, "length" for a text that was cut, or "ok"."""
        if self.error is not None:
            return self.error_code or "engine_error"
        return self.finish_reason if self.finish_reason in ("length", "deadline", "skipped", "cancelled") else "ok"

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-friendly values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class EndpointStatus:
    """State of a dedicated endpoint, "running" or "paused" for instance. It has a URL once it is deployed."""

    name: str
    namespace: str
    status: str
    url: str | None = None
    repo_id: str | None = None
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class BatchSummary:
    """What a batch came to: counts of rows, where the output is, and how fast it went.

    Attributes:
        rows: Number of rows of the input and of the output.
        succeeded: Number of rows without an error; an answer that was cut off counts as well.
        failed: Number of rows with an error.
        destination: Where the output is.
        generated_tokens: Number of tokens that this run generated.
        seconds: Time from the first request to the last answer of this run.
        statuses: Number of rows by status.
        resumed: Number of rows that an earlier run had finished.
        shared: Number of rows that took the answer of another row with the same prompt.
        errors_destination: Where the failed requests of the OpenAI batch format are.
    """

    rows: int
    succeeded: int
    failed: int
    destination: str
    generated_tokens: int = 0
    seconds: float = 0.0
    statuses: Mapping[str, int] = field(default_factory=dict)
    resumed: int = 0
    shared: int = 0
    errors_destination: str | None = None

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second of the whole batch."""
        return self.generated_tokens / self.seconds if self.seconds else 0.0
