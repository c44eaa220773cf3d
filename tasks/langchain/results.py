"""What LangChain's results say about a completion: why it ends, and how many tokens it took."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from langchain_core.messages.ai import UsageMetadata

from prefect_huggingface.tasks.records import Completion

USAGE_NAMES = ("prompt_tokens", "completion_tokens", "total_tokens")


def usage_of(completion: Completion) -> dict[str, int]:
    """Return the token counts of a completion, under the names of OpenAI."""
    prompt, generated = completion.prompt_tokens, completion.generated_tokens
    return dict(zip(USAGE_NAMES, (prompt, generated, prompt + generated), strict=True))


def add_usage(usages: Iterable[dict[str, int]]) -> dict[str, int]:
    """Return the sum of token counts."""
    total = dict.fromkeys(USAGE_NAMES, 0)
    for usage in usages:
        total = {name: total[name] + usage[name] for name in USAGE_NAMES}
    return total


def usage_metadata(completion: Completion) -> UsageMetadata:
    """Return the token counts of a completion, under the names of LangChain's messages."""
    prompt, generated = completion.prompt_tokens, completion.generated_tokens
    return UsageMetadata(input_tokens=prompt, output_tokens=generated, total_tokens=prompt + generated)


def generation_info(completion: Completion) -> dict[str, Any]:
    """Return what is known about a completion, other than its text."""
    info: dict[str, Any] = {"finish_reason": completion.finish_reason, "token_usage": usage_of(completion)}
    if completion.logprobs is not None:
        info["logprobs"] = list(completion.logprobs)
    return info
