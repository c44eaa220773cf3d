"""How one request fails: its error inside an engine, and the completion that tells the caller."""

from __future__ import annotations

from concurrent.futures import Future

from prefect_huggingface.tasks.records import Completion, ErrorCode, Request


class RequestError(Exception):
    """One request cannot be worked on. It never leaves an engine: it becomes the error of a completion.

    Attributes:
        code: Kind of the error.
        prompt_tokens: Number of tokens of the prompt, 0 where it is not known.
    """

    def __init__(self, code: ErrorCode, message: str, prompt_tokens: int = 0) -> None:
        super().__init__(message)
        self.code = code
        self.prompt_tokens = prompt_tokens


def failed(
    request: Request,
    code: ErrorCode,
    message: str,
    *,
    prompt_tokens: int = 0,
    generated_tokens: int = 0,
    seconds: float = 0.0,
) -> Completion:
    """Return the completion of a request that failed.

    Args:
        request: Request that failed.
        code: Kind of the error.
        message: What is wrong and what to do about it.
        prompt_tokens: Number of tokens of the prompt.
        generated_tokens: Number of tokens that were generated before the failure.
        seconds: Time since the submission.
    """
    return Completion(
        text="",
        finish_reason="error",
        prompt_tokens=prompt_tokens,
        generated_tokens=generated_tokens,
        seconds=seconds,
        error=message,
        error_code=code,
        request_id=request.id,
    )


def refused(request: Request, error: RequestError) -> Future[Completion]:
    """Return the future of a request that no engine sees."""
    future: Future[Completion] = Future()
    future.set_result(failed(request, error.code, str(error)))
    return future
