"""How the local Hub sends a file, whole or in part, and what a fault makes of it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterator

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from support.hub_faults import Fault, LoggedRequest
from support.hub_repositories import StoredFile


class ConnectionCut(Exception):
    """Raised inside the server so that it drops the connection in the middle of an answer."""


class FileResponse:
    """The answer to a GET or HEAD request for a file, with ranges."""

    def __init__(self, file: StoredFile, request: Request, headers: dict[str, str]) -> None:
        self.file = file
        self.method = request.method
        self.start, self.stop = 0, file.size
        self.status_code = 200
        self.headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **headers}
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
        if match:
            self._set_range(int(match[1]), int(match[2]) + 1 if match[2] else file.size)

    def _set_range(self, start: int, stop: int) -> None:
        if start >= self.file.size:
            self.status_code, self.start, self.stop = 416, 0, 0
            self.headers["Content-Range"] = f"bytes */{self.file.size}"
            return
        self.status_code, self.start, self.stop = 206, start, min(stop, self.file.size)
        self.headers["Content-Range"] = f"bytes {start}-{self.stop - 1}/{self.file.size}"


def make_fault(response: Response | FileResponse, fault: Fault | None, entry: LoggedRequest) -> ASGIApp:
    """Return the app that sends the response with its fault, and counts the bytes of the body."""
    if fault is not None and fault.kind == "ignore_range" and isinstance(response, FileResponse):
        response.start, response.stop, response.status_code = 0, response.file.size, 200
        response.headers.pop("Content-Range", None)
        entry.status = 200
    if fault is not None and fault.kind == "headers":
        response.headers.update(fault.headers)
    size, blocks = _body(response)
    if fault is not None and fault.kind == "truncate":
        size = min(size, fault.after)
    headers = {**{k.lower(): v for k, v in response.headers.items()}, "content-length": str(size)}
    start = {"type": "http.response.start", "status": response.status_code}
    start["headers"] = [(name.encode(), value.encode()) for name, value in headers.items()]

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(start)
        if entry.method != "HEAD":
            gone = asyncio.ensure_future(_wait_for_end(receive))
            is_slow = fault is not None and fault.kind == "drip"
            async for block in _drip(blocks, fault) if is_slow else _disturb(blocks, fault, size):
                if gone.done():
                    return
                await send({"type": "http.response.body", "body": block, "more_body": True})
                entry.bytes_sent += len(block)
            gone.cancel()
        await send({"type": "http.response.body", "body": b""})

    return app


def _body(response: Response | FileResponse) -> tuple[int, Iterator[bytes]]:
    if isinstance(response, FileResponse):
        return response.stop - response.start, response.file.read(response.start, response.stop)
    return len(response.body), iter((bytes(response.body),))


async def _wait_for_end(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _disturb(blocks: Iterator[bytes], fault: Fault | None, size: int) -> AsyncIterator[bytes]:
    """Yield `size` bytes of a body, with the fault at its place."""
    kind = fault.kind if fault is not None else None
    limit = fault.after if fault is not None and kind in ("cut", "stall_body") else size
    place = 0
    for block in blocks:
        if fault is not None and kind == "corrupt":
            block = _flip(block, fault.after - place)
        block = block[: limit - place]
        if block:
            yield block
        place += len(block)
        if place >= limit:
            break
    if fault is not None and kind == "stall_body":
        await fault.stall()
        raise ConnectionCut
    if kind == "cut":
        # Give the client time to read what it was sent, or it might see the reset first.
        await asyncio.sleep(0.05)
        raise ConnectionCut


async def _drip(blocks: Iterator[bytes], fault: Fault) -> AsyncIterator[bytes]:
    """Yield the bytes of a body one by one, as long as the fault lasts."""
    for block in blocks:
        for place in range(len(block)):
            await asyncio.sleep(0.05)
            if fault.is_over:
                raise ConnectionCut
            yield block[place : place + 1]


def _flip(block: bytes, place: int) -> bytes:
    """Return the block with one byte changed, if that byte is in it."""
    if not 0 <= place < len(block):
        return block
    return block[:place] + bytes([block[place] ^ 0xFF]) + block[place + 1 :]
