"""Tasks that put prompts and conversations through a model and give back the text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing

from prefect import task
from prefect.cache_policies import NO_CACHE

from prefect_huggingface.blocks import GenerationOptions, InferenceEndpoint, LocalModel
from prefect_huggingface.tasks.engines.base import Engine
from prefect_huggingface.tasks.engines.chat_templates import LostTextError
from prefect_huggingface.tasks.engines.conversations import check_shapes
from prefect_huggingface.tasks.engines.registry import load_engine
from prefect_huggingface.tasks.errors import GenerationError
from prefect_huggingface.tasks.records import Completion, Message, Request
from prefect_huggingface.tasks.run_logs import library_logs, run_log

LOGGED_CHARACTERS = 80


def complete_prompts(
    model: LocalModel | InferenceEndpoint, prompts: Sequence[str], options: GenerationOptions | None = None
) -> list[Completion]:
    """Generate one completion for each prompt.

    The model is loaded once per process and then reused. A prompt that fails gives a completion with its error, and the
    others go on.

    Args:
        model: Model to use, which is downloaded and exported first where needed, or an endpoint.
        prompts: N prompts, in order. A single string is not a list of prompts.
        options: Options over those of the model.

    Returns:
        N completions, in the order of the prompts.

    Raises:
        EngineError: If the model cannot be loaded.
    """
    if isinstance(prompts, str):
        raise TypeError(f"`prompts` must be a list of texts, got {prompts!r}. Put it into a list.")
    return _run(model, [Request(prompt, options=options) for prompt in prompts])


def complete_conversations(
    model: LocalModel | InferenceEndpoint,
    conversations: Sequence[Sequence[Message]],
    options: GenerationOptions | None = None,
) -> list[Completion]:
    """Generate the next message of the assistant for each conversation.

    The chat template of the model is applied once.

    Args:
        model: Model to use, with a chat template, or an endpoint.
        conversations: N lists of messages with `role` and `content`.
        options: Options over those of the model.

    Returns:
        N completions, in the order of the conversations.

    Raises:
        EngineError: If the model cannot be loaded.
        GenerationError: If its template leaves out messages of a conversation, before the first one is asked.
    """
    if conversations and isinstance(conversations[0], dict):
        raise TypeError("`conversations` must be a list of lists of messages, got messages. Put them into a list.")
    return _run(model, [Request(messages=messages, options=options) for messages in conversations])


def stream_completion(
    model: LocalModel | InferenceEndpoint, prompt: str, options: GenerationOptions | None = None
) -> Iterator[str]:
    """Yield the text of one completion piece by piece as it is generated. The log of the run shows it.

    Args:
        model: Model or endpoint to use.
        prompt: Text to go on from.
        options: Options over those of the model.

    Raises:
        GenerationError: If the request fails, as soon as it does.
        EngineError: If the model cannot be loaded.
    """
    with library_logs(), closing(load_engine(model).stream(Request(prompt, options=options))) as pieces:
        yield from _shown(pieces)


def _run(model: LocalModel | InferenceEndpoint, requests: Sequence[Request]) -> list[Completion]:
    if not requests:
        return []
    engine = load_engine(model)
    _check_conversations(engine, requests)
    with library_logs():
        return engine.answer_all(requests)


def _check_conversations(engine: Engine, requests: Sequence[Request]) -> None:
    if engine.inputs is None or engine.inputs.template is None:
        return
    template, in_parts = engine.inputs.template, engine.inputs.reads_parts
    conversations = [request.messages for request in requests if request.messages is not None]
    options = requests[0].options or GenerationOptions()
    try:
        chosen = engine.inputs.defaults.merged(options).template_options
        check_shapes(template, conversations, options=chosen, in_parts=in_parts)
    except LostTextError as exc:
        raise GenerationError(str(exc), error_code="invalid_prompt") from None


def _shown(pieces: Iterable[str]) -> Iterator[str]:
    """Pass pieces on and log their text as it comes: at line ends, and where a line gets long."""
    log = run_log()
    line = ""
    for piece in pieces:
        yield piece
        *lines, line = (line + piece).split("\n")
        if len(line) > LOGGED_CHARACTERS:
            lines, line = [*lines, line], ""
        for whole in lines:
            log.info("%s", whole)
    if line:
        log.info("%s", line)


generate_text = task(name="generate-text", cache_policy=NO_CACHE)(complete_prompts)
generate_chat = task(name="generate-chat", cache_policy=NO_CACHE)(complete_conversations)
stream_text = task(name="stream-text", cache_policy=NO_CACHE)(stream_completion)
