"""Images of requests: how many, how large, and from where."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io

from prefect_huggingface.deployments.model_server.models import ApiError
from prefect_huggingface.tasks.openai_protocol import OpenAICall, image_urls

MAX_IMAGES = 16
MAX_PIXELS = 50_000_000


async def check_images(call: OpenAICall, allow_remote: bool) -> None:
    """Refuse images that are too many, too large or not to be fetched.

    Raises:
        ApiError: With the reason.
    """
    urls = list(image_urls(call.requests))
    if len(urls) > MAX_IMAGES:
        raise _refusal(f"A request may have {MAX_IMAGES} images, got {len(urls)}. Send fewer.")
    for url in urls:
        if url.lower().startswith("data:"):
            await asyncio.to_thread(_check_size, url)
        elif not allow_remote:
            raise _refusal("This server fetches no images. Send a data URL, or start it with --allow-remote-images.")


def _check_size(url: str) -> None:
    """Look at the head of an image only: a small file may be a picture that fills the memory."""
    header, _, data = url.partition(",")
    if not header.lower().endswith(";base64"):
        raise _refusal("The data URL of an image must be in base64. Correct it.")
    try:
        from PIL import Image
    except ImportError:
        return  # the engine says what is missing
    try:
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
            width, height = image.size
    except (binascii.Error, OSError, ValueError, Image.DecompressionBombError) as exc:
        raise _refusal(f"The image cannot be read: {exc}. Correct it.") from None
    if width * height > MAX_PIXELS:
        raise _refusal(f"An image may have {MAX_PIXELS:,} pixels, got {width} x {height}. Make it smaller.")


def _refusal(text: str) -> ApiError:
    return ApiError(400, "invalid_prompt", text, "messages")
