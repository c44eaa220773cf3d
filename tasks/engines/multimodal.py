"""Images of requests: where in a conversation they stand, how they are read, and the prompts that hold their places.

Images come from paths and from file, data, http and https URLs, read with Pillow (the extra `vision`) by threads of
their own, so that a slow server holds nobody up.
"""

from __future__ import annotations

import base64
import binascii
import importlib.util
import io
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from prefect_huggingface.blocks import GenerationOptions
from prefect_huggingface.tasks.engines.base import RequestError
from prefect_huggingface.tasks.engines.chat_templates import ChatTemplateError
from prefect_huggingface.tasks.engines.conversations import Prompt
from prefect_huggingface.tasks.engines.inputs import InputProcessor, check_messages, check_prompt, refuse_options
from prefect_huggingface.tasks.engines.request_state import RequestState
from prefect_huggingface.tasks.errors import EngineError
from prefect_huggingface.tasks.records import Request
from prefect_huggingface.tasks.waiting import WAKE_SECONDS

READERS = 4
# How many requests `generate` has under way: each holds its images.
IN_FLIGHT = 8
MAX_IMAGE_BYTES = 64 * 2**20
MAX_PIXELS = 50_000_000
# Of all images of one request, and of those of all requests that are read and not done, 600 MB in RGB.
MAX_REQUEST_PIXELS = MAX_PIXELS_AHEAD = 200_000_000
TIMEOUT_SECONDS = 30.0
SHOWN_CHARACTERS = 120
IMAGE = {"type": "image"}
MARK_OF_IMAGE = re.compile(r"[<\[].*[>\]]", re.DOTALL)


@dataclass(slots=True)
class MultimodalInput:
    """What was read for one request.

    Attributes:
        images: Images in RGB, in the order of their places, until the engine has made something of them.
        prepared: What the engine made of text and images.
    """

    images: list[Any] = field(default_factory=list)
    prepared: Any = None


class MultimodalInputProcessor(InputProcessor):
    """Input processor of a model for images and text. Images are read before a request reaches its engine.

    Raises:
        EngineError: If Pillow is not installed.
    """

    reads_parts = True

    def __init__(self, *arguments: Any) -> None:
        if importlib.util.find_spec("PIL") is None:
            raise EngineError(
                "Models with images need Pillow, which is not installed. "
                'Install it with pip install "prefect-huggingface[vision]".'
            )
        super().__init__(*arguments)
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="images")
        self._fetchers = ThreadPoolExecutor(READERS, thread_name_prefix="remote-images")
        self._closed = False
        # It guards the number of pixels that are read and belong to requests that are not done.
        self._room = threading.Condition()
        self._pixels = 0

    def read_ahead(self, state: RequestState, hand_over: Callable[[RequestState], None]) -> None:
        """Read the images of a request and hand it over; one that fails is handed over with its error."""
        try:
            sources = read_conversation(state.request)[1]
        except Exception as exc:
            state.fail_with(exc, "The request failed", "Check its messages.")
            hand_over(state)
            return
        state.multimodal = MultimodalInput()
        if not sources:
            hand_over(state)
            return
        # A slow server keeps a thread for a while; nobody but those who ask one waits for these threads.
        readers = self._fetchers if any(map(_is_remote, sources)) else self._readers
        try:
            readers.submit(self._read, state, sources, hand_over)
        except RuntimeError:
            # The readers are gone after the engine was closed.
            hand_over(state)

    def close(self) -> None:
        """Read nothing more. What is being read is handed over."""
        self._closed = True
        self._readers.shutdown(wait=False)
        self._fetchers.shutdown(wait=False)

    def _read(self, state: RequestState, sources: list[str], hand_over: Callable[[RequestState], None]) -> None:
        try:
            if state.abort_reason is None and not self._closed:
                state.multimodal.images = self._read_all(state, sources)
        except Exception as exc:
            if state.abort_reason is None:
                state.fail_with(exc, "The request failed", "Check its images.")
        if state.abort_reason is not None and not state.is_done:
            state.end(state.abort_reason)
        hand_over(state)

    def _read_all(self, state: RequestState, sources: list[str]) -> list[Any]:
        """Return the images of a request, as soon as there is room for them beside those of other requests."""
        files: list[Any] = []
        pixels = 0
        for source in sources:
            files.append(_open_image(source, state.seconds_left))
            pixels += files[-1].width * files[-1].height
            if pixels > MAX_REQUEST_PIXELS:
                raise RequestError(
                    "invalid_prompt",
                    f"The images of a request may have {MAX_REQUEST_PIXELS:,} pixels together, got {pixels:,} in "
                    f"{len(files)} of {len(sources)}. Send fewer, or smaller ones.",
                )
        with self._room:
            while self._pixels and self._pixels + pixels > MAX_PIXELS_AHEAD:
                if self._closed or state.abort_reason is not None:
                    return []
                self._room.wait(WAKE_SECONDS)
            self._pixels += pixels
        state.future.add_done_callback(lambda _: self._make_room(pixels))
        return [_decode_image(source, file) for source, file in zip(sources, files, strict=True)]

    def _make_room(self, pixels: int) -> None:
        with self._room:
            self._pixels -= pixels
            self._room.notify_all()

    @cached_property
    def image_mark(self) -> str:
        """What the template writes in the place of an image, "" where that is not known."""
        if self.template is None:
            return ""
        text = {"type": "text", "text": "PROBE"}
        try:
            without, with_image = (
                self.template.render([{"role": "user", "content": parts}]) for parts in ([text], [IMAGE, text])
            )
        except ChatTemplateError:
            return ""
        if "'type'" in with_image:  # a template for plain text shows the list as it is
            return ""
        start, length = len(os.path.commonprefix([without, with_image])), len(with_image) - len(without)
        # Of the places that give the same text, that of a whole mark: what follows may begin as the mark does.
        marks = (with_image[first : first + length].strip() for first in range(start, max(start - length, -1), -1))
        return next((mark for mark in marks if MARK_OF_IMAGE.fullmatch(mark)), "")

    def place_images(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the messages with the places of images as the engine wants them."""
        return messages

    def _check_options(self, options: GenerationOptions) -> None:
        super()._check_options(options)
        names = [name for name in ("max_reasoning_tokens", "choice_probabilities") if getattr(options, name)]
        refuse_options(options, names, "does not work with images", "Leave it out.")

    def _write(self, state: RequestState) -> Prompt:
        return self.write(state.request, state.options)

    def _messages_of(self, request: Request) -> list[dict[str, Any]]:
        return self.place_images(read_conversation(request)[0])

    def _reasoning_of(self, state: RequestState, prompt: Prompt) -> None:
        return None


def read_image(source: Any, seconds: float = TIMEOUT_SECONDS) -> Any:
    """Return an image in RGB, upright as its file says.

    Args:
        source: Path, or URL with the scheme file, data, http or https.
        seconds: How long a server may take, at most `TIMEOUT_SECONDS`.

    Raises:
        RequestError: If there is no image that can be read. The error shows the source.
    """
    return _decode_image(source, _open_image(source, seconds))


def _open_image(source: Any, seconds: float) -> Any:
    """Return an image whose size is known and whose pixels are still in its file."""
    from PIL import Image

    content = image_bytes(source, seconds)
    with _told_of(source):
        image = Image.open(io.BytesIO(content))
        if (pixels := image.width * image.height) > MAX_PIXELS:
            # A small file may be a picture that fills the memory.
            raise ValueError(f"it has {pixels:,} pixels, more than {MAX_PIXELS:,}")
        return image


def _decode_image(source: Any, image: Any) -> Any:
    with _told_of(source), closing(image):  # which gives its pixels back as well
        return _upright(image).convert("RGB")


@contextmanager
def _told_of(source: Any) -> Iterator[None]:
    """Raise what Pillow says against an image as the error of its source."""
    from PIL import Image, UnidentifiedImageError

    try:
        yield
    except UnidentifiedImageError:
        raise _unreadable(source, "it is not an image of a known kind") from None
    except (OSError, ValueError, Image.DecompressionBombError) as exc:
        raise _unreadable(source, exc) from None


def _upright(image: Any) -> Any:
    """Return an image turned as its file says, or as it is where what the file says cannot be read."""
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken EXIF raises SyntaxError, struct.error and others
        return image


def image_bytes(source: Any, seconds: float = TIMEOUT_SECONDS) -> bytes:
    """Return the content of an image file, from the sources that `read_image` takes.

    Raises:
        RequestError: If it cannot be read.
    """
    if not isinstance(source, (str, Path)):
        raise RequestError(
            "invalid_prompt", f"An image must be a path or a URL, got {type(source).__name__}. Give one."
        )
    try:
        content = _read_bytes(str(source), seconds)
    except (OSError, ValueError) as exc:
        raise _unreadable(source, exc) from None
    if len(content) > MAX_IMAGE_BYTES:
        raise _unreadable(source, f"it has more than {MAX_IMAGE_BYTES // 2**20} MiB")
    return content


def _read_bytes(source: str, seconds: float) -> bytes:
    """Return the content of a file, or its beginning where it is too large."""
    # A path of Windows looks like a URL with a scheme of one letter.
    scheme = urlsplit(source).scheme.lower()
    if scheme in ("http", "https"):
        return _download(source, max(min(seconds, TIMEOUT_SECONDS), 0.001))
    if scheme == "data":
        return _decode(source)
    path = Path(url2pathname(urlsplit(source).path)) if scheme == "file" else Path(source).expanduser()
    if len(scheme) > 1 and scheme != "file":
        raise ValueError(f"the scheme {scheme!r} is not one of file, data, http and https")
    with path.open("rb") as file:
        return file.read(MAX_IMAGE_BYTES + 1)


def _decode(source: str) -> bytes:
    header, _, data = source.partition(",")
    if not header.endswith(";base64"):
        raise ValueError("a data URL must be in base64")
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as exc:
        raise ValueError(f"its base64 is broken: {exc}") from None


def _download(source: str, seconds: float) -> bytes:
    import httpx

    content = bytearray()
    end = time.monotonic() + seconds
    try:
        with httpx.stream("GET", source, timeout=seconds, follow_redirects=True) as response:
            if response.status_code != httpx.codes.OK:
                raise ValueError(f"the server answers {response.status_code}")
            for part in response.iter_bytes():
                content += part
                if len(content) > MAX_IMAGE_BYTES:
                    break
                if time.monotonic() > end:
                    raise ValueError(f"it takes more than {seconds:g} s")
    except (httpx.HTTPError, httpx.InvalidURL) as exc:
        raise ValueError(f"it cannot be fetched: {type(exc).__name__}: {exc}") from None
    return bytes(content)


def _unreadable(source: Any, reason: Exception | str) -> RequestError:
    reason = getattr(reason, "strerror", None) or reason
    # The query of a URL may hold a signature, and a data URL is long.
    shown = str(source).partition("?")[0] if _is_remote(source) else str(source)
    shown = shown if len(shown) <= SHOWN_CHARACTERS else shown[:SHOWN_CHARACTERS] + "..."
    return RequestError("invalid_prompt", f"The image {shown!r} cannot be read: {reason}. Correct its path or address.")


def _is_remote(source: Any) -> bool:
    return str(source)[:8].lower().startswith(("http://", "https://"))


def read_conversation(request: Request) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the messages of a request with parts as their content, and the sources of the images in their order.

    A part is text or the place of an image. Images of the request fill the places that name no source of their own;
    what is left over stands at the beginning of the last message of the user.

    Raises:
        RequestError: If there is no prompt, or images are missing.
    """
    check_prompt(request)
    messages: Any = [{"role": "user", "content": request.prompt}] if request.messages is None else request.messages
    # Roles and texts are checked without the images.
    check_messages([_without_images(message) for message in messages] if _is_list(messages) else messages)
    given = iter(request.images)
    sources: list[str] = []
    read = [_read_message(message, given, sources) for message in messages]
    return _with_rest(read, list(given), sources)


def _with_rest(
    messages: list[dict[str, Any]], rest: list[str], sources: list[str]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Put the images that have no place at the beginning of the last message of the user."""
    if not rest:
        return messages, sources
    last = max((index for index, message in enumerate(messages) if message["role"] == "user"), default=None)
    if last is None:
        raise RequestError("invalid_prompt", "Images need a message of the user to stand in. Add one.")
    before = sum(part == IMAGE for message in messages[:last] for part in message["content"])
    messages[last]["content"] = [IMAGE] * len(rest) + messages[last]["content"]
    return messages, [*sources[:before], *rest, *sources[before:]]


def _read_message(message: Mapping[str, Any], given: Iterator[str], sources: list[str]) -> dict[str, Any]:
    content = message.get("content") or ""
    parts = []
    for part in content if _is_list(content) else [content]:
        if isinstance(part, str) or not _is_image(part):
            parts.append({"type": "text", "text": part if isinstance(part, str) else part["text"]})
            continue
        source = _source_of(part) or next(given, None)
        if source is None:
            raise RequestError("invalid_prompt", "The messages have more places for images than there are. Add images.")
        sources.append(source)
        parts.append(IMAGE)
    return {**message, "content": parts}


def _source_of(part: Mapping[str, Any]) -> str | None:
    nested = part.get("image_url")
    for value in (
        nested.get("url") if isinstance(nested, Mapping) else nested,
        *map(part.get, ("url", "path", "image")),
    ):
        if value is not None:
            return str(value)
    return None


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_image(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in ("image", "image_url")


def _without_images(message: Any) -> Any:
    if not isinstance(message, Mapping) or not _is_list(message.get("content")):
        return message
    rest = [part for part in message["content"] if not _is_image(part)]
    return {**message, "content": rest or "image"}
