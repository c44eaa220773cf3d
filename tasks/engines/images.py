"""Images of requests: read from paths, file, data, http and https URLs, with Pillow (the extra `vision`)."""

from __future__ import annotations

import base64
import binascii
import importlib.util
import io
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from prefect_huggingface.tasks.engines.failures import RequestError
from prefect_huggingface.tasks.errors import EngineError

MAX_IMAGE_BYTES = 64 * 2**20
TIMEOUT_SECONDS = 30.0
SHOWN_CHARACTERS = 120


def check_pillow() -> None:
    """Check that images can be read at all.

    Raises:
        EngineError: If Pillow is not installed.
    """
    if importlib.util.find_spec("PIL") is None:
        raise EngineError(
            "Models with images need Pillow, which is not installed. "
            'Install it with pip install "prefect-huggingface[vision]".'
        )


def read_image(source: Any) -> Any:
    """Return an image in RGB.

    Args:
        source: Path, or URL with the scheme file, data, http or https.

    Raises:
        RequestError: If there is no image that can be read. The error shows the source.
    """
    from PIL import Image, UnidentifiedImageError

    if not isinstance(source, (str, Path)):
        raise RequestError(
            "invalid_prompt", f"An image must be a path or a URL, got {type(source).__name__}. Give one."
        )
    try:
        with Image.open(io.BytesIO(_read_bytes(str(source)))) as image:
            return image.convert("RGB")
    except UnidentifiedImageError:
        raise _unreadable(source, "it is no image of a known kind") from None
    except (OSError, ValueError, Image.DecompressionBombError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
        raise _unreadable(source, reason) from None


def _read_bytes(source: str) -> bytes:
    # A path of Windows looks like a URL with a scheme of one letter.
    scheme = urlsplit(source).scheme.lower()
    if scheme in ("http", "https"):
        return _download(source)
    if scheme == "data":
        return _decode(source)
    path = Path(url2pathname(urlsplit(source).path)) if scheme == "file" else Path(source).expanduser()
    if len(scheme) > 1 and scheme != "file":
        raise ValueError(f"the scheme {scheme!r} is not one of file, data, http and https")
    if path.is_file() and path.stat().st_size > MAX_IMAGE_BYTES:
        raise ValueError(f"it has more than {MAX_IMAGE_BYTES // 2**20} MiB")
    return path.read_bytes()


def _decode(source: str) -> bytes:
    header, _, data = source.partition(",")
    if not header.endswith(";base64"):
        raise ValueError("a data URL must be in base64")
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as exc:
        raise ValueError(f"its base64 is broken: {exc}") from None


def _download(source: str) -> bytes:
    import httpx

    parts: list[bytes] = []
    try:
        with httpx.stream("GET", source, timeout=TIMEOUT_SECONDS, follow_redirects=True) as response:
            if response.status_code != httpx.codes.OK:
                raise ValueError(f"the server answers {response.status_code}")
            for part in response.iter_bytes():
                parts.append(part)
                if sum(map(len, parts)) > MAX_IMAGE_BYTES:
                    raise ValueError(f"it has more than {MAX_IMAGE_BYTES // 2**20} MiB")
    except (httpx.HTTPError, httpx.InvalidURL) as exc:
        raise ValueError(f"it cannot be fetched: {type(exc).__name__}: {exc}") from None
    return b"".join(parts)


def _unreadable(source: Any, reason: str) -> RequestError:
    # The query of a URL may hold a signature, and a data URL is long.
    shown = str(source).partition("?")[0] if str(source).lower().startswith("http") else str(source)
    shown = shown if len(shown) <= SHOWN_CHARACTERS else shown[:SHOWN_CHARACTERS] + "..."
    return RequestError("invalid_prompt", f"The image {shown!r} cannot be read: {reason}. Correct its path or address.")
