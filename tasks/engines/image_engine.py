"""What the engines for images and text have in common: images are read beside the engine, by threads of their own."""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from prefect.logging import get_logger

from prefect_huggingface.blocks import GenerationOptions
from prefect_huggingface.tasks.engines.answers import Submission
from prefect_huggingface.tasks.engines.chat_templates import ChatTemplate, ChatTemplateError
from prefect_huggingface.tasks.engines.failures import RequestError
from prefect_huggingface.tasks.engines.image_conversations import read_conversation
from prefect_huggingface.tasks.engines.images import read_image
from prefect_huggingface.tasks.engines.prompts import Prompt, PromptWriter, fit_context
from prefect_huggingface.tasks.engines.protocol import OnText
from prefect_huggingface.tasks.engines.threads import ThreadedEngine
from prefect_huggingface.tasks.records import Completion, Request

logger = get_logger(__name__)

READERS = 4


@dataclass(slots=True, eq=False)
class Scene:
    """A request whose images were read.

    Attributes:
        submission: Request with its future.
        messages: Conversation with parts as content.
        images: Images in RGB, in the order of their places.
    """

    submission: Submission
    messages: list[dict[str, Any]]
    images: list[Any] = field(default_factory=list)


class ImageReader(ThreadedEngine):
    """Reads the images of requests before it queues them, so that a slow server holds nobody up."""

    def __init__(self, *arguments: Any) -> None:
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="images")
        self._scenes: dict[Submission, Scene] = {}
        super().__init__(*arguments)

    def submit(self, request: Request, on_text: OnText | None = None) -> Future[Completion]:
        """Queue a request, read its images, and return the future of its completion."""
        submission = Submission(request, Future(), on_text, closed=self._closed)
        try:
            self._readers.submit(self._read, submission)
        except RuntimeError:
            # The readers are gone after the engine was closed.
            submission.cancel()
        return submission.future

    def close(self) -> None:
        """End the engine and free its memory. Requests that are not done end as cancelled."""
        super().close()
        self._readers.shutdown(wait=False)

    def _read(self, submission: Submission) -> None:
        try:
            if submission.must_end is None:
                messages, sources = read_conversation(submission.request)
                self._scenes[submission] = Scene(submission, messages, [read_image(source) for source in sources])
        except RequestError as exc:
            submission.fail(exc.code, str(exc))
            return
        except Exception as exc:
            submission.fail("engine_error", f"The request failed: {type(exc).__name__}: {exc}. Check its images.")
            return
        with self._lock:
            if not self._closed.is_set():
                self._inbox.put(submission)
                return
        self._scenes.pop(submission, None)
        submission.cancel()


class ImageEngine(ImageReader):
    """Runs requests with images one by one."""

    in_flight = 8

    def __init__(self) -> None:
        self._waiting: deque[Scene] = deque()
        self._current: Scene | None = None
        super().__init__()

    @abstractmethod
    def _show(self, scene: Scene) -> None:
        """Run one request and complete its submission."""

    def _accept(self, submission: Submission) -> None:
        scene = self._scenes.pop(submission, None)
        if scene is not None:
            self._waiting.append(scene)

    def _under_way(self) -> list[Submission]:
        current = [self._current] if self._current is not None else []
        return [scene.submission for scene in (*current, *self._waiting)]

    def _forget(self) -> None:
        self._waiting.clear()
        self._current = None

    def _turn(self) -> None:
        self._current = self._waiting.popleft() if self._waiting else None
        if self._current is None:
            return
        try:
            self._show(self._current)
        except RequestError as exc:
            self._current.submission.fail(exc.code, str(exc), prompt_tokens=exc.prompt_tokens)
        except Exception as exc:
            logger.warning("A request with images failed.", exc_info=True)
            self._current.submission.fail("engine_error", f"The model refuses the request: {exc}. Check its images.")
        self._current = None


def fits_context(token_ids: list[int], options: GenerationOptions, context_length: int | None) -> bool:
    """Tell whether a prompt fits the context. One with images cannot be cut, so cutting counts as an error.

    Raises:
        RequestError: If it does not fit and is not to be skipped.
    """
    policy = "skip" if options.context_overflow == "skip" else "error"
    uncut = options.model_copy(update={"context_overflow": policy})
    return fit_context(token_ids, uncut, context_length) is not None


def write_scene(
    prompts: PromptWriter, scene: Scene, render: Callable[[ChatTemplate, list[dict[str, Any]], Any], str]
) -> Prompt:
    """Return the prompt of a scene, through the chat template where one is to be used.

    Args:
        prompts: Writes the prompts of the model.
        scene: What to write.
        render: Puts messages and tools into the template, with the places of images as the engine wants them.

    Raises:
        RequestError: If the model has no chat template for messages, or the template refuses them.
    """
    request = scene.submission.request
    if request.prompt is not None:
        prompt = prompts.write(replace(request, images=()))
        if prompt.text == request.prompt:
            return prompt
    if prompts.template is None:
        raise RequestError(
            "invalid_prompt", "The model has no chat template, so it cannot answer messages. Give a plain prompt."
        )
    try:
        return Prompt(render(prompts.template, scene.messages, request.tools), add_special_tokens=False)
    except ChatTemplateError as exc:
        raise RequestError("invalid_prompt", str(exc)) from exc
